"""Ctrl-C, SIGTERM and their like as a request: the step is finished and saved before the process leaves."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# Within it, a second signal is the first one once more: a queue sends SIGTERM to all processes, and torchrun, which is
# one of them, passes it on to its own.
_IMPATIENCE_S = 0.5

# Would end the process. SIGHUP: the terminal is gone. The others are what queues send some minutes before the time is
# over, if asked to.
_ALSO = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StoppedError(BaseException):
    """A signal came before there was anything to save. No `Exception`: it is no failure of what it interrupts."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interrupts:
    """Within `with`, the first signal that asks to end is noted; another, half a second later, acts at once. A queue's
    warning is followed by SIGTERM, which is then the first.

    A signal that is ignored when we start stays so: a shell ignores SIGINT for what it runs in the background, and
    nohup SIGHUP. So does one that others have taken, as launchers and fault handlers do with those for users.

    Args:
        may_leave_at_once: until `expect_steps`, the first signal raises `StoppedError`: reading the data may take for
            ever, and nothing is lost. Not for one of several processes, whose others have to hear of it.
    Attributes:
        signum: the signal that asked to stop, or None.
    """

    def __init__(self, *, may_leave_at_once: bool = False) -> None:
        self.signum: int | None = None
        self._noted_at = 0.0
        self._may_leave_at_once = may_leave_at_once
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow handlers
            numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
            numbers += [n for n in _ALSO if signal.getsignal(n) is signal.SIG_DFL]
            self._previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def expect_steps(self) -> None:
        """From here on there is something to save."""
        self._may_leave_at_once = False

    def _note(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self.signum is not None and signum in _ALSO:
            return
        if self.signum is not None and self.signum not in _ALSO:
            if time.monotonic() - self._noted_at > _IMPATIENCE_S:
                self._restore()
                signal.raise_signal(signum)
            return
        self.signum, self._noted_at = signum, time.monotonic()
        if self._may_leave_at_once:
            self._restore()
            raise StoppedError(signum)
        logger.warning("%s: finishing this step and saving; once more to leave at once", signal.Signals(signum).name)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
