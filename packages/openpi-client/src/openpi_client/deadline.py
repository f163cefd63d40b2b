"""Waiting for sockets, by a deadline: never longer, however slowly a peer sends or reads, and whatever signals come."""

import math
import select
import socket
import threading
import time
from typing import Optional

# A wait that another thread may stop looks for that so often.
_STOP_TICK_S = 0.05
# `poll` takes 24 days at most.
_LONGEST_WAIT_S = 3600.0


class SilenceError(TimeoutError):
    """What was waited for has not come in time, or not all of it; a stream of messages can go on."""


class Deadline:
    """When an exchange has to be over, on the monotonic clock: one for all its parts."""

    __slots__ = ("_at_s", "stop", "timeout_s")

    def __init__(self, timeout_s: Optional[float] = None, stop: Optional[threading.Event] = None) -> None:
        """
        Args:
            timeout_s: from now on; None = without limit.
            stop: ends waiting early, when another thread sets it.
        """
        self.timeout_s = math.inf if timeout_s is None else timeout_s
        self.stop = stop
        self._at_s = time.monotonic() + self.timeout_s

    def left_s(self) -> float:
        """Infinity without a limit; 0 when it is over."""
        return max(0.0, self._at_s - time.monotonic())

    def is_over(self) -> bool:
        return time.monotonic() >= self._at_s

    def is_limited(self) -> bool:
        return self._at_s != math.inf

    def check(self) -> None:
        """Raises SilenceError when it is over."""
        if time.monotonic() >= self._at_s:
            raise SilenceError(f"not within {self.timeout_s:g} s")

    def acquire(self, lock: threading.Lock) -> None:
        """Takes a lock. Raises as `tick_s`."""
        while not lock.acquire(blocking=False) and not lock.acquire(timeout=self.tick_s()):
            pass

    def sooner(self, timeout_s: float) -> "Deadline":
        """This one, or that of `timeout_s` from now."""
        return Deadline(min(self.left_s(), timeout_s), self.stop)

    def tick_s(self) -> float:
        """How long to wait before the next look at the deadline.

        Raises:
            SilenceError: it is over.
            ConnectionAbortedError: another thread stopped the exchange.
        """
        if self.stop is not None and self.stop.is_set():
            raise ConnectionAbortedError("stopped by another thread")
        self.check()
        return min(self.left_s(), _LONGEST_WAIT_S if self.stop is None else _STOP_TICK_S)


def check_seconds(name: str, value: object, word: Optional[str] = None) -> None:
    """Raises ValueError unless an argument is a number of seconds, None, or that word."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    if value is not None and not is_number and (word is None or value != word):
        others = "None" if word is None else f'"{word}", or None'
        raise ValueError(f"{name} is {value!r}; expected seconds, 0 or more, {others}")


def wait(sock: socket.socket, deadline: Deadline, *, to_write: bool = False) -> None:
    """Until there is something to read, or room to write. Raises as `Deadline.tick_s`."""
    while not is_ready(sock, deadline.tick_s(), to_write=to_write):
        pass


def is_ready(sock: socket.socket, timeout_s: float, *, to_write: bool = False) -> bool:
    """Whether there is something to read (the end counts), or room to write, within `timeout_s`."""
    if sock.fileno() < 0:
        raise ConnectionResetError("the connection was closed")
    if not hasattr(select, "poll"):  # Windows, where select takes any number of a descriptor
        # A connection that cannot be made is "exceptional" there.
        wanted = ([], [sock], [sock]) if to_write else ([sock], [], [])
        return any(select.select(*wanted, timeout_s))
    poller = select.poll()  # `select` takes no descriptor above 1023
    poller.register(sock, select.POLLOUT if to_write else select.POLLIN)
    return bool(poller.poll(math.ceil(timeout_s * 1000)))
