"""What a recipe says about DROID in RLDS form: which mixture, and what the actions are. No TensorFlow here."""

import dataclasses
import enum

from openpi.shared.ranges import Positive


class DroidActionSpace(enum.Enum):
    """What the seven arm dimensions of a DROID action mean; the gripper is a position in both."""

    JOINT_POSITION = enum.auto()
    JOINT_VELOCITY = enum.auto()


@dataclasses.dataclass(frozen=True)
class RLDSDataset:
    """One dataset of a mixture.

    Attributes:
        name, version: of the TFDS builder; its folder is `<rlds_data_dir>/<name>/<version>`.
        weight: share of the mixture; the weights of a mixture add up to 1.
        filter_dict_path: JSON of frame ranges to keep per episode; None keeps all frames.
    """

    name: str
    version: str
    weight: Positive
    filter_dict_path: str | None = None
