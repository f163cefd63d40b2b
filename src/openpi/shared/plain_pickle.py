"""Pickles of plain values and NumPy arrays, read as data.

Published recordings are pickles, and a pickle is a program. So every instruction is looked at before one is carried
out; names stand for nothing but the few that NumPy writes for arrays; and arrays are made here, from a plain dtype, a
shape and as many bytes: NumPy's own reconstruction believes a dtype's state and follows it out of the file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from openpi.shared.budgets import Budget, BudgetError, plain_array, plain_dtype

# Instructions that build containers, text, bytes and numbers, remember values, and name and call something.
_INSTRUCTIONS = re.compile(
    "PROTO|FRAME|MARK|STOP|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1|BINFLOAT|(SHORT_)?BIN(UNICODE|BYTES)|"
    "BIN(UNICODE|BYTES)8|BYTEARRAY8|EMPTY_(DICT|LIST|TUPLE)|TUPLE[123]?|APPENDS?|SETITEMS?|MEMOIZE|(LONG_)?BIN(PUT|GET)|"
    "(STACK_)?GLOBAL|REDUCE|BUILD"
)
_MODULES = re.compile(r"numpy(\.(_?core)(\.(multiarray|numeric|_multiarray_umath))?)?")
_MAX_VALUES = 200_000
_MAX_INSTRUCTIONS = 8 * _MAX_VALUES


def loads(content: bytes, budget: Budget) -> object:
    """The value; arrays are new, of plain dtypes, and an array of objects without axes is what it holds.

    Args:
        budget: bytes that the arrays may have together; one that is named twice counts twice.
    Raises:
        BudgetError: larger arrays, or more values than a request has.
        ValueError: no pickle, damaged, or one that holds more than data.
    """
    try:
        _check_instructions(content)
        return _resolved(_Reader(io.BytesIO(content), budget).load(), Budget(_MAX_VALUES, "values"))
    except RecursionError:
        raise ValueError("it is nested too deeply, or holds itself") from None
    except (pickle.UnpicklingError, EOFError, TypeError, AttributeError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"it is damaged: {error}") from error


def _check_instructions(content: bytes) -> None:
    """Raises ValueError for one that is of no use to a recording, and BudgetError for too many."""
    for count, (instruction, argument, _) in enumerate(pickletools.genops(content)):
        if not _INSTRUCTIONS.fullmatch(instruction.name):
            raise ValueError(f"it has the instruction {instruction.name}, which no recording needs")
        if count > _MAX_INSTRUCTIONS:
            raise BudgetError(f"it has more than {_MAX_INSTRUCTIONS:,} instructions")
        if instruction.name.endswith("BINPUT") and int(argument or 0) > count:  # the reader makes room for so many
            raise ValueError(f"it remembers value {argument} of {count}")


class _Named:
    """What a pickle calls by one of NumPy's names."""

    __slots__ = ("_budget", "_name")

    def __init__(self, name: str, budget: Budget) -> None:
        self._name, self._budget = name, budget

    def __setstate__(self, state: object) -> None:
        raise ValueError("it changes a function")

    def __call__(self, *arguments: object) -> object:
        match self._name, arguments:
            case "dtype", (str() as code, *_):
                return _Dtype(code)
            case "_reconstruct", (_Named(), _, _):
                return _Array(self._budget)
            case "scalar", (_Dtype() as dtype, bytes() as content):
                self._budget.spend(len(content), "the numbers")
                return plain_array(dtype.plain(), (), content)[()]
            case "_frombuffer", (
                bytes() | bytearray() as content,
                _Dtype() as dtype,
                tuple() as shape,
                "C" | "F" as order,
            ):
                return _Array(self._budget, dtype, shape, order == "F", content)
        raise ValueError(f"it calls {self._name} with arguments that no array has")


class _Dtype:
    """A dtype, from its code and byte order."""

    __slots__ = ("_code", "_order", "_unit")

    def __init__(self, code: str) -> None:
        self._code, self._order, self._unit = code, "", ""  # the unit of times

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), "<" | ">" | "=" | "|" as order, None, None, None, *more):
                self._order = order
            case _:
                raise ValueError(f"it has a dtype '{self._code}' with parts")
        match more:
            case [_, _, _, (_, (bytes() as unit, int(count), *_))] if unit != b"generic":
                self._unit = f"[{count}{unit.decode('latin-1')}]"

    def is_object(self) -> bool:
        return self._code == "O8"

    def plain(self) -> np.dtype:
        return plain_dtype(self._order + self._code + self._unit)


class _Array:
    """An array while its pickle is read, and what it holds."""

    __slots__ = ("_budget", "_content", "_dtype", "_is_fortran", "_shape")

    def __init__(self, budget: Budget, *state: Any) -> None:
        self._budget = budget
        self._dtype, self._shape, self._is_fortran, self._content = state or (None, (), False, b"")

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple() as shape, _Dtype() as dtype, bool() as is_fortran, bytes() | list() as content):
                self._dtype, self._shape, self._is_fortran, self._content = dtype, shape, is_fortran, content
            case _:
                raise ValueError("it has an array without dtype, shape and content")

    def value(self, num_values: Budget) -> object:
        match self._dtype, self._content:
            case _Dtype() as dtype, (bytes() | bytearray()) as content if not dtype.is_object():
                self._budget.spend(len(content), "the arrays")
                return plain_array(dtype.plain(), self._shape, content, is_fortran=self._is_fortran)
            case _Dtype() as dtype, [content] if dtype.is_object() and self._shape == ():
                return _resolved(content, num_values)
        raise ValueError(f"it has an array of objects of shape {self._shape}, or one without content")


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, budget: Budget) -> None:
        super().__init__(file)
        self._budget = budget

    def find_class(self, module: str, name: str) -> _Named:
        if _MODULES.fullmatch(module) and name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"):
            return _Named(name, self._budget)
        raise ValueError(f"it asks for {module}.{name}, which is no data")


def _resolved(value: object, num_values: Budget) -> object:
    """The value with its arrays made. Values that are referred to twice count twice: a few lists can hold millions."""
    num_values.spend(1, "it")
    if isinstance(value, _Array):
        return value.value(num_values)
    if isinstance(value, (list, tuple)):
        return type(value)(_resolved(item, num_values) for item in value)
    if isinstance(value, Mapping):
        return {_resolved(key, num_values): _resolved(item, num_values) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str, bytes, np.generic)):
        return value
    raise ValueError(f"it holds a {type(value).__name__.strip('_').lower()}, which is no value of a recording")
