"""Paths of parameters: `PaliGemma/llm/layers/mlp/linear`, or the same as a tuple, as `flax.nnx` passes them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import TypeAlias

ParamPath: TypeAlias = "str | Iterable[object]"


def joined(path: ParamPath, sep: str = "/") -> str:
    """A path as text."""
    return path if isinstance(path, str) else sep.join(str(part) for part in path)


@dataclasses.dataclass(frozen=True)
class PathRegex:
    """True where `pattern` matches the whole path, such as `.*llm.*` on `PaliGemma/llm/layers/mlp/linear`.

    Attributes:
        pattern: a regular expression; one that is compiled is kept as its text.
        sep: between the parts of a path that is given as a tuple.
    Raises:
        ValueError: it is not a regular expression, or one with flags, which `(?i)` and the like would say as text.
    """

    pattern: str
    sep: str = "/"

    def __post_init__(self) -> None:
        if isinstance(self.pattern, re.Pattern):
            object.__setattr__(self, "pattern", _text_of(self.pattern))
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"PathRegex pattern {self.pattern!r} is not a regular expression: {error}") from error

    def __call__(self, path: ParamPath, value: object = None) -> bool:
        """
        Args:
            value: the parameter, as `flax.nnx` passes it to its filters; not looked at.
        """
        return re.fullmatch(self.pattern, joined(path, self.sep)) is not None


def _text_of(pattern: re.Pattern[str]) -> str:
    if pattern.flags & ~re.UNICODE:
        raise ValueError(
            f"PathRegex pattern {pattern.pattern!r} is compiled with flags, which a recipe cannot be saved with; write "
            "them into the pattern, such as '(?i)' for re.IGNORECASE"
        )
    return pattern.pattern
