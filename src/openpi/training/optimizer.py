"""Learning-rate schedules and optimisers as data; `create()` builds the optax object. No JAX at import.

Source: the training specification, section 6.1.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import optax


@runtime_checkable
class LRScheduleConfig(Protocol):
    """Something that builds a schedule: step -> learning rate."""

    def create(self) -> optax.Schedule: ...


@runtime_checkable
class OptimizerConfig(Protocol):
    """Something that builds a gradient transformation."""

    def create(self, lr: optax.ScalarOrSchedule, weight_decay_mask: Any = None) -> optax.GradientTransformation: ...


@dataclasses.dataclass(frozen=True)
class CosineDecaySchedule(LRScheduleConfig):
    """Linear warm-up to `peak_lr`, then half a cosine down to `decay_lr`, which stays.

    Attributes:
        decay_steps: counted from step 0, so the warm-up is part of it.
    """

    warmup_steps: int = 1_000
    peak_lr: float = 2.5e-5
    decay_steps: int = 30_000
    decay_lr: float = 2.5e-6

    def create(self) -> optax.Schedule:
        """Raises ValueError when the decay would end before the warm-up does."""
        import optax

        if self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"lr_schedule.decay_steps={self.decay_steps} counts from step 0 and must be larger than "
                f"warmup_steps={self.warmup_steps}; for a short run lower both"
            )
        return optax.warmup_cosine_decay_schedule(
            init_value=self.peak_lr / (self.warmup_steps + 1),
            peak_value=self.peak_lr,
            warmup_steps=self.warmup_steps,
            decay_steps=self.decay_steps,
            end_value=self.decay_lr,
        )


@dataclasses.dataclass(frozen=True)
class RsqrtDecaySchedule(LRScheduleConfig):
    """Linear warm-up to `peak_lr`, then `peak_lr * sqrt(timescale / (timescale + steps since))`."""

    warmup_steps: int = 1_000
    peak_lr: float = 5e-5
    timescale: float = 10_000

    def create(self) -> optax.Schedule:
        import jax.numpy as jnp
        import optax

        warm_up = optax.linear_schedule(self.peak_lr / (self.warmup_steps + 1), self.peak_lr, self.warmup_steps)

        def decay(steps_since: Any) -> Any:
            return self.peak_lr / jnp.sqrt((self.timescale + steps_since) / self.timescale)

        return optax.join_schedules([warm_up, decay], [self.warmup_steps])


@dataclasses.dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """AdamW after clipping the global gradient norm.

    Attributes:
        weight_decay: next to nothing by default: the published recipes regularise by averaging, not by decay.
    """

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip_gradient_norm: float = 1.0

    def create(self, lr: optax.ScalarOrSchedule, weight_decay_mask: Any = None) -> optax.GradientTransformation:
        import optax

        adam = optax.adamw(
            lr, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, mask=weight_decay_mask
        )
        return optax.chain(optax.clip_by_global_norm(self.clip_gradient_norm), adam)


@dataclasses.dataclass(frozen=True)
class SGD(OptimizerConfig):
    """Momentum SGD without clipping. The learning rate comes from the schedule; `lr` is kept for old recipes."""

    lr: float = 5e-5
    momentum: float = 0.9
    nesterov: bool = False

    def create(self, lr: optax.ScalarOrSchedule, weight_decay_mask: Any = None) -> optax.GradientTransformation:
        """Raises ValueError for a weight-decay mask: there is no decay to mask."""
        import optax

        if weight_decay_mask is not None:
            raise ValueError("SGD has no weight decay; weight_decay_mask must be None")
        return optax.sgd(lr, momentum=self.momentum, nesterov=self.nesterov)


def create_optimizer(
    optimizer: OptimizerConfig, lr_schedule: LRScheduleConfig, weight_decay_mask: Any = None
) -> optax.GradientTransformation:
    """The gradient transformation of a recipe."""
    return optimizer.create(lr_schedule.create(), weight_decay_mask)
