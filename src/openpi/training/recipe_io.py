"""A recipe as data: `<checkpoint>/recipe.json` holds the whole resolved `TrainConfig`.

    {"version": 2, "sources": {module: file}, "config": {"$type": "recipe.TrainConfig", fields...}}

    {"$type": name, fields...}      a dataclass               {"$tuple": [...]}
    {"$enum": name, "name": text}   member of an enumeration  {"$dict": [[key, value], ...]}   any keys
    {"$ref": name}                  a function or class       {"$path": text}
    {"$array": [...], "dtype": t}   numbers or booleans       {"$scalar": x, "dtype": t}       of NumPy

Names are those of `recipe_table`; what a user defined is `module:QualName` of a file in `sources`, a copy of which
travels with the checkpoint (`recipe_sources`): serving needs nothing but the checkpoint's folder. In version 1, names
of our own were import paths, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openpi.checkpoints.checkpoint import RECIPE_FILE, Checkpoint
from openpi.shared import download, strict_json, whole_file
from openpi.shared.tree import flatten
from openpi.training.config import TrainConfig, config_names, get_config
from openpi.training.recipe.decoding import Decoder, upgrade
from openpi.training.recipe.encoding import Encoder, differences, shown
from openpi.training.recipe.sources import OwnCode
from openpi.weights import checksums

_VERSION = 2
_READ_VERSIONS = (1, 2)
_MAX_BYTES = 2**24
# What of a recipe changes how a checkpoint is served.
_SERVED_FIELDS = ("model", "data", "policy_metadata")
_LEFT_OUT = "data.exclude_"  # of training alone

logger = logging.getLogger(__name__)


def save_recipe(directory: Path | str, config: TrainConfig) -> Path:
    """Writes `recipe.json`, and copies of the user's files that it names.

    Raises:
        ValueError: a field holds something that is not data, such as a lambda, or of another type than it declares;
            the field is named.
    """
    directory = Path(directory)
    encoder = Encoder()
    recipe = encoder.encode(config, "config")
    directory.mkdir(parents=True, exist_ok=True)
    document = {"version": _VERSION, "sources": encoder.sources.copy_to(directory), "config": recipe}
    whole_file.write_text(directory / RECIPE_FILE, json.dumps(document, indent=2) + "\n")
    return directory / RECIPE_FILE


def recipe_values(config: TrainConfig) -> dict[str, object]:
    """Every value of a recipe as JSON, by path, as in `data/repo_id`.

    Raises:
        ValueError: a field holds something that is not data.
    """
    return flatten(Encoder().encode(config, "config"))


def changes_since(directory: Path | str, config: TrainConfig) -> list[tuple[str, object, object]]:
    """The values in which a recipe differs from the one of a checkpoint: dotted field, before, now.

    Functions and classes are compared, and shown, by name, so nothing is run. Fields that only one version of openpi
    has are no difference. Empty where the checkpoint has no recipe.

    Raises:
        ValueError: its recipe is damaged, or of another version.
    """
    path = Path(directory) / RECIPE_FILE
    if not path.is_file():
        return []
    now = json.loads(json.dumps(Encoder().encode(config, "config")))
    with _errors_of(path):
        found = differences(_read(path).config, now, "")
        return [(field, shown(before), shown(after)) for field, before, after in found]


def recipe_name(directory: Path | str) -> str | None:
    """What the recipe of a checkpoint is called; None where it has none, or a damaged one. Nothing is run."""
    try:
        name = _read(Path(directory) / RECIPE_FILE).config["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def load_recipe(directory: Path | str) -> TrainConfig:
    """Inverse of `save_recipe`. Runs the recipe's own file when there is one and it may run, and logs that.

    Raises:
        FileNotFoundError: the checkpoint has no recipe.
        ValueError: the file is damaged, names something that recipes may not hold, or has fields of another version;
            or the checkpoint was downloaded, has code of its own, and nobody vouches for it (`recipe_sources`).
    """
    path = Path(directory) / RECIPE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; checkpoints from other trainers have no recipe. Name one, as in "
            "`--config=pi0_aloha_sim`"
        )
    checksums.check_small_files(path.parent)
    with _errors_of(path):
        document = _read(path)
        config = Decoder(OwnCode(path.parent, document.sources)).decode(document.config, "config")
        if not isinstance(config, TrainConfig):
            raise ValueError(f"it holds a {type(config).__name__}; expected a TrainConfig")
    return config


def recipe_of(checkpoint: Checkpoint, name: str | None = None) -> TrainConfig:
    """The recipe called `name`, else the checkpoint's own; logs where the two differ.

    Raises:
        FileNotFoundError: the checkpoint has no recipe, and none is named.
        ValueError: unknown name, or a damaged recipe.
    """
    if name is None:
        return checkpoint.read(load_recipe)
    named = get_config(name)
    for field, before, now in changes_since(checkpoint.folder, named):
        if field.partition(".")[0] in _SERVED_FIELDS and not field.startswith(_LEFT_OUT):
            text = f"{field} is {now!r}, the checkpoint was trained with {before!r}"
            logger.warning("recipe '%s' differs from the checkpoint's: %s", name, text)
    return named


def resolve(name: str, config: str | None = None) -> tuple[TrainConfig, Checkpoint | None]:
    """RECIPE_OR_CHECKPOINT of a command line: a recipe, and the checkpoint unless only a recipe was named.

    Args:
        name: a registered recipe, `path.py:attribute`, `module:attribute`, or a place, as of `Checkpoint.open`.
        config: recipe to use instead of the one that the checkpoint carries; released checkpoints carry none.
    Raises:
        ValueError: no such recipe, or `config` is given with one.
        FileNotFoundError: no checkpoint, or one without a recipe and no `config`.
    """
    if name not in config_names() and _is_place(name):
        checkpoint = Checkpoint.open(name)
        return recipe_of(checkpoint, config), checkpoint
    if config is not None:
        raise ValueError(f"--config={config} goes with a checkpoint, and '{name}' is not one; name one of the two")
    return get_config(name), None


def _is_place(name: str) -> bool:
    """Recipe names have no slash, and references to recipes in files have a colon."""
    if download.is_address(name) or Path(name).is_dir():
        return True
    return ":" not in name and ("/" in name or name.startswith("~"))


@dataclasses.dataclass(frozen=True)
class _Document:
    """A recipe's file, with the names of today.

    Attributes:
        sources: modules -> files.
        config: the encoded recipe.
    """

    sources: dict[str, str]
    config: Any


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file is a ValueError that names it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for a recipe") from None
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _read(path: Path) -> _Document:
    """Raises ValueError, or whatever `_errors_of` makes one of."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes; expected a recipe of {_MAX_BYTES} at most")
    document = strict_json.read(path, parse_constant=_constant)
    version, sources, recipe = document["version"], document["sources"], document["config"]
    if version not in _READ_VERSIONS:
        raise ValueError(f"it has version {version}; this openpi reads {_READ_VERSIONS}. Upgrade openpi")
    if not (isinstance(sources, dict) and isinstance(recipe, dict)):
        raise ValueError("it is damaged: sources and config are no objects")
    return _Document(sources, upgrade(recipe, list(sources), "config") if version == 1 else recipe)


def _constant(text: str) -> float:
    if text == "NaN":
        raise ValueError("it holds NaN, which says nothing in a recipe")
    return float(text)
