"""Memory and time of conversions of a full-size checkpoint with random weights.

    python benchmarks/convert_checkpoint.py --folder /some/disk [--report benchmarks/convert_checkpoint.md]

Writes a pi0.5 JAX checkpoint in float32 (13.4 GB), each array compressed in chunks as eight devices would have written
it: the last axis in eight parts, all layers in one chunk, up to 0.6 GB each. Then every conversion is a program of its
own, with its certificate, of which the largest resident memory is read. Needs 36 GB on the disk and 3 GB of memory;
everything is removed again.
"""

import argparse
import datetime
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from openpi.models.pi0_config import Pi0Config
from openpi.training import recipe_io
from openpi.training.config import TrainConfig
from openpi.weights import names, orbax_parts

DEVICES = 8
_LARGE_BYTES = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        any_model = ["--any-model"] if args.tiny else []
        rows += [measured(work, "jax", "lerobot", "--to=lerobot", *any_model)]
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
        "The random numbers repeat, so a compressed size says nothing. "
        "Command: `python benchmarks/convert_checkpoint.py`.",
        "",
        "| program | s | largest resident memory, GB | written, GB |",
        "|---|---|---|---|",
        *(f"| {name} | {seconds:.0f} | {peak:.2f} | {size:.1f} |" for name, seconds, peak, size in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
