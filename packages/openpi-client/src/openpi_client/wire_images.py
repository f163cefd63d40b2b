"""Camera images as JPEG in a message, for servers that take them."""

import io
from typing import Mapping

import numpy as np
from PIL import Image
from typing_extensions import TypeGuard

JPEG = b"__jpeg__"

# Smaller arrays with three columns are no camera images.
_SMALLEST_SIDE = 16


def with_jpeg(content: object, quality: int) -> object:
    """The content with each uint8 RGB image, [h, w, 3], compressed; [3, h, w] stays as it is."""
    if isinstance(content, Mapping):
        return {key: with_jpeg(value, quality) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [with_jpeg(value, quality) for value in content]
    return _jpeg(content, quality) if _is_image(content) else content


def _is_image(value: object) -> TypeGuard[np.ndarray]:
    return (
        isinstance(value, np.ndarray)
        and value.dtype == np.uint8
        and value.ndim == 3
        and value.shape[2] == 3
        and min(value.shape[:2]) >= _SMALLEST_SIDE
    )


def _jpeg(image: np.ndarray, quality: int) -> object:
    buffer = io.BytesIO()
    # 4:4:4, since the halved colours of the default lose the edges of small coloured objects.
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return {JPEG: True, b"data": buffer.getvalue()}
