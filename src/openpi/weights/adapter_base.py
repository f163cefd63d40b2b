"""Checkpoints without their frozen weights: `<checkpoint>/adapters.json` says where those are.

The checkpoint's own weights are what was trained (adapters, and whatever else the recipe does not freeze); the rest is
read from the base, which may be a URL and of any layout. A digest of each array tells another base, or one that has
changed, from the right one.

    {"version": 2, "base": place, "frozen": {path in the published tree: {"shape": [...], "digest": text}, ...}}
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from openpi.shared import download, strict_json, whole_file
from openpi.weights import layout

ADAPTERS_FILE = "adapters.json"
KEEP_FILE = "KEEP"
"""In a step of a run: other checkpoints read it, so the run does not delete it."""
_VERSION = 2
_NUM_POINTS = 4096


@dataclasses.dataclass(frozen=True)
class Frozen:
    """An array of the published tree that is in the base.

    Attributes:
        digest: as of `Digests`.
    """

    shape: tuple[int, ...]
    digest: str


@dataclasses.dataclass(frozen=True)
class AdapterBase:
    """Where the frozen weights of a checkpoint are.

    Attributes:
        place: `params/` folder, or a folder with `model.safetensors`; or its URL.
        frozen: by '/'-joined path in the published tree, the arrays to take from there.
    """

    place: str
    frozen: Mapping[str, Frozen]

    @classmethod
    def of(cls, place: str, frozen: Mapping[str, Frozen]) -> AdapterBase:
        """Of weights that were read from `place`, which may be relative."""
        return cls(
            place if download.is_address(place) else str(Path(place).expanduser().absolute()),
            dict(sorted(frozen.items())),
        )

    @classmethod
    def load(cls, checkpoint: Path) -> AdapterBase | None:
        """Of a checkpoint's folder; None when it holds all its weights itself.

        Raises:
            ValueError: the file is damaged or of another version.
        """
        file = checkpoint / ADAPTERS_FILE
        if not file.is_file():
            return None
        try:
            document = strict_json.read(file)
            if document["version"] != _VERSION:
                raise ValueError(f"version {document['version']}, expected {_VERSION}")
            frozen = {
                path: Frozen(tuple(entry["shape"]), entry["digest"]) for path, entry in document["frozen"].items()
            }
            sizes = [size for entry in frozen.values() for size in entry.shape]
            if not isinstance(document["base"], str) or not all(type(size) is int and size >= 0 for size in sizes):
                raise ValueError("expected a place as 'base', and shapes of whole numbers from 0 on")
            return cls(document["base"], frozen)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged or of another version: {error}") from error

    def save(self, checkpoint: Path) -> None:
        """Writes the file; a base that is a step of a run is kept from now on."""
        frozen = {path: dataclasses.asdict(entry) for path, entry in self.frozen.items()}
        text = json.dumps({"version": _VERSION, "base": self.place, "frozen": frozen}, indent=2) + "\n"
        whole_file.write_text(checkpoint / ADAPTERS_FILE, text)
        step = layout.step_of(Path(self.place))
        if step.name.isdecimal() and (step.parent / ".lock").exists():  # of a run
            with contextlib.suppress(OSError):  # somebody else's run
                (step / KEEP_FILE).touch()

    def folder(self) -> Path:
        """The base on this machine, downloaded if need be.

        Raises:
            FileNotFoundError, ConnectionError: it is not there; what to do is said.
        """
        try:
            return download.maybe_download(self.place)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"this checkpoint holds adapters only, and its base is not there: {error}. Put the base back, or "
                f"correct 'base' in {ADAPTERS_FILE} (then `openpi verify CHECKPOINT --accept`); "
                "`openpi export --full`, run where the base is, makes a checkpoint "
                "that needs none"
            ) from error

    def check(self, path: str, digest: str) -> None:
        """Raises ValueError unless this is the digest of the array that was trained on."""
        if digest != self.frozen[path].digest:
            raise ValueError(
                f"the weights in {self.place} are others than before: {path} differs; {self.expected}. They are "
                "compared in bfloat16, as training holds them: a base in float32 and the same in bfloat16 are alike in "
                "every layout, one that was rounded to less, such as float16 or 8 bits, is another"
            )

    @property
    def expected(self) -> str:
        """For errors."""
        return (
            f"expected the base that the adapters were trained on. Correct 'base' in {ADAPTERS_FILE} (then "
            "`openpi verify CHECKPOINT --accept`, as a file is changed)"
        )


class Digests:
    """A digest of each array, of some thousand values all over it in bfloat16, from its parts in any order.

    Args:
        shapes: of the whole arrays, by path.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._points: dict[str, _Points] = {}

    def add(self, path: str, part: object, index: tuple[int, ...] = (), start: int = 0) -> str | None:
        """Returns the digest when the last part of the array that counts is added, else None.

        Args:
            part: the array at `index`, or its rows from `start` on; only a few of its values are looked at.
        """
        points = self._points.setdefault(path, _Points(self._shapes[path]))
        num_before = points.num_missing
        points.take(part, index, start)
        return hashlib.sha256(points.values.tobytes()).hexdigest() if num_before and not points.num_missing else None

    def counts(self, path: str, index: tuple[int, ...]) -> bool:
        """Whether any value at this index is looked at; other parts need not be added."""
        return _Points(self._shapes[path]).are_at(index)


class _Points:
    """A grid of points in an array.

    Attributes:
        values: bfloat16, zero where they are not known yet.
        num_missing: how many that are.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        per_axis = round(_NUM_POINTS ** (1 / max(1, len(shape))))
        self._steps = tuple(max(1, -(-size // per_axis)) for size in shape)
        grid = tuple(-(-size // step) for size, step in zip(shape, self._steps, strict=True))
        self.values = np.zeros(grid, ml_dtypes.bfloat16)
        self.num_missing = self.values.size

    def are_at(self, index: tuple[int, ...]) -> bool:
        return not any(place % step for place, step in zip(index, self._steps, strict=False))

    def take(self, part: Any, index: tuple[int, ...], start: int) -> None:
        if not self.are_at(index):
            return
        steps = self._steps[len(index) :]
        where: list[Any] = [place // step for place, step in zip(index, self._steps, strict=False)]
        if steps:
            first = -start % steps[0]
            # Slices, so that an array in parts is not put together for it.
            part = part[(slice(first, None, steps[0]), *(slice(None, None, step) for step in steps[1:]))]
            begin = (start + first) // steps[0]
            where.append(slice(begin, begin + len(part)))
        found = np.asarray(part).astype(ml_dtypes.bfloat16)
        self.values[tuple(where)] = found
        self.num_missing -= found.size
