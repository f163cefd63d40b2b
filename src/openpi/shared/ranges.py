"""Which numbers a field of a configuration takes, written where the field is: `batch_size: Count = 32`.

    batch_size: Count = 32
    ema_decay: Annotated[float, Range(0, below=1)] | None = 0.99

A field without a range takes any value; a test walks all configurations of the package and names the numbers that have
none. Fields of a `Literal` type take its values. No framework here, and no knowledge of what is configured.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import numbers
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`; NaN is in none.

    Attributes:
        above, below: as `least` and `most`, themselves excluded.
        is_whole_from: numbers from here on have no fraction.
        note: what a special value means, for messages.
    """

    least: float = -math.inf
    most: float = math.inf
    above: float | None = None
    below: float | None = None
    is_whole_from: float = math.inf
    note: str = ""

    def __contains__(self, value: float) -> bool:
        is_above = self.least <= value and (self.above is None or self.above < value)
        is_below = value <= self.most and (self.below is None or value < self.below)
        return is_above and is_below and not (self.is_whole_from <= value < math.inf and value % 1)

    def __str__(self) -> str:
        bounds = [
            f"of at least {self.least:g}" if math.isfinite(self.least) else "",
            "" if self.above is None else f"above {self.above:g}",
            f"at most {self.most}" if math.isfinite(self.most) else "",
            "" if self.below is None or math.isinf(self.below) else f"below {self.below:g}",
        ]
        return " and ".join(filter(None, bounds)) + (f" ({self.note})" if self.note else "")


Count = Annotated[int, Range(1)]
"""A whole number of at least 1."""
WholeNumber = Annotated[int, Range(0)]
"""A whole number of at least 0."""
NonNegative = Annotated[float, Range(0, below=math.inf)]
Positive = Annotated[float, Range(above=0, below=math.inf)]
Decay = Annotated[float, Range(0, below=1)]
"""The share of a running average that is kept at each step."""


def check(config: object, *, has_flags: bool = False) -> None:
    """Raises ValueError, with one line for each value of a dataclass, nested ones included, that is out of range.

    Args:
        has_flags: fields can be set on the command line, nested ones with dots.
    """
    problems = list(_problems(config, "", has_flags))
    if problems:
        raise ValueError("\n".join(problems))


@functools.cache
def ranges_of(kind: type) -> Mapping[str, object]:
    """By field, the declared type of a dataclass with its ranges: the nearest in the order of its bases that has one.

    A subclass that declares another default without a range keeps the range. Types that cannot be resolved, as those
    imported for type checkers only, are left out.
    """
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        for name, hint in inspect.get_annotations(base).items():
            resolved = _resolved(hint, base)
            if resolved is not None and (name not in found or is_bounded(resolved)):
                found[name] = resolved
    return found


def is_bounded(hint: object) -> bool:
    """Whether a declared type says everywhere which of its numbers, if it has any, are taken."""
    if typing.get_origin(hint) is Annotated:
        return any(isinstance(part, Range) for part in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return True
    parts = [part for part in typing.get_args(hint) if part not in (type(None), ...)]
    return hint not in (int, float) and all(is_bounded(part) for part in parts)


def _resolved(hint: object, owner: type) -> object:
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, vars(sys.modules[owner.__module__]), dict(vars(owner)))  # as `typing` does
    except (NameError, AttributeError, KeyError):
        return None


def _problems(config: Any, path: str, has_flags: bool) -> Iterator[str]:
    hints = ranges_of(type(config))
    for field in dataclasses.fields(config):
        value, where = getattr(config, field.name), f"{path}{field.name}"
        expected = _objection(value, hints[field.name]) if field.name in hints else None
        if expected is not None:
            fix = f"; set --{where.replace('_', '-')}" if has_flags and field.metadata.get("cli", True) else ""
            yield f"{where}={value!r}; expected {expected}{fix}"
        for key, item in enumerate(value) if isinstance(value, (tuple, list)) else [(None, value)]:
            if dataclasses.is_dataclass(item) and not isinstance(item, type):
                yield from _problems(
                    item, f"{where}." if key is None else f"{where}[{key}].", has_flags and key is None
                )


def _objection(value: object, hint: object) -> str | None:
    """What was expected instead of a value; None where it is right, or the type says nothing of numbers."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = [part for part in parts if isinstance(part, Range)]
        return _number_objection(value, parts[0], bounds[0]) if bounds else _objection(value, parts[0])
    if origin is Literal:
        return None if value in parts else f"one of {', '.join(map(repr, parts))}"
    if origin in (typing.Union, types.UnionType):
        return _union_objection(value, parts)
    if origin is tuple and parts and parts[-1] is not ... and isinstance(value, Sequence):
        if len(value) != len(parts):
            return f"{len(parts)} values"
        objections = (_objection(item, part) for item, part in zip(value, parts, strict=True))
        return next(filter(None, objections), None)
    return None


def _union_objection(value: object, parts: tuple[object, ...]) -> str | None:
    """A value that none of the bounded types takes, unless there is another type that may."""
    if value is None and type(None) in parts:
        return None
    bounded = [part for part in parts if typing.get_origin(part) in (Annotated, Literal)]
    others = [part for part in parts if part not in bounded and part is not type(None)]
    if not bounded or (others and not isinstance(value, numbers.Real)):
        return None
    objections = [_objection(value, part) for part in bounded]
    if None in objections:
        return None
    alternatives = [*filter(None, objections), *(["None"] if type(None) in parts else [])]
    return ", or ".join(alternatives)


def _number_objection(value: Any, kind: type, bounds: Range) -> str | None:
    is_number = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if is_number and float(value) in bounds:
        return None
    word = "whole " if kind is int else "finite " if bounds.below == math.inf else ""
    return f"a {word}number {bounds}"
