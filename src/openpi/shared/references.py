"""Objects of a user's own Python files: `path/to/file.py:attribute` and `package.module:attribute`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from openpi.shared.errors import first_line

_SHOWN = 100  # characters of a line of a file


def is_reference(text: str) -> bool:
    """Whether it is a reference, and no name of something registered."""
    return ":" in text or text.endswith(".py")


def resolve(reference: str, kind: str) -> tuple[str, ModuleType, str]:
    """Imports what a reference points into; says where that is, and which attribute is meant (empty if none is).

    Args:
        kind: of what is wanted, for messages.
    Raises:
        FileNotFoundError, ModuleNotFoundError: no such file or module.
        ValueError: another module of that name is in the way, or the file has an error; its line is named.
    """
    where, _, attribute = (reference if ":" in reference else f"{reference}:").rpartition(":")
    module = _module_of_file(Path(where), kind) if where.endswith(".py") else _imported(where, where)
    return where, module, attribute


def _module_of_file(path: Path, kind: str) -> ModuleType:
    """Imports a Python file under its stem, so that worker processes can import its classes too."""
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"{kind} file {path} does not exist")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.find_spec(path.stem)
    if spec is None or spec.origin is None or Path(spec.origin).resolve() != path:
        raise ValueError(
            f"{kind} file {path} cannot be imported as '{path.stem}': that name belongs to "
            f"{spec.origin if spec else 'nothing importable'}. Rename the file"
        )
    return _imported(path.stem, str(path))


def _imported(module: str, where: str) -> ModuleType:
    """A user's module; an error in it comes in one line."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise ModuleNotFoundError(
                f"{error}: it is neither installed nor in a folder of PYTHONPATH. A file is named path/to/file.py:NAME",
                name=error.name,
            ) from error
        raise ValueError(_failure(where, error)) from error
    except Exception as error:
        raise ValueError(_failure(where, error)) from error


def _failure(where: str, error: Exception) -> str:
    """What went wrong while a file was imported, and in which of its lines."""
    line, text = (error.lineno if isinstance(error, SyntaxError) else None), None
    for frame in traceback.extract_tb(error.__traceback__):
        if line is None and frame.filename == where:
            line, text = frame.lineno, frame.line
    at = "" if line is None else f", line {line}"
    # What these errors say is clear beside the line only.
    shown = (
        f" in `{text.strip()[:_SHOWN]}`" if text and isinstance(error, LookupError | TypeError | AttributeError) else ""
    )
    missing = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else None
    fix = f". Put '{missing}' beside the file, or install it (uv pip install ...)" if missing else ""
    return f"{where}{at}: {type(error).__name__}: {first_line(error)}{shown}{fix}"
