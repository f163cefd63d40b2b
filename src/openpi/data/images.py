"""Encoded images, as datasets hold them."""

import io

import numpy as np
from PIL import Image


def decode_image(content: bytes | str, where: str) -> np.ndarray:
    """PNG, JPEG, ... -> uint8 RGB [h, w, 3]. `where` names the image in errors."""
    assert isinstance(content, bytes)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except OSError as error:  # PIL's UnidentifiedImageError is one
        raise ValueError(f"{where}: not a readable image ({error})") from error
