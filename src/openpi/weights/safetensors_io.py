"""The safetensors format: a JSON header with dtype, shape and place of every tensor, then their bytes.

Tensors are read where they lie, one at a time; a file is written tensor by tensor, so that no more than one of them has
to be in memory. Several files (shards) with a `.index.json` are read as one. NumPy only; bfloat16 and the 8-bit floats
come from ml_dtypes. Source: the checkpoint specification, section 4.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import ml_dtypes
import numpy as np

from openpi.shared import strict_json
from openpi.shared.errors import first_line
from openpi.shared.file_kinds import found_instead
from openpi.weights.checksums import Checksums

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Tensors beyond this size come in blocks of rows.
_WHOLE_BYTES = 256 << 20
_BLOCK_BYTES = 64 << 20
_MAX_HEADER_BYTES = 100_000_000
_MAX_TENSORS = 2**16  # policies have about a thousand; a header may have millions that are empty
_MAX_AXES = 32
_MOST_VALUES = 2**60  # of a shape, zeros left out: NumPy counts in 64 bits
_METADATA = "__metadata__"
_DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "U32": np.uint32,
    "I32": np.int32,
    "U64": np.uint64,
    "I64": np.int64,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
    "F64": np.float64,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Of one tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Place:
    file: Path
    spec: Spec
    offset: int
    sums: Checksums | None = dataclasses.field(default=None, repr=False)

    def is_same(self, other: _Place) -> bool:
        """Whether the other has the same bytes in it."""
        if self.spec != other.spec:
            return False
        maps = [np.memmap(place.file, np.uint8, "r") for place in (self, other)] if self.spec.nbytes else []
        parts = [data[p.offset : p.offset + p.spec.nbytes] for data, p in zip(maps, (self, other), strict=False)]
        return not parts or np.array_equal(parts[0], parts[1])


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, of one file or of shards; each is a read-only map of its part of the file.

    Attributes:
        metadata: of the file (text by text); of shards, of all of them together.
    """

    def __init__(self, places: Mapping[str, _Place], metadata: Mapping[str, str]) -> None:
        self._places = dict(places)
        self.metadata = dict(metadata)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._mapped(name, 0, self._places[name].spec.shape)

    def _mapped(self, name: str, start: int, shape: tuple[int, ...]) -> np.ndarray:
        """From byte `start` of a tensor on."""
        place = self._places[name]
        count = math.prod(shape)
        if not count:
            return np.empty(shape, place.spec.dtype)
        if place.sums is not None:
            first = place.offset + start
            place.sums.check(place.file, first, first + count * place.spec.dtype.itemsize)
        # A map for each piece: its pages go when the array does.
        return np.memmap(place.file, place.spec.dtype, "r", place.offset + start, (count,)).reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, name: str, *, whole: bool = False) -> Iterator[tuple[int, np.ndarray]]:
        """A tensor, or, if it is very large, blocks of its rows one after another, with the index of the first of each.

        Args:
            whole: never in blocks.
        """
        spec = self._places[name].spec
        per_block = rows_per_block(spec.shape, spec.dtype.itemsize) if spec.shape and not whole else 0
        if not per_block or per_block >= spec.shape[0]:
            yield 0, self[name]
            return
        row_bytes = spec.nbytes // spec.shape[0]
        for start in range(0, spec.shape[0], per_block):
            count = min(per_block, spec.shape[0] - start)
            yield start, self._mapped(name, start * row_bytes, (count, *spec.shape[1:]))

    def spec(self, name: str) -> Spec:
        return self._places[name].spec

    def without(self, names: Collection[str]) -> Tensors:
        """Those that are left when some are taken out.

        Raises:
            ValueError: one of them is not there.
        """
        for name in names:
            if name not in self:
                raise ValueError(f"there is no tensor {name}; there are {', '.join(sorted(self)[:10])}, ...")
        return Tensors({name: place for name, place in self._places.items() if name not in names}, self.metadata)

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: place.spec for name, place in self._places.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: place.spec.shape for name, place in self._places.items()}


def rows_per_block(shape: tuple[int, ...], itemsize: int) -> int:
    """How many rows (along axis 0) of an array are read or written at once: all, unless it is very large."""
    row_bytes = math.prod(shape[1:]) * itemsize
    return shape[0] if row_bytes * shape[0] <= _WHOLE_BYTES else max(1, _BLOCK_BYTES // row_bytes)


def is_here(folder: Path) -> bool:
    """Whether a folder has `model.safetensors`, or shards of it."""
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


def open_tensors(path: Path | str) -> Tensors:
    """Of a file, a `.index.json`, or a folder with `model.safetensors` or `model.safetensors.index.json`.

    Only headers are read.

    Raises:
        FileNotFoundError: nothing of this is there, or a shard is missing.
        ValueError: a file is cut off, damaged, or no safetensors file; or it is not clear which tensors are meant.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_in(path)
    return _open_shards(path) if path.suffix == ".json" else Tensors(*_read_header(path))


def _file_in(folder: Path) -> Path:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if not single.is_file() and not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    if single.is_file() and index.is_file() and set(_weight_map(index).values()) != {SINGLE_FILE}:
        raise ValueError(
            f"{folder} has weights twice, {SINGLE_FILE} and the shards of {INDEX_FILE}, and they need not be the same: "
            "move those that are not meant out of the folder, the index with its shards or the single file"
        )
    return index if index.is_file() else single


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard, a file beside the index."""
    try:
        shard_of = strict_json.read(index)["weight_map"]
        wrong = [name for name in shard_of.values() if name != Path(name).name or not name]
        if wrong:
            raise ValueError(f"it names the file {wrong[0]!r}; shards are beside it")
        return dict(shard_of)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = found_instead(index) or first_line(error)
        raise ValueError(
            f"{index} is damaged ({why}); expected an object with 'weight_map'. Bring it here again"
        ) from error


def _open_shards(index: Path) -> Tensors:
    shard_of = _weight_map(index)
    places: dict[str, _Place] = {}
    elsewhere: dict[str, _Place] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(shard_of.values())):
        file = index.parent / shard
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {index.name} names it. Bring the whole folder here again")
        found, texts = _read_header(file)
        metadata |= texts
        listed = {name for name, its_shard in shard_of.items() if its_shard == shard}
        lacking = sorted(listed - found.keys())
        if lacking:
            raise ValueError(f"{file} has no {lacking[0]} ({len(lacking)} missing), which {index.name} says it has")
        places |= {name: found[name] for name in found if name in listed}
        elsewhere |= {name: found[name] for name in found if name not in listed}
    _check_elsewhere(index, places, elsewhere)
    unnamed = {file.name for file in index.parent.glob("model-*-of-*.safetensors")} - set(shard_of.values())
    if unnamed:
        logger.warning("%s does not name %s, which is not read", index, ", ".join(sorted(unnamed)))
    return Tensors(places, metadata)


def _check_elsewhere(index: Path, places: Mapping[str, _Place], elsewhere: Mapping[str, _Place]) -> None:
    """Tensors of shards that the index does not take from there: it has to take the same from another shard."""
    for name, place in elsewhere.items():
        if name not in places:
            raise ValueError(
                f"{place.file} has {name}, which {index.name} does not list: the index is of other shards. Bring the "
                "whole folder here again"
            )
        if not place.is_same(places[name]):
            raise ValueError(
                f"{name} is in two shards, {places[name].file.name} and {place.file.name} of {index.parent}, and they "
                "differ: the shards are of different checkpoints. Bring the whole folder here again"
            )


def _read_header(file: Path) -> tuple[dict[str, _Place], dict[str, str]]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = int.from_bytes(stream.read(8), "little")
        if size < 8 or start > min(size - 8, _MAX_HEADER_BYTES):
            why = found_instead(file) or f"its {size} bytes do not hold its header. Bring it here again"
            raise ValueError(f"{file} is cut off or no safetensors file: {why}")
        text = stream.read(start)
    try:
        header = dict(strict_json.parse(text))
        metadata = dict(header.pop(_METADATA, {}))
        if len(header) > _MAX_TENSORS:
            raise ValueError(f"it has {len(header)} tensors; expected {_MAX_TENSORS} at most")
        entries = {
            name: (_spec(entry["dtype"], entry["shape"]), begin, end)
            for name, entry in header.items()
            for begin, end in [_numbers("data_offsets", entry["data_offsets"], 2)]
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} has a damaged header ({first_line(error)}). Bring it here again") from error
    places = _checked(file, entries, first=8 + start, size=size)
    sums = Checksums.of_weights(file)
    if sums is not None:
        sums.check(file, 0, 8 + start)
    return {name: dataclasses.replace(place, sums=sums) for name, place in places.items()}, metadata


def _spec(dtype: str, shape: object) -> Spec:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known here; known are {', '.join(_DTYPES)}")
    sizes = _numbers("shape", shape)
    if len(sizes) > _MAX_AXES or math.prod(size or 1 for size in sizes) >= _MOST_VALUES:
        raise ValueError(f"shape is {shape!s:.80}; expected sizes that an array can have")
    return Spec(sizes, np.dtype(_DTYPES[dtype]))


def _numbers(field: str, values: object, count: int | None = None) -> tuple[int, ...]:
    if (
        not isinstance(values, list)
        or not all(type(value) is int and value >= 0 for value in values)
        or count not in (None, len(values))
    ):
        raise ValueError(f"{field} is {values!r:.80}; expected {count or 'some'} whole numbers from 0 on")
    return tuple(values)


def _checked(file: Path, entries: Mapping[str, tuple[Spec, int, int]], *, first: int, size: int) -> dict[str, _Place]:
    """Places whose bytes follow one another and fill the file."""
    end = 0
    for name, (spec, start, stop) in sorted(entries.items(), key=lambda entry: entry[1][1:]):
        if start != end or stop - start != spec.nbytes:
            raise ValueError(
                f"{file} is damaged: {name} lies at bytes {start} to {stop}; expected {spec.nbytes} bytes from {end} "
                "on. Bring it here again"
            )
        end = stop
    if first + end != size:
        what = "is cut off" if size < first + end else "has bytes that no tensor owns"
        raise ValueError(f"{file} {what}: it has {size} bytes, and its header says {first + end}. Bring it here again")
    return {name: _Place(file, spec, first + start) for name, (spec, start, _) in entries.items()}


class Writer:
    """Writes a file tensor by tensor, in any order; a context manager.

    The file appears under its name when the context ends well and every tensor is there; else nothing is left.

    Args:
        specs: shape and dtype of every tensor that will be written.
        metadata: text by text.
    """

    def __init__(self, path: Path | str, specs: Mapping[str, Spec], *, metadata: Mapping[str, str] | None = None):
        self._path = Path(path)
        self._partial = self._path.with_name(f".{self._path.name}.partial-{uuid.uuid4().hex[:8]}")
        self._specs = dict(specs)
        self._metadata = dict(metadata or {})
        self._starts: dict[str, int] = {}
        self._filled = dict.fromkeys(self._specs, 0)  # rows so far
        self._file: BinaryIO

    def __enter__(self) -> Self:
        header, self._starts, size = _layout(self._specs, self._metadata)
        self._file = self._partial.open("wb")
        self._file.write(header)
        self._file.truncate(size)
        return self

    def write(self, name: str, tensor: np.ndarray) -> None:
        """A whole tensor, or its next rows (along axis 0).

        Raises:
            ValueError: the name, the dtype or the shape is not what was announced.
        """
        spec, filled = self._specs.get(name), self._filled.get(name, 0)
        if spec is None or np.dtype(tensor.dtype) != spec.dtype or not self._fits(spec, filled, tensor.shape):
            raise ValueError(f"{name}: {tensor.dtype}{tuple(tensor.shape)} is written; announced is {spec}")
        data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        row_bytes = spec.nbytes // max(1, spec.shape[0]) if spec.shape else 0
        self._file.seek(self._starts[name] + filled * row_bytes)
        self._file.write(data.data)
        self._filled[name] += tensor.shape[0] if spec.shape else 1

    def write_zeros(self, name: str) -> None:
        """A tensor of zeros, which takes no room on file systems with holes."""
        spec = self._specs[name]
        self._filled[name] = spec.shape[0] if spec.shape else 1

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        lacking = [name for name, spec in self._specs.items() if not self._is_whole(name, spec)]
        try:
            if kind is None and not lacking:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                self._partial.replace(self._path)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)
        if kind is None and lacking:
            raise ValueError(f"{len(lacking)} announced tensors were not written, such as {lacking[0]}")

    def _is_whole(self, name: str, spec: Spec) -> bool:
        return not spec.nbytes or self._filled[name] == (spec.shape[0] if spec.shape else 1)

    @staticmethod
    def _fits(spec: Spec, filled: int, shape: tuple[int, ...]) -> bool:
        if not spec.shape:
            return shape == () and not filled
        return shape[1:] == spec.shape[1:] and len(shape) > 0 and filled + shape[0] <= spec.shape[0]


def save(path: Path | str, tensors: Mapping[str, np.ndarray], *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors that are in memory already."""
    specs = {name: Spec(tuple(array.shape), np.dtype(array.dtype)) for name, array in tensors.items()}
    with Writer(path, specs, metadata=metadata) as writer:
        for name, array in tensors.items():
            writer.write(name, np.asarray(array))


def _layout(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Header, first byte of each tensor in the file, size of the file.

    The largest items come first, as the format wants tensors aligned to them.
    """
    for name, spec in specs.items():
        if spec.dtype not in _NAMES:
            raise ValueError(f"{name} has dtype {spec.dtype}, which the format does not have; it has {list(_DTYPES)}")
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for name in order:
        spec, offsets[name] = specs[name], end
        end += spec.nbytes
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return (
        len(text).to_bytes(8, "little") + text,
        {name: first + offset for name, offset in offsets.items()},
        first + end,
    )
