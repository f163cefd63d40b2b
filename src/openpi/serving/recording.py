"""Records what sessions ask and get: a folder for each, in the form of `PolicyRecorder`.

    <folder>/20261121T181500_0001/session.json      model, protocol, client, what it was told at the start
                                  step_0.npy        0-d object array around one flat dict: inputs/..., outputs/...

Files are written by a thread of their own, so that robots do not wait for the disk.
"""

import dataclasses
import io
import json
import logging
import pickle
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpi.policies.recorder import write_record
from openpi.serving.live import LiveSession
from openpi.shared.tree import flatten
from openpi_client import msgpack_numpy

logger = logging.getLogger("openpi")

# Exchanges that wait for the disk; each holds its message. More are left out, with a warning.
_MAX_WAITING = 256


class SessionRecorder:
    """Writes sessions below a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._queue: queue.Queue[_Entry | None] = queue.Queue(_MAX_WAITING)
        self.num_lost = 0
        self._thread = threading.Thread(target=self._run, name="openpi-recording", daemon=True)
        self._thread.start()

    def open(self, session: LiveSession, opening: Mapping[str, Any]) -> "SessionLog":
        """The log of a session that begins."""
        folder = self._new_folder()
        told = {
            "model": session.model_id,
            "protocol": session.protocol,
            "client": session.address,
            "start_s": session.since_s,
            "opening": opening,
        }
        (folder / "session.json").write_text(json.dumps(told, indent=2, default=str) + "\n")
        logger.info("Recording session %d in %s", session.number, folder)
        return SessionLog(self, folder)

    def put(self, entry: "_Entry") -> None:
        try:
            self._queue.put_nowait(entry)
        except queue.Full:
            self.num_lost += 1
            if self.num_lost & (self.num_lost - 1) == 0:  # 1, 2, 4, 8, ...
                logger.warning("%s is too slow: %d exchanges are not recorded", self._folder, self.num_lost)

    def finish(self) -> None:
        """Writes what waits."""
        self._queue.put(None)
        self._thread.join()

    def _new_folder(self) -> Path:
        name = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        for number in range(1, 100_000):
            folder = self._folder / f"{name}_{number:04d}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
        raise FileExistsError(f"{self._folder} has no free name left for {name}")

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            try:
                entry.write()
            except (OSError, ValueError, TypeError) as error:
                self.num_lost += 1
                logger.warning("%s cannot be written: %s", entry.path, error)


class SessionLog:
    """The log of one session."""

    def __init__(self, recorder: SessionRecorder, folder: Path) -> None:
        self._recorder = recorder
        self._folder = folder
        self._step = 0

    def write(self, request: Any, answers: Sequence[bytes]) -> None:
        """Queues one exchange.

        Args:
            request: what the client's message held.
            answers: the frames that it got.
        """
        for answer in answers:
            self._recorder.put(_Entry(self._folder / f"step_{self._step}.npy", request, answer))
            self._step += 1


@dataclasses.dataclass(frozen=True)
class _Entry:
    path: Path
    request: Any
    answer: bytes

    def write(self) -> None:
        write_record(self.path, flatten({"inputs": self.request, "outputs": msgpack_numpy.unpackb(self.answer)}))


def read_steps(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The records of a session in order, as (file, flat dict).

    Raises:
        FileNotFoundError: no records there.
        ValueError: a file is damaged, or holds more than data.
    """
    found = {int(match.group(1)): path for path in folder.glob("step_*.npy") if (match := _STEP.fullmatch(path.name))}
    if not found:
        raise FileNotFoundError(f"{folder} has no step_<n>.npy; expected a folder that a server recorded a session in")
    for number in sorted(found):
        yield found[number], read_record(found[number])


def read_record(path: Path) -> dict[str, Any]:
    """One record. The documented form is a pickle, which could run anything: only arrays and plain values are taken.

    Raises:
        ValueError: damaged, or holds more than data.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
            if shape != () or dtype != np.dtype(object):
                raise ValueError(f"it holds an array of shape {shape} and dtype {dtype}")
            record = _DataOnly(io.BytesIO(file.read())).load()
        content = record.item() if isinstance(record, np.ndarray) else record
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except (ValueError, pickle.UnpicklingError, EOFError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"{path} is no record of a request: {error}") from error


_STEP = re.compile(r"step_(\d+)\.npy")
_ALLOWED = re.compile(r"numpy(\._?core)?(\.(multiarray|numeric|_multiarray_umath))?")
_ALLOWED_NAMES = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}


class _DataOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if _ALLOWED.fullmatch(module) and name in _ALLOWED_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no data")
