"""Looks at a message before it is decoded: how much there is in it, and where its arrays lie.

Decoding MessagePack is one call that no other thread can interrupt, and makes objects many times as large as the bytes
that they come from. Scanning makes none but views of arrays, may be interrupted anywhere, and ends at the first limit.
What it takes out of a message is not copied when the rest is decoded.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from openpi.policies.guards import ObservationError
from openpi.serving.long_work import LongWork
from openpi_client import msgpack_numpy

# Takes the place of what was taken out when the rest is decoded; no client may use this extension type.
PLACEHOLDER_CODE = 0x6F

Part = tuple[int, int, Any]
"""Where in the message a value begins and ends, and what it is: an array, or a view of large bytes."""

Reserve = Callable[[int], None]
"""Asks for so many bytes of memory; raises ServerBusyError when there are none."""

_LARGE_BYTES = 2**12
# An array without bytes may claim any shape, and who goes through its rows would not come to an end.
_LARGEST_EMPTY_SHAPE = 2**16
# One value of an array: of numbers 16 at most; of NumPy's text, as much as a text may be.
_LARGEST_ITEM_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class MessageLimits:
    """What one message may hold: far more than what robots send. An observation of three cameras is some 20 values.

    Attributes:
        max_observations: of a list.
        max_values: keys, numbers, texts, arrays, maps and lists; the inside of an array is none.
        max_depth: of maps and lists within each other.
        max_text_bytes: of one text or key.
        max_small_bytes: of all that is no array, nor bytes of 4 KiB or more.
        max_pixels: of all JPEG images together.
    """

    max_observations: int = 64
    max_values: int = 2**16
    max_depth: int = 32
    max_text_bytes: int = 2**14
    max_small_bytes: int = 2**22
    max_pixels: int = 2**25


def reserve_freely(num_bytes: int) -> None:
    """For messages of nobody that has a limit."""


class IncompleteError(ValueError):
    """The message ends before all that it announces has come."""

    def __init__(self) -> None:
        super().__init__("the message is incomplete: it ends before all that it announces has come")


_PLAIN, _TEXT, _BYTES, _EXTENSION, _LIST, _MAP = range(6)


def _table() -> tuple[tuple[int, int], ...]:
    """For each first byte: the kind of value, and how many bytes a plain one takes, or the length of any other."""
    table = [(_PLAIN, 1)] * 256
    table[0x80:0x90] = [(_MAP, 0)] * 16
    table[0x90:0xA0] = [(_LIST, 0)] * 16
    table[0xA0:0xC0] = [(_TEXT, 0)] * 32
    table[0xC4:0xCA] = [(kind, width) for kind in (_BYTES, _EXTENSION) for width in (1, 2, 4)]
    table[0xCA:0xD4] = [(_PLAIN, 1 + width) for width in (4, 8, 1, 2, 4, 8, 1, 2, 4, 8)]
    table[0xD4:0xD9] = [(_PLAIN, 2 + width) for width in (1, 2, 4, 8, 16)]
    table[0xD9:0xE0] = [(_TEXT, 1), (_TEXT, 2), (_TEXT, 4), (_LIST, 2), (_LIST, 4), (_MAP, 2), (_MAP, 4)]
    return tuple(table)


_TABLE = _table()
_PLACEHOLDER = bytes([0xD6, PLACEHOLDER_CODE])  # an extension of four bytes
# In the first byte itself, where no bytes of length follow.
_LENGTH_BITS = {_MAP: 0x0F, _LIST: 0x0F, _TEXT: 0x1F}


def scan(message: memoryview, limits: MessageLimits, long: LongWork, reserve: Reserve = reserve_freely) -> list[Part]:
    """Arrays, and bytes of 4 KiB or more, in the order in which they lie in the message.

    Args:
        long: begun when the message has more values than a robot sends.
        reserve: asked before anything large is copied.
    Raises:
        ObservationError: a limit is passed; it is named, and the fix.
        ValueError: an array without bytes that claims a shape, or a message that ends too early.
    """
    size, at, values = len(message), 0, 0
    parts: list[Part] = []
    left, outer = 1, []  # values to come in the innermost map or list, and in those around it
    most = _LIGHT_VALUES
    while left or outer:
        if not left:
            left = outer.pop()
            continue
        left -= 1
        values += 1
        if values > most:
            most = _check_values(values, limits)
            long.begin()
        if at >= size:
            raise IncompleteError
        begin, tag = at, message[at]
        kind, width = _TABLE[tag]
        if kind == _PLAIN:
            at += width
            continue
        if tag == _ARRAY_TAG and (found := _array_at(message, at, reserve)) is not None:
            at, value = found
            parts.append((begin, at, value))
            continue
        start = at + 1 + width
        length = int.from_bytes(message[at + 1 : start], "big") if width else tag & _LENGTH_BITS[kind]
        if kind >= _LIST:
            count = length if kind == _LIST else 2 * length
            _check_container(count, values, size - start, depth=len(outer), is_list=kind == _LIST, limits=limits)
            outer.append(left)
            left, at = count, start
            continue
        at = start + length + (kind == _EXTENSION)
        if at > size:
            raise IncompleteError
        if kind == _TEXT and length > _LIGHT_TEXT_BYTES:
            _check_text(length, limits)
            long.begin()
        if kind == _BYTES and length >= _LARGE_BYTES:
            parts.append((begin, at, message[start:at]))
    if at > size:
        raise IncompleteError
    _check_rest(size - sum(end - begin for begin, end, _ in parts), limits)
    return parts


# How our clients write an array, but for unusual ones: everything before its bytes, and everything behind them.
_SIDE = rb"(?:[\x00-\x7f]|\xcc.|\xcd..|\xce....)"
_SHAPE = b"|".join(bytes([0x90 + count]) + _SIDE * count for count in range(5))
_HEAD = rb"\x84\xc4\x0b__ndarray__\xc3\xc4\x04data"
_TAIL = rb"\xc4\x05dtype\xa3(...)\xc4\x05shape(" + _SHAPE + rb")"
_ARRAY_HEAD = re.compile(_HEAD + rb"(\xc4.|\xc5..|\xc6....)", re.DOTALL)
_ARRAY_TAIL = re.compile(_TAIL, re.DOTALL)
_ARRAY_TAG = 0x84


def _array_at(message: memoryview, at: int, reserve: Reserve) -> tuple[int, np.ndarray] | None:
    """Where the array that begins here ends, and a view of it; None for any other map, or an array that is none."""
    head = _ARRAY_HEAD.match(message, at)
    if head is None:
        return None
    start = head.end()
    end = start + int.from_bytes(head[1][1:], "big")
    tail = _ARRAY_TAIL.match(message, end)
    if tail is None:
        return None
    try:
        dtype, shape, num_bytes = _layout(tail[1], tail[2])
    except (TypeError, ValueError):
        return None  # Who decodes the map says what is wrong with it.
    if num_bytes != end - start:
        return None
    array = np.ndarray(shape, dtype, message, start)
    return tail.end(), array if array.flags.aligned and num_bytes else checked_array(array, reserve)


@functools.lru_cache(maxsize=256)
def _layout(dtype: bytes, shape: bytes) -> tuple[np.dtype, tuple[int, ...], int]:
    """What the packed texts of dtype and shape stand for, and how many bytes such an array takes."""
    checked = dtype_of(str(dtype, "ascii", "replace"))
    if checked.itemsize > _LARGEST_ITEM_BYTES:
        raise ValueError("its values are too long")
    sides = tuple(msgpack.unpackb(shape))
    return checked, sides, math.prod(sides) * checked.itemsize


def dtype_of(text: str) -> np.dtype:
    """Raises TypeError or ValueError for what is no dtype that may travel."""
    return msgpack_numpy.unpack_array({b"__ndarray__": True, b"data": b"", b"dtype": text, b"shape": [0]}).dtype


def checked_array(array: np.ndarray, reserve: Reserve) -> np.ndarray:
    """The array, in memory that its dtype can be read from.

    Raises:
        ValueError: it claims a shape without having any bytes.
        ObservationError: its texts are longer than a text may be: NumPy's have no limit of their own.
    """
    if array.dtype.itemsize > _LARGEST_ITEM_BYTES:
        found = f"an array of texts of {array.dtype.itemsize} bytes"
        raise _passed(found, f"{_LARGEST_ITEM_BYTES} at most", "shorten them")
    if array.nbytes == 0 and math.prod(side for side in array.shape if side) > _LARGEST_EMPTY_SHAPE:
        raise ValueError(f"an array without bytes has shape {list(array.shape)}")
    if not array.flags.aligned:
        reserve(array.nbytes)
        array = array.copy()
        array.flags.writeable = False
    return array


# So much is no work worth mentioning. What is made of a text, such as tokens, takes longer than the text.
_LIGHT_VALUES = 4096
_LIGHT_TEXT_BYTES = 2**11


def _check_text(num_bytes: int, limits: MessageLimits) -> None:
    if num_bytes > limits.max_text_bytes:
        raise _passed(f"a text of {num_bytes} bytes", f"{limits.max_text_bytes} at most", "shorten it")


def _check_values(values: int, limits: MessageLimits) -> int:
    if values > limits.max_values:
        raise _passed(
            f"more than {limits.max_values} values",
            f"{limits.max_values} at most",
            "send numbers as NumPy arrays, not as lists, and fewer observations at once",
        )
    return limits.max_values


def _check_container(
    count: int, values: int, num_bytes: int, *, depth: int, is_list: bool, limits: MessageLimits
) -> None:
    if depth == 0 and is_list and count > limits.max_observations:
        found, expected = f"a list of {count} observations", f"{limits.max_observations} at most"
        raise _passed(found, expected, "send them in several messages")
    if depth >= limits.max_depth:
        raise _passed("maps and lists within each other", f"{limits.max_depth} levels at most", "flatten it")
    if count > num_bytes:
        raise IncompleteError
    if values + count > limits.max_values:
        _check_values(values + count, limits)


def _check_rest(num_bytes: int, limits: MessageLimits) -> None:
    if num_bytes > limits.max_small_bytes:
        raise _passed(
            f"{num_bytes} bytes of small values", f"{limits.max_small_bytes} at most", "send fewer observations at once"
        )


def _passed(found: str, expected: str, fix: str) -> ObservationError:
    return ObservationError(f"a message has {found}; expected {expected}: {fix}")


def without_parts(message: memoryview, parts: list[Part]) -> bytes | memoryview:
    """The message with a placeholder, which carries its number, for each part."""
    if not parts:
        return message
    rest: list[bytes | memoryview] = []
    at = 0
    for number, (begin, end, _) in enumerate(parts):
        rest += [message[at:begin], _PLACEHOLDER, number.to_bytes(4, "big")]
        at = end
    return b"".join([*rest, message[at:]])
