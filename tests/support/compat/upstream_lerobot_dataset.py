"""A dataset and the real LeRobot: `python upstream_lerobot_dataset.py MODE ROOT FEATURES.json EPISODES.npz OUT.npz`.

    create  EPISODES.npz holds `episode/feature` arrays
    resume  the same, behind the episodes that are there
    read    nothing is written

In the end OUT.npz has what LeRobot reads: `feature` arrays over all frames, and `stats/feature/name`.
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

FPS = 10


def main(mode: str, root: str, features: str, episodes: str, out: str) -> None:
    options = {"rgb_encoder": encoder(os.environ["CODEC"])} if os.environ.get("CODEC") else {}
    if mode == "create":
        described = json.loads(Path(features).read_text())
        shaped = {key: {**feature, "shape": tuple(feature["shape"])} for key, feature in described.items()}
        add(LeRobotDataset.create("test/set", FPS, shaped, root=root, **options), episodes)
    elif mode == "resume":
        add(LeRobotDataset.resume("test/set", root=root, **options), episodes)
    read(root, out)


def add(dataset: LeRobotDataset, episodes: str) -> None:
    given = np.load(episodes)
    for episode in sorted({key.partition("/")[0] for key in given}):
        arrays = {key.partition("/")[2]: given[key] for key in given if key.startswith(f"{episode}/")}
        for i in range(len(next(iter(arrays.values())))):
            frame = {key: np.asarray(values[i]) for key, values in arrays.items()}
            dataset.add_frame({**frame, "task": f"do {episode}"})
        dataset.save_episode()
    dataset.finalize()


def encoder(codec: str):
    from lerobot.configs.video import RGBEncoderConfig

    return RGBEncoderConfig(vcodec=codec)


def read(root: str, file: str) -> None:
    dataset = LeRobotDataset("test/set", root=root, video_backend="pyav", return_uint8=True)
    frames = [dataset[i] for i in range(len(dataset))]
    columns = {key: np.stack([np.asarray(frame[key]) for frame in frames]) for key in frames[0]}
    stats = {f"stats/{key}/{n}": np.asarray(v) for key, stat in dataset.meta.stats.items() for n, v in stat.items()}
    np.savez(file, **columns, **stats)


if __name__ == "__main__":
    main(*sys.argv[1:])
