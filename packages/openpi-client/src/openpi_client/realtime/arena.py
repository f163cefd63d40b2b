"""Observations from one process to another of this machine: arrays through memory that both have mapped.

loop's process                          worker
  | copies each array to its place       | sees views of them
  | packs the rest, behind the arrays    | unpacks it
  | sends 16 bytes: where and how many -> | ... and answers, before the next observation is written
"""

import mmap
import os
import tempfile
from typing import Any, BinaryIO, Callable, Dict, Mapping, Tuple

import msgpack
import numpy as np

from openpi_client import msgpack_numpy

_KEY = b"__arena__"
# What is smaller travels in the message.
_SMALLEST_BYTES = 2**12
_ALIGNMENT = 64


def memory_file(num_bytes: int) -> BinaryIO:
    """A file without a name, of this size; memory it takes only where it is written."""
    if hasattr(os, "memfd_create"):
        file = os.fdopen(os.memfd_create("openpi-realtime"), "r+b", buffering=0)
    else:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    os.ftruncate(file.fileno(), num_bytes)
    return file  # type: ignore[return-value]


def packed(content: object, default: Callable[[object], object] = msgpack_numpy.pack_array) -> bytes:
    """As `msgpack.packb`, which some versions say may return nothing."""
    message: Any = msgpack.packb(content, default=default)
    return message


class Arena:
    """One observation at a time."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, 0)
        self._end = 0

    def write(self, content: Mapping[str, object]) -> Tuple[int, int]:
        """Returns where the message begins, and how long it is.

        Raises:
            ValueError: there is not so much memory.
            TypeError, ValueError, OverflowError: something that cannot be sent.
        """
        self._end = 0
        with msgpack_numpy.named_place(content):
            message = packed(content, self._pack)
        start = self._reserve(len(message))
        self._map[start : start + len(message)] = message
        return start, len(message)

    def read(self, start: int, length: int) -> Dict[str, object]:
        """The observation; its large arrays are views, good until the next is written."""
        return msgpack.unpackb(self._map[start : start + length], object_hook=self._unpack)

    def _pack(self, obj: object) -> object:
        if not isinstance(obj, np.ndarray) or obj.nbytes < _SMALLEST_BYTES or obj.dtype.kind not in "biuf":
            return msgpack_numpy.pack_array(obj)
        start = self._reserve(obj.nbytes)
        np.ndarray(obj.shape, obj.dtype, self._map, start)[...] = obj
        return {_KEY: start, b"dtype": obj.dtype.str, b"shape": obj.shape}

    def _unpack(self, obj: Dict[object, Any]) -> object:
        if _KEY in obj:
            return np.ndarray(obj[b"shape"], obj[b"dtype"], self._map, obj[_KEY])
        return msgpack_numpy.unpack_array(obj)

    def _reserve(self, num_bytes: int) -> int:
        start = self._end + -self._end % _ALIGNMENT
        if start + num_bytes > len(self._map):
            raise ValueError(
                f"the observation takes more than {len(self._map) >> 20} MiB; give ProcessRequester more (memory_mib)"
            )
        self._end = start + num_bytes
        return start
