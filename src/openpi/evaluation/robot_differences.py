"""Where what a robot sent is not what its dataset holds: other moments, so distributions are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from openpi import transforms
from openpi.evaluation.difference import CHUNK, IMAGES, KEYS, NORMALIZED, STAGES, STATE, TOKENS, Difference
from openpi.policies.images import channel_means, layout_of
from openpi.policies.request import KEYS as REQUEST_KEYS
from openpi.policies.seen import Seen
from openpi.policies.watch import Watch
from openpi.shared.tree import flatten

_CODES = {
    "swapped": (IMAGES, "two cameras are exchanged"),
    "turned": (IMAGES, "the camera is mounted, or its picture read, the other way round"),
    "view": (IMAGES, "the camera shows something else than in the dataset"),
    "blank": (IMAGES, "the camera shows nothing"),
    "frozen": (IMAGES, "the camera's thread or cable stands still"),
    "units": (STATE, "the state is in other units"),
    "order": (STATE, "the values of the state are in another order"),
    "polarity": (STATE, "open and closed, or a sign, are the other way round"),
    "prompt": (TOKENS, "training never saw this prompt"),
}
_CAST, _CLEARLY = 4.0, 0.5  # grey levels by which another order of colors fits better, and the factor
_SAME_ASPECT = 0.05
_FAR = 3.0  # normalized, where the dataset stays within about 1
_OFTEN = 0.1  # share of values
_SAME_SPEED = (0.6, 1.67)
_MOVES = 0.02  # of the range of a dimension
_WIDER = 0.5  # of the range of what was recorded
_MOSTLY = 0.5  # share of requests


@dataclasses.dataclass(frozen=True)
class Sent:
    """One request of a robot.

    Attributes:
        observation: as it came over the wire.
        time_s: None = the recording does not say.
        actions: float[n w], that it was answered; None = none.
    """

    observation: Mapping[str, Any]
    time_s: float | None = None
    actions: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What the dataset holds.

    Attributes:
        observations: of frames from everywhere, as the robot would have sent them.
        actions: float[n ah w] from those frames on, in the robot's units.
        seen: what `policies.watch` compares with.
        fps: of the dataset.
        steps: float[n s], mean change of the state within the time between two requests of the robot; None = unknown.
    """

    observations: Sequence[Mapping[str, Any]]
    actions: np.ndarray
    seen: Seen
    fps: float
    steps: np.ndarray | None = None


def find(
    sent: Sequence[Sent],
    recorded: Recorded,
    to_state: Sequence[transforms.DataTransformFn],
    normalize: transforms.DataTransformFn,
) -> list[Difference]:
    """In the order of the stages.

    Args:
        to_state: the recipe's transforms from an observation to its state, raw.
    """
    keys = list(_keys(sent[0].observation, recorded.observations[0]))
    if any(found.cause == _MISSING for found in keys):
        return keys
    told = [*keys, *_colors(sent, recorded), *_forms(sent[0].observation, recorded.observations[0])]
    told += [*_watched(sent, recorded.seen)]
    if not any(found.stage == STATE for found in told):
        told += [*_ranges(sent, recorded.seen)]
    if not any(found.stage == STATE for found in told):
        told += [*_normalized(sent, recorded, to_state, normalize)]
    told += [*_actions(sent, recorded), *_speed(sent, recorded, to_state)]
    return sorted(told, key=lambda found: STAGES.index(found.stage))


_MISSING = "the robot's program and the dataset call it otherwise, or it is left out"


def _keys(sent: Mapping[str, object], recorded: Mapping[str, object]) -> Iterator[Difference]:
    ours = {key: value for key, value in flatten(recorded).items() if key != "actions"}
    theirs = {key: value for key, value in flatten(sent).items() if key not in REQUEST_KEYS}
    if missing := [key for key in ours if key not in theirs and key != "prompt"]:
        found = f"the robot does not send it; it sends {', '.join(theirs)}"
        yield Difference(KEYS, ", ".join(missing), found, _MISSING, "send it under the name that training has for it")
    if extra := [key for key in theirs if key not in ours and np.ndim(theirs[key]) > 0]:
        cause, fix = "the dataset has no such key", "leave it out"
        yield Difference(KEYS, ", ".join(extra), f"not in the dataset, which has {', '.join(ours)}", cause, fix)
    for key in ours.keys() & theirs.keys():
        a, b = np.asarray(ours[key]), np.asarray(theirs[key])
        if a.dtype.kind in "US" or b.dtype.kind in "US":
            continue
        if a.ndim != b.ndim or (a.ndim == 1 and a.shape != b.shape):
            found, cause = f"shape {b.shape} instead of {a.shape}", "it has another shape than in the dataset"
            yield Difference(KEYS, key, found, cause, "send it as the dataset has it")
        elif b.dtype.kind != a.dtype.kind or (a.ndim == 1 and b.dtype.itemsize < a.dtype.itemsize):
            found, cause = f"{b.dtype} instead of {a.dtype}", "it is of another dtype than in the dataset"
            yield Difference(KEYS, key, found, cause, "send it as the dataset has it; pictures as uint8 in 0 to 255")


def _colors(sent: Sequence[Sent], recorded: Recorded) -> Iterator[Difference]:
    """Cameras whose mean color is clearly nearer to one of the dataset's when red and blue are exchanged."""
    usual = [channel_means([each]) for each in recorded.observations]
    means = channel_means([{k: v for k, v in flatten(each.observation).items() if _is_picture(v)} for each in sent])
    for key in sorted(usual[0].keys() & means.keys()):
        mean, known = np.array(means[key]), np.array([each[key] for each in usual])
        as_sent, exchanged = (_color_distance(known, color) for color in (mean, mean[::-1]))
        if as_sent - exchanged > _CAST and exchanged < _CLEARLY * as_sent:
            found = f"mean color {_rounded(mean)}, in the dataset {_rounded(known.mean(0))} (red, green, blue)"
            cause, fix = "red and blue are exchanged (BGR)", "convert it with image[..., ::-1] in the robot's program"
            yield Difference(IMAGES, key, found, cause, fix)


def _color_distance(known: np.ndarray, color: np.ndarray) -> float:
    """To the nearest; brightness is taken out, as a lamp is no reason for alarm."""
    hue = known - known.mean(axis=-1, keepdims=True) - (color - color.mean())
    return float(np.linalg.norm(hue, axis=-1).min())


def _forms(sent: Mapping[str, object], recorded: Mapping[str, object]) -> Iterator[Difference]:
    """Pictures of another aspect, which were stretched or cropped unless black bars make up for it."""
    theirs, ours = flatten(sent), flatten(recorded)
    for key in sorted(theirs.keys() & ours.keys()):
        if not (_is_picture(theirs[key]) and np.ndim(ours[key]) == 3):
            continue
        a, b = (_shown_size(np.asarray(value), key) for value in (ours[key], theirs[key]))
        if abs(np.log((b[1] / b[0]) / (a[1] / a[0]))) > _SAME_ASPECT:
            found = f"{b[0]} x {b[1]} pixels that show something; in the dataset {a[0]} x {a[1]} (height x width)"
            cause = "the robot's program resizes the picture in another way: stretched, or cropped"
            fix = "send the camera's picture as it is, or resize it with openpi_client.image_tools.resize_with_pad"
            yield Difference(IMAGES, key, found, cause, fix)


def _shown_size(picture: np.ndarray, key: str) -> tuple[int, int]:
    """Height and width without black bars on both sides."""
    hwc = np.moveaxis(picture, 0, -1) if layout_of(picture, key) == "chw" else picture
    is_lit = hwc.max(axis=-1) > 0
    rows, columns = np.flatnonzero(is_lit.any(axis=1)), np.flatnonzero(is_lit.any(axis=0))
    if not len(rows):
        return hwc.shape[0], hwc.shape[1]
    return int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)


def _watched(sent: Sequence[Sent], seen: Seen) -> Iterator[Difference]:
    watch, told = Watch(seen), set()
    for each in sent:
        for warning in watch.look(each.observation):
            code, _, rest = warning[1:].partition("] ")
            subject, _, text = rest.partition(": ")
            if (code, subject) not in told:
                told.add((code, subject))
                stage, cause = _CODES.get(code, (STATE, code))
                found, _, fix = text.rpartition("; ")
                yield Difference(stage, subject, found or text, cause, fix or "look at the robot's program")


def _ranges(sent: Sequence[Sent], seen: Seen) -> Iterator[Difference]:
    """Values that are mostly outside of the range of the dataset, and of half of it around."""
    for key, vector in seen.state.items():
        values = np.stack([np.asarray(flatten(each.observation)[key], np.float64).reshape(-1) for each in sent])
        low, high = np.array(vector.low), np.array(vector.high)
        slack = _WIDER * (high - low) + 1e-3
        outside = ((values < low - slack) | (values > high + slack)).mean(axis=0) > _MOSTLY
        if (dims := np.flatnonzero(outside)).size:
            first = dims[0]
            found = (
                f"{key}{dims.tolist()} are mostly outside of the dataset: the first is {values[0, first]:.4g}, there "
            )
            found += f"{low[first]:.4g} to {high[first]:.4g}"
            cause = "the values are in another order, in other units, or from another zero position"
            yield Difference(STATE, key, found, cause, "put them together as the dataset has them")


def _normalized(
    sent: Sequence[Sent],
    recorded: Recorded,
    to_state: Sequence[transforms.DataTransformFn],
    normalize: transforms.DataTransformFn,
) -> Iterator[Difference]:
    """Values far outside of what the statistics make of the dataset: of another one, or another workspace."""
    chain = transforms.compose((*to_state, lambda sample: {"state": np.asarray(sample["state"])}, normalize))
    ours, theirs = (
        np.abs(np.stack([np.asarray(chain(dict(o))["state"]) for o in some]))
        for some in (recorded.observations, [each.observation for each in sent])
    )
    limit = _FAR * max(1.0, float(ours.max()))
    far = (theirs > limit).mean(axis=0)
    if (dims := np.flatnonzero(far > _OFTEN)).size:
        found = f"dimensions {dims.tolist()} reach {theirs.max():.3g}; those of the dataset {ours.max():.3g}"
        cause = "the robot is where training never was: another workspace, zero position or unit"
        yield Difference(NORMALIZED, "state", found, cause, "compare the robot's state with that of the dataset")
    elif float(np.median(ours)) > _FAR:
        found = f"values of the dataset itself are {np.median(ours):.3g} and more, normalized"
        cause, fix = "the statistics are those of another run or dataset", "compute them with `openpi stats`"
        yield Difference(NORMALIZED, "state", found, cause, fix)


def _actions(sent: Sequence[Sent], recorded: Recorded) -> Iterator[Difference]:
    chunks = [each.actions for each in sent if each.actions is not None]
    if not chunks or chunks[0].ndim != 2:
        return
    width = recorded.actions.shape[-1]
    if chunks[0].shape[-1] != width:
        found, cause = f"{chunks[0].shape[-1]} dimensions; recorded were {width}", "the policy is that of another robot"
        yield Difference(CHUNK, "actions", found, cause, "serve the checkpoint of this robot")
        return
    low, high = recorded.actions.min(axis=(0, 1)), recorded.actions.max(axis=(0, 1))
    slack = _WIDER * (high - low) + 1e-3
    rows = np.concatenate(chunks)
    outside = ((rows < low - slack) | (rows > high + slack)).mean(axis=0)
    if (dims := np.flatnonzero(outside > _MOSTLY)).size:
        found = f"dimensions {dims.tolist()} are mostly outside of what was recorded"
        cause = "actions are relative on one side and absolute on the other, in other units, or in another order"
        yield Difference(
            CHUNK, "actions", found, cause, "run `openpi doctor` against the server, which finds the stage"
        )


def _speed(
    sent: Sequence[Sent], recorded: Recorded, to_state: Sequence[transforms.DataTransformFn]
) -> Iterator[Difference]:
    if recorded.steps is None or any(each.time_s is None for each in sent) or len(sent) < 3:
        return
    chain = transforms.compose(to_state)
    states = np.stack([np.asarray(chain(dict(each.observation))["state"], np.float64) for each in sent])
    theirs, ours = np.abs(np.diff(states, axis=0)).mean(axis=0), recorded.steps.mean(axis=0)
    moving = ours > _MOVES * np.maximum(np.ptp(states, axis=0), 1e-6)
    if not moving.any():
        return
    ratio = float(np.median(theirs[moving] / ours[moving]))
    if not _SAME_SPEED[0] <= ratio <= _SAME_SPEED[1]:
        found = (
            f"the robot moves {ratio:.2g} times as fast as in the dataset, which has {recorded.fps:g} frames per second"
        )
        cause = f"its loop runs at another rate, about {ratio * recorded.fps:.3g} Hz, or it holds between chunks"
        yield Difference(CHUNK, "control_hz", found, cause, "run the robot's loop at the rate of the dataset")


def _is_picture(value: npt.ArrayLike) -> bool:
    return np.ndim(value) == 3 and np.asarray(value).dtype == np.uint8


def _rounded(mean: np.ndarray) -> str:
    return "/".join(f"{value:.0f}" for value in mean)
