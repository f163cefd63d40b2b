"""How fast a robot plays its chunks, as far as its server can tell: when it asks, and how far it has moved since.

    asked    o--------------o--------------o      whole: from one request to the next
    answered    o--------------o--------------o   own: from an answer to the next request

A robot that waits for its answer plays in `own`, one that goes on meanwhile in `whole`; a rate is told of when neither
explains it. How many rows were played is read off the state where actions are positions of it (`hold` of the contract
is `stay`), and else bounded by what a chunk has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from openpi.policies.contract import Contract

_INTERVALS = 16
_FACTOR = 2.0  # a rate that differs by less may be that of a robot that lags, or hesitates
_NO_ROBOT = 10.0  # more than this times the contract's rate: a program that sends what was recorded
_STEADY = 0.25  # spread of the intervals, of their median: nobody stops in between, as to arrange a scene
_THINKS = 0.2  # of an interval, at least: who keeps a rate waits for the next tick
# Least part of a range that is motion, largest error of its rows, of the motion, and how many intervals have to fit.
_MOVED, _FITS, _MATCHES = 0.004, 0.45, 4
_NEAR = 0.15  # of the range, from a state to the first row after it


class _Interval(NamedTuple):
    """Between two requests.

    Attributes:
        rows: of the chunk that the motion fits; 0 = unknown.
    """

    whole_s: float
    own_s: float
    has_moved: bool
    rows: int


class Pace:
    """Of one robot. Requests and answers take turns; not for several threads at once."""

    def __init__(self, contract: Contract) -> None:
        self._rate_hz, self._horizon = contract.control_hz or 0.0, contract.action_horizon
        self._keys = [vector.key for vector in contract.state]
        self._follows = np.flatnonzero([hold == "stay" for hold in contract.hold])
        span = np.subtract(contract.action_high or (), contract.action_low or ())
        self._span = np.maximum(span, 1e-6)[self._follows] if len(span) else np.ones(len(self._follows))
        self._intervals: deque[_Interval] = deque(maxlen=_INTERVALS)
        self._asked_s = self._answered_s = 0.0
        self._state: np.ndarray | None = None
        self._chunk: np.ndarray | None = None

    def asked(self, leaves: Mapping[str, object], now_s: float) -> Iterator[str]:
        """What is suspicious about a request at this time.

        Args:
            leaves: of the observation, by key.
        """
        state = np.concatenate(
            [np.asarray(leaves[k], np.float64).reshape(-1) for k in self._keys if k in leaves] or [[]]
        )
        if self._state is not None and len(state) == len(self._state) > 0 and now_s > self._asked_s:
            moved, own_s = state - self._state, now_s - max(self._answered_s, self._asked_s)
            self._intervals.append(
                _Interval(now_s - self._asked_s, own_s, bool(np.abs(moved).max() > 1e-6), self._rows(moved))
            )
        self._state, self._chunk, self._asked_s = state, None, now_s
        if self._rate_hz > 0 and len(self._intervals) == _INTERVALS:
            yield from self._told()

    def answered(self, actions: ArrayLike | None, now_s: float) -> None:
        """
        Args:
            actions: float[h w], what the robot gets; None = nothing.
        """
        self._answered_s = now_s
        chunk = np.asarray(() if actions is None else actions)
        if chunk.ndim == 2 and len(self._follows) and chunk.shape[1] > self._follows[-1]:
            self._chunk = chunk

    def _rows(self, moved: np.ndarray) -> int:
        """How many rows of the last chunk go as far as the robot went, in the same direction."""
        if self._chunk is None or len(self._chunk) < 2 or len(moved) <= self._follows[-1]:
            return 0
        assert self._state is not None
        # What does not go where it is told, as a hand around something, shows nothing.
        goes = np.abs(self._chunk[0, self._follows] - self._state[self._follows]) < _NEAR * self._span
        goes, span = self._follows[goes], self._span[goes]
        went = moved[goes] / span
        length = float(np.sqrt(went @ went))
        if length < _MOVED:
            return 0
        rows = self._chunk[:, goes] / span
        # The robot lags, by as much at the beginning as at the end: rows are compared by what lies between them.
        path = np.concatenate([rows, 2 * rows[-1:] - rows[-2:-1]]) - (rows[0] + went)
        errors = np.add.reduce(path * path, axis=1)
        best = int(errors.argmin())
        return best if np.sqrt(errors[best]) < _FITS * length else 0

    def _told(self) -> Iterator[str]:
        whole = sorted(each.whole_s for each in self._intervals)
        middle_s = whole[_INTERVALS // 2]
        if (
            whole[-2] - whole[1] > _STEADY * middle_s
            or 2 * sum(each.has_moved for each in self._intervals) < _INTERVALS
        ):
            return
        matched = [each for each in self._intervals if each.rows]
        if len(matched) >= _MATCHES:
            rows = sum(each.rows for each in matched)
            least_hz = rows / sum(each.whole_s for each in matched)
            most_hz = rows / max(1e-9, sum(each.own_s for each in matched))
            how = "moves as if it played"
        else:
            own_s = sorted(each.own_s for each in self._intervals)[_INTERVALS // 2]
            least_hz, most_hz = 1 / middle_s, self._horizon / max(1e-9, own_s)
            how = f"asks every {middle_s:.2g} s, for chunks of {self._horizon} rows: it plays"
        keeps_time = sum(each.own_s for each in self._intervals) > _THINKS * sum(whole)
        if most_hz * _FACTOR < self._rate_hz:
            yield self._sentence(f"{how} at most {most_hz:.2g} rows a second", ", and ask before a chunk is over")
        elif keeps_time and self._rate_hz * _FACTOR < least_hz < self._rate_hz * _NO_ROBOT:
            yield self._sentence(f"{how} at least {least_hz:.2g} rows a second")

    def _sentence(self, found: str, more: str = "") -> str:
        return (
            f"[rate] requests: the robot {found}, training had {self._rate_hz:g}; run its loop at "
            f"{self._rate_hz:g} Hz, one row a tick{more}"
        )
