"""One thread per model: it loads the policy, then answers what waits, together.

    a request comes while the model is idle     it runs at once, alone
    requests come while the model runs          they run next, as one batch
    a list is longer than a batch               its rest waits behind what has come meanwhile

Only when a batch had several requests does the next one wait for as many, a few milliseconds at most: robots and
simulators that ask in step would otherwise split into one early and many late. So a lone client never waits.
"""

import collections
import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from openpi.serving.errors import ModelGoneError, ServerBusyError
from openpi_client.base_policy import BasePolicy, Reply

logger = logging.getLogger(__name__)

Value = TypeVar("Value")
Result = Reply | Exception
Done = Callable[[Any, BaseException | None], None]
"""Told the outcome of work, in the model's thread: what came of it, or what was raised."""


@dataclasses.dataclass(frozen=True)
class Batching:
    """How requests are put together.

    Attributes:
        max_batch: observations that run at once; 1 = never together.
        max_wait_s: for others, after a batch had several.
        max_queue: requests that may wait; more are refused. Each session has one, and those that left may have some.
    """

    max_batch: int = 8
    max_wait_s: float = 0.002
    max_queue: int = 1024


@dataclasses.dataclass(frozen=True)
class Item:
    """One observation on its way through the model.

    Attributes:
        prepared: as the policy's `prepare` returned it; None for a policy without.
    """

    observation: dict
    prepared: Any = None


@dataclasses.dataclass(frozen=True)
class Answers:
    """What became of a job.

    Attributes:
        results: one per item.
        infer_s: that the model took for it.
    """

    results: Sequence[Result]
    infer_s: float


@dataclasses.dataclass(frozen=True)
class Job:
    """The observations of one message.

    Attributes:
        is_wanted: whether anybody still waits for the answer.
    """

    items: Sequence[Item]
    is_wanted: Callable[[], bool] = lambda: True


class NotWantedError(Exception):
    """The client left before its turn came."""


@dataclasses.dataclass(eq=False)
class _Entry:
    """Work for the thread, and whom to tell its outcome.

    Attributes:
        results, infer_s: of the items that have had their turn.
        is_told: whether its outcome is.
    """

    work: Job | Callable[[], Any]  # anything but a job is run by itself
    done: Done
    results: list[Result] = dataclasses.field(default_factory=list)
    infer_s: float = 0.0
    is_told: bool = False

    def rest(self) -> Sequence[Item]:
        """The items that wait for their turn."""
        return self.work.items[len(self.results) :] if isinstance(self.work, Job) else ()

    def tell(self, value: object, error: BaseException | None = None) -> None:
        """Whoever is told may fail; the thread goes on. A second time nobody is told."""
        if self.is_told:
            return
        self.is_told = True
        try:
            self.done(value, error)
        except Exception:
            logger.exception("An answer cannot be handed over")


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
        self._inbox: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._waiting: collections.deque[_Entry | None] = collections.deque()  # taken from the inbox, in turn
        self._is_over = False
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

        self._put(_Entry(load, done))
        return loaded

    def prepare(self, observations: Sequence[dict]) -> list[Item | Exception]:
        """Does what can be done before their turn, in the thread of the caller; or says why they do not fit."""
        policy: Any = self._policy
        if not _prepares(policy):
            return [Item(obs) for obs in observations]
        prepare = policy.prepare
        prepared = [_value_or_error(lambda obs=obs: prepare(obs)) for obs in observations]
        return [
            made if isinstance(made, Exception) else Item(obs, made)
            for obs, made in zip(observations, prepared, strict=True)
        ]

    def submit(self, job: Job, done: Done) -> None:
        """Queues a job; `done` is told its `Answers`.

        Raises:
            ServerBusyError: too many are waiting.
        """
        if self.num_waiting() >= self._batching.max_queue:
            raise ServerBusyError(f"{self._batching.max_queue} requests are waiting already; ask again later")
        self._put(_Entry(job, done))

    def num_waiting(self) -> int:
        return self._inbox.qsize() + len(self._waiting)

    def is_alive(self) -> bool:
        return not self._is_over

    def end(self) -> None:
        """Ends the thread after the jobs that are waiting."""
        self._inbox.put(None)

    def finish(self, timeout_s: float | None) -> bool:
        """Drops the policy after the jobs that are waiting; false when something still runs after `timeout_s`."""
        self.end()
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._thread.join(timeout_s)
        if self._compiling is not None:
            self._compiling.join(None if deadline_s is None else max(0.0, deadline_s - time.monotonic()))
        return not self._thread.is_alive() and not self._is_compiling()

    def _put(self, entry: _Entry) -> None:
        self._inbox.put(entry)
        if self._is_over:
            self._refuse_waiting()

    def _run(self) -> None:
        try:
            while (entry := self._next()) is not None:
                if isinstance(entry.work, Job):
                    self._try_turn(entry)
                else:
                    entry.tell(*_outcome(entry.work))
                del entry  # Or the thread would hold on to an observation while it is idle.
        finally:
            self._is_over = True
            self._policy = None
            self._refuse_waiting()

    def _next(self) -> _Entry | None:
        """What has its turn; None = the end, behind everything that waits."""
        while True:
            entry = self._waiting.popleft() if self._waiting else self._inbox.get()
            if entry is not None or all(each is None for each in self._waiting):
                return entry
            self._waiting.append(None)

    def _refuse_waiting(self) -> None:
        """The thread is over: nobody else would answer."""
        self._take_in()
        while self._waiting:
            if (entry := self._waiting.popleft()) is not None:
                entry.tell(None, ModelGoneError("the model's thread has ended; restart the server"))

    def _take_in(self) -> None:
        """Lets what has come stand in line."""
        while not self._inbox.empty():
            self._waiting.append(self._inbox.get())

    def _try_turn(self, first: _Entry) -> None:
        """Whatever a policy's attributes or callbacks raise, everybody is answered, and the thread goes on."""
        jobs = [first]
        try:
            self._run_turn(self._with_others(jobs))
        except Exception as error:
            logger.exception("A batch failed")
            for entry in jobs:
                if entry not in self._waiting:
                    entry.tell(None, error)

    def _run_turn(self, turn: list[tuple[_Entry, Sequence[Item]]]) -> None:
        items = [item for _, part in turn for item in part]
        if not items:
            return
        start_s = time.perf_counter()
        results = iter(self._infer(items))
        infer_s = time.perf_counter() - start_s
        self._note_batch(len(items), infer_s)
        self._take_in()
        num_wanted = len(items) + sum(len(entry.rest()) for entry in self._waiting if entry is not None)
        for entry, part in turn:
            entry.results += [next(results) for _ in part]
            entry.infer_s += infer_s
            num_wanted += len(entry.rest())
            if entry.rest():
                self._waiting.append(entry)
            else:
                entry.tell(Answers(entry.results, entry.infer_s))
        self._compile_for(min(num_wanted, self._batching.max_batch), items[0].observation)

    def _with_others(self, jobs: list[_Entry]) -> list[tuple[_Entry, Sequence[Item]]]:
        """A job and those that wait behind it, each with its share of a batch; the first ones with what is left.

        Args:
            jobs: begins with the job; the others are added.
        """
        self._take_in()
        size = self._largest_turn()
        share = max(1, size // (1 + len(self._waiting)))
        counts: dict[_Entry, int] = {}
        deadline_s = time.monotonic() + self._batching.max_wait_s
        entry: _Entry | None = jobs[0]
        while entry is not None:
            assert isinstance(entry.work, Job)
            if entry.work.is_wanted():
                counts[entry] = min(share, len(entry.rest()), size - sum(counts.values()))
            else:
                entry.tell(None, NotWantedError())
            entry = self._another(len(counts), deadline_s) if sum(counts.values()) < size else None
            jobs += [] if entry is None else [entry]
        self._last_batch = len(counts)
        left = size - sum(counts.values())
        turn: list[tuple[_Entry, Sequence[Item]]] = []
        for job, count in counts.items():
            more = min(left, len(job.rest()) - count)
            left -= more
            turn.append((job, job.rest()[: count + more]))
        return turn

    def _another(self, num_jobs: int, deadline_s: float) -> _Entry | None:
        """The next job, if one is there, or comes before the deadline where the last batch had more."""
        try:
            if not self._waiting:
                timeout_s = max(0.0, deadline_s - time.monotonic()) if num_jobs < self._last_batch else 0.0
                entry = self._inbox.get(timeout=timeout_s) if timeout_s else self._inbox.get_nowait()
                self._waiting.append(entry)
        except queue.Empty:
            return None
        entry = self._waiting[0]
        if entry is None or not isinstance(entry.work, Job):  # keeps its place
            return None
        return self._waiting.popleft()

    def _largest_turn(self) -> int:
        """How many observations the policy takes in one call of the model."""
        if not hasattr(self._policy, "infer_batch"):
            return 1
        sizes = getattr(self._policy, "batch_sizes", None)
        return min(self._batching.max_batch, max(sizes)) if sizes else self._batching.max_batch

    def _infer(self, items: Sequence[Item]) -> Sequence[Result]:
        policy: Any = self._policy
        observations = [item.observation for item in items]
        if all(item.prepared is not None for item in items):
            results = _value_or_error(
                lambda: _as_many(policy.infer_prepared([item.prepared for item in items]), len(items))
            )
        elif len(items) == 1:
            results = _value_or_error(lambda: [policy.infer(observations[0])])
        else:
            results = _value_or_error(lambda: _as_many(policy.infer_batch(observations), len(items)))
        return [results] * len(items) if isinstance(results, Exception) else results

    def _note_batch(self, count: int, infer_s: float) -> None:
        try:
            self._on_batch(count, infer_s)
        except Exception:
            logger.exception("A batch cannot be noted")

    def _compile_for(self, count: int, example: dict) -> None:
        """Begins to compile, beside the thread, for batches like the one that was just run in parts.

        Not before they come: a lone robot would wait longer at the start for batches it never sends.
        """
        if count == 1:
            return
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


def _prepares(policy: object) -> bool:
    """Whether what `prepare` returns may stand for the observation: an `infer` of a subclass wants the observation."""
    if {"infer", "infer_batch"} & getattr(policy, "__dict__", {}).keys():
        return False
    classes = (each for each in type(policy).__mro__ if {"infer", "infer_batch"} & vars(each).keys())
    return "prepare" in vars(next(classes, object))


def _as_many(results: list[Result], count: int) -> list[Result]:
    if len(results) != count:
        raise ValueError(f"infer_batch returned {len(results)} results for {count} observations")
    return results


def _value_or_error(function: Callable[[], Value]) -> Value | Exception:
    try:
        return function()
    except Exception as error:
        return error
    except BaseException as error:  # A policy that asks for the end of its thread does not get it.
        return RuntimeError(f"the policy raised {type(error).__name__}: {error}")


def _outcome(function: Callable[[], Value]) -> tuple[Value | None, BaseException | None]:
    try:
        return function(), None
    except BaseException as error:  # Whatever a policy raises is for the caller; the thread must go on.
        return None, error
