"""The server's end of `openpi_client.shared_memory`: a memory file for each session that wants one.

A client names a place in the memory of its own session and nothing else, so there is nothing to forge. What it refers
to is copied when its message is decoded: whatever it writes meanwhile or later, an observation stays as it was checked.
The file's size is sealed, since reading behind the end of a file that was cut would kill the server.
"""

import fcntl
import logging
import mmap
import os
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any

from websockets.datastructures import Headers

from openpi.policies.guards import ObservationError
from openpi.serving.access import is_loopback
from openpi_client import connection, shared_memory

logger = logging.getLogger(__name__)

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

OnRead = Callable[[int], None]
"""Told the number of bytes of each place that a message refers to."""


class SharedMemory:
    """The memory of one session; takes up what the client has written. Any thread reads; the session's closes."""

    def __init__(self, size: int, on_read: OnRead | None = None) -> None:
        """
        Args:
            size: in bytes; also what the places of one message may have together.
            on_read: called in the thread that decodes.
        Raises:
            OSError: the system has no such files, or no more of them.
        """
        self._name = f"openpi-{secrets.token_hex(16)}"
        self._fd = os.memfd_create(self._name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.truncate(self._fd, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._map = mmap.mmap(self._fd, size, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self._fd)
            raise
        self._size = size
        self._on_read = on_read
        self._lock = threading.Lock()  # held while the memory is read, so that it is not closed

    @classmethod
    def open_for(cls, headers: Headers, peer: str, size: int, on_read: OnRead | None = None) -> "SharedMemory | None":
        """Memory for a client that asks for it and is on this host; None for any other.

        Args:
            headers: of its upgrade request.
            peer: its address.
        """
        if shared_memory.FEATURE not in connection.features(headers) or not is_loopback(peer):
            return None
        try:
            return cls(size, on_read)
        except OSError as error:
            logger.warning("No shared memory for %s: %s", peer, error)
            return None

    @property
    def headers(self) -> Mapping[str, str]:
        """Of the answer to the upgrade request."""
        return {shared_memory.HEADER: f"{os.getpid()}/{self._fd}/{self._name}"}

    def reader(self) -> Callable[[object], bytes]:
        """For one message: [offset, count] -> a copy of the bytes there.

        Raises:
            ObservationError: there is no such place, or nothing was written there.
        """
        left = self._size

        def read(place: Any) -> bytes:
            nonlocal left
            is_place = isinstance(place, list) and len(place) == 2 and all(type(number) is int for number in place)
            if not is_place or place[0] < 0 or place[1] < 1:
                raise ObservationError(f"a place in shared memory is {place!r}; expected [offset >= 0, count > 0]")
            left -= place[1]
            if left < 0:
                raise ObservationError(
                    f"a message has more than {self._size} bytes in shared memory; send fewer observations at once"
                )
            data = self._read(*place)
            if self._on_read:
                self._on_read(place[1])
            return data

        return read

    def _read(self, offset: int, count: int) -> bytes:
        with self._lock:
            if self._map.closed:
                raise ObservationError("the shared memory of this session is closed")
            # What nobody has written would be made when it is read.
            if offset + count > self._size or os.lseek(self._fd, offset, os.SEEK_HOLE) < offset + count:
                raise ObservationError(
                    f"a message refers to bytes {offset} to {offset + count} of the shared memory, where nothing was "
                    "written; write them before the message is sent"
                )
            return self._map[offset : offset + count]

    def close(self) -> None:
        with self._lock:
            self._map.close()
            os.close(self._fd)
