<<<<<<< HEAD
"""`openpi convert positronic` against the plain way, on recordings made here.

    python benchmarks/convert.py [--episodes 4] [--seconds 20] [--report benchmarks/convert.md]

The plain way asks for the cameras' frames one instant after the other, each found from the key frame before it, keeps
the resized images of an episode in memory and hands them to the writer. Both use the same codec, encoder and
processors; the yardstick is CPU time, of all processes.
=======
"""Memory and time of conversions of a full-size checkpoint with random weights.

    python benchmarks/convert.py --folder /some/disk [--report benchmarks/convert.md]

Writes a pi0.5 JAX checkpoint in float32 (13.4 GB), each array compressed in chunks as eight devices would have written
it: the last axis in eight parts, all layers in one chunk, up to 0.6 GB each. Then every conversion is a program of its
own, with its certificate, of which the largest resident memory is read. Needs 36 GB on the disk and 3 GB of memory;
everything is removed again.
>>>>>>> weights
"""

import argparse
import datetime
<<<<<<< HEAD
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
=======
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
>>>>>>> weights
from pathlib import Path

import numpy as np

<<<<<<< HEAD
from openpi.codecs.catalog import get_codec
from openpi.convert.positronic import convert, sample_times, span
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.video import VideoFile
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.data.raw_episodes import Episode, RawDataset, RawDatasetWriter

FPS = 15
CAMERA_FPS = 30
SIZE_HW = (480, 640)


def record(root: Path, episodes: int, seconds: float) -> None:
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (60, 80, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    dataset = RawDatasetWriter(root)
    for _ in range(episodes):
        with dataset.new_episode() as episode:
            episode.set_static("task", "stack the cubes")
            for i in range(round(seconds * CAMERA_FPS)):
                stamp = i * 1_000_000_000 // CAMERA_FPS
                for name in ("wrist", "exterior"):
                    episode.append(f"image.{name}", np.roll(scene, 3 * i, axis=1), stamp)
                for name in ("robot_state.ee_pose", "robot_commands.pose"):
                    episode.append(name, rng.normal(size=7), stamp)
                for name in ("grip", "target_grip"):
                    episode.append(name, 0.5, stamp)


def plain(recordings: Path, output: Path) -> None:
    codec = get_codec("ee")
    columns, features = codec.training_columns(), codec.training_meta["lerobot_features"]
    with LeRobotWriter(output, fps=FPS, features=features) as writer:
        for path in RawDataset(recordings).paths:
            episode = Episode(path)
            times = sample_times(*span(episode, columns), FPS)
            frames = {key: np.stack([_at(episode, column, int(t)) for t in times]) for key, column in columns.items()}
            writer.add_episode(frames, codec.training_task(episode.static) or "")


def _at(episode: Episode, column, time_ns: int) -> np.ndarray:
    values = {}
    for name in column.signals:
        signal = episode.signal(name)
        (row,) = signal.rows_at([time_ns])
        if signal.kind == "image":
            video = VideoFile(episode.path / f"{name}.mp4", 100)
            values[name] = video.frame_at(int(row) / 100)[None]
            video.close()
        else:
            values[name] = signal.values([row])
    return column.derive(values)[0]


def ours(recordings: Path, output: Path) -> None:
    convert(RawDataset(recordings), output, get_codec("ee"))


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """CPU s of all processes, and wall s."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    before, start = cpu(), time.perf_counter()
    work()
    return cpu() - before, time.perf_counter() - start
=======
from openpi.models.pi0_config import Pi0Config
from openpi.training import recipe_io
from openpi.training.config import TrainConfig
from openpi.weights import names, orbax_parts

DEVICES = 8
_LARGE_BYTES = 64 << 20
>>>>>>> weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
<<<<<<< HEAD
    parser.add_argument("--episodes", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        record(root / "raw", args.episodes, args.seconds)
        rows = {}
        for name, way in (("plain", plain), ("openpi convert", ours)):
            rows[name] = measured(lambda way=way, name=name: way(root / "raw", root / name))
        found, expected = LeRobotDataset(root / "openpi convert"), LeRobotDataset(root / "plain")
        assert len(found) == len(expected)
        np.testing.assert_array_equal(found.column("observation.state"), expected.column("observation.state"))
        num_frames = 2 * len(found)
    report = _report(rows, num_frames, args)
    print(report)
    if args.report:
        args.report.write_text(report)


def _report(rows: dict[str, tuple[float, float]], num_frames: int, args: argparse.Namespace) -> str:
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    lines = [
        "# Converting recordings: streamed against frame by frame",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"load average after measuring: {load}.",
        f"Command: `python benchmarks/convert.py --episodes {args.episodes} --seconds {args.seconds:g}`. Two cameras "
        f"of {SIZE_HW[1]}x{SIZE_HW[0]} at {CAMERA_FPS} fps, sampled at {FPS} fps, codec `ee`, video.",
        "",
        "| way | CPU ms/camera frame | camera frames/s |",
        "|---|---|---|",
    ]
    for name, (cpu_s, wall_s) in rows.items():
        lines.append(f"| {name} | {1e3 * cpu_s / num_frames:.1f} | {num_frames / wall_s:.0f} |")
    first, second = rows.values()
    lines += ["", f"Ratio of CPU times: {first[0] / second[0]:.1f}; of wall times: {first[1] / second[1]:.1f}.", ""]
    return "\n".join(lines)
=======
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on a disk with room")
    parser.add_argument("--report", type=Path)
    parser.add_argument("--tiny", action="store_true", help="dummy experts, to try the program out")
    args = parser.parse_args()
    model = Pi0Config(pi05=True)
    if args.tiny:
        model = Pi0Config(pi05=True, paligemma_variant="dummy", action_expert_variant="dummy")
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=args.folder))
    try:
        start = time.perf_counter()
        write_random(work / "jax", model)
        print(f"written in {time.perf_counter() - start:.0f} s", flush=True)
        rows = [measured(work, "jax", "pytorch", "--to=pytorch", "--dtype=bfloat16"), verified(work, "pytorch")]
        rows += [measured(work, "pytorch", "back", "--to=jax")]
        shutil.rmtree(work / "back")
        shutil.rmtree(work / "pytorch")
        rows += [measured(work, "jax", "lerobot", "--to=lerobot")]
    finally:
        shutil.rmtree(work)
    text = report(rows)
    print(text)
    if args.report:
        args.report.write_text(text)


def write_random(folder: Path, model: Pi0Config) -> None:
    pool = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32) * 0.02
    specs = {path: (shape, np.dtype(np.float32)) for path, shape in names.tree_shapes(model).items()}
    chunks = {path: sharded(shape) for path, (shape, _) in specs.items()}
    stores = orbax_parts.create_arrays(folder / "params", specs, chunks)
    for path, (shape, _) in specs.items():
        grid = [range(0, size, extent) for size, extent in zip(shape, chunks[path], strict=True)]
        for number, corner in enumerate(itertools.product(*grid)):
            where = tuple(slice(at, at + extent) for at, extent in zip(corner, chunks[path], strict=True))
            values = np.resize(np.roll(pool, number * 12345 + len(path)), chunks[path])
            stores[path][where].write(values).result()
    recipe_io.save_recipe(folder, TrainConfig(name="random_pi05", model=model))


def sharded(shape: tuple[int, ...]) -> tuple[int, ...]:
    is_large = np.prod(shape) * 4 > _LARGE_BYTES and shape[-1] % DEVICES == 0
    return (*shape[:-1], shape[-1] // DEVICES) if is_large else shape


def measured(work: Path, source: str, target: str, *options: str) -> tuple[str, float, float, float]:
    argv = ["convert-checkpoint", str(work / source), str(work / target), *options]
    seconds, peak = run(argv)
    size = sum(file.stat().st_blocks * 512 for file in (work / target).rglob("*") if file.is_file())
    return f"{source} {' '.join(options)}", seconds, peak, size / 1e9


def verified(work: Path, folder: str) -> tuple[str, float, float, float]:
    seconds, peak = run(["verify", str(work / folder)])
    return f"verify {folder}", seconds, peak, 0.0


def run(argv: list[str]) -> tuple[float, float]:
    """Seconds, and GB of resident memory at most."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "openpi.cli.main", *argv], env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    peak = 0
    while process.poll() is None:
        # Of this program alone; what `wait4` says includes the memory of the one that started it.
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(kilobytes) for kilobytes in re.findall(r"VmHWM:\s+(\d+)", status))])
        time.sleep(0.1)
    print(f"{' '.join(argv)}: {peak * 1024 / 1e9:.2f} GB", flush=True)
    if process.returncode:
        raise SystemExit(f"openpi {' '.join(argv)} failed")
    return time.perf_counter() - start, peak * 1024 / 1e9


def report(rows: list[tuple[str, float, float, float]]) -> str:
    lines = [
        "# Conversion of a full-size checkpoint",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores. pi0.5, random weights, float32 Orbax "
        f"checkpoint of 13.4 GB in chunks as of {DEVICES} devices. Each row is a program of its own, with reading the "
        "result again and running its certificate on both backends; importing both frameworks takes 0.9 GB. "
        "The random numbers repeat, so a compressed size says nothing. Command: `python benchmarks/convert.py`.",
        "",
        "| program | s | largest resident memory, GB | written, GB |",
        "|---|---|---|---|",
        *(f"| {name} | {seconds:.0f} | {peak:.2f} | {size:.1f} |" for name, seconds, peak, size in rows),
    ]
    return "\n".join(lines) + "\n"
>>>>>>> weights


if __name__ == "__main__":
    main()
