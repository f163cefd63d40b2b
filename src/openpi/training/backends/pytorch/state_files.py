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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from openpi.models_pytorch import loading
from openpi.training.backends.pytorch import parallel as parallel_pytorch
from openpi.training.backends.pytorch.step import TrainState
from openpi.training.distributed import processes
from openpi.training.freeze import Filter
from openpi.weights import names, opening, safetensors_io, spelling
from openpi.weights.adapter_base import Digests

logger = logging.getLogger(__name__)

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
        metadata = {"format": "pt", **spelling.tied_names()}
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
        for slot, tensor in state.optimizer.state[param].items():
            if slot != _COUNT:
                yield f"{_OPTIMIZER}{slot}/{row.torch}", tensor


def _copied(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, np.ndarray]]:
    """Whole, on the host of the first process; all processes have to go through them."""
    for name, tensor in tensors:
        found = parallel_pytorch.whole(tensor.detach())
        if processes.is_first():
            yield name, loading.as_array(found.to("cpu", copy=True))


def restore(directory: Path, model_config: object, state: TrainState) -> None:
    """Fills a state of the same recipe with what `begin_write` wrote, tensor by tensor.

    Raises:
        ValueError: tensors are missing or have another shape; they are named, and nothing has been read. Or the frozen
            weights are others than before.
        FileNotFoundError: the folder has no training state, or the base of adapters is not there.
    """
    if not (directory / STEP_FILE).is_file():
        raise FileNotFoundError(
            f"{directory} was not written by backend=pytorch (it has no {STEP_FILE}); continue the run with "
            "--backend=jax, or start from its weights with --pytorch-weight-path and another --exp-name"
        )
    step = json.loads((directory / STEP_FILE).read_text())
    model = opening.open_weights(model_config, directory)
    rest = safetensors_io.open_tensors(directory / STATE_FILE)
    _check_fits(directory, state, rest, step["has_average"])
    if state.average is not None and not step["has_average"]:
        logger.warning("%s has no averaged weights; the average starts from its weights", directory)

    params, average = state.params, state.average or {}
    for block in model.blocks():
        name, values = block.row.torch, loading.as_tensor(block.values)
        if name in average:
            parallel_pytorch.assign(average[name], values, block.start)
        if _WEIGHTS + name not in rest:
            parallel_pytorch.assign(params[name], values, block.start)
    for name, param in params.items():  # all of them: some may have been frozen since
        if _WEIGHTS + name in rest:
            _assign_stored(param, rest, _WEIGHTS + name)
    for name, param in state.trainable.items():
        for slot, tensor in state.optimizer.state[param].items():
            if slot == _COUNT:
                tensor.fill_(step["step"])
            else:
                _assign_stored(tensor, rest, f"{_OPTIMIZER}{slot}/{name}")
    state.step = step["step"]


def _assign_stored(target: Tensor, stored: safetensors_io.Tensors, name: str) -> None:
    for start, values in stored.rows(name):
        parallel_pytorch.assign(target, loading.as_tensor(values), start)


def digests(table: Table, params: Mapping[str, Tensor], paths: Collection[str]) -> dict[str, str]:
    """As of `Backend.digests`."""
    found, collected = {}, Digests(names.shapes_of(table))
    for row in table:
        if row.tree in paths and collected.counts(row.tree, row.index):
            tensor = parallel_pytorch.whole(params[row.torch].detach())
            digest = collected.add(row.tree, row.to_tree(loading.as_array(tensor)), row.index)
            if digest is not None:
                found[row.tree] = digest
    return found


def _check_fits(directory: Path, state: TrainState, rest: safetensors_io.Tensors, has_average: bool) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for name, param in state.trainable.items():
        if has_average:
            wanted[_WEIGHTS + name] = tuple(param.shape)
        for slot, tensor in state.optimizer.state[param].items():
            if slot != _COUNT:
                wanted[f"{_OPTIMIZER}{slot}/{name}"] = tuple(tensor.shape)
    stored = rest.shapes
    problems = [
        f"{name}: not in the checkpoint"
        if name not in stored
        else f"{name}: shape {stored[name]}, the recipe has {shape}"
        for name, shape in wanted.items()
        if stored.get(name) != shape
    ]
    problems += [
        f"{name}: the recipe's optimiser keeps no such thing"
        for name in stored
        if name.startswith(_OPTIMIZER) and name not in wanted and name.rpartition("/")[2] in state.trainable
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ValueError(
            f"{directory} does not fit the recipe ({len(problems)} tensors differ); has the optimiser been changed "
            f"since?\n  {shown}"
        )
