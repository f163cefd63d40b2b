"""Recipes of classes that are not ours: a program with a copy of the published `training/config.py` in it has its own
`TrainConfig`, `DataConfig` and factories. What they say is taken over field by field.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from openpi.models.model_config import BaseModelConfig
from openpi.shared.strict_json import Json
from openpi.training.config import TrainConfig
from openpi.training.data_config import HIDDEN, AssetsConfig, DataConfig, DataConfigFactory


@dataclasses.dataclass(frozen=True)
class AdoptedDataConfig(DataConfigFactory):
    """A factory that does not descend from ours, asked for what it makes.

    Attributes:
        theirs: has `create(assets_dirs, model_config)`.
    """

    theirs: Any = dataclasses.field(default=None, metadata=HIDDEN)

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        return DataConfig(**_common_fields(self.theirs.create(assets_dirs, model_config), DataConfig))


def as_recipe(config: object) -> TrainConfig:
    """A recipe as ours; ours are returned as they are. Fields that a foreign one lacks have our defaults.

    Raises:
        ValueError: it is no recipe: what it lacks is named.
    """
    if isinstance(config, TrainConfig):
        return config
    lacking = [name for name in ("name", "model", "data") if not hasattr(config, name)]
    if lacking or not dataclasses.is_dataclass(config) or isinstance(config, type):
        what = f"; it has no {' and no '.join(lacking)}" if lacking else ""
        raise ValueError(f"{config!r:.80} is a {type(config).__name__}; expected a TrainConfig{what}")
    values = _common_fields(config, TrainConfig)
    values["data"] = _adopted_data(values["data"])
    return TrainConfig(**values)


def _adopted_data(factory: object) -> DataConfigFactory:
    if isinstance(factory, DataConfigFactory):
        return factory
    repo_id = getattr(factory, "repo_id", None)
    assets = getattr(factory, "assets", None)
    return AdoptedDataConfig(
        repo_id=None if _is_to_be_given(repo_id) else repo_id,
        assets=AssetsConfig() if assets is None else AssetsConfig(**_common_fields(assets, AssetsConfig)),
        theirs=factory,
    )


def _common_fields(value: object, kind: type) -> Json:
    names = [field.name for field in dataclasses.fields(kind) if hasattr(value, field.name)]
    return {name: found for name in names if not _is_to_be_given(found := getattr(value, name))}


def _is_to_be_given(value: object) -> bool:
    """Whether it is `tyro.MISSING`, the published default of what every run has to name."""
    return type(value).__module__.partition(".")[0] == "tyro"
