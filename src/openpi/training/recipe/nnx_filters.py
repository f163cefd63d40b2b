"""Filters of `flax.nnx`, in a recipe of one's own, as those of `openpi.training.freeze`, which files can hold.

flax is not imported: its filters are known by their names. A recipe that holds one has imported it.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from openpi.training import freeze

_HOME = "flax.nnx"


def as_filter(value: object) -> freeze.Filter:
    """A filter of our own from what `flax.nnx` takes as one: its filters, types of variables, `...`, booleans, None, a
    list of such (any of them), or a function of (path, value). Our own are returned as they are.

    Raises:
        ValueError: it decides by something that parameters of these models do not have, such as a tag.
    """
    match value:
        case bool():
            return freeze.All() if value else freeze.freeze_nothing
        case None:
            return freeze.freeze_nothing
        case list() | tuple():
            return freeze.Any(*map(as_filter, value))
        case type():
            return _of_type(value)
    if value is Ellipsis:
        return freeze.All()
    if type(value).__module__.startswith(_HOME):
        return _translated(value)
    if callable(value):
        return _of_function(value)
    raise ValueError(
        f"freeze_filter is {value!r}, which is no filter; expected a predicate on parameter paths, such as "
        "openpi.training.freeze.PathRegex('.*llm.*')"
    )


def _translated(value: Any) -> freeze.Filter:
    match type(value).__name__:
        case "All":
            return freeze.All(*map(as_filter, value.predicates))
        case "Any":
            return freeze.Any(*map(as_filter, value.predicates))
        case "Not":
            return freeze.Not(as_filter(value.predicate))
        case "Everything":
            return freeze.All()
        case "Nothing":
            return freeze.freeze_nothing
        case "OfType":
            return _of_type(value.type)
        case "PathContains":
            return _containing(str(value.key), is_whole_part=getattr(value, "exact", True))
        case "PathIn":
            paths = ("/".join(map(str, path)) for path in value.paths)
            return freeze.Any(*(freeze.PathRegex(re.escape(path)) for path in sorted(paths)))
    raise ValueError(
        f"freeze_filter holds {value!r} of flax.nnx, which does not decide by the path of a parameter; use "
        "PathRegex, All, Any and Not of openpi.training.freeze"
    )


def _of_type(kind: type) -> freeze.Filter:
    """Every weight of these models is an `nnx.Param`, in the published system as well."""
    is_of_flax = any(base.__module__.startswith(_HOME) for base in kind.__mro__)
    if not is_of_flax:
        raise ValueError(f"freeze_filter holds the type {kind.__name__}; expected a filter on parameter paths")
    return freeze.All() if kind.__name__ in ("Param", "Variable") else freeze.freeze_nothing


def _containing(key: str, *, is_whole_part: bool) -> freeze.Filter:
    text = re.escape(key)
    return freeze.PathRegex(f"(?:.*/)?{text}(?:/.*)?" if is_whole_part else f".*{text}.*")


def _of_function(function: Any) -> freeze.Filter:
    """Ours take a path; those written for flax need two arguments."""
    parameters = inspect.signature(function).parameters.values()
    needed = [
        each
        for each in parameters
        if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    return freeze.OfPathAndValue(function) if len(needed) == 2 else function
