"""Encoded images, as datasets hold them."""

import io
import struct

import numpy as np
from PIL import Image, ImageOps

from openpi.shared.budgets import IMAGE_FORMATS, MAX_IMAGE_PIXELS, Budget
from openpi.shared.file_kinds import content_instead

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_DEPTH_AT = 24  # in the header chunk, which comes first
_ORIENTATION = 0x0112  # of EXIF
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
"""Of 8 bits a value; PIL's others are integers and floats, which it would clip to 255."""


def decode_image(content: bytes | str, where: str) -> np.ndarray:
    """PNG, JPEG, ... of at most 8 bits a value -> uint8 RGB [h, w, 3], turned as its EXIF data say. `where` names the
    image in errors.

    Raises:
        ValueError: it is no image, or one of more than 8 bits, such as a depth map.
    """
    assert isinstance(content, bytes)
    try:
        with Image.open(io.BytesIO(content), formats=IMAGE_FORMATS) as image:
            Budget(MAX_IMAGE_PIXELS, "pixels").spend(image.width * image.height, where)
            _check_depth(image, content, where)
            # As LeRobot's reader has it, and every viewer.
            upright = ImageOps.exif_transpose(image) if _ORIENTATION in image.getexif() else image
            return np.array(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except (OSError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: not a readable image ({content_instead(content, 'any') or error})") from error


def _check_depth(image: Image.Image, content: bytes, where: str) -> None:
    is_deep_png = content.startswith(_PNG) and content[_PNG_DEPTH_AT] > 8
    if is_deep_png or image.mode not in _MODES:
        kind = f"{content[_PNG_DEPTH_AT]} bits a value" if is_deep_png else f"values of the kind '{image.mode}'"
        raise ValueError(
            f"{where}: a picture with {kind}, such as a depth map; expected 8-bit RGB. Encode the camera so, or take "
            "it out of the recipe"
        )
