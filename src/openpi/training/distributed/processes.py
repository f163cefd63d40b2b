"""Several processes as one run: the start, what they tell each other, and the end. No framework here.

All processes run the same program, each on its own devices; collectives inside the steps keep them together. What is
here is for the rest: files that one process writes, failures of one that all must hear of. They go through a store of
keys and values that the framework keeps (`Peers`). With one process everything is a plain call.
Source: the design, "working at the scale of one machine and past it".
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from openpi.shared import frameworks
from openpi.shared.frameworks import Backend
from openpi.training.distributed import roll_call
from openpi.training.distributed.launch import Launch

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Peers(Protocol):
    """This process among those that have met, and the store of keys and values that they share.

    Made by `join(launch)` of `backends/<backend>/processes.py`. Methods may be called in any thread; a process that
    dies must not leave the others waiting in `get` for ever.
    """

    index: int
    count: int

    def set(self, key: str, value: str) -> None:
        """Once for each key."""
        ...

    def get(self, key: str) -> str:
        """Waits until somebody has set it."""
        ...

    def delete(self, key: str) -> None: ...

    def leave(self) -> None:
        """Waits for the others to leave, too."""
        ...


_peers: Peers | None = None
_is_one_of_several = False
_exchanges: Counter[str] = Counter()
_known_to_all: list[Exception] = []  # failures that no process waits for another after


def start(launch: Launch | None, backend: Backend) -> None:
    """Joins the other processes; to be called before anything asks the framework for its devices.

    Args:
        backend: as of `TrainConfig.backend`.
    Raises:
        RuntimeError: the processes do not find each other within the time limit, or contradict each other.
        ImportError: the framework is not installed.
    """
    global _peers, _is_one_of_several
    if launch is None:
        return
    join, agreed = _starts_of(backend)
    launch = agreed(launch)
    if launch.coordinator_address is not None:
        roll_call.meet(
            launch.coordinator_address,
            num_processes=launch.num_processes,
            process_id=launch.process_id,
            timeout_s=launch.timeout_s,
        )
    _is_one_of_several = True  # from here on a failure must not wait for the others
    _peers = join(launch)
    logger.info("%d processes have met; this is process %d", count(), index())


def _starts_of(backend: Backend) -> tuple[Callable[[Launch], Peers], Callable[[Launch], Launch]]:
    """What joins the others, and what finds where they meet."""
    frameworks.require_backend(backend)
    if backend == "pytorch":
        from openpi.training.backends.pytorch import processes as processes_pytorch

        return processes_pytorch.join, processes_pytorch.agreed
    from openpi.training.backends.jax import processes as processes_jax

    return processes_jax.join, lambda launch: launch


def end(exit_code: int) -> None:
    """Leaves the run; returns in an orderly end.

    A process that fails alone leaves at once, by `os._exit`: the usual way out waits for the other processes, and they
    wait for this one in a collective. They end with an error of the collective, or when the framework misses this one.
    """
    global _peers, _is_one_of_several
    if not _is_one_of_several:
        return
    if exit_code == 1 and not _known_to_all:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if _peers is not None:
        _peers.leave()
    _peers, _is_one_of_several = None, False


def index() -> int:
    """Number of this process; 0 writes files and talks."""
    return 0 if _peers is None else _peers.index


def count() -> int:
    return 1 if _peers is None else _peers.count


def is_first() -> bool:
    return index() == 0


def exchange(what: str, value: object) -> list[Any]:
    """The JSON values of all processes, by process.

    Args:
        what: the same in all processes; each may be in use in one thread at a time.
    """
    if _peers is None:
        return [value]
    number = _exchanges[what]
    _exchanges[what] += 1
    _peers.set(_key(what, number, _peers.index), json.dumps(value))
    values = [json.loads(_peers.get(_key(what, number, i))) for i in range(_peers.count)]
    if number > 0:  # all have begun this exchange, so all have read the one before
        _peers.delete(_key(what, number - 1, _peers.index))
    return values


def _key(what: str, number: int, process: int) -> str:
    return f"openpi/{what}/{number}/{process}"


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Ends when all processes have come to its end; an error in one is an error in all.

    Not to be nested, and nothing in it may wait for another process.

    Args:
        what: as in "failed while <what>"; as of `exchange`.
    Raises:
        the error of this process, or a RuntimeError that tells that of another.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    for process, problem in enumerate(exchange(what, None if error is None else str(error) or repr(error))):
        if problem is not None:
            error = error or RuntimeError(f"process {process} failed while {what}: {problem}")
    if error is not None:
        _known_to_all.append(error)
        raise error


def all_raise(error: Exception) -> bool:
    """Whether each process has an error in this place, so that they can still do something together.

    To be asked once: what they do may fail in one alone.
    """
    is_known = count() == 1 or any(error is known for known in _known_to_all)
    _known_to_all.clear()
    return is_known


def on_first(what: str, action: Callable[[], T]) -> T:
    """Runs `action` in process 0; all get its JSON value, or its error. The rules of `together` hold."""
    value = None
    with together(what):
        if is_first():
            value = action()
    return exchange(f"{what}, result", value)[0]


def check_same(what: str, values: Mapping[str, object]) -> None:
    """Refuses to go on unless the JSON values are the same in all processes.

    Raises:
        ValueError: they are not; those of process 0 and of the first that differs are shown.
    """
    first, *others = exchange(what, values)
    for process, theirs in enumerate(others, start=1):
        different = [key for key in first if first[key] != theirs.get(key)]
        if different:
            changes = "; ".join(f"{key} is {first[key]} in process 0, {theirs.get(key)}" for key in different)
            error = ValueError(
                f"{what}: {changes} in process {process}; start all processes with the same command, or with "
                "--num-processes=1 those that are runs of their own"
            )
            _known_to_all.append(error)
            raise error


def gather(rows: np.ndarray) -> np.ndarray:
    """Arrays of equal shape of all processes on a new leading axis, bit for bit. Only in the main thread."""
    if count() == 1:
        return rows[None]
    texts = exchange("gathering rows", base64.b64encode(np.ascontiguousarray(rows).tobytes()).decode())
    return np.stack([np.frombuffer(base64.b64decode(text), rows.dtype).reshape(rows.shape) for text in texts])
