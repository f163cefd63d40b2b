"""What is left out of the computation changes no number: masked cameras, prompt padding, unread answers, flow times."""

import dataclasses
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paths
from openpi.models import compact
from openpi.models.compact import Extent
from openpi.models.gemma_config import GemmaConfig, LoRAConfig
from openpi.models.model import Observation, preprocess_observation
from openpi.models.pi0_config import Pi0Config
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.models.siglip_config import SiglipConfig
from openpi.policies.sampler_jax import JaxSampler
from openpi.shared.tree import flatten
from openpi.training import sharding
from openpi.training.backends.jax import step as step_jax
from openpi.training.config import TrainConfig, get_config
from openpi.training.run.pictures import contact_sheet

TOLERANCE = 1e-5  # f32, of the largest number
BATCH, PROMPT = 3, 70
_LORA = LoRAConfig(rank=2, alpha=4.0)
SHALLOW = GemmaConfig(16, 1, 32, 2, 1, 8, vocab_size=64)
# Five layers are scanned, not unrolled.
DEEP = dataclasses.replace(SHALLOW, depth=5)
ADAPTED = dataclasses.replace(DEEP, attn_lora=_LORA, ffn_lora=_LORA)


def pi0_config(expert: GemmaConfig = DEEP, **fields) -> Pi0Config:
    return Pi0Config(
        dtype="float32",
        paligemma_variant=expert,
        action_expert_variant=expert,
        image_encoder_variant=SiglipConfig(16, 1, 32, 2, 16),
        image_resolution=(32, 32),
        action_dim=5,
        action_horizon=4,
        max_token_len=PROMPT,
        **fields,
    )


def fast_config(**fields) -> Pi0FASTConfig:
    fields = {"image_keys": Pi0Config().image_keys, "max_token_len": PROMPT, **fields}
    base = pi0_config()
    shared = {name: getattr(base, name) for name in ("dtype", "paligemma_variant", "image_encoder_variant")}
    return Pi0FASTConfig(**shared, image_resolution=(32, 32), action_dim=5, action_horizon=4, **fields)


def random_params(config) -> dict:
    """Random everywhere, so that every parameter matters."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), config.abstract_params()
    )


def padded_batch(config) -> dict:
    """The second camera is masked in every sample, the third in some; prompts take 10, 19 and 28 of 70 tokens."""
    rng = np.random.default_rng(1)
    first, second, third = config.image_keys
    is_token = np.arange(PROMPT) < np.array([10, 19, 28])[:, None]
    batch = {
        "image": {key: rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8) for key in config.image_keys},
        "image_mask": {first: np.ones(BATCH, bool), second: np.zeros(BATCH, bool), third: np.arange(BATCH) % 2 == 0},
        "state": rng.normal(size=(BATCH, 5)).astype(np.float32),
        "tokenized_prompt": rng.integers(2, 64, (BATCH, PROMPT), dtype=np.int32) * is_token,
        "tokenized_prompt_mask": is_token,
        "actions": rng.normal(size=(BATCH, 4, 5)).astype(np.float32),
    }
    if isinstance(config, Pi0FASTConfig):
        is_answer = is_token & (np.arange(PROMPT) >= 6)
        batch |= {"token_loss_mask": is_answer, "token_ar_mask": is_answer.astype(np.int32)}
    return batch


def used(batch: dict) -> dict:
    part = compact.cut(batch, compact.used_extent(batch))
    assert len(part["image"]) == 2 and part["tokenized_prompt"].shape == (BATCH, 32)
    return part


def loss_and_gradients(config, batch: dict, *, train: bool = False) -> tuple[np.ndarray, dict]:
    def mean_loss(params: dict, batch: dict) -> jax.Array:
        observation = Observation.from_dict(batch)
        losses = config.load(params).compute_loss(jax.random.key(1), observation, batch["actions"], train=train)
        return jnp.mean(losses)

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(random_params(config), batch)
    return loss, flatten(gradients)


def actions(config, batch: dict, **kwargs) -> jax.Array:
    sample = jax.jit(lambda model, obs: model.sample_actions(jax.random.key(2), obs, **kwargs))
    return sample(config.load(random_params(config)), Observation.from_dict(batch))


def assert_same_training(config, *, train: bool = False) -> None:
    batch = padded_batch(config)
    padded = dataclasses.replace(config, skip_unused=False)
    expected_loss, expected = loss_and_gradients(padded, batch, train=train)
    loss, gradients = loss_and_gradients(config, used(batch), train=train)
    np.testing.assert_allclose(loss, expected_loss, rtol=TOLERANCE)
    scale = max(float(jnp.abs(leaf).max()) for leaf in expected.values())
    for path, leaf in expected.items():
        np.testing.assert_allclose(gradients[path], leaf, atol=TOLERANCE * scale, err_msg=path)


VARIANTS = {
    "pi0": pi0_config(),
    "pi05_lora": pi0_config(ADAPTED, pi05=True, remat="dots"),
    "pi05_three_draws": pi0_config(pi05=True, remat="none", loss_draws=3),
}


@pytest.mark.parametrize("name", [*VARIANTS, "pi0_fast"])
def test_loss_and_gradients_are_those_of_the_padded_computation(name: str) -> None:
    """Of pi0 with augmentation, where a camera that is left out may not change what the others draw."""
    assert_same_training(fast_config() if name == "pi0_fast" else VARIANTS[name], train=name == "pi0")


@pytest.mark.parametrize("name", ["pi0", "pi05_lora"])
def test_actions_are_those_of_the_padded_computation(name: str) -> None:
    config, batch = VARIANTS[name], padded_batch(VARIANTS[name])
    expected = actions(dataclasses.replace(config, skip_unused=False), batch)
    np.testing.assert_allclose(actions(config, used(batch)), expected, atol=TOLERANCE * float(jnp.abs(expected).max()))


def test_a_number_of_steps_that_is_only_known_at_run_time_gives_the_same_actions() -> None:
    config = VARIANTS["pi05_three_draws"]
    batch = used(padded_batch(config))
    model, observation = config.load(random_params(config)), Observation.from_dict(batch)
    traced = jax.jit(lambda m, o, n: m.sample_actions(jax.random.key(2), o, num_steps=n))
    expected = traced(model, observation, jnp.int32(7))
    np.testing.assert_allclose(
        actions(config, batch, num_steps=7), expected, atol=1e-5 * float(jnp.abs(expected).max())
    )


def test_tokens_are_those_of_the_padded_computation() -> None:
    """pi0-FAST reads places of masked cameras, unless told `exact_slots`: then nothing may go if one is masked."""
    config = fast_config()
    masked = padded_batch(config)
    del masked["token_loss_mask"], masked["token_ar_mask"]
    visible = {**masked, "image_mask": dict.fromkeys(masked["image"], np.ones(BATCH, bool))}
    assert compact.used_extent(masked, reads_masked=compact.reads_masked(config)) == compact.whole_extent(masked)
    for batch, exact_slots in ((visible, False), (masked, True)):
        reads_masked = compact.reads_masked(config, exact_slots=exact_slots)
        extent = compact.used_extent(batch, reads_masked=reads_masked)
        assert (len(extent.cameras), extent.prompt_len) == (2 if exact_slots else 3, 32)
        part = compact.cut(batch, extent)
        options = {"max_decoding_steps": 12, "exact_slots": exact_slots, "temperature": 1.0}
        expected = actions(dataclasses.replace(config, skip_unused=False), batch, **options)
        assert len(np.unique(expected)) > 3
        np.testing.assert_array_equal(actions(config, part, **options), expected)


# --- what is left out -----------------------------------------------------------------------------------------


def test_the_extent_is_what_at_least_one_sample_uses() -> None:
    batch = padded_batch(VARIANTS["pi0"])
    assert compact.used_extent(batch) == Extent(("base_0_rgb", "right_wrist_0_rgb"), 32)
    batch["tokenized_prompt_mask"][0, 66] = True
    assert compact.used_extent(batch).prompt_len == PROMPT  # 96 would be more than there is


def test_where_everything_is_masked_one_camera_and_one_step_of_prompt_stay() -> None:
    batch = padded_batch(VARIANTS["pi0"])
    nothing = {**batch, "image_mask": dict.fromkeys(batch["image"], np.zeros(BATCH, bool))}
    nothing["tokenized_prompt_mask"] = np.zeros((BATCH, PROMPT), bool)
    assert compact.used_extent(nothing) == Extent(("base_0_rgb",), 32)
    without_prompt = {key: value for key, value in batch.items() if not key.startswith("tokenized")}
    assert compact.used_extent(without_prompt).prompt_len is None


def test_a_camera_that_is_missing_is_still_an_error_unless_it_was_dropped() -> None:
    config = pi0_config(SHALLOW)
    part = used(padded_batch(config))
    assert part["image_mask"]["left_wrist_0_rgb"] is None
    del part["image_mask"]["left_wrist_0_rgb"]
    with pytest.raises(ValueError, match=r"missing the cameras \['left_wrist_0_rgb'\]"):
        preprocess_observation(None, Observation.from_dict(part), image_keys=config.image_keys)


def test_the_first_batch_still_shows_a_dropped_camera_as_unused() -> None:
    batch = padded_batch(VARIANTS["pi0"])
    black = {**batch, "image": {**batch["image"], "left_wrist_0_rgb": np.zeros((BATCH, 32, 32, 3), np.uint8)}}
    assert contact_sheet(used(batch)).shape == contact_sheet(black).shape


# --- training -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe() -> TrainConfig:
    tiny = get_config(f"{paths.SUPPORT / 'tiny_recipe.py'}:tiny")
    return dataclasses.replace(tiny, model=pi0_config(SHALLOW, remat="none", augmentation=False), batch_size=BATCH)


def test_a_recipe_decides_whether_anything_is_left_out(recipe) -> None:
    batch = padded_batch(recipe.model)
    assert len(step_jax.cut_batch(recipe, batch)["image"]) == 2
    keeps_all = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, skip_unused=False))
    assert step_jax.cut_batch(keeps_all, batch) is batch


def test_a_placed_batch_has_the_extent_that_the_host_sees(recipe) -> None:
    batch = padded_batch(recipe.model)
    mesh = sharding.make_mesh(1)
    placed = step_jax.place_batch({**batch, "state": batch["state"].astype(np.float64)}, mesh)
    assert step_jax.used_extent(placed, mesh) == compact.used_extent(batch)
    assert step_jax.used_extent(placed, mesh, reads_masked=True) == compact.whole_extent(batch)
    part = step_jax.place_batch(used(batch), mesh)
    assert step_jax.used_extent(part, mesh) == compact.used_extent(batch)


def test_a_step_made_for_an_extent_is_right_for_batches_within_it_and_beyond(recipe) -> None:
    """As every process of many runs it: none knows what the others' samples use."""
    batch = padded_batch(recipe.model)
    params = random_params(recipe.model)
    optimizer = recipe.optimizer.create(recipe.lr_schedule.create())
    state = step_jax.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), None)
    key = jax.random.key(0)
    made_for_less = jax.jit(lambda b: step_jax.train_step(recipe, key, state, b, extent=Extent(("base_0_rgb",), 32))[1])
    whole = jax.jit(lambda b: step_jax.train_step(recipe, key, state, b)[1])
    hidden = {key: np.zeros(BATCH, bool) for key in batch["image_mask"]}
    within = {**batch, "image_mask": hidden | {"base_0_rgb": np.ones(BATCH, bool)}}
    longer = {**within, "tokenized_prompt_mask": np.ones((BATCH, PROMPT), bool)}
    for sample in (within, batch, longer):
        expected, found = whole(sample), made_for_less(sample)
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(found[name], expected[name], rtol=TOLERANCE, err_msg=name)


# --- serving --------------------------------------------------------------------------------------------------


def test_after_warming_up_no_request_compiles_and_short_ones_are_cut() -> None:
    config = pi0_config(SHALLOW)
    sampler = JaxSampler(config.load(random_params(config)))
    padded = JaxSampler(dataclasses.replace(config, skip_unused=False).load(random_params(config)))
    request = {key: value for key, value in padded_batch(config).items() if key != "actions"}
    longest = {**request, "tokenized_prompt_mask": np.ones((BATCH, PROMPT), bool)}
    other_camera = {**request, "image_mask": dict.fromkeys(request["image"], np.ones(BATCH, bool))}
    requests = (request, longest, other_camera)
    expected = [padded.sample(inputs, None, num_steps=2) for inputs in requests]

    before = sampler._sample._cache_size()
    sampler.warm_up(request, num_steps=2)
    programs = sampler._sample._cache_size()
    assert programs - before == 2  # what the request uses and one step of prompt more; everything
    for inputs, actions in zip(requests, expected, strict=True):
        found = sampler.sample(inputs, None, num_steps=2)
        np.testing.assert_allclose(found, actions, atol=TOLERANCE * np.abs(actions).max())
    assert sampler._sample._cache_size() == programs


def test_without_warming_up_there_is_one_program_for_all_requests() -> None:
    config = pi0_config(SHALLOW)
    sampler = JaxSampler(config.load(random_params(config)))
    request = {key: value for key, value in padded_batch(config).items() if key != "actions"}
    longest = {**request, "tokenized_prompt_mask": np.ones((BATCH, PROMPT), bool)}
    before = sampler._sample._cache_size()
    for inputs in (request, longest):
        sampler.sample(inputs, None, num_steps=3)
    assert sampler._sample._cache_size() - before == 1


# --- counted work ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flops():
    file = paths.ROOT / "benchmarks" / "flops.py"
    spec = importlib.util.spec_from_file_location("benchmark_flops", file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_count_knows_loops_and_which_branch_runs(flops) -> None:
    weights = jnp.ones((6, 8, 8))

    def program(x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, stacked: tuple) -> tuple:
            weight, is_last = stacked
            return jax.lax.cond(is_last, lambda: x, lambda: x @ weight), None

        return jax.lax.scan(jax.checkpoint(layer), x, (weights, np.arange(6) == 5))[0]

    product = 2 * 3 * 8 * 8
    x = jax.ShapeDtypeStruct((3, 8), jnp.float32)
    assert flops.count(jax.make_jaxpr(program)(x)) == 5 * product
    # Linear in x: the gradient takes one product per layer, and needs no activation again.
    assert flops.count(jax.make_jaxpr(jax.grad(lambda x: program(x).sum()))(x)) == 10 * product
    unknown = jax.make_jaxpr(lambda p, x: jax.lax.cond(p, lambda: x, lambda: x @ weights[0]))(True, x)
    assert flops.count(unknown) == product


def test_a_training_sample_of_pi05_libero_takes_at_most_six_tenths_of_the_padded_work(flops) -> None:
    config = get_config("pi05_libero")
    masks = flops.camera_masks(config)
    assert [key for key, is_used in masks.items() if not is_used] == ["right_wrist_0_rgb"]
    extent = Extent(("base_0_rgb", "left_wrist_0_rgb"), 64)
    assert flops.train_flops(config, extent) <= 0.60 * flops.train_flops(config, None)
