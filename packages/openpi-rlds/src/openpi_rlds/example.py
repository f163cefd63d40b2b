"""`tf.train.Example` messages, read in place: only what is asked for, without copying.

    Example {1: Features}   Features {1: repeated entry {1: key, 2: Feature}}
    Feature {1: BytesList | 2: FloatList | 3: Int64List}, each {1: repeated value}

An episode of DROID is one such message of some 20 MB, nearly all of it images, so a parser that builds objects of
everything would do a hundred times the work. Source: Protocol Buffers' description of its wire format.
"""

from collections.abc import Callable, Collection, Iterator
from typing import TypeAlias

import numpy as np

from openpi.shared.errors import missing_key
from openpi_rlds.tfrecord import Span, TFRecordFile

ReadAt: TypeAlias = Callable[[int, int], bytes | memoryview]
"""(offset, size) -> bytes there, fewer at the end."""

Values: TypeAlias = "list[memoryview] | np.ndarray"
"""Of a feature: byte strings, float32[n] or int64[n]. One without any is an empty list."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT = 10
_PEEK = 512  # holds the head of a feature: its sizes and its name


class MalformedError(ValueError):
    """Bytes that are no such message."""


def parse_example(data: bytes, names: Collection[str]) -> dict[str, Values]:
    """Those of the named features that the message has. Byte strings are views into `data`.

    Raises:
        MalformedError: not such a message.
    """
    view = memoryview(data)
    found = feature_spans(lambda offset, size: view[offset : offset + size], 0, len(view))
    return {name: parse_feature(view[begin:end]) for name, begin, end in found if name in names}


def read_features(file: TFRecordFile, span: Span, names: Collection[str]) -> dict[str, Values]:
    """As `parse_example`, reading little more of the file than these features, and so without the checksum.

    Raises:
        ValueError: not such a message; file and record are named.
    """
    try:
        found = feature_spans(_Peeking(file.read_at, span), span.offset, span.offset + span.length)
        spans = [(name, begin, end) for name, begin, end in found if name in names]
        return {name: parse_feature(memoryview(file.read_at(begin, end - begin))) for name, begin, end in spans}
    except MalformedError as error:
        raise not_an_example(f"{file.path}, record {span.number}", error) from error


def not_an_example(where: str, error: Exception) -> ValueError:
    return ValueError(f"{where}: not a readable tf.train.Example ({error})")


def required(features: dict[str, Values], name: str, where: str) -> Values:
    """A feature by name.

    Raises:
        KeyError: it is not there.
    """
    if name not in features:
        raise missing_key(name, features, wanted_by=where, fix="Is it a dataset in the form of DROID?")
    return features[name]


def feature_spans(read: ReadAt, begin: int, end: int) -> Iterator[tuple[str, int, int]]:
    """(name, begin, end) of every feature of the message that lies at [begin, end)."""
    for field, features_begin, features_end in _fields(read, begin, end):
        if field != 1:
            continue
        for entry_field, entry_begin, entry_end in _fields(read, features_begin, features_end):
            if entry_field != 1:
                continue
            parts = {part: (a, b) for part, a, b in _fields(read, entry_begin, entry_end)}
            key_begin, key_end = parts.get(1, (0, 0))
            value_begin, value_end = parts.get(2, (0, 0))
            try:
                name = bytes(read(key_begin, key_end - key_begin)).decode()
            except UnicodeDecodeError as error:
                raise MalformedError("the name of a feature is not text") from error
            yield name, value_begin, value_end


def parse_feature(view: memoryview) -> Values:
    """The values of one `Feature` message."""
    values: Values = []
    for kind, begin, end in _fields(lambda offset, size: view[offset : offset + size], 0, len(view)):
        body = view[begin:end]
        if kind == 1:
            values = _byte_strings(body)
        elif kind == 2:
            values = _floats(body)
        elif kind == 3:
            values = _ints(body)
    return values


def _byte_strings(view: memoryview) -> list[memoryview]:
    """The inner loop of reading: some thousand strings per episode."""
    strings, position, size = [], 0, len(view)
    while position < size:
        if view[position] != (1 << 3 | _LENGTH):
            raise MalformedError(f"field {view[position] >> 3} in a list of byte strings")
        length, begin = _varint(view, position + 1)
        position = begin + length
        if position > size:
            raise MalformedError("a byte string reaches beyond its list")
        strings.append(view[begin:position])
    return strings


def _floats(view: memoryview) -> np.ndarray:
    """Packed, as every writer does, or one by one."""
    parts = []
    for _, begin, end in _fields(lambda offset, size: view[offset : offset + size], 0, len(view)):
        if (end - begin) % 4:
            raise MalformedError("a list of floats that is no multiple of 4 bytes")
        parts.append(np.frombuffer(view[begin:end], "<f4"))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _ints(view: memoryview) -> np.ndarray:
    numbers: list[int] = []
    position, size = 0, len(view)
    while position < size:
        tag, position = _varint(view, position)
        if tag & 7 == _VARINT:
            value, position = _varint(view, position)
            numbers.append(value)
            continue
        length, position = _varint(view, position)
        end = position + length
        if tag & 7 != _LENGTH or end > size:
            raise MalformedError("a list of integers with something else in it")
        while position < end:
            value, position = _varint(view, position)
            numbers.append(value)
    return np.array(numbers, np.uint64).astype(np.int64)  # negative ones are stored as 2^64 + x


def _fields(read: ReadAt, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, begin, end of the value) of the fields of the message at [begin, end)."""
    position = begin
    while position < end:
        head = read(position, min(2 * _MAX_VARINT, end - position))
        tag, used = _varint(head, 0)
        wire = tag & 7
        if wire == _LENGTH:
            length, used = _varint(head, used)
        elif wire == _VARINT:
            after = _varint(head, used)[1]
            length = after - used
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise MalformedError(f"wire type {wire}")
        if tag >> 3 == 0:
            raise MalformedError("field number 0")
        value = position + used
        position = value + length
        if position > end:
            raise MalformedError("a field reaches beyond its message")
        yield tag >> 3, value, position


def _varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    """The number at `position`, and the position after it."""
    value, shift = 0, 0
    try:
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    raise MalformedError("a number of more than 64 bits")
                return value, position
            shift += 7
            if shift >= 7 * _MAX_VARINT:
                raise MalformedError("a number of more than 64 bits")
    except IndexError as error:
        raise MalformedError("it ends within a number") from error


class _Peeking:
    """Reads of a few bytes, of which those that lie together cost one read of the file."""

    def __init__(self, read_at: Callable[[int, int], bytes], span: Span):
        self._read_at = read_at
        self._end = span.offset + span.length
        self._held_at, self._held = 0, b""

    def __call__(self, offset: int, size: int) -> bytes:
        inside = offset - self._held_at
        if not 0 <= inside <= inside + size <= len(self._held):
            self._held_at, inside = offset, 0
            self._held = self._read_at(offset, min(max(size, _PEEK), self._end - offset))
        return self._held[inside : inside + size]
