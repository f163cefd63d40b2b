"""Frames per second from DROID in RLDS form: our reader against `tf.data` doing the same.

    python benchmarks/rlds.py --dataset FOLDER [--tf-python PATH] [--report benchmarks/rlds.md]

Each measurement is a process of its own (`rlds_side.py`), after its buffer is full; sides alternate in rounds. The
dataset is written if it is not there: episodes of 250 frames with three 180x320 JPEG cameras of 12 to 14 KB an image,
as DROID's are. The yardstick is CPU time per frame, see `loader.py`. `--tf-python` is the interpreter of an environment
with TensorFlow; without it only ours runs.
"""

import argparse
import datetime
import io
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "tests/support"))
import rlds_datasets

SIDE = Path(__file__).with_name("rlds_side.py")
NUM_EPISODES, NUM_FRAMES, NUM_SHARDS = 32, 250, 16
SIDES = {
    "ours, threads": ("ours", []),
    "ours, 2 workers": ("ours", ["--workers", "2"]),
    "tf.data, decoded before the buffer": ("tf.data", ["--decode", "before"]),
    "tf.data, decoded behind the buffer": ("tf.data", ["--decode", "after"]),
}


def write(folder: Path) -> None:
    rlds_datasets.write(folder, "droid", "1.0.1", [_episode(i) for i in range(NUM_EPISODES)], num_shards=NUM_SHARDS)


def _episode(number: int) -> rlds_datasets.RecordedEpisode:
    """Vectors of the tests' episodes; pictures that cost as much to decode as real ones."""
    rng = np.random.default_rng(number)
    made = rlds_datasets.episode("droid", number, 1)
    features: dict[str, Sequence | np.ndarray] = {
        key: list(value) * NUM_FRAMES if isinstance(value, list) else np.repeat(value, NUM_FRAMES, axis=0)
        for key, value in made.features.items()
    }
    for name in ("file_path", "recording_folderpath"):
        features[f"episode_metadata/{name}"] = made.features[f"episode_metadata/{name}"]
    for camera in rlds_datasets.CAMERAS:
        pictures = [_picture(rng) for _ in range(10)]
        features[f"steps/observation/{camera}"] = [pictures[t % 10] for t in range(NUM_FRAMES)]
    return rlds_datasets.RecordedEpisode(features, {})


def _picture(rng: np.random.Generator) -> bytes:
    shapes = Image.fromarray(rng.integers(256, size=(23, 40, 3), dtype=np.uint8)).resize(
        (320, 180), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 4, (180, 320, 1))
    stream = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(shapes) + noise, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=75)
    return stream.getvalue()


def measure(name: str, dataset: Path, tf_python: str | None) -> dict[str, float] | None:
    side, options = SIDES[name]
    python = sys.executable if side == "ours" else tf_python
    if python is None:
        return None
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [python, str(SIDE), side, str(dataset), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return json.loads(lines[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--tf-python")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    if not args.dataset.exists():
        write(args.dataset)
    found = defaultdict(list)
    for _ in range(args.rounds):
        for name in SIDES:
            result = measure(name, args.dataset, args.tf_python)
            if result is not None:
                found[name].append(result)
                print(name, result, flush=True)
    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in found.items()
    }
    rows = []
    base = medians["ours, threads"]["cpu_s"]
    for name, m in medians.items():
        cpu, wall = (1000 * m[key] / m["frames"] for key in ("cpu_s", "wall_s"))
        rows.append(
            f"| {name} | {cpu:.2f} | {1000 / cpu:.0f} | {1000 / wall:.0f} | {m['first_s']:.1f} | {m['rss_mb']:.0f} | "
            f"{m['cpu_s'] / base:.2f} |"
        )
    size = sum(file.stat().st_size for file in args.dataset.rglob("*.tfrecord-*"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    report = "\n".join(
        [
            "# Frames of DROID in RLDS form",
            "",
            f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}; load average while measuring: {load}.",
            f"{NUM_EPISODES} episodes of {NUM_FRAMES} frames in {NUM_SHARDS} files, {size / 1e6:.0f} MB, in the file "
            "cache; a buffer of 4000 frames, batches of 64.",
            f"Command: `python benchmarks/rlds.py {' '.join(sys.argv[1:])}`; median of {args.rounds} rounds.",
            "",
            "| side | CPU ms/frame | frames/s and core | frames/s | first batch, s | memory, MB | CPU time, ours = 1 |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(report)
    if args.report:
        args.report.write_text(report)


if __name__ == "__main__":
    main()
