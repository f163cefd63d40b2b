"""Are recordings in a dataset already, and was that made in the same way? By the `*_metadata_*.yaml` that lie in it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from openpi.shared.strict_json import Json

logger = logging.getLogger(__name__)

KINDS = ("run", "append")
_SHOWN = 5
# Which may differ from one time to the next; the rate is compared by who writes.
_FREE = ("task", "episodes", "use_videos", "video_codec", "fps")


def check(dataset: Path, new: Json, *, repeat: bool) -> None:
    """Compares the provenance of new episodes with that of a dataset, and tells if the options were others: columns of
    one shape and name may hold what was commanded or what was done.

    Raises:
        ValueError: recordings are in the dataset already, and not `repeat`.
    """
    earlier = [_read(path) for kind in KINDS for path in sorted(dataset.glob(f"{kind}_metadata_*.yaml"))]
    made, makes = [_made(told) for told in earlier if "format" in told], _made(json.loads(json.dumps(new)))
    if made and makes not in made:
        differing = [key for key in made[-1] | makes if made[-1].get(key) != makes.get(key)]
        logger.warning(
            "%s was converted with other options: the episodes that are appended may mean something else by the same "
            "columns. %s",
            dataset,
            "; ".join(f"{key} was {made[-1].get(key)}, and is {makes.get(key)}" for key in differing),
        )
    entries = [(told, entry) for told in earlier for key in ("recordings", "episodes") for entry in told.get(key, ())]
    entries = [(told, entry) for told, entry in entries if isinstance(entry, dict)]  # of parts of a dataset: numbers
    known = {entry.get("id") for _, entry in entries}
    names = {(told.get("source"), entry.get("name")) for told, entry in entries}
    called = [e["name"] for e in new["episodes"] if e["id"] not in known and (new["source"], e["name"]) in names]
    if called:
        logger.warning(
            "%d of %d recordings are called as others in %s, and their files are not the same, such as %s: if a file "
            "has only grown, what was in it before will be there twice; leave that out with episodes (--episodes)",
            *(len(called), len(new["episodes"]), dataset, called[0]),
        )
    repeated = [entry["name"] for entry in new["episodes"] if entry["id"] in known]
    if repeated and not repeat:
        raise ValueError(
            f"{len(repeated)} of {len(new['episodes'])} recordings are in {dataset} already, such as "
            f"{', '.join(repeated[:_SHOWN])}. Name only the new ones, or append them again with repeat (--repeat)"
        )


def warn_of_copies(content: Json) -> None:
    """Names recordings that lie below one folder twice, such as in a backup: they count twice."""
    first: dict[str, str] = {}
    copies = [entry for entry in content["episodes"] if first.setdefault(entry["id"], entry["name"]) != entry["name"]]
    if copies:
        logger.warning(
            "%d of %d recordings are copies of others, and are in the dataset twice, such as %s, of %s",
            *(len(copies), len(content["episodes"]), copies[0]["name"], first[copies[0]["id"]]),
        )


def _made(told: Json) -> dict[str, object]:
    options = {key: value for key, value in told["options"].items() if key not in _FREE}
    return {"format": told.get("format"), **options}


def _read(path: Path) -> Json:
    """Empty for a file of another tool."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
