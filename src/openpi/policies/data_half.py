"""The data half of a recipe, expanded with statistics that are given instead of those that it names.

    config.data.create(assets_dirs, model)                   published; reads the statistics that the recipe names
    expanded(config.data, assets_dirs, model, norm_stats)    reads nothing

Recipes of users override `create`, so what is given does not go through its arguments: what `create` calls to read
statistics (`DataConfigFactory.create_base_config`) asks here whether somebody has them.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from openpi import transforms
from openpi.shared.normalize import NormStats

if TYPE_CHECKING:
    from openpi.models.model_config import BaseModelConfig


@dataclasses.dataclass(frozen=True)
class Given:
    """Statistics that somebody has; None = there are none."""

    norm_stats: Mapping[str, NormStats] | None


_given: contextvars.ContextVar[Given | None] = contextvars.ContextVar("given_statistics", default=None)


class DataHalf(Protocol):
    """The fields of an expanded data half that a policy is made of; training's is `DataConfig`."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    @property
    def repack_transforms(self) -> transforms.Group: ...
    @property
    def data_transforms(self) -> transforms.Group: ...
    @property
    def model_transforms(self) -> transforms.Group: ...
    @property
    def use_quantile_norm(self) -> bool: ...
    @property
    def asset_id(self) -> str | None: ...
    @property
    def norm_stats(self) -> Mapping[str, NormStats] | None: ...


T_co = TypeVar("T_co", bound=DataHalf, covariant=True)


class DataFactory(Protocol[T_co]):
    """What makes one, of ours or of a user's own; training's is `DataConfigFactory`."""

    def create(self, assets_dirs: Path, model_config: BaseModelConfig, /) -> T_co: ...


class Recipe(Protocol):
    """What a policy is made of, of ours or of a user's own; training's is `TrainConfig`."""

    @property
    def model(self) -> BaseModelConfig: ...
    @property
    def data(self) -> DataFactory[DataHalf]: ...


def expanded(
    data: DataFactory[T_co],
    assets_dirs: Path,
    model_config: BaseModelConfig,
    norm_stats: Mapping[str, NormStats] | None,
) -> T_co:
    """What `data.create` makes, with these statistics (None = none)."""
    token = _given.set(Given(norm_stats))
    try:
        data_config = data.create(assets_dirs, model_config)
    finally:
        _given.reset(token)
    return dataclasses.replace(data_config, norm_stats=norm_stats)


def given_statistics() -> Given | None:
    """Those that `create` is called with by `expanded`, instead of any that it would read; None = nobody gave any."""
    return _given.get()
