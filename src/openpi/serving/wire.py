"""From a message's bytes to its values: data only, arrays as views of the message.

An extension, which a client uses only with a server that offers it in its handshake: a camera image may be JPEG,
`{b"__jpeg__": true, b"data": bin}`. Those of Positronic's are `{b"__jpeg__": true, b"frames": [bin, ...]}`, with
b"ndim" or b"shape" of the array.
"""

import collections
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np

from openpi.policies.guards import ObservationError
from openpi.serving import foreign
from openpi.serving.long_work import LongWork
from openpi.serving.scan import (
    PLACEHOLDER_CODE,
    MessageLimits,
    Part,
    Reserve,
    checked_array,
    reserve_freely,
    scan,
    without_parts,
)

if TYPE_CHECKING:
    from PIL import Image


_JPEG = b"__jpeg__"
# A few kB of JPEG can claim any size.
_LARGEST_JPEG_PIXELS = 4096 * 4096
_LIGHT_JPEG_PIXELS = 2**21
_BYTES_PER_PIXEL = 3
_STRIP_ROWS = 256
# Progressive images have about ten; each costs a pass over all pixels.
_USUAL_SCANS = 10
_START_OF_SCAN = b"\xff\xda"
_LIGHT_MESSAGE_BYTES = 2**23
# What a message begins with that is a list of two or more: of worlds that are stepped together, which can wait.
_LISTS = frozenset(bytes([tag]) for tag in (*range(0x92, 0xA0), 0xDC, 0xDD))
# Bytes that are no array are copied; arrays are not.
_LARGEST_PLAIN_BYTES = 2**24
_LONGEST_KEY = 80

_LIMITS = MessageLimits()

Decode = Callable[..., Any]
"""`decode`, with limits."""


def decode(
    message: bytes | memoryview,
    *,
    limits: MessageLimits = _LIMITS,
    reserve: Reserve = reserve_freely,
    long: LongWork | None = None,
) -> object:
    """The content of a message.

    Args:
        reserve: asked before an image is decoded, or anything large is copied.
        long: begun when the message is much work; the caller ends it.
    Raises:
        ValueError, TypeError, KeyError, OverflowError: it is no MessagePack, or holds something else than data, or more
            than the limits allow.
    """
    if long is None:
        with LongWork() as long:
            return decode(message, limits=limits, reserve=reserve, long=long)
    view = memoryview(message).toreadonly()
    if len(view) > _LIGHT_MESSAGE_BYTES or bytes(view[:1]) in _LISTS:
        long.begin()
    parts = scan(view, limits, long, reserve)
    values = _Values(parts, limits.max_pixels, reserve, long)
    return msgpack.unpackb(
        without_parts(view, parts),
        object_pairs_hook=values.of_pairs,
        list_hook=values.of_list if values.has_views else None,
        ext_hook=values.of_extension,
        timestamp=1,  # as a number of seconds
        strict_map_key=False,  # `of_pairs` says which key it is
    )


class _Values:
    """What stands for the maps, lists and extensions of one message."""

    def __init__(self, parts: list[Part], max_pixels: int, reserve: Reserve, long: LongWork) -> None:
        self._parts = {number: value for number, (_, _, value) in enumerate(parts)}
        self.has_views = any(type(value) is memoryview for _, _, value in parts)
        self._max_pixels = self._pixels_left = max_pixels
        self._reserve = reserve
        self._long = long

    def of_pairs(self, pairs: list[tuple[object, object]]) -> object:
        """Of two values for one key, a policy would see whichever came last, and a recording or a proxy another."""
        for key, _ in pairs:
            if not isinstance(key, (str, bytes)):
                raise ObservationError(
                    f"a map of a message has the key {_shown(key)}, a {type(key).__name__}; names are text"
                )
        item = dict(pairs)
        if len(item) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            key = _shown(max(counts, key=counts.__getitem__))
            raise ObservationError(f"a map of a message has the key {key} twice; send each once")
        return self.of_map(item)

    def of_map(self, item: dict) -> object:
        item = foreign.with_byte_marker(item)
        if _JPEG in item:
            try:
                return self._jpeg(item[b"data"]) if b"data" in item else self._jpegs(item)
            except (ValueError, TypeError) as error:  # a camera may send a broken picture now and then
                raise ObservationError(str(error)) from error
        value = foreign.read_map(item)
        if isinstance(value, np.ndarray):
            return checked_array(value, self._reserve)
        if self.has_views and isinstance(value, dict):
            return {key: self._plain(part) if type(part) is memoryview else part for key, part in value.items()}
        return value

    def of_list(self, items: list) -> list:
        return [self._plain(item) if type(item) is memoryview else item for item in items]

    def _plain(self, data: memoryview) -> bytes:
        """Bytes that are no array, as the policy knows them."""
        if len(data) > _LARGEST_PLAIN_BYTES:
            raise ObservationError(
                f"a message has {len(data)} bytes that are no array; expected {_LARGEST_PLAIN_BYTES} at most: "
                "send an array"
            )
        self._reserve(len(data))
        return bytes(data)

    def of_extension(self, code: int, data: bytes) -> object:
        """What was taken out, for its placeholder: once, or a few bytes of a client's could stand for megabytes, as
        often as it likes. Other extensions mean nothing here, and no recording could hold them.
        """
        number = int.from_bytes(data, "big")
        if code != PLACEHOLDER_CODE or number not in self._parts:
            raise ObservationError(
                f"a message has an extension of type {code}; send maps, lists, numbers, text and arrays"
            )
        return self._parts.pop(number)

    def _jpeg(self, data: object) -> np.ndarray:
        """uint8[h, w, 3], RGB."""
        from PIL import Image, UnidentifiedImageError

        if not isinstance(data, (bytes, memoryview)):
            raise TypeError(f"a JPEG image is a {type(data).__name__}; expected bytes")
        data = bytes(data)
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                self._pay(image.width, image.height, data.count(_START_OF_SCAN))
                return _pixels(image if image.mode == "RGB" else image.convert("RGB"))
        except UnidentifiedImageError:
            raise ValueError(f"a JPEG image cannot be decoded: its {len(data)} bytes are none") from None
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"a JPEG image cannot be decoded: {error}") from error

    def _jpegs(self, item: dict) -> np.ndarray:
        """uint8[..., h, w, 3] of several images, as Positronic's clients send them."""
        frames, ndim = item.get(b"frames"), item.get(b"ndim")
        if not isinstance(frames, list) or not frames:
            raise TypeError("a JPEG array has no b'frames'; expected a list of JPEG images")
        shape = item.get(b"shape", {3: [0, 0, 0], 4: [len(frames), 0, 0, 0]}.get(ndim or 0))
        if not isinstance(shape, list) or any(type(side) is not int or side < 1 for side in shape[:-3]):
            raise ValueError("a JPEG array has neither b'ndim', which is 3 or 4, nor b'shape', a list of numbers")
        if math.prod(shape[:-3]) != len(frames):
            raise ValueError(f"a JPEG array has {len(frames)} images; expected {math.prod(shape[:-3])}, by its shape")
        images = [self._jpeg(frame) for frame in frames]
        if len({image.shape for image in images}) > 1:
            raise ValueError("the images of a JPEG array have different sizes")
        if len(shape) <= images[0].ndim:
            return images[0]
        self._reserve(sum(image.nbytes for image in images))
        return np.stack(images).reshape(*shape[:-3], *images[0].shape)

    def _pay(self, width: int, height: int, num_scans: int) -> None:
        """For an image that is about to be decoded."""
        pixels = width * height
        if pixels > _LARGEST_JPEG_PIXELS:
            raise ValueError(f"a JPEG image is {width} x {height}; expected 16 million pixels at most")
        self._pixels_left -= pixels * math.ceil(num_scans / _USUAL_SCANS)
        if self._pixels_left < 0:
            raise ObservationError(
                f"the JPEG images of a message have more than {self._max_pixels} pixels together; send smaller images, "
                "or fewer observations at once"
            )
        if self._max_pixels - self._pixels_left > _LIGHT_JPEG_PIXELS:
            self._long.begin()
        self._reserve(pixels * _BYTES_PER_PIXEL)


def _shown(key: object) -> str:
    text = repr(key)
    return text if len(text) <= _LONGEST_KEY else f"{text[:_LONGEST_KEY]}..."


def _pixels(image: "Image.Image") -> np.ndarray:
    """uint8[h, w, 3] of an RGB image, strip by strip: in one go it is copied twice, and nobody can interrupt it."""
    pixels = np.empty((image.height, image.width, _BYTES_PER_PIXEL), np.uint8)
    for top in range(0, image.height, _STRIP_ROWS):
        bottom = min(top + _STRIP_ROWS, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    pixels.flags.writeable = False
    return pixels
