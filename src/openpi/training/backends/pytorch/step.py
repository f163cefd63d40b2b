"""One training step in PyTorch: state, randomness, loss, gradients, update, averaging. The twin of JAX's.

Trainable parameters are f32 masters that the model casts where it computes; frozen ones are bfloat16, and have neither
gradient nor optimiser state nor average. All random numbers of a step are drawn for the whole batch from (seed, step),
so that neither the number of processes nor a restart changes them. Source: the training specification, section 10.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from openpi.models_pytorch.augment import Draws
from openpi.models_pytorch.model import Observation
from openpi.training.backend import Batch
from openpi.training.backends.pytorch import optimizer as optimizer_pytorch
from openpi.training.backends.pytorch import parallel as parallel_pytorch
from openpi.training.backends.pytorch import processes as processes_pytorch
from openpi.training.config import TrainConfig
from openpi.training.optimizer import is_kernel
from openpi.weights import names

Metrics = dict[str, Any]

TIME_BETA = (1.5, 1.0)
TIME_OFFSET = 0.001
_TRAIN, _EVAL = 0, 1  # purposes that random numbers are drawn for
_EVAL_SEED = 0  # validations can be compared with each other, whatever the run's seed


@dataclasses.dataclass
class TrainState:
    """Everything that changes from step to step; a step changes it in place.

    Attributes:
        step: optimiser steps done.
        model: with its parameters, which may be split over devices.
        params: all of them by name. While a model that is split computes, others take their place in it.
        forward: what to call for the loss.
        optimizer: over the trainable parameters.
        average: running average of the trainable parameters by name, or None.
    """

    step: int
    model: nn.Module
    params: dict[str, nn.Parameter]
    forward: nn.Module
    optimizer: torch.optim.Optimizer | optimizer_pytorch.InBackward
    average: dict[str, Tensor] | None

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: param for name, param in self.params.items() if param.requires_grad}


class Randomness(NamedTuple):
    """The random numbers of a batch: for flow models noise f32[(n) b ah ad] and time f32[(n) b]; for training the draws
    of the image augmentation; and int64[(n) b] how many actions are given clean, where that is trained.
    """

    noise: Tensor | None
    time: Tensor | None
    augmentation: Draws | None
    delay: Tensor | None = None

    def rows(self, take: Callable[[Tensor], Tensor]) -> Randomness:
        """Those of some samples, `take` being given tensors with the batch first."""

        def of_flow(x: Tensor | None, batch_axis: int) -> Tensor | None:
            return None if x is None else take(x.movedim(batch_axis, 0)).movedim(0, batch_axis)

        axis = 0 if self.time is None else self.time.ndim - 1
        augmentation = None if self.augmentation is None else self.augmentation.map(take)
        return Randomness(of_flow(self.noise, axis), of_flow(self.time, axis), augmentation, of_flow(self.delay, axis))


def draw(config: TrainConfig, step: int, batch_size: int) -> Randomness:
    """The random numbers of a training step, for the batch of all processes."""
    model: Any = config.model
    rng = np.random.default_rng([config.seed, _TRAIN, step])
    noise, time = draw_flow(model, rng, batch_size, getattr(model, "loss_draws", 1))
    augmentation = Draws.draw(rng, batch_size) if model.augmentation else None
    return Randomness(noise, time, augmentation, draw_delay(model, rng, time))


def draw_for_validation(config: TrainConfig, index: int, batch_size: int) -> Randomness:
    """Those of a validation batch, which depend on nothing else."""
    rng = np.random.default_rng([_EVAL_SEED, _EVAL, index])
    noise, time = draw_flow(config.model, rng, batch_size, 1)
    return Randomness(noise, time, None, draw_delay(config.model, rng, time))


def draw_flow(
    model: Any, rng: np.random.Generator, batch_size: int, num_draws: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Noise, and flow times in (0.001, 1], denser near noise; none for a model without flow."""
    if len(model.experts) == 1:
        return None, None
    lead = (batch_size,) if num_draws == 1 else (num_draws, batch_size)
    noise = rng.standard_normal((*lead, model.action_horizon, model.action_dim), np.float32)
    time = rng.beta(*TIME_BETA, lead) * (1 - TIME_OFFSET) + TIME_OFFSET
    return torch.as_tensor(noise), torch.as_tensor(time, dtype=torch.float32)


def draw_delay(model: object, rng: np.random.Generator, time: Tensor | None) -> Tensor | None:
    """Delays from 0 to `rtc_max_delay`, half of them 0 (`rtc_config`), as many as flow times; None where none are
    trained.
    """
    most = getattr(model, "rtc_max_delay", 0)
    if not most or time is None:
        return None
    return torch.as_tensor(np.maximum(rng.integers(1 - most, most + 1, tuple(time.shape)), 0))


class Step:
    """The step of a recipe.

    Args:
        table: `names.rows` of the model.
    """

    def __init__(self, config: TrainConfig, table: tuple[names.Row, ...], device: torch.device) -> None:
        self._config = config
        self._device = device
        self._schedule = config.lr_schedule.create()
        ndims = {path: len(shape) for path, shape in names.tree_shapes(config.model).items()}
        self._kernels = {row.torch for row in table if is_kernel(row.tree, ndims[row.tree])}

    def __call__(self, state: TrainState, batch: Mapping[str, object], random: Randomness) -> Metrics:
        """One optimiser step, in place. Does not wait for the device.

        Args:
            batch: this process's rows, as tensors on the device: model-side, and `actions`.
            random: for these rows, on the device.
        Returns:
            `loss`, `grad_norm` before clipping, `param_norm` of the kernels, `learning_rate`; tensors on the device.
        """
        config = self._config
        learning_rate = float(self._schedule(state.step))
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self._backward(state, batch, random)
        trainable = state.trainable
        norm = self._update(state.optimizer, list(trainable.values()))
        if state.average is not None and config.ema_decay is not None:
            update_average(state.average, trainable, config.ema_decay)
        state.step += 1
        kernels = [param for name, param in state.params.items() if name in self._kernels]
        return {
            "loss": processes_pytorch.mean_of_all(loss),
            "grad_norm": norm,
            "param_norm": optimizer_pytorch.global_norm(param.detach() for param in kernels),
            "learning_rate": learning_rate,
        }

    def _update(
        self, optimizer: torch.optim.Optimizer | optimizer_pytorch.InBackward, params: list[nn.Parameter]
    ) -> Tensor:
        """Updates the parameters and frees the gradients; returns their global norm before clipping."""
        if isinstance(optimizer, optimizer_pytorch.InBackward):
            return optimizer.take_norm()
        for param in params:
            if param.grad is None:  # read by nobody
                param.grad = torch.zeros_like(param)
        grads = [param.grad for param in params if param.grad is not None]
        norm = optimizer_pytorch.global_norm(grads)
        max_norm = optimizer_pytorch.clip_norm(self._config.optimizer)
        if math.isfinite(max_norm):
            optimizer_pytorch.clip(grads, norm, max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _backward(self, state: TrainState, batch: Mapping[str, object], random: Randomness) -> Tensor:
        """Gradients of the mean loss; the batch is run in parts that take every so-many-th sample."""
        parts = self._config.gradient_accumulation_steps
        total = torch.zeros((), device=self._device)
        state.forward.train()
        for i in range(parts):
            part = take_rows(batch, lambda x, i=i: x[i::parts])
            parallel_pytorch.set_exchanges_gradients(state.forward, i == parts - 1)
            loss = batch_loss(state.forward, part, random.rows(lambda x, i=i: x[i::parts])) / parts
            loss.backward()
            total += loss.detach()
        return total


def batch_loss(forward: nn.Module, batch: Mapping[str, object], random: Randomness) -> Tensor:
    """Mean loss of a batch."""
    observation = Observation.from_dict({key: value for key, value in batch.items() if key != "actions"})
    if random.time is None:
        return forward(observation, random.augmentation).mean()
    drawn = (random.noise, random.time, random.augmentation, random.delay)
    return forward(observation, batch["actions"], *drawn).mean()


def take_rows(batch: Mapping[str, object], take: Callable[[Tensor], object]) -> dict[str, object]:
    """A batch of some rows; None stays None."""

    def of(value: Any) -> object:
        if isinstance(value, Mapping):
            return {key: of(item) for key, item in value.items()}
        return None if value is None else take(value)

    return {key: of(value) for key, value in batch.items()}


@torch.no_grad()
def update_average(average: dict[str, Tensor], params: Mapping[str, Tensor], decay: float) -> None:
    """The running average one step on, in place."""
    old = [parallel_pytorch.local(tensor) for tensor in average.values()]
    new = [parallel_pytorch.local(params[name].detach()).to(torch.float32) for name in average]
    torch._foreach_mul_(old, decay)  # type: ignore[reportPrivateImportUsage]
    torch._foreach_add_(old, new, alpha=1 - decay)  # type: ignore[reportPrivateImportUsage]


@contextlib.contextmanager
def averaged(state: TrainState) -> Iterator[nn.Module]:
    """The model with the weights that are evaluated and served: the average in their place where there is one."""
    raw = {}
    try:
        for name, average in (state.average or {}).items():
            param = parallel_pytorch.local(state.params[name].detach())
            raw[name] = param.to("cpu", copy=True)  # a device may have no room for one more copy
            param.copy_(parallel_pytorch.local(average))
        yield state.model
    finally:
        parallel_pytorch.split_again(state.model)
        for name, values in raw.items():
            parallel_pytorch.local(state.params[name].detach()).copy_(values)


def without_answer(batch: Batch) -> dict[str, object]:
    """The prompt without the action tokens that training adds to it (pi0-FAST)."""
    if batch.get("token_loss_mask") is None:
        return dict(batch)
    is_prompt = batch["tokenized_prompt_mask"] & ~batch["token_loss_mask"]
    return {**batch, "tokenized_prompt_mask": is_prompt, "token_ar_mask": torch.zeros_like(batch["token_ar_mask"])}


@torch.no_grad()
def sample(state: TrainState, batch: Mapping[str, object], random: Randomness, **options: object) -> np.ndarray:
    """Action chunks f32[b ah ad] of this process's rows; of pi0-FAST, tokens f32[b m]."""
    observed = {key: value for key, value in without_answer(batch).items() if key != "actions"}
    observation = Observation.from_dict(observed)
    model: Any = state.model
    if random.noise is not None:
        # The weights of norms are at hand only while their block runs, where parameters are split.
        tabulate = not parallel_pytorch.is_split(model)
        return model.sample_actions(observation, random.noise, tabulate=tabulate).float().cpu().numpy()
    agree = functools.partial(processes_pytorch.all_agree)
    return model.sample_actions(observation, agree=agree, **options).float().cpu().numpy()
