"""Encoded images, as datasets hold them."""

import io

import numpy as np
from PIL import Image

from openpi.shared.budgets import MAX_IMAGE_PIXELS, Budget


def decode_image(content: bytes | str, where: str) -> np.ndarray:
    """PNG, JPEG, ... -> uint8 RGB [h, w, 3]. `where` names the image in errors."""
    assert isinstance(content, bytes)
    try:
        with Image.open(io.BytesIO(content)) as image:
            Budget(MAX_IMAGE_PIXELS, "pixels").spend(image.width * image.height, where)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:  # PIL's UnidentifiedImageError is an OSError
        raise ValueError(f"{where}: not a readable image ({error})") from error
