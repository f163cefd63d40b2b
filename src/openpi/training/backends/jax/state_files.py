"""The training state as the two Orbax items of a checkpoint, `params` and `train_state`.

With an average (EMA), `params` holds the average and `train_state` the raw weights; without one, `params` holds the
weights and `train_state` none. Frozen weights may be left out: they are read from where they came from.
Source: the checkpoint specification, section 1.2.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from openpi.shared.tree import Params, flatten, unflatten
from openpi.training.backends.jax.step import TrainState
from openpi.training.freeze import Filter, freeze_nothing
from openpi.weights import names, on_device, opening, orbax_io
from openpi.weights.adapter_base import AdapterBase

logger = logging.getLogger(__name__)

PARAMS, TRAIN_STATE = "params", "train_state"
_BASE = "base"  # of a checkpoint without its frozen weights: where those are
# Beyond the arrays themselves: indices, metadata, and the file system's own share.
_SIZE_MARGIN = 1.05


def required_bytes(state: TrainState, *, is_left_out: Filter = freeze_nothing) -> int:
    """Disk space of one checkpoint, from shapes; an upper bound, because arrays are compressed."""
    leaves = jax.tree.leaves(_without(state, is_left_out))
    sizes = [int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves]
    return int(sum(sizes) * _SIZE_MARGIN)


def begin_write(directory: Path, state: TrainState, *, is_left_out: Filter = freeze_nothing) -> Callable[[], None]:
    """Copies the state off the devices; the function returned writes the two items, in whatever thread.

    All processes of a run call both; none needs more of the state than its devices hold.

    Args:
        is_left_out: parameters that are not written; an `AdapterBase` beside them has to say where they are.
    """
    state = _without(state, is_left_out)
    has_average = state.ema_params is not None
    train_state = {
        "step": state.step,
        "params": _with_value_level(state.params) if has_average else {},
        "opt_state": _with_value_level(state.opt_state),
        "model_def": None,
        "ema_params": None,
    }
    params = {"params": _with_value_level(state.inference_params)}
    items = {directory / PARAMS: params, directory / TRAIN_STATE: train_state}
    write_items = orbax_io.begin_write(items)

    def write() -> None:
        write_items()
        if jax.process_index() == 0:
            (directory / "_CHECKPOINT_METADATA").write_text(_metadata())

    return write


def _metadata() -> str:
    """The step metadata that Orbax's checkpoint manager looks for."""
    now = time.time_ns()
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    return json.dumps(
        {
            "item_handlers": {PARAMS: handler, TRAIN_STATE: handler},
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": now,
            "commit_timestamp_nsecs": now,
            "custom_metadata": {},
        }
    )


def _with_value_level(tree: object) -> object:
    """As the reference trainer writes and restores parameters and their moments: one more path element, `value`.

    Parameters are in dicts; what an optimiser has beside them, such as counts, is in named tuples.
    """

    def leaf_of(path: tuple[object, ...], leaf: object) -> object:
        return {"value": leaf} if isinstance(path[-1], jax.tree_util.DictKey) else leaf

    return jax.tree_util.tree_map_with_path(leaf_of, tree)


def _without(state: TrainState, is_left_out: Filter) -> TrainState:
    def kept(params: Params) -> Params:
        return unflatten({path: leaf for path, leaf in flatten(params).items() if not is_left_out(path)})

    average = None if state.ema_params is None else kept(state.ema_params)
    return dataclasses.replace(state, params=kept(state.params), ema_params=average)


def restore_state(directory: Path, template: TrainState) -> TrainState:
    """Reads what `begin_write`, or the reference trainer, wrote; every process reads what its devices hold.

    Args:
        template: leaves with shape, dtype and, optionally, `sharding`.
    Raises:
        ValueError: leaves are missing or have another shape; they are named, and no data has been read.
    """
    saved = _Saved(directory)
    wanted = orbax_io.leaves_by_path(template)
    saved.check_fits(wanted)
    if template.ema_params is not None and not saved.has_average:
        logger.warning("%s has no averaged weights; the average starts from its weights", directory)
    found = saved.read(wanted)
    return jax.tree.unflatten(jax.tree.structure(template), [found[path] for path in wanted])


class _Saved:
    """The leaves of a checkpoint under the names that they have in a state."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._leaves = {item: orbax_io.leaf_metadata(directory / item) for item in (PARAMS, TRAIN_STATE)}
        self._base = AdapterBase.load(directory)
        if self._base is not None:
            self._leaves[_BASE] = {f"params/{path}": entry for path, entry in self._base.frozen.items()}
        self.has_average = any(path.startswith("params/") for path in self._leaves[TRAIN_STATE])

    def check_fits(self, wanted: Params) -> None:
        problems = []
        for path, leaf in wanted.items():
            item, stored_path = self._source(path)
            stored = self._leaves[item].get(stored_path)
            if stored is None:
                problems.append(f"{path}: not in the checkpoint")
            elif tuple(stored.shape) != tuple(leaf.shape):
                problems.append(f"{path}: shape {tuple(stored.shape)}, the recipe has {tuple(leaf.shape)}")
        if problems:
            shown = "\n  ".join(problems[:20])
            raise ValueError(
                f"{self._directory} does not fit the recipe ({len(problems)} leaves differ); has the model or the "
                f"optimiser been changed since?\n  {shown}"
            )

    def read(self, wanted: Params) -> dict[str, jax.Array]:
        """Arrays by path in the state."""
        sources = {path: self._source(path) for path in wanted}
        read: dict[tuple[str, str], jax.Array] = {}
        for item in self._leaves:
            leaves = {stored: wanted[path] for path, (where, stored) in sources.items() if where == item}
            arrays = self._read_base(wanted, leaves) if item == _BASE else self._read_item(item, leaves)
            read |= {(item, stored): array for stored, array in arrays.items()}
        found: dict[str, jax.Array] = {}
        given = set()
        for path, source in sources.items():
            # A step gives every buffer away, so an average that starts from the weights needs its own.
            found[path] = jnp.copy(read[source]) if source in given else read[source]
            given.add(source)
        return found

    def _read_item(self, item: str, leaves: Params) -> dict[str, jax.Array]:
        return orbax_io.read_leaves(self._directory / item, leaves) if leaves else {}

    def _read_base(self, wanted: Params, leaves: Params) -> dict[str, jax.Array]:
        assert self._base is not None
        model = {path.removeprefix("params/"): leaf for path, leaf in wanted.items() if path.startswith("params/")}
        table = names.rows_of({path: tuple(leaf.shape) for path, leaf in model.items()})
        weights = opening.open_base(table, self._base)
        read = on_device.read_like(weights, {stored.removeprefix("params/"): leaf for stored, leaf in leaves.items()})
        return {stored: read[stored.removeprefix("params/")] for stored in leaves}

    def _source(self, path: str) -> tuple[str, str]:
        """The item, and the path in it, of a leaf of the state."""
        kind, _, rest = path.partition("/")
        if kind in ("params", "ema_params") and f"params/{rest}" in self._leaves.get(_BASE, {}):
            return _BASE, f"params/{rest}"
        if kind == "ema_params" or (kind == "params" and not self.has_average):
            return PARAMS, f"params/{rest}"
        if path.endswith("/count") and path not in self._leaves[TRAIN_STATE]:
            return TRAIN_STATE, "step"  # schedules count steps; an optimiser with a constant rate stores no count
        return TRAIN_STATE, path
