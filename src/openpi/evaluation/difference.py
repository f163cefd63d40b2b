"""What is compared of training and serving, stage by stage, and what a difference is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from openpi import transforms
from openpi.evaluation import vector_causes
from openpi.policies import stages

KEYS, IMAGES, STATE, NORMALIZED, TOKENS, CHUNK = STAGES = ("keys", "images", "state", "normalized", "tokens", "chunk")

_MOST_TEXT = 160


@dataclasses.dataclass(frozen=True)
class Difference:
    """Attributes:
    stage: of `STAGES`.
    subject: a key, or a fact.
    found: what differs.
    cause: why, most likely.
    fix: what to do.
    """

    stage: str
    subject: str
    found: str
    cause: str
    fix: str


@dataclasses.dataclass(frozen=True)
class TrainingPath:
    """The transforms of training, in parts.

    Attributes:
        normalize: None = the recipe does not.
        after: from the normalized sample to what the model takes.
        to_robot: from what the model gives to the robot's actions.
        state_names, action_names: of their dimensions, as many as are known.
    """

    normalize: transforms.DataTransformFn | None
    after: Sequence[transforms.DataTransformFn]
    to_robot: Sequence[transforms.DataTransformFn]
    state_names: Sequence[str] = ()
    action_names: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Frame:
    """One observation on both ways.

    Attributes:
        trained, served: as of `policies.stages`.
        actions: float[ah w], that the server answered.
    """

    trained: stages.Stages
    served: stages.Stages
    actions: np.ndarray


def vector(
    stage: str,
    subject: str,
    ours: np.ndarray | None,
    theirs: np.ndarray | None,
    names: Sequence[str],
    causes: Mapping[str, tuple[str, str]],
    otherwise: tuple[str, str],
) -> Iterator[Difference]:
    """Between the vectors of both ways, float[n d], if there is one.

    Args:
        causes: cause and fix by the kind of a `vector_causes.Cause`.
        otherwise: those of any other kind.
    """
    if ours is None or theirs is None or ours.shape != theirs.shape:
        widths = ["none" if rows is None else f"{rows.shape[1]} values" for rows in (theirs, ours)]
        if widths[0] != widths[1]:
            yield Difference(stage, subject, f"{widths[0]} instead of {widths[1]}", *otherwise)
        return
    told = [name_of(names, i) for i in range(ours.shape[1])]
    if (cause := vector_causes.explain(ours, theirs, told)) is not None:
        yield Difference(stage, subject, cause.found, *causes.get(cause.kind, otherwise))


def made(frame: Frame, path: TrainingPath) -> Mapping[str, object]:
    """What training makes for the model of the server's normalized sample."""
    raw, normalized = frame.served[stages.RAW], frame.served[stages.NORMALIZED]
    return transforms.compose([step for step in path.after if not isinstance(step, transforms.ResizeImages)])(
        {**raw, "state": np.asarray(normalized["state"])}
    )


def rows_of(frames: Sequence[Frame], of: Callable[[Frame], object]) -> np.ndarray | None:
    """float[n d], a vector of each frame; None where a frame has none."""
    values = [of(frame) for frame in frames]
    if any(value is None for value in values):
        return None
    return np.stack([np.asarray(value, np.float64).reshape(-1) for value in values])


def name_of(names: Sequence[str], dim: int | np.integer) -> str:
    """Of a dimension; its number where it has none."""
    return names[int(dim)] if dim < len(names) else f"[{dim}]"


def text_of(value: object) -> str | None:
    """A prompt as a string, however it came."""
    if value is None:
        return None
    item = value if isinstance(value, (str, bytes)) else np.asarray(value).item()
    return item.decode(errors="replace") if isinstance(item, bytes) else str(item)


def shown(value: object) -> str:
    """For a message: a line that is not too long."""
    text = np.array2string(value, precision=3, max_line_width=10_000) if isinstance(value, np.ndarray) else repr(value)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."
