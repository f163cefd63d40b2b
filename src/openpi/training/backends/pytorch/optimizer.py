"""The optimisers of `optimizer` for PyTorch: the same updates as their JAX counterparts.

All are `torch.optim.Optimizer`s whose state is tensors shaped like the parameters, so that it is saved, sharded and
resumed like them. The learning rate is set before each step. Source: the training specification, section 6.1.
"""

# `torch._foreach_*` are operations on lists of tensors, which PyTorch's own optimisers are made of.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from openpi.shared.tree import Leaves
from openpi.training.backends.pytorch import adam_8bit as adam_8bit_pytorch
from openpi.training.backends.pytorch.parallel import distributed, local, part_of, whole
from openpi.training.optimizer import SGD, AdamW, Muon, OptimizerConfig

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration
_NEWTON_SCHULZ_STEPS = 5
_STACK_ELEMENTS = 2**24  # orthogonalised at once; more than that fills a GPU, and is memory
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
    """Euclidean norm over all tensors, in f32. Sharded ones are all sharded alike; the norm is over all shards."""
    found = list(tensors)
    square = torch.stack(torch._foreach_norm(_locals(found), dtype=torch.float32)).square().sum()
    if isinstance(found[0], DTensor):
        shares = [Partial() if placement.is_shard() else Replicate() for placement in found[0].placements]
        square = DTensor.from_local(square, found[0].device_mesh, shares, run_check=False).full_tensor()
    return square.sqrt()


def clip(grads: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales gradients in place to a global norm of `max_norm` where `norm` is larger. Does not wait for the device."""
    scale = torch.where(norm > max_norm, max_norm / norm, torch.ones_like(norm))
    parts = _locals(grads)
    torch._foreach_mul_(parts, scale.to(parts[0].dtype))


def allocate(optimizer: torch.optim.Optimizer | InBackward) -> None:
    """Makes the optimiser's state, which it would make at its first step; a checkpoint is read into it.

    By a step for one parameter after another, with a gradient of zero: all gradients together would take as much memory
    as the weights. The weights may be anything yet.
    """
    for param in [param for group in optimizer.param_groups for param in group["params"]]:
        param.grad = torch.zeros_like(param)
        optimizer.step()
        param.grad = None
    if isinstance(optimizer, InBackward):
        optimizer.take_norm()
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


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
    def param_groups(self) -> list[Leaves]:
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
    def step(self, closure: object = None) -> None:  # type: ignore[override]  # there is no closure
        del closure
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            states = [self._state_of(param, is_muon=group["is_muon"]) for param in params]
            torch._foreach_add_([state["step"] for state in states], 1)
            step = int(states[0]["step"].item())
            grads = _locals(param.grad for param in params)
            means = _locals(state["exp_avg"] for state in states)
            if group["is_muon"]:
                ahead = _nesterov(grads, means, self._config.momentum, step)
                changes = _muon([part_of(param, x) for x, param in zip(ahead, params, strict=True)])
                torch._foreach_add_(changes, _locals(params), alpha=self._config.weight_decay)
            else:
                squares = _locals(state["exp_avg_sq"] for state in states)
                changes = _adam(grads, means, squares, self._config.adam_b2, step)
            torch._foreach_add_(_locals(params), changes, alpha=-group["lr"])

    def _state_of(self, param: torch.nn.Parameter, *, is_muon: bool) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            for name in ("exp_avg",) if is_muon else ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param)
        return state


def _muon(ahead: Sequence[Tensor]) -> list[Tensor]:
    """Changes of (this process's parts of) matrices, from their momentum. Matrices of a shape are run as a stack."""
    changes: list[Tensor] = [ahead[0]] * len(ahead)
    shape_of = {i: (x.shape[0], math.prod(x.shape[1:])) for i, x in enumerate(ahead)}
    for shape in set(shape_of.values()):
        alike = [i for i in shape_of if shape_of[i] == shape]
        count = max(1, _STACK_ELEMENTS // math.prod(shape))
        for some in (alike[start : start + count] for start in range(0, len(alike), count)):
            stack = orthogonalised(torch.stack([whole(ahead[i]).flatten(1) for i in some]))
            stack *= 0.2 * math.sqrt(max(shape))  # 0.2 is the root mean square of AdamW's updates
            for i, change in zip(some, stack, strict=True):
                changes[i] = local(distributed(change.reshape(ahead[i].shape), ahead[i]))
    return changes


def _adam(grads: list[Tensor], means: list[Tensor], squares: list[Tensor], b2: float, step: int) -> list[Tensor]:
    torch._foreach_mul_(squares, b2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - b2)
    roots = torch._foreach_div(squares, 1 - b2**step)
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, _EPSILON)
    changes = _nesterov(grads, means, _ADAM_B1, step)
    torch._foreach_div_(changes, roots)
    return changes


def _nesterov(grads: list[Tensor], means: list[Tensor], beta: float, step: int) -> list[Tensor]:
    """Updates the means of the gradients in place; returns them one step ahead, without the bias of their start."""
    torch._foreach_lerp_(means, grads, 1 - beta)
    ahead = torch._foreach_mul(means, beta / (1 - beta ** (step + 1)))
    torch._foreach_add_(ahead, grads, alpha=(1 - beta) / (1 - beta**step))
    return list(ahead)


def orthogonalised(matrices: Float[Tensor, "n r c"]) -> Float[Tensor, "n r c"]:
    """About the nearest matrices with orthonormal rows or columns, by Newton-Schulz iteration."""
    is_wide = matrices.shape[1] < matrices.shape[2]  # weights are [out, in]; the iteration is on the transpose
    x = matrices if is_wide else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + _EPSILON)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if is_wide else x.mT


def _locals(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of each tensor this process's part."""
    return [local(tensor) for tensor in tensors]
