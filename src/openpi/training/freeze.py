"""Predicates on '/'-joined parameter paths, for freezing: plain data, so that a recipe can be written to a file.

Patterns match the whole path. All of them take a path as a tuple, too, and a second argument, so that they work as
filters of `flax.nnx`. Source: the model specification, section 9.2.
"""

import dataclasses
from collections.abc import Callable

from openpi.models.model_config import freeze_nothing
from openpi.shared.param_paths import ParamPath, PathRegex, joined

__all__ = ["All", "Any", "Filter", "Not", "OfPathAndValue", "PathRegex", "freeze_nothing"]

Filter = Callable[[str], bool]


@dataclasses.dataclass(frozen=True, init=False)
class All:
    """True where every filter is; with no filters, everywhere."""

    filters: tuple[Filter, ...]

    def __init__(self, *filters: Filter) -> None:
        object.__setattr__(self, "filters", filters)

    def __call__(self, path: ParamPath, value: object = None) -> bool:
        return all(accepts(joined(path)) for accepts in self.filters)


@dataclasses.dataclass(frozen=True, init=False)
class Any:
    """True where at least one filter is; with no filters, nowhere."""

    filters: tuple[Filter, ...]

    def __init__(self, *filters: Filter) -> None:
        object.__setattr__(self, "filters", filters)

    def __call__(self, path: ParamPath, value: object = None) -> bool:
        return any(accepts(joined(path)) for accepts in self.filters)


@dataclasses.dataclass(frozen=True)
class Not:
    """True where `filter` is not."""

    filter: Filter

    def __call__(self, path: ParamPath, value: object = None) -> bool:
        return not self.filter(joined(path))


@dataclasses.dataclass(frozen=True)
class OfPathAndValue:
    """A function written for `flax.nnx`, which takes the path as a tuple, and the value: here None, as only paths
    decide what is frozen.
    """

    function: Callable[[tuple[str, ...], object], bool]

    def __call__(self, path: ParamPath, value: object = None) -> bool:
        return bool(self.function(tuple(joined(path).split("/")), None))
