"""Single values of a binary Parquet column, without reading its row group.

PyArrow reads at least a row group at a time: tens of MB for one image. Parquet itself is finer: a column
chunk is a row of pages of about 1 MB, each behind a small header. We read the headers once and then only the
page of a row.

    chunk:  [dictionary page]  [data page] [data page] ...      page:  header | levels | values
    levels  say which rows are null                             values length, bytes, length, bytes, ...
                                                                       or indices into the dictionary page

Common writers check the size of a page only every 1024 rows, so that pages of images grow to tens of MB as well. So we
also remember where each value lies in its page. With Snappy, the usual compression, 64 KB of a page can be
decompressed alone: a value then costs what it holds, not what its page holds.

Source: the Apache Parquet format specification (file layout, Thrift compact protocol, RLE/bit-packed hybrid).
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openpi.data.lerobot.files import open_parquet

_HEADER_BYTES = 4096  # more than a page header takes, unless it carries long statistics
_DATA_PAGE, _DICTIONARY_PAGE, _DATA_PAGE_V2 = 0, 2, 3
_SNAPPY_BLOCK = 1 << 16
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8

Header = dict[int, Any]  # fields by number


class UnsupportedLayoutError(ValueError):
    """The column is stored in a way that is not read here, though PyArrow may read it."""


@dataclass(frozen=True)
class _Page:
    """A page behind its header.

    Attributes:
        num_rows: 0 for a dictionary, which has `num_values`.
        begin, stored_size: of its bytes in the file.
        size: uncompressed.
        levels_size: of the levels that lie uncompressed before the values (version 2), else None.
        is_compressed: may be false in version 2.
    """

    first_row: int
    num_values: int
    begin: int
    stored_size: int
    size: int
    encoding: int
    levels_size: int | None = None
    is_compressed: bool = True


@dataclass(frozen=True)
class _Chunk:
    """One column in one row group."""

    pages: list[_Page]
    dictionary: _Page | None
    codec: str


@dataclass(frozen=True)
class _Group:
    """Where the chunk of a row group lies; PyArrow's own object would keep the metadata of the whole file."""

    begin: int
    size: int
    num_values: int
    codec: str


class BinaryColumn:
    """Random access to one binary column of one file, such as `image.bytes`. Threads may share it.

    Raises:
        UnsupportedLayoutError: the column is repeated, or its encoding is not one that writers use for images.
    """

    def __init__(self, path: Path, column: str):
        with open_parquet(path) as file:
            metadata, schema = file.metadata, file.schema
            paths = [schema.column(i).path for i in range(len(schema))]
            if column not in paths:
                raise UnsupportedLayoutError(f"{path} has no column {column}")
            number = paths.index(column)
            description = schema.column(number)
            row_groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
            if description.max_repetition_level or description.physical_type != "BYTE_ARRAY":
                raise UnsupportedLayoutError(f"{path}, {column}: not a plain binary column")
            self._groups = [_group(row_group.column(number)) for row_group in row_groups]
            self._first_rows = np.cumsum([0, *(row_group.num_rows for row_group in row_groups)])
            self._max_level = description.max_definition_level
        self._file = _File(path)
        self._chunks: dict[int, _Chunk] = {}
        self._values: dict[int, _PlainValues] = {}  # by where their page begins
        self._slots: dict[int, np.ndarray] = {}

    def value(self, row: int) -> bytes | None:
        """The value in `row` of the file, None if null."""
        group = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        chunk = self._chunk(group)
        row -= int(self._first_rows[group])
        page = next(page for page in chunk.pages if row < page.first_row + page.num_values)
        if page.begin not in self._slots:
            self._index(page, chunk)
        slot = int(self._slots[page.begin][row - page.first_row])
        if slot < 0:
            return None
        source = page if page.encoding == _PLAIN or chunk.dictionary is None else chunk.dictionary
        return self._values[source.begin].value(slot)

    def _index(self, page: _Page, chunk: _Chunk) -> None:
        """Finds out which value each row of the page has (-1 = null), and where the values lie."""
        content = _Content(self._file, page, chunk.codec)
        levels, begin = self._levels(page, content)
        is_null = np.zeros(page.num_values, bool)
        if levels is not None:
            is_null = _read_hybrid(levels, self._max_level.bit_length(), page.num_values) != self._max_level
        count = page.num_values - int(is_null.sum())
        if page.encoding == _PLAIN:
            values = np.arange(count)
            self._values[page.begin] = _PlainValues(content, begin, count)
        elif page.encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY) and chunk.dictionary is not None:
            packed = content.whole()[begin:]
            values = _read_hybrid(packed[1:], packed[0], count) if count else np.arange(0)
            self._index_dictionary(chunk.dictionary, chunk.codec)
        else:
            raise UnsupportedLayoutError(f"Parquet encoding {page.encoding}")
        slots = np.full(page.num_values, -1, np.int32)
        slots[~is_null] = values
        self._slots[page.begin] = slots

    def _levels(self, page: _Page, content: "_Content") -> tuple[memoryview | None, int]:
        """Definition levels (None if no row can be null), and where the values begin in the content."""
        if page.levels_size is not None:
            levels = self._file.read(page.begin, page.levels_size)
            return (levels if self._max_level else None), 0
        if not self._max_level:
            return None, 0
        whole = content.whole()
        (length,) = struct.unpack_from("<I", whole)
        return whole[4 : 4 + length], 4 + length

    def _index_dictionary(self, page: _Page, codec: str) -> None:
        if page.begin not in self._values:
            self._values[page.begin] = _PlainValues(_Content(self._file, page, codec), 0, page.num_values)

    def _chunk(self, group: int) -> _Chunk:
        if group not in self._chunks:
            self._chunks[group] = self._read_headers(self._groups[group])
        return self._chunks[group]

    def _read_headers(self, group: _Group) -> _Chunk:
        """Walks from page header to page header; the pages themselves are not touched."""
        pages: list[_Page] = []
        dictionary, first_row, position = None, 0, group.begin
        while position < group.begin + group.size and first_row < group.num_values:
            header, begin = self._file.read_header(position)
            if header[1] == _DICTIONARY_PAGE:
                dictionary = _Page(0, header[7][1], begin, header[3], header[2], _PLAIN)
            elif header[1] in (_DATA_PAGE, _DATA_PAGE_V2):
                pages.append(_data_page(header, begin, first_row))
                first_row += pages[-1].num_values
            position = begin + header[3]
        if first_row != group.num_values:
            raise UnsupportedLayoutError(f"pages hold {first_row} of {group.num_values} values")
        return _Chunk(pages, dictionary, group.codec)


def _group(column: pq.ColumnChunkMetaData) -> _Group:
    begin = column.data_page_offset
    if column.dictionary_page_offset:
        begin = min(begin, column.dictionary_page_offset)
    return _Group(begin, column.total_compressed_size, column.num_values, column.compression)


def _data_page(header: Header, begin: int, first_row: int) -> _Page:
    stored_size, size = header[3], header[2]
    if header[1] == _DATA_PAGE:
        return _Page(first_row, header[5][1], begin, stored_size, size, header[5][2])
    details = header[8]
    if details.get(6):
        raise UnsupportedLayoutError("repetition levels")
    return _Page(first_row, details[1], begin, stored_size, size, details[4], details.get(5, 0), details.get(7, True))


class _File:
    """Reads parts of a file. It is opened for each read: that costs 10 us, and a dataset has more files than a process
    may keep open."""

    def __init__(self, path: Path):
        self._path = path

    def read(self, begin: int, size: int) -> memoryview:
        with self._path.open("rb", buffering=0) as stream:
            stream.seek(begin)
            return memoryview(stream.read(size))

    def read_header(self, position: int) -> tuple[Header, int]:
        """The page header at `position`, and where its page begins."""
        size = _HEADER_BYTES
        while True:
            content = self.read(position, size)
            try:
                header, length = _read_struct(content, 0)
                return header, position + length
            except (IndexError, struct.error):
                if len(content) < size:
                    raise UnsupportedLayoutError(f"no page header at {position}") from None
                size *= 16


class _PlainValues:
    """Values that lie one behind the other in a page, each after its length."""

    def __init__(self, content: "_Content", begin: int, count: int):
        whole = content.whole()
        self._begins = np.empty(count, np.int64)
        self._lengths = np.empty(count, np.int64)
        for i in range(count):
            (self._lengths[i],) = struct.unpack_from("<I", whole, begin)
            self._begins[i] = begin + 4
            begin += 4 + int(self._lengths[i])
        self._content = content
        content.index()

    def value(self, number: int) -> bytes:
        begin = int(self._begins[number])
        return self._content.part(begin, begin + int(self._lengths[number]))


class _Content:
    """The uncompressed bytes of a page, of which parts can be had alone where the compression allows it."""

    def __init__(self, file: _File, page: _Page, codec: str):
        skipped = page.levels_size or 0
        self._file = file
        self._begin = page.begin + skipped
        self._stored_size = page.stored_size - skipped
        self._size = page.size - skipped
        self._codec = codec if page.is_compressed else "UNCOMPRESSED"
        self._blocks: np.ndarray | None = None
        self._whole: memoryview | None = None

    def whole(self) -> memoryview:
        """Everything; kept until `index`."""
        if self._whole is None:
            self._whole = _decompress(self._file.read(self._begin, self._stored_size), self._codec, self._size)
        return self._whole

    def index(self) -> None:
        """Forgets the bytes, and remembers how to read parts of them."""
        if self._codec == "SNAPPY":
            self._blocks = _snappy_blocks(self._file.read(self._begin, self._stored_size))
        self._whole = None

    def part(self, begin: int, end: int) -> bytes:
        if self._codec == "UNCOMPRESSED":
            return bytes(self._file.read(self._begin + begin, end - begin))
        if self._blocks is None:
            whole = _decompress(self._file.read(self._begin, self._stored_size), self._codec, self._size)
            return bytes(whole[begin:end])
        first, last = begin // _SNAPPY_BLOCK, (end + _SNAPPY_BLOCK - 1) // _SNAPPY_BLOCK
        stored_begin = int(self._blocks[first])
        stored = self._file.read(self._begin + stored_begin, int(self._blocks[last]) - stored_begin)
        size = min(last * _SNAPPY_BLOCK, self._size) - first * _SNAPPY_BLOCK
        content = _decompress(memoryview(_varint(size) + bytes(stored)), "SNAPPY", size)
        offset = first * _SNAPPY_BLOCK
        return bytes(content[begin - offset : end - offset])


def _decompress(stored: memoryview, codec: str, size: int) -> memoryview:
    if codec == "UNCOMPRESSED":
        return stored
    # PyArrow calls two by one name: blocks alone, as all write today, and Hadoop's of old, which it reads itself.
    name = "lz4_raw" if codec == "LZ4" else codec.lower()
    if not pa.Codec.is_available(name):
        raise UnsupportedLayoutError(f"compression {codec}")
    try:
        return memoryview(pa.Codec(name).decompress(pa.py_buffer(stored), size)).cast("B")
    except OSError as error:
        if codec == "LZ4":
            raise UnsupportedLayoutError(f"compression {codec}") from error
        raise


def _snappy_blocks(stored: memoryview) -> np.ndarray | None:
    """Where in compressed bytes each 64 KB of the content begins, and the end; None if they depend on each other.

    A Snappy stream is its content's size and a row of literals and copies. Compressors work on 64 KB at a time, so no
    element reaches over the edge of a block and no copy refers to an earlier one. Decompressing some blocks is then
    decompressing a stream of those elements.
    """
    _, position = _read_varint(stored, 0)
    size, blocks = 0, []
    while position < len(stored):
        if size % _SNAPPY_BLOCK == 0:
            blocks.append(position)
        tag = stored[position]
        kind, length = tag & 3, (tag >> 2) + 1
        position += (1, 2, 3, 5)[kind]
        distance = 0
        if kind == 0:
            if length > 60:
                extra = length - 60
                length = int.from_bytes(stored[position : position + extra], "little") + 1
                position += extra
            position += length
        elif kind == 1:
            length = (tag >> 2 & 7) + 4
            distance = (tag >> 5) << 8 | stored[position - 1]
        else:
            distance = int.from_bytes(stored[position - (2 if kind == 2 else 4) : position], "little")
        inside = size % _SNAPPY_BLOCK
        if distance > inside or inside + length > _SNAPPY_BLOCK:
            return None
        size += length
    return np.array([*blocks, position])


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


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


# --- Thrift compact protocol --------------------------------------------------------------------------------------


def _read_struct(content: memoryview | bytes, position: int) -> tuple[dict[int, object], int]:
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


def _read_value(content: memoryview | bytes, position: int, kind: int) -> tuple[object, int]:
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


def _read_zigzag(content: memoryview | bytes, position: int) -> tuple[int, int]:
    value, position = _read_varint(content, position)
    return (value >> 1) ^ -(value & 1), position


def _read_varint(content: memoryview | bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
