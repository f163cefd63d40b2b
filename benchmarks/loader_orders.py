"""What a sample of three 640x480 cameras costs: videos with a key frame every 2 and every 250 frames, read frame by
frame and several in a pass (`frames_per_pass`), and the same set shrunk to the model's resolution.

python benchmarks/loader_orders.py FOLDER [--frames 250] [--batches 24] [--report benchmarks/loader_orders.md]
"""

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import av.video.frame
import numpy as np

from openpi.data.batch_loader import BatchLoader
from openpi.data.batch_order import Stretches
from openpi.data.dataset import TransformedDataset
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.data.mixture_order import ConcatenatedDataset
from openpi.transforms import ResizeImages

CAMERAS = ("high", "left_wrist", "right_wrist")
SIZE_HW = (480, 640)
BATCH = 32
EPISODES = 4
# Of every episode: a pool of batches is to meet a stretch hardly ever twice, as in a set of thousands of episodes.
COPIES = 32
HOW_OFTEN = 3


def film(num_frames: int, seed: int) -> np.ndarray:
    """uint8[n, h, w, 3]: a textured table that a camera moves over, a block that circles, and a sensor's noise."""
    rng = np.random.default_rng(seed)
    height, width = SIZE_HW
    y, x = np.mgrid[:height, : 2 * width].astype(np.float32)
    table = 90 + 40 * np.sin(x / 37) + 30 * np.cos(y / 23) + 25 * np.sin((x + y) / 7)
    table = np.stack([table, table * 0.9, table * 0.7], axis=-1)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for t in range(num_frames):
        shift = int(width / 2 * (1 + np.sin(t / 60 + seed)))
        frame = table[:, shift : shift + width] + rng.normal(0, 2, (height, width, 1))
        top, left = int(200 + 150 * np.sin(t / 20 + seed)), int(280 + 200 * np.cos(t / 15))
        frame[top : top + 80, left : left + 80] = (200, 60, 40)
        frames[t] = frame.clip(0, 255)
    return frames


def write(root: Path, num_frames: int) -> None:
    """AV1 with a key frame every 2 frames, as LeRobot writes."""
    camera = {"dtype": "video", "shape": [*SIZE_HW, 3], "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": [14], "names": None}
    features = {**dict.fromkeys(CAMERAS, camera), "state": vector, "actions": vector}
    rng = np.random.default_rng(0)
    with LeRobotWriter(root, fps=50, features=features, use_videos=True) as writer:
        for episode in range(EPISODES):
            films = {name: film(num_frames, 10 * episode + i) for i, name in enumerate(CAMERAS)}
            moved = np.cumsum(rng.normal(size=(num_frames, 14)), axis=0).astype(np.float32)
            writer.add_episode({**films, "state": moved, "actions": moved}, "pick up the block")


def encode_again(source: Path, root: Path, gop: int) -> None:
    """The same set with H.264 and a key frame every `gop` frames."""
    subprocess.run(["cp", "-r", str(source), str(root)], check=True)
    for video in root.rglob("*.mp4"):
        partial = video.with_suffix(".partial.mp4")
        with av.open(str(video)) as read, av.open(str(partial), "w") as written:
            stream = written.add_stream("libx264", rate=50)
            stream.height, stream.width, stream.pix_fmt = *SIZE_HW, "yuv420p"
            stream.options = {"g": str(gop), "sc_threshold": "0", "preset": "veryfast", "crf": "23", "bf": "0"}
            for frame in read.decode(video=0):
                frame.pict_type = av.video.frame.PictureType.NONE
                written.mux(stream.encode(frame))
            written.mux(stream.encode())
        partial.rename(video)


@contextlib.contextmanager
def loader(root: Path, per_pass: int, batches: int) -> Iterator[BatchLoader]:
    dataset = LeRobotDataset(root, columns=[*CAMERAS, "state", "actions"])
    bounds = np.concatenate([dataset.episode_bounds + copy * len(dataset) for copy in range(COPIES)])
    stretches = Stretches.of_episodes(bounds, dataset.key_frame_interval(), per_pass) if per_pass > 1 else None
    samples = TransformedDataset(ConcatenatedDataset([dataset] * COPIES), (_cameras, ResizeImages(224, 224)))
    made = BatchLoader(samples, batch_size=BATCH, num_workers=0, num_batches=batches, stretches=stretches)
    with contextlib.closing(made):
        yield made


def _cameras(sample: dict) -> dict:
    return {"image": {name: sample[name] for name in CAMERAS}, "state": sample["state"], "actions": sample["actions"]}


def cost(root: Path, per_pass: int, batches: int) -> tuple[float, float]:
    """CPU ms and wall ms per sample."""
    with loader(root, per_pass, batches) as made:
        cpu, wall = time.process_time(), time.perf_counter()
        assert sum(1 for _ in made) == batches
        per_sample_ms = 1e3 / (batches * BATCH)
        return (time.process_time() - cpu) * per_sample_ms, (time.perf_counter() - wall) * per_sample_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=250, help="of an episode")
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    sets = {
        "AV1, key frame every 2": arguments.folder / "gop2",
        "H.264, key frame every 250": arguments.folder / "gop250",
    }
    sets["the latter, `openpi dataset shrink`"] = arguments.folder / "shrunk"
    gop2, gop250, shrunk = sets.values()
    if not gop2.exists():
        write(gop2, arguments.frames)
    if not gop250.exists():
        encode_again(gop2, gop250, 250)
    if not shrunk.exists():
        command = [sys.executable, "-m", "openpi.cli.main", "dataset", "shrink", str(gop250), str(shrunk)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    kinds = [(name, root, n) for name, root in sets.items() for n in ((1, 8, 16) if root == gop250 else (1,))]
    found = {(name, n): [] for name, _, n in kinds}
    for _ in range(HOW_OFTEN):  # in turn, so that what else the machine does reaches all alike
        for name, root, n in kinds:
            # Of whole pools; and not so many where each frame costs much.
            batches = max(n, arguments.batches // (3 if n == 1 and root == gop250 else 1) // n * n)
            found[name, n].append(cost(root, n, batches))
    base = np.median([cpu for cpu, _ in found["H.264, key frame every 250", 1]])
    lines = [
        "| set | frames per pass | CPU ms per sample | wall ms per sample | CPU, beside H.264 frame by frame |",
        "|---|---|---|---|---|",
    ]
    for (name, n), costs in found.items():
        cpu, wall = np.median(costs, axis=0)
        lines.append(f"| {name} | {n} | {cpu:.1f} | {wall:.1f} | {base / cpu:.1f} x faster |")
    table = "\n".join(lines)
    print(table)
    if arguments.report:
        arguments.report.write_text(_page(table, arguments))


def _page(table: str, arguments: argparse.Namespace) -> str:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    flags = f"--frames {arguments.frames} --batches {arguments.batches} --report benchmarks/loader_orders.md"
    return f"""# Loader: three 640x480 cameras, key frames near and far

{time.strftime("%Y-%m-%d")}, {machine}; load average {os.getloadavg()[0]:.1f}.
Command: `python benchmarks/loader_orders.py FOLDER {flags}`;
{EPISODES} episodes, each {COPIES} times over, batches of {BATCH}, read in threads, resized to
224x224 by PIL; median of {HOW_OFTEN} rounds.

{table}

A frame of a video costs the frames from the key frame before it. With `frames_per_pass=n`, n frames of the stretch
between two key frames are read in one pass and spread over n batches; every epoch is still a permutation of all frames,
of which each batch has about one of a pass, and a run resumes at the very batch (`data/batch_order.py`).
"""


if __name__ == "__main__":
    main()
