"""One websocket after its handshake: who speaks when, what a silent or slow client may cost, and how it ends."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from openpi.serving.access import Limits
from openpi.serving.frames import Binary, Close, Frame, Text
from openpi.serving.live import LiveSession
from openpi_client.deadline import Deadline
from openpi_client.frames import TEXT
from openpi_client.stream import MessageStream, SilenceError, StreamClosed

_GOING_AWAY = 1001
# How long a client may take to answer our goodbye.
_CLOSE_TIMEOUT_S = 1.0
# While the server stops, a client may take so long for the answer that is on its way to it.
_LAST_SEND_S = 3.0
# A message that has begun to come must be whole by then.
_MESSAGE_TIMEOUT_S = 300.0
# A client that sent nothing for so long is asked for a sign of life. After as long again its place may be another's: a
# machine that is gone is found by TCP, and some libraries (websocket-client, Boost.Beast) read pings only with the next
# answer.
_PING_INTERVAL_S = 20.0
# Without a limit of idleness: for so long a session without requests keeps its place although another wants it.
_KEEPS_PLACE_S = 3600.0
# While a client waits for its model.
_READ_AHEAD_TICK_S = 0.1
_MAX_EARLY_MESSAGES = 4


class Connection:
    """One websocket and what is known about it.

    Attributes:
        turn: held while a message is being answered, and for good once the end is said.
        when_answered: called once, at the end of this turn.
    """

    def __init__(
        self,
        number: int,
        address: str,
        limits: Limits,
        stop: threading.Event,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """
        Args:
            is_wanted: whether somebody waits for the place of a session that is idle.
        """
        self.number = number
        self.address = address
        self.live: LiveSession | None = None
        self.turn = threading.Lock()
        self.when_answered: Callable[[], None] | None = None
        self.is_over = False
        self.stream: MessageStream | None = None
        self._limits = limits
        self._stop = stop
        self._is_wanted = is_wanted
        self._answer_by_s = 0.0
        self._stopped_s: float | None = None  # when the server began to stop
        self._sending_s: float | None = None  # since when a client has not taken what it gets
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
        """Drops a client that has not answered the goodbye in time, or does not take its last answer. For a server that
        ends, which calls it again and again.
        """
        now_s = time.monotonic()
        self._stopped_s = self._stopped_s or now_s
        sending_s = self._sending_s
        is_late = self.is_over and now_s > self._answer_by_s
        is_slow = sending_s is not None and now_s - max(sending_s, self._stopped_s) > _LAST_SEND_S
        if self.stream is not None and (is_late or is_slow):
            self.stream.abort()

    def next_message(self) -> memoryview | str:
        """The next message. A peer that is silent is pinged; one without requests is sent away, whatever else it sends,
        but without a limit only when its place is wanted: published clients do not connect again, and their robots may
        pause for as long as they like.

        Raises:
            StreamClosed: it left, or was dropped.
        """
        assert self.stream is not None
        if self._early:
            return self._early.pop(0)
        idle_since_s = time.monotonic()
        begun_s: float | None = None
        while True:
            try:
                return self.stream.read(self._tick_s(idle_since_s, begun_s))
            except SilenceError:
                now_s = time.monotonic()
            begun_s = (begun_s or now_s) if self.stream.is_within_message() else None
            if begun_s is not None and now_s - begun_s >= _MESSAGE_TIMEOUT_S:
                self._send_away(f"a message is not whole after {_MESSAGE_TIMEOUT_S:g} s")
                begun_s = now_s
            if now_s - idle_since_s >= self._idle_limit_s() and (self._limits.idle_timeout_s or self._is_wanted()):
                self._send_away(f"no request for {self._idle_limit_s():g} s")
                idle_since_s = now_s
            is_mute = self.stream.silence_s() >= 2 * _PING_INTERVAL_S
            if is_mute and (begun_s is not None or self._is_wanted()):
                self.stream.abort()
                raise StreamClosed(1006, "no sign of life")
            self.stream.ping()

    def _idle_limit_s(self) -> float:
        return self._limits.idle_timeout_s or _KEEPS_PLACE_S

    def _tick_s(self, idle_since_s: float, begun_s: float | None) -> float:
        """How long to wait for a message before the next look at the clocks."""
        now_s = time.monotonic()
        ticks = [_PING_INTERVAL_S]
        if idle_since_s + self._idle_limit_s() > now_s:
            ticks.append(idle_since_s + self._idle_limit_s() - now_s)
        if begun_s is not None:
            ticks.append(begun_s + _MESSAGE_TIMEOUT_S - now_s)
        return max(0.001, min(ticks))

    def _send_away(self, reason: str) -> None:
        """Ends the session, unless the message before is still being answered."""
        if self.turn.acquire(blocking=False):
            self._end(_GOING_AWAY, reason)
            self.turn.release()
            raise StreamClosed(_GOING_AWAY)

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
        self._send(frames, Deadline(self._limits.send_timeout_s))

    def _send(self, frames: list[Frame], deadline: Deadline) -> None:
        assert self.stream is not None
        for frame in frames:
            with self._sending():
                match frame:
                    case Binary(data):
                        self.stream.write(data, timeout_s=deadline.left_s())
                    case Text(text):
                        self.stream.write(text.encode(), TEXT, deadline.left_s())
            if isinstance(frame, Close):
                if frame.linger_s:
                    self.wait_closed(frame.linger_s)
                self._end(frame.code, frame.reason)

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        self._sending_s = time.monotonic()
        try:
            yield
        finally:
            self._sending_s = None

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
                return self.stream.start_write(text.encode(), TEXT)
            case Close(code, reason, _):
                self._end(code, reason)
        return None

    def _send_rest(self, rest: Callable[[float], None], frames: list[Frame]) -> None:
        try:
            with contextlib.suppress(StreamClosed):  # The session's thread notices.
                deadline = Deadline(self._limits.send_timeout_s)
                with self._sending():
                    rest(deadline.left_s())
                self._send(frames, deadline)
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
        done, self.when_answered = self.when_answered, None
        if done is not None:
            done()
        self.turn.release()

    def wait_closed(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Reads until the client has closed too, for so long at most."""
        deadline = Deadline(timeout_s)
        with contextlib.suppress(StreamClosed, SilenceError):
            while self.stream is not None and self.stream.is_open:
                self.stream.read(deadline.left_s())

    def drain(self) -> None:
        """Takes what is left of a message that ended the session, so that the client hears why."""
        assert self.stream is not None
        self.is_over = True
        self.stream.drain(_CLOSE_TIMEOUT_S if self.is_stopping else self._limits.send_timeout_s)

    def _end(self, code: int, reason: str) -> None:
        self._answer_by_s = time.monotonic() + _CLOSE_TIMEOUT_S
        self.is_over = True
        if self.stream is not None:
            self.stream.close(code, reason)
