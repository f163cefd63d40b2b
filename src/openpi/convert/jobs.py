"""Jobs in several processes, which end with their parent and leave Ctrl-C to it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from openpi.shared import worker_process

Job = TypeVar("Job")
Result = TypeVar("Result")


def num_processes(num_workers: int | None, num_jobs: int) -> int:
    """As many as are asked for (None = a processor each), and no more than there are jobs.

    Raises:
        ValueError: fewer than none.
    """
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"workers is {num_workers}; expected 0 (this process) or more")
    return min((os.cpu_count() or 1) if num_workers is None else num_workers, num_jobs)


def each(function: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Result]]:
    """Jobs with their results, as they are done; with fewer than 2 processes here, in order.

    Raises:
        OSError: a process was ended from outside.
    """
    if processes < 2:
        for job in jobs:
            yield job, function(job)
        return
    # Spawned: threads of encoders do not survive a fork. On Ctrl-C they finish the job they are at.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=worker_process.start) as pool:
        running: dict[Future[Result], Job] = {pool.submit(function, job): job for job in jobs}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process of the conversion was ended from outside, perhaps for lack of memory; run it again, with "
                "fewer workers: what is prepared is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
