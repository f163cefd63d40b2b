"""One sample, step by step: what it looks like after every transform of a chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from openpi.data.dataset import Sample
from openpi.shared.tree import flatten
from openpi.transforms import DataTransformFn

_MAX_TEXT = 300


@dataclasses.dataclass(frozen=True)
class Step:
    """One transform of a chain, and which part of the recipe it comes from (`repack`, `robot in`, ...)."""

    part: str
    transform: DataTransformFn

    @property
    def name(self) -> str:
        kind = self.transform if hasattr(self.transform, "__name__") else type(self.transform)
        return kind.__name__  # type: ignore[union-attr]  # functions and classes have one


@dataclasses.dataclass(frozen=True)
class Stage:
    """The sample before the first step (`step` is None) or after one."""

    title: str
    sample: Sample
    step: Step | None = None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What there is to know about one value without printing it.

    Attributes:
        range: (min, mean, max) of numbers; None for text and for empty arrays. NaN entries are left out.
        text: of strings and single values.
        is_new: the step made this value, or changed it.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    range: tuple[float, float, float] | None
    text: str | None
    is_new: bool


def run(first: Stage, steps: Iterable[Step]) -> Iterator[Stage]:
    """`first`, then one stage for each step. What a step raises is raised after the stages before it."""
    yield first
    sample = first.sample
    for step in steps:
        sample = step.transform(sample)
        yield Stage(f"{step.part}: {step.name}", sample, step)


def leaves(sample: Sample, before: Sample | None = None) -> list[Leaf]:
    """The values of a sample by flattened key; `before` is the sample that the step was given."""
    old = {} if before is None else flatten(before)
    return [_leaf(key, value, is_new=not _is_same(value, old.get(key))) for key, value in flatten(sample).items()]


def removed(sample: Sample, before: Sample | None) -> list[str]:
    """Keys that the step took away."""
    return [] if before is None else [key for key in flatten(before) if key not in flatten(sample)]


def _leaf(key: str, value: object, *, is_new: bool) -> Leaf:
    array = np.asarray(value)
    if array.dtype.kind in "USO":
        return Leaf(key, "str", array.shape, None, _short(str(value)), is_new)
    text = str(array.item()) if array.size == 1 else None
    return Leaf(key, str(array.dtype), array.shape, _range(array), text, is_new)


def _range(array: np.ndarray) -> tuple[float, float, float] | None:
    if array.size == 0 or array.dtype.kind not in "biuf":
        return None
    finite = array[~np.isnan(array)] if array.dtype.kind == "f" else array
    if finite.size == 0:
        return None
    return float(finite.min()), float(finite.mean(dtype=np.float64)), float(finite.max())


def _is_same(value: object, old: object) -> bool:
    if value is old:
        return True
    if old is None or isinstance(value, Mapping) or isinstance(old, Mapping):
        return False
    a, b = np.asarray(value), np.asarray(old)
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(a, b))


def _short(text: str) -> str:
    return repr(text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}...")
