"""Real-time chunking: the mathematics, on a problem whose exact answer is known; and models of both backends alike."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tiny_recipe
from openpi.models import pi0, rtc
from openpi.models.model import Observation
from openpi.models.pi0_config import Pi0Config
from openpi.models.rtc_config import RtcConfig, prefix_weights
from openpi.models_pytorch import loading
from openpi.models_pytorch import model as model_pytorch
from openpi.models_pytorch import rtc as rtc_pytorch
from openpi.policies.sampler_jax import JaxSampler
from openpi.policies.sampler_pytorch import PytorchSampler
from openpi.training.backends.pytorch import step as step_pytorch

# --- curves whose best velocity is a matrix: spec, "Toy that shows all of it" ---------------------------------------

HORIZON, DELAY, PERIOD, OVERLAP_END, COUNT, NUM_STEPS = 50, 8, 20, 30, 1000, 10
ROWS = np.arange(HORIZON)
COVARIANCE = np.exp(-0.5 * ((ROWS[:, None] - ROWS) / 6.0) ** 2) + 1e-6 * np.eye(HORIZON)
TIMES = 1 - np.arange(NUM_STEPS) / NUM_STEPS
GUIDED, IDENTITY, TRAINED = RtcConfig("guided"), RtcConfig("guided", jacobian="identity"), RtcConfig("trained")


def expectation(t: float, known: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A and B of E[chunk | x_t, its first rows] = A x_t + B rows."""
    first, rest = slice(known), slice(known, None)
    regression = COVARIANCE[rest, first] @ np.linalg.inv(COVARIANCE[first, first]) if known else np.zeros((HORIZON, 0))
    left = COVARIANCE[rest, rest] - regression @ COVARIANCE[first, rest]
    gain = (1 - t) * left @ np.linalg.inv((1 - t) ** 2 * left + t**2 * np.eye(HORIZON - known))
    of_noisy, of_rows = np.zeros((HORIZON, HORIZON)), np.zeros((HORIZON, known))
    of_noisy[rest, rest] = gain
    of_rows[first], of_rows[rest] = np.eye(known), regression - (1 - t) * gain @ regression
    return of_noisy, of_rows


@functools.cache
def left_over() -> np.ndarray:
    """Chunks that are played since `PERIOD` ticks, padded by holding the last action."""
    played = sampled("pytorch", None, seed=0)[:, PERIOD:]
    return np.pad(played, ((0, 0), (0, PERIOD)), mode="edge")


def sampled(backend: str, config: RtcConfig | None, seed: int = 1) -> np.ndarray:
    """Chunks [n h] that go on from those before; None = independent ones."""
    to_array: Any = torch.as_tensor if backend == "pytorch" else jnp.asarray
    einsum: Any = torch.einsum if backend == "pytorch" else jnp.einsum
    module: Any = rtc_pytorch if backend == "pytorch" else rtc
    x = to_array(np.random.default_rng(seed).standard_normal((COUNT, HORIZON, 1)).astype(np.float32))
    known, continued = 0, None
    if config is not None:
        known = DELAY if config.is_trained else 0
        weights = np.broadcast_to(prefix_weights(DELAY, OVERLAP_END, HORIZON, config.schedule)[:, None], x.shape)
        fields = (left_over()[..., None], weights.copy(), np.full(COUNT, DELAY))
        continued = module.Continued(*map(to_array, fields), config)
        x = continued.start(x)
    for t in TIMES:
        of_noisy, of_rows = (to_array(m.astype(np.float32)) for m in expectation(t, known))

        def velocity(x: Any, of_noisy: Any = of_noisy, of_rows: Any = of_rows, t: float = t) -> Any:
            expected = einsum("ij,bjd->bid", of_noisy, x) + einsum("ij,bjd->bid", of_rows, x[:, :known])
            return (x - expected) / t

        if continued is None:
            x = x - velocity(x) / NUM_STEPS
        else:
            x = continued.euler_step(velocity, x, to_array(np.float32(t)), -1 / NUM_STEPS)
    return np.asarray(x)[..., 0]


def jump(chunks: np.ndarray) -> float:
    """From the last frozen row to the first free one, in mean steps within chunks."""
    within = np.abs(np.diff(left_over()[:, :OVERLAP_END], axis=1)).mean()
    return float(np.abs(chunks[:, DELAY] - left_over()[:, DELAY - 1]).mean() / within)


def departure(chunks: np.ndarray, start: int, end: int) -> float:
    return float(np.sqrt(np.mean((chunks - left_over())[:, start:end] ** 2)))


@pytest.mark.parametrize("backend", ["jax", "pytorch"])
def test_chunks_that_go_on_do_not_jump_where_independent_ones_do(backend: str) -> None:
    independent = sampled(backend, None)
    assert jump(independent) == pytest.approx(8.4, abs=0.4)
    chunks = {config: sampled(backend, config) for config in (GUIDED, IDENTITY, TRAINED)}
    assert jump(chunks[GUIDED]) < 1.1
    assert jump(chunks[IDENTITY]) < 1.3
    assert jump(chunks[TRAINED]) < 1.05
    assert departure(chunks[GUIDED], 0, DELAY) < 0.03 and departure(chunks[IDENTITY], 0, DELAY) < 0.03
    assert departure(chunks[TRAINED], 0, DELAY) == 0
    assert departure(chunks[GUIDED], DELAY, OVERLAP_END) < 0.65 < departure(independent, DELAY, OVERLAP_END)


def test_weights_are_one_for_frozen_rows_and_fall_to_zero_at_the_end_of_the_overlap() -> None:
    linear = [1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0]
    np.testing.assert_allclose(prefix_weights(2, 6, 10, "linear"), linear, atol=1e-6)
    exp = [1, 1, 0.5706, 0.2871, 0.1145, 0.0258, 0, 0, 0, 0]
    np.testing.assert_allclose(prefix_weights(2, 6, 10, "exp"), exp, atol=1e-4)
    np.testing.assert_array_equal(prefix_weights(2, 6, 10, "ones"), [1] * 6 + [0] * 4)
    np.testing.assert_array_equal(prefix_weights(8, 6, 10, "zeros"), [1] * 6 + [0] * 4)


def test_the_guidance_weighs_as_published_in_both_backends() -> None:
    expected = {1.0: 5, 0.9: 5, 0.8: 4.25, 0.6: 2.1667, 0.5: 2, 0.2: 4.25, 0.0: 5}
    for time, weight in expected.items():
        assert float(rtc.guidance_weight(jnp.float32(time), 5.0)) == pytest.approx(weight, abs=1e-3)
        assert float(rtc_pytorch.guidance_weight(torch.tensor(time), 5.0)) == pytest.approx(weight, abs=1e-3)


@pytest.mark.parametrize("field", [{"mode": "soft"}, {"schedule": "cosine"}, {"jacobian": "none"}, {"clip": 0.0}])
def test_a_way_that_does_not_exist_is_refused(field: dict[str, Any]) -> None:
    [name] = field
    with pytest.raises(ValueError, match=f"{name} of real-time chunking is"):
        RtcConfig(**field)


# --- models -----------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, Pi0Config] = {
    "pi0": dataclasses.replace(tiny_recipe.MODEL, action_horizon=6, rtc_max_delay=3),
    # Released models compute layers again in the backward pass, which that of the guidance must not.
    "pi05": dataclasses.replace(tiny_recipe.MODEL, action_horizon=6, rtc_max_delay=3, pi05=True, remat="full"),
}
# Not every pair, or this file compiles for a minute.
SAMPLED = (("pi0", IDENTITY), ("pi0", TRAINED), ("pi05", GUIDED), ("pi05", TRAINED))
F32 = 1e-5
BATCH = 3


@dataclasses.dataclass(frozen=True)
class Subject:
    """One model in both backends, and a batch for it.

    Attributes:
        continued: of three samples, which begin anew, go on after 2 steps, and after 3.
    """

    config: Pi0Config
    params: dict[str, Any]
    inputs: dict[str, Any]
    noise: np.ndarray
    continued: dict[str, np.ndarray]

    @functools.cached_property
    def samplers(self) -> dict[str, Any]:
        pytorch = PytorchSampler(loading.from_tree(self.config, self.params), device="cpu")
        return {"jax": JaxSampler(self.config.load(self.params)), "pytorch": pytorch}

    def sample(self, backend: str, config: RtcConfig | None, **changes: np.ndarray) -> np.ndarray:
        if config is None:
            return self.samplers[backend].sample(self.inputs, self.noise, num_steps=4)
        inputs = {**self.inputs, "continued": {**self.continued, **changes}}
        return self.samplers[backend].sample(inputs, self.noise, num_steps=4, chunking=config)


@functools.cache
def subject(name: str) -> Subject:
    config, rng = CONFIGS[name], np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.05 * rng.standard_normal(leaf.shape, np.float32),
        config.create(jax.random.key(0)).params,
    )
    shape = (BATCH, config.action_horizon, config.action_dim)
    weights = np.zeros(shape, np.float32)
    delay = np.array([0, 2, 3], np.int32)
    for i in (1, 2):
        weights[i, :, :3] = prefix_weights(delay[i], 5, config.action_horizon, "exp")[:, None]
    continued = {"actions": rng.standard_normal(shape, np.float32), "weights": weights, "delay": delay}
    inputs = {
        "image": {"base_0_rgb": rng.integers(0, 255, (BATCH, 28, 28, 3), np.uint8)},
        "image_mask": {"base_0_rgb": np.ones(BATCH, bool)},
        "state": rng.standard_normal((BATCH, config.action_dim), np.float32),
        "tokenized_prompt": rng.integers(1, 100, (BATCH, 8), np.int32),
        "tokenized_prompt_mask": np.ones((BATCH, 8), bool),
    }
    return Subject(config, params, inputs, rng.standard_normal(shape, np.float32), continued)


@pytest.mark.parametrize(("name", "config"), SAMPLED)
def test_both_backends_go_on_alike_and_leave_alone_who_begins_anew(name: str, config: RtcConfig) -> None:
    of = subject(name)
    found, twin = of.sample("jax", config), of.sample("pytorch", config)
    np.testing.assert_allclose(found, twin, atol=F32)
    plain = of.sample("jax", None)
    np.testing.assert_allclose(found[0], plain[0], atol=F32)
    actions = of.continued["actions"]
    for i, delay in ((1, 2), (2, 3)):
        departs, departed = (np.abs(chunk[i, :delay, :3] - actions[i, :delay, :3]).mean() for chunk in (found, plain))
        assert departs < 0.4 * departed
    if config.is_trained:
        np.testing.assert_array_equal(found[2, :3], actions[2, :3])
        np.testing.assert_array_equal(twin[2, :3], actions[2, :3])


def test_in_padded_dims_nothing_is_asked_for() -> None:
    of = subject("pi05")
    other = of.continued["actions"].copy()
    other[..., 3] += 10
    np.testing.assert_array_equal(of.sample("pytorch", GUIDED, actions=other), of.sample("pytorch", GUIDED))


@pytest.mark.parametrize("name", CONFIGS)
def test_sampling_one_flow_time_after_the_other_is_what_tables_of_them_give(name: str) -> None:
    of = subject(name)
    model = loading.from_tree(of.config, of.params)
    observation = model_pytorch.Observation.from_dict(jax.tree.map(torch.as_tensor, of.inputs))
    continued = rtc_pytorch.Continued(**jax.tree.map(torch.as_tensor, of.continued), config=TRAINED)
    with_tables, without = (
        model.sample_actions(observation, torch.as_tensor(of.noise), num_steps=4, tabulate=t, continued=continued)
        for t in (True, False)
    )
    torch.testing.assert_close(with_tables, without, atol=F32, rtol=0)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_of_both_backends_is_that_of_the_actions_after_the_clean_ones(name: str) -> None:
    of = subject(name)
    time, delay, actions = np.float32([0.2, 0.5, 0.9]), of.continued["delay"], of.continued["actions"]
    observation = model_pytorch.Observation.from_dict(jax.tree.map(torch.as_tensor, of.inputs))
    model = loading.from_tree(of.config, of.params)

    def loss(noise: np.ndarray) -> np.ndarray:
        arrays = (torch.as_tensor(x) for x in (actions, noise, time))
        with torch.no_grad():
            return model(observation, *arrays, None, torch.as_tensor(delay)).numpy()

    found = loss(of.noise)
    assert [int((row == 0).sum()) for row in found] == delay.tolist()
    # Clean actions have no noise; that of the others matters.
    other = of.noise.copy()
    other[1, :2] += 1
    np.testing.assert_array_equal(loss(other), found)
    # Each sample's mean is over its own; without clean ones it is the loss as it always was.
    with torch.no_grad():
        plain = model(observation, *(torch.as_tensor(x) for x in (actions, of.noise, time))).numpy()
    np.testing.assert_allclose(found[0], plain[0], atol=F32)

    observed = jax.tree.map(jnp.asarray, Observation.from_dict(of.inputs))
    twin = jax.jit(pi0.loss, static_argnums=0)(of.config, of.params, observed, actions, of.noise, time, delay)
    np.testing.assert_allclose(twin, found, atol=10 * F32, rtol=F32)


def test_half_of_the_samples_have_no_delay_the_others_up_to_the_largest_and_none_where_none_are_trained() -> None:
    """With few samples without clean actions, a model does not learn to look at the pictures."""
    config = CONFIGS["pi0"]
    of_jax = np.asarray(pi0.Pi0(config, {}).draw_delay(jax.random.key(0), (1200,)))
    of_torch = step_pytorch.draw_delay(config, np.random.default_rng(0), torch.zeros(1200))
    for drawn in (of_jax, of_torch):
        counts = np.bincount(np.asarray(drawn), minlength=4)
        assert len(counts) == 4 and 540 < counts[0] < 660 and counts[1:].min() > 150
    assert pi0.Pi0(tiny_recipe.MODEL, {}).draw_delay(jax.random.key(0), (4,)) is None


def test_a_delay_that_leaves_nothing_to_learn_is_refused() -> None:
    with pytest.raises(ValueError, match="rtc_max_delay=3 leaves nothing to learn of 3 actions"):
        dataclasses.replace(tiny_recipe.MODEL, rtc_max_delay=3)
