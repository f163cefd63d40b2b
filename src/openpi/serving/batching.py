"""One thread per model: it loads the policy, then answers what waits, together.

    a request comes while the model is idle     it runs at once, alone
    requests come while the model runs          they run next, as one batch

Only when a batch had several requests does the next one wait for as many, a few milliseconds at most: robots and
simulators that ask in step would otherwise split into one early and many late. So a lone client never waits.
"""

import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from openpi.serving.errors import ServerBusyError
from openpi_client.base_policy import BasePolicy

logger = logging.getLogger("openpi")

Result = dict[str, Any] | Exception
Done = Callable[[Any, BaseException | None], None]
"""Told the outcome of a job, in the model's thread: the answer, or what was raised. Must not raise."""


@dataclasses.dataclass(frozen=True)
class Batching:
    """How requests are put together.

    Attributes:
        max_batch: observations that run at once; 1 = never together.
        max_wait_s: for others, after a batch had several.
        max_queue: requests that may wait; more are refused.
    """

    max_batch: int = 8
    max_wait_s: float = 0.002
    max_queue: int = 256


@dataclasses.dataclass(frozen=True)
class Job:
    """One message on its way through the model; the functions run in the model's thread.

    Attributes:
        decode: the observations in it; raises what is wrong with it.
        encode: results, one per observation, and the seconds that the model took -> the answer.
        is_wanted: whether anybody still waits for the answer.
    """

    decode: Callable[[], Sequence[dict]]
    encode: Callable[[Sequence[Result], float], Any]
    is_wanted: Callable[[], bool] = lambda: True


class NotWantedError(Exception):
    """The client left before its turn came."""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Work for the thread, and whom to tell its outcome."""

    work: Job | Callable[[], Any]  # anything but a job is run by itself
    done: Done

    @property
    def job(self) -> Job:
        assert isinstance(self.work, Job)
        return self.work


class ModelThread:
    """Loads one policy and runs it, while the threads of the sessions read from their sockets.

    One thread, because a model runs one batch at a time, and because CUDA contexts and MuJoCo renderers belong to the
    thread that made them. It is a daemon: a process that has to stop does not wait for a compile.
    """

    def __init__(
        self, batching: Batching | None = None, *, on_batch: Callable[[int, float], None] = lambda size, infer_s: None
    ) -> None:
        """
        Args:
            on_batch: told the number of observations and the seconds that the policy took; called in the thread.
        """
        self._batching = batching or Batching()
        self._on_batch = on_batch
        self._policy: BasePolicy | None = None
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._put_back: list[_Entry | None] = []
        self._last_batch = 1
        self._compiling: threading.Thread | None = None
        self._cannot_compile: set[int] = set()
        self._thread = threading.Thread(target=self._run, name="openpi-model", daemon=True)
        self._thread.start()

    def load(self, load: Callable[[], BasePolicy]) -> "concurrent.futures.Future[BasePolicy]":
        """Loads the policy in the thread."""
        loaded: concurrent.futures.Future[BasePolicy] = concurrent.futures.Future()

        def done(policy: Any, error: BaseException | None) -> None:
            if error is None:
                self._policy = policy
                loaded.set_result(policy)
            else:
                loaded.set_exception(error)

        self._queue.put(_Entry(load, done))
        return loaded

    def submit(self, job: Job, done: Done) -> None:
        """Queues a job.

        Raises:
            ServerBusyError: too many are waiting.
        """
        if self._queue.qsize() >= self._batching.max_queue:
            raise ServerBusyError(f"{self._batching.max_queue} requests are waiting already; ask again later")
        self._queue.put(_Entry(job, done))

    def num_waiting(self) -> int:
        return self._queue.qsize()

    def end(self) -> None:
        """Ends the thread after the jobs that are waiting."""
        self._queue.put(None)

    def finish(self, timeout_s: float | None) -> bool:
        """Drops the policy after the jobs that are waiting; false when something still runs after `timeout_s`."""
        self.end()
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._thread.join(timeout_s)
        if self._compiling is not None:
            self._compiling.join(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
        return not self._thread.is_alive() and not self._is_compiling()

    def _run(self) -> None:
        while (entry := self._put_back.pop() if self._put_back else self._queue.get()) is not None:
            if isinstance(entry.work, Job):
                self._run_batch(self._with_others(entry))
            else:
                entry.done(*_outcome(entry.work))
            del entry  # Or the thread would hold on to an observation while it is idle.
        self._policy = None

    def _with_others(self, first: _Entry) -> list[_Entry]:
        """The entry and the jobs that wait behind it; anything else keeps its place."""
        entries = [first]
        deadline_s = time.monotonic() + self._batching.max_wait_s
        while len(entries) < self._batching.max_batch:
            try:
                if self._queue.empty() and len(entries) < self._last_batch:
                    entry = self._queue.get(timeout=max(0.0, deadline_s - time.monotonic()))
                else:
                    entry = self._queue.get_nowait()
            except queue.Empty:
                break
            if entry is None or not isinstance(entry.work, Job):
                self._put_back.append(entry)
                break
            entries.append(entry)
        self._last_batch = len(entries)
        return entries

    def _run_batch(self, entries: Sequence[_Entry]) -> None:
        decoded = [(entry, *_outcome(lambda entry=entry: _decoded(entry))) for entry in entries]
        observations = [item for _, items, error in decoded if error is None for item in items]
        start_s = time.perf_counter()
        results = iter(self._infer(observations))
        infer_s = time.perf_counter() - start_s
        if observations:
            self._on_batch(len(observations), infer_s)
        for entry, items, error in decoded:
            if error is None:
                own = [next(results) for _ in items]
                entry.done(*_outcome(lambda entry=entry, own=own: entry.job.encode(own, infer_s)))
            else:
                entry.done(None, error)
        if len(observations) > 1:
            self._compile_for(len(observations), observations[0])

    def _infer(self, observations: Sequence[dict]) -> list[Result]:
        assert self._policy is not None
        infer, infer_batch = self._policy.infer, getattr(self._policy, "infer_batch", None)
        size = self._batching.max_batch
        if infer_batch is None or len(observations) == 1:
            return [_value_or_error(lambda obs=obs: infer(obs)) for obs in observations]
        results: list[Result] = []
        for start in range(0, len(observations), size):
            part = observations[start : start + size]
            together = _value_or_error(lambda part=part: _as_many(infer_batch(part), len(part)))
            results += [together] * len(part) if isinstance(together, Exception) else together
        return results

    def _compile_for(self, count: int, example: dict) -> None:
        """Begins to compile, beside the thread, for batches like the one that was just run in parts.

        Not before they come: a lone robot would wait longer at the start for batches it never sends.
        """
        sizes = getattr(self._policy, "batch_sizes", None)
        if sizes is None or not getattr(self._policy, "warms_up_beside", False) or self._is_compiling():
            return
        size = min(1 << (count - 1).bit_length(), self._batching.max_batch)
        if size > max(sizes) and size not in self._cannot_compile:
            self._compiling = threading.Thread(
                target=self._compile, args=(self._policy, size, example), name="openpi-compile", daemon=True
            )
            self._compiling.start()

    def _is_compiling(self) -> bool:
        return self._compiling is not None and self._compiling.is_alive()

    def _compile(self, policy: Any, size: int, example: dict) -> None:
        logger.info("Compiling for batches of %d", size)
        start_s = time.monotonic()
        try:
            policy.warm_up(example, batch_size=size)
            logger.info("Batches of %d are ready after %.1f s", size, time.monotonic() - start_s)
        except Exception:
            self._cannot_compile.add(size)
            logger.exception("Batches of %d do not compile; requests go on one by one", size)


def _decoded(entry: _Entry) -> Sequence[dict]:
    if not entry.job.is_wanted():
        raise NotWantedError
    return entry.job.decode()


def _as_many(results: list[Result], count: int) -> list[Result]:
    if len(results) != count:
        raise ValueError(f"infer_batch returned {len(results)} results for {count} observations")
    return results


def _value_or_error(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return error


def _outcome(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return function(), None
    except BaseException as error:  # Whatever a policy raises is for the caller; the thread must go on.
        return None, error
