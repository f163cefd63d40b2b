"""From a message's bytes to its values: data only, arrays as views of the message.

A camera image may also be JPEG, `{b"__jpeg__": true, b"data": bin}`: an extension that a client uses only with a server
that names it in its handshake (`FEATURES_HEADER`).
"""

import io
from typing import Any

import msgpack
import numpy as np

from openpi_client import msgpack_numpy

FEATURES_HEADER = "Openpi-Features"
_JPEG = b"__jpeg__"
# A few kB of JPEG can claim any size.
_LARGEST_JPEG_PIXELS = 4096 * 4096


def decode(message: bytes | memoryview) -> Any:
    """The content of a message.

    Raises:
        ValueError, TypeError, KeyError, OverflowError: it is no MessagePack, or holds something else than data.
    """
    return msgpack.unpackb(message, object_hook=_value)


def _value(item: dict) -> Any:
    return _decoded_jpeg(item[b"data"]) if _JPEG in item else msgpack_numpy.unpack_array(item)


def _decoded_jpeg(data: bytes) -> np.ndarray:
    """uint8[h, w, 3], RGB."""
    from PIL import Image

    if not isinstance(data, bytes):
        raise TypeError(f"a JPEG image is a {type(data).__name__}; expected bytes")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            if image.width * image.height > _LARGEST_JPEG_PIXELS:
                raise ValueError(f"a JPEG image is {image.width} x {image.height}; expected 16 million pixels at most")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"a JPEG image cannot be decoded: {error}") from error
