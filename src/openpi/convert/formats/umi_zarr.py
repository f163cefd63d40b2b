"""Replay buffers of UMI and diffusion policy: a zarr with all episodes behind each other, as a folder or zipped.

    meta/episode_ends               [episodes]      one behind the last frame of each
    data/camera<n>_rgb, data/img    [n, h, w, 3]    or [n, 3, h, w]; uint8, or whole numbers 0..255 as floats
    data/robot<n>_eef_pos, _eef_rot_axis_angle, _gripper_width    UMI: m, rad, m
    data/state, data/action                         diffusion policy

UMI records no actions: what a hand did is where it was in the next frame. So the action of a frame is the next one's
state, and the last one's its own, which is what its training makes of it.
"""

from __future__ import annotations

import functools
import itertools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode, found, joined, relative
from openpi.shared.budgets import MAX_ARRAYS_BYTES, MAX_IMAGE_PIXELS, Budget
from openpi.shared.errors import install_hint, listed, missing_key

if TYPE_CHECKING:
    import zarr

_UMI_HZ = 60
_UMI_STATE = ("eef_pos", "eef_rot_axis_angle", "gripper_width")
_UMI_NAMES = ("x", "y", "z", "rx", "ry", "rz", "gripper_width")
_MIN_SIDE = 16  # of a picture whose channels come first; poses are smaller
_MARKS = (".zgroup", "zarr.json")
# What a file may name to be run over its bytes: compression and pictures; nothing that makes objects.
_CODECS = re.compile(
    r"blosc|zlib|gzip|bz2|lzma|lz4|zstd|shuffle|delta|crc32c?|adler32|bytes|transpose|fixedscaleoffset|"
    r"(numcodecs\.)?(blosc|zlib|gzip|bz2|lzma|lz4|zstd|shuffle|delta)|imagecodecs_(jpegxl|jpeg2k|jpeg|jpegls|png|webp|avif)"
)
_SAME_SIZE = re.compile(r"(numcodecs\.)?(shuffle|delta)|crc32c?|adler32|bytes|transpose|fixedscaleoffset")


@dataclass(frozen=True)
class UmiZarr:
    """A replay buffer of UMI or diffusion policy.

    Attributes:
        root: a zarr, as a folder or .zip, or a folder of several.
        state: arrays that make up the state, comma-separated; default: UMI's poses and grippers, or `state`.
        action: the array of actions; default: `action`, else the state of the next frame.
    """

    root: Path
    state: tuple[str, ...] = ()
    action: str | None = None

    def episodes(self) -> Sequence[EpisodeRef]:
        refs = []
        for path in self._stores():
            with _Opened(path) as store:
                ends = store.rows("meta/episode_ends", 0, None)
            if ends.ndim != 1 or ends.dtype.kind not in "iu" or np.any(np.diff([0, *ends.tolist()]) <= 0):
                raise ValueError(f"{path} meta/episode_ends is {ends[:8]}; expected whole numbers that rise")
            name, starts = relative(path, self.root), [0, *ends[:-1].tolist()]
            refs += [
                EpisodeRef(f"{name}/episode_{number}", (path,), (begin, end))
                for number, (begin, end) in enumerate(zip(starts, ends.tolist(), strict=True))
            ]
        return refs

    def read(self, ref: EpisodeRef) -> RawEpisode:
        begin, end = (int(place) for place in ref.place)
        with _Opened(ref.files[0]) as store:
            names = store.names("data")
            is_umi = any(re.fullmatch(r"robot\d+_eef_pos", name) for name in names)
            cameras = [name for name in names if store.is_picture(f"data/{name}")]
            state_names = self.state or (_umi_state(names) if is_umi else ("state",))
            state = store.vectors(state_names, begin, end, self._dimensions(state_names))
            action = self.action or ("action" if "action" in names else None)
            columns: dict[str, RawColumn] = {"observation.state": state}
            if action is None:
                following = np.concatenate([state.values[1:], state.values[-1:]])
                columns["action"] = Numbers(following, f"the next frame's {state.origin}", state.names)
            else:
                columns["action"] = store.vectors((action,), begin, end)
            for name in cameras:
                columns[f"observation.images.{name}"] = store.camera(f"data/{name}", begin, end)
            used = [name for name in (*state_names, action, *cameras) if name is not None]
            left_out = tuple(f"data/{name}" for name in names if name not in used)
            remarks = tuple(_remarks(store, used, cameras, begin, end))
        robot, rate = ("umi", _UMI_HZ) if is_umi else (None, None)
        return RawEpisode(columns, rate, None, robot, left_out, remarks)

    def _stores(self) -> list[Path]:
        if any((self.root / mark).is_file() for mark in _MARKS):
            return [self.root]
        return found(self.root, ["*.zarr", "*.zarr.zip", "*.zip"], "a zarr of UMI or diffusion policy")

    def _dimensions(self, names: Sequence[str]) -> tuple[str, ...]:
        robots = len(names) // len(_UMI_STATE)
        if self.state or not names[0].startswith("robot"):
            return ()
        return tuple(f"robot{robot}_{name}" for robot in range(robots) for name in _UMI_NAMES)


def _umi_state(names: Sequence[str]) -> tuple[str, ...]:
    robots = sorted({match[1] for name in names if (match := re.fullmatch(r"(robot\d+)_eef_pos", name))})
    return tuple(f"{robot}_{part}" for robot in robots for part in _UMI_STATE)


def _remarks(store: _Opened, names: Sequence[str], cameras: Sequence[str], begin: int, end: int) -> Iterator[str]:
    """What is not in the episode and should be.

    Raises:
        ValueError: arrays of several lengths, or pictures that should be stored and are not.
    """
    lengths = {name: store.length(f"data/{name}") for name in names}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            f"{store.path} data: one number of frames is expected of all arrays, found {lengths}: which of them belong "
            "together, nothing says. If a recording was interrupted, cut all to the last of meta/episode_ends"
        )
    if end == store.rows("meta/episode_ends", 0, None)[-1] and (behind := lengths[names[0]] - end):
        yield f"the {behind} frames behind it are of no episode (meta/episode_ends), and are left out"
    for name in names:
        if not (absent := store.absent(f"data/{name}", begin, end)):
            continue
        told = f"data/{name}: frames {listed(absent)} are not stored, and would be read as the fill value"
        # Zarr 3 by default stores no chunk that is all fill value, as of black pictures; Zarr 2 stored each.
        if name in cameras and not store.omits_fill:
            raise ValueError(
                f"{store.path} {told}; copy it again. If they are such pictures, write it again with "
                "zarr.config.set({'array.write_empty_chunks': True})"
            )
        yield f"{told}: unless they are such {'pictures' if name in cameras else 'numbers'}, copy it again"


class _Opened:
    """One zarr, open for reading; errors as those of `source.Source.read`.

    What damaged bytes lead to is of the type of whichever codec meets them, so all types are caught.
    """

    def __init__(self, path: Path):
        self.path = path
        library = _library()
        try:
            if path.is_dir():
                self._store: Any = library.storage.LocalStore(path, read_only=True)
            else:
                self._store = library.storage.ZipStore(path, mode="r", read_only=True)
            self._group: zarr.Group = library.open_group(self._store, mode="r")
        except Exception as error:
            raise ValueError(f"{path} is no readable zarr ({error})") from error

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    @property
    def omits_fill(self) -> bool:
        """Whether a chunk may be in no file because it is all fill value."""
        return self._group.metadata.zarr_format == 3

    def names(self, group: str) -> list[str]:
        node = self._node(group)
        try:
            return sorted(node.array_keys()) if hasattr(node, "array_keys") else []
        except Exception as error:
            raise ValueError(f"{self.path} {group} has an array that is not read here: {error}") from error

    def is_picture(self, name: str) -> bool:
        array = self._array(name)
        if array.ndim != 4:
            return False
        is_chw = array.shape[1] == 3 and min(array.shape[2:]) >= _MIN_SIDE
        return is_chw or array.shape[3] == 3

    def length(self, name: str) -> int:
        return int(self._array(name).shape[0])

    def absent(self, name: str, begin: int, end: int) -> list[str]:
        """Of frames [begin, end), those whose chunks are in no file, such as `3..5`: zarr makes them up."""
        array = self._array(name)
        shape = array.shards or array.chunks
        absent = []
        for row in range(begin // shape[0], -(-end // shape[0])):
            columns = (range(-(-size // part)) for size, part in zip(array.shape[1:], shape[1:], strict=True))
            keys = (array.metadata.encode_chunk_key((row, *rest)) for rest in itertools.product(*columns))
            if not all(self._is_stored(f"{name}/{key}") for key in keys):
                first, last = max(begin, row * shape[0]), min(end, (row + 1) * shape[0]) - 1
                absent.append(f"{first}..{last}")
        return absent

    def _is_stored(self, key: str) -> bool:
        return (self.path / key).is_file() if self._entries is None else key in self._entries

    @functools.cached_property
    def _entries(self) -> frozenset[str] | None:
        """The names in a zip; None of a folder."""
        if self.path.is_dir():
            return None
        with zipfile.ZipFile(self.path) as file:
            return frozenset(file.namelist())

    def rows(self, name: str, begin: int, end: int | None) -> np.ndarray:
        """Rows of an array of numbers."""
        array = self._array(name)
        end = int(array.shape[0]) if end is None else end
        if end > array.shape[0]:
            raise ValueError(f"{self.path} {name} has {array.shape[0]} frames, and an episode ends at {end}")
        row_bytes = int(np.prod(array.shape[1:], dtype=object)) * array.dtype.itemsize
        Budget(MAX_ARRAYS_BYTES).spend((end - begin) * row_bytes, f"{self.path} {name}, frames {begin} to {end}")
        try:
            return np.asarray(array[begin:end])
        except Exception as error:
            raise ValueError(f"{self.path} {name}, frames {begin} to {end}, cannot be read: {error}") from error

    def vectors(self, names: Sequence[str], begin: int, end: int, dimensions: Sequence[str] = ()) -> Numbers:
        parts = {name: self.rows(f"data/{name}", begin, end) for name in names}
        values = joined(parts, f"{self.path} data")
        told = tuple(dimensions) if len(dimensions) == values.shape[1] else ()
        return Numbers(values, f"data/{names[0]}" if len(names) == 1 else f"data/{{{', '.join(names)}}}", told)

    def camera(self, name: str, begin: int, end: int) -> Camera:
        shape = self._array(name).shape
        height, width = shape[1:3] if shape[3] == 3 else shape[2:4]
        Budget(MAX_IMAGE_PIXELS, "pixels").spend(height * width, f"a picture of {self.path} {name}")
        return Camera(end - begin, (height, width), _pictures(self.path, name, begin, end), name)

    def _node(self, name: str) -> Any:
        try:
            return self._group[name]
        except KeyError:
            raise missing_key(name, self._group.keys(), wanted_by=str(self.path)) from None
        except Exception as error:
            raise ValueError(f"{self.path} {name} cannot be read: {error}") from error

    def _array(self, name: str) -> Any:
        array = self._node(name)
        if not hasattr(array, "chunks"):
            raise ValueError(f"{self.path} {name} is a group; expected an array")
        if array.dtype.kind not in "biuf" or array.ndim == 0:
            raise ValueError(f"{self.path} {name} holds {array.dtype} {array.shape}; expected numbers, not objects")
        if refused := [codec for codec in _codecs(array) if not _CODECS.fullmatch(codec)]:
            raise ValueError(
                f"{self.path} {name} is stored by {refused}, which is not read here; rewrite it with blosc"
            )
        if len(packed := [codec for codec in _codecs(array) if not _SAME_SIZE.fullmatch(codec)]) > 1:
            raise ValueError(
                f"{self.path} {name} is compressed several times over, by {packed}; expected once, for a few bytes "
                "could unpack to any number. Rewrite it with blosc"
            )
        chunk_bytes = int(np.prod(array.chunks, dtype=object)) * array.dtype.itemsize
        Budget(MAX_ARRAYS_BYTES).spend(chunk_bytes, f"a chunk of {self.path} {name} {array.chunks}")
        return array


def _codecs(array: Any) -> list[str]:
    """The names of what is run over its bytes."""
    told: Mapping[str, Any] = array.metadata.to_dict()
    if told.get("zarr_format") == 2:
        return [str(codec.get("id")) for codec in (told.get("compressor"), *(told.get("filters") or ())) if codec]
    return [str(codec.get("name")) for codec in told.get("codecs", ())]


def _pictures(path: Path, name: str, begin: int, end: int) -> Iterator[np.ndarray]:
    with _Opened(path) as store:
        rows = max(1, min(store._array(name).chunks[0], 64))
        at = begin
        while at < end:
            stop = min(end, at - at % rows + rows)  # whole chunks, each read once
            yield from (_picture(frame) for frame in store.rows(name, at, stop))
            at = stop


def _picture(frame: np.ndarray) -> np.ndarray:
    frame = frame if frame.shape[2] == 3 else np.moveaxis(frame, 0, -1)
    if frame.dtype == np.uint8:
        return frame
    if not np.isfinite(frame).all() or frame.min() < 0 or frame.max() > 255 or np.any(frame != np.round(frame)):
        raise ValueError(f"its values are {frame.min():.4g} .. {frame.max():.4g}; expected whole numbers from 0 to 255")
    return frame.astype(np.uint8)


def _library() -> ModuleType:
    try:
        import zarr
        import zarr.storage
        from imagecodecs.numcodecs import register_codecs
    except ImportError as error:
        raise ImportError(f"zarr recordings need another package ({error}); {install_hint('convert')}") from error
    register_codecs(verbose=False)  # UMI's pictures are JPEG XL
    return zarr
