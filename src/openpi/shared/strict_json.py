"""JSON that others wrote: refused where readers would understand different things, or nobody could go on with it.

What is written for others goes through `with_nulls` where it may hold NaN.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]
"""An object of a document. Who reads it checks what it takes out."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_SHOWN = 80


def read(file: Path, parse_constant: Callable[[str], object] | None = None) -> Any:
    """As `parse`, of a file.

    Raises:
        OSError: it cannot be read.
    """
    return parse(file.read_bytes(), parse_constant)


def parse(text: str | bytes, parse_constant: Callable[[str], object] | None = None) -> Any:
    """The value of a document; a byte order mark before it is skipped. NaN and infinities are read as Python does.

    Args:
        parse_constant: what makes a value of `NaN`, `Infinity` and `-Infinity`.
    Raises:
        ValueError: no JSON; an object has a key twice, of which Python would take the last and others the first; halves
            of characters, which no file or message can hold; nested too deeply; or a number of thousands of digits.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=parse_constant)
        if _SURROGATE.search(text):
            _check_texts(value)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def with_nulls(value: object) -> object:
    """NaN and infinity, which JSON does not have, as null."""
    if isinstance(value, Mapping):
        return {key: with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_nulls(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has the key {twice[:_MAX_SHOWN]!r} twice in one object; keep the one that is right")
    return content


def _check_texts(value: object) -> None:
    """Half of a pair of surrogates passes `json.loads` and fails wherever the text is written."""
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"its text {value[:_MAX_SHOWN]!r} has half of a character, a lone surrogate")
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    for part in parts:
        _check_texts(part)
