"""Images to a server on the same host: through memory that both have mapped, instead of the socket.

    client                                                   server, with that switched on
      | -- upgrade, Openpi-Features: shared-memory ----------> |   from a loopback address?
      | <- 101, Openpi-Shared-Memory: PID/FD/openpi-<32 hex> - |   makes a memory file of fixed size
      |    maps /proc/PID/fd/FD, if it is that file            |
      | -- {.., b"data": {b"__shared__": [offset, count]}} --> |   copies it from there
      |                         ...                            |

In a message, `{b"__shared__": [offset, count]}` stands for bytes that lie in the memory of the connection. The client
writes them before it sends the message, and overwrites them after the answer has come. The file has no name (Linux,
memfd_create): it ends with the processes that have it open, however they end, and only processes of the same user find
it.
"""

import logging
import mmap
import os
import re
from pathlib import Path
from typing import Optional

import numpy as np

from openpi_client import msgpack_numpy

logger = logging.getLogger(__name__)

FEATURE = "shared-memory"
HEADER = "Openpi-Shared-Memory"
KEY = b"__shared__"
PROCESSES = Path("/proc")

_OFFER = re.compile(r"(\d+)/(\d+)/(openpi-[0-9a-f]{32})")
# What is smaller travels in the message.
_SMALLEST_BYTES = 2**14


def is_supported() -> bool:
    """Whether this system has memory files."""
    return hasattr(os, "memfd_create") and (PROCESSES / "self" / "fd").is_dir()


class SharedArrays:
    """Packs arrays; the bytes of large ones into the memory of the current connection, if that has any.

    The arrays of a request lie one behind the other; those of the next overwrite them.
    """

    def __init__(self) -> None:
        self._memory: Optional[_Memory] = None
        self._end = 0

    def open(self, offer: Optional[str]) -> None:
        """Uses the memory that a server offers for its connection; None = it offers none."""
        self.close()
        match = _OFFER.fullmatch(offer or "")
        if match is None:
            return
        try:
            self._memory = _Memory(*match.groups())
        except OSError as error:  # another container, or another user
            logger.info("The server's shared memory cannot be used (%s); images go over the socket", error)

    def close(self) -> None:
        if self._memory is not None:
            self._memory.close()
        self._memory = None

    def begin_request(self) -> None:
        self._end = 0

    def pack(self, obj: object) -> object:
        """As `msgpack_numpy.pack_array`."""
        return msgpack_numpy.pack_array(obj, self._bytes_of)

    def _bytes_of(self, array: np.ndarray) -> object:
        start, count = self._end, array.nbytes
        if self._memory is None or count < _SMALLEST_BYTES or not self._memory.reserve(start + count):
            return msgpack_numpy.c_bytes(array)
        self._memory.write(array, start)
        self._end = start + count + -count % mmap.PAGESIZE
        return {KEY: [start, count]}


class _Memory:
    """The memory file of a server, mapped."""

    def __init__(self, pid: str, fd: str, name: str) -> None:
        """Raises OSError unless that process has this file, and lets us open it."""
        self._file = (PROCESSES / pid / "fd" / fd).open("r+b", buffering=0)
        try:
            # In another container, the numbers are those of another process.
            link = os.readlink(f"{PROCESSES}/self/fd/{self._file.fileno()}")  # noqa: PTH115  (Python 3.8)
            if link != f"/memfd:{name} (deleted)":
                raise OSError(f"process {pid} is not the server")
            self._map = mmap.mmap(self._file.fileno(), 0)
        except BaseException:
            self._file.close()
            raise
        self._reserved = 0

    def reserve(self, end: int) -> bool:
        """Whether there is memory up to here. To write without asking could kill the process."""
        if end <= self._reserved:
            return True
        try:
            os.posix_fallocate(self._file.fileno(), self._reserved, end - self._reserved)
        except OSError as error:
            logger.debug("No more shared memory than %d bytes (%s)", self._reserved, error)
            return False
        self._reserved = end
        return True

    def write(self, array: np.ndarray, start: int) -> None:
        np.ndarray(array.shape, array.dtype, buffer=self._map, offset=start)[...] = array

    def close(self) -> None:
        self._map.close()
        self._file.close()
