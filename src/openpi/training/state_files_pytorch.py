"""The training state as the files of a checkpoint.

    model.safetensors         the weights that inference reads, in the released layout: the average if there is one
    train_state.safetensors   optimiser state, and the raw weights if there is an average, by the names of our modules
    train_state.json          how many steps are done

Frozen weights may be left out: they are read from where they came from. Every tensor is written whole, so that a run
continues on any number of processes. Source: the checkpoint specification, sections 1.2 and 4.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from openpi.models_pytorch import loading
from openpi.shared.tree import flatten
from openpi.training import parallel_pytorch, processes
from openpi.training.freeze import Filter
from openpi.training.step_pytorch import TrainState
from openpi.weights import names, orbax_io, safetensors_io
from openpi.weights.adapter_base import AdapterBase

logger = logging.getLogger("openpi")

MODEL_FILE = safetensors_io.SINGLE_FILE
STATE_FILE, STEP_FILE = "train_state.safetensors", "train_state.json"
_WEIGHTS, _OPTIMIZER = "weights/", "optimizer/"
_COUNT = "step"  # of the optimiser: the same for all parameters, so it is not written

Table = tuple[names.Row, ...]


def begin_write(directory: Path, table: Table, state: TrainState, is_left_out: Filter) -> Callable[[], None]:
    """Copies the state to the host; the function returned writes the files, in whatever thread.

    All processes of a run call both; the first holds and writes everything.
    """
    kept = [row for row in table if not is_left_out(row.tree)]
    model = dict(_copied(_served(state, kept)))
    rest = dict(_copied(_rest(state, kept)))
    step = {"step": state.step, "has_average": state.average is not None}

    def write() -> None:
        if not processes.is_first():
            return
        safetensors_io.save(directory / STATE_FILE, rest)
        (directory / STEP_FILE).write_text(json.dumps(step))
        metadata = {"format": "pt", **names.tied_names()}
        safetensors_io.save(directory / MODEL_FILE, model, metadata=metadata)

    return write


def _served(state: TrainState, rows: Iterable[names.Row]) -> Iterator[tuple[str, Tensor]]:
    params = state.params
    for row in rows:
        yield row.released, (state.average or {}).get(row.torch, params[row.torch])


def _rest(state: TrainState, rows: Iterable[names.Row]) -> Iterator[tuple[str, Tensor]]:
    params = state.trainable
    for row in rows:
        param = params.get(row.torch)
        if param is None:
            continue
        if state.average is not None:
            yield _WEIGHTS + row.torch, param
        slots = state.optimizer.state[param]
        assert slots, f"the optimiser knows nothing of {row.torch}"
        for slot, tensor in slots.items():
            if slot != _COUNT:
                yield f"{_OPTIMIZER}{slot}/{row.torch}", tensor


def _copied(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, np.ndarray]]:
    """Whole, on the host of the first process; all processes have to go through them."""
    for name, tensor in tensors:
        found = parallel_pytorch.whole(tensor.detach())
        if processes.is_first():
            yield name, loading.as_array(found.to("cpu", copy=True))


def restore(directory: Path, table: Table, state: TrainState) -> None:
    """Fills a state of the same recipe with what `begin_write` wrote.

    Raises:
        ValueError: tensors are missing or have another shape; they are named, and nothing has been read.
        FileNotFoundError: the folder has no training state.
    """
    if not (directory / STEP_FILE).is_file():
        raise FileNotFoundError(
            f"{directory} has no {STEP_FILE}, so training cannot continue there; to start from its weights, give "
            "--pytorch-weight-path and another --exp-name"
        )
    step = json.loads((directory / STEP_FILE).read_text())
    model = safetensors_io.open_tensors(directory / MODEL_FILE)
    rest = safetensors_io.open_tensors(directory / STATE_FILE)
    base = AdapterBase.load(directory)
    left_out = set() if base is None else set(base.frozen)
    _check_fits(directory, table, state, model, rest, step["has_average"], left_out)
    if state.average is not None and not step["has_average"]:
        logger.warning("%s has no averaged weights; the average starts from its weights", directory)

    params = state.params
    for row in table:
        if row.tree in left_out:
            continue
        served = loading.as_tensor(model[_name(row, model)])
        raw = rest.get(_WEIGHTS + row.torch)
        parallel_pytorch.assign(params[row.torch], served if raw is None else loading.as_tensor(raw))
        if state.average is not None and row.torch in state.average:
            parallel_pytorch.assign(state.average[row.torch], served)
    if base is not None:
        assign_frozen(base, table, params)
    for name, param in state.trainable.items():
        for slot, tensor in state.optimizer.state[param].items():
            if slot == _COUNT:
                tensor.fill_(step["step"])
            else:
                parallel_pytorch.assign(tensor, loading.as_tensor(rest[f"{_OPTIMIZER}{slot}/{name}"]))
    state.step = step["step"]


def assign_frozen(base: AdapterBase, table: Table, params: Mapping[str, Tensor]) -> None:
    """Reads the frozen weights from where they came from, array by array.

    Raises:
        ValueError: they are not there, or others than before.
    """
    folders = base.folders()
    for path in base.frozen:
        array = flatten(orbax_io.read_params(folders[path], only={path}))[path]
        for row in table:
            if row.tree == path:
                parallel_pytorch.assign(params[row.torch], loading.as_tensor(row.to_torch(array[row.index])))
    base.check(published(table, params, base.frozen))


def published(table: Table, params: Mapping[str, Tensor], paths: Iterable[str]) -> dict[str, PublishedLeaf]:
    """Parameters under their paths in the published tree."""
    return {path: PublishedLeaf([row for row in table if row.tree == path], params) for path in paths}


class PublishedLeaf:
    """An array of the published tree that is put together only when it is asked for."""

    def __init__(self, rows: list[names.Row], params: Mapping[str, Tensor]) -> None:
        self._rows, self._params = rows, params
        lead = tuple(1 + max(row.index[axis] for row in rows) for axis in range(len(rows[0].index)))
        self.shape = lead + rows[0].part_shape

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.__array__()[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        tensors = {row.torch: parallel_pytorch.whole(self._params[row.torch].detach()) for row in self._rows}
        array = names.assembled(self._rows, lambda row: loading.as_array(tensors[row.torch]))
        return array if dtype is None else array.astype(dtype)


def _name(row: names.Row, stored: Mapping[str, Any]) -> str:
    name = names.stored_name(row, stored)
    assert name is not None, row.released
    return name


def _check_fits(
    directory: Path,
    table: Table,
    state: TrainState,
    model: safetensors_io.Tensors,
    rest: safetensors_io.Tensors,
    has_average: bool,
    left_out: set[str],
) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for row in table:
        if row.tree not in left_out:
            wanted[names.stored_name(row, model) or row.released] = row.shape
    for name, param in state.trainable.items():
        if has_average:
            wanted[_WEIGHTS + name] = tuple(param.shape)
        for slot, tensor in state.optimizer.state[param].items():
            if slot != _COUNT:
                wanted[f"{_OPTIMIZER}{slot}/{name}"] = tuple(tensor.shape)
    stored = model.shapes | rest.shapes
    problems = [
        f"{name}: not in the checkpoint"
        if name not in stored
        else f"{name}: shape {stored[name]}, the recipe has {shape}"
        for name, shape in wanted.items()
        if stored.get(name) != shape
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(
            f"{directory} does not fit the recipe ({len(problems)} tensors differ); has the model or the optimiser "
            f"been changed since?\n  {shown}"
        )
