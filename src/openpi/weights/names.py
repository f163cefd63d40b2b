"""The one table between the published parameter tree (JAX), our PyTorch modules, and the released PyTorch layout.

A row says which tensor of the PyTorch model is which part of which array of the tree, and how its axes are arranged:
the tree stacks layers, keys and values, and gate and up; PyTorch keeps a tensor for each. LeRobot's layout is the
released one behind the prefix `model.`; what else files call the tensors is in `spelling`. No framework here; axes are
arranged by einops, which takes any array. Source: the checkpoint specification, sections 2, 4.1 and 5.

Legend of the axes: d width, n query heads, k key/value heads, h head width, f MLP width, r rank, t tokens, p q pixels,
c channels, i in, o out.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import einops
import numpy as np

from openpi.shared.tree import Params, unflatten
from openpi.weights import spelling

if TYPE_CHECKING:
    from openpi.models.model_config import PaliGemmaConfig


Array = TypeVar("Array")  # of any library that einops knows

_TOWER = "paligemma_with_expert.paligemma.model.vision_tower.vision_model"
_PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"
_EXPERTS = ("paligemma_with_expert.paligemma.model.language_model", "paligemma_with_expert.gemma_expert.model")


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor.

    Attributes:
        torch: its name in our PyTorch modules.
        released: its name in the released layout; adapters, which that layout does not have, follow its manner.
        tree: '/'-joined path of the array that it is part of.
        index: which part: (layer, 0 or 1), as far as the array is stacked.
        axes: einops pattern from that part to the tensor.
        shape: of the tensor; sizes: of the part's axes, by letter.
    """

    torch: str
    released: str
    tree: str
    index: tuple[int, ...]
    axes: str
    sizes: Mapping[str, int] = dataclasses.field(hash=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._extent(self.axes.split("->")[1])

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is the part as it is, so that rows of one are rows of the other."""
        left, right = self.axes.split("->")
        return left.split() == right.split()

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of the part of the tree's array."""
        return self._extent(self.axes.split("->")[0])

    def to_torch(self, part: Array) -> Array:
        """The tensor of a part of the tree's array."""
        return einops.rearrange(part, self.axes, **self._given(self.axes))

    def to_tree(self, tensor: Array) -> Array:
        """Inverse of `to_torch`."""
        left, right = (side.strip() for side in self.axes.split("->"))
        return einops.rearrange(tensor, f"{right} -> {left}", **self._given(self.axes))

    def _given(self, pattern: str) -> dict[str, int]:
        return {axis: self.sizes[axis] for axis in re.findall(r"[a-z]", pattern)}

    def _extent(self, side: str) -> tuple[int, ...]:
        groups = re.findall(r"\(([^)]*)\)|(\S+)", side)
        return tuple(math.prod(self._size(axis) for axis in (group or single).split()) for group, single in groups)

    def _size(self, axis: str) -> int:
        return 1 if axis == "1" else self.sizes[axis]


def dims_in(config: object) -> PaliGemmaConfig:
    """A model's configuration, or what `dims_of` found instead of one, by the fields that tables are made of."""
    return cast("PaliGemmaConfig", config)


def rows(config: object) -> tuple[Row, ...]:
    """Every tensor of a model.

    Args:
        config: `Pi0Config` or `Pi0FASTConfig`.
    """
    dims = dims_in(config)
    found = [*_vision(dims), *_table(dims)]
    for expert in range(len(dims.experts)):
        found += _expert(dims, expert)
    return (*found, *_dense(dims))


def rows_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Row, ...]:
    """As `rows`, from path -> shape of a whole tree; arrays that no model has are a tensor each, as they are."""
    try:
        known = rows(dims_of(shapes))
    except ValueError:
        known = ()
    of_models = shapes_of(known)
    others = [path for path, shape in shapes.items() if of_models.get(path) != shape]
    return (*(row for row in known if row.tree in shapes and row.tree not in others), *_as_they_are(shapes, others))


def _as_they_are(shapes: Mapping[str, tuple[int, ...]], paths: Sequence[str]) -> Iterator[Row]:
    for path in paths:
        sizes = dict(zip(string.ascii_lowercase, shapes[path], strict=False))
        yield Row(path, path, path, (), f"{' '.join(sizes)} -> {' '.join(sizes)}", sizes)


def tree_shapes(config: object) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array of the published tree, without any framework."""
    return shapes_of(rows(config))


def shapes_of(table: Sequence[Row]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every array of the tree that has all its parts in the table."""
    shapes: dict[str, tuple[int, ...]] = {}
    for row in table:
        before = shapes.get(row.tree, row.index + row.part_shape)
        lead = tuple(max(size, place + 1) for size, place in zip(before, row.index, strict=False))
        shapes[row.tree] = lead + row.part_shape
    return shapes


def by_array(table: Sequence[Row]) -> dict[str, list[Row]]:
    """Path -> tensors of every array of the tree."""
    arrays: dict[str, list[Row]] = {}
    for row in table:
        arrays.setdefault(row.tree, []).append(row)
    return arrays


def dims_of(shapes: Mapping[str, tuple[int, ...]]) -> object:
    """What `rows` needs of a configuration, from path -> shape of a whole published tree.

    Raises:
        ValueError: the tree is none of these models.
    """
    try:
        return _dims_of(shapes)
    except KeyError as error:
        raise ValueError(f"this is the tree of none of the models: it has no {error.args[0]}") from error


def to_tree(table: Sequence[Row], tensor: Callable[[Row], object]) -> Params:
    """The published tree, from the tensors that `tensor` gives for each row; NumPy."""
    return unflatten({path: _assembled(members, tensor) for path, members in by_array(table).items()})


def _assembled(members: Sequence[Row], tensor: Callable[[Row], object]) -> np.ndarray:
    """One array of the tree from all rows that are parts of it."""
    lead = tuple(1 + max(row.index[axis] for row in members) for axis in range(len(members[0].index)))
    parts = {row.index: row.to_tree(np.asarray(tensor(row))) for row in members}
    first = next(iter(parts.values()))
    whole = np.empty(lead + first.shape, first.dtype)
    for index, part in parts.items():
        whole[index] = part
    return whole


def _dims_of(shapes: Mapping[str, tuple[int, ...]]) -> object:
    patch, _, _, width = shapes["PaliGemma/img/embedding/kernel"]
    blocks = "PaliGemma/img/Transformer/encoderblock"
    depth, _, num_heads, _ = shapes[f"{blocks}/MultiHeadDotProductAttention_0/query/kernel"]
    mlp_dim = shapes[f"{blocks}/MlpBlock_0/Dense_0/bias"][-1]
    is_flow = "action_in_proj/kernel" in shapes
    return types.SimpleNamespace(
        image_encoder=types.SimpleNamespace(
            width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads, patch_size=patch
        ),
        # Only the number of patches shows.
        image_resolution=(shapes["PaliGemma/img/pos_embedding"][1] * patch, patch),
        experts=tuple(_expert_dims(shapes, suffix) for suffix in (("", "_1") if is_flow else ("",))),
        pi05="time_mlp_in/kernel" in shapes,
        action_dim=shapes["action_in_proj/kernel"][0] if is_flow else None,
    )


def _expert_dims(shapes: Mapping[str, tuple[int, ...]], suffix: str) -> object:
    layers = "PaliGemma/llm/layers"
    depth, num_heads, width, head_dim = shapes[f"{layers}/attn/q_einsum{suffix}/w"]

    def lora(factor: str) -> object:
        shape = shapes.get(f"{layers}/{factor}")
        return None if shape is None else types.SimpleNamespace(rank=shape[-1])

    return types.SimpleNamespace(
        width=width,
        depth=depth,
        mlp_dim=shapes[f"{layers}/mlp{suffix}/linear"][1],
        num_heads=num_heads,
        num_kv_heads=shapes[f"{layers}/attn/kv_einsum{suffix}/w"][2],
        head_dim=head_dim,
        vocab_size=shapes["PaliGemma/llm/embedder/input_embedding"][0],
        attn_lora=lora(f"attn/q_einsum{suffix}/lora_a"),
        ffn_lora=lora(f"mlp{suffix}/linear_lora_a"),
    )


# --- the table ------------------------------------------------------------------------------------------------


def _vision(config: PaliGemmaConfig) -> Iterator[Row]:
    encoder, width = config.image_encoder, config.experts[0].width
    height, breadth = (side // encoder.patch_size for side in config.image_resolution)
    sizes = {
        "d": encoder.width,
        "n": encoder.num_heads,
        "h": encoder.width // encoder.num_heads,
        "f": encoder.mlp_dim,
        "p": encoder.patch_size,
        "q": encoder.patch_size,
        "c": 3,
        "t": height * breadth,
        "o": width,
    }
    img = "PaliGemma/img"

    def row(torch: str, released: str, tree: str, axes: str, index: tuple[int, ...] = ()) -> Row:
        return Row(f"vision.{torch}", released, f"{img}/{tree}", index, axes, sizes)

    embeddings = f"{_TOWER}.embeddings"
    yield row(
        "patch_embedding.weight", f"{embeddings}.patch_embedding.weight", "embedding/kernel", "p q c d -> d c p q"
    )
    yield row("patch_embedding.bias", f"{embeddings}.patch_embedding.bias", "embedding/bias", "d -> d")
    yield row("position_embedding", f"{embeddings}.position_embedding.weight", "pos_embedding", "1 t d -> t d")
    attention = "MultiHeadDotProductAttention_0"
    of_layer = (
        *_norm_pair("layer_norm1", "LayerNorm_0"),
        *_norm_pair("layer_norm2", "LayerNorm_1"),
        *(
            (f"self_attn.{short}_proj.{kind}", f"{attention}/{name}/{leaf}", axes)
            for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
            for kind, leaf, axes in (("weight", "kernel", "d n h -> (n h) d"), ("bias", "bias", "n h -> (n h)"))
        ),
        ("self_attn.out_proj.weight", f"{attention}/out/kernel", "n h d -> d (n h)"),
        ("self_attn.out_proj.bias", f"{attention}/out/bias", "d -> d"),
        ("mlp.fc1.weight", "MlpBlock_0/Dense_0/kernel", "d f -> f d"),
        ("mlp.fc1.bias", "MlpBlock_0/Dense_0/bias", "f -> f"),
        ("mlp.fc2.weight", "MlpBlock_0/Dense_1/kernel", "f d -> d f"),
        ("mlp.fc2.bias", "MlpBlock_0/Dense_1/bias", "d -> d"),
    )
    for layer in range(encoder.depth):
        for torch, tree, axes in of_layer:
            name = f"layers.{layer}.{torch}"
            yield row(name, f"{_TOWER}.encoder.{name}", f"Transformer/encoderblock/{tree}", axes, (layer,))
    for torch, tree, axes in _norm_pair("post_layernorm", "encoder_norm"):
        yield row(torch, f"{_TOWER}.{torch}", f"Transformer/{tree}", axes)
    yield row("head.weight", f"{_PROJECTOR}.weight", "head/kernel", "d o -> o d")
    yield row("head.bias", f"{_PROJECTOR}.bias", "head/bias", "o -> o")


def _norm_pair(torch: str, tree: str) -> tuple[tuple[str, str, str], ...]:
    return (f"{torch}.weight", f"{tree}/scale", "d -> d"), (f"{torch}.bias", f"{tree}/bias", "d -> d")


def _table(config: PaliGemmaConfig) -> Iterator[Row]:
    sizes = {"t": config.experts[0].vocab_size, "d": config.experts[0].width}
    tree = "PaliGemma/llm/embedder/input_embedding"
    yield Row("language.embed_tokens.weight", spelling.TABLE, tree, (), "t d -> t d", sizes)


def _expert(config: PaliGemmaConfig, expert: int) -> Iterator[Row]:
    dims = config.experts[expert]
    is_adaptive = expert > 0 and getattr(config, "pi05", False)
    suffix = f"_{expert}" if expert else ""
    sizes = {
        "d": dims.width,
        "n": dims.num_heads,
        "k": dims.num_kv_heads,
        "h": dims.head_dim,
        "f": dims.mlp_dim,
        "o": 3 * dims.width,
    }
    # (name in both PyTorch layouts, path below `llm/layers`, which of two, axes)
    of_layer = [
        ("self_attn.q_proj.weight", f"attn/q_einsum{suffix}/w", (), "n d h -> (n h) d"),
        ("self_attn.k_proj.weight", f"attn/kv_einsum{suffix}/w", (0,), "k d h -> (k h) d"),
        ("self_attn.v_proj.weight", f"attn/kv_einsum{suffix}/w", (1,), "k d h -> (k h) d"),
        ("self_attn.o_proj.weight", f"attn/attn_vec_einsum{suffix}/w", (), "n h d -> d (n h)"),
        ("mlp.gate_proj.weight", f"mlp{suffix}/gating_einsum", (0,), "d f -> f d"),
        ("mlp.up_proj.weight", f"mlp{suffix}/gating_einsum", (1,), "d f -> f d"),
        ("mlp.down_proj.weight", f"mlp{suffix}/linear", (), "f d -> d f"),
        *_rms_norm("input_layernorm", f"pre_attention_norm{suffix}", is_adaptive),
        *_rms_norm("post_attention_layernorm", f"pre_ffw_norm{suffix}", is_adaptive),
    ]
    if dims.attn_lora is not None:
        of_layer += _attention_adapters(suffix)
    if dims.ffn_lora is not None:
        of_layer += _mlp_adapters(suffix)
    ranks = {"attn": dims.attn_lora, "mlp": dims.ffn_lora}
    for layer in range(dims.depth):
        for name, tree, which, axes in of_layer:
            lora = ranks.get(re.split(r"[/_]", tree)[0]) if ".lora." in name else None
            yield Row(
                torch=f"language.blocks.{layer}.experts.{expert}.{name}",
                released=f"{_EXPERTS[expert]}.layers.{layer}.{name}",
                tree=f"PaliGemma/llm/layers/{tree}",
                index=(layer, *which),
                axes=axes,
                sizes=sizes if lora is None else {**sizes, "r": lora.rank},
            )
    for name, tree, _, axes in _rms_norm("norm", f"final_norm{suffix}", is_adaptive):
        torch = f"language.norms.{expert}{name.removeprefix('norm')}"
        yield Row(torch, f"{_EXPERTS[expert]}.{name}", f"PaliGemma/llm/{tree}", (), axes, sizes)


_OfLayer = tuple[str, str, tuple[int, ...], str]


def _rms_norm(torch: str, tree: str, is_adaptive: bool) -> tuple[_OfLayer, ...]:
    if not is_adaptive:
        return ((f"{torch}.weight", f"{tree}/scale", (), "d -> d"),)
    return (
        (f"{torch}.dense.weight", f"{tree}/Dense_0/kernel", (), "d o -> o d"),
        (f"{torch}.dense.bias", f"{tree}/Dense_0/bias", (), "o -> o"),
    )


def _attention_adapters(suffix: str) -> list[_OfLayer]:
    """Factors keep the tree's shape, see `openpi.models_pytorch.lora`."""
    weights = (("q", "q_einsum", (), "n", "d", "h"), ("k", "kv_einsum", (0,), "k", "d", "h"))
    weights += (("v", "kv_einsum", (1,), "k", "d", "h"), ("o", "attn_vec_einsum", (), "n", "h", "d"))
    return [
        (f"self_attn.{short}_proj.lora.{factor}", f"attn/{name}{suffix}/lora_{factor}", which, f"{axes} -> {axes}")
        for short, name, which, heads, i, o in weights
        for factor, axes in (("a", f"{heads} {i} r"), ("b", f"{heads} r {o}"))
    ]


def _mlp_adapters(suffix: str) -> list[_OfLayer]:
    weights = (("gate", "gating_einsum", (0,), "d", "f"), ("up", "gating_einsum", (1,), "d", "f"))
    weights += (("down", "linear", (), "f", "d"),)
    return [
        (f"mlp.{short}_proj.lora.{factor}", f"mlp{suffix}/{name}_lora_{factor}", which, f"{axes} -> {axes}")
        for short, name, which, i, o in weights
        for factor, axes in (("a", f"{i} r"), ("b", f"r {o}"))
    ]


def _dense(config: PaliGemmaConfig) -> Iterator[Row]:
    if len(config.experts) == 1:
        return
    d, ad = config.experts[1].width, config.action_dim
    dims = {"action_in_proj": (ad, d), "action_out_proj": (d, ad)}
    if getattr(config, "pi05", False):
        dims |= {"time_mlp_in": (d, d), "time_mlp_out": (d, d)}
    else:
        dims |= {"state_proj": (ad, d), "action_time_mlp_in": (2 * d, d), "action_time_mlp_out": (d, d)}
    for name, (i, o) in dims.items():
        sizes = {"i": i, "o": o}
        yield Row(f"{name}.weight", f"{name}.weight", f"{name}/kernel", (), "i o -> o i", sizes)
        yield Row(f"{name}.bias", f"{name}.bias", f"{name}/bias", (), "o -> o", sizes)
