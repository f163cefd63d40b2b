"""Types of arrays for signatures, and their check at run time: the published `openpi.shared.array_typing`.

    import openpi.shared.array_typing as at

    @at.typecheck
    def norm(x: at.Float[at.Array, "*b d"]) -> at.Float[at.Array, "*b"]: ...

Shapes and dtypes are jaxtyping's, the check is beartype's.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import beartype
import jax
import jaxtyping
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import (
    BFloat16,
    Bool,
    Complex,
    DTypeLike,
    Float,
    Float16,
    Float32,
    Float64,
    Inexact,
    Int,
    Int8,
    Int16,
    Int32,
    Int64,
    Integer,
    Key,
    Num,
    PyTree,
    Real,
    Shaped,
    UInt,
    UInt8,
    UInt16,
    UInt32,
    UInt64,
)

__all__ = [
    "Array",
    "ArrayLike",
    "BFloat16",
    "Bool",
    "Complex",
    "DTypeLike",
    "Float",
    "Float16",
    "Float32",
    "Float64",
    "Inexact",
    "Int",
    "Int8",
    "Int16",
    "Int32",
    "Int64",
    "Integer",
    "Key",
    "KeyArrayLike",
    "Num",
    "Params",
    "PyTree",
    "Real",
    "Shaped",
    "UInt",
    "UInt8",
    "UInt16",
    "UInt32",
    "UInt64",
    "check_pytree_equality",
    "disable_typechecking",
    "typecheck",
]

T = TypeVar("T")

if TYPE_CHECKING:
    Array: TypeAlias = Any
else:

    class _ArrayOfAnyFramework(type):
        def __instancecheck__(cls, value: object) -> bool:
            # Whoever holds a tensor has imported PyTorch; this module need not.
            torch = sys.modules.get("torch")
            return isinstance(value, jax.Array) or (torch is not None and isinstance(value, torch.Tensor))

    class Array(metaclass=_ArrayOfAnyFramework):
        """A `jax.Array`, traced or not, or a `torch.Tensor`; not an array of NumPy."""


KeyArrayLike: TypeAlias = ArrayLike
Params: TypeAlias = PyTree[Float[ArrayLike, "..."]]

# Who makes dataclasses of whatever a tree function returns: shapes, specifications, None.
_REBUILDING = ("jax.", "flax.", "optax.", "orbax.")


def typecheck(target: T) -> T:
    """Checks the arguments and results of a function, or the fields of a dataclass, against their annotations.

    Dataclasses are not checked where JAX rebuilds them as pytrees: their leaves are then whatever a function made.

    Raises:
        jaxtyping.TypeCheckError: (when called) something is of another type, dtype or shape.
    """
    plain_init = vars(target).get("__init__") if isinstance(target, type) else None
    check: Any = jaxtyping.jaxtyped(typechecker=beartype.beartype)
    checked = check(target)
    if plain_init is None:
        return checked
    checked_init = checked.__init__

    @functools.wraps(plain_init)
    def init(self: object, *args: object, **kwargs: object) -> None:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        is_rebuilt = caller.startswith(_REBUILDING)
        (plain_init if is_rebuilt else checked_init)(self, *args, **kwargs)

    checked.__init__ = init
    return checked


@contextlib.contextmanager
def disable_typechecking() -> Iterator[None]:
    """Within it, `typecheck` checks nothing, in all threads."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def check_pytree_equality(
    *, expected: object, got: object, check_shapes: bool = False, check_dtypes: bool = False
) -> None:
    """Compares the structure of two trees and, if asked to, the shapes and dtypes of their leaves.

    Raises:
        ValueError: they differ; every differing path is named.
    """
    wanted, found = _leaves(expected), _leaves(got)
    problems = [f"{path}: missing" for path in wanted if path not in found]
    problems += [f"{path}: unexpected" for path in found if path not in wanted]
    for path in wanted.keys() & found.keys():
        problems += _differences(path, wanted[path], found[path], shapes=check_shapes, dtypes=check_dtypes)
    if not problems and jax.tree.structure(expected) != jax.tree.structure(got):
        problems = [f"containers: {jax.tree.structure(got)}, expected {jax.tree.structure(expected)}"]
    if problems:
        shown = "\n  ".join(sorted(problems))
        raise ValueError(f"the trees differ in {len(problems)} places:\n  {shown}")


def _leaves(tree: object) -> dict[str, object]:
    return {jax.tree_util.keystr(path) or "the root": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _differences(path: str, wanted: Any, found: Any, *, shapes: bool, dtypes: bool) -> Iterator[str]:
    if shapes and np.shape(wanted) != np.shape(found):
        yield f"{path}: shape {np.shape(found)}, expected {np.shape(wanted)}"
    if dtypes and _dtype(wanted) != _dtype(found):
        yield f"{path}: dtype {_dtype(found)}, expected {_dtype(wanted)}"


def _dtype(leaf: object) -> object:
    return getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
