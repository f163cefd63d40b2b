"""HDF5 files as data: numbers, pictures and texts of this very file, within budgets.

A file may point to others: by external links, by external storage, by virtual datasets. Those are refused, and so is
whatever is no plain array.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from openpi.convert.source import Camera, natural
from openpi.data.images import decode_image
from openpi.shared.budgets import MAX_ARRAYS_BYTES, MAX_IMAGE_PIXELS, Budget
from openpi.shared.errors import install_hint, missing_key
from openpi.shared.file_kinds import found_instead

if TYPE_CHECKING:
    import h5py

_BLOCK_BYTES = 1 << 26  # of raw pictures read at once
_MAX_SOFT_LINKS = 8
_MAX_TEXT = 1 << 20
# What damaged bytes lead to in the library.
_DAMAGES = (OSError, ValueError, TypeError, RuntimeError, KeyError, UnicodeDecodeError)
_JPEG_BEGIN, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_TRAILER_BYTES = 64  # that some cameras send behind the end


class Hdf5File:
    """One file, open for reading; a context manager.

    Raises, from all methods:
        ValueError: damaged, leading out of the file, larger than expected, or not in this layout.
        KeyError: it is not there.
        ImportError: `h5py` is missing.
    """

    def __init__(self, path: Path):
        self._h5py = _library()
        self.path = path
        try:
            self._file = self._h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {found_instead(path, 'HDF5') or error}") from error

    def __enter__(self) -> Hdf5File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def names(self, group: str = "/") -> list[str]:
        """What is in a group, in natural order; nothing where there is no such group."""
        node = self._node(group)
        return sorted(self._keys(node), key=natural)

    def has(self, name: str) -> bool:
        try:
            self._node(name)
        except KeyError:
            return False
        return True

    def is_group(self, name: str) -> bool:
        return self.has(name) and isinstance(self._node(name), self._h5py.Group)

    def numbers(self, name: str) -> np.ndarray:
        """The whole of an array of numbers."""
        dataset = self._dataset(name)
        if dataset.dtype.kind not in "biuf":
            raise ValueError(f"{self._at(name)} holds {dataset.dtype}; expected numbers")
        num_bytes = int(np.prod(dataset.shape, dtype=object)) * dataset.dtype.itemsize
        Budget(MAX_ARRAYS_BYTES).spend(num_bytes, f"{self._at(name)} {dataset.shape}")
        self._check_written(dataset, name)
        return self._read(dataset, name, ())

    def texts(self, name: str) -> list[str]:
        """An array of texts."""
        dataset = self._dataset(name)
        if self._h5py.check_string_dtype(dataset.dtype) is None or dataset.ndim > 1 or len(dataset) > _MAX_TEXT:
            raise ValueError(f"{self._at(name)} holds {dataset.dtype} {dataset.shape}; expected a list of texts")
        values = np.atleast_1d(np.asarray(self._read(dataset, name, ()), dtype=object))
        return [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values]

    def attribute(self, group: str, name: str) -> str | float | None:
        """A text or a number beside a group; None where there is none."""
        node = self._node(group)
        try:
            value: Any = node.attrs.get(name)
        except _DAMAGES as error:
            raise ValueError(f"{self._at(group)}: its attribute '{name}' cannot be read: {error}") from error
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if isinstance(value, str):
            return str(value)
        return float(value) if isinstance(value, int | float | np.number) else None

    def camera(self, name: str, *, is_chw: bool = False, turned: bool = False) -> Camera:
        """Pictures, raw [n, h, w, 3] or [n, 3, h, w], or encoded (JPEG, PNG), padded with zeros or not.

        Args:
            is_chw: how the dataset shall call them.
            turned: by 180 degrees.
        """
        dataset = self._dataset(name)
        if not len(dataset):
            raise ValueError(f"{self._at(name)} has no pictures")
        self._check_written(dataset, name)
        kind = "raw" if dataset.ndim == 4 else "encoded"
        first = next(self._frames(name))
        height, width = first.shape[:2]
        frames = _later(self.path, name, turned)
        return Camera(len(dataset), (height, width), frames, f"/{name.strip('/')} ({kind})", is_chw)

    def _frames(self, name: str) -> Iterator[np.ndarray]:
        dataset = self._dataset(name)
        if dataset.ndim == 4 and dataset.dtype == np.uint8 and 3 in (dataset.shape[1], dataset.shape[3]):
            yield from self._raw_frames(dataset, name)
        elif self._is_encoded(dataset):
            row_bytes = int(np.prod(dataset.shape[1:], dtype=object)) * dataset.dtype.itemsize
            Budget(3 * MAX_IMAGE_PIXELS).spend(row_bytes, f"an encoded picture of {self._at(name)}")
            for number in range(len(dataset)):
                content, where = _content(self._read(dataset, name, number)), f"picture {number} of {self._at(name)}"
                if content.startswith(_JPEG_BEGIN) and _JPEG_END not in content.rstrip(b"\0")[-_TRAILER_BYTES:]:
                    raise ValueError(
                        f"{where} is a JPEG without its end, so it was not written whole; "
                        "the decoder would make the rest up. Leave the episode out, or record it again"
                    )
                yield decode_image(content, where)
        else:
            raise ValueError(
                f"{self._at(name)} holds {dataset.dtype} {dataset.shape}; expected uint8 pictures [n, h, w, 3] or "
                "encoded ones"
            )

    def _raw_frames(self, dataset: h5py.Dataset, name: str) -> Iterator[np.ndarray]:
        frame_bytes = int(np.prod(dataset.shape[1:], dtype=object))
        Budget(3 * MAX_IMAGE_PIXELS).spend(frame_bytes, f"a picture of {self._at(name)} {dataset.shape}")
        rows = max(1, min(_BLOCK_BYTES // max(frame_bytes, 1), (dataset.chunks or (8,))[0]))
        for begin in range(0, len(dataset), rows):
            block = self._read(dataset, name, slice(begin, begin + rows))
            yield from block if block.shape[3] == 3 else np.moveaxis(block, 1, -1)

    def _is_encoded(self, dataset: h5py.Dataset) -> bool:
        if dataset.ndim == 2:
            return dataset.dtype == np.uint8
        of_variable = self._h5py.check_vlen_dtype(dataset.dtype)
        is_bytes = dataset.dtype.kind in "SV" and dataset.dtype.fields is None
        return dataset.ndim == 1 and (of_variable in (np.uint8, np.dtype(np.uint8)) or is_bytes)

    def _dataset(self, name: str) -> h5py.Dataset:
        node = self._node(name)
        if not isinstance(node, self._h5py.Dataset):
            raise ValueError(f"{self._at(name)} is a group; expected an array")
        if node.external or node.is_virtual:
            raise ValueError(f"{self._at(name)} lies in another file; copy it into this one (h5repack)")
        if not node.shape:
            raise ValueError(f"{self._at(name)} is a single value; expected one per frame")
        filters = node.id.get_create_plist()
        every = [filters.get_filter(i) for i in range(filters.get_nfilters())]
        same_size = (self._h5py.h5z.FILTER_SHUFFLE, self._h5py.h5z.FILTER_FLETCHER32)
        if len(packed := [text.decode() for code, *_, text in every if code not in same_size]) > 1:
            raise ValueError(
                f"{self._at(name)} is compressed several times over, by {packed}; expected once, for a few bytes could "
                "unpack to any number. Rewrite it (h5repack)"
            )
        if node.chunks:
            chunk_bytes = int(np.prod(node.chunks, dtype=object)) * node.dtype.itemsize
            Budget(MAX_ARRAYS_BYTES).spend(chunk_bytes, f"a chunk of {self._at(name)} {node.chunks}")
        return node

    def _check_written(self, dataset: h5py.Dataset, name: str) -> None:
        """What was made room for and never written reads as zeros: a robot at rest, black pictures."""
        try:
            stored, expected = int(dataset.id.get_storage_size() > 0), 1
            if dataset.chunks:
                pairs = zip(dataset.shape, dataset.chunks, strict=True)
                stored, expected = dataset.id.get_num_chunks(), math.prod(-(-size // part) for size, part in pairs)
        except _DAMAGES as error:
            raise ValueError(f"{self._at(name)} cannot be read: {error}") from error
        if dataset.size and stored < expected:
            raise ValueError(
                f"{self._at(name)}: {expected - stored} of its {expected} parts were never written, and would be read "
                "as zeros: its recorder was stopped before. Leave the episode out, or record it again"
            )

    def _node(self, name: str, depth: int = 0) -> Any:
        """Walked step by step, since a link anywhere on the way may lead out of the file."""
        node: Any = self._file
        for part in (part for part in name.split("/") if part):
            if not self._holds(node, part):
                raise missing_key(name, self._keys(node), wanted_by=f"{self.path} ({node.name})")
            link = node.get(part, getlink=True)
            if isinstance(link, self._h5py.ExternalLink):
                raise ValueError(
                    f"{self._at(name)} is a link to another file, {link.filename!r}; files are read by themselves: "
                    "copy it into this one (h5repack)"
                )
            if isinstance(link, self._h5py.SoftLink):
                if depth == _MAX_SOFT_LINKS:
                    raise ValueError(f"{self._at(name)} is a link to a link to a link; expected an array")
                above = "" if link.path.startswith("/") else node.name
                node = self._node(f"{above}/{link.path}", depth + 1)
            else:
                node = self._entry(node, part, name)
        return node

    def _entry(self, group: h5py.Group, part: str, name: str) -> object:
        try:
            return group[part]
        except _DAMAGES as error:
            raise ValueError(f"{self._at(name)} cannot be read: {error}") from error

    def _holds(self, node: h5py.Group, part: str) -> bool:
        """By the group's index: to list a group for each name would be quadratic in its episodes."""
        try:
            return isinstance(node, self._h5py.Group) and bool(node.id.links.exists(part.encode()))
        except _DAMAGES as error:
            raise ValueError(f"{self.path} {node.name} cannot be read: {error}") from error

    def _keys(self, node: h5py.Group) -> list[str]:
        """Of a group; an array has none."""
        try:
            return list(node.keys()) if isinstance(node, self._h5py.Group) else []
        except _DAMAGES as error:
            raise ValueError(f"{self.path} {node.name} cannot be read: {error}") from error

    def _read(self, dataset: h5py.Dataset, name: str, where: object) -> np.ndarray:
        try:
            return dataset[where]
        except _DAMAGES as error:
            raise ValueError(f"{self._at(name)} cannot be read: {error}") from error

    def _at(self, name: str) -> str:
        return f"{self.path} /{name.strip('/')}"


def _later(path: Path, name: str, turned: bool) -> Iterator[np.ndarray]:
    """The pictures, from a file that is opened when they are asked for."""
    with Hdf5File(path) as file:
        for frame in file._frames(name):
            yield np.ascontiguousarray(frame[::-1, ::-1]) if turned else frame


def _content(value: np.ndarray | np.void | bytes) -> bytes:
    return value.tobytes() if isinstance(value, np.ndarray | np.void) else bytes(value)


def _library() -> ModuleType:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"HDF5 recordings need another package ({error}); {install_hint('convert')}") from error
    return h5py
