"""What of a recipe its compiled programs depend on, so that recipes that agree in it share them.

A run that goes on in the same process, or one with other data, finds what the one before has compiled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from openpi.models.model_config import BaseModelConfig
from openpi.training.config import TrainConfig
from openpi.training.freeze import Filter
from openpi.training.optimizer import LRScheduleConfig, OptimizerConfig

P = ParamSpec("P")
T = TypeVar("T")

_NUM_KEPT = 8  # of one function; a program of a large model holds no weights


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """The fields of `TrainConfig` that the functions of a step read, under the same names."""

    model: BaseModelConfig
    optimizer: OptimizerConfig
    lr_schedule: LRScheduleConfig
    ema_decay: float | None
    freeze_filter: Filter
    gradient_accumulation_steps: int

    @classmethod
    def of(cls, config: TrainConfig | StepConfig) -> StepConfig:
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})


def once_per_recipe(
    build: Callable[Concatenate[StepConfig, P], T],
) -> Callable[Concatenate[TrainConfig | StepConfig, P], T]:
    """Keeps what a function makes of the step's part of a recipe and of hashable arguments.

    A recipe that holds something unhashable, as an own class may be, is built anew each time.
    """
    kept: Any = functools.lru_cache(_NUM_KEPT)(build)

    @functools.wraps(build)
    def find(config: TrainConfig | StepConfig, *args: P.args, **kwargs: P.kwargs) -> T:
        step_config = StepConfig.of(config)
        try:
            hash(step_config)
        except TypeError:
            return build(step_config, *args, **kwargs)
        return kept(step_config, *args, **kwargs)

    return find
