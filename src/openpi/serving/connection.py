"""One websocket after its handshake: who speaks when, what a silent or slow client may cost, and how it ends."""

import contextlib
import threading
import time
from collections.abc import Callable

from openpi.serving.access import Limits
from openpi.serving.frames import Binary, Close, Frame, Text
from openpi.serving.live import LiveSession
from openpi_client import stream as streams
from openpi_client.stream import MessageStream, SilenceError, StreamClosed

_GOING_AWAY = 1001
# How long a client may take to answer our goodbye.
_CLOSE_TIMEOUT_S = 1.0
# A client that sent nothing for so long is asked for a sign of life, and dropped after as long again.
_PING_INTERVAL_S = 20.0
# While a client waits for its model.
_READ_AHEAD_TICK_S = 0.1
_MAX_EARLY_MESSAGES = 4


class Connection:
    """One websocket and what is known about it.

    Attributes:
        turn: held while a message is being answered, and for good once the end is said.
    """

    def __init__(self, number: int, address: str, limits: Limits, stop: threading.Event) -> None:
        self.number = number
        self.address = address
        self.live: LiveSession | None = None
        self.turn = threading.Lock()
        self.is_over = False
        self.stream: MessageStream | None = None
        self._limits = limits
        self._stop = stop
        self._answer_by_s = 0.0
        self._early: list[memoryview | str] = []
        self._reader: threading.Thread | None = None
        self._has_model = threading.Event()

    @property
    def is_stopping(self) -> bool:
        """Whether the server is."""
        return self._stop.is_set()

    @property
    def is_open(self) -> bool:
        return self.stream is not None and self.stream.is_open and not self.is_over

    def abort_if_silent(self) -> None:
        """Drops a client that has not answered the goodbye in time."""
        if self.is_over and time.monotonic() > self._answer_by_s and self.stream is not None:
            self.stream.abort()

    def next_message(self) -> memoryview | str:
        """The next message. A peer that is silent is asked for a sign of life; one without requests is sent away.

        Raises:
            StreamClosed: it left, or was dropped.
        """
        assert self.stream is not None
        if self._early:
            return self._early.pop(0)
        limit_s = self._limits.idle_timeout_s
        tick_s = _PING_INTERVAL_S if limit_s is None else min(_PING_INTERVAL_S, limit_s)
        start_s, num_silent = time.monotonic(), 0
        while True:
            try:
                return self.stream.read(tick_s)
            except SilenceError:
                num_silent += 1
                is_idle = limit_s is not None and time.monotonic() - start_s >= limit_s
                if is_idle and self.turn.acquire(blocking=False):
                    self._end(_GOING_AWAY, f"no request for {limit_s:g} s")
                    self.turn.release()
                    raise StreamClosed(_GOING_AWAY) from None
                if num_silent * tick_s >= 2 * _PING_INTERVAL_S and not self.stream.has_answered():
                    self.stream.abort()
                    raise StreamClosed(1006, "no sign of life") from None
                self.stream.ping()

    def read_ahead(self) -> None:
        """Lets another thread answer pings while this one waits for a model."""
        if self._reader is None:
            self._reader = threading.Thread(target=self._read_ahead, name="openpi-waiting", daemon=True)
            self._reader.start()

    def stop_reading_ahead(self) -> None:
        self._has_model.set()
        if self._reader is not None:
            self._reader.join()

    def _read_ahead(self) -> None:
        assert self.stream is not None
        with contextlib.suppress(StreamClosed):
            while not self._has_model.is_set() and len(self._early) < _MAX_EARLY_MESSAGES:
                with contextlib.suppress(SilenceError):
                    self._early.append(self.stream.read(_READ_AHEAD_TICK_S))

    def send(self, frames: list[Frame]) -> None:
        """Waits for a slow client, not for long. For the session's own thread."""
        assert self.stream is not None
        for frame in frames:
            match frame:
                case Binary(data):
                    self.stream.write(data, timeout_s=self._limits.send_timeout_s)
                case Text(text):
                    self.stream.write(text.encode(), streams.TEXT, self._limits.send_timeout_s)
                case Close(code, reason, linger_s):
                    if linger_s:
                        self.wait_closed(linger_s)
                    self._end(code, reason)

    def send_soon(self, frames: list[Frame]) -> None:
        """Sends an answer without waiting for a slow client; the turn ends when it has left. For the model's thread."""
        for i, frame in enumerate(frames):
            rest = self._start(frame)
            if rest is not None:
                work = (rest, frames[i + 1 :])
                threading.Thread(target=self._send_rest, args=work, name="openpi-slow-client", daemon=True).start()
                return
        self.end_turn()

    def _start(self, frame: Frame) -> Callable[[float], None] | None:
        assert self.stream is not None
        match frame:
            case Binary(data):
                return self.stream.start_write(data)
            case Text(text):
                return self.stream.start_write(text.encode(), streams.TEXT)
            case Close(code, reason, _):
                self._end(code, reason)
        return None

    def _send_rest(self, rest: Callable[[float], None], frames: list[Frame]) -> None:
        try:
            with contextlib.suppress(StreamClosed):  # The session's thread notices.
                rest(self._limits.send_timeout_s)
                self.send(frames)
        finally:
            self.end_turn()

    def say_goodbye(self) -> None:
        """Ends the session, unless a message is being answered: then it ends after that."""
        if self.turn.acquire(blocking=False):
            self._end(_GOING_AWAY, "server is stopping")
            self.turn.release()

    def end_turn(self) -> None:
        """The message is answered; the next may come, unless the server stops."""
        if self._stop.is_set() and not self.is_over:
            self._end(_GOING_AWAY, "server is stopping")
        self.turn.release()

    def wait_closed(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Reads until the client has closed too, for so long at most."""
        deadline_s = time.monotonic() + timeout_s
        with contextlib.suppress(StreamClosed, SilenceError):
            while self.stream is not None and self.stream.is_open and (left_s := deadline_s - time.monotonic()) > 0:
                self.stream.read(left_s)

    def drain(self) -> None:
        """Takes what is left of a message that ended the session, so that the client hears why."""
        assert self.stream is not None
        self.stream.drain(self._limits.send_timeout_s)

    def _end(self, code: int, reason: str) -> None:
        self._answer_by_s = time.monotonic() + _CLOSE_TIMEOUT_S
        self.is_over = True
        if self.stream is not None:
            self.stream.close(code, reason)
