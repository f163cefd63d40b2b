"""Image augmentation while training, on the device. Source: the model specification, section 2.4.

The `augmax` library does the work, so that the random draws are those the published models were trained with. It is
imported when something is augmented: a robot's computer, or a bare one, serves without it.
"""

from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Array, Float

if TYPE_CHECKING:
    import augmax


CROP_FRACTION = 0.95
MAX_ROTATION_DEG = 5


def augment_images(rng: jax.Array, images: dict[str, Float[Array, "b h w 3"]]) -> dict[str, Float[Array, "b h w 3"]]:
    """Augments each sample of each camera.

    All cameras start from the same key, so the wrist cameras of a sample share their draw, and so do the others.

    Args:
        images: f32 in [-1, 1]. A wrist camera (its name says so) keeps its geometry.
    Returns:
        New images; colour jitter may leave [-1, 1] slightly.
    """
    out = {}
    for key, batch in images.items():
        chain = _chain(*batch.shape[1:3], keep_geometry="wrist" in key)
        keys = jax.random.split(rng, batch.shape[0])
        augmented: Any = jax.vmap(chain)(keys, batch / 2 + 0.5)
        out[key] = augmented * 2 - 1
    return out


def _chain(height: int, width: int, *, keep_geometry: bool) -> "augmax.Chain":
    """An `augmax.Chain`."""
    import augmax

    jitter = augmax.ColorJitter(brightness=0.3, contrast=0.4, saturation=0.5)
    if keep_geometry:
        return augmax.Chain(jitter)
    return augmax.Chain(
        augmax.RandomCrop(int(CROP_FRACTION * width), int(CROP_FRACTION * height)),
        augmax.Resize(width, height),
        augmax.Rotate((-MAX_ROTATION_DEG, MAX_ROTATION_DEG)),
        jitter,
    )
