"""The values of a recipe -> JSON, in the form of `recipe_io`. Inverse: `recipe_decoding`."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpi.shared.strict_json import Json
from openpi.shared.typed_values import fitted_fields
from openpi.training.recipe import table as recipe_table
from openpi.training.recipe.sources import Collected

# dtypes of arrays in recipes, as NumPy prints them.
ARRAY_DTYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (bool, "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
}


class Encoder:
    """Values -> JSON, noting the files that values of a user's own come from.

    Raises:
        ValueError: a value is not data, or not of the type that its field declares; its field is named.
    """

    def __init__(self) -> None:
        self.sources = Collected()

    def encode(self, value: object, field: str) -> Any:
        encode = self._encoder_of(value)
        if encode is None:
            raise ValueError(
                f"{field} holds {value!r} ({type(value).__name__}), which cannot be written to recipe.json; use a "
                "dataclass, a module-level function, or plain values"
            )
        return encode(value, field)

    def _encoder_of(self, value: object) -> Callable[[object, str], object] | None:
        if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
            return _scalar
        if isinstance(value, type) or inspect.isroutine(value):
            return lambda v, f: {"$ref": self._name(v, f)}
        if dataclasses.is_dataclass(value):
            return self._dataclass
        for kind, encode in self._kinds().items():
            if isinstance(value, kind):
                return encode
        return None

    def _kinds(self) -> dict[type, Callable[..., object]]:
        return {
            enum.Enum: lambda v, f: {"$enum": self._name(type(v), f), "name": v.name},
            tuple: lambda v, f: {"$tuple": self._items(v, f)},
            list: self._items,
            Mapping: self._mapping,
            Path: lambda v, _: {"$path": str(v)},
            np.ndarray: lambda v, f: {"$array": self.encode(v.tolist(), f), "dtype": _dtype(v.dtype, f)},
            np.generic: lambda v, f: {"$scalar": self.encode(v.item(), f), "dtype": _dtype(v.dtype, f)},
        }

    def _items(self, values: Iterable[object], field: str) -> list[object]:
        return [self.encode(item, f"{field}[{i}]") for i, item in enumerate(values)]

    def _dataclass(self, value: Any, field: str) -> Json:
        cls = type(value)
        values = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        if recipe_table.name_of(cls) is not None:
            values = fitted_fields(cls, values, field)
        return {"$type": self._name(cls, field)} | {
            key: self.encode(item, f"{field}.{key}") for key, item in values.items()
        }

    def _mapping(self, value: Mapping[Any, object], field: str) -> Json:
        """Pairs where keys are not plain strings, so that any dict survives."""
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: self.encode(item, f"{field}.{key}") for key, item in value.items()}
        return {
            "$dict": [[self.encode(k, f"{field} key"), self.encode(v, f"{field}[{k!r}]")] for k, v in value.items()]
        }

    def _name(self, value: object, field: str) -> str:
        return recipe_table.name_of(value) or self.sources.name(value, field)


def _scalar(value: object, field: str) -> object:
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{field} is not a number (nan), which says nothing in a recipe; use None")
    return value


def _dtype(dtype: np.dtype, field: str) -> str:
    if dtype.name not in ARRAY_DTYPES:
        raise ValueError(f"{field} is an array of {dtype}; expected one of {', '.join(ARRAY_DTYPES)}")
    return dtype.name


def tag_of(value: Mapping[str, object]) -> str | None:
    """What kind of value a dict encodes; None = a dict."""
    return next((key for key in value if key.startswith("$")), None)


def shown(value: object) -> object:
    """An encoded value as a message shows it: the value, or the name of a function, a class, or what is made of one."""
    if isinstance(value, list):
        return [shown(item) for item in value]
    if not isinstance(value, dict):
        return value
    match tag_of(value):
        case "$tuple":
            return tuple(shown(item) for item in value["$tuple"])
        case "$path" | "$ref" | "$type" as tag:
            return value[tag]
        case _:
            return {key: shown(item) for key, item in value.items()}


def differences(before: object, now: object, field: str) -> Iterator[tuple[str, object, object]]:
    """Of two encoded values, the leaves that differ."""
    if isinstance(before, dict) and isinstance(now, dict) and tag_of(before) == tag_of(now):
        is_same_class = "$type" in now and before["$type"] == now["$type"]
        for key in {**now, **before}:
            where = field if key.startswith("$") else f"{field}.{key}".removeprefix(".")
            if key in before and key in now:
                yield from differences(before[key], now[key], where)
            elif not is_same_class:
                yield where, before.get(key), now.get(key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from differences(old, new, f"{field}[{i}]")
    elif before != now:
        yield field, before, now
