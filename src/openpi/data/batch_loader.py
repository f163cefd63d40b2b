"""Batches of samples in an order that is a pure function of a seed, whatever makes them.

A source says which samples make up the next batch, and where it is then; workers make them. So the order is the same
for any number of workers, and a run resumes at the very batch at which it stopped. Of a dataset with random access,
the order is a function of (seed, epoch, index), and where we are is one number, the batches taken so far.

    items  ->  workers: make(item), of each; stack  ->  batches, in order, a few ahead
"""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import numpy as np

from openpi.data.dataset import Dataset, Sample

Batch = dict[str, Any]
"""A sample whose leaves have a leading batch axis."""

MAX_THREADS = 16
BATCHES_AHEAD = 2  # besides one in the hands of every worker


class BatchOrder:
    """Which samples make up batch number 0, 1, 2, ... of an endless run.

    Every epoch is a new permutation; its last samples that do not fill a batch are left out.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int, shuffle: bool):
        if batch_size < 1 or num_samples < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, but the dataset has {num_samples} samples; a batch needs at "
                f"least 1 sample and at most as many as there are"
            )
        self.batches_per_epoch = num_samples // batch_size
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch: tuple[int, np.ndarray] | None = None

    def indices(self, batch: int) -> np.ndarray:
        """int64[batch_size]: the samples of batch number `batch`."""
        epoch, position = divmod(batch, self.batches_per_epoch)
        begin = position * self._batch_size
        return self._permutation(epoch)[begin : begin + self._batch_size]

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._num_samples)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.random.default_rng((self._seed, epoch)).permutation(self._num_samples)
        return self._epoch[1]


class BatchSource(Protocol):
    """What batches are made of: items that say which sample to make, a batch of them at a time.

    States are JSON values. Those of the processes of one run make up the state of the run; see `merged_state`.
    """

    identity: Mapping[str, Any]
    """What the order depends on; part of every state."""

    def start(self) -> dict[str, Any]:
        """The state before the first batch, without the identity."""
        ...

    def batches(self, state: Mapping[str, Any]) -> Generator[tuple[Sequence[Any], dict[str, Any]], None, None]:
        """From `state` on, without end: the items of a batch, and the state after it. Any number of times."""
        ...


def merged_state(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a run from those of its processes: where they have the same key, dicts are merged in turn."""
    merged = dict(states[0])
    for state in states[1:]:
        for key, value in state.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merged_state([merged[key], value]) if both else value
    return merged


class IndexSource:
    """Batches of indices, by a `BatchOrder`; see `BatchLoader`."""

    def __init__(self, order: BatchOrder, identity: Mapping[str, Any], part: tuple[int, int]):
        self.identity = identity
        self._order = order
        self._part = part

    def start(self) -> dict[str, Any]:
        return {"next_batch": 0}

    def batches(self, state: Mapping[str, Any]) -> Generator[tuple[Sequence[int], dict[str, Any]], None, None]:
        for batch in itertools.count(int(state["next_batch"])):
            indices = np.split(self._order.indices(batch), self._part[1])[self._part[0]]
            yield indices.tolist(), {"next_batch": batch + 1}


class SourceLoader:
    """Iterates over the batches of a source, forever or `num_batches` at a time.

    Args:
        source: which samples.
        make: from an item of the source to its sample; with workers it is pickled, once.
        num_workers: processes that make batches; 0 = threads of this process.
        num_batches: an iteration ends after so many, and the next one begins anew; None = endless.
    """

    def __init__(
        self,
        source: BatchSource,
        make: Callable[[Any], Sample],
        *,
        num_workers: int = 0,
        num_batches: int | None = None,
    ):
        self._source = source
        self._make = make
        self._num_batches = num_batches
        self._num_workers = num_workers
        self._state = source.start()
        self._executor: Executor | None = None

    def state(self) -> dict[str, Any]:
        """Where we are, as JSON values: restoring it makes the next batch the one that would come now."""
        return {**self._state, **self._source.identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken; running iterators are not affected.

        Raises:
            ValueError: the state is of a loader with another dataset, batch size or seed.
        """
        identity = self._source.identity
        different = {key: (state.get(key), value) for key, value in identity.items() if state.get(key) != value}
        if different:
            changes = ", ".join(f"{key} was {was}, is {now}" for key, (was, now) in different.items())
            raise ValueError(f"the data order cannot be resumed: {changes}. Use the same values, or start anew")
        self._state = {key: value for key, value in state.items() if key not in identity}

    def restart(self) -> None:
        """The next iteration begins with the first batch; running iterators are not affected."""
        self._state = self._source.start()

    def __iter__(self) -> Iterator[Batch]:
        ahead: deque[tuple[Callable[[], Batch], dict[str, Any]]] = deque()
        submitted = self._state["next_batch"]
        end = None if self._num_batches is None else max(submitted, self._num_batches)
        limit = BATCHES_AHEAD + self._num_workers
        with contextlib.closing(self._source.batches(self._state)) as batches:
            while True:
                while len(ahead) < limit and (end is None or submitted < end):
                    items, state = next(batches)
                    ahead.append((self._submit(items), state))
                    submitted += 1
                if not ahead:
                    self._state = self._source.start()
                    return
                wait, state = ahead.popleft()
                batch = wait()
                self._state = state
                yield batch

    def close(self) -> None:
        """Ends the workers. Iterating again starts new ones."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _submit(self, items: Sequence[Any]) -> Callable[[], Batch]:
        """Starts work on a batch; the function returned waits for it."""
        if self._executor is None:
            self._executor = self._start()
            weakref.finalize(self, self._executor.shutdown, wait=False, cancel_futures=True)
        if self._num_workers:
            future = self._executor.submit(_make_batch, items)
            return lambda: _result(future)
        samples = [self._executor.submit(self._make, item) for item in items]
        return lambda: stack([sample.result() for sample in samples])

    def _start(self) -> Executor:
        if not self._num_workers:
            return ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="loader")
        try:
            pickled = pickle.dumps(self._make, protocol=pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the dataset or a transform cannot be sent to worker processes ({error}); define it at the "
                f"top level of a module, or use num_workers=0"
            ) from error
        # Not fork: a process that runs JAX or a video decoder has threads, which a fork would lose in
        # mid-air.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._num_workers, context, initializer=_start_worker, initargs=(pickled,))


class BatchLoader(SourceLoader):
    """Batches of a dataset with random access.

    Args:
        dataset: samples; with workers it is pickled, once.
        batch_size: of the global batch, over all processes of a distributed run.
        num_workers, num_batches: see `SourceLoader`.
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
        part: tuple[int, int] = (0, 1),
    ):
        check_divisible(batch_size, part)
        order = BatchOrder(len(dataset), batch_size, seed=seed, shuffle=shuffle)
        identity = {"num_samples": len(dataset), "batch_size": batch_size, "seed": seed, "shuffle": shuffle}
        super().__init__(
            IndexSource(order, identity, part), dataset.__getitem__, num_workers=num_workers, num_batches=num_batches
        )
        self.batches_per_epoch = order.batches_per_epoch
        self.num_samples = len(dataset)


def check_divisible(batch_size: int, part: tuple[int, int]) -> None:
    if batch_size % part[1]:
        raise ValueError(f"batch_size {batch_size} is not divisible by {part[1]} processes")


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


def _stack_leaves(key: str, values: Sequence[Any]) -> np.ndarray:
    arrays = [np.asarray(value) for value in values]
    if len({array.shape for array in arrays}) > 1:
        shapes = sorted({array.shape for array in arrays})
        raise ValueError(f"samples of one batch differ in the shape of '{key}': {shapes}")
    return np.stack(arrays)


# --- inside a worker process
# --------------------------------------------------------------------------------------

_make: Callable[[Any], Sample] | None = None


def _start_worker(pickled: bytes) -> None:
    global _make
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends us
    # Should a transform bring in JAX: workers compute on the host and leave the accelerator alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    _make = pickle.loads(pickled)


def _make_batch(items: Sequence[Any]) -> Batch:
    assert _make is not None
    return stack([_make(item) for item in items])


def _result(future: "Future[Batch]") -> Batch:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a data worker died without an error of its own, which usually means that memory ran out; use "
            "fewer workers (num_workers), or 0 to load in this process. A script that trains needs the usual "
            "guard `if __name__ == '__main__':`"
        ) from error
