"""One training step: what moves and what does not, accumulation, averaging, starting weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paths
from openpi.shared.tree import flatten, unflatten
from openpi.training import sharding, weight_loaders
from openpi.training.backends.jax import step as step_jax
from openpi.training.config import TrainConfig, get_config
from openpi.training.freeze import PathRegex
from openpi.training.optimizer import CosineDecaySchedule
from openpi.training.weight_loaders import (
    CheckpointWeightLoader,
    NoOpWeightLoader,
    PaliGemmaWeightLoader,
)
from openpi.weights import orbax_io

RECIPE = f"{paths.SUPPORT / 'tiny_recipe.py'}:tiny"
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    schedule = CosineDecaySchedule(warmup_steps=1, peak_lr=3e-3, decay_steps=1000, decay_lr=3e-3)
    return dataclasses.replace(get_config(RECIPE), lr_schedule=schedule)


@pytest.fixture(scope="module")
def params(config) -> dict:
    """Random everywhere: a fresh model has zeros that stop gradients."""
    rng = np.random.default_rng(0)
    spec = config.model.abstract_params()
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), spec)


@pytest.fixture(scope="module")
def batch(config) -> dict:
    rng = np.random.default_rng(0)
    size, model = config.batch_size, config.model
    arrays = {
        "image": {"base_0_rgb": rng.integers(0, 256, (size, *model.image_resolution, 3), dtype=np.uint8)},
        "image_mask": {"base_0_rgb": np.ones(size, bool)},
        "state": rng.normal(size=(size, model.action_dim)).astype(np.float32),
        "tokenized_prompt": rng.integers(0, 64, (size, model.max_token_len), dtype=np.int32),
        "tokenized_prompt_mask": np.ones((size, model.max_token_len), bool),
        "actions": rng.normal(size=(size, model.action_horizon, model.action_dim)).astype(np.float32),
    }
    return jax.tree.map(jnp.asarray, arrays)


def _state(config: TrainConfig, params: dict) -> step_jax.TrainState:
    """A fresh state around given parameters, built without compiling the initialisation."""
    trainable, frozen = step_jax.split_params(params, config.freeze_filter)
    frozen = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(jnp.bfloat16)), frozen)
    params = step_jax.join_params(trainable, frozen)
    optimizer = config.optimizer.create(config.lr_schedule.create())
    average = None if config.ema_decay is None else params
    return step_jax.TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(trainable), average)


@pytest.fixture(scope="module")
def step(config, batch):
    """The compiled step, shared: compiling is what takes the time here."""
    return jax.jit(lambda state: step_jax.train_step(config, KEY, state, batch))


@pytest.fixture(scope="module")
def validation_loss(config, batch):
    return jax.jit(lambda params, key: step_jax.eval_step(config, key, params, batch))


@pytest.fixture(scope="module")
def one_step(config, params, step):
    """The state before, after, and the metrics."""
    before = _state(config, params)
    return before, *step(before)


def test_a_step_counts_and_moves_every_parameter_that_has_a_gradient(one_step):
    before, after, metrics = one_step
    assert after.step == 1
    moved = {p for p, leaf in flatten(after.params).items() if not np.array_equal(leaf, flatten(before.params)[p])}
    assert "action_out_proj/kernel" in moved
    assert "PaliGemma/img/embedding/kernel" in moved
    assert metrics["loss"] > 0


def test_metrics_are_what_their_names_say(config, one_step):
    _, after, metrics = one_step
    assert metrics.keys() == {"loss", "grad_norm", "param_norm", "learning_rate"}
    np.testing.assert_allclose(metrics["learning_rate"], config.lr_schedule.create()(0), rtol=1e-6)
    skipped = ("bias", "scale", "pos_embedding", "input_embedding")
    kernels = [leaf for path, leaf in flatten(after.params).items() if leaf.ndim > 1 and not path.endswith(skipped)]
    expected = np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in kernels))
    np.testing.assert_allclose(metrics["param_norm"], expected, rtol=1e-5)


def test_the_average_moves_by_one_part_in_a_hundred(one_step):
    before, after, _ = one_step
    old, new = (jax.device_get(flatten(state.params)) for state in (before, after))
    for path, average in flatten(after.ema_params).items():
        expected = 0.99 * old[path] + 0.01 * new[path]
        np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7, err_msg=path)


def test_frozen_parameters_stay_bit_for_bit(config, params, batch):
    config = dataclasses.replace(config, freeze_filter=PathRegex(".*(llm|img).*"), ema_decay=None)
    before = _state(config, params)
    after, _ = jax.jit(lambda state: step_jax.train_step(config, KEY, state, batch))(before)
    for path, leaf in flatten(after.params).items():
        if config.freeze_filter(path):
            assert leaf.dtype == jnp.bfloat16
            np.testing.assert_array_equal(leaf, flatten(before.params)[path])
        else:
            assert leaf.dtype == jnp.float32
    assert after.ema_params is None
    assert not np.array_equal(after.params["action_out_proj"]["kernel"], before.params["action_out_proj"]["kernel"])
    assert set(after.opt_state[1][0].mu) == {
        "action_in_proj",
        "action_out_proj",
        "state_proj",
        "action_time_mlp_in",
        "action_time_mlp_out",
    }


@dataclasses.dataclass  # and so not hashable
class FreezesNothing:
    def __call__(self, path: str) -> bool:
        return False


def test_recipes_that_differ_in_what_no_step_reads_share_a_program(config):
    """A run that goes on in the same process compiles nothing anew."""
    mesh = sharding.make_mesh(1)
    step = step_jax.compile_train_step(config, mesh)
    alike = dataclasses.replace(config, name="other", exp_name="other", batch_size=8, num_train_steps=9, resume=True)
    assert step_jax.compile_train_step(alike, mesh) is step
    for change in ({"ema_decay": None}, {"freeze_filter": PathRegex(".*llm.*")}, {"freeze_filter": FreezesNothing()}):
        other = dataclasses.replace(config, **change)
        assert step_jax.compile_train_step(other, mesh) is not step, change


def test_accumulation_gives_the_mean_gradient_of_its_parts(config, params, batch):
    parts = 2
    accumulating = dataclasses.replace(config, gradient_accumulation_steps=parts)
    trainable, frozen = step_jax.split_params(params, PathRegex("PaliGemma.*"))
    loss, grads = jax.jit(lambda p: step_jax.loss_and_grads(accumulating, KEY, p, frozen, batch))(trainable)
    one = jax.jit(lambda key, part: step_jax.loss_and_grads(config, key, trainable, frozen, part))
    alone = [
        one(key, jax.tree.map(lambda leaf, i=i: leaf[i::parts], batch))
        for i, key in enumerate(jax.random.split(KEY, parts))
    ]
    np.testing.assert_allclose(loss, np.mean([found[0] for found in alone]), rtol=1e-6)
    for path, grad in flatten(grads).items():
        expected = np.mean([np.asarray(flatten(found[1])[path]) for found in alone], axis=0)
        np.testing.assert_allclose(grad, expected, rtol=2e-4, atol=1e-4 * np.abs(expected).max(), err_msg=path)


def test_training_lowers_the_loss_of_what_it_trains_on(config, params, step, validation_loss):
    state = _state(config, params)
    before = validation_loss(state.params, KEY)
    for _ in range(100):
        state, _ = step(state)
    assert validation_loss(state.params, KEY) < 0.8 * before


def test_validation_repeats_exactly(params, validation_loss):
    assert validation_loss(params, KEY) == validation_loss(params, KEY)
    assert validation_loss(params, KEY) != validation_loss(params, jax.random.key(4))


def test_a_state_starts_from_the_recipes_weights(config, params, tmp_path):
    orbax_io.write_params(tmp_path / "params", params)
    config = dataclasses.replace(config, weight_loader=CheckpointWeightLoader(str(tmp_path / "params")))
    state = step_jax.create_state(config, jax.random.key(9), sharding.make_mesh(1))
    for path, leaf in flatten(state.params).items():
        np.testing.assert_array_equal(leaf, flatten(params)[path], err_msg=path)
        np.testing.assert_array_equal(flatten(state.ema_params)[path], leaf)


def test_no_weights_mean_a_fresh_start(config):
    weights = weight_loaders.open_weights(NoOpWeightLoader(), config.model.abstract_params())
    assert weights.report.loaded == () and list(weights.blocks()) == []


def _reference() -> dict:
    shapes = {"a/w": (2, 3), "a/lora_a": (2, 1), "b/w": (4,)}
    return unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()})


def test_adapters_that_the_weights_lack_keep_their_start(tmp_path):
    loaded = unflatten({"a/w": np.ones((2, 3), np.float16), "b/w": np.ones(4), "extra/w": np.ones(1)})
    orbax_io.write_params(tmp_path / "params", loaded)
    merged = flatten(CheckpointWeightLoader(str(tmp_path / "params")).load(_reference()))
    assert isinstance(merged["a/lora_a"], jax.ShapeDtypeStruct)
    assert merged["a/w"].dtype == np.float32
    assert "extra/w" not in merged


@dataclasses.dataclass(frozen=True)
class OwnLoader(weight_loaders.WeightLoader):
    leaves: dict

    def load(self, params):
        return unflatten(flatten(params) | self.leaves) if "all" not in self.leaves else self.leaves["all"]


def test_a_loader_of_ones_own_returns_all_parameters_and_is_told_about(caplog):
    """One that returned the tree below `params`, or a part of it, started a run from random numbers in silence."""
    with caplog.at_level("INFO", "openpi"):
        weights = weight_loaders.open_weights(OwnLoader({"a/w": np.ones((2, 3))}), _reference())
    assert weights.report.loaded == ("a/w",) and set(weights.report.kept) == {"a/lora_a", "b/w"}
    assert "weights from OwnLoader: 1 arrays (6 values) loaded; 2 (6 values) keep" in caplog.text
    for tree in ({"params": _reference()}, {"a": _reference()["a"]}):
        with pytest.raises(ValueError, match=r"weights in OwnLoader do not fit[\s\S]*b/w: missing"):
            weight_loaders.open_weights(OwnLoader({"all": tree}), _reference())


def test_every_leaf_that_does_not_fit_is_named_at_once(tmp_path):
    orbax_io.write_params(tmp_path / "params", unflatten({"a/w": np.ones((3, 2)), "extra/w": np.ones(1)}))
    with pytest.raises(
        ValueError, match=r"weights in .*params[\s\S]*a/w: shape \(3, 2\)[\s\S]*b/w: missing[\s\S]*extra/w"
    ):
        CheckpointWeightLoader(str(tmp_path / "params")).load(_reference())


def test_paligemma_weights_are_placed_and_the_rest_starts_fresh(tmp_path):
    np.savez(tmp_path / "pt_224.npz", **{"params/llm/w": np.full(2, 7.0), "other": np.zeros(1)})
    reference = unflatten(
        {
            "PaliGemma/llm/w": jax.ShapeDtypeStruct((2,), jnp.float32),
            "action_in_proj/kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32),
        }
    )
    merged = flatten(PaliGemmaWeightLoader(str(tmp_path / "pt_224.npz")).load(reference))
    np.testing.assert_array_equal(merged["PaliGemma/llm/w"], [7.0, 7.0])
    assert isinstance(merged["action_in_proj/kernel"], jax.ShapeDtypeStruct)
