"""What training starts from is read tensor by tensor: little memory beside the state, and nothing before all fits."""

import dataclasses
import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import tiny_recipe
import weight_layouts
from openpi.models.gemma_config import GemmaConfig
from openpi.shared.tree import flatten, unflatten
from openpi.training import weight_loaders
from openpi.training.backend import open_backend
from openpi.training.backends.pytorch import parallel as parallel_pytorch
from openpi.training.config import TrainConfig
from openpi.training.weight_loaders import CheckpointWeightLoader, PaliGemmaWeightLoader
from openpi.weights import blocks, names, opening, orbax_io, orbax_parts, published_tree, safetensors_io

_EXPERT = GemmaConfig(width=128, depth=8, mlp_dim=1024, num_heads=2, num_kv_heads=1, head_dim=32, vocab_size=8192)
LARGE = dataclasses.replace(tiny_recipe.MODEL, paligemma_variant=_EXPERT, action_expert_variant=_EXPERT)
TOTAL_BYTES = sum(4 * int(np.prod(shape)) for shape in names.tree_shapes(LARGE).values())
LARGEST_BYTES = max(4 * int(np.prod(shape)) for shape in names.tree_shapes(LARGE).values())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "params"
    rng = np.random.default_rng(0)
    shapes = names.tree_shapes(LARGE)
    params = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    orbax_io.write_params(folder, unflatten(params))
    return folder


def starting_from(loader: Any, backend: str) -> TrainConfig:
    # Frozen, so that there is little else than the weights.
    return dataclasses.replace(
        tiny_recipe.tiny,
        model=LARGE,
        exp_name="start",
        backend=backend,
        freeze_filter=tiny_recipe.everything_but_the_head,
        weight_loader=loader,
    )


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whatever is read from disk is counted, and lies in memory that `tracemalloc` sees; large arrays come in rows."""
    counted: list[int] = []

    def copying(method: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def read(*args: Any) -> np.ndarray:
            found = np.array(method(*args))
            counted.append(found.nbytes)
            return found

        return read

    for owner, method in ((safetensors_io.Tensors, "_mapped"), (orbax_parts.StoredArray, "read")):
        monkeypatch.setattr(owner, method, copying(getattr(owner, method)))
    for module in (safetensors_io, orbax_parts):
        monkeypatch.setattr(module, "_WHOLE_BYTES", 1 << 20)
        monkeypatch.setattr(module, "_BLOCK_BYTES", 1 << 18)
    return counted


@pytest.mark.parametrize("kind", ["jax", "pytorch"])
@pytest.mark.parametrize("backend", ["pytorch", "jax"])
def test_memory_beside_the_state_is_that_of_a_few_tensors(
    backend: str, kind: str, source: Path, tmp_path: Path, read_bytes: list[int]
) -> None:
    place = weight_layouts.write(source, LARGE, tmp_path / "weights", kind)
    first, opened = (open_backend(starting_from(CheckpointWeightLoader(p), backend)) for p in (str(source), place))
    path = "PaliGemma/llm/layers/mlp/gating_einsum"
    expected = first.digests(first.create_state(), [path])  # and compiles what there is to compile
    read_bytes.clear()
    tracemalloc.start()
    try:
        state = opened.create_state()
        # On a processor, JAX may keep an array where NumPy has it.
        of_state, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read_bytes
    # JAX wants whole arrays of the tree, which stack the layers.
    assert peak - of_state < (LARGEST_BYTES if backend == "jax" else 0) + TOTAL_BYTES / 5
    assert opened.digests(state, [path]) == expected


def test_nothing_is_read_of_weights_that_do_not_fit(source: Path, tmp_path: Path, read_bytes: list[int]) -> None:
    place = weight_layouts.write(source, LARGE, tmp_path / "weights", "pytorch")
    config = starting_from(CheckpointWeightLoader(place), "pytorch")
    wider = dataclasses.replace(config, model=dataclasses.replace(LARGE, action_dim=7))
    read_bytes.clear()
    with pytest.raises(
        ValueError, match=r"do not fit the model(.|\n)*action_in_proj.weight: shape \(128, 4\), the mod"
    ):
        open_backend(wider).create_state()
    assert read_bytes == []


def test_a_loader_of_ones_own_needs_load_only(source: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Doubled(CheckpointWeightLoader):
        def load(self, params: Any) -> Any:
            return jax.tree.map(lambda leaf: 2 * leaf, super().load(params))

    reference = LARGE.abstract_params()
    once, twice = (
        dict(published_tree.arrays(weight_loaders.open_weights(kind(str(source)), reference)))
        for kind in (CheckpointWeightLoader, Doubled)
    )
    assert once.keys() == flatten(reference).keys()
    for path, array in once.items():
        np.testing.assert_array_equal(twice[path], 2 * array, err_msg=path)


def test_paligemma_arrays_come_in_rows(tmp_path: Path, read_bytes: list[int]) -> None:
    shapes = {
        path: shape for path, shape in names.tree_shapes(LARGE).items() if "PaliGemma" in path and "_1" not in path
    }
    rng = np.random.default_rng(0)
    arrays = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    table = "PaliGemma/llm/embedder/input_embedding"
    arrays[table] = np.asfortranarray(arrays[table])
    np.savez(tmp_path / "pt_224.npz", **{f"params/{path.removeprefix('PaliGemma/')}": a for path, a in arrays.items()})
    weights = weight_loaders.open_weights(PaliGemmaWeightLoader(str(tmp_path / "pt_224.npz")), LARGE.abstract_params())
    found = dict(published_tree.arrays(weights))
    assert found.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)


@pytest.mark.parametrize("kind", weight_layouts.LAYOUTS)
def test_a_device_s_part_of_an_array_is_filled_from_whatever_comes(
    kind: str, source: Path, tmp_path: Path, read_bytes: list[int]
) -> None:
    place = weight_layouts.write(source, LARGE, tmp_path / "weights", kind)
    weights = opening.open_weights(LARGE, Path(place))
    for path, whole in published_tree.arrays(weights):
        halves = [[(0, size)] if size % 2 else [(0, size // 2), (size // 2, size)] for size in whole.shape]
        for box in list(itertools.product(*halves))[-3:]:
            part = np.empty([end - begin for begin, end in box], whole.dtype)
            for block in weights.blocks([row.released for row in weights.table if row.tree == path].__contains__):
                blocks.put_into(part, block, box)
            np.testing.assert_array_equal(part, whole[tuple(slice(*bounds) for bounds in box)], err_msg=path)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_rows_are_assigned_where_they_belong(rows: int) -> None:
    whole, target = torch.arange(14.0).reshape(7, 2), torch.zeros(7, 2, dtype=torch.bfloat16)
    for start in range(0, 7, rows):
        parallel_pytorch.assign(target, whole[start : start + rows], start)
    torch.testing.assert_close(target, whole.bfloat16())
