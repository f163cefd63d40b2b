"""The dataset of the loader and statistics benchmarks: two 256x256 cameras, textured and moving, 10 frames/s.

python benchmarks/loader_dataset.py FOLDER [--episodes 20] [--frames 200] [--images]
"""

import argparse
from pathlib import Path

import numpy as np

from openpi.data.lerobot.writer import LeRobotWriter

SIDE_PX = 256


def write(root: Path, *, episodes: int = 20, frames: int = 200, use_videos: bool = True) -> None:
    camera = {"dtype": "image", "shape": [SIDE_PX, SIDE_PX, 3], "names": ["height", "width", "channels"]}
    features = {
        "image": camera,
        "wrist_image": camera,
        "state": {"dtype": "float32", "shape": [8], "names": None},
        "actions": {"dtype": "float32", "shape": [7], "names": None},
    }
    rng = np.random.default_rng(0)
    with LeRobotWriter(root, fps=10, features=features, robot_type="panda", use_videos=use_videos) as writer:
        for episode in range(episodes):
            recording = {
                "image": _film(frames, seed=episode),
                "wrist_image": _film(frames, seed=1000 + episode),
                "state": np.cumsum(rng.normal(size=(frames, 8)), axis=0).astype(np.float32),
                "actions": rng.normal(size=(frames, 7)).astype(np.float32),
            }
            writer.add_episode(recording, "pick up the cube")


def _film(num_frames: int, seed: int) -> np.ndarray:
    """uint8[n, h, w, 3]: a textured background that drifts, and a block that circles in front of it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX].astype(np.float32)
    texture = rng.integers(0, 30, (SIDE_PX, SIDE_PX, 3)) + np.stack([x / 2, y / 2, (x + y) / 4], axis=-1)
    film = np.empty((num_frames, SIDE_PX, SIDE_PX, 3), np.uint8)
    for t in range(num_frames):
        frame = np.roll(texture, 2 * t, axis=1)
        top, left = int(100 + 80 * np.sin(t / 20 + seed)), int(100 + 80 * np.cos(t / 15))
        frame[top : top + 40, left : left + 40] = (200, 60, 40)
        film[t] = frame.clip(0, 255)
    return film


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--images", action="store_true", help="PNG in the tables instead of video")
    arguments = parser.parse_args()
    write(arguments.folder, episodes=arguments.episodes, frames=arguments.frames, use_videos=not arguments.images)
