"""DROID in RLDS form: what a recipe says about it, and the mixture that this describes. No TensorFlow here."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

from openpi.data.droid_rlds.folder import open_folder
from openpi.data.droid_rlds.frame_ranges import FrameRanges
from openpi.data.droid_rlds.stream import Mixture, MixturePart
from openpi.shared import download

if TYPE_CHECKING:
    from openpi.training.data_config import DataConfig


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
    weight: float
    filter_dict_path: str | None = None


def open_mixture(data_config: DataConfig, horizon: int) -> Mixture:
    """The datasets of a recipe, opened, with their frame ranges fetched.

    Raises:
        FileNotFoundError, ValueError: a dataset or its ranges are not there or cannot be used; or the weights do not
            add up to 1.
    """
    assert data_config.rlds_data_dir is not None
    parts = []
    for dataset in data_config.datasets:
        folder = open_folder(data_config.rlds_data_dir, dataset.name, dataset.version)
        ranges = FrameRanges()
        if dataset.filter_dict_path is not None:
            ranges = FrameRanges.load(download.maybe_download(dataset.filter_dict_path))
        parts.append(MixturePart(folder, dataset.weight, ranges))
    is_velocity = data_config.action_space is DroidActionSpace.JOINT_VELOCITY
    return Mixture(tuple(parts), "joint_velocity" if is_velocity else "joint_position", horizon)
