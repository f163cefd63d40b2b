"""Websocket frames (RFC 6455, without extensions), from and to a connected socket.

Arrays go from the sender's memory into the socket, and from the socket into the memory that they are read from. A
client's frames are masked with zeros: masks keep scripts in browsers from fooling caches, and a robot runs no foreign
scripts.
"""

import struct
import threading
import time
from typing import Callable, Dict, List, Optional, Tuple, Union

import numpy as np

from openpi_client.deadline import Deadline
from openpi_client.socket_io import SocketIo

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
CONTROL = 0x8
LARGEST_CONTROL_BYTES = 125

MESSAGE_TOO_BIG, TRY_AGAIN_LATER = 1009, 1013
PROTOCOL_ERROR, BAD_TEXT, POLICY_VIOLATION, ABNORMAL, NO_CODE = 1002, 1007, 1008, 1006, 1005

_BUFFER_BYTES = 2**16
# Memory is asked for as a message comes: a header of ten bytes may claim hundreds of megabytes, and send none of them.
_ADMITTED_BYTES = 2**20
_NO_MASK = bytes(4)

Payload = Union[bytes, bytearray, memoryview]


class StreamClosed(ConnectionError):
    """The connection is over.

    Attributes:
        code, reason: as the peer gave them; 1006 when it just went away, or was dropped.
    """

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"{code} {reason}".rstrip())
        self.code = code
        self.reason = reason


class MessageRefused(StreamClosed):
    """We ended the connection, because the peer broke the protocol or sent too much; code and reason as we told it."""


Frame = Tuple[int, bool, memoryview]
"""(opcode, whether it is the last one of its message, payload)."""


class FrameReader:
    """Frames from a socket; for one thread.

    Attributes:
        heard_s: when the last bytes came, on the clock of `time.monotonic`.
    """

    def __init__(
        self,
        io: SocketIo,
        *,
        is_client: bool,
        received: bytes,
        max_bytes: int,
        admit: Optional[Callable[[int], Optional[str]]],
    ) -> None:
        """
        Args:
            received, max_bytes, admit: see `MessageStream`.
        """
        self._io = io
        self._is_client = is_client
        self._max_bytes = max_bytes
        self._admit = admit
        self._buffer = bytearray(max(_BUFFER_BYTES, len(received)))
        self._buffer[: len(received)] = received
        self._start, self._end = 0, len(received)
        self._header: Optional[tuple] = None  # opcode, is_last, mask of a frame on its way
        self._payload = memoryview(b"")
        self._have = self._room = 0  # bytes of it that are there, and that may be
        self.heard_s = time.monotonic()

    def has_bytes(self) -> bool:
        return self._start < self._end

    def is_within_message(self) -> bool:
        """Whether a part of a data frame is there."""
        return self._header is not None and not self._header[0] & CONTROL

    def read(self, deadline: Deadline, begun_bytes: int = 0) -> Frame:
        """The next frame; continues where a deadline interrupted it.

        Args:
            begun_bytes: what is there of a message in several frames.
        Raises:
            SilenceError: it is not whole in time.
            MessageRefused: it is none, or too large; to be told to the peer.
            OSError: the connection is over.
        """
        if self._header is None:
            self._begin(deadline, begun_bytes)
        while self._have < len(self._payload):
            if self._have == self._room:
                self._make_room()
            self._have += self._receive(self._payload[self._have : self._room], deadline)
        assert self._header is not None
        (opcode, is_last, mask), payload = self._header, self._payload
        self._header, self._payload = None, memoryview(b"")
        if mask != _NO_MASK:
            _unmask(payload, mask)
        return opcode, is_last, payload

    def _begin(self, deadline: Deadline, begun_bytes: int) -> None:
        if self._start == self._end:
            self._io.wait_readable(deadline)
        self._fill(2, deadline)
        first, second = self._buffer[self._start], self._buffer[self._start + 1]
        opcode, is_last, is_masked, length = first & 0x0F, first >= 0x80, second >= 0x80, second & 0x7F
        if first & 0x70 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            raise MessageRefused(PROTOCOL_ERROR, "reserved bits or opcode")
        if is_masked == self._is_client:
            raise MessageRefused(PROTOCOL_ERROR, "wrong masking")
        if opcode & CONTROL and (length > LARGEST_CONTROL_BYTES or not is_last):
            raise MessageRefused(PROTOCOL_ERROR, "control frame too long or in parts")
        length_bytes = 0 if length < 126 else 2 if length == 126 else 8
        self._fill(2 + length_bytes + 4 * is_masked, deadline)
        at = self._start + 2 + length_bytes
        if length_bytes:
            length = int.from_bytes(self._buffer[at - length_bytes : at], "big")
        mask = bytes(self._buffer[at : at + 4]) if is_masked else _NO_MASK
        if not opcode & CONTROL and begun_bytes + length > self._max_bytes:
            told = f"message of {begun_bytes + length} bytes; at most {self._max_bytes} are taken"
            raise MessageRefused(MESSAGE_TOO_BIG, told)
        self._start = at + 4 * is_masked
        # Not zeroed as a bytearray would be; and memory that nothing was written to costs nothing.
        self._payload = np.empty(length, np.uint8).data.cast("B")
        self._room = length if opcode & CONTROL or self._admit is None else 0
        if self._room < length:
            self._make_room()
        self._have = min(self._room, self._end - self._start)
        self._payload[: self._have] = memoryview(self._buffer)[self._start : self._start + self._have]
        self._start += self._have
        self._header = (opcode, is_last, mask)

    def _make_room(self) -> None:
        """Asks for the memory of the part of the frame that comes next."""
        count = min(_ADMITTED_BYTES, len(self._payload) - self._room)
        refusal = None if self._admit is None else self._admit(count)
        if refusal:
            raise MessageRefused(TRY_AGAIN_LATER, refusal)
        self._room += count

    def _fill(self, count: int, deadline: Deadline) -> None:
        """Reads until so many bytes are in the buffer."""
        if self._end - self._start >= count:
            return
        if self._start:
            rest = self._buffer[self._start : self._end]
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        while self._end < count:
            self._end += self._receive(memoryview(self._buffer)[self._end :], deadline)

    def _receive(self, view: memoryview, deadline: Deadline) -> int:
        count = self._io.recv_into(view, deadline)
        self.heard_s = time.monotonic()
        return count


class FrameWriter:
    """Frames to a socket; from any thread. No frame comes between the parts of another.

    Control frames are never waited for: they leave at once, or with what is written next. A newer one replaces one of
    its kind that has not left.
    """

    def __init__(self, io: SocketIo, *, is_client: bool) -> None:
        self._io = io
        self._is_client = is_client
        self._lock = threading.Lock()
        self._unsent: List[memoryview] = []  # of a control frame that the socket took a part of
        self._owed: Dict[int, bytes] = {}  # control frames by opcode

    def write(self, payload: Payload, opcode: int, deadline: Deadline) -> None:
        """Sends a message: bytes, or any contiguous memory.

        Raises:
            SilenceError: the peer does not take it in time; the connection is of no use then.
            OSError: the connection is over.
        """
        parts = self._framed(payload, opcode)
        deadline.acquire(self._lock)
        self._finish([*self._unsent, *parts], deadline)

    def start(self, payload: Payload, opcode: int) -> Optional[Callable[[Deadline], None]]:
        """Sends a message as far as the socket takes it.

        Returns:
            None when all of it has left; else a function that sends the rest, to be called once, by any thread. It
            raises as `write` does.
        Raises:
            OSError: the connection is over.
        """
        if not self._lock.acquire(blocking=False):
            return lambda deadline: self.write(payload, opcode, deadline)
        rest: List[memoryview] = []
        try:
            rest = self._io.send_now([*self._unsent, *self._framed(payload, opcode)])
        finally:
            if not rest:
                self._release()
        # The lock goes along.
        return (lambda deadline: self._finish(rest, deadline)) if rest else None

    def control(self, opcode: int, payload: bytes) -> None:
        """Sends a control frame when it can; to a peer that is gone or stuck it does not matter."""
        self._owed[opcode] = payload
        self.flush()

    def flush(self) -> None:
        """Sends what it can of the control frames that are owed, unless another thread writes: it does so when it is
        done.
        """
        while (self._owed or self._unsent) and self._lock.acquire(blocking=False):
            try:
                self._unsent = self._io.send_now(self._unsent)
                for opcode in (PONG, PING, CLOSE):
                    if not self._unsent and opcode in self._owed:
                        self._unsent = self._io.send_now(self._framed(self._owed.pop(opcode), opcode))
            except OSError:  # Whoever reads will hear.
                self._owed.clear()
                self._unsent = []
            finally:
                self._lock.release()
            if self._unsent:
                return

    def _finish(self, parts: List[memoryview], deadline: Deadline) -> None:
        """Sends all of it, and gives the lock back."""
        try:
            while parts := self._io.send_now(parts):
                self._io.wait_writable(deadline)
        finally:
            self._release()

    def _release(self) -> None:
        self._unsent = []
        self._lock.release()
        self.flush()

    def _framed(self, payload: Payload, opcode: int) -> List[memoryview]:
        view = memoryview(payload).cast("B")
        length, mask = len(view), 0x80 if self._is_client else 0
        if length < 126:
            header = struct.pack("!BB", 0x80 | opcode, mask | length)
        elif length < 2**16:
            header = struct.pack("!BBH", 0x80 | opcode, mask | 126, length)
        else:
            header = struct.pack("!BBQ", 0x80 | opcode, mask | 127, length)
        return [memoryview(header + _NO_MASK if mask else header), view]


def _unmask(payload: memoryview, mask: bytes) -> None:
    """In place, eight bytes at a time."""
    whole = len(payload) // 8 * 8
    np.frombuffer(payload[:whole], np.uint64)[:] ^= np.frombuffer(mask * 2, np.uint64)
    rest = np.frombuffer(payload[whole:], np.uint8)
    rest[:] ^= np.frombuffer((mask * 2)[: len(rest)], np.uint8)
