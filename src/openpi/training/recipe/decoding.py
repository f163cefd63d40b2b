"""JSON in the form of `recipe_io` -> the values of a recipe. Inverse: `recipe_encoding`.

What a file says is data: the names in it are those of `recipe_table`, and of the recipe's own code where that may run
(`recipe_sources`). Nothing is looked up in modules, and constructors get values of the declared types only.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.shared.errors import closest_name
from openpi.shared.typed_values import fitted_fields
from openpi.training.recipe import table as recipe_table
from openpi.training.recipe.encoding import ARRAY_DTYPES, tag_of
from openpi.training.recipe.sources import OwnCode

logger = logging.getLogger(__name__)

_NAMING_TAGS = ("$type", "$enum", "$ref")


def upgrade(value: object, own_modules: list[str], field: str) -> object:
    """Encoded values of version 1 with the names of today; those of the recipe's own modules stay.

    Raises:
        ValueError: a name that recipes may not hold, or hold no longer.
    """
    if isinstance(value, list):
        return [upgrade(item, own_modules, f"{field}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    upgraded = {key: upgrade(item, own_modules, f"{field}.{key}") for key, item in value.items()}
    for tag in _NAMING_TAGS:
        if tag in value:
            upgraded[tag] = _upgraded_name(value[tag], own_modules, field)
    return upgraded


def _upgraded_name(name: object, own_modules: list[str], field: str) -> str:
    new = recipe_table.new_name(name) if isinstance(name, str) else None
    if new is None and isinstance(name, str) and name.partition(":")[0] in own_modules:
        return name
    if new is None:
        raise _unknown(name, own_modules, field)
    return new


def _unknown(name: object, own_modules: list[str], field: str) -> ValueError:
    close = closest_name(str(name).rpartition(":")[2], [known.partition(".")[2] for known in recipe_table.names()])
    hint = f" (is '{close}' meant?)" if close else ""
    if where := recipe_table.hint(str(name)):
        return ValueError(f"{field} refers to {str(name)[:120]!r}, which is not installed{where}")
    own = f", and what its own files define ({', '.join(own_modules)})" if own_modules else ""
    return ValueError(
        f"{field} refers to {str(name)[:120]!r}{hint}; a recipe may only name what openpi lists for recipes{own}. If a "
        "newer openpi wrote it, upgrade; else name a recipe of your own with --config"
    )


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Encoded values -> values.

    Attributes:
        own: the recipe's own code.
    Raises:
        ValueError: a name, field or type that recipes do not have.
    """

    own: OwnCode

    def decode(self, value: object, field: str) -> Any:
        if isinstance(value, list):
            return [self.decode(item, f"{field}[{i}]") for i, item in enumerate(value)]
        return self._dict(value, field) if isinstance(value, dict) else value

    def _dict(self, value: Mapping[str, object], field: str) -> object:
        tag = tag_of(value)
        if tag is None:
            return {key: self.decode(item, f"{field}.{key}") for key, item in value.items()}
        content, further = value[tag], {key: item for key, item in value.items() if key != tag}
        if tag_of(further) is not None:
            raise ValueError(f"{field} is '{tag}' and '{tag_of(further)}' at once")
        match tag, content:
            case "$type", str():
                return self._dataclass(content, further, field)
            case "$enum", str():
                return self._member(content, further.get("name"), field)
            case "$ref", str():
                return self._reference(content, field)
            case "$tuple", list():
                return tuple(self.decode(content, field))
            case "$dict", list():
                return self._pairs(content, field)
            case "$path", str():
                return Path(content)
            case "$array", _:
                return _array(self.decode(content, field), further.get("dtype"), field)
            case "$scalar", bool() | int() | float():
                return _array(content, further.get("dtype"), field)[()]
        raise ValueError(f"{field} is {str(value)[:80]}, which is no value of a recipe")

    def _pairs(self, pairs: list[object], field: str) -> dict[object, object]:
        decoded = [self.decode(pair, field) for pair in pairs]
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in decoded):
            raise ValueError(f"{field} has entries that are no pairs of key and value")
        try:
            content = dict(decoded)
        except TypeError as error:
            raise ValueError(f"{field} has keys that cannot be ones ({error})") from error
        if len(content) < len(decoded):
            raise ValueError(f"{field} has a key twice among {str(list(content))[:80]}")
        return content

    def _dataclass(self, name: str, encoded: Mapping[str, object], field: str) -> object:
        listed = recipe_table.find_type(name)
        cls = listed or self._find_own(name, field)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise ValueError(f"{field} is of type '{name}', which is not a dataclass")
        fields = {entry.name: entry for entry in dataclasses.fields(cls)}
        encoded = _without_gone_fields(name, encoded, field)
        _check_fields(name, encoded, fields, field)
        values = {key: self.decode(item, f"{field}.{key}") for key, item in encoded.items()}
        if listed is not None:
            values = fitted_fields(cls, values, field)
        built = _build(cls, values, fields)
        if isinstance(built, Pi0FASTConfig):
            self._check_tokenizer(built, field)
        return built

    def _check_tokenizer(self, model: Pi0FASTConfig, field: str) -> None:
        """A tokenizer's class comes with arguments; the declared types say nothing of either."""
        tokenizer = model.fast_model_tokenizer
        if recipe_table.name_of(tokenizer) is not None and not recipe_table.is_tokenizer(tokenizer):
            raise ValueError(f"{field}.fast_model_tokenizer is '{recipe_table.name_of(tokenizer)}', which is none")
        for key, value in model.tokenizer_arguments().items():
            if not isinstance(value, (str, int, float, Path, type(None))):
                raise ValueError(f"{field}.fast_model_tokenizer_kwargs.{key} is {value!r}; expected text or a number")

    def _member(self, name: str, member: Any, field: str) -> enum.Enum:
        cls = recipe_table.find_enum(name) or self._find_own(name, field)
        if not (isinstance(cls, type) and issubclass(cls, enum.Enum)) or member not in cls.__members__:
            raise ValueError(f"{field} is '{name}.{member}', which is not an enumeration member")
        return cls[member]

    def _reference(self, name: str, field: str) -> object:
        return recipe_table.find_reference(name) or self._find_own(name, field)

    def _find_own(self, name: str, field: str) -> object:
        found = self.own.find(name)
        if found is not None:
            return found
        if name in recipe_table.names():
            raise ValueError(f"{field} refers to '{name}', which stands for something else than is meant here")
        raise _unknown(name, self.own.names(), field)


def _without_gone_fields(name: str, encoded: Mapping[str, object], field: str) -> dict[str, object]:
    gone = recipe_table.GONE_FIELDS.get(name, {})
    for key in encoded.keys() & gone.keys():
        logger.warning("%s.%s is read no more: %s", field, key, gone[key])
    return {key: item for key, item in encoded.items() if key not in gone}


def _check_fields(
    name: str, encoded: Mapping[str, object], fields: Mapping[str, dataclasses.Field[object]], field: str
) -> None:
    """Raises ValueError for fields that the type does not have, or has and needs."""
    unknown = sorted(encoded.keys() - fields.keys())
    if unknown:
        raise ValueError(
            f"{field} has the fields {unknown}, which {name} does not; it has {sorted(fields)}. "
            "The checkpoint was probably written by a newer openpi: upgrade, or name a recipe with --config"
        )
    lacking = [key for key in fields if key not in encoded]
    needed = [key for key in lacking if _is_needed(fields[key])]
    if needed:
        raise ValueError(f"{field} lacks the fields {needed} of {name}, which have no default")
    if lacking:
        logger.info("%s is of an older openpi and lacks %s: the defaults hold", field, ", ".join(lacking))


def _is_needed(entry: dataclasses.Field[object]) -> bool:
    return entry.init and entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING


def _build(cls: type, values: Mapping[str, object], fields: Mapping[str, dataclasses.Field[object]]) -> object:
    """Through the constructor where the dataclass has its generated one, else field by field."""
    if "__init__" in vars(cls) and not cls.__dataclass_params__.init:  # type: ignore[attr-defined]  # of @dataclass
        instance = object.__new__(cls)
        for key, value in values.items():
            object.__setattr__(instance, key, value)
        return instance
    return cls(**{key: value for key, value in values.items() if fields[key].init})


def _array(values: object, dtype: object, field: str) -> np.ndarray:
    if not (isinstance(dtype, str) and dtype in ARRAY_DTYPES and _is_numeric(values)):
        raise ValueError(f"{field} is no array of numbers with a dtype of {', '.join(ARRAY_DTYPES)}")
    try:
        return np.array(values, ARRAY_DTYPES[dtype])
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{field} is no array of {dtype}: {error}") from error


def _is_numeric(values: object) -> bool:
    return all(map(_is_numeric, values)) if isinstance(values, list) else isinstance(values, (bool, int, float))
