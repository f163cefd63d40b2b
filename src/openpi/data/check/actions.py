"""When actions are done, and by what: `actions.*`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from openpi.data.check import lags as _lags
from openpi.data.check.findings import Finding, Severity
from openpi.data.check.lags import Lags
from openpi.data.check.subject import MIN_EPISODES, Subject
from openpi.data.lerobot.episode_table import leave_out

_FACTOR = 2.0  # of the residual at the lag of the others to that at its own; clean sets have up to 1.4
_APART = 0.75  # frames between the two: robots that follow in 1.5 are not an episode of 1 and one of 2
_JOINT_FACTOR = 4.0
_WELL_TRACKED, _TRACKED = 0.15, 0.5
_MOVES = 0.05  # of the movement of all joints
_AGREEING = 0.4  # of the episodes: where half of them are late in a joint, they are of two kinds
_SAME = 1e-6


def check(subject: Subject) -> Iterator[Finding]:
    if (copied := _copied(subject)) is not None:
        yield copied
        return
    lags = subject.once(_lags.measure)
    if lags is None:
        return
    yield from _dataset_lag(lags)
    if len(lags.residuals) >= MIN_EPISODES:
        usual = _Usual.of(lags)
        lengths = {episode.index: episode.length for episode in subject.episodes}
        for episode in lags.residuals:
            yield from _episode_lag(lags, usual, episode, lengths[episode])


def _copied(subject: Subject) -> Finding | None:
    """Actions that are the state of the same frame: the policy learns to stay where it is."""
    pairs = [p for p in subject.pairs if not p.is_gripper and subject.range_of(p.state)[p.state_dim] > _SAME]
    if not pairs:
        return None
    for pair in pairs:
        actions, states = pair.action.values[:, pair.action_dim], pair.state.values[:, pair.state_dim]
        if not (np.abs(actions - states) <= _SAME * max(1.0, subject.range_of(pair.state)[pair.state_dim])).all():
            return None
    return Finding(
        "actions.copy-of-state",
        Severity.ERROR,
        "the actions are the state of the same frame: a policy learns to stay where it is",
        "what was commanded, or the state of a later frame",
        "Record the commands, or shift the column by a frame (the last frame of each episode falls away)",
        column=pairs[0].action.key,
    )


def _dataset_lag(lags: Lags) -> Iterator[Finding]:
    """A robot cannot have done yet what it is only told now."""
    first = float(lags.curve[lags.at(1)]) if 1 in lags.lags else 1.0
    best = float(lags.curve.min())
    if (
        not all(pair.is_sure for pair in lags.pairs)
        or lags.typical > 0
        or best > _WELL_TRACKED
        or first < _FACTOR * best
        or len(lags.residuals) < 3
    ):
        return
    late = 1 - lags.typical
    yield Finding(
        "actions.late",
        Severity.ERROR if lags.typical < 0 else Severity.WARNING,
        f"in all episodes the state does what an action says {_frames(lags.typical)}",
        "1 frame after it or more: what is commanded at a frame is seen in the next ones",
        f"The actions were probably recorded {late} frame{'s' if late > 1 else ''} late: shift the column back; it is "
        "right as it is only if the robot follows within half a frame",
        column=lags.pairs[0].action.key,
    )


def _episode_lag(lags: Lags, usual: _Usual, episode: int, length: int) -> Iterator[Finding]:
    residuals, weights = lags.residuals[episode], lags.weights[episode]
    whole, moving = lags.of_episode(episode), _moving(weights)
    if not np.isfinite(whole).all():
        return
    if _is_apart(lags, whole, usual.whole, _FACTOR):
        best = int(np.argmin(whole))
        names = [_name(lags, i) for i in moving if abs(np.argmin(residuals[:, i]) - best) <= 1]
        yield _other_lag(lags, episode, length, int(lags.lags[best]), usual.whole.frames, names)
        return
    for i in moving:
        here = usual.joints[i]
        if here is not None and _is_apart(lags, residuals[:, i], here, _JOINT_FACTOR):
            best = int(np.argmin(residuals[:, i]))
            yield _other_lag(lags, episode, length, int(lags.lags[best]), here.frames, [_name(lags, i)])


class _Lag(NamedTuple):
    """In whole frames and in fractions of one."""

    frames: int
    exact: float


class _Usual(NamedTuple):
    """The lags of most episodes: of all joints together, and of each that the state follows."""

    whole: _Lag
    joints: list[_Lag | None]

    @classmethod
    def of(cls, lags: Lags) -> _Usual:
        """Once for the dataset, since it asks all of its episodes."""
        residuals = np.stack(list(lags.residuals.values()), axis=-1)  # f64[l p e]
        whole = np.stack([lags.of_episode(number) for number in lags.residuals], axis=-1)
        return cls(
            _usual_lag(lags, _finite(whole), 0),
            [_usual_of_joint(lags, _finite(joint)) for joint in np.moveaxis(residuals, 1, 0)],
        )


def _finite(curves: np.ndarray) -> np.ndarray:
    """f64[e l] of f64[l e]: of episodes where something moves."""
    return curves.T[np.isfinite(curves).all(axis=0)]


def _usual_of_joint(lags: Lags, curves: np.ndarray) -> _Lag | None:
    if not len(curves):
        return None
    usual = _usual_lag(lags, curves, _AGREEING)
    return usual if np.median(curves[:, lags.at(usual.frames)]) <= _WELL_TRACKED else None


def _is_apart(lags: Lags, residuals: np.ndarray, usual: _Lag, factor: float) -> bool:
    here = residuals[lags.at(usual.frames)]
    is_better = here >= factor * residuals.min() and residuals.min() <= _TRACKED
    return bool(is_better and abs(lags.best(residuals) - usual.exact) >= _APART)


def _usual_lag(lags: Lags, curves: np.ndarray, fewest: float) -> _Lag:
    """Of f64[e l]: of the episodes that have about the typical lag of the dataset; or of all, where those are fewer
    than `fewest` of all: a light joint at the end of an arm follows sooner than the arm, in every episode."""
    found = lags.best(curves)
    near = found[np.abs(found - lags.typical) <= _APART]
    if len(near) > fewest * len(found):
        return _Lag(lags.typical, float(np.median(near)))
    if not fewest or not len(found):
        return _Lag(lags.typical, float(lags.typical))
    exact = float(np.median(found))
    return _Lag(round(exact), exact)


def _other_lag(lags: Lags, episode: int, length: int, lag: int, usual: int, names: list[str]) -> Finding:
    shift = usual - lag
    word = "late" if shift > 0 else "early"
    return Finding(
        "actions.late" if shift > 0 else "actions.early",
        Severity.ERROR,
        f"the state does what an action says {_frames(lag)} (joints {', '.join(names[:8])})",
        f"{_frames(usual)}, as in the other episodes: its actions are {abs(shift)} frame"
        f"{'s' if abs(shift) > 1 else ''} {word}",
        f"Shift its actions by {abs(shift)}, or {leave_out([episode])}",
        episode,
        (0, length - 1),
        lags.pairs[0].action.key,
        names[0] if len(names) == 1 else None,
    )


def _frames(lag: int) -> str:
    if lag == 0:
        return "in the same frame"
    return f"{abs(lag)} frame{'s' if abs(lag) > 1 else ''} {'later' if lag > 0 else 'before it'}"


def _moving(weights: np.ndarray) -> list[int]:
    return np.flatnonzero(weights >= _MOVES * weights.sum()).tolist()


def _name(lags: Lags, i: int) -> str:
    return lags.pairs[i].action.names[lags.pairs[i].action_dim]
