"""Flipped bits in a checkpoint, with and without its checksums; and what comparing costs.

    python benchmarks/checksums.py flips        100 bits in each layout, over all files that serving reads
    python benchmarks/checksums.py cost [GB]    writing and reading weights of that size

A bit is "used silently" when nothing is refused and something that is read has changed.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from openpi.models.gemma_config import GemmaConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.shared import normalize
from openpi.shared.normalize import NormStats
from openpi.training import recipe_io
from openpi.training.config import get_config
from openpi.weights import checksums, names, opening, published_tree, released, safetensors_io
from openpi.weights.blocks import Block

_EXPERT = GemmaConfig(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=512)
_ENCODER = SiglipConfig(width=16, depth=2, mlp_dim=32, num_heads=2)
_FLOAT32 = np.dtype(np.float32)


def checkpoint(folder: Path, kind: str) -> Any:
    """A tiny checkpoint with all that serving reads; returns its recipe."""
    model = Pi0Config(
        paligemma_variant=_EXPERT,
        action_expert_variant=_EXPERT,
        image_encoder_variant=_ENCODER,
        image_resolution=(28, 28),
    )
    recipe = dataclasses.replace(get_config("pi0_droid"), model=model)
    rng = np.random.default_rng(0)
    blocks = (Block(row, 0, rng.normal(size=row.shape).astype(np.float32)) for row in names.rows(model))
    folder.mkdir()
    if kind == "jax":
        released.write_params(folder / "params", model, blocks, lambda row: _FLOAT32)
    else:
        released.write_tensors(folder / "model.safetensors", model, blocks, lambda row: _FLOAT32)
    vectors = {key: NormStats(*(rng.uniform(1, 2, 8) for _ in range(4))) for key in ("state", "actions")}
    normalize.save(folder / "assets" / "droid", vectors)
    (folder / "assets" / "tokenizer.model").write_bytes(rng.bytes(4000))
    (folder / "contract.json").write_text(json.dumps({"version": 1, "cameras": ["a", "b"], "state": list(range(20))}))
    recipe_io.save_recipe(folder, recipe)
    return recipe


def read(recipe: Any, folder: Path) -> dict[str, bytes]:
    """Everything that serving reads of a checkpoint."""
    found = {"recipe": json.dumps(recipe_io.recipe_values(recipe_io.load_recipe(folder)), sort_keys=True).encode()}
    found["stats"] = json.dumps(normalize.serialize_json(normalize.load(folder / "assets" / "droid"))).encode()
    found["contract"] = json.dumps(json.loads((folder / "contract.json").read_text())).encode()
    found["tokenizer"] = (folder / "assets" / "tokenizer.model").read_bytes()
    for path, array in published_tree.arrays(opening.open_weights(recipe.model, folder)):
        found[path] = array.tobytes()
    return found


def flips(count: int = 100) -> None:
    for kind in ("jax", "pytorch"):
        for is_summed in (False, True):
            with tempfile.TemporaryDirectory() as parent:
                folder = Path(parent) / "step"
                recipe = checkpoint(folder, kind)
                if is_summed:
                    checksums.write(folder)
                print(
                    f"{kind}, {'with' if is_summed else 'without'} checksums:", dict(_outcomes(recipe, folder, count))
                )


def _outcomes(recipe: Any, folder: Path, count: int) -> collections.Counter[str]:
    whole, rng, outcomes = read(recipe, folder), np.random.default_rng(1), collections.Counter[str]()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for number in range(count):
        file = files[number % len(files)]
        data = file.read_bytes()
        bit = int(rng.integers(8 * len(data)))
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            outcomes["used silently" if read(recipe, folder) != whole else "no difference"] += 1
        except Exception as error:  # how it is refused is another question
            outcomes[
                "refused" if isinstance(error, (ValueError, OSError)) else f"traceback ({type(error).__name__})"
            ] += 1
        file.write_bytes(data)
    return outcomes


def cost(gigabytes: float) -> None:
    rows = int(gigabytes * 1e9 / 16 / 4 / 4096)
    arrays = {f"t{i}": np.random.default_rng(i).normal(size=(rows, 4096)).astype(np.float32) for i in range(16)}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        _timed("write", lambda: safetensors_io.save(folder / "model.safetensors", arrays))
        _timed("read, no checksums", lambda: _read_all(folder))
        _timed("write the checksums", lambda: checksums.write(folder))
        _timed("read and compare", lambda: _read_all(folder))
        _timed("read again", lambda: _read_all(folder))
        shutil.rmtree(folder, ignore_errors=True)


def _read_all(folder: Path) -> None:
    tensors = safetensors_io.open_tensors(folder)
    for name in tensors:
        np.array(tensors[name])


def _timed(what: str, action: Any) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    action()
    print(f"{what}: {time.perf_counter() - start:.2f} s, {time.process_time() - cpu:.2f} s of processor time")


if __name__ == "__main__":
    flips() if sys.argv[1] == "flips" else cost(float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
