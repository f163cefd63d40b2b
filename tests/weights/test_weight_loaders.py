"""What training starts from: a report of every parameter, and one error for what does not fit or is not whole."""

import dataclasses
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import paths
from openpi.shared.tree import flatten, unflatten
from openpi.training import loop
from openpi.training.backend import open_backend
from openpi.training.config import TrainConfig, get_config
from openpi.training.run import preflight
from openpi.training.weight_loaders import CheckpointWeightLoader, NoOpWeightLoader, PaliGemmaWeightLoader
from openpi.weights import opening, orbax_io, published_tree

TINY = get_config(f"{paths.SUPPORT / 'tiny_recipe.py'}:tiny")


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """By path, of the tiny recipe's model."""
    model = flatten(TINY.model.abstract_params())
    return {path: np.full(leaf.shape, 0.5, np.float32) for path, leaf in model.items()}


def starting_from(folder: Path, weights: dict[str, np.ndarray]) -> TrainConfig:
    """The tiny recipe with these weights on disk, and a dataset that is not there: to be noticed later."""
    orbax_io.write_params(folder / "params", unflatten(weights))
    return dataclasses.replace(
        TINY,
        exp_name="run",
        checkpoint_base_dir=str(folder / "checkpoints"),
        weight_loader=CheckpointWeightLoader(str(folder / "params")),
        data=dataclasses.replace(TINY.data, repo_id=str(folder / "no_dataset")),
    )


def test_the_report_says_what_becomes_of_every_parameter(tmp_path, weights, caplog):
    stored = {path: leaf.astype(np.float16) for path, leaf in weights.items()} | {"old_head/bias": np.zeros(3)}
    config = starting_from(tmp_path, stored)
    lora = {"PaliGemma/llm/q/lora_a": np.zeros((2, 3), np.float32)}
    with caplog.at_level(logging.INFO, "openpi"):
        loaded = flatten(config.weight_loader.load(unflatten(weights | lora)))
    count = sum(leaf.size for leaf in weights.values())
    assert [record.getMessage() for record in caplog.records if record.name.startswith("openpi")] == [
        f"weights from {tmp_path}/params: {len(weights)} arrays ({count:,} values) loaded; 1 (6 values) keep their "
        "initial values: PaliGemma/llm/q/lora_a; 1 unused: old_head/bias"
    ]
    assert loaded.keys() == weights.keys() | lora.keys()
    assert loaded["PaliGemma/llm/q/lora_a"] is lora["PaliGemma/llm/q/lora_a"]
    assert {leaf.dtype for leaf in loaded.values()} == {np.dtype(np.float32)}


def test_random_initialisation_is_reported_too(weights, caplog):
    with caplog.at_level(logging.INFO, "openpi"):
        NoOpWeightLoader().load(unflatten(weights))
    assert f"0 arrays (0 values) loaded; {len(weights)} (" in caplog.text


def test_only_what_the_model_has_is_read(tmp_path):
    orbax_io.write_params(tmp_path / "params", unflatten({"a/w": np.ones(2), "b/w": np.ones(3), "c": np.ones(4)}))
    weights = opening.open_tree({"a/w": (2,), "c": (4,)}, tmp_path / "params")
    assert flatten(published_tree.tree_of(weights)).keys() == {"a/w", "c"}


def test_of_a_training_checkpoint_too_only_what_the_model_has_is_read(golden):
    params = golden / "pi0" / "checkpoint" / "params"
    read = published_tree.tree_of(
        opening.open_tree(opening.stored_shapes(params), params), only={"action_in_proj/kernel"}
    )
    assert flatten(read).keys() == {"action_in_proj/kernel"}


def test_weights_of_another_width_are_refused_before_the_dataset_is_opened(tmp_path, weights):
    wide = {path: np.zeros((*leaf.shape[:-1], 2 * leaf.shape[-1]), np.float32) for path, leaf in weights.items()}
    missing = sorted(wide)[3]
    del wide[missing]
    config = starting_from(tmp_path, wide | {"new_head/bias": np.zeros(3)})
    with pytest.raises(ValueError, match="do not fit the model") as raised:
        loop.train(config)
    first, *lines = str(raised.value).splitlines()
    assert f"{len(weights)} of {len(weights)} arrays differ" in first
    shape = tuple(weights[sorted(weights)[0]].shape)
    assert lines[0] == f"  {sorted(weights)[0]}: shape {(*shape[:-1], 2 * shape[-1])}, the model has {shape}"
    assert lines[3] == f"  {missing}: missing, the model has {tuple(weights[missing].shape)}"
    assert lines[10:] == [
        f"  and {len(weights) - 10} more",
        "  1 of the weights are not in the model: new_head/bias",
    ]


def test_weights_that_fit_let_training_go_on_to_the_dataset(tmp_path, weights):
    with pytest.raises(FileNotFoundError, match="no_dataset"):
        loop.train(starting_from(tmp_path, weights))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def largest(folder: Path) -> Path:
    return max(folder.rglob("d/*"), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: truncate(largest(folder)), r"ocdbt\.process_0/d/\w+ has \d+ bytes and needs \d+"),
        (lambda folder: largest(folder).unlink(), r"ocdbt\.process_0/d/\w+ is missing"),
        (lambda folder: (folder / "manifest.ocdbt").unlink(), "manifest.ocdbt is missing"),
        (lambda folder: truncate(folder / "manifest.ocdbt"), "the index cannot be read"),
        (lambda folder: shutil.rmtree(folder / "d"), "the index cannot be read"),
        (lambda folder: truncate(folder / "_METADATA"), "_METADATA is cut off"),
        (lambda folder: truncate(folder / "_sharding"), "_sharding is cut off"),
    ],
    ids=["cut array", "missing arrays", "no index", "cut index", "no index nodes", "cut names", "cut shardings"],
)
def test_a_checkpoint_that_is_not_whole_is_one_error_before_anything_is_read(
    damage: Callable[[Path], object], message: str, golden, tmp_path
):
    params = tmp_path / "params"
    shutil.copytree(golden / "pi05" / "checkpoint" / "params", params)
    damage(params)
    config = dataclasses.replace(TINY, weight_loader=CheckpointWeightLoader(str(params)))
    with pytest.raises(ValueError, match=rf"{re.escape(str(params))} is damaged, or was not written[\s\S]*{message}"):
        preflight.open_weights(config, open_backend(config))


def test_a_checkpoint_without_its_list_of_names_is_no_checkpoint(golden, tmp_path):
    shutil.copytree(golden / "pi05" / "checkpoint" / "params", tmp_path / "params")
    (tmp_path / "params" / "_METADATA").unlink()
    config = dataclasses.replace(TINY, weight_loader=CheckpointWeightLoader(str(tmp_path / "params")))
    with pytest.raises(FileNotFoundError, match="has no _METADATA file"):
        preflight.open_weights(config, open_backend(config))


def test_paligemma_weights_of_another_width_are_refused_from_their_headers(tmp_path):
    np.savez(tmp_path / "pt_224.npz", **{"params/llm/w": np.zeros((4, 5))})
    reference = unflatten({"PaliGemma/llm/w": np.zeros((4, 6), np.float32)})
    with pytest.raises(ValueError, match=r"PaliGemma/llm/w: shape \(4, 5\), the model has \(4, 6\)"):
        PaliGemmaWeightLoader(str(tmp_path / "pt_224.npz")).check(reference)


@pytest.mark.parametrize("keeps", [0.3, 0.7])
def test_a_cut_paligemma_archive_is_one_error(tmp_path, keeps):
    file = tmp_path / "pt_224.npz"
    np.savez(file, **{"params/llm/w": np.zeros((40, 50))})
    file.write_bytes(file.read_bytes()[: int(keeps * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"pt_224\.npz is damaged, or no npz file"):
        PaliGemmaWeightLoader(str(file)).check({})
