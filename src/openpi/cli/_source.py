"""RECIPE_OR_CHECKPOINT on a command line: what it names, a recipe alone or a recipe with weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from openpi.checkpoints.checkpoint import Checkpoint

if TYPE_CHECKING:
    from openpi.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Source:
    """A recipe, and a checkpoint unless only a recipe was named."""

    config: TrainConfig
    checkpoint: Checkpoint | None = None


def resolve(name: str, *, config: str | None = None) -> Source:
    """Finds what `name` means.

    Args:
        name: a registered recipe, `path.py:attribute`, `module:attribute`, a step directory (also a URL), or the
            directory of a run, whose latest complete step is taken.
        config: recipe to use instead of the one that the checkpoint carries; released checkpoints carry none.
    Raises:
        ValueError: no such recipe, or `config` is given with one.
        FileNotFoundError: no such directory, no checkpoint in it, or one without a recipe and no `config`.
    """
    from openpi.training.config import config_names, get_config
    from openpi.training.recipe_io import recipe_of

    if name not in config_names() and _is_place(name):
        checkpoint = Checkpoint.open(name)
        return Source(recipe_of(checkpoint, config), checkpoint)
    if config is not None:
        raise ValueError(f"--config={config} goes with a checkpoint, and '{name}' is not one; name one of the two")
    return Source(get_config(name))


def _is_place(name: str) -> bool:
    """Recipe names have no slash, and references to recipes in files have a colon."""
    from openpi.shared import download

    if download.is_address(name) or Path(name).is_dir():
        return True
    return ":" not in name and ("/" in name or name.startswith("~"))
