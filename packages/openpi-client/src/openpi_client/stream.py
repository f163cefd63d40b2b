"""Websocket messages over a connected socket, after the handshake: what both ends of the openpi protocols need.

Blocking, without a thread or an event loop, so that a message costs no hand-over: arrays go from the sender's memory
into the socket, and from the socket into the memory that they are read from. RFC 6455 without extensions. A client's
frames are masked with zeros: masks keep scripts in browsers from fooling caches, and a robot runs no foreign scripts.
"""

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from typing import Any, Callable, List, Optional, Tuple, Union

import numpy as np

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA

_CONTROL = 0x8
_LARGEST_CONTROL_BYTES = 125
_BUFFER_BYTES = 2**16
_NO_MASK = bytes(4)
_SHORTEST_S = 0.001
_DRAIN_SILENCE_S = 1.0
MESSAGE_TOO_BIG = 1009
TRY_AGAIN_LATER = 1013
_PROTOCOL_ERROR, _BAD_TEXT, _ABNORMAL, _NO_CODE = 1002, 1007, 1006, 1005

Message = Union[memoryview, str]


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


class SilenceError(TimeoutError):
    """Nothing came for the whole timeout; the stream can go on."""


class MessageStream:
    """One connection. One thread reads; any thread writes."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        is_client: bool,
        received: bytes = b"",
        max_message_bytes: Optional[int] = None,
        admit: Optional[Callable[[int], Optional[str]]] = None,
    ) -> None:
        """
        Args:
            received: what came behind the handshake already.
            admit: asked before so many bytes of a message are received; the reason it gives, if any, ends the
                connection with code 1013.
            max_message_bytes: a larger message ends the connection with code 1009; None = no limit.
        """
        is_plain = hasattr(sock, "sendmsg") and not isinstance(sock, ssl.SSLSocket)
        self._io = _PlainIo(sock) if is_plain else _PollingIo(sock)
        self._socket = sock
        self._is_client = is_client
        self._max_bytes = max_message_bytes
        self._admit = admit
        self._buffer = bytearray(max(_BUFFER_BYTES, len(received)))
        self._buffer[: len(received)] = received
        self._start, self._end = 0, len(received)
        self._write_lock = threading.Lock()
        self._parts: List[memoryview] = []  # of a message in several frames
        self._parts_opcode = 0
        self._pending: Optional[Tuple[memoryview, int]] = None  # a payload on its way, and how much of it is there
        self._frame: Optional[Tuple[int, bool, bytes]] = None
        self._close_sent = False
        self._num_answers = 0  # frames since the last ping
        self.is_open = True

    def read(self, timeout_s: Optional[float] = None, *, deadline_s: Optional[float] = None) -> Message:
        """The next message; pings are answered meanwhile. A binary one is read-only memory of its own.

        Args:
            deadline_s: on the clock of `time.monotonic`, instead of `timeout_s`; pings do not move it.
        Raises:
            SilenceError: nothing at all came for `timeout_s`; what is there of a message is kept.
            StreamClosed: the peer closed the connection, went away, or broke the protocol.
        """
        while True:
            if deadline_s is not None:
                timeout_s = max(_SHORTEST_S, deadline_s - time.monotonic())
            opcode, is_last, payload = self._read_frame(timeout_s)
            if opcode & _CONTROL:
                self._control(opcode, payload)
            elif opcode == CONTINUATION or not is_last or self._parts_opcode:
                whole = self._continued(opcode, is_last, payload)
                if whole is not None:
                    return whole
            else:
                return self._message(opcode, payload)

    def attend(self) -> None:
        """Answers what came while nobody read: pings, or the end. Does not wait; drops messages that nobody asked for.

        Raises:
            StreamClosed: as of `read`.
        """
        with contextlib.suppress(SilenceError):
            while self._start < self._end or self._io.is_readable():
                self.read(_SHORTEST_S)

    def write(self, payload: Any, opcode: int = BINARY, timeout_s: Optional[float] = None) -> None:
        """Sends a message: bytes, or any contiguous memory.

        Raises:
            StreamClosed: the connection is over, or the peer took nothing for `timeout_s`.
        """
        with self._write_lock:
            self._write_rest(self._framed(payload, opcode), timeout_s)

    def start_write(self, payload: Any, opcode: int = BINARY) -> Optional[Callable[[float], None]]:
        """Sends a message as far as a slow peer lets it, without waiting.

        Returns:
            None when all of it has left; else a function that sends the rest within so many seconds, to be called
            once, by any thread. It raises as `write` does.
        Raises:
            StreamClosed: the connection is over.
        """
        if not self._write_lock.acquire(blocking=False):
            return lambda timeout_s: self.write(payload, opcode, timeout_s)
        rest: List[memoryview] = []
        try:
            rest = self._send_now(self._framed(payload, opcode))
        finally:
            if not rest:
                self._write_lock.release()
        # The lock goes along: nothing may come between the parts of a frame.
        return (lambda timeout_s: self._write_behind(rest, timeout_s)) if rest else None

    def ping(self) -> None:
        """Asks for a sign of life; `has_answered` says whether anything came since."""
        self._num_answers = 0
        self._write_quietly(b"", PING)

    def has_answered(self) -> bool:
        return self._num_answers > 0

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Says goodbye; `read` then goes on until the peer has answered."""
        if not self._close_sent:
            self._close_sent = True
            self._write_quietly(struct.pack("!H", code) + reason.encode()[: _LARGEST_CONTROL_BYTES - 2], CLOSE)

    def hang_up(self, timeout_s: float = 1.0) -> None:
        """Says goodbye, waits for the answer so long at most, and closes the socket. The peer may be gone already."""
        if self.is_open:
            self.close()
            deadline_s = time.monotonic() + timeout_s
            with contextlib.suppress(StreamClosed, SilenceError):
                while time.monotonic() < deadline_s:
                    self.read(deadline_s=deadline_s)
        self.is_open = False
        self._socket.close()

    def drain(self, timeout_s: float) -> None:
        """Drops what a peer still sends that we have ended the connection with, until it has left or is silent.

        Bytes that nobody takes make the kernel reset the connection, and the peer would never read why it was ended.
        """
        scratch = memoryview(bytearray(_BUFFER_BYTES))
        deadline_s = time.monotonic() + timeout_s
        with contextlib.suppress(OSError):  # silence, too
            while (left_s := deadline_s - time.monotonic()) > 0:
                self._io.recv_into(scratch, min(left_s, _DRAIN_SILENCE_S))

    def abort(self) -> None:
        """Ends the connection at once; wakes a thread that reads."""
        self.is_open = False
        with contextlib.suppress(OSError):  # It is gone already.
            self._socket.shutdown(socket.SHUT_RDWR)

    # Reading

    def _read_frame(self, timeout_s: Optional[float]) -> Tuple[int, bool, memoryview]:
        """The next frame; continues where a timeout interrupted it."""
        try:
            if self._pending is None:
                self._begin_frame(timeout_s)
            assert self._pending is not None and self._frame is not None
            payload, have = self._pending
            while have < len(payload):
                have += self._io.recv_into(payload[have:], timeout_s)
                self._pending = (payload, have)
        except OSError as error:
            if isinstance(error, (SilenceError, StreamClosed)):
                raise
            self.is_open = False
            raise StreamClosed(_ABNORMAL, f"the connection was lost: {error}") from error
        self._num_answers += 1
        opcode, is_last, mask = self._frame
        self._pending = self._frame = None
        if mask != _NO_MASK:
            _unmask(payload, mask)
        return opcode, is_last, payload

    def _begin_frame(self, timeout_s: Optional[float]) -> None:
        self._fill(2, timeout_s)
        first, second = self._buffer[self._start], self._buffer[self._start + 1]
        length = second & 0x7F
        size = 2 + (2 if length == 126 else 8 if length == 127 else 0) + (4 if second & 0x80 else 0)
        self._fill(size, timeout_s)
        at = self._start + 2
        if length == 126:
            (length,) = struct.unpack_from("!H", self._buffer, at)
            at += 2
        elif length == 127:
            (length,) = struct.unpack_from("!Q", self._buffer, at)
            at += 8
        mask = bytes(self._buffer[at : at + 4]) if second & 0x80 else _NO_MASK
        opcode = first & 0x0F
        self._check_header(first, bool(second & 0x80), opcode, length)
        self._start += size
        # Not zeroed as a bytearray would be.
        payload = np.empty(length, np.uint8).data.cast("B")
        have = min(length, self._end - self._start)
        payload[:have] = memoryview(self._buffer)[self._start : self._start + have]
        self._start += have
        self._frame = (opcode, bool(first & 0x80), mask)
        self._pending = (payload, have)

    def _check_header(self, first: int, is_masked: bool, opcode: int, length: int) -> None:
        if first & 0x70 or opcode not in (CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG):
            self._fail(_PROTOCOL_ERROR, "reserved bits or opcode")
        if is_masked == self._is_client:
            self._fail(_PROTOCOL_ERROR, "wrong masking")
        if opcode & _CONTROL and (length > _LARGEST_CONTROL_BYTES or not first & 0x80):
            self._fail(_PROTOCOL_ERROR, "control frame too long or in parts")
        total = length + sum(len(part) for part in self._parts)
        if self._max_bytes is not None and total > self._max_bytes:
            self._fail(MESSAGE_TOO_BIG, f"message of {total} bytes; at most {self._max_bytes} are taken")
        if not opcode & _CONTROL and (opcode == CONTINUATION) != bool(self._parts_opcode):
            self._fail(_PROTOCOL_ERROR, "continuation of no message, or a message within another")
        refusal = self._admit(length) if self._admit is not None and not opcode & _CONTROL else None
        if refusal:
            self._fail(TRY_AGAIN_LATER, refusal)

    def _fill(self, count: int, timeout_s: Optional[float]) -> None:
        """Reads until so many bytes are in the buffer."""
        if self._end - self._start >= count:
            return
        if self._start:
            rest = self._buffer[self._start : self._end]
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        while self._end < count:
            self._end += self._io.recv_into(memoryview(self._buffer)[self._end :], timeout_s)

    def _continued(self, opcode: int, is_last: bool, payload: memoryview) -> Optional[Message]:
        self._parts_opcode = self._parts_opcode or opcode
        self._parts.append(payload)
        if not is_last:
            return None
        whole, opcode = memoryview(b"".join(self._parts)), self._parts_opcode
        self._parts, self._parts_opcode = [], 0
        return self._message(opcode, whole)

    def _message(self, opcode: int, payload: memoryview) -> Message:
        if opcode == BINARY:
            return payload.toreadonly()
        try:
            return str(payload, "utf-8")
        except UnicodeDecodeError:
            self._fail(_BAD_TEXT, "text is not UTF-8")
            raise AssertionError("unreachable") from None

    def _control(self, opcode: int, payload: memoryview) -> None:
        if opcode == PING:
            self._write_quietly(bytes(payload), PONG)
        elif opcode == CLOSE:
            code, reason = _NO_CODE, ""
            if len(payload) >= 2:
                (code,) = struct.unpack_from("!H", payload)
                reason = str(payload[2:], "utf-8", "replace")
            if not self._close_sent:
                self._close_sent = True
                self._write_quietly(bytes(payload[:2]), CLOSE)
            self.is_open = False
            raise StreamClosed(code, reason)

    def _fail(self, code: int, reason: str) -> None:
        self.close(code, reason)
        self.is_open = False
        raise MessageRefused(code, reason)

    # Writing

    def _framed(self, payload: Any, opcode: int) -> List[memoryview]:
        view = memoryview(payload).cast("B")
        length, mask = len(view), 0x80 if self._is_client else 0
        if length < 126:
            header = struct.pack("!BB", 0x80 | opcode, mask | length)
        elif length < 2**16:
            header = struct.pack("!BBH", 0x80 | opcode, mask | 126, length)
        else:
            header = struct.pack("!BBQ", 0x80 | opcode, mask | 127, length)
        return [memoryview(header + _NO_MASK if mask else header), view]

    def _send_now(self, parts: List[memoryview]) -> List[memoryview]:
        """What the socket's buffer did not take."""
        if not self.is_open:
            raise StreamClosed(_ABNORMAL, "the connection is over")
        try:
            while parts:
                sent = self._io.send_now(parts)
                if sent == 0:
                    break
                parts = _without(parts, sent)
            return parts
        except OSError as error:
            self.is_open = False
            raise StreamClosed(_ABNORMAL, f"the connection was lost: {error}") from error

    def _write_rest(self, parts: List[memoryview], timeout_s: Optional[float]) -> None:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            parts = self._send_now(parts)
            if not parts:
                return
            left_s = None if deadline_s is None else deadline_s - time.monotonic()
            if (left_s is not None and left_s <= 0) or not self._io.wait_writable(left_s):
                self.abort()
                raise StreamClosed(_ABNORMAL, f"the peer took nothing for {timeout_s} s")

    def _write_behind(self, rest: List[memoryview], timeout_s: float) -> None:
        try:
            self._write_rest(rest, timeout_s)
        finally:
            self._write_lock.release()

    def _write_quietly(self, payload: bytes, opcode: int) -> None:
        """Control frames: to a peer that is gone or stuck they do not matter."""
        if not self._write_lock.acquire(timeout=1.0):
            return
        try:
            self._write_rest(self._framed(payload, opcode), 1.0)
        except StreamClosed:
            pass
        finally:
            self._write_lock.release()


class _PlainIo:
    """A TCP socket, blocking; timeouts by the kernel, so that reading needs no second system call."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        self._socket = sock
        self._timeout_s: Optional[float] = None

    def recv_into(self, view: memoryview, timeout_s: Optional[float]) -> int:
        if timeout_s != self._timeout_s:
            whole, part = divmod(timeout_s or 0.0, 1)
            value = struct.pack(
                "ll", int(whole), max(int(part * 1e6), 1) if timeout_s and not whole else int(part * 1e6)
            )
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            self._timeout_s = timeout_s
        try:
            count = self._socket.recv_into(view)
        except BlockingIOError:
            raise SilenceError(f"nothing came for {timeout_s} s") from None
        if count == 0:
            raise ConnectionResetError("the peer went away")
        return count

    def send_now(self, parts: List[memoryview]) -> int:
        try:
            return self._socket.sendmsg(parts, [], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0

    def wait_writable(self, timeout_s: Optional[float]) -> bool:
        return bool(select.select([], [self._socket], [], timeout_s)[1])

    def is_readable(self) -> bool:
        return bool(select.select([self._socket], [], [], 0)[0])


class _PollingIo:
    """An encrypted socket: OpenSSL lets one thread at a time use it, so nobody waits inside of it. Also any socket of a
    system without `sendmsg` (Windows).
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(0.0)
        self._socket = sock
        self._lock = threading.Lock()

    def recv_into(self, view: memoryview, timeout_s: Optional[float]) -> int:
        while True:
            try:
                with self._lock:
                    count = self._socket.recv_into(view)
            except (ssl.SSLWantReadError, BlockingIOError):
                if not select.select([self._socket], [], [], timeout_s)[0]:
                    raise SilenceError(f"nothing came for {timeout_s} s") from None
            except ssl.SSLWantWriteError:
                self.wait_writable(timeout_s)
            else:
                if count == 0:
                    raise ConnectionResetError("the peer went away")
                return count

    def send_now(self, parts: List[memoryview]) -> int:
        try:
            with self._lock:
                return self._socket.send(parts[0])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
            return 0

    def wait_writable(self, timeout_s: Optional[float]) -> bool:
        return bool(select.select([], [self._socket], [], timeout_s)[1])

    def is_readable(self) -> bool:
        waits_inside = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0
        return waits_inside or bool(select.select([self._socket], [], [], 0)[0])


def _without(parts: List[memoryview], count: int) -> List[memoryview]:
    """The parts behind the first `count` bytes."""
    while parts and count >= len(parts[0]):
        count -= len(parts[0])
        parts = parts[1:]
    return [parts[0][count:], *parts[1:]] if parts and count else parts


def _unmask(payload: memoryview, mask: bytes) -> None:
    """In place, eight bytes at a time."""
    whole = len(payload) // 8 * 8
    np.frombuffer(payload[:whole], np.uint64)[:] ^= np.frombuffer(mask * 2, np.uint64)
    rest = np.frombuffer(payload[whole:], np.uint8)
    rest[:] ^= np.frombuffer((mask * 2)[: len(rest)], np.uint8)
