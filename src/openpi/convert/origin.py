"""What a dataset was made of: files with their sizes and hashes, for its provenance, and the code that read them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpi.convert.source import EpisodeRef, Source, relative
from openpi.shared import whole_file
from openpi.shared.pools import Pool, is_typed_in

_SHOWN = 8
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileGroup:
    """Files and folders that are hashed together: all that an episode, or several, are read from."""

    root: Path
    files: tuple[Path, ...]

    def stamp(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of every file: what tells that one was changed."""
        stats = [(relative(path, self.root), path.stat()) for path in self._all()]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]

    def described(self) -> dict[str, object]:
        """Reads everything.

        The hash of several files is that of the lines that `sha256sum` prints of them, sorted by name; the identity is
        the same wherever they lie.
        """
        lines, total = [], 0
        for path in self._all():
            total += path.stat().st_size
            lines.append((relative(path, self.root), _sha256(path)))
        names = [name for name, _ in lines]
        text = "".join(f"{digest}  {name}\n" for name, digest in lines)
        return {
            "files": names if len(names) <= _SHOWN else [names[0], "...", names[-1]],
            "num_files": len(names),
            "bytes": total,
            "sha256": lines[0][1] if len(lines) == 1 else hashlib.sha256(text.encode()).hexdigest(),
            "identity": hashlib.sha256("".join(sorted(digest for _, digest in lines)).encode()).hexdigest()[:16],
        }

    def _all(self) -> list[Path]:
        return sorted(_files(self.files))


def groups(root: Path, all_files: Iterable[Sequence[Path]]) -> list[FileGroup]:
    """One for each set of files, in the order in which they come."""
    return list(dict.fromkeys(FileGroup(root, tuple(files)) for files in all_files))


def code_of(made: object) -> str:
    """Digest of the files in which the class of a format or codec is written, and those of its parts.

    What it does is said by these and its `repr`: somebody who corrects a format of his own wants no episode that was
    prepared before. Of what was typed into a notebook there is no file: nothing of it is ever gone on with.
    """
    kinds = list(_classes(made))
    if any(is_typed_in(kind.__module__) for kind in kinds):
        return secrets.token_hex()
    files = {getattr(sys.modules.get(kind.__module__), "__file__", None) for kind in kinds}
    return hashlib.sha256("".join(_sha256(Path(file)) for file in sorted(filter(None, files))).encode()).hexdigest()


def _classes(made: object) -> Iterator[type]:
    if isinstance(made, tuple | list):
        for part in made:
            yield from _classes(part)
    elif type(made).__module__ != "builtins":
        if not isinstance(made, Path):
            yield type(made)
        if dataclasses.is_dataclass(made) and not isinstance(made, type):
            yield from _classes([getattr(made, field.name) for field in dataclasses.fields(made) if field.repr])


def provenance(source: Source, options: object, refs: Sequence[EpisodeRef], folder: Path, pool: Pool) -> dict[str, Any]:
    """Source, options, files with their hashes, and which episode comes from which of them, as JSON.

    Args:
        options: a dataclass.
        folder: where hashes are kept for a run that goes on after this one was stopped.
    """
    files = groups(source.root, [ref.files for ref in refs])
    described: dict[FileGroup, dict[str, Any]] = dict(pool.each(_Hashing(folder), files))
    numbers = {group: number for number, group in enumerate(files)}

    def entry(ref: EpisodeRef) -> dict[str, object]:
        group = FileGroup(source.root, ref.files)
        identity = ref.identity or ":".join(map(str, (described[group]["identity"], *ref.place)))
        return {"name": ref.name, "source": numbers[group], "id": identity}

    return {
        "format": type(source).__name__,
        "source": source.root.name,
        "options": {**_plain(options), **_plain(source)},
        "sources": [described[group] for group in files],
        "episodes": [entry(ref) for ref in refs],
    }


@dataclasses.dataclass(frozen=True)
class _Hashing:
    """Hashes files, and remembers it for a run that goes on after this one was stopped."""

    folder: Path

    def __call__(self, group: FileGroup) -> dict[str, object]:
        digest = hashlib.sha256(repr(group.stamp()).encode()).hexdigest()[:20]
        kept = self.folder / f"{digest}.json"
        if kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))
        described = group.described()
        whole_file.write_text(kept, json.dumps(described))
        return described


def _plain(options: object) -> dict[str, object]:
    """The fields of a dataclass as JSON has them; the folder is a name there."""
    assert dataclasses.is_dataclass(options)
    fields = [field.name for field in dataclasses.fields(options) if field.repr and field.name != "root"]
    return {name: _json_value(getattr(options, name)) for name in fields}


def _json_value(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and hasattr(value, "load"):
        return dataclasses.asdict(value)  # as the file has it that it is loaded from
    return [_json_value(item) for item in value] if isinstance(value, tuple) else str(value)


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        if path.is_dir():
            yield from (entry for entry in path.rglob("*") if entry.is_file())
        else:
            yield path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
