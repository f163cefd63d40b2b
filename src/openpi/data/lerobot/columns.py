"""Tabular columns of a LeRobot dataset as NumPy arrays, in the dtypes in which samples leave the reader.

The library hands out floats as float32 and integers as int64 whatever the file holds, so we do too.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from openpi.data.lerobot.metadata import CAMERA_DTYPES, INDEX_FEATURES, Episode, Feature, read_parquet

_READ_THREADS = 8  # reading a v2 dataset means opening thousands of small files, which is mostly waiting


def is_tabular(feature: Feature) -> bool:
    """True for features that `load_columns` can hand out: numbers, booleans and plain strings."""
    dtype = feature["dtype"]
    if dtype in CAMERA_DTYPES:
        return False
    if dtype == "string":
        return True
    try:
        return np.dtype(dtype).kind in "fiub"
    except TypeError:  # structured columns of newer writers, such as language annotations
        return False


def first_rows(episodes: Iterable[Episode]) -> dict[int, int]:
    """Episode index -> row of its first frame in its data file. `episodes` are all those of the dataset."""
    first_frame_of_file: dict[Path, int] = {}
    rows = {}
    for episode in episodes:
        begin = first_frame_of_file.setdefault(episode.data_path, episode.dataset_from)
        rows[episode.index] = episode.dataset_from - begin
    return rows


def load_columns(
    episodes: Sequence[Episode],
    rows: Mapping[int, int],
    features: Mapping[str, Feature],
    names: Collection[str],
) -> dict[str, np.ndarray]:
    """Reads whole columns of `episodes`, concatenated in their order.

    Args:
        episodes: those wanted, in dataset order.
        rows: from `first_rows`.
        names: tabular features to read.
    Returns:
        `[n, *shape]` per name, shape (1,) dropped: float32, int64, bool or object (strings). Read-only.
    Raises:
        FileNotFoundError: a data file is missing.
        ValueError: a file lacks a column, rows or values that the metadata promise.
    """
    wanted = list(dict.fromkeys([*names, "episode_index"]))
    files = [(path, list(group)) for path, group in groupby(episodes, key=lambda episode: episode.data_path)]

    def load(file: tuple[Path, list[Episode]]) -> dict[str, np.ndarray]:
        return _load_file(*file, rows, features, wanted)

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        parts = list(pool.map(load, files))
    columns = {}
    for name in names:
        pieces = [part.pop(name) if name != "episode_index" else part[name] for part in parts]
        column = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        column.flags.writeable = False
        columns[name] = column
    return columns


def _load_file(
    path: Path,
    episodes: Sequence[Episode],
    rows: Mapping[int, int],
    features: Mapping[str, Feature],
    names: Sequence[str],
) -> dict[str, np.ndarray]:
    table = read_parquet(path, columns=list(names))
    if missing := [name for name in names if name not in table.column_names]:
        raise ValueError(f"{path} lacks the columns {missing} that meta/info.json lists as features")
    columns = {name: to_numpy(table[name], _feature(features, name), f"{path}, column '{name}'") for name in names}
    spans = [slice(rows[episode.index], rows[episode.index] + episode.length) for episode in episodes]
    for episode, span in zip(episodes, spans, strict=True):
        _check_rows(path, episode, columns["episode_index"][span])
    if list(_merged(spans)) == [slice(0, len(table))]:
        return columns
    return {name: np.concatenate([column[span] for span in spans]) for name, column in columns.items()}


def _feature(features: Mapping[str, Feature], name: str) -> Feature:
    return features.get(name) or {"dtype": INDEX_FEATURES[name], "shape": (1,)}


def _merged(spans: Iterable[slice]) -> Iterator[slice]:
    """Adjacent spans as one."""
    current = None
    for span in spans:
        if current is not None and span.start == current.stop:
            current = slice(current.start, span.stop)
            continue
        if current is not None:
            yield current
        current = span
    if current is not None:
        yield current


def _check_rows(path: Path, episode: Episode, found: np.ndarray) -> None:
    if len(found) == episode.length and (found == episode.index).all():
        return
    raise ValueError(
        f"{path} holds {np.count_nonzero(found == episode.index)} frames of episode {episode.index} where "
        f"meta/episodes promises {episode.length}; the data and the metadata come from different recordings"
    )


def to_numpy(column: pa.ChunkedArray, feature: Feature, name: str) -> np.ndarray:
    """Turns one column into `[n, *shape]`; nested lists, fixed or variable, are flattened and reshaped."""
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # older pyarrow keeps an empty column chunked
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], column.type)
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or _is_fixed(values.type):
        values = values.flatten()
    if feature["dtype"] == "string":
        return np.array(values.to_pylist(), dtype=object)
    shape = () if tuple(feature["shape"]) == (1,) else tuple(feature["shape"])
    if values.null_count or len(values) != len(column) * math.prod(shape):
        raise ValueError(
            f"{name}: {len(values) - values.null_count} values in {len(column)} rows, expected shape {shape} "
            f"per row as meta/info.json says"
        )
    array = values.to_numpy(zero_copy_only=False)
    return array.astype(_sample_dtype(array.dtype), copy=False).reshape(len(column), *shape)


def _is_fixed(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind)


def _sample_dtype(dtype: np.dtype) -> np.dtype:
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
