"""Command-line flags for one recipe: every plain field, nested with dots, with the recipe's values as defaults."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from openpi_client import docstrings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from tyro.constructors import StructConstructorSpec, StructTypeInfo

T = TypeVar("T")

_PLAIN = (bool, int, float, str, Path, enum.Enum, type(None))


class _RefusedError(Exception):
    """A `ValueError`, which `tyro` would wrap to the width of a terminal and put in a box."""


def parse(default: T, argv: Sequence[str], *, prog: str) -> T:
    """`default` with the given flags applied: `-` and `_` are equal, booleans are `--flag` and `--no-flag`.

    Exits with code 2 on unknown flags and values of another type, and with the list of flags on `--help`.

    Raises:
        ValueError: what the configuration itself refuses.
    """
    import tyro

    registry = tyro.constructors.ConstructorRegistry()
    registry.struct_rule(_dataclass_rule)
    try:
        return tyro.cli(
            type(default),
            default=default,
            args=list(argv),
            prog=prog,
            registry=registry,
        )
    except _RefusedError as refusal:
        raise ValueError(str(refusal)) from refusal.__cause__


def flag_names(instance: DataclassInstance) -> list[str]:
    """The fields of a dataclass that are flags, or hold some."""
    hints = _type_hints(instance)
    fields = [field for field in dataclasses.fields(instance) if field.init]
    return [f.name for f in fields if _is_visible(f, getattr(instance, f.name), hints[f.name])]


def _dataclass_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A dataclass instance offers its visible fields; what has no flag keeps its value."""
    from tyro.constructors import StructConstructorSpec, StructFieldSpec

    default = info.default
    if not _is_instance(default):
        return None
    hints = _type_hints(default)
    helps = _attribute_help(type(default))
    values = {name: getattr(default, name) for name in flag_names(default)}
    fields = tuple(
        StructFieldSpec(name, _flag_type(hints[name], value), value, helptext=helps.get(name))
        for name, value in values.items()
    )
    return StructConstructorSpec(_replacer(default), fields)


def _type_hints(instance: DataclassInstance) -> dict[str, object]:
    """The declared types, or those of the values where the declarations name things that are not imported."""
    try:
        return typing.get_type_hints(type(instance))
    except NameError:
        return {field.name: type(getattr(instance, field.name)) for field in dataclasses.fields(instance)}


def _replacer(default: DataclassInstance) -> Callable[..., object]:
    def replace(**changes: object) -> object:
        try:
            return dataclasses.replace(default, **changes)
        except ValueError as error:
            raise _RefusedError(str(error)) from error

    return replace


def _is_instance(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_visible(field: dataclasses.Field[object], value: object, hint: object) -> bool:
    if not field.metadata.get("cli", True):
        return False
    if _is_instance(value):
        return not callable(value)
    return is_plain(value) and (value is not None or _without_structs(hint) is not type(None))


def is_plain(value: object) -> bool:
    """Whether a value can be written as a flag."""
    if isinstance(value, (tuple, list)):
        return all(is_plain(item) and item is not None for item in value)
    return isinstance(value, _PLAIN)


def _flag_type(hint: object, value: object) -> Any:
    """The type that decides how a flag is read: a structure's own class, or the plain part of a union."""
    return type(value) if _is_instance(value) else _without_structs(hint)


def _without_structs(hint: object) -> object:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    plain = tuple(part for part in typing.get_args(hint) if not dataclasses.is_dataclass(part) and _is_flag(part))
    return typing.Union[plain]  # noqa: UP007  # built from a tuple


def _is_flag(part: object) -> bool:
    return typing.get_origin(part) not in (dict, Mapping, Callable)


def _attribute_help(cls: type) -> dict[str, str]:
    """Per field, its entry in the `Attributes:` section of the class or a base class."""
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        helps |= docstrings.attributes(base.__dict__.get("__doc__") or "")
    return helps
