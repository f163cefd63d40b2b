"""The connection of a client: kept alive while the robot thinks, and ended by `close` from any thread."""

import logging
import threading
import weakref
from typing import Optional

from openpi_client.stream import MessageStream, StreamClosed

logger = logging.getLogger(__name__)

# Servers give up on a client that leaves a ping unanswered for 20 s.
_ATTEND_INTERVAL_S = 5.0
# For a server to answer the goodbye.
GOODBYE_S = 1.0


class Channel:
    """At most one connection at a time.

    Attributes:
        lock: held by whoever uses the connection.
        closed: set for good by `close`.
        stream: the connection, if there is one.
    """

    def __init__(self, place: str) -> None:
        """
        Args:
            place: the server's address, for messages.
        """
        self.place = place
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.stream: Optional[MessageStream] = None
        threading.Thread(
            target=_attend_often, args=(weakref.ref(self), self.closed), name="openpi-attendant", daemon=True
        ).start()

    def check(self) -> None:
        """Raises ConnectionError when the client was closed."""
        if self.closed.is_set():
            raise ConnectionError(f"this client of {self.place} was closed")

    def open_stream(self) -> MessageStream:
        """The connection.

        Raises:
            StreamClosed: there is none.
        """
        if self.stream is None:
            raise StreamClosed(1006, "the connection is over")
        return self.stream

    def use(self, stream: MessageStream) -> None:
        """From now on, this connection. Raises as `check`."""
        self.stream = stream
        if self.closed.is_set():  # Whoever closed it may have missed the stream.
            self.drop()
        self.check()

    def drop(self, goodbye_s: float = 0.0) -> None:
        """Ends the connection, if there is one.

        Args:
            goodbye_s: how long to wait for the server's; 0 says it all the same.
        """
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.hang_up(goodbye_s)

    def attend(self) -> None:
        """Answers the server's pings, and notices when it has left."""
        if self.stream is None:
            return
        try:
            self.stream.attend()
        except StreamClosed as dropped:
            if not self.closed.is_set():
                logger.warning("The connection to %s dropped while it was idle (%s)", self.place, dropped)
            self.drop()

    def close(self, goodbye_s: float = GOODBYE_S) -> None:
        """Ends the connection for good; a thread that waits in an exchange fails at once."""
        self.closed.set()
        if not self.lock.acquire(blocking=False):
            stream = self.stream
            if stream is not None:
                stream.abort()
            if not self.lock.acquire(timeout=GOODBYE_S):
                return  # This thread itself holds it (a signal handler, say), and will drop the connection.
        try:
            self.drop(goodbye_s)
        finally:
            self.lock.release()


def _attend_often(reference: "weakref.ref[Channel]", closed: threading.Event) -> None:
    """While a client asks, it attends by itself."""
    while not closed.wait(_ATTEND_INTERVAL_S):
        channel = reference()
        if channel is None:
            return
        if channel.lock.acquire(blocking=False):
            try:
                channel.attend()
            finally:
                channel.lock.release()
        del channel
