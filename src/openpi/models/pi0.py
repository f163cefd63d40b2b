"""pi0 and pi0.5: flow matching over action chunks with a two-expert transformer.

`loss` and `sample` take noise and time as arguments; `Pi0` draws them and delegates. Convention of the published
models, opposite to the paper: time runs from 1 (noise) to 0 (data), x_t = t * noise + (1 - t) * actions.
Source: the model specification, sections 5 and 6.

Legend: b batch, p prefix tokens (cameras, prompt), s suffix tokens, d width of the action expert, ah action horizon,
ad action dim.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from openpi.models import gemma, rtc, siglip
from openpi.models.model import (
    Actions,
    BaseModel,
    Observation,
    make_attention_mask,
    preprocess_observation,
)
from openpi.models.pi0_config import Pi0Config
from openpi.shared.tree import Params

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0  # of the flow-time embedding
TIME_BETA = (1.5, 1.0)
TIME_OFFSET = 0.001
_DELAY_STREAM = 3  # of the key of a loss, which is split into three others

make_attn_mask = make_attention_mask  # its published name


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Embedded tokens on their way into the transformer.

    Attributes:
        embedded: f[b n d].
        mask: bool[b n], true on real tokens.
        ar_mask: int[n], 1 where a new attention block starts.
    """

    embedded: Float[Array, "b n d"]
    mask: Bool[Array, "b n"]
    ar_mask: Int[Array, " n"]


# --- the mathematics ------------------------------------------------------------------------------------------


def loss(
    config: Pi0Config,
    params: Params,
    observation: Observation,
    actions: Float[Array, "b ah ad"],
    noise: Float[Array, "b ah ad"],
    time: Float[Array, " b"],
    delay: Int[Array, " b"] | None = None,
) -> Float[Array, "b ah"]:
    """Flow-matching loss per action step: mean over the action dims of (v - (noise - actions))^2.

    Args:
        observation: preprocessed; actions: normalised and padded (padded dims count).
        delay: so many actions are given clean, and the loss is that of the others (`rtc.of_postfix`); None = of all.
    """
    time = time if delay is None else rtc.token_times(time, delay, actions.shape[1])
    x_t = noised(actions, noise, time)
    prefix = embed_prefix(config, params, observation)
    suffix, cond = embed_suffix(config, params, observation.state, x_t, time)
    mask = jnp.concatenate([prefix.mask, suffix.mask], axis=1)
    ar_mask = jnp.concatenate([prefix.ar_mask, suffix.ar_mask])
    (_, suffix_out), _ = transformer(
        config,
        params,
        [prefix.embedded, suffix.embedded],
        positions=jnp.cumsum(mask, axis=1) - 1,
        mask=make_attention_mask(mask, ar_mask),
        cond=cond,
        reads_prefix=False,
    )
    v_t = velocity(config, params, suffix_out)
    losses = jnp.mean(jnp.square(v_t - (noise - actions)), axis=-1)
    return losses if delay is None else rtc.of_postfix(losses, delay)


def noised(
    actions: Float[Array, "b ah ad"], noise: Float[Array, "*n b ah ad"], time: Float[Array, "..."]
) -> Float[Array, "*n b ah ad"]:
    """x_t at a time of each sample, or of each action."""
    t = time.reshape(*time.shape, *[1] * (noise.ndim - time.ndim))
    return t * noise + (1 - t) * actions


def loss_over_draws(
    config: Pi0Config,
    params: Params,
    state: Float[Array, "b ad"],
    actions: Float[Array, "b ah ad"],
    noise: Float[Array, "n b ah ad"],
    time: Float[Array, "n b"],
    prefix_mask: Bool[Array, "b p"],
    kv_cache: gemma.KVCache,
    delay: Int[Array, "n b"] | None = None,
) -> Float[Array, "b ah"]:
    """Mean of `loss` over n draws of noise, time and delay, with one encoded prefix for all of them."""
    n, b = time.shape

    # Draws of one sample lie side by side, so that a device keeps those of its samples.
    def flat(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(b * n, *x.shape[2:])

    time = time if delay is None else rtc.token_times(time, delay, actions.shape[1])
    v_t = denoise(
        config,
        params,
        jnp.repeat(state, n, axis=0),
        flat(noised(actions, noise, time)),
        flat(time),
        jnp.repeat(prefix_mask, n, axis=0),
        jax.tree.map(lambda x: jnp.repeat(x, n, axis=1), kv_cache),
    )
    errors = jnp.square(v_t - flat(noise - actions))
    if delay is not None:
        return jnp.mean(rtc.of_postfix(jnp.mean(errors, axis=-1), flat(delay)).reshape(b, n, -1), axis=1)
    return jnp.mean(errors.reshape(b, n, *actions.shape[1:]), axis=(1, -1))


def sample(
    config: Pi0Config,
    params: Params,
    observation: Observation,
    noise: Float[Array, "b ah ad"],
    num_steps: int | Int[Array, ""],
    continued: rtc.Continued | None = None,
) -> Float[Array, "b ah ad"]:
    """Integrates the velocity field from noise (t = 1) to actions (t = 0) in `num_steps` Euler steps.

    The prefix runs once; every step reuses its keys and values.

    Args:
        continued: what the chunks go on from; None = they begin anew.
    """
    prefix_mask, kv_cache = encode_prefix(config, params, embed_prefix(config, params, observation))
    dt = jnp.float32(-1.0 / num_steps)
    # Of a flow step all is remembered for the way back: it is small.
    config = config if continued is None else dataclasses.replace(config, remat="none")
    delay = None if continued is None else continued.clean_rows

    def step(params: Params, x_t: Array, t: Array, time: Array | None) -> Array:
        def velocity(x_t: Array) -> Array:
            return denoise(config, params, observation.state, x_t, time, prefix_mask, kv_cache)

        return x_t + dt * velocity(x_t) if continued is None else continued.euler_step(velocity, x_t, t, dt)

    start = noise if continued is None else continued.start(noise)
    if config.skip_unused and isinstance(num_steps, int):
        times = jnp.asarray(flow_times(num_steps))
        tables = time_tables(config, params, times)
        clean = None if delay is None else time_tables(config, params, jnp.zeros(1))

        def tabulated_step(x_t: Array, row: tuple[Array, Params]) -> tuple[Array, None]:
            t, table = row
            if delay is not None and clean is not None:
                table = per_token(table, clean, rtc.frozen_rows(delay, config.action_horizon))
            return step(at_time(params, table), x_t, t, None), None

        return jax.lax.scan(tabulated_step, start, (times, tables))[0]

    def timed_step(_: object, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x_t, t = carry
        time = jnp.broadcast_to(t, noise.shape[:1])
        time = time if delay is None else rtc.token_times(time, delay, config.action_horizon)
        return step(params, x_t, t, time), t + dt

    return jax.lax.fori_loop(0, num_steps, timed_step, (start, jnp.float32(1.0)))[0]


def flow_times(num_steps: int) -> np.ndarray:
    """f32[num_steps] from 1 downwards, added up as the loop would."""
    steps = np.full(num_steps, -1.0 / num_steps, np.float32)
    return np.cumsum(np.concatenate([np.ones(1, np.float32), steps[1:]]), dtype=np.float32)


def time_tables(config: Pi0Config, params: Params, times: Float[Array, " steps"]) -> Params:
    """What depends on the flow time only, for times that the whole batch shares: one tree for each, stacked.

    Without it every step reads the weights of the adaptive norms again, half of the action expert's.
    """
    of_time = embed_time(config, params, times)
    if not config.pi05:
        return {"action_time_bias": of_time}
    return {"llm": gemma.modulations(params["PaliGemma"]["llm"], 1, of_time, config.dtype)}


def per_token(table: Params, clean: Params, is_clean: Bool[Array, "b ah"]) -> Params:
    """A tree of `time_tables` per action token: `clean`, stacked of one time, where a token is clean."""

    def chosen(of_time: Array, of_clean: Array) -> Array:
        return jnp.where(is_clean[..., None], of_clean[0][..., None, None, :], of_time[..., None, None, :])

    return jax.tree.map(chosen, table, clean)


def at_time(params: Params, table: Params) -> Params:
    """Parameters of the velocity field at one flow time; `denoise` then takes no time."""
    if "llm" not in table:
        in_layer = {**params["action_time_mlp_in"], "bias": table["action_time_bias"]}
        return {**params, "action_time_mlp_in": in_layer}
    paligemma, fixed = params["PaliGemma"], table["llm"]
    layers = {**paligemma["llm"]["layers"], **fixed["layers"]}
    return {**params, "PaliGemma": {**paligemma, "llm": {**paligemma["llm"], **fixed, "layers": layers}}}


def encode_prefix(config: Pi0Config, params: Params, prefix: Tokens) -> tuple[Bool[Array, "b p"], gemma.KVCache]:
    """Runs PaliGemma over the prefix; the suffix needs only its keys and values."""
    _, kv_cache = transformer(
        config,
        params,
        [prefix.embedded, None],
        positions=jnp.cumsum(prefix.mask, axis=1) - 1,
        mask=make_attention_mask(prefix.mask, prefix.ar_mask),
        cond=None,
        reads_prefix=False,
    )
    return prefix.mask, kv_cache


def denoise(
    config: Pi0Config,
    params: Params,
    state: Float[Array, "b ad"],
    x_t: Float[Array, "b ah ad"],
    time: Float[Array, "b *_ah"] | None,
    prefix_mask: Bool[Array, "b p"],
    kv_cache: gemma.KVCache,
) -> Float[Array, "b ah ad"]:
    """Velocity at (x_t, time), the suffix attending to the cached prefix. No time: `params` are `at_time`.

    Args:
        time: of each sample, or of each of its actions.
    """
    suffix, cond = embed_suffix(config, params, state, x_t, time)
    within = make_attention_mask(suffix.mask, suffix.ar_mask)
    to_prefix = jnp.broadcast_to(prefix_mask[:, None], (*within.shape[:2], prefix_mask.shape[1]))
    (_, suffix_out), _ = transformer(
        config,
        params,
        [None, suffix.embedded],
        positions=jnp.sum(prefix_mask, axis=1, keepdims=True) + jnp.cumsum(suffix.mask, axis=1) - 1,
        mask=jnp.concatenate([to_prefix, within], axis=2),
        cond=cond,
        kv_cache=kv_cache,
    )
    return velocity(config, params, suffix_out)


def embed_prefix(config: Pi0Config, params: Params, observation: Observation) -> Tokens:
    """Image tokens of every camera that the batch has, then the prompt; one bidirectional block."""
    embedded, masks = [], []
    paligemma = params["PaliGemma"]
    for key in config.image_keys:
        if observation.image_masks[key] is None:
            continue
        tokens = siglip.forward(
            paligemma["img"],
            config.image_encoder,
            observation.images[key],
            dtype=config.dtype,
            remat=config.remat,
        )
        embedded.append(tokens)
        masks.append(jnp.broadcast_to(observation.image_masks[key][:, None], tokens.shape[:2]))
    if observation.tokenized_prompt is not None:
        embedded.append(gemma.embed(paligemma["llm"], observation.tokenized_prompt, config.dtype))
        masks.append(observation.tokenized_prompt_mask)
    mask = jnp.concatenate(masks, axis=1)
    return Tokens(jnp.concatenate(embedded, axis=1), mask, jnp.zeros(mask.shape[1], jnp.int32))


def embed_suffix(
    config: Pi0Config,
    params: Params,
    state: Float[Array, "b ad"],
    x_t: Float[Array, "b ah ad"],
    time: Float[Array, "b *_ah"] | None,
) -> tuple[Tokens, Float[Array, "b *_ah d"] | None]:
    """Action tokens, for pi0 after a state token; and for pi0.5 the condition of the adaptive norms."""
    of_time = None if time is None else embed_time(config, params, time)
    action_tokens = siglip.dense(params["action_in_proj"], x_t)
    ar_mask = jnp.zeros(config.action_horizon, jnp.int32).at[0].set(1)
    if config.pi05:
        return Tokens(action_tokens, jnp.ones(action_tokens.shape[:2], bool), ar_mask), of_time

    time_mlp = params["action_time_mlp_in"]
    bias = time_mlp["bias"] if of_time is None else of_time
    bias = bias[:, None] if bias.ndim == 2 else bias
    kernel = time_mlp["kernel"][: action_tokens.shape[-1]]
    hidden = jax.nn.swish(siglip.dense({"kernel": kernel, "bias": bias}, action_tokens))
    state_token = siglip.dense(params["state_proj"], state)[:, None]
    tokens = jnp.concatenate([state_token, siglip.dense(params["action_time_mlp_out"], hidden)], axis=1)
    return Tokens(tokens, jnp.ones(tokens.shape[:2], bool), jnp.concatenate([jnp.ones(1, jnp.int32), ar_mask])), None


def embed_time(config: Pi0Config, params: Params, time: Float[Array, "*b"]) -> Float[Array, "*b d"]:
    """What the suffix needs of the flow time: pi0.5's condition; of pi0, the bias of its first action-time layer.

    That layer takes [action token, embedded time] side by side. The time's half is the same for all tokens.
    """
    if config.pi05:
        time_emb = posemb_sincos(time, params["time_mlp_in"]["kernel"].shape[0])
        hidden = jax.nn.swish(siglip.dense(params["time_mlp_in"], time_emb))
        # The trained condition has a second swish after the output layer.
        return jax.nn.swish(siglip.dense(params["time_mlp_out"], hidden))
    kernel, bias = params["action_time_mlp_in"]["kernel"], params["action_time_mlp_in"]["bias"]
    width = kernel.shape[0] // 2
    return siglip.dense({"kernel": kernel[width:], "bias": bias}, posemb_sincos(time, width))


def transformer(
    config: Pi0Config,
    params: Params,
    embedded: list[Float[Array, "b _n _d"] | None],
    *,
    positions: Int[Array, "b n"],
    mask: Bool[Array, "b n s"],
    cond: Float[Array, "b *_ah d"] | None,
    kv_cache: gemma.KVCache | None = None,
    reads_prefix: bool = True,
) -> tuple[list[Any], gemma.KVCache]:
    """Both experts over their tokens (None = absent); returns their outputs and the cache, see `gemma.forward`."""
    num_prefix = 0 if embedded[0] is None else embedded[0].shape[1]
    return gemma.forward(
        params["PaliGemma"]["llm"],
        config.experts,
        embedded,
        positions,
        mask,
        adarms_cond=[None, cond],
        kv_cache=kv_cache,
        unread=(0 if reads_prefix or not config.skip_unused else num_prefix, 0),
        dtype=config.dtype,
        remat=config.remat,
    )


def velocity(config: Pi0Config, params: Params, suffix_out: Float[Array, "b s d"]) -> Float[Array, "b ah ad"]:
    return project(params["action_out_proj"], suffix_out[:, -config.action_horizon :])


def project(params: Params, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    """Dense layer outside the transformer: plain type promotion, so f32 weights keep f32 velocities."""
    return x @ params["kernel"] + params["bias"]


def posemb_sincos(time: Float[Array, "*b"], dim: int) -> Float[Array, "*b {dim}"]:
    """Sine and cosine features of the flow time, periods 4e-3 to 4, in f32."""
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** jnp.linspace(0.0, 1.0, dim // 2)
    angle = time[..., None] * (2 * jnp.pi / period)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def draw_time(rng: jax.Array, shape: tuple[int, ...]) -> Float[Array, "*b"]:
    """Flow times in (0.001, 1], denser near noise."""
    return jax.random.beta(rng, *TIME_BETA, shape) * (1 - TIME_OFFSET) + TIME_OFFSET


# --- the documented object ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pi0(BaseModel):
    """pi0 or pi0.5 (`config.pi05`): static configuration and parameters; see `BaseModel`."""

    config: Pi0Config
    params: dict[str, Any]

    def compute_loss(
        self, rng: jax.Array, observation: Observation, actions: Actions, *, train: bool = False
    ) -> Float[Array, "b ah"]:
        preprocess_rng, noise_rng, time_rng = jax.random.split(rng, 3)
        observation = self.preprocess(preprocess_rng, observation, train=train)
        draws = self.config.loss_draws
        lead = (len(actions),) if draws == 1 else (draws, len(actions))
        noise = jax.random.normal(noise_rng, (*lead, *actions.shape[1:]))
        time = draw_time(time_rng, lead)
        delay = self.draw_delay(rng, lead)
        if draws == 1:
            return loss(self.config, self.params, observation, actions, noise, time, delay)
        prefix = encode_prefix(self.config, self.params, embed_prefix(self.config, self.params, observation))
        return loss_over_draws(self.config, self.params, observation.state, actions, noise, time, *prefix, delay)

    def draw_delay(self, rng: jax.Array, shape: tuple[int, ...]) -> Int[Array, "*b"] | None:
        """Delays from 0 to `rtc_max_delay`, half of them 0 (`rtc_config`); None where none are trained, which leaves
        all other draws as they are.
        """
        most = self.config.rtc_max_delay
        if not most:
            return None
        drawn = jax.random.randint(jax.random.fold_in(rng, _DELAY_STREAM), shape, 1 - most, most + 1)
        return jnp.maximum(drawn, 0)

    def sample_actions(
        self,
        rng: jax.Array,
        observation: Observation,
        *,
        num_steps: int | Int[Array, ""] = 10,
        noise: Float[Array, "b ah ad"] | None = None,
        continued: rtc.Continued | None = None,
    ) -> Float[Array, "b ah ad"]:
        """Action chunks, f32; starts from `noise`, or from a draw of `rng`.

        Args:
            continued: what the chunks go on from; None = they begin anew.
        """
        observation = self.preprocess(None, observation, train=False)
        if noise is None:
            shape = (observation.state.shape[0], self.config.action_horizon, self.config.action_dim)
            noise = jax.random.normal(rng, shape)
        return sample(self.config, self.params, observation, noise, num_steps, continued)

    def preprocess(self, rng: jax.Array | None, observation: Observation, *, train: bool) -> Observation:
        return preprocess_observation(
            rng,
            observation,
            train=train and self.config.augmentation,
            image_keys=self.config.image_keys,
            image_resolution=self.config.image_resolution,
        )


@functools.partial(jax.jit, static_argnums=0)  # one program, or every shape of it is compiled
def init(config: Pi0Config, rng: jax.Array) -> Params:
    """Fresh f32 parameters in the published tree."""
    img_key, llm_key, *dense_keys = jax.random.split(rng, 7)
    experts = config.experts
    d, ad = experts[1].width, config.action_dim
    dims = {"action_in_proj": (ad, d), "action_out_proj": (d, ad)}
    if config.pi05:
        dims |= {"time_mlp_in": (d, d), "time_mlp_out": (d, d)}
    else:
        dims |= {"state_proj": (ad, d), "action_time_mlp_in": (2 * d, d), "action_time_mlp_out": (d, d)}
    kernel = jax.nn.initializers.lecun_normal()
    dense = {
        name: {"kernel": kernel(key, shape), "bias": jnp.zeros(shape[1])}
        for (name, shape), key in zip(dims.items(), dense_keys, strict=False)
    }
    return {
        "PaliGemma": {
            "img": siglip.init(
                img_key,
                config.image_encoder,
                image_resolution=config.image_resolution,
                out_width=experts[0].width,
            ),
            "llm": gemma.init(llm_key, experts, adaptive=(False, config.pi05)),
        },
        **dense,
    }
