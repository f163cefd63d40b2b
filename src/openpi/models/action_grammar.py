"""What pi0-FAST may write: `Action: `, ids that make exactly one chunk, `|`, end of sequence.

Published models sample freely, and a sequence of another length cannot be turned into actions. Held to the grammar,
every finished sequence is a chunk. A model that keeps to it by itself writes the same tokens with and without.

Legend: b batch, v vocabulary, a action ids.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from openpi.models.fast_codec import IdTable


class GrammarState(NamedTuple):
    """Per sample: fixed tokens and coefficients written so far, and bytes that the last character still lacks."""

    num_opening: Int[Array, " b"]
    num_closing: Int[Array, " b"]
    num_characters: Int[Array, " b"]
    num_missing_bytes: Int[Array, " b"]


@dataclasses.dataclass(frozen=True, eq=False)
class ActionGrammar:
    """Hashed by identity, so that it can be a static argument of a compiled function.

    Attributes:
        opening: int[.], tokens that come first.
        closing: int[.], tokens that come after the chunk; the last one is repeated.
        last_action_token: token of action id 0; id k is k tokens before it.
        ids: what each action id stands for.
        num_values: coefficients of a chunk.
    """

    opening: np.ndarray
    closing: np.ndarray
    last_action_token: int
    ids: IdTable
    num_values: int

    def start(self, batch_size: int) -> GrammarState:
        """Before the first token."""
        zeros = jnp.zeros(batch_size, jnp.int32)
        return GrammarState(zeros, zeros, zeros, zeros)

    def constrain(self, state: GrammarState | None, logits: Float[Array, "b v"]) -> Float[Array, "b v"]:
        """Minus infinity for every token that may not come next; a dead end constrains nothing."""
        assert state is not None
        tokens = jnp.arange(logits.shape[1])
        opening = tokens == jnp.asarray(self.opening)[self._clipped(state.num_opening, self.opening)][:, None]
        closing = tokens == jnp.asarray(self.closing)[self._clipped(state.num_closing, self.closing)][:, None]
        is_opening, is_action = self._phase(state)
        first = self.last_action_token - len(self.ids.num_characters) + 1
        action = (
            jnp.zeros(logits.shape, bool)
            .at[:, first : self.last_action_token + 1]
            .set(self._allowed_ids(state)[:, ::-1])
        )
        allowed = jnp.where(is_opening[:, None], opening, jnp.where(is_action[:, None], action, closing))
        allowed |= ~jnp.any(allowed, axis=1, keepdims=True)
        return jnp.where(allowed, logits, -jnp.inf)

    def advance(self, state: GrammarState | None, token: Int[Array, " b"]) -> GrammarState:
        """After `token` was written."""
        assert state is not None
        is_opening, is_action = self._phase(state)
        action_id = jnp.clip(self.last_action_token - token, 0, len(self.ids.num_characters) - 1)
        written = jnp.where(is_action, jnp.asarray(self.ids.num_characters)[action_id], 0)
        missing = jnp.asarray(self.ids.missing_bytes_after)[state.num_missing_bytes, action_id]
        return GrammarState(
            num_opening=state.num_opening + is_opening,
            num_closing=state.num_closing + ~(is_opening | is_action),
            num_characters=state.num_characters + written,
            num_missing_bytes=jnp.where(is_action, jnp.maximum(missing, 0), state.num_missing_bytes),
        )

    def _phase(self, state: GrammarState) -> tuple[Bool[Array, " b"], Bool[Array, " b"]]:
        is_opening = state.num_opening < len(self.opening)
        is_complete = (state.num_characters >= self.num_values) & (state.num_missing_bytes == 0)
        return is_opening, ~is_opening & ~is_complete

    def _allowed_ids(self, state: GrammarState) -> Bool[Array, "b a"]:
        fits = state.num_characters[:, None] + jnp.asarray(self.ids.num_characters) <= self.num_values
        return fits & (jnp.asarray(self.ids.missing_bytes_after)[state.num_missing_bytes] >= 0)

    @staticmethod
    def _clipped(index: Int[Array, " b"], table: np.ndarray) -> Int[Array, " b"]:
        return jnp.minimum(index, len(table) - 1)
