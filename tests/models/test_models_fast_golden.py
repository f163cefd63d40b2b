"""pi0-FAST against numbers recorded from the reference implementation."""

import dataclasses
import functools
import json
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi.models import pi0_fast
from openpi.models.gemma_config import GemmaConfig
from openpi.models.model import Observation, restore_params
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.models.siglip_config import SiglipConfig
from openpi.shared.tree import flatten

HIDDEN = 2e-4
EMBEDDING = 2e-5
LOSS = {"atol": 1e-4, "rtol": 1e-4}
GRADIENT = 1e-3  # relative
BF16 = 5e-2


@dataclasses.dataclass(frozen=True)
class Kit:
    config: Pi0FASTConfig
    params: dict
    inputs: dict
    outputs: dict
    meta: dict

    @cached_property
    def steps(self) -> int:
        return self.meta["max_decoding_steps"]

    def observation(self, *, all_cameras: bool = True, decode: bool = False, rows: slice = slice(None)) -> Observation:
        keys, inputs = self.meta["image_keys"], self.inputs
        prompt = "decode_prompt" if decode else "tokenized_prompt"
        data = {
            "image": {key: inputs[f"image_u8/{key}"] for key in keys},
            "image_mask": {key: inputs[f"image_mask/{key}"] | all_cameras for key in keys},
            "state": inputs["state"],
            "tokenized_prompt": inputs[prompt],
            "tokenized_prompt_mask": inputs[f"{prompt}_mask"],
            "token_ar_mask": inputs["token_ar_mask"] * (not decode),
            "token_loss_mask": inputs["token_loss_mask"],
        }
        return Observation.from_dict(jax.tree.map(lambda x: jnp.asarray(x[rows]), data))

    @cached_property
    def model(self) -> pi0_fast.Pi0FAST:
        return self.config.load(self.params)

    def greedy(self, *, rows: slice = slice(None), all_cameras: bool = True, **options: bool) -> np.ndarray:
        observation = self.observation(decode=True, rows=rows, all_cameras=all_cameras)
        return np.asarray(sample(self.model, jax.random.key(0), observation, max_decoding_steps=self.steps, **options))


# Compiled as a whole, with the inputs as arguments: op by op takes many times as long.
sample = jax.jit(pi0_fast.Pi0FAST.sample_actions, static_argnames=("max_decoding_steps", "temperature", "exact_slots"))
loss = jax.jit(pi0_fast.loss, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def gradients(config: Pi0FASTConfig, params: dict, observation: Observation) -> dict:
    return jax.grad(lambda params: jnp.mean(pi0_fast.loss(config, params, observation)))(params)


@functools.partial(jax.jit, static_argnums=0)
def training_pass(config: Pi0FASTConfig, params: dict, observation: Observation) -> dict[str, jax.Array]:
    tokens = pi0_fast.embed(config, params, observation)
    hidden = pi0_fast.predictions(config, params, tokens, tokens.mask.shape[1] - 1)
    logits = hidden[:, -63:] @ pi0_fast.embedding_table(params).T
    return {
        **{name: getattr(tokens, name) for name in ("embedded", "mask", "ar_mask")},
        "hidden": hidden,
        "logits": logits,
        "lse": jax.nn.logsumexp(logits, axis=-1),
    }


@functools.partial(jax.jit, static_argnums=0)
def prefill(config: Pi0FASTConfig, params: dict, observation: Observation) -> tuple:
    return pi0_fast._prefill(config, params, pi0_fast.embed(config, params, observation), room=3)


@pytest.fixture(scope="module")
def kit(golden: Path) -> Kit:
    folder = golden / "pi0_fast"
    meta = json.loads((folder / "meta.json").read_text())
    fields = {k: meta["config"][k] for k in ("action_dim", "action_horizon", "max_token_len", "dtype")}
    config = Pi0FASTConfig(
        **fields,
        paligemma_variant=GemmaConfig(**meta["paligemma"]),
        image_encoder_variant=SiglipConfig(**meta["siglip"]),
    )
    params = restore_params(folder / "checkpoint" / "params")
    with np.load(folder / "inputs.npz") as inputs, np.load(folder / "outputs.npz") as outputs:
        return Kit(config, config.load(params).params, dict(inputs), dict(outputs), meta)


def close(actual: jax.Array, expected: np.ndarray, atol: float, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, atol=atol, rtol=rtol)


def test_loss_equals_the_recording(kit: Kit) -> None:
    close(loss(kit.config, kit.params, kit.observation()), kit.outputs["loss"], **LOSS)
    masked = loss(kit.config, kit.params, kit.observation(all_cameras=False))
    close(masked, kit.outputs["loss_masked_cameras"], **LOSS)


def test_loss_in_bf16_is_close_to_the_recording(kit: Kit) -> None:
    config = dataclasses.replace(kit.config, dtype="bfloat16")
    found = loss(config, kit.params, kit.observation())
    assert found.dtype == kit.meta["bf16_output_dtypes"]["bf16_train_loss"]
    close(found, kit.outputs["bf16_train_loss"], BF16, BF16)


def test_gradients_equal_the_recording(kit: Kit) -> None:
    found = flatten(gradients(kit.config, kit.params, kit.observation()))
    recorded = kit.meta["parameters"]
    assert found.keys() == recorded.keys()
    scale = max(leaf["grad_l2"] for leaf in recorded.values())
    for path, leaf in recorded.items():
        l2 = float(np.linalg.norm(found[path]))
        assert l2 == pytest.approx(leaf["grad_l2"], rel=GRADIENT, abs=1e-7 * scale), path


def test_the_training_pass_equals_the_recording(kit: Kit) -> None:
    found = jax.device_get(training_pass(kit.config, kit.params, kit.observation()))
    close(found["embedded"][:, ::4], kit.outputs["input_embs_every4"], EMBEDDING, 1e-5)
    np.testing.assert_array_equal(found["mask"], kit.outputs["input_mask"])
    np.testing.assert_array_equal(found["ar_mask"], kit.outputs["ar_mask"])

    real = found["mask"][:, :-1:4, None]
    close(found["hidden"][:, ::4] * real, kit.outputs["prelogits_every4"] * real, HIDDEN)

    real = found["mask"][:, -64:-1]
    close(found["lse"] * real, kit.outputs["lse"] * real, HIDDEN, 1e-5)
    real = real[:, ::2, None]
    close(found["logits"][:, ::2, :1021] * real, kit.outputs["logits_every2"] * real, HIDDEN, 1e-4)


def test_prefill_equals_the_recording(kit: Kit) -> None:
    mask, logits, (k, v) = jax.device_get(prefill(kit.config, kit.params, kit.observation(decode=True)))
    np.testing.assert_array_equal(mask, kit.outputs["prefill_mask_right_aligned"])
    assert mask[:, -1].all()
    close(logits[:, :1021], kit.outputs["prefill_last_logits"], HIDDEN, 1e-4)
    assert k.shape == v.shape == (4, 2, mask.shape[1] + 3, 1, 16)


def test_greedy_tokens_equal_the_recording_to_the_last_one(kit: Kit) -> None:
    tokens = kit.greedy()
    assert tokens.dtype == np.float32
    np.testing.assert_array_equal(tokens, kit.outputs["greedy_tokens"])
    for i in range(2):
        single = kit.greedy(rows=slice(i, i + 1))
        np.testing.assert_array_equal(single, kit.outputs[f"greedy_tokens_single_{i}"])


def test_sampling_at_a_temperature_uses_the_published_keys(kit: Kit) -> None:
    observation = kit.observation(decode=True)
    tokens = sample(kit.model, jax.random.key(3), observation, max_decoding_steps=kit.steps, temperature=0.7)
    np.testing.assert_array_equal(tokens, kit.outputs["temp0.7_tokens_key3"])


def test_masked_cameras_decode_as_published_and_exactly_if_asked(kit: Kit) -> None:
    published = kit.greedy(all_cameras=False)
    np.testing.assert_array_equal(published, kit.outputs["greedy_tokens_masked_cameras"])
    # Exact slots change nothing where no camera is masked.
    np.testing.assert_array_equal(kit.greedy(exact_slots=True), kit.outputs["greedy_tokens"])


def test_jit_and_eager_write_the_same_tokens(kit: Kit) -> None:
    key, observation = jax.random.key(0), kit.observation(decode=True)
    eager = kit.model.sample_actions(key, observation, max_decoding_steps=kit.steps)
    for tokens in (eager, kit.greedy()):
        np.testing.assert_array_equal(tokens, kit.outputs["greedy_tokens"])


@pytest.mark.parametrize(("max_token_len", "steps"), [(180, 256), (700, 700)])
def test_an_answer_may_be_as_long_as_one_that_was_trained(kit: Kit, max_token_len: int, steps: int) -> None:
    model = dataclasses.replace(kit.config, max_token_len=max_token_len).load(kit.params)
    tokens = jax.eval_shape(model.sample_actions, jax.random.key(0), kit.observation(decode=True))
    assert tokens.shape[1] == model.config.max_decoding_steps == steps
