"""A remote file: its size, its version, and its bytes from anywhere on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

NUM_CONNECTIONS = 8  # to one server
PART = ".openpi-part"  # ends the name of a file that is not all there


class CutError(ConnectionError):
    """A transfer that ended early, and may be continued."""


class RefusedError(ConnectionError):
    """The server is there and does not let us in."""


class Body(NamedTuple):
    """What a server sends.

    Attributes:
        start: byte of the file that comes first; 0 where the server does not continue.
        size: bytes of the whole file; None if it does not say.
        chunks: raises CutError.
    """

    start: int
    size: int | None
    chunks: Iterator[bytes]


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """One file.

    Attributes:
        name: path below the URL that was asked for; empty if that is the file itself.
        size: bytes; None if the server does not say before it sends.
        version: changes with the content; None if unknown, and then a cut transfer starts over.
        open: from the byte on that it is given. Raises CutError, RefusedError, FileNotFoundError.
        md5: digest of the content, if known.
    """

    name: str
    size: int | None
    version: str | None
    open: Callable[[int], AbstractContextManager[Body]]
    md5: bytes | None = None
