"""One session from its model to its goodbye: each message is decoded and prepared in the session's thread, goes through
the model, and its answer back to the client.
"""

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from openpi.policies.images import looked_at_once
from openpi.serving import wire
from openpi.serving.access import Limits
from openpi.serving.catalog import Catalog
from openpi.serving.client_log import ClientLog
from openpi.serving.connection import Connection
from openpi.serving.errors import ServerBusyError, UnknownModelError, error_number, error_text, is_explained
from openpi.serving.frames import Binary, Frame
from openpi.serving.live import LiveSession
from openpi.serving.long_work import LongWork
from openpi.serving.memory import SessionMemory
from openpi.serving.metrics import Metrics
from openpi.serving.model_slot import ModelPool, ModelSlot, StoppingError
from openpi.serving.model_thread import Answers, Item, Job, NotWantedError, Result
from openpi.serving.protocols import Session
from openpi.serving.recording import SessionLog, SessionRecorder
from openpi.serving.watching import Watching
from openpi.shared.errors import MissingKeyError
from openpi_client import msgpack_numpy
from openpi_client.stream import MessageRefused, StreamClosed

# Forgetting a longer message takes longer than the model's thread should be away.
_SHORT_BYTES = 2**23
# An answer of actions alone is far smaller.
_SMALL_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A connection that speaks a protocol. `run` once, in the connection's thread.

    Attributes:
        opening_of: what a client of this protocol and model is told at the start.
        recorder: writes what is asked and answered.
        memory: that the messages take.
        client_log: for what goes wrong.
        keeps_time: the client's world moves while the clock runs.
    """

    connection: Connection
    session: Session
    pool: ModelPool
    metrics: Metrics
    opening_of: Callable[[Session, ModelSlot], Mapping[str, Any]]
    recorder: SessionRecorder | None
    limits: Limits
    memory: SessionMemory
    client_log: ClientLog
    keeps_time: bool = True

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
            text = f"A message of {connection.address} was refused, which ends its session: {refused}"
            self.client_log.write(logging.WARNING, connection.address, text)
            connection.drain()
        except StreamClosed:
            pass  # A client that leaves, or takes nothing any more, is no error.
        except StoppingError:
            connection.stop_reading_ahead()
            connection.say_goodbye()
        except Exception as error:
            connection.stop_reading_ahead()
            number = _log_failure(self.client_log, error, connection.address, "connection")
            with contextlib.suppress(StreamClosed):
                connection.send(session.refused(error, number))
        finally:
            connection.stop_reading_ahead()
        connection.wait_closed()

    def _converse(self, slot: ModelSlot) -> None:
        connection, session = self.connection, self.session
        watching = Watching(
            slot.policy,
            self.client_log,
            connection.address,
            is_strict=self.limits.refuses_suspicious,
            keeps_time=self.keeps_time,
        )
        live = LiveSession(connection.number, session.protocol, slot.model_id, connection.address, watching.averages)
        opening = self.opening_of(session, slot)
        connection.live = live
        if connection.is_stopping:
            raise StoppingError
        with contextlib.closing(live), self._log(live, opening) as log:
            connection.send(session.opening(opening, time.monotonic()))
            while True:
                message = connection.next_message()
                # One exchange at a time: a client that does not wait is answered in order.
                connection.turn.acquire()
                if connection.is_over:
                    connection.turn.release()
                    return
                _Exchange(self, slot, live, log, watching, message).run()
                del message

    @contextlib.contextmanager
    def _log(self, live: LiveSession, opening: Mapping[str, object]) -> Iterator[SessionLog | None]:
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
    """One message on its way through the model, and back to the client.

    `run` decodes, checks and prepares it in the session's thread. The model's thread gets what the model takes, and
    answers one observation itself; lists and failures, which take longer, are answered by a thread for that.
    """

    conversation: Conversation
    slot: ModelSlot
    live: LiveSession
    log: SessionLog | None
    watching: Watching
    message: memoryview | str
    observations: list[dict] = dataclasses.field(default_factory=list)
    items: list[Item | Exception] = dataclasses.field(default_factory=list)
    suspicions: list[str] = dataclasses.field(default_factory=list)
    result: Result | None = None  # for the only observation of the message
    num_bytes: int = 0  # of the message, and of what was made of it
    is_released: bool = False
    start_s: float = dataclasses.field(default_factory=time.perf_counter)
    prepare_s: float = 0.0

    def run(self) -> None:
        """Until the model has it, or it is answered."""
        # That of the message before would be taken for this one's, if it cannot be read.
        self.conversation.session.request = None
        self.num_bytes = len(self.message if isinstance(self.message, memoryview) else self.message.encode())
        try:
            self._prepare()
            self.prepare_s = time.perf_counter() - self.start_s
            items = [item for item in self.items if isinstance(item, Item)]
            if items:
                self.slot.thread.submit(Job(items, lambda: self.conversation.connection.is_open), self._answered)
                return
        except Exception as error:
            self._finish(None, error)
            return
        self._finish(Answers((), 0.0), None)

    def _prepare(self) -> None:
        with LongWork() as long:
            decode = functools.partial(
                wire.decode, limits=self.conversation.limits.message, reserve=self._reserve, long=long
            )
            self.observations = self.conversation.session.received(self.message, decode)
            with looked_at_once():
                self.items = self.slot.thread.prepare(self.observations)
                if not isinstance(self.items[0] if self.items else None, Exception):
                    self.suspicions = self.watching.look(self.observations, self.start_s)

    def _reserve(self, num_bytes: int) -> None:
        self.conversation.memory.reserve(num_bytes)
        self.num_bytes += num_bytes

    def _answered(self, answers: Answers | None, error: BaseException | None) -> None:
        """Called in the model's thread."""
        is_short = len(self.items) == 1 and self.num_bytes < _SHORT_BYTES
        is_answer = answers is not None and not isinstance(answers.results[0], Exception)
        if (is_short and is_answer) or isinstance(error, NotWantedError):
            self._finish(answers, error)
            return
        try:
            work = threading.Thread(target=self._finish, args=(answers, error), name="openpi-answer", daemon=True)
            work.start()
        except RuntimeError:  # The system has no more threads.
            self._finish(answers, error)

    def _finish(self, answers: Answers | None, error: BaseException | None) -> None:
        """Sends the answer, errors included, and forgets the message."""
        frames: list[Frame] = []
        try:
            if not isinstance(error, NotWantedError):
                frames = self._frames(answers, error)
            self.conversation.session.sent(time.monotonic())
            self.watching.answered(self.result, time.perf_counter())
        except Exception as raised:
            self._log_error("A request of {} cannot be noted", raised)
        self.conversation.session.request = None
        self.message, self.observations, self.items = "", [], []
        if not self.is_released:
            self.conversation.memory.release(self.num_bytes)
        self._send(self._paid(frames))

    def _paid(self, frames: list[Frame]) -> list[Frame]:
        """The answer, or that there is no memory for it: the stages of a large picture are as large, and wait here for
        a client that may not read.
        """
        num_bytes = sum(len(frame.data) for frame in frames if isinstance(frame, Binary))
        if num_bytes > _SMALL_BYTES:
            try:
                self.conversation.memory.reserve(num_bytes)
            except ServerBusyError as error:
                return self._failed(error)
            self.conversation.connection.when_answered = functools.partial(self.conversation.memory.release, num_bytes)
        return frames

    def _send(self, frames: list[Frame]) -> None:
        connection = self.conversation.connection
        try:
            connection.send_soon(frames)
        except StreamClosed:
            connection.end_turn()
        except Exception as raised:
            self._log_error("An answer to {} cannot be sent", raised)
            if connection.stream is not None:
                connection.stream.abort()
            connection.end_turn()

    def _frames(self, answers: Answers | None, error: BaseException | None) -> list[Frame]:
        """The answer, after it was noted."""
        results: list[Result] = []
        if error is None and answers is not None:
            ran = iter(answers.results)
            results = [item if isinstance(item, Exception) else next(ran) for item in self.items]
            self.result = results[0] if len(results) == 1 else None
            if self.suspicions and isinstance(results[0], dict):
                results[0] = {**results[0], "warnings": [*results[0].get("warnings", ()), *self.suspicions]}
            try:
                frames = self.conversation.session.replied(
                    results, answers.infer_s, self.prepare_s, time.perf_counter() - self.start_s
                )
            except Exception as raised:
                error = raised
            else:
                self._note(frames, results, answers.infer_s)
                return frames
        assert error is not None
        return self._failed(error)

    def _failed(self, error: BaseException) -> list[Frame]:
        conversation = self.conversation
        number = _log_failure(conversation.client_log, error, conversation.connection.address, "request")
        self.live.failed(error_text(error))
        seconds = self._count("refused" if is_explained(error) else "failed")
        if self.log and conversation.session.request is not None:
            answer = {"error": f"{type(error).__name__}: {error_text(error)}"}
            packed = [msgpack_numpy.Packer().pack(answer)]
            self.log.write(conversation.session.request, packed, seconds, self.num_bytes)
        is_of_transform = any(error is item for item in self.items)
        return conversation.session.failed(error, number, is_of_transform=is_of_transform)

    def _note(self, frames: list[Frame], results: Sequence[Result], infer_s: float) -> None:
        seconds = self._count("ok")
        try:
            self.is_released = True  # by the page's copy, in time
            release = functools.partial(self.conversation.memory.release, self.num_bytes)
            self.live.answered(
                self.observations,
                results,
                seconds,
                prepare_s=self.prepare_s,
                infer_s=infer_s,
                num_bytes=self.num_bytes,
                release=release,
            )
            told = [str(w) for result in results if isinstance(result, dict) for w in result.get("warnings") or ()]
            if told:
                self.conversation.metrics.warned(self.slot.model_id, told)
            if self.log and self.conversation.session.request is not None:
                answers = [frame.data for frame in frames if isinstance(frame, Binary)]
                self.log.write(self.conversation.session.request, answers, seconds, self.num_bytes)
        except Exception as raised:
            self._log_error("A request of {} cannot be noted", raised)

    def _log_error(self, text: str, error: Exception) -> None:
        address = self.conversation.connection.address
        self.conversation.client_log.write(logging.ERROR, address, text.format(address), error=error)

    def _count(self, outcome: str) -> float:
        seconds = time.perf_counter() - self.start_s
        self.conversation.metrics.answered(
            self.slot.model_id,
            self.conversation.session.protocol,
            outcome,
            num_bytes=len(self.message),
            seconds=seconds,
        )
        return seconds


def _resolve(catalog: Catalog, requested: str | None) -> str:
    try:
        return catalog.resolve(requested)
    except UnknownModelError:
        raise
    except (ValueError, OSError) as error:
        raise UnknownModelError(requested) from error


def _log_failure(log: ClientLog, error: BaseException, address: str, what: str) -> str:
    """Logs what a client was not told; returns the number that it was told."""
    if is_explained(error) and not isinstance(error, MissingKeyError):
        log.write(logging.ERROR, address, f"A {what} of {address} was refused: {error}")
        return ""
    number = error_number()
    # A missing key may be the recipe's fault as well.
    log.write(logging.ERROR, address, f"A {what} of {address} failed (error {number})", error=error)
    return number
