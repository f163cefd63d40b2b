"""Numbers that a robot does not make: `anomalies.*`."""

from collections.abc import Iterator

import numpy as np

from openpi.data.check.findings import Finding, Severity
from openpi.data.check.orientations import rewritten
from openpi.data.check.subject import MIN_EPISODES, Subject, Vector
from openpi.data.lerobot.episode_table import leave_out

_JUMP = 5.0  # times the largest step of a typical episode
_JUMP_LOCAL = 8.0  # times the 90 % of all steps of the same episode
_JUMP_LEAST = 0.1  # of the range of the dimension
_STILL = 2e-3  # of the range, from frame to frame
_IDLE_S, _IDLE_SHARE, _IDLE_COMMON = 3.0, 0.2, 0.3
_REWRITTEN = {  # by the number of its dimensions
    4: ("the quaternion changes its sign", "-q wherever dot(q, the q before) < 0"),
    3: ("the rotation vector turns over", "v - 2 pi v / |v| wherever that is nearer to the v before"),
    1: ("the angle goes round", "numpy.unwrap"),
}
_STUCK, _ALIVE = 1e-4, 0.05  # of the range


def check(subject: Subject) -> Iterator[Finding]:
    for vector in subject.vectors:
        if vector.role != "other":
            yield from _jumps(subject, vector)
    yield from _stuck(subject)
    yield from _idle(subject)


def not_finite(subject: Subject) -> Iterator[Finding]:
    """The first check of all: what it finds is left out of the others."""
    for vector in subject.vectors:
        yield from _not_finite(subject, vector)


def _not_finite(subject: Subject, vector: Vector) -> Iterator[Finding]:
    if np.isfinite(vector.values.sum(dtype=np.float64)):
        return
    for _, number, values in list(subject.each(vector)):
        is_bad = ~np.isfinite(values)
        for dim in np.flatnonzero(is_bad.any(axis=0)).tolist():
            frames = np.flatnonzero(is_bad[:, dim])
            subject.odd.add((vector.key, number))
            yield Finding(
                "anomalies.not-finite",
                Severity.ERROR,
                f"{len(frames)} of {len(values)} frames hold {values[frames[0], dim]}",
                "finite numbers: no policy can learn from others",
                f"Repair the column, or {leave_out([number])}",
                number,
                (int(frames[0]), int(frames[-1])),
                vector.key,
                vector.names[dim],
            )


def _jumps(subject: Subject, vector: Vector) -> Iterator[Finding]:
    """Steps far beyond those of a typical episode, and of the rest of their own."""
    steps: dict[int, np.ndarray] = {}
    for _, number, values in subject.each(vector):
        if len(values) <= 2:
            continue
        steps[number] = np.abs(np.diff(values, axis=0))
        for dims, frames in rewritten(values):
            if not vector.grippers[dims].any():
                yield _wrap(vector, dims, number, frames, steps[number])
                steps[number][frames[:, None], dims] = 0
    if not steps:
        return
    wide = subject.range_of(vector)
    largest = np.median([found.max(axis=0) for found in steps.values()], axis=0)
    for number, found in steps.items():
        # A step up and the one back again are one jump: the second is left out of what the rest does.
        local = np.quantile(found, 0.9, axis=0) if len(found) >= 10 else np.median(found, axis=0)
        least = np.maximum.reduce([_JUMP * largest, _JUMP_LOCAL * local, _JUMP_LEAST * wide])
        if len(steps) < MIN_EPISODES:
            least = np.maximum(_JUMP_LOCAL * 4 * local, 0.5 * wide)
        is_jump = (found > least) & ~vector.grippers & (wide > 0)
        for dim in np.flatnonzero(is_jump.any(axis=0)).tolist():
            yield _jump(vector, dim, number, found[:, dim], is_jump[:, dim], float(least[dim]))


def _jump(vector: Vector, dim: int, number: int, steps: np.ndarray, is_jump: np.ndarray, least: float) -> Finding:
    frames = np.flatnonzero(is_jump)
    return Finding(
        "anomalies.jump",
        Severity.ERROR,
        f"it jumps by {float(steps[frames].max()):.3g} from one frame to the next",
        f"steps below {least:.3g}, as elsewhere in the dataset",
        f"Frames were lost, or the sensor failed: {leave_out([number])}",
        number,
        (int(frames[0]), int(frames[-1]) + 1),
        vector.key,
        vector.names[dim],
    )


def _wrap(vector: Vector, dims: list[int], number: int, frames: np.ndarray, steps: np.ndarray) -> Finding:
    what, how = _REWRITTEN[len(dims)]
    return Finding(
        "anomalies.wrap",
        Severity.WARNING,
        f"{what}, {len(frames)} times, by up to {float(steps[frames[:, None], dims].max()):.3g} in a frame",
        "numbers that move as the robot does: a policy would learn the mean of both",
        f"Write the column anew, with {how}; the robot has to send it in the same way",
        number,
        (int(frames[0]), int(frames[-1]) + 1),
        vector.key,
        ", ".join(vector.names[dim] for dim in dims),
    )


def _stuck(subject: Subject) -> Iterator[Finding]:
    """A joint whose reading stands still though it is told to move, in a dataset where it follows."""
    for pair in subject.pairs:
        wide = subject.range_of(pair.state)[pair.state_dim], subject.range_of(pair.action)[pair.action_dim]
        if pair.is_gripper or min(wide) <= 0 or len(subject.episodes) < MIN_EPISODES:
            continue
        for position, episode in enumerate(subject.episodes):
            rows = subject.rows(position)
            moved = np.ptp(pair.state.values[rows, pair.state_dim]) / wide[0]
            asked = np.ptp(pair.action.values[rows, pair.action_dim]) / wide[1]
            if moved < _STUCK and asked > _ALIVE:
                yield Finding(
                    "anomalies.stuck",
                    Severity.ERROR,
                    "the state does not change in the whole episode, though the actions ask for it",
                    "movement, as in the other episodes",
                    f"Its reading was not updated: {leave_out([episode.index])}",
                    episode.index,
                    (0, episode.length - 1),
                    pair.state.key,
                    pair.state.names[pair.state_dim],
                )


def _idle(subject: Subject) -> Iterator[Finding]:
    """Long stretches without movement, where the others have none."""
    vectors = [v for v in subject.vectors if v.role != "other" and (subject.range_of(v) > 0).any()]
    if not any(v.role == "state" for v in vectors):
        return
    fps, found = subject.metadata.fps, []
    units = {vector.key: subject.unit_of(vector) for vector in vectors}
    for position, episode in enumerate(subject.episodes):
        rows = subject.rows(position)
        is_still = np.ones(max(0, episode.length - 1), bool)
        for vector in vectors:
            steps = np.abs(np.diff(vector.values[rows], axis=0)) / units[vector.key]
            is_still &= (steps < _STILL).all(axis=1)
        first, length = _longest_run(is_still)
        if length >= max(_IDLE_S * fps, _IDLE_SHARE * episode.length):
            found.append((episode.index, first, length))
    is_common = len(found) > _IDLE_COMMON * len(subject.episodes)
    for number, first, length in found:
        yield Finding(
            "anomalies.idle",
            Severity.INFO if is_common else Severity.WARNING,
            f"nothing moves for {length / fps:.1f} s",
            f"less than {_IDLE_S:g} s: a policy learns to wait, and may not go on",
            "Cut the stretch out when recording or converting",
            number,
            (first, first + length),
        )


def _longest_run(is_true: np.ndarray) -> tuple[int, int]:
    """(first, length) of the longest stretch of true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_true.astype(np.int8), [0]])))
    if not len(edges):
        return 0, 0
    begins, ends = edges[::2], edges[1::2]
    longest = int(np.argmax(ends - begins))
    return int(begins[longest]), int(ends[longest] - begins[longest])
