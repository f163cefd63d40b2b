"""Episodes that speak another language than the others: units, signs, order of joints, grippers: `consistency.*`."""

from collections.abc import Iterator

import numpy as np

from openpi.data.check import lags as _lags
from openpi.data.check.findings import Finding, Severity
from openpi.data.check.grippers import check as check_grippers
from openpi.data.check.order import check as check_order
from openpi.data.check.subject import MIN_EPISODES, Subject, Vector
from openpi.data.lerobot.episode_table import leave_out

_UNITS = (
    (57.296, 1.6, "in degrees", "in radians"),
    (1000.0, 1.8, "in mm", "in m"),
    (100.0, 1.1, "in cm or %", "in m or shares"),
)
_OTHER_SCALE = 20.0
_SAME_FACTOR = 1.25  # of two vectors, in all joints
_ALIKE = 2.5  # spread of the factors of the dimensions of an episode that is smaller
_MOST, _FEW = 0.8, 0.05  # of the episodes agree; more than a few are another task, on the other side


def check(subject: Subject) -> Iterator[Finding]:
    if len(subject.episodes) < MIN_EPISODES:
        return
    vectors = [vector for vector in subject.vectors if vector.role != "other"]
    for vector in vectors:
        yield from _units(subject, vector)
    yield from _units_of_both(subject)
    exchanged = list(check_order(subject))
    yield from exchanged
    told = {(finding.column, finding.episode) for finding in exchanged}
    for vector in vectors:
        yield from (finding for finding in _sign(subject, vector) if (finding.column, finding.episode) not in told)
    yield from check_grippers(subject)


def _units(subject: Subject, vector: Vector) -> Iterator[Finding]:
    """Episodes whose numbers are all larger by one factor, and so in another unit."""
    joints = np.flatnonzero(~vector.grippers)
    found = [(number, values) for _, number, values in subject.each(vector) if np.isfinite(values).all()]
    if not len(joints) or len(found) < MIN_EPISODES:
        return
    # f64[episodes joints]: of levels and not of movements, so that an episode that hardly moves is no smaller.
    sizes = np.array([np.quantile(np.abs(values[:, joints]), 0.95, axis=0) for _, values in found])
    usual = np.quantile(sizes, 0.25, axis=0)
    used = usual > 1e-3 * max(usual.max(), 1e-9)
    if not used.any():
        return
    ratios = np.log(np.maximum(sizes[:, used], 1e-12) / usual[used])
    factors, spreads = np.exp(np.median(ratios, axis=1)), np.exp(ratios.std(axis=1))
    for (number, values), factor, spread in zip(found, factors.tolist(), spreads.tolist(), strict=True):
        is_other = factor >= _OTHER_SCALE or (factor <= 1 / _OTHER_SCALE and spread <= _ALIKE and used.sum() > 1)
        if is_other:
            subject.odd.add((vector.key, number))
            yield _other_unit(vector, number, len(values), factor)


def _units_of_both(subject: Subject) -> Iterator[Finding]:
    """In all episodes the state moves by one factor more than the actions that it follows, or less, in each joint."""
    lags = subject.once(_lags.measure)
    if lags is None or lags.is_change:
        return
    wide = [
        (subject.range_of(pair.state)[pair.state_dim], subject.range_of(pair.action)[pair.action_dim])
        for pair in lags.pairs
        if pair.is_sure
    ]
    ratios = [state / action for state, action in wide if state > 0 and action > 0]
    if not ratios or max(ratios) > _SAME_FACTOR * min(ratios):
        return
    factor = float(np.median(ratios))
    size = max(factor, 1 / factor)
    if (
        told := next((told for unit, _, *told in _UNITS if abs(np.log(size / unit)) < np.log(_SAME_FACTOR)), None)
    ) is None:
        return
    state, actions = told if factor > 1 else told[::-1]
    yield Finding(
        "consistency.units",
        Severity.ERROR,
        f"in all episodes the state moves {size:.3g} times as {'far' if factor > 1 else 'little'} as the actions that "
        f"it follows, in every joint, as if it were {state} and they {actions}",
        "one unit in both: relative actions are their difference",
        "Convert one of the two columns",
        column=lags.pairs[0].state.key,
    )


def _other_unit(vector: Vector, number: int, length: int, factor: float) -> Finding:
    size = max(factor, 1 / factor)
    known = (told for unit, slack, *told in _UNITS if unit / slack <= size <= unit * slack)
    larger, smaller = next(known, ("in a smaller unit", "in a larger one"))
    here, others = (larger, smaller) if factor > 1 else (smaller, larger)
    return Finding(
        "consistency.units",
        Severity.ERROR,
        f"its values are {size:.3g} times {'larger' if factor > 1 else 'smaller'} than in the other episodes, as if it "
        f"were {here} and they {others}",
        "one unit in all episodes",
        f"Convert it, or {leave_out([number])}",
        number,
        (0, length - 1),
        vector.key,
    )


def _sign(subject: Subject, vector: Vector) -> Iterator[Finding]:
    """Dimensions that are on one side of zero in nearly all episodes, and on the other in this one."""
    found = [(number, values) for _, number, values in subject.each(vector) if np.isfinite(values).all()]
    if len(found) < MIN_EPISODES:
        return
    lows, highs = (np.array([reduce(values, axis=0) for _, values in found]) for reduce in (np.min, np.max))
    middles = np.array([np.median(values, axis=0) for _, values in found])
    for dim in np.flatnonzero(~vector.grippers).tolist():
        for side in (1, -1):
            is_positive, is_negative = lows[:, dim] > 0, highs[:, dim] < 0
            is_here, is_there = (is_positive, is_negative) if side > 0 else (is_negative, is_positive)
            if is_here.mean() < _MOST or not 0 < is_there.sum() <= max(1, _FEW * len(found)):
                continue
            low, high = lows[is_here, dim].min(), highs[is_here, dim].max()
            for row in np.flatnonzero(is_there).tolist():
                if low <= -middles[row, dim] <= high:
                    yield _other_sign(vector, dim, *found[row], float(middles[row, dim]), (float(low), float(high)))


def _other_sign(
    vector: Vector, dim: int, number: int, values: np.ndarray, middle: float, others: tuple[float, float]
) -> Finding:
    return Finding(
        "consistency.sign",
        Severity.WARNING,
        f"its values have the opposite sign (median {middle:.3g})",
        f"{others[0]:.3g} to {others[1]:.3g}, as in the other episodes",
        f"If it does not work on the other side: turn the sign of the dimension there, or {leave_out([number])}",
        number,
        (0, len(values) - 1),
        vector.key,
        vector.names[dim],
    )
