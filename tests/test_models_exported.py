"""Exported models of the first releases, from a folder in their layout."""

from pathlib import Path

import jax
import numpy as np
import pytest

from openpi.models.exported import ExportedModel, load_norm_stats
from openpi.shared.tree import unflatten

pytest.importorskip("flatbuffers")


@pytest.fixture(scope="module")
def example(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "data" / "exported_model" / "example.npz") as data:
        return dict(data)


@pytest.fixture(scope="module")
def model(golden: Path) -> ExportedModel:
    return ExportedModel.load(golden / "data" / "exported_model" / "model")


def inputs(example: dict[str, np.ndarray]) -> dict:
    return unflatten({key.removeprefix("in/"): leaf for key, leaf in example.items() if key.startswith("in/")})


def test_sampled_actions_equal_the_recording(model: ExportedModel, example: dict) -> None:
    actions = model.sample_actions(jax.random.key(0), inputs(example))
    np.testing.assert_allclose(actions, example["out/actions"], atol=1e-5)
    assert (model.action_horizon, model.action_dim) == example["out/actions"].shape
    assert model.max_token_len == example["in/prompt_tokens"].shape[0]


def test_a_sample_or_option_that_does_not_fit_is_named(model: ExportedModel, example: dict) -> None:
    with pytest.raises(ValueError, match=r"state: shape \(7,\), expected \(6,\)"):
        model.sample_actions(jax.random.key(0), inputs(example) | {"state": np.zeros(7)})
    with pytest.raises(ValueError, match=r"'temperature'.*this graph takes \['num_steps'\]"):
        model.sample_actions(jax.random.key(0), inputs(example), {"temperature": 1.0})


def test_both_forms_of_statistics_are_read(golden: Path) -> None:
    folder = golden / "data" / "exported_model" / "model"
    new, old = load_norm_stats(folder, "libero"), load_norm_stats(folder, "calvin")
    for stats in (new, old):
        np.testing.assert_allclose(stats["actions"].mean, np.arange(6))
        np.testing.assert_allclose(stats["state"].mean, np.arange(6) / 10, atol=1e-6)


def test_a_processor_must_be_named_where_there_are_several(golden: Path) -> None:
    with pytest.raises(ValueError, match="calvin, libero"):
        load_norm_stats(golden / "data" / "exported_model" / "model")
