"""A recipe of a user's own, as a checkpoint of version 1 carries it."""

import dataclasses

from openpi import transforms
from openpi.models.pi0_config import Pi0Config
from openpi.policies.robot_spec import CameraSpec, RobotSpec, VectorSpec
from openpi.training.config import TrainConfig
from openpi.training.data_config import SimpleDataConfig


@dataclasses.dataclass(frozen=True)
class FlipGripper:
    axis: int = 6
    spec: RobotSpec = RobotSpec(  # noqa: RUF009
        "arm",
        (CameraSpec("top", "base_0_rgb"),),
        (VectorSpec("state", ("x",), ("m",)),),
        VectorSpec("actions", ("x",), ("m",)),
    )

    def __call__(self, data):
        return data


def my_transforms(model_config):
    return transforms.Group(inputs=(FlipGripper(),))


recipe = TrainConfig(
    name="my_arm",
    exp_name="first",
    model=Pi0Config(action_horizon=7),
    data=SimpleDataConfig(repo_id="me/mine", data_transforms=my_transforms),
    policy_metadata={"gripper": FlipGripper(axis=3), "class": FlipGripper},
)
