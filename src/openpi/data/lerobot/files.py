"""Opening the files of a dataset: what cannot be read is looked at, and the error says what it is."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openpi.shared import strict_json
from openpi.shared.errors import first_line
from openpi.shared.file_kinds import found_instead
from openpi.shared.strict_json import Json

_PARQUET_MAGIC = b"PAR1"
_LINKED = ("data", "videos", "images")
_HUB_SNAPSHOTS, _HUB_BLOBS, _HUB_DATASET = "snapshots", "blobs", "datasets--"


def parquet_files(folder: Path) -> list[Path]:
    """Those of a folder of chunks, in order; not what macOS puts beside them on other systems' disks (`._name`)."""
    return sorted(path for path in folder.glob("*/*.parquet") if not path.name.startswith("."))


def require_file(path: Path) -> None:
    """Raises FileNotFoundError, with what is wrong with a link."""
    if path.is_file():
        return
    what = "is a folder, expected a file" if path.is_dir() else "is missing"
    if path.is_symlink():
        what = f"is a link to {path.readlink()}, which is not there"
    raise FileNotFoundError(
        f"dataset file {path} {what}; copy or download the dataset again "
        "(`openpi fetch RECIPE --dataset` brings what is missing of one of the hub)"
    )


def open_parquet(path: Path) -> pq.ParquetFile:
    """Opens a table for partial reads, with errors that say what to do.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no whole Parquet file; what it is instead was looked up. Or it has a column twice.
    """
    require_file(path)
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {_why_no_parquet(path, error)}") from error
    if twice := [name for name, count in Counter(file.schema_arrow.names).items() if count > 1]:
        file.close()
        raise ValueError(f"{path} has the column {twice[0]!r} twice; keep the one that is right")
    return file


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Reads the columns named that exist in the file; None = all.

    Raises:
        FileNotFoundError, ValueError: as `open_parquet`; or a page is damaged.
    """
    with open_parquet(path) as file:
        names = file.schema_arrow.names
        present = None if columns is None else [name for name in columns if name in names]
        try:
            return file.read(columns=present)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is a damaged parquet file ({first_line(error)}). Bring it here again") from error


def read_row_groups(
    path: Path, columns: Sequence[str], key: str, may_hold: Callable[[int, int], bool]
) -> tuple[pa.Table, np.ndarray]:
    """Reads the columns named that exist, of the row groups that `may_hold` what is wanted.

    Args:
        key: a column of integers.
        may_hold: is asked with the least and the greatest of a group; groups that do not tell theirs are read.
    Returns:
        the rows, and their numbers in the file, int64[n].
    Raises:
        FileNotFoundError, ValueError: as `read_parquet`.
    """
    with open_parquet(path) as file:
        stored = set(file.schema_arrow.names)
        present = [name for name in columns if name in stored]
        try:
            ranges = _ranges(file, key)
            groups = [number for number, found in enumerate(ranges) if found is None or may_hold(*found)]
            starts = np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(len(ranges)))])
            rows = [np.arange(starts[group], starts[group + 1]) for group in groups]
            table = file.read(columns=present) if len(groups) == len(ranges) else file.read_row_groups(groups, present)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is a damaged parquet file ({first_line(error)}). Bring it here again") from error
    return table, np.concatenate(rows) if rows else np.zeros(0, np.int64)


def _ranges(file: pq.ParquetFile, key: str) -> list[tuple[int, int] | None]:
    """The least and the greatest number of a column in each row group, where the footer says them."""
    # Not of `file.schema`: it and the footer hold each other, some 17 KB until Python looks for such circles, which it
    # hardly does while a hundred thousand files are read.
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    paths = [groups[0].column(number).path_in_schema for number in range(groups[0].num_columns)] if groups else []
    if key not in paths:
        return [None] * len(groups)
    found: list[tuple[int, int] | None] = []
    for group in groups:
        told = group.column(paths.index(key)).statistics
        low, high = (told.min, told.max) if told is not None and told.has_min_max else (None, None)
        found.append((low, high) if isinstance(low, int) and isinstance(high, int) else None)
    return found


def _why_no_parquet(path: Path, error: BaseException) -> str:
    if other := found_instead(path, "Parquet"):
        return other
    with path.open("rb") as file:
        head = file.read(len(_PARQUET_MAGIC))
        size = file.seek(0, 2)
        file.seek(max(0, size - len(_PARQUET_MAGIC)))
        tail = file.read()
    if head != _PARQUET_MAGIC:
        return f"its {size} bytes do not begin as one does ({_PARQUET_MAGIC.decode()}). Bring it here again"
    if tail != _PARQUET_MAGIC:
        return (
            f"it begins as one and lacks the footer at its end ({size} bytes): a copy was cut, or its writer was never "
            "closed. Copy it again, or close the recording with its writer's finalize()"
        )
    return f"it has a beginning and an end, and what is between is damaged ({first_line(error)}). Bring it here again"


def read_json(path: Path) -> Json:
    """An object; a byte order mark before it is skipped."""
    value = _parsed(path, _read_text(path), "")
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {_kind(value)}; expected an object, as in {{...}}")
    return value


def read_jsonl(path: Path) -> list[tuple[int, Json]]:
    """The objects of a file of JSON lines, each with the number of its line, from 1; blank lines are skipped."""
    rows = []
    # Not splitlines(), which also splits at characters that may stand in a JSON text.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = _parsed(path, line, f", line {number}")
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} holds {_kind(row)}; expected an object, as in {{...}}")
        rows.append((number, row))
    return rows


def _read_text(path: Path) -> str:
    require_file(path)
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16 text, as some Windows tools write; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {found_instead(path) or first_line(error)}") from error


def _parsed(path: Path, text: str, where: str) -> object:
    try:
        return strict_json.parse(text)
    except ValueError as error:
        why = found_instead(path) or f"{first_line(error)}. Correct it, or bring it here again"
        raise ValueError(f"{path}{where} is not valid JSON: {why}") from error


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number")


def mirrored(root: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Every file of a dataset, and its place in another folder, in which folders are made."""
    # One by one, since a walk from above does not go into folders that are links.
    for source in [path for top in root.iterdir() for path in (top, *top.rglob("*"))]:
        target = folder / source.relative_to(root)
        if source.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield source, target


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without hard links
        shutil.copy2(source, target)


def check_inside(root: Path, path: Path) -> None:
    """Refuses a file that leads out of the dataset by a link.

    The hub's cache is one dataset, which links from `snapshots/<revision>/`, and once did from any folder it downloaded
    into, to `blobs/`. And whoever keeps `videos/` on another disk has linked that folder.

    Raises:
        ValueError: it does.
    """
    if not path.is_symlink() and _is_inside(root, path.parent):
        return
    real = path.resolve()
    is_blob = real.parent.name == _HUB_BLOBS and real.parents[1].name.startswith(_HUB_DATASET)
    if not is_blob and not any(real.is_relative_to(home) for home in _homes(root, path.parent)):
        raise ValueError(
            f"dataset file {path} is a link to {real}, outside of the dataset {root}; files of a dataset must lie in "
            "its folder. Move them there, or link the whole of data/ or videos/, or the dataset's folder itself"
        )


@lru_cache(maxsize=4096)  # a file's folder has a thousand others
def _is_inside(root: Path, folder: Path) -> bool:
    return any(folder.resolve().is_relative_to(home) for home in _homes(root, folder))


@lru_cache(maxsize=4096)
def _homes(root: Path, folder: Path) -> list[Path]:
    real = root.resolve()
    blobs = [real.parents[1] / _HUB_BLOBS] if real.parent.name == _HUB_SNAPSHOTS else []
    linked = [(root / part).resolve() for part in folder.relative_to(root).parts[:1] if part in _LINKED]
    return [real, *blobs, *linked]
