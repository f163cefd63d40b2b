"""Wall time per episode of `openpi evaluate tabletop`: eight worlds at once, and one after the other, in turns.

    python benchmarks/evaluate_worlds.py [CHECKPOINT] [--episodes 48] [--rounds 2]

Both ask the same server, which has compiled for their batches. The base has never seen the task, so that episodes run
for 70 steps, and ask every 2. The start of the worlds' processes counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPENPI = [sys.executable, "-m", "openpi.cli.main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="package:openpi.demo/base")
    parser.add_argument("--task", default="place")
    parser.add_argument("--episodes", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        port_file = Path(folder) / "port"
        command = [*OPENPI, "serve", args.checkpoint, "--port=0", f"--port-file={port_file}"]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not port_file.exists():
                time.sleep(0.1)
            play(args, port_file, Path(folder) / "warm", workers=8)  # compiles the batches
            found: dict[int, list[dict]] = {1: [], 8: []}
            for turn in range(args.rounds):
                for workers, results in found.items():
                    results.append(play(args, port_file, Path(folder) / f"{workers}-{turn}", workers=workers))
        finally:
            server.terminate()
            server.wait()
    show(found)


def play(args: argparse.Namespace, port_file: Path, output: Path, *, workers: int) -> dict:
    counts = [f"--trials={args.episodes}", f"--episodes={args.episodes}", f"--workers={workers}", "--videos=0"]
    where = [f"--port-file={port_file}", f"--output={output}", f"--task={args.task}", "--seed=500"]
    subprocess.run([*OPENPI, "evaluate", "tabletop", *counts, *where], check=True, stdout=subprocess.DEVNULL)
    return json.loads((output / "results.json").read_text())


def show(found: dict[int, list[dict]]) -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}\n")
    print("| worlds at once | wall s per episode | batch | round trip, ms (p50) | success |")
    print("|---|---|---|---|---|")
    seconds = {}
    for workers, results in found.items():
        times = [result["wall_s"] / result["num_played"] for result in results]
        seconds[workers] = statistics.median(times)
        trips = ", ".join(f"{result['round_trip_ms']['p50']:.0f}" for result in results)
        total, batch = results[-1]["total"], statistics.fmean(result["mean_batch"] for result in results)
        rate = f"{total['successes']}/{total['trials']}"
        wall = ", ".join(f"{time_s:.2f}" for time_s in times)
        print(f"| {workers} | {wall} | {batch:.1f} | {trips} | {rate} |")
    print(f"\nEight at once take {seconds[8] / seconds[1]:.2f} of the wall time per episode of one after the other.")


if __name__ == "__main__":
    main()
