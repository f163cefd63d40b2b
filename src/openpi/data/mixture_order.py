"""The order of a mixture: from which dataset each sample comes, and which of its samples it is.

After any number of samples, each dataset has given its share of them to within one (R. Tijdeman, "The chairman
assignment problem", 1980), so weights hold exactly and not just on average; within a dataset every pass is a new
permutation, and none is cut short. A small dataset with a large weight is passed through more often.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpi.data.batch_order import State, check_divisible
from openpi.data.dataset import Dataset, Sample
from openpi.shared.tree import Tree


@dataclass(frozen=True)
class MixedIn:
    """One dataset of a mixture.

    Attributes:
        name: for messages, and to see when a run continues that it is the same.
        share: of all samples; those of a mixture add up to 1.
    """

    name: str
    num_samples: int
    share: float


def shares(weights: Sequence[float]) -> list[float]:
    """Weights as shares of 1."""
    total = float(np.sum(weights))
    return [weight / total for weight in weights]


class ConcatenatedDataset:
    """The samples of one dataset behind those of another."""

    def __init__(self, datasets: Sequence[Dataset]):
        self._datasets = tuple(datasets)
        self._ends = np.cumsum([len(dataset) for dataset in datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int, /) -> Sample:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._datasets[number][index - int(self._ends[number]) + len(self._datasets[number])]


class MixtureSource:
    """Batches of indices into the datasets one behind the other, by weight, without end.

    A state says how many samples each dataset has given, and how often the order began anew.

    Args:
        batch_size: of the global batch, over all processes of a distributed run.
        part: (i, n): only the i-th of n equal parts of every batch.
    Raises:
        ValueError: a dataset is empty, or the batch has no n equal parts.
    """

    def __init__(
        self, datasets: Sequence[MixedIn], *, batch_size: int, seed: int, shuffle: bool, part: tuple[int, int] = (0, 1)
    ):
        check_divisible(batch_size, part)
        if empty := [dataset.name for dataset in datasets if not dataset.num_samples]:
            raise ValueError(f"{empty} of the mixture have no samples; leave them out of it")
        self.identity: Mapping[str, Any] = {
            "num_samples": sum(dataset.num_samples for dataset in datasets),
            "mixture": [[dataset.name, dataset.num_samples, dataset.share] for dataset in datasets],
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
        }
        self._sizes = [dataset.num_samples for dataset in datasets]
        self._shares = np.array([dataset.share for dataset in datasets])
        self._begins = np.cumsum([0, *self._sizes[:-1]])
        self._batch_size, self._seed, self._shuffle, self._part = batch_size, seed, shuffle, part
        self._passes: dict[int, tuple[tuple[int, int], np.ndarray]] = {}

    def start(self) -> State:
        return {"next_batch": 0, "taken": [0] * len(self._sizes), "order": 0}

    def start_after(self, state: Tree) -> State:
        """From the beginning, shuffled in a way of its own."""
        return {**self.start(), "order": int(state.get("order", 0)) + 1}

    def describe(self, item: int) -> str:
        number = int(np.searchsorted(self._begins, item, side="right")) - 1
        return f"sample {item - self._begins[number]} of {self.identity['mixture'][number][0]}"

    def batches(self, state: Tree) -> Generator[tuple[Sequence[int], State], None, None]:
        taken, order, batch = list(state["taken"]), int(state["order"]), int(state["next_batch"])
        while True:
            items = []
            for _ in range(self._batch_size):
                number = self._next(taken)
                items.append(self._item(number, taken[number], order))
                taken[number] += 1
            batch += 1
            mine = np.split(np.array(items), self._part[1])[self._part[0]]
            yield mine.tolist(), {"next_batch": batch, "taken": list(taken), "order": order}

    def _next(self, taken: Sequence[int]) -> int:
        """The dataset that is due first, of those that may give a sample already."""
        slack = 1 / max(1, 2 * len(taken) - 2)
        counts = np.array(taken)
        may = self._shares * (counts.sum() + 1) - counts >= slack - 1e-9
        due = (counts + 1 - slack) / self._shares
        return int(np.argmin(np.where(may, due, np.inf))) if may.any() else int(np.argmin(due))

    def _item(self, number: int, taken: int, order: int) -> int:
        which_pass, position = divmod(taken, self._sizes[number])
        if not self._shuffle:
            return int(self._begins[number]) + position
        if self._passes.get(number, ((-1, -1),))[0] != (order, which_pass):
            rng = np.random.default_rng((self._seed, order, number, which_pass))
            self._passes[number] = (order, which_pass), rng.permutation(self._sizes[number])
        return int(self._begins[number] + self._passes[number][1][position])
