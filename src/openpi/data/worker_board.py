"""What each worker of a loader is making, and since when: so that one that does not come back can be named."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing.context import BaseContext
from typing import Any

_TEXT_BYTES = 240


class WorkerBoard:
    """A line for each worker, in memory that threads and processes share.

    Args:
        num_workers: that will ever write on it.
        context: of the worker processes, for which it may be an argument when they start; None = threads.
    """

    def __init__(self, num_workers: int, context: BaseContext | None = None):
        self._num_workers = num_workers
        allocate: Any = _allocate if context is None else context.RawArray
        self._since_s = allocate(ctypes.c_double, num_workers)  # 0 = idle
        self._pids = allocate(ctypes.c_int64, num_workers)
        self._items = allocate(ctypes.c_char, num_workers * _TEXT_BYTES)
        self._next: Any = itertools.count() if context is None else context.Value(ctypes.c_int, 0)
        self._own = threading.local()

    @contextlib.contextmanager
    def at_work(self, item: str) -> Iterator[None]:
        """Of the calling thread or process: it is making `item` until this ends. An error is given a note of it."""
        line = self._line()
        text = item.encode()[: _TEXT_BYTES - 1]
        self._items[line * _TEXT_BYTES : (line + 1) * _TEXT_BYTES] = text.ljust(_TEXT_BYTES, b"\0")
        self._pids[line] = os.getpid()
        self._since_s[line] = time.monotonic()  # the same clock in all processes of a machine
        try:
            yield
        except Exception as error:
            error.add_note(f"at {item}")
            raise
        finally:
            self._since_s[line] = 0

    def longest(self) -> tuple[float, str] | None:
        """The worker that has been at one item for the longest time: seconds, and what to call it and the item."""
        busy = [(since, line) for line, since in enumerate(self._since_s) if since]
        if not busy:
            return None
        since, line = min(busy)
        item = self._items[line * _TEXT_BYTES : (line + 1) * _TEXT_BYTES].rstrip(b"\0").decode(errors="replace")
        pid = self._pids[line]
        where = "a thread of this process" if pid == os.getpid() else f"process {pid}"
        return time.monotonic() - since, f"worker {line} ({where}) at {item}"

    def kill_busy(self) -> None:
        """Ends worker processes that are in the middle of an item, without a chance to object."""
        for since, pid in zip(self._since_s, self._pids, strict=True):
            if since and pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_own"}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        self._own = threading.local()

    def _line(self) -> int:
        if not hasattr(self._own, "line"):
            if isinstance(self._next, itertools.count):
                self._own.line = next(self._next) % self._num_workers
            else:
                with self._next.get_lock():
                    self._own.line = self._next.value % self._num_workers
                    self._next.value += 1
        return self._own.line


def _allocate(kind: type[ctypes._SimpleCData], count: int) -> object:
    return (kind * count)()
