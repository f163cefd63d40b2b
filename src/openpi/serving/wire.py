"""From a message's bytes to its values: data only, arrays as views of the message.

Extensions, which a client uses only with a server that offers them in its handshake: a camera image may be JPEG,
`{b"__jpeg__": true, b"data": bin}`, and bytes may lie in memory that both share (`openpi_client.shared_memory`).
"""

import functools
import io
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from openpi.policies.guards import ObservationError
from openpi.serving import foreign
from openpi_client import shared_memory

_JPEG = b"__jpeg__"
# A few kB of JPEG can claim any size.
_LARGEST_JPEG_PIXELS = 4096 * 4096


ReadShared = Callable[[Any], bytes]
"""[offset, count] -> the bytes there."""


def _nothing_is_shared(place: Any) -> bytes:
    raise ObservationError("a message refers to shared memory, but this session has none; send its arrays whole")


def decode(message: bytes | memoryview, read_shared: ReadShared = _nothing_is_shared) -> Any:
    """The content of a message.

    Args:
        read_shared: raises ObservationError for a place that the message may not name.
    Raises:
        ValueError, TypeError, KeyError, OverflowError: it is no MessagePack, or holds something else than data.
    """
    return msgpack.unpackb(message, object_hook=functools.partial(_value, read_shared))


def _value(read_shared: ReadShared, item: dict) -> Any:
    if _JPEG in item:
        return _decoded_jpeg(item[b"data"])
    if shared_memory.KEY in item:
        return read_shared(item[shared_memory.KEY])
    return foreign.read_map(item)


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
