"""Batches of samples in an order that is a pure function of a seed, whatever makes them.

A source (`batch_order`) says which samples make up the next batch, and where it is then; workers make them. So the
order is the same for any number of workers, and a run resumes at the very batch at which it stopped.

    items  ->  workers: make(item), of each; stack  ->  batches, in order, a few ahead
"""

import contextlib
import functools
import itertools
import logging
import multiprocessing
import os
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

import numpy as np

from openpi.data.batch_order import BatchOrder, BatchSource, IndexSource, State, Stretches, check_divisible
from openpi.data.dataset import Dataset, Sample
from openpi.data.worker_board import WorkerBoard
from openpi.shared import worker_process
from openpi.shared.tree import Tree

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
"""A sample whose leaves have a leading batch axis."""

MAX_THREADS = 16
BATCHES_AHEAD = 2  # besides one in the hands of every worker
# A worker is named when it has been at one sample for so long; then again after twice the time, and so on.
STUCK_AFTER_S = 10.0
_GOODBYE_NAME = "loader-goodbye"
_LOOK_EVERY_S = 0.5
_GOODBYE_S = 5.0

T = TypeVar("T")
Item = TypeVar("Item")


class LoaderClosedError(RuntimeError):
    """The loader was closed while a batch was being waited for."""


class SourceLoader(Generic[Item]):
    """Iterates over the batches of a source, forever or `num_batches` at a time.

    Args:
        source: which samples.
        make: from an item of the source to its sample; with workers it is pickled, once.
        num_workers: processes that make batches; 0 = threads of this process.
        num_batches: an iteration ends after so many, and the next one begins anew; None = endless.
        name: of the data, for messages.
        together: batches whose samples a worker makes in one go, in ascending order of their items, where those that
            are near each other are cheaper to make; they begin at multiples of it.
    """

    batches_per_epoch: int | None = None  # of a stream, which has no epochs

    def __init__(
        self,
        source: BatchSource[Item],
        make: Callable[[Item], Sample],
        *,
        num_workers: int = 0,
        num_batches: int | None = None,
        name: str | None = None,
        together: int = 1,
    ):
        self._together = together
        self._name = name or "the data"
        self._closed = threading.Event()  # of the iterations until now
        self._lock = threading.Lock()
        self._source = source
        self._make = make
        self._num_batches = num_batches
        self._num_workers = num_workers
        self._state = source.start()
        self._executor: Executor | None = None

    @property
    def identity(self) -> dict[str, object]:
        """What the order depends on."""
        return dict(self._source.identity)

    def state(self) -> State:
        """Where we are, as JSON values: restoring it makes the next batch the one that would come now."""
        return {**self._state, **self._source.identity}

    def restore(self, state: Tree) -> None:
        """Continues where `state` was taken; running iterators are not affected.

        Raises:
            ValueError: the state is of a loader with another dataset, batch size or seed.
        """
        different = self.changes_since(state)
        if different:
            changes = ", ".join(f"{key} was {was}, is {now}" for key, (was, now) in different.items())
            raise ValueError(f"the data order cannot be resumed: {changes}. Use the same values, or start anew")
        self._state = {key: value for key, value in state.items() if key not in self._source.identity}

    def changes_since(self, state: Tree) -> dict[str, tuple[object, object]]:
        """What the order depends on and is another than when `state` was taken: before, and now."""
        identity = self._source.identity
        different = {key: (state.get(key), value) for key, value in identity.items() if state.get(key) != value}
        gone = state.keys() - identity.keys() - self._source.start().keys()
        return {**different, **{key: (state[key], None) for key in sorted(gone)}}

    def restart_after(self, state: Tree) -> None:
        """Begins a new order, for a run that goes on with other data; `state` is where it was in those before."""
        self._state = self._source.start_after(state)

    def restart(self) -> None:
        """The next iteration begins with the first batch; running iterators are not affected."""
        self._state = self._source.start()

    def __iter__(self) -> Iterator[Batch]:
        ahead: deque[tuple[Callable[[], Batch], State]] = deque()
        closed = self._closed
        submitted = self._state["next_batch"]
        end = None if self._num_batches is None else max(submitted, self._num_batches)
        # Of what is made together, what is in use and one more for every worker.
        limit = BATCHES_AHEAD + self._num_workers if self._together == 1 else self._together * max(self._num_workers, 1)
        with contextlib.closing(self._source.batches(self._state)) as batches:
            while True:
                while len(ahead) < limit and (end is None or submitted < end):
                    stop = submitted - submitted % self._together + self._together
                    work = list(itertools.islice(batches, (stop if end is None else min(stop, end)) - submitted))
                    made = self._submit([items for items, _ in work], closed)
                    ahead.extend(zip(made, (state for _, state in work), strict=True))
                    submitted += len(work)
                if not ahead:
                    self._state = self._source.start()
                    return
                wait, state = ahead.popleft()
                batch = wait()
                self._state = state
                yield batch

    def close(self) -> None:
        """Ends the workers, and iterations that wait for them. Iterating again starts new ones.

        May be called in any thread. Processes that do not come back are killed; threads cannot be.
        """
        with self._lock:
            self._closed.set()
            self._closed = threading.Event()
            executor, self._executor = self._executor, None
        if executor is None:
            return
        goodbye = threading.Thread(
            target=executor.shutdown, kwargs={"cancel_futures": True}, name=_GOODBYE_NAME, daemon=True
        )
        goodbye.start()
        goodbye.join(_GOODBYE_S)
        if goodbye.is_alive():
            self._board.kill_busy()
            goodbye.join(_GOODBYE_S)

    def _submit(self, batches: Sequence[Sequence[Item]], closed: threading.Event) -> list[Callable[[], Batch]]:
        """Starts work on batches; the functions returned wait for one each."""
        with self._lock:
            if closed.is_set():
                raise LoaderClosedError("the data loader was closed")
            if self._executor is None:
                self._executor = self._start()
                weakref.finalize(self, self._executor.shutdown, wait=False, cancel_futures=True)
            items, rows = _joined(batches) if self._together == 1 else _ascending(batches)
            if self._num_workers:
                work = [(item, self._source.describe(item)) for item in items]
                future = self._executor.submit(_make_batches, work, rows)
                return [functools.partial(self._one_of, future, number, closed) for number in range(len(batches))]
            size = 1 if self._together == 1 else -(-len(items) // _num_threads())
            begins = range(0, len(items), size)
            parts = [self._executor.submit(self._make_here, items[begin : begin + size]) for begin in begins]
            return [functools.partial(self._stacked, parts, size, numbers, closed) for numbers in rows]

    def _one_of(self, future: "Future[list[Batch]]", number: int, closed: threading.Event) -> Batch:
        return self._result(future, closed)[number]

    def _stacked(
        self, parts: "Sequence[Future[list[Sample]]]", size: int, numbers: Sequence[int], closed: threading.Event
    ) -> Batch:
        """Of samples by number, of which each part makes as many."""
        return stack([self._result(parts[i // size], closed)[i % size] for i in numbers])

    def _make_here(self, items: Sequence[Item]) -> list[Sample]:
        samples = []
        for item in items:
            with self._board.at_work(self._source.describe(item)):
                samples.append(self._make(item))
        return samples

    def _result(self, future: "Future[T]", closed: threading.Event) -> T:
        """Waits for a worker; says so when one does not come back."""
        told_after_s = STUCK_AFTER_S
        while not future.done():
            with contextlib.suppress(TimeoutError, CancelledError):
                future.exception(_LOOK_EVERY_S)
            if closed.is_set():
                break
            longest = self._board.longest()
            if longest is None or longest[0] < STUCK_AFTER_S:
                told_after_s = STUCK_AFTER_S
            elif longest[0] >= told_after_s and not future.done():
                told_after_s *= 2
                logger.warning(
                    "waiting for data: %s of %s for %.0f s. Is the disk or the network slow, or the file damaged? "
                    "SIGTERM or Ctrl-C ends a training run with a checkpoint",
                    longest[1],
                    self._name,
                    longest[0],
                )
        if closed.is_set():
            raise LoaderClosedError("the data loader was closed")
        return _result(future)

    def _start(self) -> Executor:
        if not self._num_workers:
            self._board = WorkerBoard(_num_threads())
            return ThreadPoolExecutor(_num_threads(), thread_name_prefix="loader")
        try:
            packed = worker_process.Packed(self._make)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the dataset or a transform cannot be sent to worker processes ({error}); define it at the "
                f"top level of a module, or use num_workers=0"
            ) from error
        # Not fork: a process that runs JAX or a video decoder has threads, which a fork would lose in
        # mid-air.
        context = multiprocessing.get_context("spawn")
        self._board = WorkerBoard(self._num_workers, context)
        return ProcessPoolExecutor(
            self._num_workers, context, initializer=_start_worker, initargs=(packed, self._board)
        )


def _joined(batches: Sequence[Sequence[Item]]) -> tuple[list[Item], list[list[int]]]:
    """Items of batches in one list, and where those of each batch are in there."""
    ends = itertools.accumulate(map(len, batches), initial=0)
    return [*itertools.chain(*batches)], [list(range(*bounds)) for bounds in itertools.pairwise(ends)]


def _ascending(batches: Sequence[Sequence[Any]]) -> tuple[list[Any], list[list[int]]]:
    """As `_joined`, with those next to each other that are near each other in the dataset."""
    items, rows = _joined(batches)
    order = sorted(range(len(items)), key=items.__getitem__)
    place = {number: i for i, number in enumerate(order)}
    return [items[number] for number in order], [[place[number] for number in numbers] for numbers in rows]


def _num_threads() -> int:
    return min(MAX_THREADS, os.cpu_count() or 1)


class BatchLoader(SourceLoader[int]):
    """Batches of a dataset with random access.

    Args:
        dataset: samples; with workers it is pickled, once.
        batch_size: of the global batch, over all processes of a distributed run.
        num_workers, num_batches, name: see `SourceLoader`.
        stretches: of the dataset, whose samples are then read in passes; see `BatchOrder`.
        part: (i, n): yield only the i-th of n equal parts of every batch, for distributed runs.
    Raises:
        ValueError: the dataset is smaller than a batch, or the batch has no n equal parts.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        num_workers: int = 0,
        num_batches: int | None = None,
        name: str | None = None,
        part: tuple[int, int] = (0, 1),
        stretches: Stretches | None = None,
    ):
        check_divisible(batch_size, part)
        order = BatchOrder(len(dataset), batch_size, seed=seed, shuffle=shuffle, stretches=stretches)
        identity: dict[str, Any] = {
            "num_samples": len(dataset),
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
        }
        if order.batches_per_pool > 1:
            assert stretches is not None
            identity |= {"frames_per_pass": stretches.per_pass, "num_stretches": len(stretches.begins)}
        work: dict[str, Any] = {"num_workers": num_workers, "num_batches": num_batches, "name": name}
        work["together"] = order.batches_per_pool
        super().__init__(IndexSource(order, identity, part), dataset.__getitem__, **work)
        self.batches_per_epoch = order.batches_per_epoch
        self.num_samples = len(dataset)


def has_stuck_threads() -> bool:
    """Whether a loader of this process was closed and a thread of it does not come back: Python would wait for it when
    it exits, for ever."""
    return any(thread.name == _GOODBYE_NAME for thread in threading.enumerate())


def stack(samples: Sequence[Sample]) -> Batch:
    """Samples of equal structure -> one batch. Strings become a NumPy string array.

    Raises:
        ValueError: samples differ in keys or shapes.
    """
    first = samples[0]
    batch: Batch = {}
    for key, value in first.items():
        values = [_entry(sample, key) for sample in samples]
        batch[key] = stack(values) if isinstance(value, Mapping) else _stack_leaves(key, values)
    return batch


def _entry(sample: Sample, key: str) -> Any:
    if key not in sample:
        raise ValueError(f"samples of one batch differ: '{key}' is only in some (another has {list(sample)})")
    return sample[key]


def _stack_leaves(key: str, values: Sequence[object]) -> np.ndarray:
    arrays = [np.asarray(value) for value in values]
    if len({array.shape for array in arrays}) > 1:
        shapes = sorted({array.shape for array in arrays})
        raise ValueError(f"samples of one batch differ in the shape of '{key}': {shapes}")
    return np.stack(arrays)


# --- inside a worker process
# --------------------------------------------------------------------------------------

_make: Callable[[object], Sample] | None = None
_board: WorkerBoard | None = None


def _start_worker(packed: worker_process.Packed[Sample], board: WorkerBoard) -> None:
    global _make, _board
    worker_process.start()
    _board = board
    # Should a transform bring in JAX: workers compute on the host and leave the accelerator alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with board.at_work("the start"):
        _make = packed.open()


def _make_batches(work: Sequence[tuple[object, str]], rows: Sequence[Sequence[int]]) -> list[Batch]:
    """Of items, each with what to call it, and the numbers of those that each batch has."""
    try:
        made = [_made(item, name) for item, name in work]
    except Exception as error:
        _check_travels(error)
        raise
    return [stack([made[i] for i in numbers]) for numbers in rows]


def _check_travels(error: Exception) -> None:
    """Raises a RuntimeError in place of one that cannot be sent: the pool would take it for the death of a worker."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told.with_traceback(error.__traceback__) from None


def _made(item: object, name: str) -> Sample:
    assert _make is not None
    assert _board is not None
    with _board.at_work(name):
        return _make(item)


def _result(future: "Future[T]") -> T:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a data worker died without an error of its own, which usually means that memory ran out; use "
            "fewer workers (num_workers), or 0 to load in this process. A script that trains needs the usual "
            "guard `if __name__ == '__main__':`"
        ) from error
