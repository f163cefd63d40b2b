"""Orbax trees on disk: both leaf flavours, dtypes, partial writes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import weight_layouts
from openpi.models.model import restore_params
from openpi.shared.tree import flatten
from openpi.weights import opening, orbax_io

KITS = ("pi0", "pi05", "pi0_lora", "pi0_fast")  # pi05 has the released leaf flavour, the others training's


@pytest.mark.parametrize("name", KITS)
def test_both_leaf_flavours_give_the_published_paths(name: str, golden: Path) -> None:
    recorded = json.loads((golden / name / "meta.json").read_text())["parameters"]
    folder = golden / name / "checkpoint" / "params"
    shapes = {path: list(shape) for path, shape in opening.stored_shapes(folder).items()}
    assert shapes == {path: leaf["shape"] for path, leaf in recorded.items()}
    assert flatten(orbax_io.read_params(folder)).keys() == shapes.keys()


def test_params_are_cast_while_they_are_read(golden: Path) -> None:
    path = golden / "pi05" / "checkpoint" / "params"
    full, half = flatten(restore_params(path)), flatten(restore_params(path, dtype=jnp.bfloat16))
    for name, leaf in full.items():
        assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32
        assert half[name].dtype == jnp.bfloat16
    np.testing.assert_array_equal(half["action_in_proj/kernel"], full["action_in_proj/kernel"].astype(jnp.bfloat16))


def test_params_come_as_device_arrays_where_asked(golden: Path) -> None:
    leaves = jax.tree.leaves(restore_params(golden / "pi0" / "checkpoint" / "params", restore_type=jax.Array))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_train_state_of_the_reference_is_read(golden: Path) -> None:
    state = weight_layouts.read_orbax(golden / "pi0" / "train_state")
    assert {"step", "params", "opt_state"} <= state.keys()
    assert int(np.asarray(state["step"])) >= 0


def test_written_params_read_back_equal_and_in_the_released_flavour(tmp_path: Path) -> None:
    params = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": jnp.ones(3, jnp.bfloat16)}
    orbax_io.write_params(tmp_path / "params", params)
    assert (tmp_path / "params" / "_METADATA").exists() and (tmp_path / "params" / "manifest.ocdbt").exists()
    read = orbax_io.read_params(tmp_path / "params")
    np.testing.assert_array_equal(read["a"]["kernel"], params["a"]["kernel"])
    assert read["b"].dtype == jnp.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["params"]


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    orbax_io.write_params(tmp_path / "params", {"a": np.zeros(1, np.float32)})
    with pytest.raises(FileExistsError, match="exists already"):
        orbax_io.write_params(tmp_path / "params", {"a": np.ones(1, np.float32)})
    assert orbax_io.read_params(tmp_path / "params")["a"][0] == 0


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no _METADATA file"):
        orbax_io.read_params(tmp_path)
