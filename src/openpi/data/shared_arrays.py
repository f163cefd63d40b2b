"""Arrays that worker processes have in common: written to a file once, mapped into each, in memory once."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_ALIGNMENT = 64


class SharedArrays:
    """Arrays by name, which pickle as where they are in a file, and unpickle as a dict of mapped, read-only arrays.

    The file has no name, so that nothing is left of it however this process ends; others reach it through `/proc` while
    this object lives. Where that cannot be, it unpickles as None. Texts are pickled as they are.

    Raises:
        OSError: the folder for temporary files (`TMPDIR`) is full.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._file, name = tempfile.mkstemp(prefix="openpi-")
        weakref.finalize(self, os.close, self._file)
        Path(name).unlink()
        self._parts: dict[str, tuple[np.dtype, tuple[int, ...], int]] = {}
        self._rest = {name: array for name, array in arrays.items() if array.dtype.hasobject or not array.size}
        with os.fdopen(self._file, "wb", closefd=False) as stream:
            for name, array in arrays.items():
                if name not in self._rest:
                    start = stream.seek(-stream.tell() % _ALIGNMENT, os.SEEK_CUR)
                    self._parts[name] = array.dtype, array.shape, start
                    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __reduce__(self) -> tuple[object, ...]:
        file = Path(f"/proc/{os.getpid()}/fd/{self._file}")
        return _mapped, (file, _identity(os.fstat(self._file)), self._parts, self._rest)


def _mapped(
    file: Path,
    identity: tuple[int, ...],
    parts: Mapping[str, tuple[np.dtype, tuple[int, ...], int]],
    rest: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray] | None:
    try:
        with file.open("rb") as stream:
            if _identity(os.fstat(stream.fileno())) != identity:  # another process has the number now
                return None
            # Views, because every row of a `np.memmap` is one.
            found = {
                name: np.memmap(stream, dtype, "r", start, shape).view(np.ndarray)
                for name, (dtype, shape, start) in parts.items()
            }
    except OSError:
        return None
    return {**found, **rest}


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
