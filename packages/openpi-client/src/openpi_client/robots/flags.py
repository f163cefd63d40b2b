"""Flags of a robot's program, from a dataclass, without a library: programs run where only `openpi_client` is.

`--args.action-horizon 25`, `--args.action_horizon=25` and `--action-horizon 25` are the same flag.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Type, TypeVar, Union, get_type_hints

from typing_extensions import Literal, get_args, get_origin

from openpi_client import docstrings

T = TypeVar("T")


def parse(kind: Type[T], argv: Optional[Sequence[str]] = None, *, prefix: str = "", prog: Optional[str] = None) -> T:
    """Reads a command line into a dataclass; ends the program for `--help` and for what is wrong.

    Args:
        kind: every field has a default, and is described under `Attributes:` of its class's docstring. Types: text,
            numbers, paths, bool (`--flag`, `--no-flag`), `Literal`s, and `Optional`s, which take the word None.
        prefix: of the flags as they are published, such as "args."; they are taken without it, too.
    """
    told: Dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        told.update(docstrings.attributes(parent.__doc__ or ""))
    summary = (kind.__doc__ or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser(prog=prog, description=summary, allow_abbrev=False)
    hints = get_type_hints(kind)
    declared: Any = kind
    for field in dataclasses.fields(declared):
        _add(parser, prefix, field, hints[field.name], told.get(field.name, ""))
    words = sys.argv[1:] if argv is None else argv
    found = vars(parser.parse_args([_published(word, prefix) for word in words]))
    return kind(**found)


def _published(word: str, prefix: str) -> str:
    """A flag as it is declared; other words as they are."""
    if not word.startswith("--") or word in ("--", "--help"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("_", "-")
    is_negation = name.startswith("no-")
    if prefix and not name.startswith(prefix) and not is_negation:
        name = prefix + name
    elif prefix and is_negation:
        name = f"{prefix}{name}"
    return f"--{name}{equals}{value}"


def _add(
    parser: argparse.ArgumentParser, prefix: str, field: "dataclasses.Field[object]", kind: Any, told: str
) -> None:
    name = prefix + field.name.replace("_", "-")
    shown = "" if field.default in (None, "") else f" (default: {field.default})"
    options: Dict[str, Any] = {"dest": field.name, "default": field.default, "help": (told + shown).replace("%", "%%")}
    if kind is bool:
        parser.add_argument(f"--{name}", action="store_true", **options)
        off = f"--{prefix}no-{field.name.replace('_', '-')}"
        parser.add_argument(off, action="store_false", dest=field.name, help=argparse.SUPPRESS)
        return
    optional = _optional(kind)
    choices = _choices(optional or kind)
    if choices:
        parser.add_argument(f"--{name}", choices=choices, **options)
    else:
        parser.add_argument(f"--{name}", type=_reader(optional or kind, optional is not None), metavar="X", **options)


def _optional(kind: object) -> Optional[Callable[[str], object]]:
    """What an `Optional` is of; None if it is none."""
    parts = get_args(kind) if get_origin(kind) is Union else ()
    return next((part for part in parts if part is not type(None)), None)


def _choices(kind: object) -> List[object]:
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def _reader(kind: Callable[[str], object], is_optional: bool) -> Callable[[str], object]:
    def read(text: str) -> object:
        return None if is_optional and text == "None" else kind(text)

    names: Dict[Any, str] = {int: "whole number", float: "number", Path: "path"}
    read.__name__ = names.get(kind, "text")  # argparse says it of a bad value
    return read
