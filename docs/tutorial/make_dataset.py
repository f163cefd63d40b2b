"""Turns robot logs into a LeRobot v3.0 dataset: `python make_dataset.py OUTPUT`.

Replace `read_episodes` by code that reads your own logs; the rest stays.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from openpi.data.lerobot.writer import LeRobotWriter

FPS = 20
JOINTS = ["base", "shoulder", "elbow", "gripper"]

FEATURES = {
    "front": {"dtype": "video", "shape": [120, 160, 3], "names": ["height", "width", "channels"]},
    "state": {"dtype": "float32", "shape": [4], "names": JOINTS},
    "actions": {"dtype": "float32", "shape": [4], "names": JOINTS},
}


def read_episodes() -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """Frames of one episode at a time, time axis first, and what the robot was told to do.

    Stands in for your logs: an arm that swings to the side it is told, seen by one camera.
    """
    rng = np.random.default_rng(0)
    for episode in range(8):
        side = (-1, 1)[episode % 2]
        steps = int(rng.integers(50, 70))
        progress = np.linspace(0, 1, steps + 1)
        # Radians; the gripper closes from 0 to 1.
        path = np.stack([side * progress, 0.5 * progress**2, -0.3 * progress, progress], axis=1)
        path += rng.normal(0, 0.01, path.shape)
        yield (
            {
                "front": np.stack([draw(joints) for joints in path[:-1]]),  # RGB, uint8
                "state": path[:-1].astype(np.float32),  # where the joints were
                "actions": path[1:].astype(np.float32),  # where they were commanded to go: absolute targets
            },
            f"swing to the {'left' if side < 0 else 'right'}",
        )


def draw(joints: np.ndarray) -> np.ndarray:
    """A camera image: a red square where the hand is."""
    image = np.full((120, 160, 3), (70, 90, 120), np.uint8)
    row, column = int(90 - 60 * joints[1]), int(80 + 50 * joints[0])
    image[row - 8 : row + 8, column - 8 : column + 8] = (220, 40, 30)
    return image


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python make_dataset.py OUTPUT, a folder that does not exist yet")
    output = Path(sys.argv[1])
    with LeRobotWriter(output, fps=FPS, features=FEATURES, robot_type="four_joint_arm") as writer:
        for frames, task in read_episodes():
            writer.add_episode(frames, task)
    print(f"dataset: {output}")
