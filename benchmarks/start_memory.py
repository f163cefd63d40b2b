"""Host memory that a process takes while training starts from weights on disk, beside the state that it makes.

    python benchmarks/start_memory.py [--report benchmarks/start_memory.md]

Writes random weights of a pi0.5 of 0.26 billion parameters in float32 (1.05 GB) in both layouts. Then processes of both
backends make a training state from them, on processors: adapters on frozen weights, so that the state itself (bfloat16)
is small. Read is the largest resident memory (VmHWM) during `create_state`, less what was resident before it, libraries
included, and less the bytes of the state's arrays. Two processes split the state (FSDP2 over gloo; `fsdp_devices`).
Needs 2.4 GB on the disk.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from openpi.models.gemma_config import GemmaConfig, LoRAConfig, without_adapters
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.shared.frameworks import Backend
from openpi.training import freeze
from openpi.training.config import TrainConfig
from openpi.training.weight_loaders import CheckpointWeightLoader
from openpi.weights import names, released
from openpi.weights.blocks import Block

_LORA = LoRAConfig(rank=8, alpha=8.0)
_LANGUAGE = GemmaConfig(
    width=1024,
    depth=12,
    mlp_dim=4096,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    vocab_size=32_000,
    attn_lora=_LORA,
    ffn_lora=_LORA,
)
MODEL = Pi0Config(
    pi05=True,
    paligemma_variant=_LANGUAGE,
    action_expert_variant=dataclasses.replace(_LANGUAGE, width=512, mlp_dim=2048),
    image_encoder_variant=SiglipConfig(width=128, depth=2, mlp_dim=256, num_heads=2),
)
BACKENDS: tuple[Backend, ...] = ("pytorch", "jax")
LAYOUTS = ("jax", "pytorch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measured(*args.measure)))
        return
    with tempfile.TemporaryDirectory(prefix="start-") as work:
        places = write_random(Path(work))
        size = places["pytorch"].joinpath("model.safetensors").stat().st_size / 1e9
        rows = [
            (backend, layout, count, run(backend, places[layout], count))
            for backend in BACKENDS
            for layout in LAYOUTS
            for count in (1, 2)
        ]
    text = report(rows, size)
    print(text)
    if args.report:
        args.report.write_text(text)


def write_random(folder: Path) -> dict[str, Path]:
    """Weights without adapters; folder by layout."""
    plain: Any = without_adapters(MODEL)
    rng, wide = np.random.default_rng(0), np.dtype(np.float32)

    def blocks() -> Any:
        for row in names.rows(plain):
            yield Block(row, 0, rng.standard_normal(row.shape, np.float32) * np.float32(0.02))

    places = {"jax": folder / "jax" / "params", "pytorch": folder / "pytorch"}
    places["pytorch"].mkdir()
    released.write_params(places["jax"], plain, blocks(), lambda row: wide)
    released.write_tensors(places["pytorch"] / "model.safetensors", plain, blocks(), lambda row: wide)
    return places


def run(backend: Backend, weights: Path, count: int) -> list[dict[str, float]]:
    """What each of the processes measures."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"OPENPI_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "OPENPI_NUM_PROCESSES": str(count)}
    command = [sys.executable, __file__, "--measure", backend, str(weights), str(count)]
    children = []
    for i in range(count):
        environment = {**os.environ, **place, "OPENPI_PROCESS_ID": str(i), "JAX_PLATFORMS": "cpu"}
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    found = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{backend} from {weights} failed")
    return found


def measured(backend: Backend, weights: str, count: str) -> dict[str, float]:
    """GB of the state's arrays in this process, and of what making it took at most beyond them."""
    from openpi.training.backend import open_backend
    from openpi.training.distributed import processes
    from openpi.training.distributed.launch import find_launch
    from openpi.weights import orbax_io, orbax_parts  # noqa: F401  # libraries take memory, too

    launch = find_launch({}, os.environ)
    if launch is not None:
        processes.start(launch, backend)
    config = TrainConfig(
        name="start",
        exp_name="start",
        model=MODEL,
        freeze_filter=freeze.Not(freeze.PathRegex(".*lora.*")),
        ema_decay=None,
        backend=backend,
        fsdp_devices=int(count),
        batch_size=2,
        weight_loader=CheckpointWeightLoader(weights),
    )
    opened = open_backend(config)
    opened.check()
    opened.param_specs()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    state = opened.create_state()
    size = bytes_of(backend, state) / 1e9
    found = {"state": size, "extra": resident("VmHWM") - before - size}
    if launch is not None:
        processes.end(0)
    return found


def bytes_of(backend: str, state: Any) -> int:
    """Of the arrays that this process has."""
    if backend == "jax":
        import jax

        leaves = jax.tree.leaves(jax.block_until_ready(state))
        return sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    from openpi.training.backends.pytorch.parallel import local

    slots = [tensor for slots in state.optimizer.state.values() for tensor in slots.values()]
    return sum(local(tensor.detach()).nbytes for tensor in [*state.params.values(), *slots])


def resident(field: str) -> float:
    """GB."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e9


def report(rows: list[tuple[str, str, int, list[dict[str, float]]]], size: float) -> str:
    lines = [
        "# Host memory at the start of training",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores. Adapters on a frozen pi0.5 with "
        f"{size:.2f} GB of float32 weights, on processors. Of each process, in GB: the state's arrays, and what making "
        "them took at most beside them; before weights were read tensor by tensor, the latter was 1.2 to 1.7 (PyTorch) "
        "and 1.8 to 2.3 (JAX). Command: `python benchmarks/start_memory.py`.",
        "",
        "| backend | weights | processes | state | beside it, at most |",
        "|---|---|---|---|---|",
    ]
    for backend, layout, count, found in rows:
        columns = (", ".join(f"{one[name]:.2f}" for one in found) for name in ("state", "extra"))
        lines.append(f"| {backend} | {layout} | {count} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
