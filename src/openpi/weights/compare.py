"""What of a model's parameters is in a file, by name and shape, before any of it is read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping

_MAX_SHOWN = 10
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What becomes of each parameter, by name: '/'-joined path in the published tree, or that of a tensor.

    Attributes:
        source: the weights, as the recipe names them.
        loaded: of the model, from the source.
        kept: of the model, not in the source: they keep their initial values.
        unused: in the source, not in the model.
        num_values: how many numbers are loaded, and how many keep their initial value.
    """

    source: str
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]
    num_values: tuple[int, int]

    def __str__(self) -> str:
        loaded, kept = self.num_values
        parts = [f"{len(self.loaded)} arrays ({loaded:,} values) loaded"]
        if self.kept:
            parts.append(f"{len(self.kept)} ({kept:,} values) keep their initial values: {_some(self.kept)}")
        if self.unused:
            parts.append(f"{len(self.unused)} unused: {_some(self.unused)}")
        return f"weights from {self.source}: {'; '.join(parts)}"


def compare(model: Shapes, stored: Shapes, *, may_keep: str, source: str) -> LoadReport:
    """What loading `stored` into `model` does, both as shapes by path.

    Args:
        may_keep: pattern of whole paths that may be missing in `stored`.
        source: named in the report and in errors.
    Raises:
        ValueError: leaves are missing or have another shape; they are counted, and ten are shown.
    """
    kept = tuple(path for path in model if path not in stored)
    unused = tuple(path for path in stored if path not in model)
    problems = [f"{path}: missing, the model has {model[path]}" for path in kept if not re.fullmatch(may_keep, path)]
    problems += [
        f"{path}: shape {stored[path]}, the model has {model[path]}"
        for path in model
        if path in stored and stored[path] != model[path]
    ]
    if problems:
        raise ValueError(_mismatch(sorted(problems), unused, len(model), source))
    loaded = tuple(path for path in model if path in stored)
    num_values = (_num_values(model, loaded), _num_values(model, kept))
    return LoadReport(source, loaded, kept, unused, num_values)


def _num_values(shapes: Shapes, paths: Collection[str]) -> int:
    return sum(math.prod(shapes[path]) for path in paths)


def _mismatch(problems: list[str], unused: tuple[str, ...], num_model: int, source: str) -> str:
    lines = problems[:_MAX_SHOWN]
    if len(problems) > _MAX_SHOWN:
        lines.append(f"and {len(problems) - _MAX_SHOWN} more")
    if unused:
        lines.append(f"{len(unused)} of the weights are not in the model: {_some(unused)}")
    return (
        f"the weights in {source} do not fit the model, {len(problems)} of {num_model} arrays differ (is it the same "
        "model family and width?):\n  " + "\n  ".join(lines)
    )


def _some(paths: tuple[str, ...]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
