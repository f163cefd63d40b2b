"""Whether an Orbax folder is all there, from its index alone: no array is read, however large it is.

An OCDBT folder has a tree of nodes, from `manifest.ocdbt` on, that says which bytes of which file hold which value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import tensorstore

from openpi.shared import strict_json
from openpi.shared.errors import first_line
from openpi.shared.file_kinds import found_instead
from openpi.weights.checksums import Checksums

_MAX_SHOWN = 10
_DESCRIPTIONS = ("_METADATA", "_sharding")
_MANIFEST = "manifest.ocdbt"


def check_complete(folder: Path) -> None:
    """Refuses what was cut while it was written or copied.

    What only changes bytes inside an array is noticed by `checksums`, where there are any. Those of the index and of
    what describes the arrays are compared here.

    Raises:
        ValueError: files are missing, shorter than the index says, unreadable, or not what was written; they are named.
    """
    problems = list(_problems(folder))
    if not problems:
        sums = Checksums.of_weights(folder)
        if sums is not None:
            _check_index(folder, sums)
        return
    shown = "\n  ".join(problems[:_MAX_SHOWN])
    more = f"\n  and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
    raise ValueError(
        f"{folder} is damaged, or was not written to its end:\n  {shown}{more}\nTake another step, or bring it here "
        "again: `openpi fetch URL --force`, for a download"
    )


def _check_index(folder: Path, sums: Checksums) -> None:
    """All that is read before any array."""
    for name in (*_DESCRIPTIONS, _MANIFEST):
        sums.check(folder / name)
    if not (folder / _MANIFEST).exists():
        for file in folder.glob("*/.z*"):
            sums.check(file)
        return
    for key, kind, (file, start, length) in _located(folder):
        if kind == "btreenode" or not is_chunk(key):
            sums.check(file, start, start + length)


def is_chunk(key: str) -> bool:
    """Whether this is the key of values of an array, not of what describes it."""
    return all(part.isdigit() for part in key.rpartition("/")[2].split("."))


def _problems(folder: Path) -> Iterator[str]:
    for name in _DESCRIPTIONS:
        try:
            strict_json.read(folder / name)
        except FileNotFoundError:
            continue
        except ValueError as error:
            yield f"{name} is cut off or no JSON ({found_instead(folder / name) or first_line(error)})"
    if not (folder / _MANIFEST).exists():
        if next(folder.glob("*/.zarray"), None) is None:  # one folder for each array, as old checkpoints have
            yield "manifest.ocdbt is missing"
        return
    try:
        extents = _extents(folder)
    except (ValueError, OSError, KeyError, IndexError, TypeError) as error:
        why = found_instead(folder / _MANIFEST, "any") or first_line(error)
        yield f"the index cannot be read: {_MANIFEST}, {why}"
        return
    for name, end in sorted(extents.items()):
        file = folder / name
        if not file.exists():
            yield f"{name} is missing"
        elif file.stat().st_size < end:
            why = found_instead(file, "any")  # what is compressed has a signature of its own
            yield f"{name} has {file.stat().st_size} bytes and needs {end}{f': {why}' if why else ''}"


def value_places(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """File, first byte and length of every value of the folder's store, by key; without those inside the index."""
    return {key: place for key, kind, place in _located(folder) if kind == "value"}


def _extents(folder: Path) -> dict[str, int]:
    """File -> the first byte behind everything that the index finds in it."""
    ends: dict[str, int] = defaultdict(int)
    for _, _, (file, start, length) in _located(folder):
        name = str(file.relative_to(folder))
        ends[name] = max(ends[name], start + length)
    return ends


def _located(folder: Path) -> Iterator[tuple[str, str, tuple[Path, int, int]]]:
    """Key, kind (`btreenode` or `value`), and file, first byte and length of all that the latest version points to."""
    base = tensorstore.KvStore.open({"driver": "file", "path": f"{folder}/"}).result()
    waiting = [(b"", tensorstore.ocdbt.dump(base).result()["versions"][-1]["root"])]
    nodes: set[str] = set()
    while waiting:
        prefix, entry = waiting.pop()
        key = prefix + entry.get("key", b"")
        location = entry.get("location") or entry.get("indirect_value")
        if location is None:
            continue  # its value is in the node itself
        kind, root, name, start, length = location.split(":")
        path = Path(unquote(root) + unquote(name))
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"it points to {path}, out of the folder")
        yield key.decode(errors="replace"), kind, (folder / path, int(start), int(length))
        if kind == "btreenode":
            if location in nodes:
                raise ValueError(f"its node {location} is in it twice")
            nodes.add(location)
            prefix += entry.get("subtree_common_prefix", b"")
            waiting += ((prefix, inner) for inner in tensorstore.ocdbt.dump(base, location).result()["entries"])
