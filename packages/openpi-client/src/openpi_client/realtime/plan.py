"""The action rows that are still to be played, and from which observation each comes.

Rows have positions on a line that only playing moves along, so a robot that holds, or a loop that skips ticks, loses
none of them:

    position      40  41  42  43  44  45  46  47  48  49
    chunk 7        0   1   2   3   4   5                       asked for at position 40
    chunk 8                    0   1   2   3   4   5   6       asked for at 43, came at 45: its rows 0 and 1 are past
    played         7   7   7   7   7   8   8   8 ...           delay of chunk 8 in rows: 2, counted, not estimated

Positions may be fractions: at a quarter of the speed, each tick moves by a quarter of a row.
"""

import math
from typing import Callable, List, NamedTuple, Optional

import numpy as np

from openpi_client.realtime.actions import ActionSpec

# Fractions of a row that are rounding errors of adding up speeds.
_ROUNDING = 1e-6


class Row(NamedTuple):
    """One action.

    Attributes:
        values: float64[width].
        observed_s: when the observation of the oldest chunk in it was made.
        chunk: number of the newest chunk in it.
    """

    values: np.ndarray
    observed_s: float
    chunk: int


class Plan:
    """The last few chunks, in memory that is allocated before. `position` is that of the next row to play."""

    def __init__(self, spec: ActionSpec) -> None:
        """
        Args:
            spec: of an action.
        """
        self.position = 0.0
        self._spec = spec
        self._rows = np.zeros((0, 0, spec.width))
        self._lengths: List[int] = []
        self._starts: List[float] = []
        self._observed_s: List[float] = []
        self._numbers: List[int] = []
        self.make_room(1, 1)
        self._newest = 0

    def make_room(self, horizon: int, max_chunks: int) -> None:
        """For more than before; what is still to be played stays.

        Args:
            horizon: rows of a chunk at most.
            max_chunks: that are kept; 1 = a new chunk replaces the old one.
        """
        more = max_chunks - len(self._lengths)
        self._rows = np.pad(self._rows, ((0, more), (0, horizon - self._rows.shape[1]), (0, 0)))
        self._lengths += [0] * more
        self._starts += [0.0] * more
        self._observed_s += [-math.inf] * more
        self._numbers += [-1] * more

    def add(self, start: float, rows: np.ndarray, observed_s: float, chunk: int) -> None:
        """Takes a chunk, [n <= horizon, width], whose first row belongs to position `start`."""
        self._newest = slot = (self._newest + 1) % len(self._lengths)
        self._rows[slot, : len(rows)] = rows
        self._lengths[slot], self._starts[slot] = len(rows), start
        self._observed_s[slot], self._numbers[slot] = observed_s, chunk

    def clear(self) -> None:
        """Nothing is left to be played."""
        self._lengths = [0] * len(self._lengths)

    @property
    def newest_s(self) -> float:
        """When the observation of the newest chunk was made."""
        return self._observed_s[self._newest]

    def left(self, position: float, oldest_s: float) -> np.ndarray:
        """Rows of the newest chunk from `position` on, [n, width], one apart; none if observed before `oldest_s`."""
        is_fresh = self._observed_s[self._newest] >= oldest_s
        count = self.num_from(position) if is_fresh else 0
        rows = [self._at(self._newest, position + i) for i in range(count)]
        return np.array(rows).reshape(count, self._rows.shape[2])

    def num_from(self, position: float) -> int:
        """How many rows the newest chunk has from there on, whatever its age."""
        left = self._starts[self._newest] + self._lengths[self._newest] - position
        return max(0, math.ceil(left - _ROUNDING)) if self._lengths[self._newest] else 0

    def row(self, combine: Callable[[np.ndarray], np.ndarray], oldest_s: float) -> Optional[Row]:
        """The action at `position`; None when no chunk that was observed since `oldest_s` reaches it.

        Args:
            combine: [n, width], of all chunks that do, oldest first -> [width].
        """
        count = len(self._lengths)
        slots = [(self._newest + 1 + i) % count for i in range(count)]
        slots = [slot for slot in slots if self._observed_s[slot] >= oldest_s and self._reaches(slot)]
        if not slots:
            return None
        rows = np.array([self._at(slot, self.position) for slot in slots])
        values = combine(rows)
        if len(rows) > 1:
            values = np.where(self._spec.are_a_turn_apart(rows, rows[-1]).any(axis=0), rows[-1], values)
        return Row(values, min(self._observed_s[slot] for slot in slots), self._numbers[slots[-1]])

    def _reaches(self, slot: int) -> bool:
        offset = self.position - self._starts[slot]
        return -_ROUNDING <= offset < self._lengths[slot] - _ROUNDING

    def _at(self, slot: int, position: float) -> np.ndarray:
        """The row of a chunk, between two rows a mixture of them; behind the last row that one."""
        offset = max(0.0, position - self._starts[slot] + _ROUNDING)
        index, last = int(offset), self._lengths[slot] - 1
        fraction = offset - index
        if fraction < 2 * _ROUNDING or index >= last:
            return self._rows[slot, min(index, last)]
        fraction -= _ROUNDING
        before, after = self._rows[slot, index], self._rows[slot, index + 1]
        nearer = before if fraction < 0.5 else after
        return np.where(self._spec.are_a_turn_apart(before, after), nearer, (1 - fraction) * before + fraction * after)
