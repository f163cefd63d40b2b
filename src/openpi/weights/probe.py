"""A small model cut out of a large one, to compare two backends or two copies of its weights cheaply.

The first and the last layer of each transformer, some units of each MLP and some rows of the token table make a model
of the same family that runs in a second on a processor, however large the whole is. Everything else is witnessed by
a checksum of each tensor. NumPy only.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from openpi.shared.evenly_spaced import evenly_spaced
from openpi.shared.tree import Params, unflatten
from openpi.weights import names
from openpi.weights.blocks import Block

_MLP_UNITS = 1024
_TOKENS = 512
_PROMPT_LEN = 16


class Probe:
    """What of a model's tensors makes the small model.

    Attributes:
        config: of the small model; float32.
    """

    def __init__(self, config: Any) -> None:
        self._depths = {"img": config.image_encoder.depth, "llm": config.experts[0].depth}
        experts = [_cut(expert, vocab_size=min(expert.vocab_size, _TOKENS)) for expert in config.experts]
        self.config: Any = dataclasses.replace(
            config,
            **dict(zip(("paligemma_variant", "action_expert_variant"), experts, strict=False)),
            image_encoder_variant=_cut(config.image_encoder),
            image_keys=config.image_keys[:1],
            max_token_len=min(config.max_token_len, _PROMPT_LEN),
            dtype="float32",
            augmentation=False,
            remat="none",
        )
        self.shapes = names.tree_shapes(self.config)

    def part(self, block: Block) -> tuple[tuple[Any, ...], np.ndarray] | None:
        """What of a block is in the small model, with its index there; None = nothing."""
        row, layer = block.row, block.row.index[:1]
        if layer and layer[0] not in (0, self._depths[row.tree.split("/")[1]] - 1):
            return None
        index = (*(min(i, 1) for i in layer), *row.index[1:])
        wanted = self.shapes[row.tree][len(index) :]
        if not block.is_whole:
            rows = np.array(evenly_spaced(range(row.part_shape[0]), wanted[0]))
            mine = np.flatnonzero((rows >= block.start) & (rows < block.start + len(block.values)))
            return (*index, mine), block.values[rows[mine] - block.start]
        values = row.to_tree(block.values)
        for axis, (size, kept) in enumerate(zip(row.part_shape, wanted, strict=True)):
            if kept != size:
                values = np.take(values, evenly_spaced(range(size), kept), axis=axis)
        return (*index, ...), values

    def inputs(self, seed: int = 0) -> dict[str, np.ndarray]:
        """A made-up batch of one: flat, by the paths of model-side inputs, with `noise`, `time` and `actions`."""
        rng, config = np.random.default_rng(seed), self.config
        camera, length = config.image_keys[0], config.max_token_len
        vocab = config.experts[0].vocab_size
        chunk = (1, config.action_horizon, config.action_dim)
        found = {
            f"image/{camera}": rng.integers(0, 256, (1, *config.image_resolution, 3), dtype=np.uint8),
            f"image_mask/{camera}": np.ones(1, np.bool_),
            "state": rng.uniform(-1, 1, (1, config.action_dim)).astype(np.float32),
            "tokenized_prompt": rng.integers(0, vocab, (1, length), dtype=np.int32),
            "tokenized_prompt_mask": np.arange(length)[None] < length - 3,
            "noise": rng.standard_normal(chunk, dtype=np.float32),
        }
        if len(config.experts) == 1:
            is_written = np.arange(length)[None] >= length // 2
            found |= {"token_ar_mask": is_written.astype(np.int32), "token_loss_mask": is_written}
        return found


class Witness:
    """Remembers of tensors that pass by: what the probe needs, if there is one, and a checksum of each.

    Attributes:
        tensors: by released name, `dtype` and `crc32` of the bytes, as a certificate has them.
    """

    def __init__(self, probe: Probe | None = None) -> None:
        self.tensors: dict[str, dict[str, str]] = {}
        self._probe = probe
        self._flat: dict[str, np.ndarray] = {}

    def watch(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The same blocks."""
        for block in blocks:
            self.see(block)
            yield block

    def see(self, block: Block) -> None:
        name, values = block.row.released, np.ascontiguousarray(block.values)
        before = int(self.tensors[name]["crc32"], 16) if name in self.tensors else 0
        crc32 = zlib.crc32(values.reshape(-1).view(np.uint8).data, before)
        self.tensors[name] = {"dtype": str(values.dtype), "crc32": f"{crc32:08x}"}
        part = None if self._probe is None else self._probe.part(block)
        if self._probe is not None and part is not None:
            path, (index, picked) = block.row.tree, part
            if path not in self._flat:
                self._flat[path] = np.zeros(self._probe.shapes[path], np.float32)
            self._flat[path][index] = picked

    def tree(self) -> Params:
        """The published tree of the small model, float32."""
        return unflatten(self._flat)


def nested(inputs: Mapping[str, np.ndarray]) -> Params:
    """Model-side inputs of `Probe.inputs`, without `noise`."""
    return unflatten({key: value for key, value in inputs.items() if key != "noise"})


def _cut(transformer: Any, **fields: int) -> object:
    return dataclasses.replace(
        transformer, depth=min(transformer.depth, 2), mlp_dim=min(transformer.mlp_dim, _MLP_UNITS), **fields
    )
