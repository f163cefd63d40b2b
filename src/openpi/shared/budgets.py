"""How much a small file or message may unpack to: images, NumPy files, archives, compressed chunks.

A few kilobytes can claim any size, and the memory is taken before anybody looks at the content. So what is declared is
compared with a budget first, and what comes out is counted. NumPy only: servers use this at the door.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import IO

import numpy as np

# One picture: the largest that a robot's camera makes, with room to spare.
MAX_IMAGE_PIXELS = 4096 * 4096
# One file of arrays: an observation, noise, a recorded request.
MAX_ARRAYS_BYTES = 2**30
MAX_ARCHIVE_MEMBERS = 4096
# One compressed chunk of a recording.
MAX_CHUNK_BYTES = 2**26

# Those of cameras, and none that Pillow has another program read (EPS).
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
_MAX_HEADER_BYTES = 10_000
_END_OF_ARCHIVE = b"PK\5\6"
_LOCATOR_OF_LARGE_ARCHIVES = b"PK\6\7"


class BudgetError(ValueError):
    """Something would unpack to more than its budget."""


@dataclasses.dataclass
class Budget:
    """What may still be unpacked, of one file or one message. Not for several threads.

    Attributes:
        left: of the unit.
        unit: for messages, such as `bytes` or `pixels`.
    """

    left: int
    unit: str = "bytes"

    def spend(self, amount: int, what: str) -> None:
        """Takes an amount off.

        Raises:
            BudgetError: there is less left; nothing is taken off then.
        """
        if amount > self.left:
            raise BudgetError(f"{what} would take {amount:,} {self.unit}, and at most {self.left:,} are expected here")
        self.left -= amount


# NumPy's files


def plain_dtype(text: object) -> np.dtype:
    """The dtype of `<f4` and the like: booleans, numbers, text, bytes, times. No objects, fields or sub-arrays.

    Raises:
        ValueError: another.
    """
    if isinstance(text, str) and _PLAIN_DTYPE.fullmatch(text) and (dtype := np.dtype(text)).itemsize <= _MAX_ITEM_BYTES:
        return dtype
    raise ValueError(f"the dtype {str(text)[:80]!r} is none of booleans, numbers, text, bytes and times")


# NumPy takes item sizes up to 2 GiB, which make a small shape a huge array.
_MAX_ITEM_BYTES = 2**16
_PLAIN_DTYPE = re.compile(
    r"[<>|=]?(?:b1|[iu][1248]|f[248]|c8|c16|[SU]\d{1,5}|[mM]8(?:\[\d{0,9}(?:[YMWDhms]|ms|us|ns|ps|fs|as)\])?)"
)


def plain_array(
    dtype: np.dtype, shape: Sequence[int], content: bytes | bytearray, *, is_fortran: bool = False
) -> np.ndarray:
    """A new array of exactly these bytes.

    Raises:
        ValueError: there are not as many bytes as the shape needs.
    """
    if len(shape) > 32 or not all(type(length) is int and 0 <= length < 2**40 for length in shape):
        raise ValueError(f"the shape {str(tuple(shape))[:80]} is none of an array")
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != len(content):
        raise ValueError(f"an array of shape {tuple(shape)} and dtype {dtype} has {wanted} bytes, not {len(content)}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if is_fortran else "C").copy()


def read_npy_header(stream: IO[bytes]) -> tuple[object, tuple[int, ...], bool]:
    """dtype as the file has it (`descr`), shape and whether it is in Fortran's order; the stream is at the data then.

    Raises:
        ValueError: no NumPy file.
    """
    magic = stream.read(8)
    if len(magic) < 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise ValueError("it does not begin as a NumPy file does")
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(_exactly(stream, width), "little")
    if length > _MAX_HEADER_BYTES:
        raise BudgetError(f"its header has {length} bytes; at most {_MAX_HEADER_BYTES} are expected")
    try:
        header = ast.literal_eval(_exactly(stream, length).decode("utf-8" if magic[6] == 3 else "latin1").strip())
        descr, shape, is_fortran = header["descr"], header["shape"], header["fortran_order"]
    except (SyntaxError, KeyError, TypeError, MemoryError, RecursionError, ValueError) as error:
        raise ValueError(f"its header is damaged ({type(error).__name__})") from error
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
        raise ValueError(f"its shape is {str(shape)[:80]}")
    return descr, shape, is_fortran is True


def read_npy(stream: IO[bytes], budget: Budget, what: str) -> np.ndarray:
    """The array of a `.npy` file, of a plain dtype.

    Raises:
        BudgetError: it would be larger than the budget.
        ValueError: no such file; truncated, or of objects or fields.
    """
    descr, shape, is_fortran = read_npy_header(stream)
    dtype = plain_dtype(descr)
    num_bytes = math.prod(shape) * dtype.itemsize
    budget.spend(num_bytes, f"{what} of shape {shape} and dtype {dtype}")
    return plain_array(dtype, shape, _exactly(stream, num_bytes), is_fortran=is_fortran)


def read_npz(file: IO[bytes], budget: Budget, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file.

    Args:
        file: seekable.
        names: those to read, where the file has them; None = all.
    Raises:
        BudgetError: it would be larger than the budget, or has too many members.
        ValueError: no such file, or damaged.
    """
    _check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            return dict(_arrays(archive, budget, names))
    except BudgetError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"it is no whole archive ({error})") from error


def _arrays(
    archive: zipfile.ZipFile, budget: Budget, wanted: Collection[str] | None
) -> Iterator[tuple[str, np.ndarray]]:
    names = archive.namelist()
    if len(names) != len(set(names)):
        raise ValueError("it has two members of one name")
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if wanted is not None and name not in wanted:
            continue
        with archive.open(info) as stream:  # gives no more bytes than the directory says
            yield name, read_npy(stream, budget, f"'{name}'")


def _check_directory(file: IO[bytes]) -> None:
    """Before all of the archive's directory is read: Python's reader makes an object of each entry."""
    file.seek(0, os.SEEK_END)
    size = file.tell()
    file.seek(max(0, size - 2**16 - 64))  # a comment, the end, and what stands before it
    tail = file.read()
    end = tail.rfind(_END_OF_ARCHIVE)
    if end < 0 or len(tail) - end < 22:
        raise ValueError("it is no archive, or cut off")
    if tail[max(0, end - 20) : end].startswith(_LOCATOR_OF_LARGE_ARCHIVES):
        raise BudgetError("it is an archive of more than 4 GiB, or of more than 65,535 members")
    count, directory_bytes = struct.unpack("<HI", tail[end + 10 : end + 16])
    if max(count, directory_bytes // 46) > MAX_ARCHIVE_MEMBERS:
        raise BudgetError(f"it has {count} members; at most {MAX_ARCHIVE_MEMBERS} are expected")
    file.seek(0)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) != count:
        raise ValueError(f"it ends {count - len(content)} bytes early")
    return content
