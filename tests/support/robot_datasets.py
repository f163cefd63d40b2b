"""Small datasets in the format of each robot, as their converters write them; only the images are smaller.

`FORMATS` knows them by the repo id of the recipes that read them.
"""

import dataclasses
from pathlib import Path

import numpy as np

from openpi.data.lerobot.writer import LeRobotWriter

# As long as each other: with a robot's state, prompts of one recipe then take the same multiple of 32 tokens. For each
# multiple a step is compiled.
TASKS = ("pick up the red cube and put it into the box", "open the drawer and take out the blue cup")
_CAMERA = {"dtype": "image", "names": ["height", "width", "channel"]}
_NUM_EPISODES = 2
_NUM_FRAMES = 12


@dataclasses.dataclass(frozen=True)
class RobotFormat:
    """One robot's features: cameras with (height, width), vectors with their widths."""

    fps: int
    cameras: dict[str, tuple[int, int]]
    vectors: dict[str, int]


def _aloha(fps: int, *names: str) -> RobotFormat:
    cameras = {f"observation.images.{name}": (30, 40) for name in names}
    return RobotFormat(fps, cameras, {"observation.state": 14, "action": 14})


_DROID_CAMERAS = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")

FORMATS = {
    "lerobot/aloha_sim_transfer_cube_human": _aloha(50, "top"),
    "physical-intelligence/aloha_pen_uncap_diverse": _aloha(50, "cam_high", "cam_left_wrist", "cam_right_wrist"),
    "TrossenRoboticsCommunity/bimanual-widowxai-handover-cube": _aloha(30, "top", "bottom", "left", "right"),
    "TrossenRoboticsCommunity/trossen_ai_stationary_organize_tools": _aloha(
        30, "cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"
    ),
    "physical-intelligence/libero": RobotFormat(
        10, {"image": (32, 32), "wrist_image": (32, 32)}, {"state": 8, "actions": 7}
    ),
    "your_hf_username/my_droid_dataset": RobotFormat(
        15,
        dict.fromkeys(_DROID_CAMERAS, (18, 32)),
        {"joint_position": 7, "gripper_position": 1, "actions": 8},
    ),
    "your_hf_username/ur5_dataset": RobotFormat(
        20, {"image": (30, 40), "wrist_image": (30, 40)}, {"joints": 6, "gripper": 1, "actions": 7}
    ),
    "your_hf_username/calvin_dataset": RobotFormat(
        30, {"rgb_static": (200, 200), "rgb_gripper": (84, 84)}, {"state": 15, "actions": 15}
    ),
    "lerobot": RobotFormat(
        15,
        {"observation.images.left": (224, 224), "observation.images.side": (224, 224)},
        {"observation.state": 15, "action": 8},
    ),
    "openpi/tabletop": RobotFormat(10, {"image": (64, 64), "wrist_image": (64, 64)}, {"state": 6, "actions": 6}),
}


def write_dataset(folder: Path, robot: RobotFormat) -> Path:
    """Two episodes, one task each; joints that drift within [-1, 1]."""
    rng = np.random.default_rng(0)
    features = {name: {**_CAMERA, "shape": (*size, 3)} for name, size in robot.cameras.items()}
    features |= {n: {"dtype": "float32", "shape": (w,), "names": None} for n, w in robot.vectors.items()}
    with LeRobotWriter(folder, fps=robot.fps, features=features) as writer:
        for episode in range(_NUM_EPISODES):
            frames = {
                name: rng.integers(256, size=(_NUM_FRAMES, *size, 3), dtype=np.uint8)
                for name, size in robot.cameras.items()
            }
            for name, width in robot.vectors.items():
                frames[name] = np.sin(rng.normal(size=(_NUM_FRAMES, width)).cumsum(axis=0)).astype(np.float32)
            writer.add_episode(frames, TASKS[episode % len(TASKS)])
    return folder
