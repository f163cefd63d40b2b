"""Which files a dataset was made of: sizes and hashes, for its provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpi.convert.source import relative

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

    def described(self) -> dict[str, Any]:
        """Reads everything.

        The hash of several files is that of the lines that `sha256sum` prints of them, sorted by name.
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
        }

    def _all(self) -> list[Path]:
        return sorted(_files(self.files))


def groups(root: Path, all_files: Iterable[Sequence[Path]]) -> list[FileGroup]:
    """One for each set of files, in the order in which they come."""
    return list(dict.fromkeys(FileGroup(root, tuple(files)) for files in all_files))


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
