"""The optimisers of `optimizer` for PyTorch: the same updates as their JAX counterparts.

All are `torch.optim.Optimizer`s whose state is tensors shaped like the parameters, so that it is saved, sharded and
resumed like them. The learning rate is set before each step. Source: the training specification, section 6.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from openpi.training import adam_8bit_pytorch
from openpi.training.optimizer import SGD, AdamW, Muon, OptimizerConfig

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration
_NEWTON_SCHULZ_STEPS = 5
_EPSILON = 1e-8
_ADAM_B1 = 0.9


def create(
    config: OptimizerConfig, params: Mapping[str, torch.nn.Parameter], is_matrix: Callable[[str], bool]
) -> torch.optim.Optimizer:
    """The optimiser of a recipe over named parameters.

    Args:
        is_matrix: which of them are matrices that Muon orthogonalises.
    Raises:
        ValueError: the optimiser has no PyTorch counterpart.
    """
    found = list(params.values())
    match config:
        case AdamW(state_bits=8):
            return adam_8bit_pytorch.AdamW8bit(
                found, betas=(config.b1, config.b2), eps=config.eps, weight_decay=config.weight_decay
            )
        case AdamW(state_bits=32):
            return torch.optim.AdamW(
                found,
                lr=0.0,
                betas=(config.b1, config.b2),
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=all(p.is_cuda for p in found) or None,
            )
        case SGD():
            return torch.optim.SGD(found, lr=0.0, momentum=config.momentum, nesterov=config.nesterov)
        case Muon():
            return MuonAndAdam(
                [param for name, param in params.items() if is_matrix(name)],
                [param for name, param in params.items() if not is_matrix(name)],
                config,
            )
    raise ValueError(
        f"optimizer {type(config).__name__}({config}) is not one that backend=pytorch has; expected AdamW (state_bits "
        "32 or 8), SGD or Muon. Train it with backend=jax"
    )


def clip_norm(config: OptimizerConfig) -> float:
    """The global gradient norm that an optimiser clips to; infinity = it does not."""
    return getattr(config, "clip_gradient_norm", math.inf)


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, in f32; of sharded ones, over all shards."""
    norms = [_whole(torch.linalg.vector_norm(tensor, dtype=torch.float32)) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip(grads: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales gradients in place to a global norm of `max_norm` where `norm` is larger. Does not wait for the device."""
    scale = torch.where(norm > max_norm, max_norm / norm, torch.ones_like(norm))
    for grad in grads:
        _local(grad).mul_(scale.to(grad.dtype))


class InBackward:
    """An optimiser that updates each parameter as soon as its gradient is there, and frees that: no two gradients are
    in memory together, except where a layer makes them together. Gradients cannot be clipped to a global norm then.

    Has of `torch.optim.Optimizer` what a step and a checkpoint use.

    Args:
        make: the optimiser of some named parameters.
    """

    def __init__(
        self,
        params: Mapping[str, torch.nn.Parameter],
        make: Callable[[Mapping[str, torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self._of_param = {param: make({name: param}) for name, param in params.items()}
        self._norms: list[Tensor] = []
        for param in self._of_param:
            param.register_post_accumulate_grad_hook(self._update)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._of_param.values() for group in optimizer.param_groups]

    @property
    def state(self) -> dict[torch.nn.Parameter, dict[str, Tensor]]:
        return {param: optimizer.state[param] for param, optimizer in self._of_param.items()}

    def step(self) -> None:
        """Updates the parameters that have a gradient now."""
        for param in self._of_param:
            if param.grad is not None:
                self._update(param)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """There are none left."""

    def take_norm(self) -> Tensor:
        """The global norm of all gradients since the last call."""
        norms, self._norms = self._norms, []
        return torch.linalg.vector_norm(torch.stack(norms))

    def _update(self, param: Tensor) -> None:
        assert isinstance(param, torch.nn.Parameter) and param.grad is not None
        self._norms.append(torch.linalg.vector_norm(param.grad, dtype=torch.float32))
        self._of_param[param].step()
        param.grad = None


class MuonAndAdam(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices, Adam for everything else, both with Nesterov's look ahead; as
    `optax.contrib.muon`.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], others: list[torch.nn.Parameter], config: Muon) -> None:
        groups = [{"params": matrices, "is_muon": True}, {"params": others, "is_muon": False}]
        super().__init__([group for group in groups if group["params"]], {"lr": 0.0})
        self._config = config

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # there is no closure
        del closure
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(param)
                    if not group["is_muon"]:
                        state["exp_avg_sq"] = torch.zeros_like(param)
                state["step"] += 1
                update = self._muon if group["is_muon"] else self._adam
                change = update(param.grad, state, int(state["step"].item()))
                decay = self._config.weight_decay if group["is_muon"] else 0.0
                _local(param).sub_(group["lr"] * (_local(change) + decay * _local(param)))

    def _muon(self, grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        ahead = _nesterov(grad, state["exp_avg"], self._config.momentum, step)
        # 0.2 is the root mean square of AdamW's updates.
        change = 0.2 * math.sqrt(max(grad.shape[0], grad[0].numel())) * orthogonalised(_whole(ahead).flatten(1))
        return _placed_like(change.reshape(grad.shape), grad)

    def _adam(self, grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        b2 = self._config.adam_b2
        square = state["exp_avg_sq"].lerp_(grad.square(), 1 - b2) / (1 - b2**step)
        return _nesterov(grad, state["exp_avg"], _ADAM_B1, step) / (square.sqrt() + _EPSILON)


def _nesterov(grad: Tensor, mean: Tensor, beta: float, step: int) -> Tensor:
    """Updates the mean of the gradients in place; returns it one step ahead, without the bias of its start."""
    mean.lerp_(grad, 1 - beta)
    return beta * mean / (1 - beta ** (step + 1)) + (1 - beta) * grad / (1 - beta**step)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns, by Newton-Schulz iteration."""
    is_tall = matrix.shape[0] < matrix.shape[1]  # weights are [out, in]; the iteration is on the transpose
    x = matrix if is_tall else matrix.T
    x = x / (torch.linalg.matrix_norm(x) + _EPSILON)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if is_tall else x.T


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _placed_like(whole: Tensor, example: Tensor) -> Tensor:
    """The whole tensor, which every process has, split as `example` is."""
    if not isinstance(example, DTensor):
        return whole
    from openpi.training.parallel_pytorch import distributed

    return distributed(whole, example)
