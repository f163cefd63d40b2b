"""The mark that `openpi init` leaves in a recipe where the dataset does not say what is right."""

from __future__ import annotations

import re
import sys
from pathlib import Path

_MARKED_LINE = re.compile(r"^\s*(\w+)\s*=\s*FILL_IN\(")


def FILL_IN(question: str, *choices: object) -> object:
    """Stands for a value that is still to be decided; replace the whole call by it.

    Args:
        choices: what it may be; none = any text; one tuple = a tuple of some of its entries.
    Raises:
        ValueError: always, when the recipe is loaded, which adds file and line. Names the choices, and the other marked
            lines.
    """
    caller = sys._getframe(1)
    file, line = Path(caller.f_code.co_filename), caller.f_lineno
    marked = marked_lines(file.read_text(encoding="utf-8") if file.is_file() else "")
    others = ", ".join(f"{name} (line {number})" for number, name in marked.items() if number != line)
    raise ValueError(
        f"{marked.get(line, 'this value')} is to be filled in: {question} "
        f"Replace FILL_IN(...) by {_in_words(choices)}." + (f" Also to be filled in: {others}" if others else "")
    )


def _in_words(choices: tuple[object, ...]) -> str:
    if len(choices) == 1 and isinstance(choices[0], tuple):
        return f"a tuple of some of {', '.join(map(repr, choices[0]))}, or ()"
    return " or ".join(map(repr, choices)) or "the value"


def marked_lines(source: str) -> dict[int, str]:
    """Line number -> name of what is to be filled in there."""
    found = {number: _MARKED_LINE.match(line) for number, line in enumerate(source.splitlines(), start=1)}
    return {number: match[1] for number, match in found.items() if match}
