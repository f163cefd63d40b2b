"""When the state does what an action says: the lag between the two, per joint and episode.

    a(t) is a target               a(t) - a(t - k)   ~   s(t + L) - s(t + L - k)     L >= 1: it is commanded, then done
    a(t) is a change, a velocity   a(t)              ~   s(t + L) - s(t + L - 1)

Changes are compared, so that neither the offset nor the unit of one of them matters; what is left over of the one when
the other explains it best, as a share of its energy, is the residual of a lag.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from openpi.data.check.subject import Pair, Subject

_SPAN_S = 0.1  # over which changes are taken: at 50 Hz those of a single frame are the noise of encoders
_LARGEST_S = 0.2
_LARGEST_FRAMES = 4
_FEWEST_FRAMES = 8
_TRACKED = 0.3  # residual up to which the state follows the actions at all
_AGREEING = 0.4  # of the episodes: where half of them are late, they are of two kinds
_AS_GOOD = 1.5
_MOST_TIMES = 4.0
_SMALL = 1e-12


@dataclasses.dataclass(frozen=True)
class Lags:
    """Of a dataset.

    Attributes:
        pairs: p of them.
        lags: int[l], ascending.
        residuals: by episode number, f64[l p], from 0 (explained) to 1; NaN where a joint does not move.
        weights: by episode number, f64[p], of the joints by how far they move.
        typical: the lag of the dataset, in frames.
        curve: f64[l], the residual of all joints, of the episodes that agree on a lag.
        is_change: whether actions are changes of the state.
    """

    pairs: tuple[Pair, ...]
    lags: np.ndarray
    residuals: dict[int, np.ndarray]
    weights: dict[int, np.ndarray]
    typical: int
    curve: np.ndarray
    is_change: bool

    def of_episode(self, episode: int) -> np.ndarray:
        """f64[l]: the residual of all joints together."""
        return _together(self.residuals[episode], self.weights[episode])

    def at(self, lag: int) -> int:
        return int(np.flatnonzero(self.lags == lag)[0])

    def best(self, residuals: np.ndarray) -> np.ndarray:
        """The lags of f64[... l] finite residuals, in fractions of a frame: the vertex of the parabola around the
        smallest."""
        lowest = np.argmin(residuals, axis=-1)
        inner = np.clip(lowest, 1, len(self.lags) - 2)
        before, here, after = (
            np.take_along_axis(residuals, (inner + step)[..., None], axis=-1)[..., 0] for step in (-1, 0, 1)
        )
        bend = before - 2 * here + after
        bends = (inner == lowest) & (bend > _SMALL)
        return self.lags[lowest] + np.where(bends, 0.5 * (before - after) / np.where(bends, bend, 1.0), 0.0)


def measure(subject: Subject) -> Lags | None:
    """None where no state follows the actions."""
    pairs = tuple(pair for pair in subject.pairs if not pair.is_gripper)
    if not pairs or not len(subject.episodes):
        return None
    found = [lags for is_change in (False, True) if (lags := _measure(subject, pairs, is_change)) is not None]
    best = min(found, key=lambda lags: lags.curve.min(), default=None)
    return best if best is not None and best.curve.min() <= _TRACKED else None


def changes(subject: Subject, pairs: Sequence[Pair], position: int, is_change: bool) -> tuple[np.ndarray, np.ndarray]:
    """f64[m p] each: what actions ask for and what states do, from the same frames on."""
    rows = subject.rows(position)
    span = max(1, round(_SPAN_S * subject.metadata.fps))
    actions = np.stack([pair.action.values[rows, pair.action_dim] for pair in pairs], axis=1).astype(np.float64)
    states = np.stack([pair.state.values[rows, pair.state_dim] for pair in pairs], axis=1).astype(np.float64)
    asked = _sums(actions, span) if is_change else actions[span:] - actions[:-span]
    return _without_jumps(asked), _without_jumps(states[span:] - states[:-span])


def _measure(subject: Subject, pairs: tuple[Pair, ...], is_change: bool) -> Lags | None:
    most = max(_LARGEST_FRAMES, round(_LARGEST_S * subject.metadata.fps))
    lags = np.arange(-most, most + 1)
    scale = np.array([subject.range_of(pair.state)[pair.state_dim] for pair in pairs])
    residuals, weights = {}, {}
    for position, episode in enumerate(subject.episodes):
        asked, done = changes(subject, pairs, position, is_change)
        if len(asked) - 2 * most < _FEWEST_FRAMES or not (np.isfinite(asked).all() and np.isfinite(done).all()):
            continue
        residuals[episode.index] = _residuals(asked, done, most)
        weights[episode.index] = (done**2).mean(axis=0) / np.maximum(scale, _SMALL) ** 2
    if not residuals:
        return None
    curves = np.array([_together(residuals[index], weights[index]) for index in residuals])
    is_known = np.isfinite(curves).any(axis=0).all()
    curve = np.nanquantile(curves, _AGREEING, axis=0) if is_known else np.ones(len(lags))
    lags = lags + (1 if is_change else 0)  # a change asked for at t is in the state at t + 1, which the span has at t
    typical = lags[np.argmin(curve)]
    causal = np.flatnonzero((lags > 0) & (curve <= _AS_GOOD * curve.min() + _SMALL))
    if typical <= 0 and len(causal):  # half of the episodes are late, and the others are right
        typical = lags[causal[0]]
    return Lags(pairs, lags, residuals, weights, int(typical), curve, is_change)


def _without_jumps(changes: np.ndarray) -> np.ndarray:
    """A single one, as of an angle that goes round, would be all that counts."""
    if not len(changes):
        return changes
    most = _MOST_TIMES * np.sort(np.abs(changes), axis=0)[round(0.9 * (len(changes) - 1))]
    return np.clip(changes, -most, most)


def _residuals(asked: np.ndarray, done: np.ndarray, most: int) -> np.ndarray:
    """f64[l p], of m frames that all lags have in common."""
    middle = asked[most : len(asked) - most]
    others = np.lib.stride_tricks.sliding_window_view(done, len(middle), axis=0)  # f64[l p m]
    products = np.einsum("mp,lpm->lp", middle, others)
    norms = (middle**2).sum(axis=0) * np.einsum("lpm,lpm->lp", others, others)
    is_moving = norms > _SMALL
    shares = np.where(products > 0, products**2 / np.where(is_moving, norms, 1), 0)
    return np.where(is_moving, 1 - shares, np.nan)


def _together(residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    known = np.isfinite(residuals).all(axis=0) & (weights > 0)
    if not known.any():
        return np.full(len(residuals), np.nan)
    return residuals[:, known] @ weights[known] / weights[known].sum()


def _sums(values: np.ndarray, span: int) -> np.ndarray:
    """Of `span` rows each, beginning with each row but the last ones."""
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, axis=0)])
    return (total[span:] - total[:-span])[:-1]
