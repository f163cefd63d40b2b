"""Joints in another order, or turned round, than in the other episodes: `consistency.joint-order`, `consistency.sign`.

Seen in the levels of a column, where joints keep apart from each other; and in what moves what, where only one of the
actions and the state is at fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from openpi.data.check import lags as _lags
from openpi.data.check.findings import Finding, Severity
from openpi.data.check.subject import MIN_EPISODES, Subject, Vector
from openpi.data.lerobot.episode_table import leave_out

_MOST = 0.8  # of the episodes have two joints in one order
_NEAR = 0.35  # of the distance of two joints
_MOVED, _UNMOVED = 0.9, 0.6  # correlation of changes
_MAX_DIMS = 32


def check(subject: Subject) -> Iterator[Finding]:
    found = []
    for vector in subject.vectors:
        if vector.role != "other" and len(vector.names) <= _MAX_DIMS:
            found += _levels(subject, vector)
    yield from found
    told = {finding.episode for finding in found}
    yield from (finding for finding in _movements(subject) if finding.episode not in told)


def _levels(subject: Subject, vector: Vector) -> Iterator[Finding]:
    episodes = [(number, values) for _, number, values in subject.each(vector) if np.isfinite(values).all()]
    if len(episodes) < MIN_EPISODES:
        return
    middles = np.array([np.median(values, axis=0) for _, values in episodes])
    usual = np.median(middles, axis=0)
    widths = np.median([np.quantile(v, 0.9, axis=0) - np.quantile(v, 0.1, axis=0) for _, v in episodes], axis=0)
    for i, j in combinations(range(len(vector.names)), 2):
        distance = abs(usual[i] - usual[j])
        if distance <= max(widths[i], widths[j]) or not distance:
            continue
        in_order = np.sign(middles[:, i] - middles[:, j]) == np.sign(usual[i] - usual[j])
        if in_order.mean() < _MOST:
            continue
        is_swapped = ~in_order & (np.abs(middles[:, i] - usual[j]) <= _NEAR * distance)
        is_swapped &= np.abs(middles[:, j] - usual[i]) <= _NEAR * distance
        for row in np.flatnonzero(is_swapped).tolist():
            number, values = episodes[row]
            yield _swapped(vector, i, j, number, len(values), "its values are those of the other")


def _movements(subject: Subject) -> Iterator[Finding]:
    """What moves when an action changes: the joint of that name, elsewhere."""
    lags = subject.once(_lags.measure)
    if lags is None or len(lags.residuals) < MIN_EPISODES:
        return
    shift = max(0, lags.typical - int(lags.is_change))
    matrices: dict[int, np.ndarray] = {}
    lengths: dict[int, int] = {}
    for position, episode in enumerate(subject.episodes):
        if episode.index in lags.residuals:
            asked, done = _lags.changes(subject, lags.pairs, position, lags.is_change)
            asked = asked[: len(asked) - shift]
            matrices[episode.index], lengths[episode.index] = _correlations(asked, done[shift:]), episode.length
    usual = np.nanmedian(list(matrices.values()), axis=0)
    action = lags.pairs[0].action
    for number, matrix in matrices.items():
        for i, j in combinations(range(len(lags.pairs)), 2):
            is_exchanged = min(matrix[i, j], matrix[j, i]) > _MOVED and max(matrix[i, i], matrix[j, j]) < _UNMOVED
            if is_exchanged and min(usual[i, i], usual[j, j]) > _MOVED:
                a, b = lags.pairs[i], lags.pairs[j]
                yield _swapped(action, a.action_dim, b.action_dim, number, lengths[number], "each moves the other")
        for i, pair in enumerate(lags.pairs):
            if matrix[i, i] < -_MOVED and usual[i, i] > _MOVED:
                yield Finding(
                    "consistency.sign",
                    Severity.ERROR,
                    "the state moves against the action",
                    "with it, as in the other episodes",
                    f"Turn the sign of one of the two there, or {leave_out([number])}",
                    number,
                    (0, lengths[number] - 1),
                    pair.action.key,
                    pair.action.names[pair.action_dim],
                )


def _correlations(asked: np.ndarray, done: np.ndarray) -> np.ndarray:
    """f64[p p] of the changes asked for and done, about zero; NaN where nothing moves."""
    norms = np.sqrt((asked**2).sum(axis=0))[:, None] * np.sqrt((done**2).sum(axis=0))[None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norms > 1e-9, asked.T @ done / norms, np.nan)


def _swapped(vector: Vector, i: int, j: int, number: int, length: int, why: str) -> Finding:
    names = f"{vector.names[i]} and {vector.names[j]}"
    return Finding(
        "consistency.joint-order",
        Severity.ERROR,
        f"{names} are exchanged: {why}",
        "the order of the other episodes",
        f"Exchange the two there, or {leave_out([number])}",
        number,
        (0, length - 1),
        vector.key,
        f"{vector.names[i]}, {vector.names[j]}",
    )
