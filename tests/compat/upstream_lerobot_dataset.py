"""Writes, continues or reads a dataset with the real LeRobot: `python upstream_lerobot_dataset.py MODE ROOT FILE.npz`.

create  FEATURES.json beside FILE.npz says the features; FILE.npz holds `episode/feature` arrays
resume  the same, behind the episodes that are there
read    writes what LeRobot reads, `feature` arrays over all frames, to FILE.npz
"""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

FPS = 10


def main(mode: str, root: str, file: str) -> None:
    if mode == "read":
        read(root, file)
        return
    features = json.loads((Path(file).parent / "FEATURES.json").read_text())
    for feature in features.values():
        feature["shape"] = tuple(feature["shape"])
    options = {"rgb_encoder": encoder(os.environ["CODEC"])} if os.environ.get("CODEC") else {}
    if mode == "create":
        dataset = LeRobotDataset.create("test/set", FPS, features, root=root, **options)
    else:
        dataset = LeRobotDataset.resume("test/set", root=root, **options)
    given = np.load(file)
    for episode in sorted({key.partition("/")[0] for key in given}):
        arrays = {key.partition("/")[2]: given[key] for key in given if key.startswith(f"{episode}/")}
        for i in range(len(next(iter(arrays.values())))):
            dataset.add_frame(
                {**{key: np.asarray(values[i]) for key, values in arrays.items()}, "task": f"do {episode}"}
            )
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
