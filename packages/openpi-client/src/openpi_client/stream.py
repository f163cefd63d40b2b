"""Websocket messages over a connected socket, after the handshake: what both ends of the openpi protocols need.

Blocking, without a thread or an event loop, so that a message costs no hand-over. Whatever takes a time takes it as the
limit of the whole call: bytes that trickle, and pings, do not extend it.
"""

import contextlib
import socket
import struct
import time
from typing import Callable, List, NoReturn, Optional, TypeVar, Union

from openpi_client import frames
from openpi_client.deadline import Deadline, SilenceError
from openpi_client.frames import BINARY, MESSAGE_TOO_BIG, MessageRefused, Payload, StreamClosed
from openpi_client.socket_io import SocketIo
from openpi_client.sockets import set_keepalive

DEFAULT_MAX_MESSAGE_BYTES = 2**28

Message = Union[memoryview, str]
_T = TypeVar("_T")

# Beside as many parts, a message in parts has one for each kB. Some libraries send parts of 4 kB.
_FREE_PARTS = 1024
_BYTES_PER_PART = 1024
# Both protocols speak in binary; text tells what went wrong. Decoding it cannot be interrupted: 100 MB take seconds.
_MAX_TEXT_BYTES = 2**20
# Pings and pongs of a peer: so many at once, and so many a second.
_CONTROL_BURST = 500.0
_CONTROL_PER_S = 200.0
# What came while nobody read is there at once.
_ATTEND_S = 0.001
_DRAIN_SILENCE_S = 1.0
_SCRATCH_BYTES = 2**16


class MessageStream:
    """One connection. One thread reads; any thread writes."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        is_client: bool,
        received: bytes = b"",
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        admit: Optional[Callable[[int], Optional[str]]] = None,
    ) -> None:
        """
        Args:
            received: what came behind the handshake already.
            max_message_bytes: a larger message ends the connection with code 1009.
            admit: asked before so many bytes of a message are received, part by part; the reason it gives, if any, ends
                the connection with code 1013.
        """
        set_keepalive(sock)
        self._socket = sock
        self._io = SocketIo(sock)
        self._reader = frames.FrameReader(
            self._io, is_client=is_client, received=received, max_bytes=max_message_bytes, admit=admit
        )
        self._writer = frames.FrameWriter(self._io, is_client=is_client)
        self._parts: List[memoryview] = []  # of a message in several frames
        self._parts_opcode = self._parts_bytes = 0
        self._control_budget = _CONTROL_BURST
        self._control_s = time.monotonic()
        self._close_sent = False
        self.is_open = True

    def read(self, timeout_s: Optional[float] = None) -> Message:
        """The next message; pings are answered meanwhile. A binary one is read-only memory of its own.

        Raises:
            SilenceError: it is not whole within `timeout_s`; what is there of it is kept.
            StreamClosed: the peer closed the connection, went away, or broke the protocol.
        """
        deadline = Deadline(timeout_s)
        self._writer.flush()
        while True:
            try:
                deadline.check()
                opcode, is_last, payload = self._reader.read(deadline, self._parts_bytes)
            except SilenceError:
                raise
            except MessageRefused as refused:
                self._fail(refused.code, refused.reason)
            except OSError as error:
                self.is_open = False
                raise StreamClosed(frames.ABNORMAL, f"the connection was lost: {error}") from error
            if opcode & frames.CONTROL:
                self._control(opcode, bytes(payload))
                continue
            message = self._message(opcode, is_last, payload)
            if message is not None:
                return message

    def attend(self) -> None:
        """Answers what came while nobody read: pings, or the end. Does not wait.

        Raises:
            StreamClosed: as of `read`; also for a message: nobody asked for it, and what is asked next would get it.
        """
        try:
            while self._reader.has_bytes() or self._io.is_readable():
                self.read(_ATTEND_S)
                self._fail(frames.POLICY_VIOLATION, "a message that nobody asked for")
        except SilenceError:
            if self.is_within_message():
                self._fail(frames.POLICY_VIOLATION, "a message that nobody asked for")

    def is_within_message(self) -> bool:
        """Whether a part of a message has come."""
        return bool(self._parts_opcode) or self._reader.is_within_message()

    def silence_s(self) -> float:
        """For how long nothing at all has come."""
        return time.monotonic() - self._reader.heard_s

    def write(self, payload: Payload, opcode: int = BINARY, timeout_s: Optional[float] = None) -> None:
        """Sends a message: bytes, or any contiguous memory.

        Raises:
            StreamClosed: the connection is over, or the peer has not taken all of it within `timeout_s`.
        """
        self._check_open()
        self._sent(self._writer.write, payload, opcode, Deadline(timeout_s))

    def start_write(self, payload: Payload, opcode: int = BINARY) -> Optional[Callable[[float], None]]:
        """Sends a message as far as a slow peer lets it, without waiting.

        Returns:
            None when all of it has left; else a function that sends the rest within so many seconds, to be called
            once, by any thread. It raises as `write` does.
        Raises:
            StreamClosed: the connection is over.
        """
        self._check_open()
        rest = self._sent(self._writer.start, payload, opcode)
        return None if rest is None else lambda timeout_s: self._sent(rest, Deadline(timeout_s))

    def ping(self) -> None:
        """Asks for a sign of life; `silence_s` says whether anything comes."""
        self._writer.control(frames.PING, b"")

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Says goodbye, without waiting; `read` then goes on until the peer has answered."""
        if not self._close_sent:
            self._close_sent = True
            text = reason.encode()[: frames.LARGEST_CONTROL_BYTES - 2].decode(errors="ignore")
            self._writer.control(frames.CLOSE, struct.pack("!H", code) + text.encode())

    def hang_up(self, timeout_s: float = 1.0) -> None:
        """Says goodbye, waits for the answer so long at most, and closes the socket. The peer may be gone already."""
        deadline = Deadline(timeout_s)
        if self.is_open:
            self.close()
            with contextlib.suppress(StreamClosed, SilenceError):
                while True:
                    self.read(deadline.left_s())
        self.is_open = False
        self._socket.close()

    def drain(self, timeout_s: float) -> None:
        """Drops what a peer still sends that we have ended the connection with, until it has left or is silent.

        Bytes that nobody takes make the kernel reset the connection, and the peer would never read why it was ended.
        """
        scratch = memoryview(bytearray(_SCRATCH_BYTES))
        deadline = Deadline(timeout_s)
        with contextlib.suppress(OSError):  # silence, too
            while True:
                self._io.recv_into(scratch, deadline.sooner(_DRAIN_SILENCE_S))

    def abort(self) -> None:
        """Ends the connection at once; wakes a thread that reads or writes."""
        self.is_open = False
        with contextlib.suppress(OSError):  # It is gone already.
            # The TLS socket's own `shutdown` would take the state away under the thread that reads.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    # Reading

    def _message(self, opcode: int, is_last: bool, payload: memoryview) -> Optional[Message]:
        """What a frame completes, if it is the last of its message."""
        if (opcode == frames.CONTINUATION) != bool(self._parts_opcode):
            self._fail(frames.PROTOCOL_ERROR, "continuation of no message, or a message within another")
        if self._parts_opcode or not is_last:
            self._parts_opcode = self._parts_opcode or opcode
            self._parts.append(payload)
            self._parts_bytes += len(payload)
            if len(self._parts) > _FREE_PARTS + self._parts_bytes // _BYTES_PER_PART:
                told = f"a message of {self._parts_bytes} bytes in {len(self._parts)} parts"
                self._fail(frames.POLICY_VIOLATION, told)
            if not is_last:
                return None
            opcode, payload = self._parts_opcode, memoryview(b"".join(self._parts))
            self._parts, self._parts_opcode, self._parts_bytes = [], 0, 0
        if opcode == BINARY:
            return payload.toreadonly()
        if len(payload) > _MAX_TEXT_BYTES:
            self._fail(MESSAGE_TOO_BIG, f"text of {len(payload)} bytes; at most {_MAX_TEXT_BYTES} are taken")
        try:
            return str(payload, "utf-8")
        except UnicodeDecodeError:
            self._fail(frames.BAD_TEXT, "text is not UTF-8")

    def _control(self, opcode: int, payload: bytes) -> None:
        self._count_control()
        if opcode == frames.PING:
            self._writer.control(frames.PONG, payload)
        elif opcode == frames.CLOSE:
            if len(payload) == 1:
                self._fail(frames.PROTOCOL_ERROR, "half a close code")
            code = struct.unpack_from("!H", payload)[0] if payload else frames.NO_CODE
            if not self._close_sent:
                self._close_sent = True
                self._writer.control(frames.CLOSE, payload[:2])
            self.is_open = False
            raise StreamClosed(code, str(payload[2:], "utf-8", "replace"))

    def _count_control(self) -> None:
        now_s = time.monotonic()
        earned = (now_s - self._control_s) * _CONTROL_PER_S
        self._control_budget = min(_CONTROL_BURST, self._control_budget + earned) - 1
        self._control_s = now_s
        if self._control_budget < 0:
            self._fail(frames.POLICY_VIOLATION, f"more than {_CONTROL_PER_S:.0f} pings or pongs a second")

    def _fail(self, code: int, reason: str) -> NoReturn:
        self.close(code, reason)
        self.is_open = False
        raise MessageRefused(code, reason)

    # Writing

    def _check_open(self) -> None:
        if not self.is_open:
            raise StreamClosed(frames.ABNORMAL, "the connection is over")

    def _sent(self, send: Callable[..., _T], *arguments: object) -> _T:
        """A message that has not left means that the connection is over, since a part of it may have."""
        try:
            return send(*arguments)
        except OSError as error:
            self.abort()
            what = "the peer took nothing more" if isinstance(error, SilenceError) else "the connection was lost"
            raise StreamClosed(frames.ABNORMAL, f"{what}: {error}") from error
