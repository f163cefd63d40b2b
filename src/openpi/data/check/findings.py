"""Findings about a dataset, as data, and the report that they make up."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from openpi.data.lerobot.episode_table import leave_out
from openpi.shared.strict_json import Json

GROUPS = (
    *("metadata", "temporal", "actions", "videos", "statistics", "episodes"),
    *("consistency", "training", "anomalies", "portability"),
)
"""First part of every code; the eleventh group, per episode, is `Report.per_episode`."""

_NAMED = 8


class Severity(enum.StrEnum):
    """`error`: a policy would learn something wrong. `warning`: somebody should look. `info`: worth knowing."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong or odd.

    Attributes:
        code: `group.what`, the same for all findings of a kind.
        found, expected, fix: in words; the last two may be empty.
        episode: its number in the dataset; None = all of it.
        frames: first and last, numbers in the episode.
        column: feature of the dataset.
        dimension: name of one of the column's.
    """

    code: str
    severity: Severity
    found: str
    expected: str = ""
    fix: str = ""
    episode: int | None = None
    frames: tuple[int, int] | None = None
    column: str | None = None
    dimension: str | None = None

    @property
    def group(self) -> str:
        return self.code.partition(".")[0]

    @property
    def place(self) -> str:
        """`episode 3, frames 10 to 14, actions/elbow`; empty = the whole dataset."""
        parts = [] if self.episode is None else [f"episode {self.episode}"]
        if self.frames is not None:
            first, last = self.frames
            parts.append(f"frame {first}" if first == last else f"frames {first} to {last}")
        return ", ".join([*parts, *([self.signal] if self.signal else [])])

    @property
    def signal(self) -> str:
        """`column/dimension`, or what there is of it."""
        return "/".join(part for part in (self.column, self.dimension) if part)

    @classmethod
    def of_error(cls, code: str, error: BaseException, **where: Any) -> Finding:
        """Of an error message in the form of the project: `found; expected that. Fix`, or `found. Fix`."""
        found, says_expected, rest = str(error).partition("; expected ")
        expected, _, fix = rest.partition(". ")
        if not says_expected:
            found, _, fix = found.partition(". ")
        return cls(code, Severity.ERROR, found, expected, fix, **where)

    def to_json(self) -> Json:
        values = dataclasses.asdict(self) | {"severity": self.severity.value}
        return values | {"frames": None if self.frames is None else list(self.frames)}


@dataclasses.dataclass(frozen=True)
class Report:
    """What a check has to say.

    Attributes:
        lengths: frames by episode, of those in the table of episodes.
        num_pictures: decoded.
    """

    root: str
    findings: tuple[Finding, ...]
    lengths: Mapping[int, int]
    num_pictures: int = 0
    seconds: float = 0.0

    def count(self, severity: Severity) -> int:
        return sum(finding.severity is severity for finding in self.findings)

    @property
    def per_episode(self) -> dict[int, list[Finding]]:
        """Those of each episode that has any, ascending."""
        found: dict[int, list[Finding]] = {}
        for finding in self.findings:
            if finding.episode is not None:
                found.setdefault(finding.episode, []).append(finding)
        return dict(sorted(found.items()))

    def to_json(self) -> dict[str, object]:
        """The document of `openpi dataset check --json`."""
        episodes = [
            {"episode": index, "length": self.lengths.get(index), "codes": sorted({f.code for f in found})}
            for index, found in self.per_episode.items()
        ]
        return {
            "dataset": self.root,
            "num_episodes": len(self.lengths),
            "num_frames": sum(self.lengths.values()),
            "num_pictures": self.num_pictures,
            "seconds": round(self.seconds, 3),
            "counts": {severity.value: self.count(severity) for severity in Severity},
            "findings": [finding.to_json() for finding in self.findings],
            "episodes": episodes,
        }


@dataclasses.dataclass(frozen=True)
class Kind:
    """Findings of one code about one signal, or about dimensions of one column alike, told together."""

    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding:
        return self.findings[0]

    @property
    def episodes(self) -> list[int]:
        return list(dict.fromkeys(f.episode for f in self.findings if f.episode is not None))

    @property
    def fix(self) -> str:
        """Of all of them."""
        if self.first.episode is None:
            return self.first.fix
        return self.first.fix.replace(leave_out([self.first.episode]), leave_out(self.episodes))

    @property
    def where(self) -> str:
        """`actions/elbow, episodes 3, 5 and 7 more`."""
        dimensions = [d for d in dict.fromkeys(f.dimension for f in self.findings) if d is not None]
        whole = dataclasses.replace(self.first, dimension=_some(dimensions) or None)
        if len({(f.episode, f.frames) for f in self.findings}) == 1:
            return whole.place
        numbers = self.episodes
        episodes = f"{'episode' if len(numbers) == 1 else 'episodes'} {_some(numbers)}"
        return ", ".join(part for part in (whole.signal, episodes if numbers else "") if part)

    @property
    def line(self) -> str:
        """For a log."""
        first = self.first
        sample = f" (first: {first.place})" if len(self.findings) > 1 else ""
        parts = [f"{first.code} at {self.where or 'the dataset'}{sample}: {first.found}"]
        parts += [f"; expected {first.expected}"] if first.expected else []
        return "".join([*parts, f". {self.fix}" if self.fix else ""])


def by_kind(findings: Iterable[Finding]) -> list[Kind]:
    """Errors first; in each severity in the order of the groups."""
    signals: dict[tuple[Any, ...], list[Finding]] = {}
    for finding in findings:
        signals.setdefault((finding.severity, finding.code, finding.signal), []).append(finding)
    kinds: dict[tuple[Any, ...], list[Finding]] = {}
    for members in signals.values():
        first, places = members[0], tuple((f.episode, f.frames) for f in members)
        kinds.setdefault((first.severity, first.code, first.column, first.found, places), []).extend(members)
    return [Kind(tuple(members)) for members in kinds.values()]


def _some(names: Sequence[object]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(map(str, names[:_NAMED]))}{more}"


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """By severity, group, code, episode, frame."""
    severities: Sequence[Severity] = list(Severity)

    def key(finding: Finding) -> tuple[object, ...]:
        episode = -1 if finding.episode is None else finding.episode
        group = GROUPS.index(finding.group)
        return (severities.index(finding.severity), group, finding.code, finding.signal, episode, finding.frames or ())

    return tuple(sorted(findings, key=key))
