"""Several LeRobot datasets trained on together, by weight, each with its own keys, transforms and, if wanted,
statistics.

    data=MixtureDataConfig(parts=(
        MixturePart(LeRobotAlohaDataConfig(repo_id="my/towels"), weight=3),
        MixturePart(LeRobotAlohaDataConfig(repo_id="my/cups", exclude_where="length < 50"), weight=1),
    ))

The first part is the robot that a checkpoint serves: contract, output transforms and default statistics are its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from openpi.data.mixture_order import shares
from openpi.models.model_config import BaseModelConfig
from openpi.shared.ranges import Positive
from openpi.training.data_config import HIDDEN, DataConfig, DataConfigFactory, MixedDataset

_LONGEST_NAME = 100


@dataclasses.dataclass(frozen=True)
class MixturePart:
    """One dataset of a mixture.

    Attributes:
        data: as in a recipe that reads it alone.
        weight: relative to those of the other parts: how many of the samples are its.
    """

    data: DataConfigFactory
    weight: Positive = 1.0


@dataclasses.dataclass(frozen=True)
class MixtureDataConfig(DataConfigFactory):
    """A weighted mixture. What is excluded and held out is said by each part.

    Attributes:
        parts: of which the first is the robot that a checkpoint serves.
        statistics: `shared` = one set, in which each part counts by its weight; the parts must have the same state
            and actions. `own` = each part is normalised by its own; a checkpoint has all of them.
    """

    repo_id: str | None = dataclasses.field(default=None, metadata=HIDDEN)
    parts: Sequence[MixturePart] = dataclasses.field(default=(), metadata=HIDDEN)
    statistics: Literal["shared", "own"] = "shared"

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts of the mixture are empty; expected at least one MixturePart")
        own = ("exclude_episodes", "exclude_findings", "exclude_where", "validation_episodes", "base_config")
        if said := [name for name in own if getattr(self, name)]:
            raise ValueError(
                f"{said[0]} is set on a mixture, whose datasets have numbers of their own; set it in a part"
            )
        for part in self.parts:
            if isinstance(part.data, MixtureDataConfig) or hasattr(part.data, "rlds_data_dir"):
                raise ValueError(
                    f"a part of the mixture is a {type(part.data).__name__}; expected datasets in LeRobot form"
                )
            if part.data.repo_id in (None, "fake"):
                raise ValueError(f"a part of the mixture has repo_id={part.data.repo_id!r}; expected a dataset")
        object.__setattr__(self, "repo_id", self.parts[0].data.repo_id)

    @property
    def members(self) -> tuple[DataConfigFactory, ...]:
        return tuple(part.data for part in self.parts)

    @property
    def with_own_statistics(self) -> tuple[DataConfigFactory, ...]:
        return self.members if self.statistics == "own" else (self,)

    @property
    def asset_id(self) -> str | None:
        """Shared statistics are called by datasets and shares: those of other weights are not taken for them."""
        if self.statistics == "own":
            return self.parts[0].data.asset_id
        if self.assets.asset_id is not None:
            return self.assets.asset_id
        of_each = zip(self.members, shares([part.weight for part in self.parts]), strict=True)
        name = "+".join(f"{share:.4g}_{str(data.asset_id).replace('/', '_')}" for data, share in of_each)
        return name if len(name) <= _LONGEST_NAME else f"mixture_{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    def stats_dir(self, assets_dirs: Path | str) -> str | None:
        if self.statistics == "own":
            return self.parts[0].data.stats_dir(assets_dirs)
        return super().stats_dir(assets_dirs)

    def create(self, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        """That of the first part, with all of them in `mixture`.

        Raises:
            ValueError: the parts are normalised in different ways, or two have one place for their own statistics.
        """
        configs = [self._expanded(part.data, assets_dirs, model_config) for part in self.parts]
        if len({config.use_quantile_norm for config in configs}) > 1:
            raise ValueError(
                "some parts of the mixture are normalised by quantiles and some by deviation; set use_quantile_norm of "
                "the mixture"
            )
        folders = [self._stats_dir_of(part.data, assets_dirs) for part in self.parts]
        if self.statistics == "own" and len({config.asset_id for config in configs}) < len(configs):
            raise ValueError(
                f"parts of the mixture have one asset id for statistics of their own: "
                f"{[config.asset_id for config in configs]}; give each another one, assets=AssetsConfig(asset_id=...)"
            )
        weights = shares([part.weight for part in self.parts])
        mixture = tuple(map(MixedDataset, configs, weights, folders))
        return dataclasses.replace(configs[0], mixture=mixture)

    def _expanded(self, data: DataConfigFactory, assets_dirs: Path, model_config: BaseModelConfig) -> DataConfig:
        if self.use_quantile_norm is not None:
            data = dataclasses.replace(data, use_quantile_norm=self.use_quantile_norm)
        config = data.create(assets_dirs, model_config)
        if self.statistics == "own":
            return config
        return dataclasses.replace(config, asset_id=self.asset_id, norm_stats=self._load_norm_stats(assets_dirs))

    def _stats_dir_of(self, data: DataConfigFactory, assets_dirs: Path) -> str | None:
        return data.stats_dir(assets_dirs) if self.statistics == "own" else self.stats_dir(assets_dirs)
