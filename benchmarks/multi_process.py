"""The same run on one device, on eight, and in two and four processes: by how much do the numbers differ?

    python benchmarks/multi_process.py [--steps 6] [--report benchmarks/multi_process.md]

Trains the tutorial's tiny pi0.5 on the tutorial's dataset, on CPUs: as one device, as eight devices of one process
(forced by XLA), and in real processes that meet on loopback. Where parameters are split, all are, however small. The
last rows continue the checkpoint of four processes with another number. Loss, gradient norm and validation are
compared.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

TUTORIAL = Path(__file__).resolve().parent.parent / "docs" / "tutorial"
TRAIN = """
import sys
if __name__ == "__main__":
    from openpi.training import sharding
    sharding.MIN_SHARDED_BYTES = 0
    from openpi.cli.main import main
    sys.exit(main(sys.argv[1:]))
"""
CLOCK = ("step", "samples_per_s", "data_wait")
# name: processes, devices of each, devices that share the parameters
LAYOUTS = {
    "one process, one device": (1, 1, 1),
    "one process, 8 devices": (1, 8, 1),
    "one process, 8 devices, fsdp_devices=2": (1, 8, 2),
    "one process, 8 devices, fsdp_devices=8": (1, 8, 8),
    "2 processes": (2, 1, 1),
    "2 processes of 4 devices, fsdp_devices=4": (2, 4, 4),
    "4 processes": (4, 1, 1),
    "4 processes, fsdp_devices=4": (4, 1, 4),
}
# name: processes, devices, fsdp_devices, of a run that 4 processes with fsdp_devices=4 did the first half of
CONTINUED = {
    "4 processes, then 1": (1, 1, 1),
    "4 processes, then 2 with fsdp_devices=2": (2, 1, 2),
}


def train(folder: Path, name: str, layout: tuple[int, int, int], *flags: str) -> dict[int, dict[str, float]]:
    """Numbers by step of a run called `name`; its processes share the machine."""
    processes, devices, fsdp = layout
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = [f"{TUTORIAL / 'my_robot.py'}:tiny", f"--exp-name={name}", f"--fsdp-devices={fsdp}", "--batch-size=16"]
    words += ["--log-interval=1", f"--data.repo-id={folder / 'dataset'}", *flags]
    where = {"OPENPI_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "OPENPI_NUM_PROCESSES": str(processes)}
    environment = {
        **os.environ,
        **where,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", TRAIN, "train", *words]
    children = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "OPENPI_PROCESS_ID": str(i)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    logs = [child.communicate()[1] for child in children]
    if any(child.returncode for child in children):
        sys.exit("\n".join(logs))
    return metrics(folder / "checkpoints" / "my_robot_tiny" / name)


def metrics(run: Path) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], {}).update({k: v for k, v in row.items() if k not in CLOCK})
    return rows


def row(name: str, found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> str:
    """Of the report: the first and last loss, and the largest relative difference of each number over all steps."""

    def difference(key: str) -> str:
        pairs = [(found[step][key], numbers[key]) for step, numbers in expected.items() if key in numbers]
        return f"{max(abs(a - b) / abs(b) for a, b in pairs):.1e}"

    losses = [found[step]["loss"] for step in sorted(found)]
    compared = " | ".join(difference(key) for key in ("loss", "grad_norm", "validation_loss", "action_error"))
    return f"| {name} | {losses[0]:.7f} | {losses[-1]:.7f} | {compared} |"


def compare(folder: Path, steps: int) -> list[str]:
    first, *_ = LAYOUTS
    found = {}
    for i, (name, layout) in enumerate(LAYOUTS.items()):
        found[name] = train(folder, f"run{i}", layout, f"--num-train-steps={steps}")
        print(row(name, found[name], found[first]), flush=True)
    half = [f"--num-train-steps={steps // 2}", f"--eval-interval={steps}"]
    train(folder, "half", (4, 1, 4), *half)
    runs = folder / "checkpoints" / "my_robot_tiny"
    for i, (name, layout) in enumerate(CONTINUED.items()):
        shutil.copytree(runs / "half", runs / f"continued{i}")
        found[name] = train(folder, f"continued{i}", layout, f"--num-train-steps={steps}", "--resume")
        print(row(name, found[name], found[first]), flush=True)
    return [row(name, numbers, found[first]) for name, numbers in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder, "dataset")
        subprocess.run([sys.executable, str(TUTORIAL / "make_dataset.py"), str(dataset)], check=True)
        rows = compare(Path(folder), args.steps)
    report = "\n".join(
        [
            "# One run on one device, on eight, and in several processes",
            "",
            f"{datetime.date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
            f"{platform.python_version()}, JAX {jax.__version__}, CPU devices, gloo between processes.",
            f"Command: `python benchmarks/multi_process.py {' '.join(sys.argv[1:])}`.",
            "",
            f"The tutorial's tiny pi0.5 in f32 on its dataset, global batch 16, {args.steps} steps. The four "
            "columns on the right: largest relative difference to the first row over all steps, of the loss, the "
            "gradient norm, the validation loss and the validation's action error.",
            "",
            "| layout | first loss | last loss | loss | grad norm | validation | action error |",
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
