"""Records what sessions ask and get, each session in a place of its own, and reads it again.

    npy     <folder>/20261121T181500_0001/       session.json, step_<n>.npy     recording_npy.py
    mcap    <folder>/20261121T181500_0001.mcap                                  recording_mcap.py

Files are written by a thread of their own, so that robots do not wait for the disk.
"""

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

from openpi.serving.live import LiveSession
from openpi.serving.recorded import Exchange, Origin, SessionInfo
from openpi_client import msgpack_numpy

logger = logging.getLogger(__name__)

# Exchanges that wait for the disk, and their messages together. More are left out, with a warning.
_MAX_WAITING = 256
_MAX_WAITING_BYTES = 2**28

Form = Literal["npy", "mcap"]


class SessionWriter(Protocol):
    """The files of one session. Made by a class of `Form`'s module, from a path without a suffix and a `SessionInfo`;
    a path that is taken is a `FileExistsError`.

    Attributes:
        place: where the session is.
    """

    place: Path

    def write(self, exchange: Exchange) -> None:
        """Afterwards the exchange survives the end of the process.

        Raises:
            OSError: nothing more can be written.
            ValueError, TypeError: this exchange has no place in the form; others may follow.
        """
        ...

    def finish(self) -> None: ...


class SessionRecorder:
    """Writes sessions below a folder."""

    def __init__(self, folder: Path, form: Form = "npy") -> None:
        """
        Raises:
            OSError: the folder cannot be made.
            ImportError: a package for the form is missing; its extra is named.
        """
        self._make_writer = _module_of(form).Writer
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.num_lost = 0
        self._lock = threading.Lock()  # guards what follows
        self._waiting_bytes = 0
        self._thread = threading.Thread(target=self._run, name="openpi-recording", daemon=True)
        self._thread.start()

    def open(self, session: LiveSession, opening: Mapping[str, object]) -> "SessionLog":
        """The log of a session that begins. It has files from its first exchange on."""
        info = SessionInfo(session.model_id, session.protocol, session.address, session.since_s, opening)
        return SessionLog(self, info)

    def finish(self) -> None:
        """Writes what waits."""
        self._queue.put(None)
        self._thread.join()

    def put(self, work: Callable[[], None]) -> None:
        """Has work done by the recording thread, after what it was given before."""
        self._queue.put(work)

    def put_exchange(self, work: Callable[[], None], num_bytes: int) -> None:
        """The same, unless too much waits: then it is left out."""

        def work_and_release() -> None:
            try:
                work()
            finally:
                self._wait_for(-num_bytes)

        # A message that is larger than all that may wait is taken when nothing else does.
        has_room = self._waiting_bytes == 0 or self._waiting_bytes + num_bytes <= _MAX_WAITING_BYTES
        if has_room and self._queue.qsize() < _MAX_WAITING:
            self._wait_for(num_bytes)
            self._queue.put(work_and_release)
            return
        self._lose("%s is too slow: %d exchanges are not recorded", self._folder)

    def new_writer(self, info: SessionInfo) -> SessionWriter:
        """Opens the files of a session. For the recording thread."""
        name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(info.start_s))
        for number in range(1, 100_000):
            try:
                return self._make_writer(self._folder / f"{name}_{number:04d}", info)
            except FileExistsError:
                continue
        raise FileExistsError(f"{self._folder} has no free name left for {name}")

    def _wait_for(self, num_bytes: int) -> None:
        with self._lock:
            self._waiting_bytes += num_bytes

    def _lose(self, text: str, *values: object) -> None:
        """Says it of the first, the second, the fourth, the eighth, ...: a client may have any number of them."""
        self.num_lost += 1
        if self.num_lost & (self.num_lost - 1) == 0:
            logger.warning(text, *values, self.num_lost)

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except OSError as error:  # once a session
                self.num_lost += 1
                logger.warning("An exchange cannot be recorded in %s: %s", self._folder, error)
            except Exception as error:
                self._lose("An exchange cannot be recorded in %s (%s); %d were not", self._folder, error)
            del work  # Or the thread would hold on to a message while it is idle.


class SessionLog:
    """The log of one session. `write` and `close` only leave a note for the recording thread."""

    def __init__(self, recorder: SessionRecorder, info: SessionInfo) -> None:
        self._recorder = recorder
        self._info = info
        self._num_exchanges = 0
        # Of the recording thread:
        self._writer: SessionWriter | None = None
        self._has_failed = False

    def write(self, request: object, answers: Sequence[bytes], seconds: float, num_bytes: int = 0) -> None:
        """Records an exchange that ends now.

        Args:
            request: what the client's message held.
            answers: the frames that it got.
            seconds: that it took.
            num_bytes: of memory that the request holds.
        """
        answered_ns = time.time_ns()
        received_ns = answered_ns - int(seconds * 1e9)
        for answer in answers:
            step, self._num_exchanges = self._num_exchanges, self._num_exchanges + 1
            work = functools.partial(self._write, step, request, answer, received_ns, answered_ns)
            self._recorder.put_exchange(work, num_bytes)

    def close(self) -> None:
        """Nothing more will come."""
        self._recorder.put(self._finish)

    def _write(self, step: int, request: object, answer: bytes, received_ns: int, answered_ns: int) -> None:
        if self._has_failed:
            return
        exchange = Exchange(step, request, msgpack_numpy.unpackb(answer), received_ns, answered_ns)
        try:
            if self._writer is None:
                self._writer = self._recorder.new_writer(self._info)
                logger.info("Recording the session of %s in %s", self._info.client, self._writer.place)
            self._writer.write(exchange)
        except OSError as error:  # A file may end in the middle of something now: nothing goes behind it.
            self._has_failed = True
            raise OSError(f"{error}; the rest of this session is not recorded") from error

    def _finish(self) -> None:
        if self._writer is not None and not self._has_failed:
            self._writer.finish()


def find_sessions(place: Path) -> list[Path]:
    """The recorded sessions there, in order of time: the place itself, or those in the folder.

    Raises:
        FileNotFoundError: there is none.
    """
    if place.is_file() and place.suffix == ".mcap":
        return [place]
    alone = [place] if any(place.glob("step_*.npy")) else []
    found = alone + sorted({*place.glob("*.mcap"), *(path.parent for path in place.glob("*/step_*.npy"))})
    if not found:
        raise FileNotFoundError(
            f"{place} is no .mcap file, and no folder with such files or step_<n>.npy; expected what --record writes"
        )
    return found


def origin_of(session: Path) -> Origin:
    """Whom the session talked to.

    Raises:
        ValueError, OSError, ImportError: as `read_session`.
    """
    return _module_of(_form_of(session)).origin_of(session)


def read_session(session: Path | str) -> Iterator[Exchange]:
    """What was recorded, in order; with the dtypes, shapes and values that went over the wire.

    Raises:
        ValueError: a file is damaged, or holds more than data.
        OSError: it cannot be read.
        ImportError: a package for the form is missing; its extra is named.
    """
    session = Path(session)
    return _module_of(_form_of(session)).read_session(session)


def _form_of(session: Path) -> Form:
    return "mcap" if session.suffix == ".mcap" else "npy"


def _module_of(form: Form) -> ModuleType:
    if form == "npy":
        from openpi.serving import recording_npy

        return recording_npy
    from openpi.serving import recording_mcap

    return recording_mcap
