"""Predicates on '/'-joined parameter paths, for freezing: plain data, so that a recipe can be written to a file.

Patterns match the whole path. Source: the model specification, section 9.2.
"""

import dataclasses
import re
from collections.abc import Callable

from openpi.models.model_config import freeze_nothing

__all__ = ["All", "Any", "Filter", "Not", "PathRegex", "freeze_nothing"]

Filter = Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class PathRegex:
    """True where `pattern` matches the whole path, such as `.*llm.*` on `PaliGemma/llm/layers/mlp/linear`."""

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"PathRegex pattern {self.pattern!r} is not a regular expression: {error}") from error

    def __call__(self, path: str) -> bool:
        return re.fullmatch(self.pattern, path) is not None


@dataclasses.dataclass(frozen=True, init=False)
class All:
    """True where every filter is; with no filters, everywhere."""

    filters: tuple[Filter, ...]

    def __init__(self, *filters: Filter) -> None:
        object.__setattr__(self, "filters", filters)

    def __call__(self, path: str) -> bool:
        return all(accepts(path) for accepts in self.filters)


@dataclasses.dataclass(frozen=True, init=False)
class Any:
    """True where at least one filter is; with no filters, nowhere."""

    filters: tuple[Filter, ...]

    def __init__(self, *filters: Filter) -> None:
        object.__setattr__(self, "filters", filters)

    def __call__(self, path: str) -> bool:
        return any(accepts(path) for accepts in self.filters)


@dataclasses.dataclass(frozen=True)
class Not:
    """True where `filter` is not."""

    filter: Filter

    def __call__(self, path: str) -> bool:
        return not self.filter(path)
