"""pi0-FAST: PaliGemma as a prefix language model that writes actions as tokens.

One expert, no flow. The sequence is the tokens of every camera, then prompt, state and actions as text.
Source: the model specification, section 7.

Legend: b batch, n sequence, l tokens of the text, d width, v vocabulary, p prefix length, m decoding steps.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from openpi.models import gemma, siglip
from openpi.models.action_grammar import ActionGrammar, GrammarState
from openpi.models.model import Actions, BaseModel, Observation, make_attention_mask, preprocess_observation
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.shared.tree import Params

__all__ = ["Pi0FAST", "Pi0FASTConfig", "embed", "init", "loss", "sample"]


EOS = 1
_LOGITS_AT_ONCE = 32  # positions of the text; the vocabulary makes each of them a megabyte


class Tokens(NamedTuple):
    """Embedded tokens f[b n d]; bool[b n], true on real ones; int[b n], 1 where a new attention block starts; int[n],
    places in the sequence, which skip those of cameras that are not in the batch.
    """

    embedded: Float[Array, "b n d"]
    mask: Bool[Array, "b n"]
    ar_mask: Int[Array, "b n"]
    places: Int[np.ndarray, " n"]


# --- training -------------------------------------------------------------------------------------------------


def loss(config: Pi0FASTConfig, params: Params, observation: Observation) -> Float[Array, " b"]:
    """Mean negative log-likelihood of the trained tokens of each sample; 0 for a sample without any.

    Args:
        observation: preprocessed, with `token_ar_mask` and `token_loss_mask`.
    """
    targets = observation.tokenized_prompt[:, 1:]
    weights = observation.token_loss_mask[:, 1:]
    hidden = predictions(config, params, embed(config, params, observation), targets.shape[1])
    table = embedding_table(params)

    @jax.checkpoint
    def add_chunk(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden, targets, weights = chunk
        logits = hidden @ table.T
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_probs = picked - jax.nn.logsumexp(logits, axis=-1)
        return total + jnp.sum(jnp.where(weights, log_probs, 0), axis=1), None

    dtype = jnp.result_type(hidden, table)
    total, _ = jax.lax.scan(add_chunk, jnp.zeros(len(targets), dtype), _chunks(hidden, targets, weights))
    return -total / jnp.maximum(jnp.sum(weights, axis=1), 1)


def predictions(config: Pi0FASTConfig, params: Params, tokens: Tokens, count: int) -> Float[Array, "b l d"]:
    """Last hidden states that predict the last `count` tokens of the sequence."""
    n = tokens.mask.shape[1] - 1
    hidden, _ = transformer(
        config,
        params,
        tokens.embedded[:, :-1],
        # Not cumsum(mask) - 1: a masked camera advances the positions in training, as in the published model.
        positions=jnp.broadcast_to(tokens.places[:-1], (len(tokens.mask), n)),
        mask=make_attention_mask(tokens.mask, tokens.ar_mask)[:, :-1, :-1],
        num_read=count,
    )
    return hidden[:, -count:]


def _chunks(*arrays: Array) -> tuple[Array, ...]:
    """[b l ...] -> [chunks b _LOGITS_AT_ONCE ...], zero-padded at the end."""
    length = arrays[0].shape[1]
    count = -(-length // _LOGITS_AT_ONCE)

    def split(x: Array) -> Array:
        padding = [(0, 0), (0, count * _LOGITS_AT_ONCE - length)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, padding).reshape(len(x), count, _LOGITS_AT_ONCE, *x.shape[2:])
        return jnp.moveaxis(padded, 1, 0)

    return tuple(map(split, arrays))


# --- sampling -------------------------------------------------------------------------------------------------


class _Decoding(NamedTuple):
    """What the decoding loop carries from token to token."""

    step: Int[Array, ""]
    rng: jax.Array
    logits: Float[Array, "b v"]
    cache: gemma.KVCache
    output: Int[Array, "b m"]
    grammar: GrammarState | None
    all_ended: Bool[Array, ""]


def sample(
    config: Pi0FASTConfig,
    params: Params,
    observation: Observation,
    rng: jax.Array,
    *,
    max_decoding_steps: int,
    temperature: float,
    grammar: ActionGrammar | None = None,
    exact_slots: bool = False,
) -> Int[Array, "b m"]:
    """Token ids, one after another, until every sample ends in the same step; 0 where nothing was written.

    Args:
        observation: preprocessed; the prompt holds no actions.
        temperature: 0 takes the most likely token.
        grammar: what may be written; None = anything.
        exact_slots: attend to exactly the real prefix tokens. The published model counts them from the end, which
            is the same unless a camera in the middle is masked.
    """
    prefix = embed(config, params, observation)
    num_prefix = prefix.mask.shape[1]
    num_valid = jnp.sum(prefix.mask, axis=1)
    prefix_mask, logits, cache = _prefill(config, params, prefix, max_decoding_steps)
    slots = jnp.arange(num_prefix + max_decoding_steps)
    from_start = slots >= (num_prefix - num_valid)[:, None]
    readable = jnp.pad(prefix_mask, ((0, 0), (0, max_decoding_steps)), constant_values=True)
    readable = readable if exact_slots else from_start

    def write(carry: _Decoding) -> _Decoding:
        s, (rng, key) = carry.step, jax.random.split(carry.rng)
        logits = carry.logits if grammar is None else grammar.constrain(carry.grammar, carry.logits)
        token = _choose(key, logits, temperature)
        hidden, cache = transformer(
            config,
            params,
            gemma.embed(params["PaliGemma"]["llm"], token[:, None], config.dtype),
            positions=(num_valid + s + 1)[:, None],  # the published models skip one position here
            mask=(readable & (slots < num_prefix + s + 1))[:, None],
            kv_cache=carry.cache,
            write_at=num_prefix + s,
        )
        return _Decoding(
            step=s + 1,
            rng=rng,
            logits=hidden[:, 0] @ embedding_table(params).T,
            cache=cache,
            output=jax.lax.dynamic_update_slice_in_dim(carry.output, token[:, None], s, axis=1),
            grammar=None if grammar is None else grammar.advance(carry.grammar, token),
            all_ended=jnp.all(token == EOS),
        )

    def unfinished(carry: _Decoding) -> Bool[Array, ""]:
        return (carry.step < max_decoding_steps) & ~carry.all_ended

    output = jnp.zeros((len(num_valid), max_decoding_steps), jnp.int32)
    state = None if grammar is None else grammar.start(len(num_valid))
    start = _Decoding(jnp.int32(0), rng, logits, cache, output, state, jnp.bool_(False))
    return jax.lax.while_loop(unfinished, write, start).output


def _prefill(
    config: Pi0FASTConfig, params: Params, prefix: Tokens, room: int
) -> tuple[Bool[Array, "b p"], Float[Array, "b v"], gemma.KVCache]:
    """Runs the right-aligned prefix: its mask, the logits of the first token, and a cache with `room` left."""
    embedded, mask, attention = right_align(prefix)
    positions = jnp.cumsum(mask, axis=1) - 1
    hidden, cache = transformer(config, params, embedded, positions=positions, mask=attention, num_read=1)
    widths = ((0, 0), (0, 0), (0, room), (0, 0), (0, 0))
    k, v = (jnp.pad(x, widths) for x in cache)
    return mask, hidden[:, -1] @ embedding_table(params).T, (k, v)


def right_align(tokens: Tokens) -> tuple[Float[Array, "b n d"], Bool[Array, "b n"], Bool[Array, "b n n"]]:
    """Rolls every sample so that its last real token comes last: embeddings, mask, attention mask."""
    attention = make_attention_mask(tokens.mask, tokens.ar_mask)
    n = tokens.mask.shape[1]
    last = jnp.max(jnp.where(tokens.mask, jnp.arange(n), -1), axis=1)

    def roll(embedded: Array, mask: Array, attention: Array, last: Array) -> tuple[Array, Array, Array]:
        shift = -(last + 1)
        return (
            jnp.roll(embedded, shift, axis=0),
            jnp.roll(mask, shift),
            jnp.roll(jnp.roll(attention, shift, axis=0), shift, axis=1),
        )

    return jax.vmap(roll)(tokens.embedded, tokens.mask, attention, last)


def _choose(key: jax.Array, logits: Float[Array, "b v"], temperature: float) -> Int[Array, " b"]:
    chosen = jnp.argmax(logits, axis=-1) if temperature == 0 else jax.random.categorical(key, logits / temperature)
    return chosen.astype(jnp.int32)


# --- shared ---------------------------------------------------------------------------------------------------


def embed(config: Pi0FASTConfig, params: Params, observation: Observation) -> Tokens:
    """Image tokens of the observation's cameras by name, then the text; attention blocks as `token_ar_mask` says."""
    paligemma = params["PaliGemma"]
    patch = config.image_encoder.patch_size
    num_patches = (config.image_resolution[0] // patch) * (config.image_resolution[1] // patch)
    embedded, masks, ar_masks, places = [], [], [], []
    for i, key in enumerate(sorted(observation.image_masks)):
        if observation.image_masks[key] is None:
            continue
        places.append(i * num_patches + np.arange(num_patches))
        tokens = siglip.forward(
            paligemma["img"], config.image_encoder, observation.images[key], dtype=config.dtype, remat=config.remat
        )
        embedded.append(tokens)
        masks.append(jnp.broadcast_to(observation.image_masks[key][:, None], tokens.shape[:2]))
        ar_masks.append(jnp.zeros(tokens.shape[:2], jnp.int32))
    embedded.append(gemma.embed(paligemma["llm"], observation.tokenized_prompt, config.dtype))
    masks.append(observation.tokenized_prompt_mask)
    ar_mask = observation.token_ar_mask
    ar_masks.append(jnp.zeros_like(observation.tokenized_prompt) if ar_mask is None else ar_mask)
    places.append(len(observation.image_masks) * num_patches + np.arange(observation.tokenized_prompt.shape[1]))
    joined = (jnp.concatenate(parts, axis=1) for parts in (embedded, masks, ar_masks))
    return Tokens(*joined, places=np.concatenate(places))


def transformer(
    config: Pi0FASTConfig,
    params: Params,
    embedded: Float[Array, "b n d"],
    *,
    positions: Int[Array, "b n"],
    mask: Bool[Array, "b n s"],
    kv_cache: gemma.KVCache | None = None,
    write_at: Int[Array, ""] | None = None,
    num_read: int | None = None,
) -> tuple[Float[Array, "b n d"], gemma.KVCache]:
    """The one expert over its tokens; see `gemma.forward`. Outputs are read of the last `num_read`; None = of all."""
    unread = 0 if num_read is None or not config.skip_unused else embedded.shape[1] - num_read
    (hidden,), cache = gemma.forward(
        params["PaliGemma"]["llm"],
        [config.expert],
        [embedded],
        positions,
        mask,
        kv_cache=kv_cache,
        write_at=write_at,
        unread=(unread,),
        dtype=config.dtype,
        remat=config.remat,
    )
    assert hidden is not None
    return hidden, cache


def embedding_table(params: Params) -> Float[Array, "v d"]:
    """Token embeddings, which are also the output layer."""
    return jnp.asarray(params["PaliGemma"]["llm"]["embedder"]["input_embedding"])


# --- the documented object ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pi0FAST(BaseModel):
    """pi0-FAST: static configuration and parameters; see `BaseModel`."""

    config: Pi0FASTConfig
    params: dict[str, Any]

    def compute_loss(
        self, rng: jax.Array, observation: Observation, actions: Actions, *, train: bool = False
    ) -> Float[Array, " b"]:
        """Loss per sample. `actions` is not read: the tokens hold them."""
        del actions
        return loss(self.config, self.params, self.preprocess(rng, observation, train=train))

    def sample_actions(
        self,
        rng: jax.Array,
        observation: Observation,
        *,
        max_decoding_steps: int | None = None,
        temperature: float = 0.0,
        grammar: ActionGrammar | None = None,
        exact_slots: bool = False,
    ) -> Float[Array, "b m"]:
        """Token ids as f32, the published form; `FASTTokenizer.extract_actions` makes actions of them.

        `max_decoding_steps`: None = the config's.
        """
        observation = self.preprocess(None, observation, train=False)
        tokens = sample(
            self.config,
            self.params,
            observation,
            rng,
            max_decoding_steps=max_decoding_steps or self.config.max_decoding_steps,
            temperature=temperature,
            grammar=grammar,
            exact_slots=exact_slots,
        )
        return tokens.astype(jnp.float32)

    def preprocess(self, rng: jax.Array | None, observation: Observation, *, train: bool) -> Observation:
        return preprocess_observation(
            rng,
            observation,
            train=train and self.config.augmentation,
            image_keys=sorted(observation.images),
            image_resolution=self.config.image_resolution,
        )


@functools.partial(jax.jit, static_argnums=0)  # one program, or every shape of it is compiled
def init(config: Pi0FASTConfig, rng: jax.Array) -> Params:
    """Fresh f32 parameters in the published tree."""
    img_key, llm_key = jax.random.split(rng)
    return {
        "PaliGemma": {
            "img": siglip.init(
                img_key,
                config.image_encoder,
                image_resolution=config.image_resolution,
                out_width=config.expert.width,
            ),
            "llm": gemma.init(llm_key, [config.expert], adaptive=(False,)),
        }
    }
