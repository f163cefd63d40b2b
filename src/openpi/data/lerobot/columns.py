"""Tabular columns of a LeRobot dataset as NumPy arrays, in the dtypes in which samples leave the reader.

The library hands out floats as float32 and integers as int64 whatever the file holds, so we do too; arrays of small
integers of two dimensions and more (masks, tactile pictures) keep their dtype, which is what they take in memory.
"""

import contextlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from openpi.data.lerobot.annotations import is_annotation, language_rows
from openpi.data.lerobot.episode_table import Episode, leave_out, named
from openpi.data.lerobot.features import INDEX_FEATURES, Feature, described
from openpi.data.lerobot.files import parquet_files, read_parquet, read_row_groups
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.shared.slow import told

_ROWS_SEARCHED = 100_000  # for a message
_COUNTED = ("frame_index", "index")
_READ_THREADS = 8  # reading a v2 dataset means opening thousands of small files, which is mostly waiting


@dataclass(frozen=True)
class Columns:
    """Columns of the episodes that were asked for.

    Attributes:
        values: by name.
        first_rows: episode index -> row of its first frame in its data file.
        episodes: with the files that hold them.
    """

    values: dict[str, np.ndarray]
    first_rows: dict[int, int]
    episodes: tuple[Episode, ...]

    @classmethod
    def joined(cls, parts: Sequence["Columns"]) -> "Columns":
        """The same, one after the other."""
        values = {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values}
        first_rows = {index: row for part in parts for index, row in part.first_rows.items()}
        return cls(values, first_rows, tuple(episode for part in parts for episode in part.episodes))


def load_columns(episodes: Sequence[Episode], metadata: LeRobotMetadata, names: Collection[str]) -> Columns:
    """Reads whole columns of `episodes`, concatenated in their order.

    The rows of an episode are those whose `episode_index` says so, wherever they stand in the file; in v3, whichever
    file that is: the converter of LeRobot 0.4.0 named the file before for the first episode of each (its #2401).

    Args:
        episodes: those wanted, in dataset order.
        names: tabular features to read.
    Returns:
        `[n, *shape]` per name, shape (1,) dropped: float32, int64, bool or object (strings, language rows). Read-only.
        `frame_index` and `index` are counted where a file has none, as GR00T's have no `frame_index`.
    Raises:
        FileNotFoundError: a data file is missing.
        ValueError: a file lacks a column, rows or values that the metadata promise.
    """
    wanted = list(dict.fromkeys([*names, "episode_index"]))

    def load(file: tuple[Path, list[Episode]]) -> Columns:
        return _load_file(*file, metadata, wanted)

    files = _by_file(episodes)
    if len(files) == 1:
        only = load(files[0])
        return replace(only, values={name: _read_only(only.values[name]) for name in names})
    whole = _Whole(sum(episode.length for episode in episodes))
    begins = [0, *accumulate(sum(episode.length for episode in group) for _, group in files)]

    def put(file: tuple[Path, list[Episode]], begin: int) -> Columns:
        found = load(file)
        whole.put({name: found.values[name] for name in names}, begin)
        return replace(found, values={})

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        parts = [put(files[0], 0)]
        rest = pool.map(put, files[1:], begins[1:])
        parts += told(rest, "data files read", len(files) - 1)
    pa.default_memory_pool().release_unused()  # it keeps what tables took: twice the columns of 27 million frames
    joined = Columns.joined(parts)
    return replace(joined, values={name: _read_only(column) for name, column in whole.columns().items()})


class _Whole:
    """Columns of all files, each written where it belongs as soon as it is read, so that none is in memory twice.

    Threads may share it once the first part is there, whose kinds of numbers are taken for those of all.
    """

    def __init__(self, num_rows: int):
        self._num_rows = num_rows
        self._columns: dict[str, np.ndarray] = {}
        self._odd: list[tuple[str, int, np.ndarray]] = []

    def put(self, part: Mapping[str, np.ndarray], begin: int) -> None:
        for name, values in part.items():
            if name not in self._columns:
                self._columns[name] = np.empty((self._num_rows, *values.shape[1:]), values.dtype)
            column = self._columns[name]
            if values.dtype == column.dtype:
                column[begin : begin + len(values)] = values
            else:
                self._odd.append((name, begin, values))

    def columns(self) -> dict[str, np.ndarray]:
        for name, begin, values in self._odd:
            column = self._columns[name] = self._columns[name].astype(
                np.result_type(self._columns[name], values), copy=False
            )
            column[begin : begin + len(values)] = values
        return self._columns


def _read_only(column: np.ndarray) -> np.ndarray:
    column.flags.writeable = False
    return column


def _by_file(episodes: Iterable[Episode]) -> list[tuple[Path, list[Episode]]]:
    return [(path, list(group)) for path, group in groupby(episodes, key=lambda episode: episode.data_path)]


def _load_file(path: Path, episodes: Sequence[Episode], metadata: LeRobotMetadata, names: Sequence[str]) -> Columns:
    indices = [episode.index for episode in episodes]
    try:
        table, file_rows = read_rows_of(path, indices, names)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}. It holds {named(indices)}: or {leave_out(indices)}") from error
    if missing := [name for name in names if name not in table.column_names and name not in _COUNTED]:
        raise ValueError(
            f"{path} lacks the columns {missing}, which the format or 'features' of meta/info.json promise. Write the "
            "file again, or take features that no file has out of meta/info.json"
        )
    stored = [name for name in names if name in table.column_names]
    features = {name: _feature(metadata.features, name) for name in stored}
    columns = {name: to_numpy(table[name], features[name], f"{path}, column '{name}'") for name in stored}
    runs = _runs(path, columns["episode_index"])
    # In v2 the name of a file says which video goes with it: a table under another name may be anybody's.
    absent = set(indices) - runs.keys() if metadata.version >= "v3" else None
    if absent and (places := _elsewhere(path, absent)):
        placed = [replace(episode, data_path=places.get(episode.index, path)) for episode in episodes]
        return Columns.joined([_load_file(file, some, metadata, names) for file, some in _by_file(placed)])
    spans = [_rows_of(path, episode, runs) for episode in episodes]
    first_rows = {episode.index: int(file_rows[span.start]) for episode, span in zip(episodes, spans, strict=True)}
    if not _are_all(spans, len(table)):
        columns = {name: np.concatenate([column[span] for span in spans]) for name, column in columns.items()}
    for name in set(names) - set(stored):
        begins = [episode.dataset_from if name == "index" else 0 for episode in episodes]
        lengths = [episode.length for episode in episodes]
        columns[name] = np.concatenate([begin + np.arange(n) for begin, n in zip(begins, lengths, strict=True)])
    return Columns(columns, first_rows, tuple(episodes))


def _elsewhere(path: Path, episodes: Collection[int]) -> dict[int, Path]:
    """Which other data file of the dataset holds an episode, of those that any does."""
    found: dict[int, Path] = {}
    for file in parquet_files(path.parents[1]):
        if file == path or len(found) == len(episodes):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError):  # the fault of this file is told where it is read
            held = numbers_of_rows(read_rows_of(file, episodes, ["episode_index"])[0])
            found |= dict.fromkeys(set(held.tolist()).intersection(episodes) - found.keys(), file)
    return found


def read_rows_of(path: Path, episodes: Collection[int], names: Sequence[str]) -> tuple[pa.Table, np.ndarray]:
    """The columns named that a file has, of the row groups that may hold rows of some episodes.

    Recorders write a row group per episode, and say in the footer which numbers are in there; converters write one for
    all.

    Returns:
        the rows, and their numbers in the file, int64[n].
    Raises:
        FileNotFoundError, ValueError: the file cannot be read.
    """
    wanted = np.sort(np.fromiter(episodes, np.int64))

    def may_hold(low: int, high: int) -> bool:
        return bool(np.searchsorted(wanted, low) < np.searchsorted(wanted, high, side="right"))

    return read_row_groups(path, names, "episode_index", may_hold)


def numbers_of_rows(table: pa.Table) -> np.ndarray:
    """int64[n], the episode of each row."""
    return to_numpy(table["episode_index"], _feature({}, "episode_index"), "column 'episode_index'")


def _feature(features: Mapping[str, Feature], name: str) -> Feature:
    return features.get(name) or {"dtype": INDEX_FEATURES[name], "shape": [1]}


def _runs(path: Path, episode_index: np.ndarray) -> dict[int, slice]:
    """The rows of each episode of a file, which follow one another."""
    cuts = np.flatnonzero(np.diff(episode_index)) + 1
    begins = np.concatenate([[0], cuts]).astype(int) if len(episode_index) else np.zeros(0, int)
    ends = [*cuts.tolist(), len(episode_index)]
    runs: dict[int, slice] = {}
    for begin, end, index in zip(begins.tolist(), ends, episode_index[begins].tolist(), strict=False):
        if index in runs:
            raise ValueError(
                f"{path} holds frames of episode {index} from row {runs[index].start} and again from row {begin}, with "
                f"others between; expected all of an episode together. Write the file again, or {leave_out([index])}"
            )
        runs[index] = slice(begin, end)
    return runs


def _rows_of(path: Path, episode: Episode, runs: Mapping[int, slice]) -> slice:
    rows = runs.get(episode.index, slice(0, 0))
    found = rows.stop - rows.start
    if found == episode.length:
        return rows
    others = np.unique(numbers_of_rows(read_parquet(path, ["episode_index"]))).tolist()
    raise ValueError(
        f"{path} holds {found} frames of episode {episode.index} where meta/episodes promises {episode.length} (it has "
        f"frames of {named(others) if others else 'none'}). Bring the file or the table of episodes again, or "
        f"{leave_out([episode.index])}"
    )


def _are_all(spans: Sequence[slice], num_rows: int) -> bool:
    ends = [0, *(span.stop for span in spans)]
    return ends[-1] == num_rows and all(span.start == end for span, end in zip(spans, ends, strict=False))


def to_numpy(column: pa.ChunkedArray, feature: Feature, name: str) -> np.ndarray:
    """Turns one column into `[n, *shape]`; nested lists, fixed or variable, are flattened and reshaped."""
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # older pyarrow keeps an empty column chunked
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], column.type)
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if is_annotation(feature):
        return language_rows(values, name)
    is_even = True
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or _is_fixed(values.type):
        is_even = is_even and not values.null_count and (_is_fixed(values.type) or _are_equal(values.value_lengths()))
        values = values.flatten()
    if feature["dtype"] == "string":
        texts = values.to_pylist()
        if not all(isinstance(text, str) for text in texts) or len(texts) != len(column):
            nulls = f", null in {values.null_count} rows" if values.null_count else ""
            raise ValueError(f"{name} holds {column.type}{nulls}; expected a text in each row, as meta/info.json says")
        return np.array(texts, dtype=object)
    shape = () if tuple(feature["shape"]) == (1,) else tuple(feature["shape"])
    if not is_even or values.null_count or len(values) != len(column) * math.prod(shape):
        raise ValueError(
            f"{name}: {len(values) - values.null_count} values in {len(column)} rows{_first_odd_row(column, shape)}, "
            f"expected shape {shape} per row as meta/info.json says ({described(feature)}). Correct the entry, or "
            "write the column again"
        )
    array = values.to_numpy(zero_copy_only=False)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} holds {values.type}; expected numbers, as meta/info.json says ({described(feature)})")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {array.max()}, beyond the integers of 64 bits; expected smaller numbers")
    if array.dtype.kind == "f" and np.dtype(feature["dtype"]).kind in "iu":
        array = _whole_numbers(array, name)
    return array.astype(_sample_dtype(array.dtype, len(shape)), copy=False).reshape(len(column), *shape)


def _whole_numbers(array: np.ndarray, name: str) -> np.ndarray:
    """Integers that a writer stored as floats, as pandas does."""
    if not np.isfinite(array).all() or (array != np.rint(array)).any():
        odd = array[~np.isfinite(array) | (array != np.rint(array))][0]
        raise ValueError(f"{name} holds {odd}; expected whole numbers, as meta/info.json says")
    return array.astype(np.int64)


def _first_odd_row(column: pa.ChunkedArray, shape: tuple[int, ...]) -> str:
    """Where the values of a row are not as many as its shape says."""
    for row, value in enumerate(column.to_pylist()[:_ROWS_SEARCHED]):
        count, is_whole = _count(value)
        if count != math.prod(shape) or not is_whole:
            return f" (row {row} has {count}{'' if is_whole else ', some of them null'})"
    return ""


def _count(value: object) -> tuple[int, bool]:
    """How many values a cell has, and whether none of them is null."""
    if not isinstance(value, list):
        return (0, False) if value is None else (1, True)
    parts = [_count(part) for part in value]
    return sum(count for count, _ in parts), all(is_whole for _, is_whole in parts)


def _are_equal(lengths: pa.Array) -> bool:
    numbers = lengths.to_numpy(zero_copy_only=False)
    return len(numbers) == 0 or bool((numbers == numbers[0]).all())


def _is_fixed(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind)


def _sample_dtype(dtype: np.dtype, num_axes: int) -> np.dtype:
    if num_axes > 1 and dtype.kind in "iu" and dtype.itemsize < 8:
        return dtype
    return np.dtype({"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}[dtype.kind])


def to_arrow(values: np.ndarray, feature: Feature) -> pa.Array:
    """Inverse of `to_numpy`: scalars for shape (1,), fixed-size lists for vectors, nested lists beyond."""
    if feature["dtype"] == "string":
        return pa.array(values.tolist(), pa.string())
    shape = tuple(feature["shape"])
    flat = pa.array(np.ascontiguousarray(values).reshape(-1).astype(feature["dtype"], copy=False))
    if shape == (1,):
        return flat
    if len(shape) == 1:
        return pa.FixedSizeListArray.from_arrays(flat, shape[0])
    for size in reversed(shape):
        offsets = np.arange(0, len(flat) + 1, size, dtype=np.int32)
        flat = pa.ListArray.from_arrays(pa.array(offsets), flat)
    return flat
