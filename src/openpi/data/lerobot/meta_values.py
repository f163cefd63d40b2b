"""Entries of a dataset's metadata, checked when read: type, range, and a message with file, entry, found, expected."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa

from openpi.shared.errors import listed

T = TypeVar("T")

MAX_INDEX = 10**9
"""Of episodes, frames, files: beyond it a number is a mistake, and would be a path of any length."""

_MAX_SHOWN = 100
_MISSING = object()
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_FIX = "Correct it, or write the dataset's metadata again with the tool that made them"


def integer(value: object, where: str, low: int = 0, high: int = MAX_INDEX) -> int:
    """A whole number; as text or as a float it is one as well.

    Raises:
        ValueError: another type, or out of range.
    """
    found = number_of(value)
    if found is None or not math.isfinite(found) or found != int(found) or not low <= found <= high:
        raise wrong(where, value, f"a whole number from {low} to {high}")
    return int(found)


def number(value: object, where: str, low: float = -math.inf, high: float = math.inf, expected: str = "") -> float:
    """A finite number, whole numbers as `int`.

    Raises:
        ValueError: another type, or out of range.
    """
    found = number_of(value)
    if found is None or not math.isfinite(found) or not low <= found <= high:
        raise wrong(where, value, expected or f"a number from {low:g} to {high:g}")
    return int(found) if found == int(found) else found


def text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise wrong(where, value, "a text")
    return value


def one_line(value: object, where: str) -> str:
    """A text of one line, which may stand in tables, logs and files of others.

    Raises:
        ValueError: no text, or one with characters that end lines or move cursors.
    """
    if not isinstance(value, str) or _CONTROL.search(value):
        raise wrong(where, value, "a text of one line, without control characters")
    return value


def number_of(value: object) -> float | None:
    """The number that a value is or spells; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def is_null(value: object) -> bool:
    """True for null, and for NaN, which is how pandas writes it into a column of numbers."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def wrong(where: str, found: object, expected: str, fix: str = _FIX) -> ValueError:
    return ValueError(f"{where} is {shortened(found)}; expected {expected}. {fix}")


def shortened(value: object) -> str:
    """As a literal of one line that a message can hold."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]} ..."


@dataclass(frozen=True)
class Rows:
    """Rows of one metadata file, column by column.

    Attributes:
        unit: what a row is called there.
        numbers: of the rows.
    """

    file: Path
    unit: str
    numbers: Sequence[int]
    columns: Mapping[str, Sequence[Any]]

    @classmethod
    def of_objects(cls, file: Path, objects: Sequence[tuple[int, Mapping[str, object]]]) -> "Rows":
        names = {name for _, row in objects for name in row}
        columns = {name: [row.get(name, _MISSING) for _, row in objects] for name in names}
        return cls(file, "line", [number for number, _ in objects], columns)

    @classmethod
    def of_table(cls, file: Path, table: pa.Table) -> "Rows":
        return cls(file, "row", range(len(table)), {name: table[name].to_pylist() for name in table.column_names})

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, row: int, name: str) -> str:
        return f"{self.file}, {self.unit} {self.numbers[row]}, '{name}'"

    def column(self, name: str) -> Sequence[object]:
        """Raises ValueError if there is none, or a row lacks it."""
        if len(self) == 0:
            return ()
        if name not in self.columns:
            raise ValueError(f"{self.file} has no '{name}'; found: {listed(sorted(self.columns)[:20])}. {_FIX}")
        values = self.columns[name]
        if self.unit == "line":
            for row, value in enumerate(values):
                if value is _MISSING:
                    raise ValueError(f"{self.file}, line {self.numbers[row]} has no '{name}'. {_FIX}")
        return values

    def integers(self, name: str, low: int = 0) -> list[int]:
        values = self.column(name)
        if all(type(value) is int and low <= value <= MAX_INDEX for value in values):
            return cast("list[int]", list(values))
        return self.each(name, lambda value, where: integer(value, where, low))

    def each(self, name: str, read: Callable[[object, str], T]) -> list[T]:
        """The values of a column, read by a function of the value and of where it stands."""
        return [read(value, self.where(row, name)) for row, value in enumerate(self.column(name))]

    def optional(self, name: str) -> Sequence[object] | None:
        """The values as they are; None without the column."""
        values = self.columns.get(name)
        return None if values is None else [None if value is _MISSING else value for value in values]


def check_unique(values: Sequence[int], rows: Rows, name: str) -> None:
    """Raises ValueError at the second of two rows with one index."""
    if len(set(values)) == len(values):
        return
    first: dict[int, int] = {}
    for row, value in enumerate(values):
        if value in first:
            earlier = f"{rows.unit} {rows.numbers[first[value]]}"
            raise wrong(rows.where(row, name), value, f"a number that {earlier} does not have already")
        first[value] = row
