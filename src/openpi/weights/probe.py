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

from openpi.shared.tree import unflatten
from openpi.weights import names
from openpi.weights.layout import Block
from openpi.weights.names import Row

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
        experts = [
            dataclasses.replace(
                expert,
                depth=min(expert.depth, 2),
                mlp_dim=min(expert.mlp_dim, _MLP_UNITS),
                vocab_size=min(expert.vocab_size, _TOKENS),
            )
            for expert in config.experts
        ]
        variants = dict(zip(("paligemma_variant", "action_expert_variant"), experts, strict=False))
        encoder = config.image_encoder
        self.config: Any = dataclasses.replace(
            config,
            **variants,
            image_encoder_variant=dataclasses.replace(
                encoder, depth=min(encoder.depth, 2), mlp_dim=min(encoder.mlp_dim, _MLP_UNITS)
            ),
            image_keys=config.image_keys[:1],
            max_token_len=min(config.max_token_len, _PROMPT_LEN),
            dtype="float32",
            augmentation=False,
            remat="none",
        )
        self._shapes = names.tree_shapes(self.config)

    def place(self, row: Row) -> tuple[int, ...] | None:
        """The index of a tensor's part in the small model; None = it is not in it."""
        if not row.index:
            return ()
        last = self._depths[row.tree.split("/")[1]] - 1
        layers = {0: 0, last: min(last, 1)}
        return (layers[row.index[0]], *row.index[1:]) if row.index[0] in layers else None

    def picked(self, block: Block) -> tuple[slice, np.ndarray]:
        """Where of the small model's part a block's values belong along axis 0, and those."""
        axes = block.row.axes.split("->")[0].split()
        wanted = self._shapes[block.row.tree][len(block.row.index) :]
        sizes = block.row.part_shape
        if not block.is_whole:
            rows = _spread(sizes[0], wanted[0])
            mine = np.flatnonzero((rows >= block.start) & (rows < block.start + len(block.values)))
            where = slice(mine[0], mine[-1] + 1) if len(mine) else slice(0, 0)
            return where, block.values[rows[mine] - block.start]
        values = block.row.to_tree(block.values)
        for axis, (letter, size, kept) in enumerate(zip(axes, sizes, wanted, strict=True)):
            if kept != size:
                assert letter in ("f", "t"), block.row
                values = np.take(values, _spread(size, kept), axis=axis)
        return slice(None), values

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


@dataclasses.dataclass
class Witness:
    """Remembers of tensors that pass by: what the probe needs, and a checksum of each.

    Attributes:
        checksums: CRC-32 of the bytes of each tensor, by released name.
        dtypes: by released name.
    """

    probe: Probe
    checksums: dict[str, int] = dataclasses.field(default_factory=dict)
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._flat: dict[str, np.ndarray] = {}

    def watch(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The same blocks."""
        for block in blocks:
            self.see(block)
            yield block

    def see(self, block: Block) -> None:
        name, values = block.row.released, np.ascontiguousarray(block.values)
        self.checksums[name] = zlib.crc32(values.reshape(-1).view(np.uint8).data, self.checksums.get(name, 0))
        self.dtypes[name] = str(values.dtype)
        place = self.probe.place(block.row)
        if place is None:
            return
        where, picked = self.probe.picked(block)
        path = block.row.tree
        if path not in self._flat:
            self._flat[path] = np.zeros(self.probe._shapes[path], np.float32)
        part = self._flat[path][place]
        part[where] = picked

    def tree(self) -> dict[str, Any]:
        """The published tree of the small model, float32."""
        return unflatten(self._flat)


def nested(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Model-side inputs of `Probe.inputs`, without `noise`."""
    return unflatten({key: value for key, value in inputs.items() if key != "noise"})


def _spread(size: int, count: int) -> np.ndarray:
    """Indices all over a range, the first and the last included."""
    return np.linspace(0, size - 1, count).round().astype(np.int64)
