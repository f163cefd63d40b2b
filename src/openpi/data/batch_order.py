"""Which samples make up batch number 0, 1, 2, ...: a pure function of a seed, whatever makes them.

A `BatchSource` says so, and where it is then. Of a dataset with random access, the order is a function of
(seed, epoch, index), and where we are is one number, the batches taken so far.
"""

import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from openpi.shared.tree import Tree

State: TypeAlias = dict[str, Any]
"""Where a loader is, as values of JSON."""

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Stretches:
    """Samples that are cheap to read one after the other: the frames of a video between two that decode alone.

    Attributes:
        begins: int64[k], ascending from 0: where each begins. A stretch goes on to the next one.
        per_pass: how many samples of a stretch are read in one pass.
    """

    begins: np.ndarray
    per_pass: int

    @staticmethod
    def of_episodes(bounds: np.ndarray, length: int, per_pass: int) -> "Stretches":
        """
        Args:
            bounds: int64[episodes, 2], the first sample of each episode and the one behind its last.
            length: of a stretch, counted from where an episode begins.
        """
        begins = [np.arange(begin, end, length) for begin, end in bounds]
        return Stretches(np.concatenate(begins).astype(np.int64), per_pass)

    def permutation(self, num_samples: int, rng: np.random.Generator, pool: int, offset: int) -> np.ndarray:
        """All samples in random order, in which those of a pass lie within one pool.

        Each stretch is dealt out at random into passes, the passes are shuffled, and so are the samples of each pool.

        Args:
            pool: samples of a pool.
            offset: by how many the first pool is shorter.
        """
        sizes = np.diff([*self.begins, num_samples])
        dealt = np.lexsort((rng.random(num_samples), np.repeat(np.arange(len(sizes)), sizes)))
        rank = np.arange(num_samples) - np.repeat(self.begins, sizes)
        of_pass = np.cumsum(rank % self.per_pass == 0) - 1
        shuffled = dealt[np.argsort(rng.random(of_pass[-1] + 1)[of_pass], kind="stable")]
        pools = (np.arange(num_samples) + offset) // pool
        return shuffled[np.lexsort((rng.random(num_samples), pools))]


class BatchOrder:
    """Which samples make up batch number 0, 1, 2, ... of an endless run.

    Every epoch is a new permutation; its last samples that do not fill a batch are left out.

    Args:
        stretches: samples to be read together, within `batches_per_pool` batches, which begin at multiples of that;
            None = any order.
    """

    def __init__(
        self, num_samples: int, batch_size: int, *, seed: int, shuffle: bool, stretches: Stretches | None = None
    ):
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
        self._stretches = stretches if shuffle else None
        # As many passes in a pool as samples in a batch: a batch has one of each, more or less.
        self.batches_per_pool = 1 if self._stretches is None else self._stretches.per_pass
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
            self._epoch = epoch, self._drawn(epoch, np.random.default_rng((self._seed, epoch)))
        return self._epoch[1]

    def _drawn(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        if self._stretches is None:
            return rng.permutation(self._num_samples)
        begun = epoch * self.batches_per_epoch % self.batches_per_pool
        pool, offset = self.batches_per_pool * self._batch_size, begun * self._batch_size
        return self._stretches.permutation(self._num_samples, rng, pool, offset)


class BatchSource(Protocol[Item]):
    """What batches are made of: items that say which sample to make, a batch of them at a time.

    States are JSON values. Those of the processes of one run make up the state of the run; see `merged_state`.
    """

    identity: Mapping[str, object]
    """What the order depends on; part of every state."""

    def start(self) -> State:
        """The state before the first batch, without the identity."""
        ...

    def start_after(self, state: Tree) -> State:
        """The state before the first batch of a new order, for a run that has taken the batches before `state`, which
        is that of a source with another identity."""
        ...

    def batches(self, state: Tree) -> Generator[tuple[Sequence[Item], State], None, None]:
        """From `state` on, without end: the items of a batch, and the state after it. Any number of times."""
        ...

    def describe(self, item: Item) -> str:
        """What to call an item in messages."""
        ...


def merged_state(states: Sequence[Tree]) -> State:
    """The state of a run from those of its processes: where they have the same key, dicts are merged in turn."""
    merged = dict(states[0])
    for state in states[1:]:
        for key, value in state.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = merged_state([merged[key], value]) if both else value
    return merged


class IndexSource:
    """Batches of indices, by a `BatchOrder`; see `BatchLoader`."""

    def __init__(self, order: BatchOrder, identity: Mapping[str, object], part: tuple[int, int]):
        self.identity = identity
        self._order = order
        self._part = part

    def start(self) -> State:
        return {"next_batch": 0}

    def start_after(self, state: Tree) -> State:
        """At the next epoch, which is shuffled in a way of its own."""
        if not {"batch_size", "num_samples"} <= state.keys():  # of a stream
            return self.start()
        num_begun = -(-int(state["next_batch"]) // (int(state["num_samples"]) // int(state["batch_size"])))
        return {"next_batch": num_begun * self._order.batches_per_epoch}

    def describe(self, item: int) -> str:
        return f"sample {item}"

    def batches(self, state: Tree) -> Generator[tuple[Sequence[int], State], None, None]:
        for batch in itertools.count(int(state["next_batch"])):
            indices = np.split(self._order.indices(batch), self._part[1])[self._part[0]]
            yield indices.tolist(), {"next_batch": batch + 1}


def check_divisible(batch_size: int, part: tuple[int, int]) -> None:
    if batch_size % part[1]:
        raise ValueError(f"batch_size {batch_size} is not divisible by {part[1]} processes")
