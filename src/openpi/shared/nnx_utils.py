"""Helpers of programs written for models of `flax.nnx`: the published `openpi.shared.nnx_utils`.

They take our models and parameter trees as well, and then need no flax: it is imported for modules and states of its
own only, which whoever holds one has installed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from openpi.shared.param_paths import PathRegex
from openpi.shared.tree import flatten, unflatten

__all__ = ["PathRegex", "module_jit", "state_map"]


def module_jit(meth: Callable[..., object], *jit_args: object, **jit_kwargs: object) -> Callable[..., object]:
    """A method of a model as a compiled function; the parameters are those that the model has now.

    Args:
        meth: bound, such as `model.sample_actions`.
        jit_args, jit_kwargs: of `jax.jit`; positions count the parameters as argument 0.
    Raises:
        ValueError: it is not bound to a model.
    """
    owner = getattr(meth, "__self__", None)
    if owner is None or isinstance(owner, type):
        raise ValueError(f"module_jit wants a method of a model, such as model.sample_actions; got {meth!r}")
    function = meth.__func__  # type: ignore[attr-defined]  # of a bound method
    params, rebuilt = _split(owner)

    def run(params: object, *args: object, **kwargs: object) -> object:
        return function(rebuilt(params), *args, **kwargs)

    compiled = jax.jit(run, *jit_args, **jit_kwargs)

    @functools.wraps(meth)
    def call(*args: object, **kwargs: object) -> object:
        return compiled(params, *args, **kwargs)

    return call


def state_map(
    state: object,
    filter: Callable[..., bool] | Any,
    fn: Callable[[object], object],  # as published
) -> object:
    """`fn` of the leaves that a filter accepts; the others stay.

    Args:
        state: a tree of nested dicts, or an `nnx.State`, whose leaves are variables.
        filter: of paths, such as `PathRegex(".*llm.*")`; for a State, anything that `nnx` takes as a filter.
    Raises:
        TypeError: `state` is neither.
    """
    if _is_of_flax(state):
        return _state_map_of_flax(state, filter, fn)
    if not isinstance(state, Mapping):
        raise TypeError(f"state_map wants an nnx.State or nested dicts of arrays, got {type(state).__name__}")
    flat = flatten(state)
    return unflatten({path: fn(leaf) if filter(tuple(path.split("/")), leaf) else leaf for path, leaf in flat.items()})


def _split(model: object) -> tuple[object, Callable[[object], object]]:
    """What changes of a model, and the function that makes it a model again."""
    if not _is_of_flax(model):
        return model, lambda params: params  # ours is a pytree
    from flax import nnx  # type: ignore[import-not-found]  # installed where there are modules of it

    graph, state = nnx.split(model)
    return state, lambda params: nnx.merge(graph, params)


def _state_map_of_flax(state: Any, filter: object, fn: Callable[[object], object]) -> object:
    from flax import nnx  # type: ignore[import-not-found]  # installed where there are modules of it

    accepts = nnx.filterlib.to_predicate(filter)
    return state.map(lambda path, leaf: fn(leaf) if accepts(path, leaf) else leaf)


def _is_of_flax(value: object) -> bool:
    return any(base.__module__.startswith("flax.") for base in type(value).__mro__)
