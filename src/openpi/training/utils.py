"""What training scripts of one's own use: the published `openpi.training.utils`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from openpi.training.backends.jax import step as step_jax

__all__ = ["TrainState", "array_tree_to_info", "tree_to_info"]


@dataclasses.dataclass(frozen=True)
class TrainState(step_jax.TrainState):
    """The state of our own loop, with what a script wants to carry along; a pytree.

    Attributes:
        ema_params: running average of `params`, or None.
        model_def: of a module library such as `flax.nnx`, whose parameters `params` then are.
        tx: the optimizer.
        ema_decay: of the average.
    """

    ema_params: Any = None
    model_def: Any = dataclasses.field(default=None, kw_only=True)
    tx: Any = dataclasses.field(default=None, kw_only=True)
    ema_decay: float | None = dataclasses.field(default=None, kw_only=True)


jax.tree_util.register_dataclass(
    TrainState,
    data_fields=["step", "params", "opt_state", "ema_params"],
    meta_fields=["model_def", "tx", "ema_decay"],
)


def tree_to_info(tree: object, interp_func: Callable[[Any], str] = str) -> str:
    """A line for each leaf of a tree: its path, and what the function says of it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return "\n".join(f"{jax.tree_util.keystr(path)}: {interp_func(leaf)}" for path, leaf in leaves)


def array_tree_to_info(tree: object) -> str:
    """A line for each array of a tree, such as `['state']: (32, 14)@float32`; leaves need a shape and a dtype."""
    return tree_to_info(tree, lambda leaf: f"{tuple(leaf.shape)}@{leaf.dtype}")
