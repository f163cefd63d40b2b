"""Episodes as wholes: `episodes.*`."""

from collections.abc import Iterator

import numpy as np

from openpi.data.check.findings import Finding, Severity
from openpi.data.check.subject import Subject
from openpi.data.lerobot.episode_table import leave_out

_SHORTEST_S, _FEWEST_FRAMES = 0.5, 5


def check(subject: Subject) -> Iterator[Finding]:
    yield from _too_short(subject)
    yield from _twice(subject)


def _too_short(subject: Subject) -> Iterator[Finding]:
    fps, horizon = subject.metadata.fps, subject.reading.horizon
    shortest = max(_FEWEST_FRAMES, round(_SHORTEST_S * fps))
    for episode in subject.episodes:
        is_error = episode.length < shortest
        if not is_error and (horizon is None or episode.length >= horizon):
            continue
        least = f"{shortest} ({shortest / fps:g} s)" if is_error else f"{horizon}, the action horizon of the recipe"
        yield Finding(
            "episodes.too-short",
            Severity.ERROR if is_error else Severity.WARNING,
            f"{episode.length} frames ({episode.length / fps:.2f} s): the rest of every chunk repeats the last action",
            f"at least {least}",
            f"If it is a recording that was broken off, {leave_out([episode.index])}",
            episode.index,
            (0, episode.length - 1),
        )


def _twice(subject: Subject) -> Iterator[Finding]:
    """The same numbers in every frame of every vector, as of a recording that was added a second time."""
    moving = [v for v in subject.vectors if v.role != "other" and subject.range_of(v).any()]
    if not moving:
        return
    seen: dict[bytes, int] = {}
    for position, episode in enumerate(subject.episodes):
        content = b"".join(np.ascontiguousarray(v.values[subject.rows(position)]).tobytes() for v in moving)
        first = seen.setdefault(content, episode.index) if episode.length > 1 else episode.index
        if first != episode.index:
            yield Finding(
                "episodes.twice",
                Severity.WARNING,
                f"state and actions are those of episode {first}, number for number",
                "a recording of its own",
                f"If it was added twice, {leave_out([episode.index])}",
                episode.index,
            )
