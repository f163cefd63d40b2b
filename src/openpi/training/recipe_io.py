"""A recipe as data: `<checkpoint>/recipe.json` holds the whole resolved `TrainConfig`.

Every dataclass is `{"$type": "module:QualName", fields...}`; functions and classes are import paths. Reading builds
dataclasses and enums only, from `openpi` and from the recipe's own file, which travels with the checkpoint as
`recipe_source.py`: serving needs nothing but the checkpoint's folder.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np

from openpi.shared.tree import flatten
from openpi.training.config import TrainConfig
from openpi.weights import checksums

logger = logging.getLogger("openpi")

RECIPE_FILE = "recipe.json"
# Attribute of a recipe's file that was loaded from a checkpoint: what it was called when it was written.
_MODULE_NAME = "__openpi_module__"
_VERSION = 1


def save_recipe(directory: Path | str, config: TrainConfig) -> Path:
    """Writes `recipe.json`, and copies of the user's files that it names.

    Raises:
        ValueError: a field holds something that is not data, such as a lambda; the field is named.
    """
    directory = Path(directory)
    encoder = _Encoder()
    recipe = encoder.encode(config, "config")
    directory.mkdir(parents=True, exist_ok=True)
    sources = {module: _copy_source(file, directory, i) for i, (module, file) in enumerate(encoder.sources.items())}
    document = {"version": _VERSION, "sources": sources, "config": recipe}
    partial = directory / f".{RECIPE_FILE}.partial"
    partial.write_text(json.dumps(document, indent=2) + "\n")
    return partial.rename(directory / RECIPE_FILE)


def check_recipe_can_be_saved(config: TrainConfig) -> None:
    """Raises what `save_recipe` would, and writes nothing."""
    recipe_values(config)


def recipe_values(config: TrainConfig) -> dict[str, Any]:
    """Every value of a recipe as JSON, by path, as in `data/repo_id`.

    Raises:
        ValueError: a field holds something that is not data.
    """
    return flatten(_Encoder().encode(config, "config"))


def changes_since(directory: Path | str, config: TrainConfig) -> list[tuple[str, Any, Any]]:
    """The values in which a recipe differs from the one of a checkpoint: dotted field, before, now.

    Functions and classes are compared, and shown, by name, so nothing is imported. Fields that only one version of
    openpi has are no difference. Empty where the checkpoint has no recipe.

    Raises:
        ValueError: its recipe is damaged, or of another version.
    """
    path = Path(directory) / RECIPE_FILE
    if not path.is_file():
        return []
    _, before = _read(path)
    now = json.loads(json.dumps(_Encoder().encode(config, "config")))
    return list(_differences(before, now, ""))


def _differences(before: Any, now: Any, field: str) -> Iterator[tuple[str, Any, Any]]:
    """Of two encoded values, the leaves that differ."""
    if isinstance(before, dict) and isinstance(now, dict) and _tag(before) == _tag(now):
        is_same_class = "$type" in now and before["$type"] == now["$type"]
        for key in {**now, **before}:
            where = field if key.startswith("$") else f"{field}.{key}".removeprefix(".")
            if key in before and key in now:
                yield from _differences(before[key], now[key], where)
            elif not is_same_class:
                yield where, before.get(key), now.get(key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, f"{field}[{i}]")
    elif before != now:
        yield field, before, now


def _tag(value: dict[str, Any]) -> str | None:
    """What kind of value a dict encodes; None = a dict."""
    return next((key for key in value if key.startswith("$")), None)


def load_recipe(directory: Path | str) -> TrainConfig:
    """Inverse of `save_recipe`. Runs the recipe's own file when there is one, and logs that.

    Raises:
        FileNotFoundError: the checkpoint has no recipe.
        ValueError: the file is damaged, or another small one of the checkpoint; it names something outside `openpi` and
            the recipe's own file, or was written by a version with other fields.
    """
    path = Path(directory) / RECIPE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; checkpoints from other trainers have no recipe. Name one, as in "
            "`--config=pi0_aloha_sim`"
        )
    checksums.check_small_files(path.parent)
    sources, recipe = _read(path)
    config = _Decoder(path, {module: path.with_name(file) for module, file in sources.items()}).decode(recipe, "config")
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected a TrainConfig")
    return config


def _read(path: Path) -> tuple[dict[str, str], Any]:
    """Modules with their files, and the encoded recipe.

    Raises:
        ValueError: as of `load_recipe`.
    """
    try:
        document = json.loads(path.read_text())
        version, sources, recipe = document["version"], document["sources"], document["config"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if version != _VERSION:
        raise ValueError(f"{path} has version {version}; this openpi reads version {_VERSION}")
    return sources, recipe


class _Encoder:
    """Values -> JSON, noting the files outside `openpi` that the values come from."""

    def __init__(self) -> None:
        self.sources: dict[str, Path] = {}

    def encode(self, value: Any, field: str) -> Any:
        encode = self._encoder_of(value)
        if encode is None:
            raise ValueError(
                f"{field} holds {value!r} ({type(value).__name__}), which cannot be written to {RECIPE_FILE}; use a "
                "dataclass, a module-level function, or plain values"
            )
        return encode(value, field)

    def _encoder_of(self, value: Any) -> Any:
        if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
            return lambda v, _: v
        if isinstance(value, type) or inspect.isroutine(value):
            return self._reference
        if dataclasses.is_dataclass(value):
            return self._dataclass
        for kind, encode in self._kinds().items():
            if isinstance(value, kind):
                return encode
        return None

    def _kinds(self) -> dict[type, Any]:
        return {
            enum.Enum: lambda v, f: {"$enum": self._path(type(v), f), "name": v.name},
            tuple: lambda v, f: {"$tuple": [self.encode(item, f"{f}[{i}]") for i, item in enumerate(v)]},
            list: lambda v, f: [self.encode(item, f"{f}[{i}]") for i, item in enumerate(v)],
            Mapping: self._mapping,
            Path: lambda v, _: {"$path": str(v)},
            np.ndarray: lambda v, f: {"$array": self.encode(v.tolist(), f), "dtype": str(v.dtype)},
            np.generic: lambda v, f: {"$scalar": self.encode(v.item(), f), "dtype": str(v.dtype)},
        }

    def _dataclass(self, value: Any, field: str) -> dict[str, Any]:
        encoded = {"$type": self._path(type(value), field)}
        for entry in dataclasses.fields(value):
            encoded[entry.name] = self.encode(getattr(value, entry.name), f"{field}.{entry.name}")
        return encoded

    def _mapping(self, value: Mapping[Any, Any], field: str) -> dict[str, Any]:
        """Pairs where keys are not plain strings, so that any dict survives."""
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: self.encode(item, f"{field}.{key}") for key, item in value.items()}
        return {
            "$dict": [[self.encode(k, f"{field} key"), self.encode(v, f"{field}[{k!r}]")] for k, v in value.items()]
        }

    def _reference(self, value: Any, field: str) -> dict[str, Any]:
        return {"$ref": self._path(value, field)}

    def _path(self, value: Any, field: str) -> str:
        """`module:QualName`, after checking that it leads back to `value`."""
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "<unnamed>")
        if module is None or "<" in name:
            raise ValueError(
                f"{field} holds {name}, which has no import path; define a function at the top level of the recipe's "
                "file and name it instead"
            )
        if module == "__main__":
            raise ValueError(f"{field} holds {name} of a script; move it to a file that can be imported")
        if _is_ours(module):
            return f"{module}:{name}"
        file = Path(inspect.getfile(sys.modules[module]))
        module = getattr(sys.modules[module], _MODULE_NAME, module)
        self.sources[module] = file
        return f"{module}:{name}"


def _is_ours(module: str) -> bool:
    return module == "openpi" or module.startswith("openpi.")


def _copy_source(file: Path, directory: Path, index: int) -> str:
    name = "recipe_source.py" if index == 0 else f"recipe_source_{index + 1}.py"
    shutil.copyfile(file, directory / name)
    return name


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """JSON -> values. `sources` are the recipe's own modules, the only ones outside `openpi` that are touched."""

    path: Path
    sources: Mapping[str, Path]

    def decode(self, value: Any, field: str) -> Any:
        if isinstance(value, list):
            return [self.decode(item, f"{field}[{i}]") for i, item in enumerate(value)]
        if not isinstance(value, dict):
            return value
        tag = _tag(value)
        if tag is None:
            return {key: self.decode(item, f"{field}.{key}") for key, item in value.items()}
        return self._tagged(tag, value, field)

    def _tagged(self, tag: str, value: dict[str, Any], field: str) -> Any:
        content = value[tag]
        match tag:
            case "$type":
                return self._dataclass(content, {k: v for k, v in value.items() if k != tag}, field)
            case "$enum":
                return self._enum(content, value["name"], field)
            case "$ref":
                return self._class_or_function(content, field)
            case "$tuple":
                return tuple(self.decode(content, field))
            case "$dict":
                return dict(self.decode(pair, field) for pair in content)
            case "$path":
                return Path(content)
            case "$array":
                return np.asarray(self.decode(content, field), dtype=value["dtype"])
            case "$scalar":
                return np.dtype(value["dtype"]).type(content)
        raise ValueError(f"{self.path}: {field} has the unknown tag '{tag}'")

    def _dataclass(self, name: str, values: dict[str, Any], field: str) -> Any:
        cls = self._find(name, field)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise ValueError(f"{self.path}: {field} is of type '{name}', which is not a dataclass")
        known = {entry.name: entry for entry in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known.keys())
        if unknown:
            raise ValueError(
                f"{self.path}: {field} has the fields {unknown}, which {name} does not; it has {sorted(known)}. "
                "The checkpoint was probably written by another version of openpi"
            )
        decoded = {key: self.decode(item, f"{field}.{key}") for key, item in values.items()}
        return _build(cls, decoded, known)

    def _enum(self, name: str, member: str, field: str) -> enum.Enum:
        cls = self._find(name, field)
        if not (isinstance(cls, type) and issubclass(cls, enum.Enum)) or member not in cls.__members__:
            raise ValueError(f"{self.path}: {field} is '{name}.{member}', which is not an enumeration member")
        return cls[member]

    def _class_or_function(self, name: str, field: str) -> Any:
        value = self._find(name, field)
        if not isinstance(value, (type, FunctionType)):
            raise ValueError(f"{self.path}: {field} refers to '{name}', which is neither a class nor a function")
        return value

    def _find(self, name: str, field: str) -> Any:
        module, _, qualname = name.partition(":")
        if not (_is_ours(module) or module in self.sources):
            raise ValueError(
                f"{self.path}: {field} refers to '{name}'; a recipe may only name things in openpi and in its own "
                f"file{''.join(f' ({m})' for m in self.sources)}"
            )
        try:
            home = importlib.import_module(module) if _is_ours(module) else _own_module(module, self.sources[module])
            return functools.reduce(getattr, qualname.split("."), home)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{self.path}: {field} refers to '{name}', which does not exist: {error}") from error


def _build(cls: type, values: dict[str, Any], fields: Mapping[str, dataclasses.Field[Any]]) -> Any:
    """Through the constructor where the dataclass has its generated one, else field by field."""
    if "__init__" in vars(cls) and not cls.__dataclass_params__.init:  # type: ignore[attr-defined]  # of @dataclass
        instance = object.__new__(cls)
        for key, value in values.items():
            object.__setattr__(instance, key, value)
        return instance
    return cls(**{key: value for key, value in values.items() if fields[key].init})


def _own_module(name: str, file: Path) -> ModuleType:
    """The recipe's file as a module; the one already imported if it is the same text."""
    if not file.is_file():
        raise ImportError(f"{file} is missing from the checkpoint")
    loaded = sys.modules.get(name)
    if loaded is not None and _same_text(getattr(loaded, "__file__", None), file):
        return loaded
    alias = f"openpi_recipe_{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"
    if alias in sys.modules:
        return sys.modules[alias]
    logger.info("running the recipe's own code: %s (was %s)", file, name)
    spec = importlib.util.spec_from_file_location(alias, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    setattr(module, _MODULE_NAME, name)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module


def _same_text(loaded_file: str | None, file: Path) -> bool:
    loaded = Path(loaded_file) if loaded_file else None
    return loaded is not None and loaded.exists() and loaded.read_bytes() == file.read_bytes()
