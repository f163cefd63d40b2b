"""From a message's bytes to its values: data only, arrays as views of the message.

Two forms of a camera image besides the plain array, both extensions that a client uses only with a server that names
them in its handshake (`FEATURES_HEADER`):

    {b"__jpeg__": true, b"data": bin}                         a compressed image
    {b"__shared__": true, b"offset": int, b"dtype": str, b"shape": [int, ...]}   in memory that both processes map
"""

import io
import mmap
from typing import Any

import msgpack
import numpy as np

from openpi_client import msgpack_numpy

FEATURES_HEADER = "Openpi-Features"
_JPEG = b"__jpeg__"
_SHARED = b"__shared__"
# A few kB of JPEG can claim any size.
_LARGEST_JPEG_PIXELS = 4096 * 4096


class WireDecoder:
    """Decodes messages of one connection."""

    def __init__(self, shared: mmap.mmap | None = None) -> None:
        """
        Args:
            shared: memory that the client writes arrays to; they are copied out of it, since the client goes on.
        """
        self._shared = shared

    def decode(self, message: bytes | memoryview) -> Any:
        """The content of a message.

        Raises:
            ValueError, TypeError, KeyError, OverflowError: it is no MessagePack, or holds something else than data.
        """
        return msgpack.unpackb(message, object_hook=self._value)

    def _value(self, item: dict) -> Any:
        if _JPEG in item:
            return _decoded_jpeg(item[b"data"])
        if _SHARED in item:
            return self._shared_array(item[b"offset"], item[b"dtype"], item[b"shape"])
        return msgpack_numpy.unpack_array(item)

    def _shared_array(self, offset: int, dtype: str, shape: list[int]) -> np.ndarray:
        if self._shared is None:
            raise ValueError("an array is said to be in shared memory, but this connection has none")
        kind = np.dtype(dtype)
        if kind.kind not in "biuf":
            raise ValueError(f"an array in shared memory has dtype {dtype}; expected numbers")
        return np.ndarray(tuple(shape), kind, buffer=self._shared, offset=offset).copy()


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
