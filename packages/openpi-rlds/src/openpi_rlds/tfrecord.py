"""TFRecord files: records one after the other, each `length u64, crc u32, data, crc u32`, little-endian.

The checksums are CRC-32C, rotated and shifted ("masked"), of the length and of the data.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from openpi.shared.file_kinds import found_instead

_HEADER = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8


class Span(NamedTuple):
    """Where the data of a record lie in its file, and which record it is, from 0."""

    number: int
    offset: int
    length: int


class TFRecordFile:
    """One file, walked from record to record; a record that is not loaded costs a read of 12 bytes.

    Args:
        num_records: that it should have; None = as many as there are.
    Raises, from its methods:
        ValueError: the file is damaged or cut; it and the record are named.
    """

    def __init__(self, path: Path, num_records: int | None = None):
        self.path = path
        self._num_records = num_records
        self._file = path.open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        self._number = 0
        self._offset = 0

    def next(self) -> Span | None:
        """The record that follows the one returned last; None at the end."""
        if self._offset == self._size:
            if self._num_records not in (None, self._number):
                raise self._damaged(
                    self._number,
                    f"the file ends after {self._number} records, dataset_info.json says {self._num_records}",
                )
            return None
        if self._number == self._num_records:
            raise self._damaged(
                self._number, f"dataset_info.json says that the file has {self._number} records, not more"
            )
        if self._offset + _HEADER.size > self._size:
            raise self._damaged(self._number, "the file ends within the record's header")
        header = self.read_at(self._offset, _HEADER.size)
        length, checksum = _HEADER.unpack(header)
        if masked_crc32c(header[:8]) != checksum:
            raise self._damaged(self._number, "the checksum of its length does not match")
        span = Span(self._number, self._offset + _HEADER.size, length)
        end = span.offset + length + _CHECKSUM.size
        if end > self._size:
            raise self._damaged(self._number, f"{length} bytes are announced, and the file ends before")
        self._number, self._offset = self._number + 1, end
        return span

    def load(self, span: Span) -> bytes:
        """The data of a record, checked."""
        raw = self.read_at(span.offset, span.length + _CHECKSUM.size)
        data = raw[: span.length]
        if masked_crc32c(data) != _CHECKSUM.unpack(raw[span.length :])[0]:
            raise self._damaged(span.number, "the checksum of its data does not match")
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes of the file, unchecked."""
        parts = []
        while size:  # the system may return less than was asked for
            part = os.pread(self._file.fileno(), size, offset)
            if not part:
                raise self._damaged(self._number, "the file became shorter while it was read")
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "TFRecordFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _damaged(self, number: int, reason: str) -> ValueError:
        why = (number == 0 and found_instead(self.path)) or "the file is damaged. Copy it anew"
        return ValueError(f"{self.path}, record {number}: {reason}; {why}")


def masked_crc32c(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF
