"""One session from its model to its goodbye: each message goes through the model, and its answer back to the client."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from openpi.serving.batching import Job, NotWantedError
from openpi.serving.catalog import Catalog
from openpi.serving.connection import Connection
from openpi.serving.errors import UnknownModelError, error_number, error_text, is_explained
from openpi.serving.frames import Binary, Frame
from openpi.serving.live import LiveSession
from openpi.serving.metrics import Metrics
from openpi.serving.model_slot import ModelPool, ModelSlot, StoppingError
from openpi.serving.openpi_session import OpenpiSession
from openpi.serving.positronic_session import PositronicSession
from openpi.serving.recording import SessionLog, SessionRecorder
from openpi.shared.errors import MissingKeyError
from openpi_client import msgpack_numpy
from openpi_client.stream import MessageRefused, StreamClosed

logger = logging.getLogger("openpi")

Session = OpenpiSession | PositronicSession


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A connection that speaks a protocol. `run` once, in the connection's thread.

    Attributes:
        opening_of: what a client of this protocol and model is told at the start.
        recorder: writes what is asked and answered.
    """

    connection: Connection
    session: Session
    pool: ModelPool
    metrics: Metrics
    opening_of: Callable[[Session, ModelSlot], Mapping[str, Any]]
    recorder: SessionRecorder | None

    def run(self, requested: str | None) -> None:
        """Until the client leaves or is sent away.

        Args:
            requested: the model it asks for; None = the default.
        """
        connection, session = self.connection, self.session

        def report(status: str, message: str) -> None:
            connection.read_ahead()
            connection.send(session.loading(status, message))

        try:
            with self.pool.lease(_resolve(self.pool.catalog, requested), report) as slot:
                connection.stop_reading_ahead()
                self._converse(slot)
        except MessageRefused as refused:
            logger.warning("A message of %s was refused, which ends its session: %s", connection.address, refused)
            connection.drain()
        except StreamClosed:
            pass  # A client that leaves, or takes nothing any more, is no error.
        except StoppingError:
            connection.stop_reading_ahead()
            connection.say_goodbye()
        except Exception as error:
            connection.stop_reading_ahead()
            number = _log_failure(error, connection.address, "connection")
            with contextlib.suppress(StreamClosed):
                connection.send(session.refused(error, number))
        finally:
            connection.stop_reading_ahead()
        connection.wait_closed()

    def _converse(self, slot: ModelSlot) -> None:
        connection, session = self.connection, self.session
        live = LiveSession(connection.number, session.protocol, slot.model_id, connection.address)
        opening = self.opening_of(session, slot)
        connection.live = live
        if connection.is_stopping:
            raise StoppingError
        with self._log(live, opening) as log:
            connection.send(session.opening(opening, time.monotonic()))
            while True:
                message = connection.next_message()
                # One exchange at a time: a client that does not wait is answered in order.
                connection.turn.acquire()
                if connection.is_over:
                    connection.turn.release()
                    return
                _begin(_Exchange(self.metrics, connection, session, slot, live, log, message))
                del message

    @contextlib.contextmanager
    def _log(self, live: LiveSession, opening: Mapping[str, Any]) -> Iterator[SessionLog | None]:
        if self.recorder is None:
            yield None
            return
        log = self.recorder.open(live, opening)
        try:
            yield log
        finally:
            with self.connection.turn:  # What the model still works on belongs to it.
                log.close()


@dataclasses.dataclass
class _Exchange:
    """One message on its way through the model, and back to the client. Its methods run in the model's thread."""

    metrics: Metrics
    connection: Connection
    session: Session
    slot: ModelSlot
    live: LiveSession
    log: SessionLog | None
    message: memoryview | str
    observations: list[dict] = dataclasses.field(default_factory=list)
    results: Any = ()
    start_s: float = dataclasses.field(default_factory=time.perf_counter)

    def is_wanted(self) -> bool:
        return self.connection.is_open

    def decode(self) -> list[dict]:
        self.observations = self.session.received(self.message)
        return self.observations

    def encode(self, results: Any, infer_s: float) -> list[Frame]:
        self.results = results
        return self.session.replied(results, infer_s)

    def done(self, frames: list[Frame] | None, error: BaseException | None) -> None:
        """Sends the answer, errors included."""
        try:
            if error is not None:
                frames = [] if isinstance(error, NotWantedError) else self._failed(error)
            else:
                self._note(frames or [])
            self.session.sent(time.monotonic())
        except Exception:
            logger.exception("A request of %s cannot be noted", self.connection.address)
        try:
            self.connection.send_soon(frames or [])
        except StreamClosed:
            self.connection.end_turn()

    def _failed(self, error: BaseException) -> list[Frame]:
        number = _log_failure(error, self.connection.address, "request")
        self.live.failed(error_text(error))
        seconds = self._count("refused" if is_explained(error) else "failed")
        if self.log and self.session.request is not None:
            answer = {"error": f"{type(error).__name__}: {error_text(error)}"}
            self.log.write(self.session.request, [msgpack_numpy.Packer().pack(answer)], seconds)
        return self.session.failed(error, number)

    def _note(self, frames: list[Frame]) -> None:
        seconds = self._count("ok")
        self.live.answered(self.observations, self.results, seconds)
        if any(isinstance(result, dict) and result.get("warnings") for result in self.results):
            self.metrics.warned(self.slot.model_id)
        if self.log:
            self.log.write(self.session.request, [frame.data for frame in frames if isinstance(frame, Binary)], seconds)

    def _count(self, outcome: str) -> float:
        seconds = time.perf_counter() - self.start_s
        self.metrics.answered(
            self.slot.model_id, self.session.protocol, outcome, num_bytes=len(self.message), seconds=seconds
        )
        return seconds


def _begin(exchange: _Exchange) -> None:
    exchange.session.request = None  # That of the message before would be taken for this one's, if it cannot be read.
    job = Job(exchange.decode, exchange.encode, exchange.is_wanted)
    try:
        exchange.slot.thread.submit(job, exchange.done)
    except Exception as error:
        exchange.done(None, error)


def _resolve(catalog: Catalog, requested: str | None) -> str:
    try:
        return catalog.resolve(requested)
    except UnknownModelError:
        raise
    except (ValueError, OSError) as error:
        raise UnknownModelError(requested) from error


def _log_failure(error: BaseException, address: str, what: str) -> str:
    """Logs what a client was not told; returns the number that it was told."""
    if is_explained(error) and not isinstance(error, MissingKeyError):
        logger.error("A %s of %s was refused: %s", what, address, error)
        logger.debug("", exc_info=error)
        return ""
    number = error_number()
    # A missing key may be the recipe's fault as well.
    logger.error("A %s of %s failed (error %s)", what, address, number, exc_info=error)
    return number
