"""Whether a value that was read from a file is of the type that its field declares."""

from __future__ import annotations

import collections.abc
import enum
import functools
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

import numpy as np


def fitted_fields(cls: type, values: Mapping[str, object], where: str) -> dict[str, Any]:
    """Values for fields of a dataclass, each as `fitted` takes it.

    Args:
        where: the dataclass's own name, for messages.
    Raises:
        ValueError: one is of another type, or there is no such field; it is named.
    """
    declared = _declared_types(cls)
    unknown = sorted(values.keys() - declared.keys())
    if unknown:
        raise ValueError(f"{where} has the fields {unknown}; expected some of {sorted(declared)}")
    return {name: fitted(value, declared[name], f"{where}.{name}") for name, value in values.items()}


@functools.cache
def _declared_types(cls: type) -> Mapping[str, object]:
    return typing.get_type_hints(cls)


def fitted(value: object, declared: object, where: str) -> Any:
    """The value as its declaration means it: a list for a tuple, 3.0 for a whole number, a path for text are taken.

    Args:
        declared: a resolved annotation (`typing.get_type_hints`).
        where: the field's name, for messages.
    Raises:
        ValueError: another type; field, value and expectation are named.
    """
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if declared is Any:
        return value
    if origin in (Union, types.UnionType):
        return _fit_union(value, arguments, declared, where)
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
    elif origin is tuple or declared is tuple:
        if isinstance(value, (list, tuple)):
            return _fit_tuple(tuple(value), arguments, declared, where)
    elif origin in (collections.abc.Sequence, list):
        if isinstance(value, (list, tuple)):
            items = [fitted(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
    elif origin in (collections.abc.Mapping, dict):
        if isinstance(value, Mapping):
            key, item = arguments
            return {fitted(k, key, f"a key of {where}"): fitted(v, item, f"{where}.{k}") for k, v in value.items()}
    elif origin is collections.abc.Callable:
        if callable(value) and not isinstance(value, type):
            return value
    elif origin is None and (fit := _fit_class(value, declared)) is not _MISFIT:
        return fit
    raise _misfit(value, declared, where)


_MISFIT = object()


def _fit_class(value: object, declared: Any) -> object:
    """A value of a class that is not a container; numbers are not truth values."""
    if declared is None or declared is type(None):
        return value if value is None else _MISFIT
    if declared is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if declared is str and isinstance(value, Path):
        return str(value)
    wider: dict[Any, tuple[type, ...]] = {
        bool: (bool, np.bool_),
        int: (int, np.integer),
        float: (float, int, np.floating, np.integer),
    }
    if isinstance(value, (float, np.floating)) and math.isnan(value):
        return _MISFIT
    if declared in (int, float) and isinstance(value, (bool, np.bool_)):
        return _MISFIT
    if declared is str and isinstance(value, enum.Enum):
        return _MISFIT
    return value if isinstance(value, wider.get(declared, declared)) else _MISFIT


def _fit_union(value: object, choices: tuple[object, ...], declared: object, where: str) -> object:
    """As the choice that it fits without a change, else as the first that it fits."""
    fits = []
    for choice in choices:
        try:
            fits.append(fitted(value, choice, where))
        except ValueError:
            continue
    if not fits:
        raise _misfit(value, declared, where)
    return next((fit for fit in fits if fit is value), fits[0])


def _fit_tuple(
    value: tuple[object, ...], items: tuple[object, ...], declared: object, where: str
) -> tuple[object, ...]:
    if not items:
        return value
    declarations = [items[0]] * len(value) if items[-1] is Ellipsis else list(items)
    if len(declarations) != len(value):
        raise _misfit(value, declared, where)
    pairs = zip(value, declarations, strict=True)
    return tuple(fitted(item, declaration, f"{where}[{i}]") for i, (item, declaration) in enumerate(pairs))


def _misfit(value: object, declared: object, where: str) -> ValueError:
    shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:77]}..."
    return ValueError(f"{where} is {shown} ({type(value).__name__}); expected {_name_of(declared)}")


def _name_of(declared: object) -> str:
    if isinstance(declared, type) and typing.get_origin(declared) is None:
        return "nothing (null)" if declared is type(None) else declared.__name__
    text = str(declared)
    return "a function" if "Callable" in text else text.replace("typing.", "").replace("collections.abc.", "")
