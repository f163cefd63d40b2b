"""pi0-FAST: PaliGemma as a prefix language model that writes actions as tokens.

The PyTorch twin of `openpi.models.pi0_fast`. Source: the model specification, section 7.

Legend: b batch, n sequence, l tokens of the text, d width, v vocabulary, p prefix length, m decoding steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils import checkpoint

from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.models_pytorch.action_grammar import ActionGrammar
from openpi.models_pytorch.augment import Draws
from openpi.models_pytorch.gemma import Gemma, KVCache
from openpi.models_pytorch.model import (
    DTYPES,
    Observation,
    make_attention_mask,
    preprocess_observation,
)
from openpi.models_pytorch.siglip import Siglip

EOS = 1
_LOGITS_AT_ONCE = 32  # positions of the text; the vocabulary makes each of them a megabyte


class Tokens(NamedTuple):
    """Embedded tokens f[b n d]; bool[b n], true on real ones; int[b n], 1 where a new attention block starts; int[n],
    places in the sequence, which skip those of cameras that are not in the batch.
    """

    embedded: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]
    ar_mask: Int[Tensor, "b n"]
    places: Int[Tensor, " n"]


class Pi0FAST(nn.Module):
    """pi0-FAST. Parameters are empty until they are loaded, or made by
    `fresh_parameters`."""

    takes_noise = False

    def __init__(self, config: Pi0FASTConfig) -> None:
        super().__init__()
        self.config = config
        self.dtype = DTYPES[config.dtype]
        patch = config.image_encoder.patch_size
        self.num_patches = (config.image_resolution[0] // patch) * (config.image_resolution[1] // patch)
        self.vision = Siglip(config.image_encoder, num_tokens=self.num_patches, out_width=config.expert.width)
        self.language = Gemma([config.expert], adaptive=(False,))

    def unread_parameters(self) -> list[str]:
        """As of `Pi0`: there are none."""
        return []

    # --- training ---------------------------------------------------------------------------------------------

    def forward(self, observation: Observation, draws: Draws | None = None) -> Float[Tensor, " b"]:
        """Mean negative log-likelihood of the trained tokens of each sample; 0 for a sample without any.

        Args:
            draws: of the image augmentation; None = no augmentation.
        """
        return self.loss(self.preprocess(observation, draws))

    def preprocess(self, observation: Observation, draws: Draws | None = None) -> Observation:
        return preprocess_observation(
            observation,
            draws=draws if self.config.augmentation else None,
            image_keys=sorted(observation.images),
            image_resolution=self.config.image_resolution,
        )

    def loss(self, observation: Observation) -> Float[Tensor, " b"]:
        """The loss of a preprocessed observation, which has `token_ar_mask` and `token_loss_mask`."""
        assert observation.tokenized_prompt is not None and observation.token_loss_mask is not None
        targets = observation.tokenized_prompt[:, 1:].long()
        weights = observation.token_loss_mask[:, 1:]
        hidden = self.predictions(self.embed(observation), targets.shape[1])
        total = torch.zeros(len(targets), device=hidden.device)
        for start in range(0, targets.shape[1], _LOGITS_AT_ONCE):
            part = slice(start, start + _LOGITS_AT_ONCE)
            arguments = (self.language.embed_tokens.weight, hidden[:, part], targets[:, part], weights[:, part])
            if torch.is_grad_enabled():  # or the logits of the whole text would be kept for the backward pass
                total = total + checkpoint.checkpoint(
                    _log_likelihood, *arguments, use_reentrant=False, preserve_rng_state=False
                )
            else:
                total = total + _log_likelihood(*arguments)
        return -total / weights.sum(dim=1).clamp(min=1)

    def predictions(self, tokens: Tokens, count: int) -> Float[Tensor, "b l d"]:
        """Last hidden states that predict the last `count` tokens of the sequence."""
        hidden, _ = self.transformer(
            tokens.embedded[:, :-1],
            # Not cumsum(mask) - 1: a masked camera advances the positions in training, as in the published model.
            positions=tokens.places[:-1].expand(len(tokens.mask), -1),
            mask=make_attention_mask(tokens.mask, tokens.ar_mask)[:, :-1, :-1],
            num_read=count,
        )
        return hidden[:, -count:]

    # --- sampling ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_actions(
        self,
        observation: Observation,
        *,
        max_decoding_steps: int | None = None,
        temperature: float = 0.0,
        grammar: ActionGrammar | None = None,
        exact_slots: bool = False,
        generator: torch.Generator | None = None,
        agree: Callable[[bool], bool] = bool,
    ) -> Int[Tensor, "b m"]:
        """Token ids, one after another, until every sample ends in the same step; 0 where nothing was written.

        Args:
            observation: the prompt holds no actions.
            max_decoding_steps: None = the config's.
            temperature: 0 takes the most likely token.
            grammar: what may be written; None = anything.
            exact_slots: attend to exactly the real prefix tokens. The published model counts them from the end, which
                is the same unless a camera in the middle is masked.
            generator: of the draws with a temperature.
            agree: whether all processes that share the parameters have ended; they must write equally often.
        """
        max_decoding_steps = max_decoding_steps or self.config.max_decoding_steps
        prefix = self.embed(self.preprocess(observation))
        num_prefix, device = prefix.mask.shape[1], prefix.mask.device
        num_valid = prefix.mask.sum(dim=1)
        prefix_mask, logits, cache = self._prefill(prefix, max_decoding_steps)
        slots = torch.arange(num_prefix + max_decoding_steps, device=device)
        readable = slots >= (num_prefix - num_valid)[:, None]
        if exact_slots:
            room = torch.ones(len(num_valid), max_decoding_steps, dtype=torch.bool, device=device)
            readable = torch.cat([prefix_mask, room], dim=1)

        output = torch.zeros(len(num_valid), max_decoding_steps, dtype=torch.int64, device=device)
        state = None if grammar is None else grammar.start(len(num_valid), device)
        for s in range(max_decoding_steps):
            if grammar is not None:
                logits = grammar.constrain(state, logits)
            token = _choose(logits, temperature, generator)
            output[:, s] = token
            if s + 1 == max_decoding_steps or agree(bool((token == EOS).all())):
                break
            hidden, cache = self.transformer(
                self.language.embed_tokens(token[:, None], self.dtype),
                positions=(num_valid + s + 1)[:, None],  # the published models skip one position here
                mask=(readable & (slots < num_prefix + s + 1))[:, None],
                kv_cache=cache,
                slots=slots[num_prefix + s, None],
            )
            logits = self.logits(hidden[:, 0])
            if grammar is not None:
                state = grammar.advance(state, token)
        return output

    def _prefill(self, prefix: Tokens, room: int) -> tuple[Bool[Tensor, "b p"], Float[Tensor, "b v"], KVCache]:
        """Runs the right-aligned prefix: its mask, the logits of the first token, and a cache with `room` left."""
        embedded, mask, attention = right_align(prefix)
        positions = torch.cumsum(mask, dim=1) - 1
        hidden, cache = self.transformer(embedded, positions=positions, mask=attention, num_read=1)

        def padded(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, room))

        return mask, self.logits(hidden[:, -1]), [(padded(k), padded(v)) for k, v in cache]

    # --- shared -----------------------------------------------------------------------------------------------

    def embed(self, observation: Observation) -> Tokens:
        """Image tokens of the observation's cameras by name, then the text; blocks as `token_ar_mask` says."""
        prompt = observation.tokenized_prompt
        assert prompt is not None and observation.tokenized_prompt_mask is not None
        order = sorted(observation.image_masks)
        shown = [(i, key) for i, key in enumerate(order) if observation.image_masks[key] is not None]
        images = torch.cat([observation.images[key] for _, key in shown])
        tokens = self.vision(images, dtype=self.dtype, remat=self.config.remat).chunk(len(shown))
        camera_masks: Any = observation.image_masks
        masks = [camera_masks[key][:, None].expand(tokens[0].shape[:2]) for _, key in shown]
        patches = torch.arange(self.num_patches, device=prompt.device)
        text = torch.arange(prompt.shape[1], device=prompt.device)
        ar_mask = observation.token_ar_mask
        of_text = torch.zeros_like(prompt) if ar_mask is None else ar_mask.to(prompt.dtype)
        return Tokens(
            torch.cat([*tokens, self.language.embed_tokens(prompt, self.dtype)], dim=1),
            torch.cat([*masks, observation.tokenized_prompt_mask], dim=1),
            torch.cat([*(torch.zeros_like(mask, dtype=prompt.dtype) for mask in masks), of_text], dim=1),
            torch.cat([*(i * self.num_patches + patches for i, _ in shown), len(order) * self.num_patches + text]),
        )

    def transformer(
        self,
        embedded: Float[Tensor, "b n d"],
        *,
        positions: Int[Tensor, "b n"],
        mask: Bool[Tensor, "b n s"],
        kv_cache: KVCache | None = None,
        slots: Int[Tensor, " n"] | None = None,
        num_read: int | None = None,
    ) -> tuple[Float[Tensor, "b n d"], KVCache]:
        """The one expert over its tokens; outputs are read of the last `num_read`; None = of all."""
        unread = 0 if num_read is None or not self.config.skip_unused else embedded.shape[1] - num_read
        (hidden,), cache = self.language(
            [embedded],
            self.language.places(positions, mask, self.dtype),
            kv_cache=kv_cache,
            slots=slots,
            unread=(unread,),
            dtype=self.dtype,
            remat=self.config.remat,
        )
        assert hidden is not None
        return hidden, cache

    def logits(self, hidden: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
        """The token table is the output layer, too; plain type promotion."""
        return _logits(self.language.embed_tokens.weight, hidden)


def _logits(table: Tensor, hidden: Tensor) -> Tensor:
    dtype = torch.promote_types(table.dtype, hidden.dtype)
    return hidden.to(dtype) @ table.to(dtype).T


def _log_likelihood(
    table: Float[Tensor, "v d"],
    hidden: Float[Tensor, "b l d"],
    targets: Int[Tensor, "b l"],
    weights: Bool[Tensor, "b l"],
) -> Float[Tensor, " b"]:
    """Sum over the trained tokens of a part of the text."""
    logits = _logits(table, hidden)
    picked = logits.gather(-1, targets[..., None])[..., 0]
    return torch.where(weights, picked - torch.logsumexp(logits, dim=-1), 0).sum(dim=1)


def right_align(tokens: Tokens) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"], Bool[Tensor, "b n n"]]:
    """Rolls every sample so that its last real token comes last: embeddings, mask, attention mask."""
    attention = make_attention_mask(tokens.mask, tokens.ar_mask)
    n = tokens.mask.shape[1]
    places = torch.arange(n, device=tokens.mask.device)
    last = torch.where(tokens.mask, places, -1).max(dim=1).values
    source = (places + last[:, None] + 1) % n  # [b n], where each token comes from
    rows = torch.arange(len(source), device=source.device)[:, None]
    rolled = attention[rows[..., None], source[:, :, None], source[:, None, :]]
    return tokens.embedded[rows, source], tokens.mask[rows, source], rolled


def _choose(logits: Float[Tensor, "b v"], temperature: float, generator: torch.Generator | None) -> Int[Tensor, " b"]:
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]
