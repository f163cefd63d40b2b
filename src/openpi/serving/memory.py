"""How much memory the messages of all sessions may take together, and what becomes of it when they are gone."""

import ctypes
import threading

from openpi.serving.errors import ServerBusyError

# How long a message waits until others are answered.
_PATIENCE_S = 5.0

# From <malloc.h> of glibc.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

_KEPT_BYTES = 256 * 2**20
_LARGEST_HEAP_BLOCK_BYTES = 32 * 2**20


class MemoryBudget:
    """Every session has a share of its own, which nobody can take from it, and what a message needs beyond it comes
    from a pool for all. The messages of a robot fit into the share.
    """

    def __init__(self, total_bytes: int, max_sessions: int) -> None:
        self.share_bytes = total_bytes // 2 // max_sessions
        self._pool_bytes = total_bytes - self.share_bytes * max_sessions
        self._changed = threading.Condition()  # guards what follows
        self._taken_bytes = 0

    def take(self, num_bytes: int, patience_s: float) -> None:
        """Waits so long for so much of the pool.

        Raises:
            ServerBusyError: others have it.
        """
        with self._changed:
            is_there = self._changed.wait_for(lambda: self._taken_bytes + num_bytes <= self._pool_bytes, patience_s)
            if not is_there:
                raise ServerBusyError("the messages of other sessions fill the server's memory; ask again later")
            self._taken_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._taken_bytes -= num_bytes
            self._changed.notify_all()


class SessionMemory:
    """What the messages of one session take. Any thread."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._lock = threading.Lock()  # guards what follows
        self._held_bytes = 0
        self._from_pool_bytes = 0

    def reserve(self, num_bytes: int, patience_s: float = 0.0) -> None:
        """Before the memory is used; waits so long until others are answered.

        Raises:
            ServerBusyError: there is none.
        """
        with self._lock:
            wanted = max(0, self._held_bytes + num_bytes - self._budget.share_bytes) - self._from_pool_bytes
            if wanted <= 0:
                self._held_bytes += num_bytes
                return
        self._budget.take(wanted, patience_s)
        with self._lock:
            self._held_bytes += num_bytes
            self._from_pool_bytes += wanted

    def admit(self, num_bytes: int) -> str | None:
        """`reserve` for a message that begins to come: waits a while, and returns the reason instead of raising it."""
        try:
            self.reserve(num_bytes, _PATIENCE_S)
        except ServerBusyError as error:
            return str(error)
        return None

    def release(self, num_bytes: int) -> None:
        with self._lock:
            self._held_bytes -= num_bytes
            spare = self._from_pool_bytes - max(0, self._held_bytes - self._budget.share_bytes)
            self._from_pool_bytes -= spare
        if spare:
            self._budget.give_back(spare)

    def close(self) -> None:
        """The session is over, and nothing of it is kept."""
        with self._lock:
            held = self._held_bytes
        self.release(held)


def keep_freed_memory() -> None:
    """Stops glibc from giving freed buffers back to the system at once; does nothing with another C library.

    A message with camera images is larger than the default thresholds (128 KiB), so every request would map, fault
    in and unmap its buffers page by page: parsing a 450 kB frame took 0.4 ms instead of 0.03 ms.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_HEAP_BLOCK_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_freed_back() -> None:
    """Gives freed memory back to the system, after messages that are much larger than usual."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(_KEPT_BYTES)
