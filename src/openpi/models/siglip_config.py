"""Dimensions of the SigLIP image encoders. Source: the model specification, section 1.4. No JAX here."""

import dataclasses

from openpi.shared import ranges
from openpi.shared.ranges import Count


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Dims of one image encoder.

    Attributes:
        width, depth, mlp_dim, num_heads: of the pre-norm transformer blocks.
        patch_size: side of a square patch, in pixels; an image gives (height/patch) * (width/patch) tokens.
    """

    width: Count
    depth: Count
    mlp_dim: Count
    num_heads: Count
    patch_size: Count = 14

    def __post_init__(self) -> None:
        ranges.check(self)
        if self.width % self.num_heads:
            raise ValueError(f"image encoder width={self.width} is not a multiple of num_heads={self.num_heads}")


#          name:   (width, depth, mlp_dim, heads)
_DIMS = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}


def get_config(variant: "str | SiglipConfig") -> SiglipConfig:
    """Dims of `NAME/PATCH` (for example `So400m/14`); explicit dims pass through.

    Raises:
        ValueError: unknown name, or no patch size (the known names are listed).
    """
    if isinstance(variant, SiglipConfig):
        return variant
    name, _, patch = variant.partition("/")
    if name not in _DIMS or not patch.isdigit() or int(patch) == 0:
        raise ValueError(
            f"unknown image encoder '{variant}'; expected NAME/PATCH such as 'So400m/14' with NAME one of "
            f"{', '.join(_DIMS)}, or a SiglipConfig with explicit dims"
        )
    width, depth, mlp_dim, num_heads = _DIMS[name]
    return SiglipConfig(width, depth, mlp_dim, num_heads, patch_size=int(patch))
