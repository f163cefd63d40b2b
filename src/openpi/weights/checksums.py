"""Checksums of a checkpoint's files, written with it, so that a bit which flips on a disk or on its way is noticed.

    checksums.json   {"version": 1, "algorithm": "crc32", "piece_bytes": n,
                      "files": {path: {"bytes": size, "pieces": [checksum of each n bytes, ...]}, ...}}

A reader checks the pieces of what it reads, just before it reads them: the second reading comes from memory. CRC-32
notices all flips of one or two bits and all bursts of up to 32, and other changes but for one in 4 billion; it is the
fastest of what is installed everywhere (`benchmarks/checksums.md`). It does not notice intent: who can write the files
can write the checksums. Released checkpoints have none; then nothing is checked.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import logging
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from openpi.shared import strict_json, whole_file
from openpi.shared.errors import first_line

logger = logging.getLogger(__name__)

CHECKSUMS_FILE = "checksums.json"

_VERSION = 1
_ALGORITHM = "crc32"
_PIECE_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_NUM_THREADS = 4
# Weights, training states and certificates are checked by who reads them, everything else when a checkpoint is opened.
_READ_LATER = ("params/", "train_state/", "parity.")
# Whoever edits one changes its length, most of the time; its reader notices where it ends too early.
_TEXTS = (".json", ".jsonl", ".py", ".txt")
# What is left out when a policy is published.
_MAY_BE_GONE = ("train_state", "optimizer.pt", "loader_state.json")
_NOT_OF_IT = ("KEEP", CHECKSUMS_FILE)

# Pieces that were right before, with the state of their file then: a model is opened more than once on its way.
_known: set[tuple[object, ...]] = set()


@dataclasses.dataclass(frozen=True)
class Sums:
    """Of one file.

    Attributes:
        pieces: of each `piece_bytes`, the last one shorter.
    """

    num_bytes: int
    pieces: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Checksums:
    """What the files of a folder were when it was written.

    Attributes:
        files: by '/'-joined path in the folder.
    """

    folder: Path
    files: Mapping[str, Sums]
    piece_bytes: int

    @classmethod
    def find(cls, folder: Path) -> Checksums | None:
        """Those of a checkpoint, from its folder or one directly in it, such as `params/`; None if it has none.

        Raises:
            ValueError: they are damaged, or of another version.
        """
        for place in (folder.absolute(), folder.absolute().parent):
            file = place / CHECKSUMS_FILE
            if file.is_file():
                status = file.stat()
                return _load(file, status.st_mtime_ns, status.st_size)
        return None

    @classmethod
    def of_weights(cls, weights: Path) -> Checksums | None:
        """As `find`, of a file of weights or a folder of arrays that is whole by its own index; None, and a warning, if
        it was replaced since: such a file has another size, such a folder other files. That is how people change
        weights, and not how disks do.
        """
        sums = cls.find(weights if weights.is_dir() else weights.parent)
        if sums is None:
            return None
        path = sums._path(weights)
        if weights.is_dir():
            is_replaced = any(True for _ in sums._gone(other for other in sums.files if other.startswith(f"{path}/")))
        else:
            is_replaced = path in sums.files and weights.stat().st_size != sums.files[path].num_bytes
        if is_replaced:
            _warn_once(f"{weights} was replaced since its checkpoint was written; it is read as it is, not compared")
        return None if is_replaced else sums

    @classmethod
    def of(cls, folder: Path) -> Checksums:
        """Of the files as they are now."""
        paths = sorted(_paths(folder))
        with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
            found = pool.map(lambda path: _sums(folder / path, _PIECE_BYTES), paths)
            return cls(folder.absolute(), dict(zip(paths, found, strict=True)), _PIECE_BYTES)

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        document = {
            "version": _VERSION,
            "algorithm": _ALGORITHM,
            "piece_bytes": self.piece_bytes,
            "files": {
                path: {"bytes": sums.num_bytes, "pieces": list(sums.pieces)} for path, sums in self.files.items()
            },
        }
        whole_file.write_text(self.folder / CHECKSUMS_FILE, json.dumps(document, indent=1) + "\n")

    def check(self, file: Path, start: int = 0, stop: int | None = None) -> None:
        """Compares the pieces of a file that hold these bytes; nothing is known of files that are not listed.

        Raises:
            ValueError: they are not what was written; what to do is said.
        """
        sums = self.files.get(self._path(file))
        if sums is None or not file.is_file():
            return
        status = file.stat()
        if status.st_size != sums.num_bytes:
            raise self._other(file, f"it has {status.st_size:,} bytes, and {sums.num_bytes:,} were written")
        stop = sums.num_bytes if stop is None else min(stop, sums.num_bytes)
        for place in range(start // self.piece_bytes, -(-stop // self.piece_bytes)):
            key = (str(file), status.st_mtime_ns, status.st_ino, place, sums.pieces[place])
            if key not in _known:
                begin = place * self.piece_bytes
                if _sum(file, begin, self.piece_bytes) != sums.pieces[place]:
                    end = min(begin + self.piece_bytes, sums.num_bytes)
                    raise self._other(file, f"bytes {begin:,} to {end:,} have another checksum")
                _known.add(key)

    def check_below(self, folder: Path, share: tuple[int, int] = (0, 1)) -> None:
        """All files below a folder of it.

        Args:
            share: which of how many processes this is, that check a part each.
        Raises:
            ValueError: as of `check`.
        """
        inside = self._path(folder)
        paths = [path for path in self.files if inside == "." or path.startswith(f"{inside}/")]
        self._check_all(paths[share[0] :: share[1]])

    def check_all(self) -> list[str]:
        """Every file there is; returns those that are gone and should not be.

        Raises:
            ValueError: as of `check`.
        """
        self._check_all(self.files)
        return list(self._gone(self.files))

    def _path(self, file: Path) -> str:
        return os.path.relpath(file.absolute(), self.folder).replace(os.sep, "/")

    def _check_all(self, paths: Iterable[str]) -> None:
        ranges = [
            (self.folder / path, start, start + self.piece_bytes)
            for path in paths
            for start in range(0, max(1, self.files[path].num_bytes), self.piece_bytes)
        ]
        with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(lambda part: self.check(*part), ranges))

    def _gone(self, paths: Iterable[str]) -> Iterator[str]:
        for path in paths:
            if not path.startswith(_MAY_BE_GONE) and not (self.folder / path).is_file():
                yield path

    def _other(self, file: Path, found: str) -> ValueError:
        return ValueError(
            f"{file} is not what was written: {found}. A disk or a copy has damaged it: bring the checkpoint here "
            f"again, or take another step. If it was changed on purpose, `openpi verify {self.folder} --accept` takes "
            "the files as they are now"
        )


def check_small_files(folder: Path) -> None:
    """Everything of a checkpoint but weights and training state, which are checked while they are read.

    A text of another length was edited, which is said; a text of the same length, and any other file, is refused.

    Raises:
        ValueError: a file is not what was written, or the checksums are damaged.
    """
    sums = Checksums.find(folder)
    if sums is None or sums.folder != folder.absolute():
        return
    paths = [path for path in sums.files if not path.startswith(_READ_LATER) and not path.endswith(".safetensors")]
    for path in paths:
        file = sums.folder / path
        if path.endswith(_TEXTS) and file.is_file() and file.stat().st_size != sums.files[path].num_bytes:
            _warn_once(f"{file} was edited since its checkpoint was written; it is read as it is")
        else:
            sums.check(file)
    for path in sums._gone(paths):
        logger.warning("%s was written with this checkpoint, and is gone", sums.folder / path)


def write(folder: Path, only: Collection[str] | None = None) -> None:
    """Checksums of a checkpoint as it is now.

    Args:
        only: paths of files that are new or were changed; the others stay as they were written. None = all.
    """
    if only is None:
        Checksums.of(folder).save()
        return
    before = Checksums.find(folder)
    if before is not None and before.folder == folder.absolute():
        changed = {path: _sums(folder / path, before.piece_bytes) for path in only}
        dataclasses.replace(before, files=dict(sorted({**before.files, **changed}.items()))).save()


def accept(folder: Path) -> list[str]:
    """Takes the files of a checkpoint as they are now; returns what differs from before, a line each."""
    now = Checksums.of(folder)
    try:
        before = Checksums.find(folder)
    except ValueError as error:
        before, damaged = None, [first_line(error)]
    else:
        damaged = []
    old = {} if before is None or before.folder != now.folder else before.files
    now.save()
    changes = {path: "changed" if path in old else "new" for path in now.files if old.get(path) != now.files[path]}
    changes |= {path: "gone" for path in old if path not in now.files}
    return damaged + [f"{path}: {change}" for path, change in sorted(changes.items()) if old]


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


@functools.lru_cache(maxsize=16)
def _load(file: Path, mtime_ns: int, num_bytes: int) -> Checksums:
    """As the file was at that time."""
    del mtime_ns, num_bytes
    try:
        document = strict_json.read(file)
        if (document["version"], document["algorithm"]) != (_VERSION, _ALGORITHM):
            raise ValueError(
                f"version {document['version']} of {document['algorithm']}; expected {_VERSION}, {_ALGORITHM}"
            )
        size = document["piece_bytes"]
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"piece_bytes is {size!r}")
        files = {path: _entry(path, entry, size) for path, entry in document["files"].items()}
        return Checksums(file.parent, files, size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is damaged or of another version ({first_line(error)}). If the other files are whole, "
            f"`openpi verify {file.parent} --accept` writes it again; else bring the checkpoint here again"
        ) from error


def _entry(path: str, entry: Mapping[str, object], piece_bytes: int) -> Sums:
    size, pieces = entry["bytes"], entry["pieces"]
    if not isinstance(size, int) or not isinstance(pieces, list) or len(pieces) != -(-size // piece_bytes):
        raise ValueError(f"the entry of {path} does not cover its bytes")
    return Sums(size, pieces)


def _paths(folder: Path) -> Iterator[str]:
    for root, _, files in os.walk(folder):
        for name in files:
            is_partial = name.startswith(".") and ".partial" in name
            if not is_partial and not (Path(root) == folder and name in _NOT_OF_IT):
                yield Path(root, name).relative_to(folder).as_posix()


def _sums(file: Path, piece_bytes: int) -> Sums:
    size = file.stat().st_size
    return Sums(size, [_sum(file, start, piece_bytes) for start in range(0, size, piece_bytes)])


def _sum(file: Path, start: int, num_bytes: int) -> str:
    crc = 0
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while num_bytes and (data := stream.read(min(num_bytes, _READ_BYTES))):
            crc, num_bytes = zlib.crc32(data, crc), num_bytes - len(data)
    return f"{crc:08x}"
