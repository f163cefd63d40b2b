"""Grippers that open where others close: `consistency.gripper`; or do not move: `anomalies.gripper-stuck`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from openpi.data.check.findings import Finding, Severity
from openpi.data.check.subject import MIN_EPISODES, Pair, Subject, Vector
from openpi.data.lerobot.episode_table import leave_out

_MOST, _FEW = 0.8, 0.1  # of the episodes agree; more than a few are another task
_AT_ITS_END = 0.15  # of the range: wide open, or closed; elsewhere a start says nothing
_FEWEST_STARTS = 8  # fewer are on one side by chance
_MOVES, _STAYS = 0.4, 0.05  # of the range of the dataset
_FIRST_FRAMES = 3
_AGREES = 0.5


def check(subject: Subject) -> Iterator[Finding]:
    pairs = [pair for pair in subject.pairs if pair.is_gripper and subject.range_of(pair.action)[pair.action_dim] > 0]
    told: set[int] = set()
    for pair in pairs:
        for finding in _against(subject, pair):
            told.add(finding.episode if finding.episode is not None else -1)
            yield finding
        yield from _stuck(subject, pair)
    for vector in subject.vectors:
        if vector.role != "other":
            for dim in np.flatnonzero(vector.grippers & (subject.range_of(vector) > 0)).tolist():
                yield from (f for f in _first_side(subject, vector, dim) if f.episode not in told)


def _against(subject: Subject, pair: Pair) -> Iterator[Finding]:
    """Episodes whose state goes up where actions go down, and the others do not; or the other way round."""
    signs: dict[int, float] = {}
    for position, episode in enumerate(subject.episodes):
        action, state = _normalized(subject, pair, position)
        if np.ptp(action) > _MOVES and np.ptp(state) > _MOVES:
            signs[episode.index] = float(np.corrcoef(action, state)[0, 1])
    clear = {number: np.sign(sign) for number, sign in signs.items() if abs(sign) > _AGREES}
    if len(clear) < MIN_EPISODES:
        return
    majority = 1 if np.sum(list(clear.values())) >= 0 else -1
    for number, sign in clear.items():
        if sign != majority:
            yield Finding(
                "consistency.gripper",
                Severity.ERROR,
                f"its gripper {'closes' if majority > 0 else 'opens'} where its action says "
                f"{'open' if majority > 0 else 'close'}: one of the two is inverted",
                "the direction of the other episodes",
                f"Invert the column there (low + high - value), or {leave_out([number])}",
                number,
                _all_frames(subject, number),
                pair.action.key,
                pair.action.names[pair.action_dim],
            )


def _first_side(subject: Subject, vector: Vector, dim: int) -> Iterator[Finding]:
    low, high = np.nanquantile(vector.values[:, dim], [0.01, 0.99])
    starts: dict[int, float] = {}
    for _, number, values in subject.each(vector):
        if np.isfinite(values[:, dim]).all() and np.ptp(values[:, dim]) > _MOVES * (high - low):
            starts[number] = float((values[:_FIRST_FRAMES, dim].mean() - low) / (high - low))
    if len(starts) < _FEWEST_STARTS:
        return
    sides = np.array(list(starts.values()))
    is_high = np.mean(sides > 1 - _AT_ITS_END) >= _MOST
    if not is_high and np.mean(sides < _AT_ITS_END) < _MOST:
        return
    others = [n for n, start in starts.items() if (start < _AT_ITS_END if is_high else start > 1 - _AT_ITS_END)]
    if len(others) <= max(1, _FEW * len(starts)):
        for number in others:
            yield Finding(
                "consistency.gripper",
                Severity.WARNING,
                f"its gripper begins at {low + starts[number] * (high - low):.3g}",
                f"{high if is_high else low:.3g}, as in the other episodes: open and closed may be exchanged",
                f"Look at it; invert it there (low + high - value), or {leave_out([number])}",
                number,
                (0, _FIRST_FRAMES - 1),
                vector.key,
                vector.names[dim],
            )


def _stuck(subject: Subject, pair: Pair) -> Iterator[Finding]:
    """The action moves and the state does not, in a dataset where it does."""
    ranges = {}
    for position, episode in enumerate(subject.episodes):
        action, state = _normalized(subject, pair, position)
        ranges[episode.index] = (float(np.ptp(action)), float(np.ptp(state)))
    told = [number for number, (asked, _) in ranges.items() if asked > _MOVES]
    follows = [number for number in told if ranges[number][1] > _MOVES]
    if len(told) < MIN_EPISODES or len(follows) < _MOST * len(told):
        return
    for number in told:
        if ranges[number][1] < _STAYS:
            yield Finding(
                "anomalies.gripper-stuck",
                Severity.ERROR,
                "its gripper does not move, though the action tells it to",
                "movement, as in the other episodes",
                f"The gripper was off, or its reading broken: {leave_out([number])}",
                number,
                _all_frames(subject, number),
                pair.state.key,
                pair.state.names[pair.state_dim],
            )


def _normalized(subject: Subject, pair: Pair, position: int) -> tuple[np.ndarray, np.ndarray]:
    """f64[n] of the action and of the state, in units of their range; zeros where they are none."""
    rows = subject.rows(position)
    action = (
        pair.action.values[rows, pair.action_dim].astype(np.float64) / subject.unit_of(pair.action)[pair.action_dim]
    )
    state = pair.state.values[rows, pair.state_dim].astype(np.float64) / subject.unit_of(pair.state)[pair.state_dim]
    return np.nan_to_num(action), np.nan_to_num(state)


def _all_frames(subject: Subject, number: int) -> tuple[int, int]:
    return 0, next(episode.length for episode in subject.episodes if episode.index == number) - 1
