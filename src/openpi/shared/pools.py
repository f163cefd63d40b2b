"""Where work that falls into independent jobs is done: processes of this machine, or a Ray cluster (`ray_pool.py`).

An episode is such a job, and what is made of it depends on nothing else: so results are the same wherever they are
made, and whoever maps over episodes takes a `Pool` and does not ask which.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar

from openpi.shared import worker_process

logger = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerLostError(OSError):
    """A worker was ended from outside, and what it was at is not done."""


class Pool(Protocol):
    """Runs pure functions over jobs."""

    def threads(self, num_jobs: int) -> int:
        """Processors that one of so many jobs has to itself, 1 or more."""
        ...

    def each(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Jobs with their results, as they are done.

        Args:
            function: of a module, or a `functools.partial` of one, whose arguments are what all jobs have in common:
                they travel to each worker once.
        Raises:
            WorkerLostError: a worker was ended from outside.
        """
        ...


class Processes:
    """Spawned processes of this machine, which end with their parent and leave Ctrl-C to it.

    Args:
        num_workers: None = one for each processor; below 2 = the jobs are done in this process, in order.
    Raises:
        ValueError: fewer than none.
    """

    def __init__(self, num_workers: int | None = None) -> None:
        if num_workers is not None and num_workers < 0:
            raise ValueError(f"workers is {num_workers}; expected 0 (this process) or more")
        self._num_workers = (os.cpu_count() or 1) if num_workers is None else num_workers

    def threads(self, num_jobs: int) -> int:
        return max(1, (os.cpu_count() or 1) // max(1, min(self._num_workers, num_jobs)))

    def each(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        processes = min(self._num_workers, len(jobs))
        if processes > 1 and is_typed_in("__main__") and b"__main__" in pickle.dumps((function, jobs[0])):
            logger.info("done in this process: others do not see the classes of a notebook; put them into a file")
            processes = 1
        if processes < 2:
            for job in jobs:
                yield job, function(job)
            return
        # Spawned: threads of encoders do not survive a fork. On Ctrl-C they finish the job they are at.
        packed = worker_process.Packed(function)
        with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start, initargs=(packed,)) as pool:
            running: dict[Future[Any], Job] = {pool.submit(_run, job): job for job in jobs}
            try:
                for future in as_completed(running):
                    yield running.pop(future), future.result()
            except BrokenProcessPool as error:
                raise WorkerLostError(
                    "a worker process was ended from outside, perhaps for lack of memory; run it again, with fewer of "
                    "them"
                ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def is_typed_in(module: str) -> bool:
    """Whether a module has no file: a notebook, or `python -c`."""
    return module == "__main__" and not Path(getattr(sys.modules["__main__"], "__file__", None) or "").is_file()


IN_PROCESS = Processes(0)
"""No other process at all."""

_function: Callable[[Any], Any]


def _start(packed: worker_process.Packed[object]) -> None:
    global _function
    worker_process.start()
    _function = packed.open()


def _run(job: object) -> object:
    return _function(job)


@contextlib.contextmanager
def open_pool(ray: str | None, num_workers: int | None = None) -> Iterator[Pool]:
    """The cluster at an address, or processes of this machine.

    Args:
        ray: see `RayCluster`; None = this machine.
    Raises:
        ImportError: the extra `ray` is missing.
        ConnectionError: nobody answers there.
        ValueError: fewer workers than none.
    """
    if ray is None:
        yield Processes(num_workers)
        return
    from openpi.shared.ray_pool import RayCluster

    with RayCluster(ray) as cluster:
        yield cluster
