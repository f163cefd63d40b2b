"""Where activations lie when a model runs on several devices.

With parameters split over the devices (FSDP), the compiler may split activations along features, too, and exchange
those instead of the parameters. Training says how batches are split; models ask for the same of what passes between
layers. Source: the training specification, section 10.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import TypeVar

import jax

_by_rows: contextvars.ContextVar[jax.sharding.NamedSharding | None] = contextvars.ContextVar("by_rows", default=None)


@contextlib.contextmanager
def split_by_rows(sharding: jax.sharding.NamedSharding) -> Iterator[None]:
    """While a function is traced in here, `keep_rows` splits the first axis as `sharding` does."""
    token = _by_rows.set(sharding)
    try:
        yield
    finally:
        _by_rows.reset(token)


def rows_sharding() -> jax.sharding.NamedSharding | None:
    """That of `split_by_rows`, which a function that is jitted within a model takes as a static argument."""
    return _by_rows.get()


_T = TypeVar("_T")


def keep_rows(tree: _T) -> _T:
    """A tree of arrays with a leading batch axis, split over the devices; unchanged outside `split_by_rows`.

    So are arrays whose rows the devices cannot share equally.
    """
    sharding = _by_rows.get()
    if sharding is None:
        return tree
    return jax.tree.map(lambda leaf: _keep_rows(leaf, sharding), tree)


def _keep_rows(array: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
    if array.shape[0] % sharding.num_devices:
        return array
    return jax.lax.with_sharding_constraint(array, sharding)
