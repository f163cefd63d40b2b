"""`openpi convert positronic` against the plain way, on recordings made here.

    python benchmarks/convert.py [--episodes 4] [--seconds 20] [--report benchmarks/convert.md]

The plain way asks for the cameras' frames one instant after the other, each found from the key frame before it, keeps
the resized images of an episode in memory and hands them to the writer. Both use the same codec, encoder and
processors; the yardstick is CPU time, of all processes.
"""

import argparse
import datetime
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from openpi.convert.engine import convert
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.video import VideoFile
from openpi.data.lerobot.writer import LeRobotWriter
from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.conversion import PositronicRecordings, frame_times
from openpi_positronic.raw_episodes import Episode, RawDataset, RawDatasetWriter

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
            times = frame_times(episode, columns, FPS)
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
    convert(PositronicRecordings(recordings), output)


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """CPU s of all processes, and wall s."""

    def cpu() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    before, start = cpu(), time.perf_counter()
    work()
    return cpu() - before, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


if __name__ == "__main__":
    main()
