"""Single values of a binary Parquet column, without reading its row group.

PyArrow reads at least a row group at a time: tens of MB for one image. Parquet itself is finer: a column
chunk is a row of pages of about 1 MB, each behind a small header. We read the headers once and then only the
page of a row.

    chunk:  [dictionary page]  [data page] [data page] ...      page:  header | levels | values
    levels  say which rows are null                             values length, bytes, length, bytes, ...
                                                                       or indices into the dictionary page

Source: the Apache Parquet format specification (file layout, Thrift compact protocol, RLE/bit-packed hybrid).
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from openpi.data.lerobot.metadata import open_parquet

_HEADER_BYTES = 4096  # more than a page header takes, unless it carries long statistics
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8


class UnsupportedLayoutError(ValueError):
    """The column is stored in a way that is not read here, though PyArrow may read it."""


@dataclass(frozen=True)
class _Page:
    first_row: int
    num_rows: int
    begin: int  # of the page's bytes behind its header
    header: dict[int, Any]


@dataclass(frozen=True)
class _Chunk:
    """One column in one row group."""

    pages: list[_Page]
    dictionary: _Page | None
    codec: str


class BinaryColumn:
    """Random access to one binary column of one file, such as `image.bytes`.

    Raises:
        UnsupportedLayoutError: the column is repeated, or its encoding is not one that writers use for
        images.
    """

    def __init__(self, path: Path, column: str):
        with open_parquet(path) as file:
            metadata, schema = file.metadata, file.schema
            paths = [schema.column(i).path for i in range(len(schema))]
            if column not in paths:
                raise UnsupportedLayoutError(f"{path} has no column {column}")
            number = paths.index(column)
            description = schema.column(number)
            groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        if description.max_repetition_level or description.physical_type != "BYTE_ARRAY":
            raise UnsupportedLayoutError(f"{path}, {column}: not a plain binary column")
        self._max_level = description.max_definition_level
        self._first_rows = np.cumsum([0, *(group.num_rows for group in groups)])
        self._groups = [group.column(number) for group in groups]
        self._path = path
        self._chunks: dict[int, _Chunk] = {}
        self._last_page: tuple[tuple[int, int], list[bytes | None]] | None = None

    def value(self, row: int) -> bytes | None:
        """The value in `row` of the file, None if null."""
        group = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        chunk = self._chunk(group)
        row -= int(self._first_rows[group])
        number = next(i for i, page in enumerate(chunk.pages) if row < page.first_row + page.num_rows)
        if self._last_page is None or self._last_page[0] != (group, number):
            self._last_page = (group, number), self._read_page(chunk.pages[number], chunk)
        return self._last_page[1][row - chunk.pages[number].first_row]

    def _read_page(self, page: _Page, chunk: _Chunk) -> list[bytes | None]:
        levels, content, encoding = self._page_content(page, chunk.codec)
        is_null = np.zeros(page.num_rows, bool)
        if levels is not None:
            is_null = _read_hybrid(levels, _bit_width(self._max_level), page.num_rows) != self._max_level
        count = page.num_rows - int(is_null.sum())
        if encoding == _PLAIN:
            values = _read_plain(content, count)
        elif encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY) and chunk.dictionary is not None:
            dictionary = self._dictionary(chunk.dictionary, chunk.codec)
            values = [dictionary[i] for i in _read_hybrid(content[1:], content[0], count)]
        else:
            raise UnsupportedLayoutError(f"Parquet encoding {encoding}")
        defined = iter(values)
        return [None if null else next(defined) for null in is_null]

    def _page_content(self, page: _Page, codec: str) -> tuple[memoryview | None, memoryview, int]:
        """Definition levels (None if no row can be null), values, encoding."""
        stored = self._read(page.begin, page.header[3])
        if page.header[1] == _DATA_PAGE_V2:
            header = page.header[8]
            split = header.get(5, 0) + header.get(6, 0)
            values = stored[split:]
            if header.get(7, True):
                values = _decompress(values, codec, page.header[2] - split)
            return (stored[header.get(6, 0) : split] if self._max_level else None), values, header[4]
        content = _decompress(stored, codec, page.header[2])
        if not self._max_level:
            return None, content, page.header[5][2]
        (length,) = struct.unpack_from("<I", content)
        return content[4 : 4 + length], content[4 + length :], page.header[5][2]

    def _dictionary(self, page: _Page, codec: str) -> list[bytes]:
        stored = self._read(page.begin, page.header[3])
        return _read_plain(_decompress(stored, codec, page.header[2]), page.header[7][1])

    def _read_header(self, position: int) -> tuple[dict[int, Any], int]:
        """The page header at `position` of the file, and where its page begins."""
        size = _HEADER_BYTES
        while True:
            content = self._read(position, size)
            try:
                header, length = _read_struct(content, 0)
                return header, position + length
            except (IndexError, struct.error):
                if len(content) < size:
                    raise UnsupportedLayoutError(f"no page header at {position}") from None
                size *= 16

    def _read(self, begin: int, size: int) -> memoryview:
        # The file is opened for each read: it costs 10 us, and datasets have more files than a process may
        # open.
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(begin)
            return memoryview(stream.read(size))

    def _chunk(self, group: int) -> _Chunk:
        if group not in self._chunks:
            self._chunks[group] = self._read_headers(group)
        return self._chunks[group]

    def _read_headers(self, group: int) -> _Chunk:
        """Walks from page header to page header; the pages themselves are not touched."""
        column = self._groups[group]
        position = column.data_page_offset
        if column.dictionary_page_offset:
            position = min(position, column.dictionary_page_offset)
        end = position + column.total_compressed_size
        pages: list[_Page] = []
        dictionary, first_row = None, 0
        while position < end and first_row < column.num_values:
            header, begin = self._read_header(position)
            if header[1] == _DICTIONARY_PAGE:
                dictionary = _Page(0, 0, begin, header)
            elif header[1] in (_DATA_PAGE, _DATA_PAGE_V2):
                num_rows = header[5 if header[1] == _DATA_PAGE else 8][1]
                pages.append(_Page(first_row, num_rows, begin, header))
                first_row += num_rows
            position = begin + header[3]
        if first_row != column.num_values:
            raise UnsupportedLayoutError(f"pages hold {first_row} of {column.num_values} values")
        return _Chunk(pages, dictionary, column.compression)


def _decompress(stored: memoryview, codec: str, size: int) -> memoryview:
    if codec == "UNCOMPRESSED":
        return stored
    if not pa.Codec.is_available(codec.lower()):
        raise UnsupportedLayoutError(f"compression {codec}")
    return memoryview(pa.Codec(codec.lower()).decompress(pa.py_buffer(stored), size)).cast("B")


def _read_plain(content: memoryview, count: int) -> list[bytes]:
    values, position = [], 0
    for _ in range(count):
        (length,) = struct.unpack_from("<I", content, position)
        position += 4 + length
        values.append(bytes(content[position - length : position]))
    return values


def _bit_width(maximum: int) -> int:
    return maximum.bit_length()


def _read_hybrid(content: memoryview, width: int, count: int) -> np.ndarray:
    """`count` integers of `width` bits: runs of one value, or groups of eight packed without gaps."""
    parts, found, position = [], 0, 0
    num_bytes = (width + 7) // 8
    while found < count and width:
        head, position = _read_varint(content, position)
        if head & 1:
            size = (head >> 1) * width
            bits = np.unpackbits(np.frombuffer(content[position : position + size], np.uint8), bitorder="little")
            parts.append(bits.reshape(-1, width) @ (1 << np.arange(width)))
            position += size
        else:
            value = int.from_bytes(content[position : position + num_bytes], "little")
            parts.append(np.full(head >> 1, value))
            position += num_bytes
        found += len(parts[-1])
    return np.concatenate(parts)[:count] if width else np.zeros(count, np.int64)


# --- Thrift compact protocol
# --------------------------------------------------------------------------------------


def _read_struct(content: Any, position: int) -> tuple[dict[int, Any], int]:
    """Fields by number, and the position behind the struct."""
    fields, number = {}, 0
    while True:
        head = content[position]
        position += 1
        if head == 0:
            return fields, position
        if head >> 4:
            number += head >> 4
        else:
            number, position = _read_zigzag(content, position)
        fields[number], position = _read_value(content, position, head & 15)


def _read_value(content: Any, position: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # booleans are their own type
        return kind == 1, position
    if kind == 3:
        return content[position], position + 1
    if kind in (4, 5, 6):
        return _read_zigzag(content, position)
    if kind == 7:
        return struct.unpack_from("<d", content, position)[0], position + 8
    if kind == 8:
        length, position = _read_varint(content, position)
        return bytes(content[position : position + length]), position + length
    if kind == 12:
        return _read_struct(content, position)
    raise UnsupportedLayoutError(f"Thrift type {kind} in a page header")


def _read_zigzag(content: Any, position: int) -> tuple[int, int]:
    value, position = _read_varint(content, position)
    return (value >> 1) ^ -(value & 1), position


def _read_varint(content: Any, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
