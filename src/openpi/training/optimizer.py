"""Learning-rate schedules and optimisers as data. No JAX at import: schedules run without, an optimiser's `create()`
builds the optax object, and `optimizer_pytorch` has the same in PyTorch.

Source: the training specification, section 6.1.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

import numpy as np

from openpi.shared.ranges import Count, Decay, NonNegative, Positive, Range, WholeNumber
from openpi.shared.tree import flatten, unflatten

if TYPE_CHECKING:
    import optax

Schedule = Callable[[Any], Any]
_Decay = Callable[[Any, ModuleType], Any]
"""From a step to its learning rate: a number, or arrays of NumPy or JAX, traced ones, too. As `optax.Schedule`."""


@runtime_checkable
class LRScheduleConfig(Protocol):
    """Something that builds a schedule."""

    def create(self) -> Schedule: ...


@runtime_checkable
class OptimizerConfig(Protocol):
    """Something that builds a gradient transformation."""

    def create(self, lr: optax.ScalarOrSchedule, weight_decay_mask: object = None) -> optax.GradientTransformation: ...


@dataclasses.dataclass(frozen=True)
class CosineDecaySchedule(LRScheduleConfig):
    """Linear warm-up to `peak_lr`, then half a cosine down to `decay_lr`, which stays.

    Attributes:
        decay_steps: counted from step 0, so the warm-up is part of it.
    """

    warmup_steps: WholeNumber = 1_000
    peak_lr: NonNegative = 2.5e-5
    decay_steps: Count = 30_000
    decay_lr: NonNegative = 2.5e-6

    def __post_init__(self) -> None:
        """Raises ValueError when the decay would end before the warm-up does."""
        if self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"lr_schedule.decay_steps={self.decay_steps} counts from step 0 and must be larger than "
                f"warmup_steps={self.warmup_steps}; for a short run lower both"
            )

    def create(self) -> Schedule:
        num_steps = float(self.decay_steps - self.warmup_steps)
        floor = self.decay_lr / self.peak_lr if self.peak_lr else 0.0

        def decay(steps_since: object, xp: ModuleType) -> object:
            cosine = 0.5 * (1 + xp.cos(xp.pi * xp.minimum(steps_since, num_steps) / num_steps))
            return self.peak_lr * ((1 - floor) * cosine + floor)

        return _after_warm_up(self.peak_lr, self.warmup_steps, decay)


@dataclasses.dataclass(frozen=True)
class RsqrtDecaySchedule(LRScheduleConfig):
    """Linear warm-up to `peak_lr`, then `peak_lr * sqrt(timescale / (timescale + steps since))`."""

    warmup_steps: WholeNumber = 1_000
    peak_lr: NonNegative = 5e-5
    timescale: Positive = 10_000

    def create(self) -> Schedule:
        def decay(steps_since: object, xp: ModuleType) -> object:
            # Before it begins the root is of any number; what comes of it is not used.
            return self.peak_lr / xp.sqrt((self.timescale + xp.maximum(steps_since, 0)) / self.timescale)

        return _after_warm_up(self.peak_lr, self.warmup_steps, decay)


def _after_warm_up(peak: float, num_steps: int, decay: _Decay) -> Schedule:
    """A line from `peak / (num_steps + 1)` to `peak`, then `decay(steps since, module of the array's functions)`.

    The operations and their order are those of optax: trained in JAX, a run goes on bit for bit.
    """
    first = peak / (num_steps + 1)

    def rate(step: Any) -> object:
        xp = step.__array_namespace__() if hasattr(step, "__array_namespace__") else np
        if isinstance(step, int):  # PyTorch's: rounded as JAX rounds, so that both backends train alike
            step = np.float32(step)
        ahead = 1 - xp.clip(step, 0, num_steps) / max(num_steps, 1)
        return xp.where(step < num_steps, (first - peak) * ahead + peak, decay(step - num_steps, xp))

    return rate


MaxNorm = Annotated[float, Range(above=0, note="infinity = no clipping")]
"""What the global norm of the gradient is clipped to."""


@dataclasses.dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """AdamW after clipping the global gradient norm.

    Attributes:
        weight_decay: next to nothing by default: the published recipes regularise by averaging, not by decay.
        state_bits: of each moment; 8 saves 6 of the 8 bytes per trained parameter, see `adam_8bit`.
    """

    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 1e-10
    clip_gradient_norm: MaxNorm = 1.0
    state_bits: Literal[32, 8] = 32

    def create(self, lr: optax.ScalarOrSchedule, weight_decay_mask: object = None) -> optax.GradientTransformation:
        """Raises ValueError for a `state_bits` that does not exist."""
        import optax

        from openpi.training.backends.jax import adam_8bit

        if self.state_bits not in (8, 32):
            raise ValueError(f"optimizer.state_bits={self.state_bits}; expected 32, or 8 to save memory")
        adamw = optax.adamw if self.state_bits == 32 else adam_8bit.adamw
        adam = adamw(lr, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, mask=weight_decay_mask)
        return optax.chain(optax.clip_by_global_norm(self.clip_gradient_norm), adam)


@dataclasses.dataclass(frozen=True)
class SGD(OptimizerConfig):
    """Momentum SGD without clipping. The learning rate comes from the schedule; `lr` is kept for old recipes."""

    lr: NonNegative = 5e-5
    momentum: Decay = 0.9
    nesterov: bool = False

    def create(self, lr: optax.ScalarOrSchedule, weight_decay_mask: object = None) -> optax.GradientTransformation:
        """Raises ValueError for a weight-decay mask: there is no decay to mask."""
        import optax

        if weight_decay_mask is not None:
            raise ValueError("SGD has no weight decay; weight_decay_mask must be None")
        return optax.sgd(lr, momentum=self.momentum, nesterov=self.nesterov)


# How each stacked weight is a matrix: (pattern of the whole path, axes that are summed over, axes that come out). The
# other axes (layers; k and v; gate and up) hold separate matrices. Whatever is not listed is no matrix to speak of.
_MATRICES: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = (
    (r".*/q_einsum(_\d)?/w", (2,), (1, 3)),
    (r".*/kv_einsum(_\d)?/w", (3,), (2, 4)),
    (r".*/attn_vec_einsum(_\d)?/w", (1, 2), (3,)),
    (r".*/gating_einsum", (2,), (3,)),
    (r".*/layers/mlp(_\d)?/linear", (1,), (2,)),
    (r".*/layers/.*Dense_0/kernel", (1,), (2,)),
    (r".*/final_norm_\d/Dense_0/kernel", (0,), (1,)),
    (r".*/(query|key|value)/kernel", (1,), (2, 3)),
    (r".*/out/kernel", (1, 2), (3,)),
    (r".*/MlpBlock_0/Dense_\d/kernel", (1,), (2,)),
    (r".*/img/embedding/kernel", (0, 1, 2), (3,)),
    (r".*/img/head/kernel", (0,), (1,)),
    (r"(action_)?time_mlp_(in|out)/kernel", (0,), (1,)),
)


@dataclasses.dataclass(frozen=True)
class Muon(OptimizerConfig):
    """Orthogonalised momentum for the weight matrices, AdamW for everything else, after clipping the gradient norm.

    For models trained from scratch. Updates are scaled so that learning rates mean what they mean for AdamW. Measured
    on the table-top's base: the loss that AdamW reaches after 800 steps, Muon reaches before 400.
    """

    momentum: Decay = 0.95
    adam_b2: Decay = 0.95
    weight_decay: NonNegative = 1e-4
    clip_gradient_norm: MaxNorm = 1.0

    def create(self, lr: optax.ScalarOrSchedule, weight_decay_mask: object = None) -> optax.GradientTransformation:
        import optax

        muon = optax.contrib.muon(
            lr,
            beta=self.momentum,
            weight_decay=self.weight_decay,
            weight_decay_mask=weight_decay_mask,
            adam_b2=self.adam_b2,
            adam_learning_rate=lr,
            muon_weight_dimension_numbers=_matrix_axes,
            consistent_rms=0.2,  # of AdamW's updates
        )
        return optax.chain(optax.clip_by_global_norm(self.clip_gradient_norm), muon)


def _matrix_axes(params: Any) -> Any:
    """Per leaf, which axes make it a matrix; None = not for Muon."""
    from optax.contrib import MuonDimensionNumbers

    def axes(path: str) -> MuonDimensionNumbers | None:
        for pattern, reduced, out in _MATRICES:
            if re.fullmatch(pattern, path):
                return MuonDimensionNumbers(reduction_axis=reduced, output_axis=out)
        return None

    return unflatten({path: axes(path) for path in flatten(params)})


def create_optimizer(
    optimizer: OptimizerConfig, lr_schedule: LRScheduleConfig, weight_decay_mask: object = None
) -> optax.GradientTransformation:
    """The gradient transformation of a recipe."""
    return optimizer.create(lr_schedule.create(), weight_decay_mask)


# Norms, biases and tables say little about whether weights grow.
_NO_KERNEL = re.compile(r".*(bias|scale|pos_embedding|input_embedding)")


def is_kernel(path: str, ndim: int) -> bool:
    """Whether a parameter counts for `param_norm`."""
    return ndim > 1 and not _NO_KERNEL.fullmatch(path)


def is_matrix(path: str) -> bool:
    """Whether Muon takes a parameter as a matrix, or a stack of them."""
    return any(re.fullmatch(pattern, path) for pattern, _, _ in _MATRICES)
