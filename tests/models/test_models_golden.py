"""pi0, pi0.5 and LoRA against numbers recorded from the reference implementation."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi.models import gemma, pi0
from openpi.models.gemma_config import GemmaConfig, LoRAConfig
from openpi.models.model import Observation, make_attention_mask, restore_params
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.shared.tree import flatten

HIDDEN = 2e-4  # f32 hidden states, caches, velocities, and sampled actions
EMBEDDING = 2e-5
LOSS = {"atol": 1e-4, "rtol": 1e-4}
GRADIENT = 1e-3  # relative
BF16 = 5e-2

KITS = ("pi0", "pi05", "pi0_lora")


@dataclasses.dataclass(frozen=True)
class Kit:
    config: Pi0Config
    params: dict
    inputs: dict
    outputs: dict
    meta: dict

    def observation(self, *, all_cameras: bool = False) -> Observation:
        return Observation.from_dict(
            {
                "image": {key: jnp.asarray(self.inputs[f"image_u8/{key}"]) for key in self.config.image_keys},
                "image_mask": {
                    key: jnp.asarray(self.inputs[f"image_mask/{key}"]) | all_cameras for key in self.config.image_keys
                },
                "state": jnp.asarray(self.inputs["state"]),
                "tokenized_prompt": jnp.asarray(self.inputs["tokenized_prompt"]),
                "tokenized_prompt_mask": jnp.asarray(self.inputs["tokenized_prompt_mask"]),
            }
        )

    def array(self, name: str) -> jax.Array:
        return jnp.asarray(self.inputs[name])

    def loss(self, params: dict, *, all_cameras: bool = False, dtype: str = "float32") -> jax.Array:
        config = dataclasses.replace(self.config, dtype=dtype)
        return loss(config, params, self.observation(all_cameras=all_cameras), *self.draw)

    @property
    def draw(self) -> tuple[jax.Array, ...]:
        """Actions, noise and time of the recorded loss."""
        return self.array("actions"), self.array("loss_noise"), self.array("loss_time")


def load_kit(folder: Path) -> Kit:
    meta = json.loads((folder / "meta.json").read_text())
    siglip_dims = meta["siglip"]
    fields = {k: meta["config"][k] for k in ("action_dim", "action_horizon", "max_token_len", "dtype", "pi05")}

    config = Pi0Config(
        **fields,
        discrete_state_input=meta["config"]["discrete_state_input"],
        paligemma_variant=_expert(meta, "paligemma"),
        action_expert_variant=_expert(meta, "action_expert"),
        image_encoder_variant=SiglipConfig(**siglip_dims),
    )
    params = restore_params(folder / "checkpoint" / "params")
    with np.load(folder / "inputs.npz") as inputs, np.load(folder / "outputs.npz") as outputs:
        return Kit(config, config.load(params).params, dict(inputs), dict(outputs), meta)


def _expert(meta: dict, name: str) -> GemmaConfig:
    adapters = meta.get("lora", {}).get({"paligemma": "pg", "action_expert": "ex"}[name], {})
    fields = {"attn": "attn_lora", "ffn": "ffn_lora"}
    return GemmaConfig(**meta[name], **{fields[key]: LoRAConfig(**dims) for key, dims in adapters.items()})


# Compiled once per kit, with the inputs as arguments: as constants they are folded, at length.
loss = jax.jit(pi0.loss, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def gradients(config: Pi0Config, params: dict, *inputs: Observation | jax.Array) -> dict:
    return jax.grad(lambda params: jnp.mean(pi0.loss(config, params, *inputs)))(params)


@functools.partial(jax.jit, static_argnums=0)
def joint_pass(config: Pi0Config, params: dict, observation: Observation, x_t: jax.Array, time: jax.Array) -> dict:
    """Prefix, suffix, and what the transformer makes of them."""
    prefix = pi0.embed_prefix(config, params, observation)
    suffix, cond = pi0.embed_suffix(config, params, observation.state, x_t, time)
    mask = jnp.concatenate([prefix.mask, suffix.mask], axis=1)
    positions = jnp.cumsum(mask, axis=1) - 1
    (prefix_out, suffix_out), _ = pi0.transformer(
        config,
        params,
        [prefix.embedded, suffix.embedded],
        positions=positions,
        mask=make_attention_mask(mask, jnp.concatenate([prefix.ar_mask, suffix.ar_mask])),
        cond=cond,
    )
    return {
        "prefix": dict(vars(prefix)),
        "suffix": dict(vars(suffix)),
        "cond": cond,
        "positions": positions,
        "prefix_out": prefix_out,
        "suffix_out": suffix_out,
        "v_t": pi0.velocity(config, params, suffix_out),
    }


@functools.partial(jax.jit, static_argnums=0)
def cached_pass(config: Pi0Config, params: dict, observation: Observation, noise: jax.Array) -> dict:
    """The prefix on its own, and the first flow step over its keys and values."""
    prefix = pi0.embed_prefix(config, params, observation)
    (hidden, _), cache = pi0.transformer(
        config,
        params,
        [prefix.embedded, None],
        positions=jnp.cumsum(prefix.mask, axis=1) - 1,
        mask=make_attention_mask(prefix.mask, prefix.ar_mask),
        cond=None,
    )
    v_t = pi0.denoise(config, params, observation.state, noise, jnp.ones(2), prefix.mask, cache)
    return {"mask": prefix.mask, "hidden": hidden, "cache": cache, "v_t": v_t}


@functools.partial(jax.jit, static_argnums=0)
def loss_over_draws(
    config: Pi0Config, params: dict, observation: Observation, actions: jax.Array, noise: jax.Array, time: jax.Array
) -> jax.Array:
    prefix = pi0.encode_prefix(config, params, pi0.embed_prefix(config, params, observation))
    return pi0.loss_over_draws(config, params, observation.state, actions, noise, time, *prefix)


@pytest.fixture(scope="module", params=KITS)
def kit(request: pytest.FixtureRequest, golden: Path) -> Kit:
    return load_kit(golden / request.param)


def close(actual: jax.Array, expected: np.ndarray, atol: float, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, atol=atol, rtol=rtol)


def test_loss_equals_the_recording(kit: Kit) -> None:
    close(kit.loss(kit.params), kit.outputs["loss"], **LOSS)
    close(kit.loss(kit.params, all_cameras=True), kit.outputs["loss_all_cameras"], **LOSS)


def test_draws_that_share_a_prefix_have_the_mean_loss_of_their_own(kit: Kit) -> None:
    key, observation, actions = jax.random.key(0), kit.observation(), kit.array("actions")
    noise = jax.random.normal(key, (2, *actions.shape))
    time = pi0.draw_time(key, (2, len(actions)))
    single = [loss(kit.config, kit.params, observation, actions, *pair) for pair in zip(noise, time, strict=True)]

    shared = loss_over_draws(kit.config, kit.params, observation, actions, noise, time)
    close(shared, np.mean(single, axis=0), **LOSS)

    model = dataclasses.replace(kit.config, loss_draws=2).load(kit.params)
    assert jax.eval_shape(model.compute_loss, key, observation, actions).shape == shared.shape


def test_gradients_equal_the_recording(kit: Kit) -> None:
    found = flatten(gradients(kit.config, kit.params, kit.observation(), *kit.draw))
    recorded = kit.meta["parameters"]
    assert found.keys() == recorded.keys()
    scale = max(leaf["grad_l2"] for leaf in recorded.values())
    for path, leaf in recorded.items():
        l2 = float(np.linalg.norm(found[path]))
        assert l2 == pytest.approx(leaf["grad_l2"], rel=GRADIENT, abs=1e-7 * scale), path


def test_prefix_suffix_and_joint_pass_equal_the_recording(kit: Kit) -> None:
    out, time = kit.outputs, kit.array("loss_time")
    t = time[:, None, None]
    x_t = t * kit.array("loss_noise") + (1 - t) * kit.array("actions")
    close(x_t, out["x_t"], 1e-6)

    found = jax.device_get(joint_pass(kit.config, kit.params, kit.observation(), x_t, time))
    prefix, suffix = found["prefix"], found["suffix"]
    close(prefix["embedded"][:, ::4], out["prefix_embs_every4"], EMBEDDING, 1e-5)
    np.testing.assert_array_equal(prefix["mask"], out["prefix_mask"])
    np.testing.assert_array_equal(prefix["ar_mask"], out["prefix_ar_mask"])

    close(suffix["embedded"], out["suffix_embs"], EMBEDDING, 1e-5)
    np.testing.assert_array_equal(suffix["mask"], out["suffix_mask"])
    np.testing.assert_array_equal(suffix["ar_mask"], out["suffix_ar_mask"])
    if kit.config.pi05:
        assert found["cond"] is not None
        close(found["cond"], out["adarms_cond"], EMBEDDING, 1e-5)

    np.testing.assert_array_equal(found["positions"], out["positions"])
    close(found["suffix_out"], out["suffix_hidden_joint"], HIDDEN)
    close_where_real(found["prefix_out"], out["prefix_hidden_joint_every4"], prefix["mask"])
    close(found["v_t"], out["v_t_loss"], HIDDEN)


def test_cached_prefix_and_first_step_equal_the_recording(kit: Kit) -> None:
    out = kit.outputs
    found = jax.device_get(cached_pass(kit.config, kit.params, kit.observation(), kit.array("sample_noise")))
    close_where_real(found["hidden"], out["prefix_hidden_every4"], found["mask"])
    for cache, name in zip(found["cache"], ("kv_cache_k_every4", "kv_cache_v_every4"), strict=True):
        for layer in range(cache.shape[0]):
            close_where_real(cache[layer], out[name][layer], found["mask"])
    close(found["v_t"], out["v_t_step0"], HIDDEN)


def close_where_real(actual: jax.Array, every4: np.ndarray, mask: jax.Array) -> None:
    """Tokens that are padding hold defined but meaningless numbers: only real ones are compared."""
    real = np.asarray(mask)[:, ::4]
    close(np.asarray(actual)[:, ::4][real], every4[real], HIDDEN)


def test_sampled_actions_equal_the_recording(kit: Kit) -> None:
    """With a number of steps that is traced; `test_compact` compares it with one that is not."""
    model, noise = kit.config.load(kit.params), kit.array("sample_noise")
    traced = jax.jit(lambda m, o, x, n: m.sample_actions(jax.random.key(0), o, noise=x, num_steps=n))
    for num_steps, all_cameras, name in ((3, False, "3"), (10, False, "10"), (10, True, "10_all_cameras")):
        actions = traced(model, kit.observation(all_cameras=all_cameras), noise, jnp.int32(num_steps))
        close(actions, kit.outputs[f"sampled_actions_{name}"], 1e-4)


def test_bf16_serving_and_training_setups_agree_with_the_recording(kit: Kit) -> None:
    config = dataclasses.replace(kit.config, dtype="bfloat16")
    model = config.load(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), kit.params))
    sample = jax.jit(lambda model, obs, noise: model.sample_actions(jax.random.key(0), obs, noise=noise))
    actions = sample(model, kit.observation(), kit.array("sample_noise"))
    assert actions.dtype == jnp.float32
    close(actions, kit.outputs["bf16_sampled_actions_10"], BF16)
    loss = kit.loss(kit.params, dtype="bfloat16")
    assert loss.dtype == jnp.float32
    close(loss, kit.outputs["bf16_train_loss"], BF16, BF16)


def test_freeze_filter_names_the_recorded_leaves(golden: Path) -> None:
    kit = load_kit(golden / "pi0_lora")
    frozen = {path for path in flatten(kit.params) if kit.config.get_freeze_filter()(path)}
    assert frozen == set(kit.meta["frozen_when_both_lora"])


def test_attention_mask_equals_the_recording(golden: Path) -> None:
    with np.load(golden / "components" / "components.npz") as recorded:
        mask = make_attention_mask(jnp.asarray(recorded["mask/input"]), jnp.asarray(recorded["mask/ar"]))
        np.testing.assert_array_equal(mask, recorded["mask/out"])


def test_a_mask_of_the_wrong_width_is_refused(kit: Kit) -> None:
    def forward(params: dict, observation: Observation) -> object:
        prefix = pi0.embed_prefix(kit.config, params, observation)
        return gemma.forward(
            params["PaliGemma"]["llm"],
            kit.config.experts,
            [prefix.embedded, None],
            jnp.zeros(prefix.mask.shape, jnp.int32),
            jnp.ones((2, prefix.mask.shape[1], 3), bool),
        )

    with pytest.raises(ValueError, match="attention mask has shape"):
        jax.eval_shape(forward, kit.params, kit.observation())
