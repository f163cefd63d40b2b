"""How near a policy's chunks are to what was recorded, and what it looks at: no robot, no simulator.

An error alone says little, so it stands beside the errors of policies that need no training (standing still, the last
command again, the mean chunk, the chunk of the nearest other frame), and beside the spread of the policy's own samples.
Errors are mean absolute differences in the robot's units; actions past the end of an episode do not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from openpi.evaluation.stats import mean_interval
from openpi.shared.tree import Tree, flatten

T = TypeVar("T")

Chunk = np.ndarray  # float[ah w]

_BATCH = 8
_GRAY = 128


class Moment(Protocol):
    """A frame of a recording; `openpi.training.data.moments.Moment` is one."""

    @property
    def episode(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def observation(self) -> Tree: ...
    @property
    def state(self) -> np.ndarray: ...
    @property
    def recorded(self) -> np.ndarray: ...
    @property
    def num_recorded(self) -> int: ...
    @property
    def hold(self) -> np.ndarray | None: ...


class Asked(Protocol):
    """A policy, in this process or behind a server."""

    def __call__(self, observations: Sequence[Mapping[str, object]], seeds: Sequence[int]) -> list[Chunk | None]:
        """A chunk for each observation from the noise of its seed; None where the model wrote none."""
        ...


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is asked.

    Attributes:
        stride: ticks from one chunk to the next, the rows of each that a robot would have played.
        samples: chunks per frame, where the spread of noise is measured.
        probes: frames on which the spread and the sensitivity to inputs are measured.
        seed: of all noise.
    """

    stride: int
    samples: int = 4
    probes: int = 16
    seed: int = 0

    def seed_of(self, moment: Moment, sample: int = 0) -> int:
        """Of a frame and a sample: the same for every policy."""
        return int(np.random.SeedSequence([self.seed, moment.episode, moment.step, sample]).generate_state(1)[0])


@dataclasses.dataclass(frozen=True)
class Played:
    """Chunks of a policy for frames of recordings.

    Attributes:
        moments: in the order of episodes and steps.
        chunks: float[n ah w]; NaN where the model wrote none.
    """

    moments: Sequence[Moment]
    chunks: np.ndarray


def play(
    asked: Asked, moments: Sequence[Moment], plan: Plan, on_done: Callable[[int], None] = lambda _: None
) -> Played:
    """Raises ValueError if the chunks are not of the recording's width, or there is none at all."""
    chunks: list[Chunk | None] = []
    for some in _parts(moments):
        chunks += asked([moment.observation for moment in some], [plan.seed_of(moment) for moment in some])
        on_done(len(chunks))
    if all(chunk is None for chunk in chunks):
        raise ValueError(f"the model wrote no action chunk for any of {len(chunks)} frames")
    return Played(moments, _stacked(chunks, moments))


def errors(chunks: np.ndarray, moments: Sequence[Moment]) -> np.ndarray:
    """float[n ah w], absolute; NaN for actions that were not recorded."""
    rows = min(chunks.shape[1], moments[0].recorded.shape[0])
    found = np.abs(chunks[:, :rows] - np.stack([moment.recorded[:rows] for moment in moments]))
    for error, moment in zip(found, moments, strict=True):
        error[moment.num_recorded :] = np.nan
    return found


def summary(error: np.ndarray) -> dict[str, object]:
    """The mean in all, per joint and per step of the chunk."""
    return {
        "mean": _mean(error),
        "per_joint": [_mean(error[..., i]) for i in range(error.shape[-1])],
        "per_step": [_mean(error[:, k]) for k in range(error.shape[1])],
    }


def baselines(moments: Sequence[Moment], states: np.ndarray, actions: np.ndarray) -> dict[str, np.ndarray]:
    """Chunks float[n ah w] of policies that learn nothing, by name.

    Args:
        states, actions: float[n s] and float[n ah w] of frames of other episodes; may be empty.
    """
    rows = moments[0].recorded.shape[0]
    found = {
        "the first recorded action, again and again": np.stack([np.tile(m.recorded[0], (rows, 1)) for m in moments])
    }
    holds = [moment.hold for moment in moments]
    if all(hold is not None for hold in holds):
        found["standing still"] = np.stack([hold[:rows] for hold in holds if hold is not None])
    if len(states):
        found["the mean chunk of other episodes"] = np.repeat(actions.mean(0)[None], len(moments), axis=0)
        scale = states.std(0) + 1e-6
        nearest = [np.argmin((((states - m.state) / scale) ** 2).sum(1)) for m in moments]
        found["the chunk of the nearest state of other episodes"] = actions[nearest]
    return found


def smoothness(played: Played, stride: int) -> dict[str, list[float]]:
    """Per joint, mean absolute changes: from step to step within a chunk and in the recording, and where one chunk
    follows another that was played for `stride` rows, beside the recording's step there.
    """
    recorded = np.stack([moment.recorded for moment in played.moments])
    inside = np.stack([np.arange(recorded.shape[1] - 1) + 1 < moment.num_recorded for moment in played.moments])
    steps = np.abs(np.diff(recorded, axis=1))
    steps[~inside] = np.nan
    found = {
        "step": np.nanmean(np.abs(np.diff(played.chunks, axis=1)), (0, 1)),
        "recorded step": _nanmean(steps, (0, 1)),
    }
    pairs = [
        (i, i + 1)
        for i, (a, b) in enumerate(zip(played.moments[:-1], played.moments[1:], strict=True))
        if (a.episode, a.step + stride) == (b.episode, b.step)
    ]
    if pairs and stride <= played.chunks.shape[1]:
        before, after = (np.array(index) for index in zip(*pairs, strict=True))
        found["seam"] = _nanmean(np.abs(played.chunks[after, 0] - played.chunks[before, stride - 1]), 0)
        found["recorded step at a seam"] = _nanmean(np.abs(recorded[after, 0] - recorded[before, stride - 1]), 0)
    return {name: [float(value) for value in values] for name, values in found.items()}


def spread(asked: Asked, moments: Sequence[Moment], plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """float[n w] standard deviation of chunks over noise, mean over their steps, NaN where the model did not write all
    of a frame's; and float[n ah w], the first chunk.
    """
    observations = [moment.observation for moment in moments]
    samples = [
        _asked_in_parts(asked, observations, [plan.seed_of(moment, k) for moment in moments], moments)
        for k in range(plan.samples)
    ]
    return _nanmean(np.std(samples, axis=0, ddof=1), 1), samples[0]


def changed_inputs(moments: Sequence[Moment], tasks: Sequence[str]) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """The observations of frames with one input spoilt: each camera grey, the state that of another frame, the prompt
    another one.
    """
    flat = [flatten(moment.observation) for moment in moments]
    half = len(flat) // 2

    def with_values(key: str, values: Sequence[object]) -> list[dict[str, object]]:
        return [_replaced(moment.observation, key, value) for moment, value in zip(moments, values, strict=True)]

    for key, value in flat[0].items():
        array = np.asarray(value)
        if array.dtype == np.uint8 and array.ndim == 3:
            yield f"camera {key}, grey", with_values(key, [np.full_like(each[key], _GRAY) for each in flat])
        elif array.dtype.kind == "f" and array.ndim == 1:
            yield f"{key} of another frame", with_values(key, [each[key] for each in (*flat[half:], *flat[:half])])
    if "prompt" in flat[0]:
        yield "another prompt", with_values("prompt", [_another(str(each["prompt"]), tasks) for each in flat])


def sensitivity(
    asked: Asked, moments: Sequence[Moment], plan: Plan, tasks: Sequence[str], plain: np.ndarray
) -> dict[str, float]:
    """Mean absolute change of the chunk, for the same noise, by what was spoilt.

    Args:
        plain: float[n ah w], the chunks for the observations as they are, of sample 0.
    """
    found = {}
    seeds = [plan.seed_of(moment) for moment in moments]
    for name, observations in changed_inputs(moments, tasks):
        found[name] = _mean(np.abs(_asked_in_parts(asked, observations, seeds, moments) - plain))
    return found


def paired(a: np.ndarray, b: np.ndarray, moments: Sequence[Moment]) -> dict[str, object]:
    """The mean error of b less that of a on the same frames and noise, with a 95 % interval over episodes;
    over frames where there is one episode, and None of one frame.

    Args:
        a, b: float[n ah w], as of `errors`.
    """
    difference = _nanmean(b, (1, 2)) - _nanmean(a, (1, 2))
    episodes = np.array([moment.episode for moment in moments])
    groups = [difference[episodes == number] for number in np.unique(episodes)]
    if len(groups) == 1:
        groups = [np.array([value]) for value in groups[0]]
    groups = [group for group in groups if np.isfinite(group).any()]
    sums, counts = (np.array([f(group[np.isfinite(group)]) for group in groups]) for f in (np.sum, len))
    return {
        "difference": float(sums.sum() / counts.sum()),
        "interval_95": list(mean_interval(sums, counts)) if len(sums) > 1 else None,
        "drawn_from": "episodes" if len(np.unique(episodes)) > 1 else "frames",
    }


def steps_of(lengths: Mapping[int, int], stride: int, at_most: int) -> list[tuple[int, int]]:
    """(episode, step): all episodes in strides. Where that is too many, a stretch of each, early in the first and late
    in the last, so that no part of a task is left out; of some episodes only, where each would have one step.
    """
    every = {number: range(0, length, stride) for number, length in lengths.items()}
    if sum(map(len, every.values())) <= at_most:
        return [(number, step) for number, steps in every.items() for step in steps]
    each = max(2, at_most // len(every))
    count = min(len(every), at_most // each)
    shares = (np.arange(count) + 0.5) / count
    found = []
    for place, share in zip((shares * len(every)).astype(int), shares, strict=True):
        number, steps = list(every.items())[place]
        first = round(share * max(0, len(steps) - each))
        found += [(number, step) for step in steps[first : first + each]]
    return found


def _replaced(observation: Tree, key: str, value: object) -> dict[str, object]:
    """With another value under a `/`-joined key, which may have a slash in a part of it."""
    if key in observation:
        return {**observation, key: value}
    head = next(head for head in observation if key.startswith(f"{head}/"))
    return {**observation, head: _replaced(observation[head], key.removeprefix(f"{head}/"), value)}


def _another(prompt: str, tasks: Sequence[str]) -> str:
    return next((task for task in tasks if task != prompt), "do nothing")


def _parts(items: Sequence[T]) -> list[Sequence[T]]:
    return [items[i : i + _BATCH] for i in range(0, len(items), _BATCH)]


def _asked_in_parts(
    asked: Asked, observations: Sequence[Mapping[str, object]], seeds: Sequence[int], moments: Sequence[Moment]
) -> np.ndarray:
    parts = zip(_parts(observations), _parts(seeds), strict=True)
    return _stacked([chunk for some, their in parts for chunk in asked(some, their)], moments)


def _stacked(chunks: Sequence[Chunk | None], moments: Sequence[Moment]) -> np.ndarray:
    """NaN where there is none."""
    known = next((chunk for chunk in chunks if chunk is not None), moments[0].recorded)
    if known.shape[-1] != (width := moments[0].recorded.shape[-1]):
        raise ValueError(
            f"the policy's actions have {known.shape[-1]} dimensions, those recorded {width}; "
            "evaluate it on a dataset of its robot"
        )
    return np.stack([np.full_like(known, np.nan, dtype=np.float64) if c is None else c for c in chunks]).astype(float)


def _mean(values: np.ndarray) -> float:
    return float(_nanmean(values, None))


def _nanmean(values: np.ndarray, axis: int | tuple[int, ...] | None) -> np.ndarray:
    """NaN, and no warning, where there is nothing."""
    known = np.isfinite(values)
    count = np.asarray(known.sum(axis))
    return np.where(count > 0, np.where(known, values, 0).sum(axis) / np.maximum(count, 1), np.nan)
