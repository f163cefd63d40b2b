"""Image helpers of the data path and of the models: the client's on the host, so that robot and server prepare images
alike, and the same on a device. Source: the training specification, section 2.2.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from openpi_client import image_tools as on_host
from openpi_client.image_tools import convert_to_uint8

if TYPE_CHECKING:
    import jax

__all__ = ["convert_to_uint8", "resize_with_pad"]


def resize_with_pad(images: Any, height: int, width: int, method: Any = None) -> Any:
    """Resizes images with their aspect kept, on a centered black canvas; bilinear, with antialiasing when shrinking.

    NumPy arrays are resized on the host and JAX arrays, traced or not, on their device; both agree to one gray level.

    Args:
        images: [*b h w c]; uint8, or f32 in [-1, 1], where black is -1.
        method: a filter of Pillow for NumPy arrays, of `jax.image` for JAX arrays; None = bilinear.
    Returns:
        [*b height width c] of the same kind and dtype; the same array where the size fits already.
    Raises:
        ValueError: another dtype, or no channels-last images.
    """
    if np.ndim(images) >= 3 and np.shape(images)[-3:-1] == (height, width):
        return images
    array = images if _is_of_jax(images) else np.asarray(images)
    if array.dtype not in (np.uint8, np.float32):
        raise ValueError(f"images have dtype {array.dtype}; expected uint8, or float32 in [-1, 1]")
    if _is_of_jax(array):
        return _on_device(array, height, width, "linear" if method is None else method)
    method = Image.Resampling.BILINEAR if method is None else method
    if array.dtype == np.uint8:
        return on_host.resize_with_pad(array, height, width, method)
    # The client's floats are in [0, 1], where black is 0.
    resized = on_host.resize_with_pad((np.clip(array, -1, 1) + 1) / 2, height, width, method)
    return resized * 2 - 1


def channels_last(image: np.ndarray) -> np.ndarray:
    """[h, w, 3], a view, of an RGB image in either layout, which its shape tells; others as they are."""
    is_first = image.ndim == 3 and image.shape[0] == 3 != image.shape[-1]
    return np.moveaxis(image, 0, -1) if is_first else image


def _is_of_jax(images: object) -> bool:
    """Whoever holds an array of JAX has imported it."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(images, jax.Array)


def _on_device(images: Any, height: int, width: int, method: str) -> jax.Array:
    import jax
    import jax.numpy as jnp

    *lead, h, w, c = images.shape
    ratio = max(w / width, h / height)
    new_h, new_w = max(1, int(h / ratio)), max(1, int(w / ratio))  # as on the host
    resized = jax.image.resize(images.astype(jnp.float32), (*lead, new_h, new_w, c), method=method)
    if images.dtype == jnp.uint8:
        resized, fill = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8), 0
    else:
        resized, fill = jnp.clip(resized, -1, 1), -1
    top, left = (height - new_h) // 2, (width - new_w) // 2
    padding = [(0, 0)] * len(lead) + [(top, height - new_h - top), (left, width - new_w - left), (0, 0)]
    return jnp.pad(resized, padding, constant_values=fill)
