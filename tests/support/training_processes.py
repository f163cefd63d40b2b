"""Training runs of several real processes on this machine, meeting on loopback."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import forked

# Splits every parameter, however small, so that every split is used.
TRAIN = """
import sys
if __name__ == "__main__":
    from openpi.training import sharding
    sharding.MIN_SHARDED_BYTES = 0
    from openpi.cli.main import main
    sys.exit(main(sys.argv[1:]))
"""


def environment(*, devices: int = 1) -> dict[str, str]:
    """Of this process, whose compiled code they share, without what tells a cluster."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("OPENPI_C", "SLURM_"))},
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(
    command: Sequence[str],
    count: int,
    environment: dict[str, str],
    log_folder: Path,
    preloads: Sequence[str] = forked.JAX,
) -> list[subprocess.Popen[bytes]]:
    """`count` processes of one run; number i logs to `log_folder/i.log`."""
    log_folder.mkdir(exist_ok=True)
    place = {"OPENPI_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "OPENPI_NUM_PROCESSES": str(count)}
    children = []
    for i in range(count):
        own = {**environment, **place, "OPENPI_PROCESS_ID": str(i)} if count > 1 else environment
        with (log_folder / f"{i}.log").open("wb") as log:
            children.append(forked.Popen(command, preloads=preloads, env=own, stdout=log, stderr=subprocess.STDOUT))
    return children


def end(children: list[subprocess.Popen[bytes]], log_folder: Path) -> tuple[list[int], list[str]]:
    """Exit codes and logs, once all have ended."""
    codes = [child.wait() for child in children]
    return codes, [(log_folder / f"{i}.log").read_text() for i in range(len(children))]


def run(
    command: Sequence[str],
    count: int,
    environment: dict[str, str],
    log_folder: Path,
    preloads: Sequence[str] = forked.JAX,
) -> list[str]:
    """The logs of processes that all succeed."""
    codes, logs = end(start(command, count, environment, log_folder, preloads), log_folder)
    assert not any(codes), "\n".join(logs)
    return logs


def train_command(*words: object) -> list[str]:
    return [sys.executable, "-c", TRAIN, "train", *map(str, words)]


def wait_for(text: str, child: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the log holds the text, or the child has ended."""
    while child.poll() is None and text not in log.read_text():
        try:
            child.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """Per step, everything that does not depend on the clock."""
    rows: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        numbers = {k: v for k, v in row.items() if k not in ("step", "samples_per_s", "data_wait")}
        rows.setdefault(row["step"], {}).update(numbers)
    return rows
