"""Weights with their adapters added, tensor by tensor. Source: the model specification, sections 9.1 and 9.3."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from openpi.weights import names
from openpi.weights.adapter_base import AdapterBase
from openpi.weights.blocks import Block, Select, Weights
from openpi.weights.names import Row

_FACTOR = re.compile(r"\.lora\.[ab]$")


class MergedWeights:
    """The weights of a model without adapters, made of those of one with; updates are added in float32.

    Args:
        config: with adapters.
    """

    base: AdapterBase | None = None

    def __init__(self, config: object, weights: Weights) -> None:
        self._weights = weights
        self.table: Sequence[Row] = [row for row in weights.table if not _FACTOR.search(row.released)]
        self._scalings = _scalings(config)
        loaded = tuple(name for name in weights.report.loaded if not _FACTOR.search(name))
        self.report = dataclasses.replace(weights.report, loaded=loaded)

    def dtype(self, row: Row) -> np.dtype:
        return np.dtype(np.float32) if row.released in self._scalings else self._weights.dtype(row)

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        def of_wanted(name: str) -> bool:
            return bool(_FACTOR.search(name)) and (only is None or only(_FACTOR.sub(".weight", name)))

        factors: dict[str, np.ndarray] = {}
        for block in self._weights.blocks(only=of_wanted):
            factors[block.row.released] = np.array(block.values, np.float32)
        for block in self._weights.blocks(only=lambda name: not _FACTOR.search(name) and (only is None or only(name))):
            name = block.row.released
            yield self._merged(block, factors) if name in self._scalings else block

    def _merged(self, block: Block, factors: Mapping[str, np.ndarray]) -> Block:
        name = block.row.released.removesuffix(".weight")
        a, b = factors[f"{name}.lora.a"], factors[f"{name}.lora.b"]
        if name.endswith(".o_proj"):  # one update for all heads, see `openpi.models.lora.out_delta`
            b = np.broadcast_to(b.sum(axis=0, keepdims=True), b.shape)
        update = block.row.to_torch(self._scalings[block.row.released] * (a @ b))
        return dataclasses.replace(block, values=block.values.astype(np.float32) + update)


def _scalings(config: Any) -> dict[str, float]:
    """By released name of the weights that have adapters; the MLP's are not scaled."""
    adapted = {}
    for row in names.rows(config):
        if row.released.endswith(".lora.a"):
            expert = config.experts[1 if ".gemma_expert." in row.released else 0]
            in_attention = ".self_attn." in row.released
            adapted[row.released.removesuffix(".lora.a") + ".weight"] = (
                expert.attn_lora.scaling if in_attention else 1.0
            )
    return adapted
