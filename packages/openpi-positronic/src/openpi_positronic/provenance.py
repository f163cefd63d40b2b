"""Where the episodes of a converted dataset come from, written into it: `run_metadata_<UTC>.yaml`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from openpi.shared import run_metadata
from openpi.shared.strict_json import Json
from openpi_positronic.codecs.codec import Codec
from openpi_positronic.raw_episodes import Episode

logger = logging.getLogger(__name__)

_KINDS = ("run", "append")
_SHOWN = 5


def record(
    folder: Path, episodes: Sequence[Path], *, is_append: bool, codec: Codec, fps: float, task: str | None
) -> Path:
    """Writes the command line, versions, git state and recordings of one conversion into a dataset."""
    content = {
        "codec": repr(codec),
        "fps": fps,
        "task": task,
        "recordings": [{"id": recording_id(path), "path": str(path.absolute())} for path in episodes],
    }
    return run_metadata.write(folder, content, kind=_KINDS[is_append])


def refuse_repeats(dataset: Path, episodes: Sequence[Path]) -> None:
    """
    Raises:
        ValueError: recordings are in the dataset already.
    """
    known = _recorded_ids(dataset)
    repeated = [path for path in episodes if recording_id(path) in known]
    if repeated:
        shown = ", ".join(str(path) for path in repeated[:_SHOWN])
        raise ValueError(
            f"{len(repeated)} of {len(episodes)} recordings are in {dataset} already, such as {shown}. Name only the "
            "new ones, or append them again with repeat (--repeat)"
        )


def warn_of_copies(episodes: Sequence[Path]) -> None:
    """Names recordings that lie below one folder twice, such as in a backup: they would count twice."""
    first: dict[str, Path] = {}
    copies = [path for path in episodes if first.setdefault(recording_id(path), path) != path]
    copies = [path for path in copies if Episode(path).meta.get("created_ts_ns")]  # else the number alone is no sign
    if copies:
        logger.warning(
            "%d of %d recordings are copies of others, and will be in the dataset twice, such as %s, of %s",
            *(len(copies), len(episodes), copies[0], first[recording_id(copies[0])]),
        )


def warn_of_other_codec(dataset: Path, codec: Codec) -> None:
    """Says that new episodes mean something else: columns of one shape and name may hold what was commanded or what was
    done. No refusal, since a codec of one's own may describe itself otherwise each time.
    """
    known = dict.fromkeys(told["codec"] for told in _told(dataset) if "codec" in told)
    if known and _training_part(repr(codec)) not in map(_training_part, known):
        logger.warning(
            "%s was converted with another codec: the episodes that are appended may mean something else by the same "
            "columns. It was %s, and is %s",
            *(dataset, " or ".join(known), codec),
        )


def _training_part(codec: str) -> str:
    """Without what only counts when commands are sent."""
    return re.sub(r"horizon_s=[^,)]*", "", codec)


def recording_id(episode: Path) -> str:
    """The same wherever the episode lies: its number, and when it was recorded."""
    return f"{episode.name}-{Episode(episode).meta.get('created_ts_ns', 0)}"


def _recorded_ids(dataset: Path) -> set[str]:
    return {entry["id"] for told in _told(dataset) for entry in told.get("recordings", [])}


def _told(dataset: Path) -> list[Json]:
    """What each conversion into a dataset has written."""
    return [_read(path) for kind in _KINDS for path in sorted(dataset.glob(f"{kind}_metadata_*.yaml"))]


def _read(path: Path) -> Json:
    """Empty for a file of another tool."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
