"""What pi0-FAST may write, on tensors: the PyTorch twin of `openpi.models.action_grammar`, which explains it.

Legend: b batch, v vocabulary, a action ids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class GrammarState(NamedTuple):
    """Per sample: fixed tokens and coefficients written so far, and bytes that the last character still lacks."""

    num_opening: Int[Tensor, " b"]
    num_closing: Int[Tensor, " b"]
    num_characters: Int[Tensor, " b"]
    num_missing_bytes: Int[Tensor, " b"]


class ActionGrammar:
    """The tables of an `openpi.models.action_grammar.ActionGrammar` on a device.

    Args:
        tables: any object with its fields.
    """

    def __init__(self, tables: Any, device: torch.device | str) -> None:
        def tensor(array: object) -> Tensor:
            return torch.as_tensor(array, dtype=torch.int64, device=device)

        self._opening, self._closing = tensor(tables.opening), tensor(tables.closing)
        self._num_characters = tensor(tables.ids.num_characters)
        self._missing_bytes_after = tensor(tables.ids.missing_bytes_after)
        self._last_action_token = tables.last_action_token
        self._num_values = tables.num_values

    def start(self, batch_size: int, device: torch.device | str) -> GrammarState:
        """Before the first token."""
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return GrammarState(zeros, zeros, zeros, zeros)

    def constrain(self, state: GrammarState | None, logits: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """Minus infinity for every token that may not come next; a dead end constrains nothing."""
        assert state is not None
        tokens = torch.arange(logits.shape[1], device=logits.device)
        opening = tokens == self._next(self._opening, state.num_opening)[:, None]
        closing = tokens == self._next(self._closing, state.num_closing)[:, None]
        is_opening, is_action = self._phase(state)
        first = self._last_action_token - len(self._num_characters) + 1
        action = torch.zeros_like(opening)
        action[:, first : self._last_action_token + 1] = self._allowed_ids(state).flip(1)
        allowed = torch.where(is_opening[:, None], opening, torch.where(is_action[:, None], action, closing))
        allowed = allowed | ~allowed.any(dim=1, keepdim=True)
        return torch.where(allowed, logits, -torch.inf)

    def advance(self, state: GrammarState | None, token: Int[Tensor, " b"]) -> GrammarState:
        """After `token` was written."""
        assert state is not None
        is_opening, is_action = self._phase(state)
        action_id = (self._last_action_token - token).clamp(0, len(self._num_characters) - 1)
        written = torch.where(is_action, self._num_characters[action_id], 0)
        missing = self._missing_bytes_after[state.num_missing_bytes, action_id].clamp(min=0)
        return GrammarState(
            num_opening=state.num_opening + is_opening,
            num_closing=state.num_closing + ~(is_opening | is_action),
            num_characters=state.num_characters + written,
            num_missing_bytes=torch.where(is_action, missing, state.num_missing_bytes),
        )

    def _phase(self, state: GrammarState) -> tuple[Bool[Tensor, " b"], Bool[Tensor, " b"]]:
        is_opening = state.num_opening < len(self._opening)
        is_complete = (state.num_characters >= self._num_values) & (state.num_missing_bytes == 0)
        return is_opening, ~is_opening & ~is_complete

    def _allowed_ids(self, state: GrammarState) -> Bool[Tensor, "b a"]:
        fits = state.num_characters[:, None] + self._num_characters <= self._num_values
        return fits & (self._missing_bytes_after[state.num_missing_bytes] >= 0)

    @staticmethod
    def _next(tokens: Tensor, index: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        return tokens[index.clamp(max=len(tokens) - 1)]
