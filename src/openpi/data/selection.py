"""Which episodes of a dataset are left out: by number, by what `openpi dataset check` found, by a condition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from openpi.data.episode_condition import OF_EPISODES, EpisodeCondition, EpisodeValues
from openpi.data.lerobot.columns import load_columns
from openpi.data.lerobot.episode_table import Episode
from openpi.data.lerobot.features import dimension_names
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.shared import strict_json
from openpi.shared.errors import missing_key
from openpi.shared.strict_json import Json

ERRORS: tuple[str, ...] = ("error",)


@dataclass(frozen=True)
class Selection:
    """All episodes but some.

    Attributes:
        exclude_episodes: numbers.
        exclude_findings: file of `openpi dataset check --json`; episodes with findings go.
        exclude_kinds: which findings count: severities (`error`, `warning`), groups (`videos`) or codes
            (`videos.frozen`).
        exclude_where: condition; episodes of which it is true go. See `episode_condition`.
    """

    exclude_episodes: Sequence[int] = ()
    exclude_findings: str | None = None
    exclude_kinds: Sequence[str] = ERRORS
    exclude_where: str | None = None

    def __bool__(self) -> bool:
        """Whether it may leave anything out."""
        return bool(self.exclude_episodes or self.exclude_findings or self.exclude_where)

    def excluded(self, metadata: LeRobotMetadata) -> set[int]:
        """Numbers of the episodes that are left out.

        A condition is asked of those only that are not left out already: they may be unreadable.

        Raises:
            ValueError: an episode that is not there, findings of another dataset, or no condition.
            KeyError: the condition reads a column or dimension that is not there.
            FileNotFoundError: no file of findings.
        """
        gone = self._numbered(metadata)
        if self.exclude_findings is not None:
            gone |= _with_findings(Path(self.exclude_findings).expanduser(), self.exclude_kinds, metadata)
        if self.exclude_where is not None:
            gone |= _where(EpisodeCondition(self.exclude_where), metadata, gone)
        return gone

    def kept(self, metadata: LeRobotMetadata) -> list[int]:
        """Numbers of the others.

        Raises:
            ValueError: there are none; or as `excluded`.
        """
        gone = self.excluded(metadata)
        kept = [episode.index for episode in metadata.episodes if episode.index not in gone]
        if not kept:
            raise ValueError(f"{self} leaves none of the {len(metadata.episodes)} episodes of {metadata.root}")
        return kept

    def __str__(self) -> str:
        """The fields that say anything, for messages."""
        fields = ("exclude_episodes", "exclude_findings", "exclude_where")
        return " with ".join(name for name in fields if getattr(self, name))

    def _numbered(self, metadata: LeRobotMetadata) -> set[int]:
        numbers = {episode.index for episode in metadata.episodes} | set(metadata.empty)
        if unknown := sorted(set(self.exclude_episodes) - numbers):
            raise ValueError(
                f"exclude_episodes has {unknown}, and {metadata.root} has no such episodes; expected some of its "
                f"{len(numbers)} numbers, {min(numbers, default=0)} to {max(numbers, default=0)}"
            )
        return set(self.exclude_episodes)


def _with_findings(path: Path, kinds: Sequence[str], metadata: LeRobotMetadata) -> set[int]:
    try:
        report = strict_json.read(path)
        findings = [(finding["episode"], _kinds_of(finding)) for finding in report["findings"]]
        counted = {"num_episodes": report["num_episodes"], "num_frames": report["num_frames"]}
        lengths = {f"frames of episode {row['episode']}": row["length"] for row in report.get("episodes", ())}
    except FileNotFoundError:
        raise FileNotFoundError(
            f"exclude_findings={path} does not exist; write it with `openpi dataset check DATASET --json > {path}`"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"exclude_findings={path} is no document of `openpi dataset check --json` ({type(error).__name__}: {error})"
        ) from None
    there: dict[str, object] = {"num_episodes": len(metadata.episodes), "num_frames": metadata.num_frames}
    there |= {f"frames of episode {episode.index}": episode.length for episode in metadata.episodes}
    for what, found in (counted | lengths).items():
        if found != there.get(what):
            raise ValueError(
                f"exclude_findings={path} is of another dataset: it has {what} = {found}, and {metadata.root} has "
                f"{there.get(what, 'none')}. Check this one, and use what is found there"
            )
    known = set(kinds)
    return {episode for episode, kinds_of in findings if episode is not None and known & kinds_of}


def _kinds_of(finding: Json) -> set[str]:
    code = str(finding["code"])
    return {code, code.partition(".")[0], str(finding["severity"])}


def _where(condition: EpisodeCondition, metadata: LeRobotMetadata, gone: set[int]) -> set[int]:
    for name in sorted(condition.columns - set(metadata.column_keys)):
        raise missing_key(
            name,
            [*OF_EPISODES, *metadata.column_keys],
            wanted_by=f"the condition '{condition.text}'",
            fix='A column whose name is no word is written column["name"].',
        )
    asked = [episode for episode in metadata.episodes if episode.index not in gone]
    return {number for number, values in _values(condition, metadata, asked) if condition(values)}


def _values(
    condition: EpisodeCondition, metadata: LeRobotMetadata, episodes: Sequence[Episode]
) -> Iterator[tuple[int, EpisodeValues]]:
    names = {key: dimension_names(metadata.features[key]) for key in condition.columns}
    read = [*condition.columns, "task_index"] if episodes and condition.reads_frames else []
    columns = load_columns(episodes, metadata, read).values if read else {}
    begin = 0
    for episode in episodes:
        end = begin + episode.length
        of_episode = {
            "length": episode.length,
            "seconds": episode.length / metadata.fps,
            "episode": episode.index,
            "task": metadata.tasks.get(int(columns["task_index"][begin]), "") if read else "",
        }
        yield episode.index, EpisodeValues(of_episode, {key: columns[key][begin:end] for key in names}, names)
        begin = end
