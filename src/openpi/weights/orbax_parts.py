"""Parameters of an Orbax folder, row by row: arrays larger than memory are never there as a whole.

A stacked array of a full-size model is 5 GB and often one compressed chunk, so that even one layer of it cannot be read
without the rest. Here large chunks are decompressed as streams, in the order of their bytes, which is that of the
layers. No JAX. Source: the checkpoint specification, sections 1.1 to 1.3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tensorstore
from typing_extensions import Buffer

from openpi.shared import strict_json
from openpi.shared.errors import first_line
from openpi.shared.strict_json import Json
from openpi.weights.checksums import Checksums
from openpi.weights.integrity import check_complete, is_chunk, value_places

# Arrays up to this size are read at once.
_WHOLE_BYTES = 256 << 20
# Of large arrays, at most about this many bytes are handed out at once, but at least one row.
_BLOCK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array on disk.

    Attributes:
        shape, dtype: ml_dtypes for bfloat16.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    _store: Any = dataclasses.field(repr=False)  # tensorstore.TensorStore
    _chunks: Mapping[tuple[int, ...], tuple[Path, int, int]] = dataclasses.field(repr=False)
    _sums: Checksums | None = dataclasses.field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: object = ...) -> np.ndarray:
        """All of it, or what basic indexing selects; decodes every chunk that it touches.

        Raises:
            ValueError: a chunk is not what was written.
        """
        self._check()
        return np.asarray(self._store[index].read().result())

    __getitem__ = read

    def rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """Consecutive rows along axis 0, with the index of the first of them."""
        if self.nbytes <= _WHOLE_BYTES:
            yield 0, self.read()
        elif self.is_stream:
            yield from self._streamed()
        else:
            per_block = self._rows_per_block()
            for start in range(0, self.shape[0], per_block):
                rows = slice(start, min(start + per_block, self.shape[0]))
                self._check(rows)
                yield start, np.asarray(self._store[rows].read().result())

    def _check(self, rows: slice | None = None) -> None:
        """Compares the chunks that hold these rows (None: all) with their checksums."""
        if self._sums is None:
            return
        height = _chunk_shape(self._store)[0] if self.shape else 1
        for cell, (file, start, length) in self._chunks.items():
            if rows is None or rows.start // height <= cell[0] <= (rows.stop - 1) // height:
                self._sums.check(file, start, start + length)

    def _rows_per_block(self) -> int:
        return max(1, _BLOCK_BYTES // max(1, self.nbytes // self.shape[0]))

    @property
    def is_stream(self) -> bool:
        """Whether its chunks are files with their bytes in C order, plain or behind zstd."""
        layout = self._store.spec().to_json().get("metadata", {})
        compressor = (layout.get("compressor") or {"id": None})["id"]
        grid = itertools.product(
            *(range(-(-s // c)) for s, c in zip(self.shape, layout.get("chunks", ()), strict=False))
        )
        return (
            layout.get("zarr_format", 2) == 2
            and layout.get("order") == "C"
            and not layout.get("filters")
            and compressor in (None, "zstd")
            and "chunks" in layout
            and all(cell in self._chunks for cell in grid)
        )

    def _streamed(self) -> Iterator[tuple[int, np.ndarray]]:
        layout = self._store.spec().to_json()["metadata"]
        extents, is_plain = layout["chunks"], layout.get("compressor") is None
        height = extents[0]
        cells = list(itertools.product(*(range(-(-s // c)) for s, c in zip(self.shape[1:], extents[1:], strict=True))))
        for band, first in enumerate(range(0, self.shape[0], height)):
            num_rows = min(height, self.shape[0] - first)
            self._check(slice(first, first + num_rows))
            with contextlib.ExitStack() as stack:
                streams = [
                    stack.enter_context(_stream(self._chunks[(band, *cell)], is_plain=is_plain)) for cell in cells
                ]
                for start in range(0, num_rows, self._rows_per_block()):
                    count = min(self._rows_per_block(), num_rows - start)
                    yield first + start, self._assembled(streams, cells, (count, *extents[1:]))

    def _assembled(self, streams: list[object], cells: list[tuple[int, ...]], extents: tuple[int, ...]) -> np.ndarray:
        """The next rows of chunks side by side."""
        block = np.empty((extents[0], *self.shape[1:]), self.dtype)
        for stream, cell in zip(streams, cells, strict=True):
            part = block if len(cells) == 1 and block.shape == extents else np.empty(extents, self.dtype)
            _fill(stream, part)
            if part is not block:
                corner = [cell_index * extent for cell_index, extent in zip(cell, extents[1:], strict=True)]
                where = tuple(slice(at, at + extent) for at, extent in zip(corner, extents[1:], strict=True))
                target = block[(slice(None), *where)]
                target[...] = part[tuple(slice(size) for size in target.shape)]
        return block


def open_arrays(folder: Path) -> dict[str, StoredArray]:
    """Every parameter of a `params/` folder, by '/'-joined path below `params`, without the extra last level `value`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is damaged, or holds something else than parameters.
    """
    if not (folder / "_METADATA").is_file():
        raise FileNotFoundError(
            f"{folder} is not a parameter folder: it has no _METADATA file. Expected the `params` folder of a "
            "checkpoint, as in <checkpoint>/params"
        )
    check_complete(folder)
    document, leaves = _described(folder)
    if not leaves or any(leaf[0] != "params" for leaf in leaves):
        raise ValueError(f"{folder} holds the top keys {sorted({leaf[0] for leaf in leaves})}; expected 'params'")
    levels = -1 if all(leaf[-1] == "value" for leaf in leaves) else None
    is_ocdbt = (folder / "manifest.ocdbt").is_file()
    places, sums = _chunk_places(folder, is_ocdbt), Checksums.of_weights(folder)
    if sums is not None and document.get("use_zarr3"):  # whose chunks have places that are not known here
        sums.check_below(folder)
    found = {}
    for leaf in leaves:
        name = ".".join(leaf)
        store = _open_store(folder, name, is_ocdbt=is_ocdbt, is_zarr3=bool(document.get("use_zarr3")))
        dtype = np.dtype(store.dtype.numpy_dtype)
        path = "/".join(leaf[1:levels])
        if path in found:
            raise ValueError(f"{folder / '_METADATA'} is damaged: it has {path} twice. Bring the folder here again")
        found[path] = StoredArray(tuple(store.shape), dtype, store, places.get(name, {}), sums)
    return found


def _described(folder: Path) -> tuple[Json, list[list[str]]]:
    """`_METADATA`, and the keys of every array that it names."""
    file = folder / "_METADATA"
    try:
        document = dict(strict_json.read(file))
        leaves = [[str(key["key"]) for key in leaf["key_metadata"]] for leaf in document["tree_metadata"].values()]
        wrong = next((key for leaf in leaves for key in leaf if "/" in key or key in ("", ".", "..")), None)
        if wrong is not None or not all(leaves):
            raise ValueError(f"an array has the key {wrong!r}")
        return document, leaves
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({first_line(error)}). Bring the folder here again") from error


def _open_store(folder: Path, name: str, *, is_ocdbt: bool, is_zarr3: bool) -> tensorstore.TensorStore:
    kvstore = _ocdbt(folder, name) if is_ocdbt else {"driver": "file", "path": f"{folder / name}/"}
    spec = {"driver": "zarr3" if is_zarr3 else "zarr", "kvstore": kvstore}
    try:
        store = tensorstore.open(spec, read=True, open=True).result()
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{folder} is damaged: its array {name} cannot be opened ({first_line(error)[:200]}). Bring it here again"
        ) from error
    # A chunk is unpacked whole, so none may be larger than what it is a part of.
    chunk = _chunk_shape(store)
    if any(extent > max(1, size) for extent, size in zip(chunk, store.shape, strict=True)):
        raise ValueError(
            f"{folder} is damaged: its array {name} has the shape {tuple(store.shape)} and chunks of {chunk}. Bring it "
            "here again"
        )
    return store


def _chunk_shape(store: Any) -> tuple[int, ...]:
    return tuple(store.chunk_layout.read_chunk.shape)


def create_arrays(
    folder: Path, specs: Mapping[str, tuple[tuple[int, ...], np.dtype]], chunks: Mapping[str, tuple[int, ...]]
) -> dict[str, tensorstore.TensorStore]:
    """A `params/` folder in the layout of the released checkpoints, for writing its arrays a chunk at a time.

    Orbax itself writes all arrays at once, with copies of them in memory.

    Args:
        specs: shape and dtype by '/'-joined path.
        chunks: shape of each array's chunks; what is written at once should be whole chunks.
    Returns:
        Of each array a tensorstore to write to: `stores[path][index].write(values).result()`.
    """
    folder.mkdir(parents=True)
    leaves = {}
    for path, (shape, _) in specs.items():
        keys = ("params", *path.split("/"))
        leaves[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in keys],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)},
        }
    document = {
        "tree_metadata": leaves,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / "_METADATA").write_text(json.dumps(document))
    return {
        path: tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": _ocdbt(folder, ".".join(("params", *path.split("/")))),
                "metadata": {"compressor": {"id": "zstd", "level": 1}, "chunks": list(chunks[path])},
                "store_data_equal_to_fill_value": True,
            },
            create=True,
            open=True,
            shape=shape,
            dtype=str(dtype),
        ).result()
        for path, (shape, dtype) in specs.items()
    }


def _ocdbt(folder: Path, array: str) -> dict[str, object]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.absolute()}/"}, "path": f"{array}/"}


def _chunk_places(folder: Path, is_ocdbt: bool) -> dict[str, dict[tuple[int, ...], tuple[Path, int, int]]]:
    """Array -> cell of its chunk grid -> file, first byte, length."""
    if is_ocdbt:
        values = value_places(folder)
    else:
        files = (file for file in folder.glob("*/*") if file.is_file())
        values = {f"{file.parent.name}/{file.name}": (file, 0, file.stat().st_size) for file in files}
    places: dict[str, dict[tuple[int, ...], tuple[Path, int, int]]] = {}
    for key, place in values.items():
        array, _, cell = key.rpartition("/")
        if is_chunk(key):
            places.setdefault(array, {})[tuple(map(int, cell.split(".")))] = place
    return places


class _Part(io.RawIOBase):
    """Bytes of a file, from one place on."""

    def __init__(self, file: Path, start: int, length: int) -> None:
        super().__init__()
        self._file = file.open("rb", buffering=0)
        self._file.seek(start)
        self._left = length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        count = self._file.readinto(memoryview(buffer)[: self._left]) or 0
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _stream(place: tuple[Path, int, int], *, is_plain: bool) -> pa.NativeFile:
    source = pa.PythonFile(_Part(*place), mode="r")
    return source if is_plain else pa.CompressedInputStream(source, "zstd")


def _fill(stream: pa.NativeFile, array: np.ndarray) -> None:
    view = array.reshape(-1).view(np.uint8).data
    while len(view):
        count = stream.readinto(view[: 4 << 20])
        if not count:
            raise ValueError("a chunk ends before its array does: the folder is damaged. Bring it here again")
        view = view[count:]
