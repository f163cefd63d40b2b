"""What every worker process of a pool does first: it leaves Ctrl-C to its parent, does not outlive it, and takes up
the function that it is to run.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Generic, TypeVar

Result = TypeVar("Result", covariant=True)

_finders: list[MetaPathFinder] = []


def add_finder(finder: MetaPathFinder) -> None:
    """Lets this process find modules by it, and the worker processes to which a `Packed` is sent later."""
    sys.meta_path.append(finder)
    _finders.append(finder)


class Packed(Generic[Result]):
    """A function on its way to worker processes.

    Raises:
        pickle.PicklingError, AttributeError, TypeError: it cannot be sent.
    """

    def __init__(self, function: Callable[..., Result]) -> None:
        self._pickled_finders = pickle.dumps(_finders)
        self._pickled = pickle.dumps(function, protocol=pickle.HIGHEST_PROTOCOL)

    def open(self) -> Callable[..., Result]:
        """In the worker. What it cannot load is an error of each job: one of the start would be taken for a death."""
        try:
            for finder in pickle.loads(self._pickled_finders):
                add_finder(finder)
            return pickle.loads(self._pickled)
        except Exception as error:
            told = (
                f"a worker process cannot load what it is to run: {type(error).__name__}: {error}. Classes and "
                "functions for it have to be at the top level of a file that can be imported; or use no workers"
            )

        def fail(*_: object) -> Result:
            raise RuntimeError(told)

        return fail


def start() -> None:
    """For the `initializer` of a pool whose processes are spawned.

    A parent that is killed ends no pool: without this, its workers stay for ever, with their memory.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the parent, which then ends us
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), name="parent", daemon=True).start()


def _end_with(sentinel: int) -> None:
    # Not PR_SET_PDEATHSIG: that is sent when the thread ends that has started us, of a parent that lives on.
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
