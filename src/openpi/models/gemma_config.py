"""Dimensions of the Gemma experts. Source: the model specification, section 1.3. No JAX here."""

import dataclasses
from typing import TYPE_CHECKING, TypeVar

from openpi.shared import ranges
from openpi.shared.ranges import Count, Positive

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ModelConfig = TypeVar("ModelConfig", bound="DataclassInstance")

PALIGEMMA_VOCAB_SIZE = 257_152


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters next to a weight matrix W: `x W + scaling * (x A) B`.

    Attributes:
        rank: inner width of A and B.
        alpha: numerator of the scaling.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
    """

    rank: Count
    alpha: Positive = 1.0
    rslora: bool = False

    def __post_init__(self) -> None:
        ranges.check(self)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank**0.5 if self.rslora else self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Dims of one expert. Experts that attend jointly share depth, heads, kv heads and head dim.

    Attributes:
        width: model width D.
        depth: number of layers L.
        mlp_dim: hidden width F of the GeGLU MLP.
        num_heads, num_kv_heads, head_dim: query heads N, key/value heads K, head width H.
        vocab_size: rows of the token table (only the first expert has one).
        attn_lora, ffn_lora: adapters on the attention and MLP weights; None = none.
    """

    width: Count
    depth: Count
    mlp_dim: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    vocab_size: Count = PALIGEMMA_VOCAB_SIZE
    attn_lora: LoRAConfig | None = None
    ffn_lora: LoRAConfig | None = None

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every key/value head serves the same number of query heads"
            )

    @property
    def has_lora(self) -> bool:
        return self.attn_lora is not None or self.ffn_lora is not None


def _lora(config: GemmaConfig, rank: int) -> GemmaConfig:
    adapters = LoRAConfig(rank=rank, alpha=float(rank))
    return dataclasses.replace(config, attn_lora=adapters, ffn_lora=adapters)


_GEMMA_2B = GemmaConfig(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256)
_GEMMA_300M = GemmaConfig(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)

VARIANTS: dict[str, GemmaConfig] = {
    "dummy": GemmaConfig(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
    "gemma_300m": _GEMMA_300M,
    "gemma_2b": _GEMMA_2B,
    "gemma_2b_lora": _lora(_GEMMA_2B, rank=16),
    "gemma_300m_lora": _lora(_GEMMA_300M, rank=32),
}


def get_config(variant: "str | GemmaConfig") -> GemmaConfig:
    """Dims of a registered variant; explicit dims pass through.

    Raises:
        ValueError: unknown name (the registered ones are listed).
    """
    if isinstance(variant, GemmaConfig):
        return variant
    if variant not in VARIANTS:
        raise ValueError(
            f"unknown Gemma variant '{variant}'; registered: {', '.join(VARIANTS)}. "
            "Use one of these or pass a GemmaConfig with explicit dims"
        )
    return VARIANTS[variant]


def without_adapters(model_config: ModelConfig) -> ModelConfig:
    """The configuration of a model whose adapters are merged into its weights."""
    variants = [field.name for field in dataclasses.fields(model_config) if field.name.endswith("_variant")]
    plain = {}
    for name in variants:
        variant = getattr(model_config, name)
        if isinstance(variant, GemmaConfig):
            plain[name] = dataclasses.replace(variant, attn_lora=None, ffn_lora=None)
        elif name != "image_encoder_variant" and get_config(variant).has_lora:
            plain[name] = variant.removesuffix("_lora")
    return dataclasses.replace(model_config, **plain)
