"""Checkpoint folders of every layout: which one a folder has, and its parameters, tensor by tensor.

    jax       `params/`, an Orbax tree; adapters alone have their frozen rest in another folder
    pytorch   `model.safetensors` or shards, in the names of the published converter
    lerobot   the same names behind `model.`, with a `config.json` that has a `type`

Whatever the layout, `Weights` gives the tensors of `names.rows` with PyTorch's axes, a few hundred MB at a time.
No framework here. Source: the checkpoint specification, sections 1 to 5.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from openpi.shared.errors import first_line
from openpi.shared.tree import unflatten
from openpi.weights import names, safetensors_io
from openpi.weights.adapter_base import AdapterBase
from openpi.weights.compare import LoadReport, Shapes, compare
from openpi.weights.names import Row

if TYPE_CHECKING:
    from openpi.weights.orbax_parts import StoredArray

CONFIG_FILE = "config.json"

# Tensors beyond this size come in blocks of rows.
_WHOLE_BYTES = 256 << 20
_BLOCK_BYTES = 64 << 20
_NONE = "(?!)"  # pattern that nothing matches

Select = Callable[[str], Any]


class Layout(enum.Enum):
    JAX = "jax"
    PYTORCH = "pytorch"
    LEROBOT = "lerobot"


def find_layout(folder: Path) -> Layout:
    """Of a checkpoint's folder, or of a `params/` folder itself.

    Raises:
        FileNotFoundError: it is none; what is there is listed.
        ValueError: the header of its file is damaged.
    """
    if safetensors_io.is_here(folder):
        is_lerobot = "type" in read_config(folder) or _has_prefix(safetensors_io.open_tensors(folder))
        return Layout.LEROBOT if is_lerobot else Layout.PYTORCH
    if _params_folder(folder) is not None:
        return Layout.JAX
    found = sorted(path.name for path in folder.iterdir())[:10] if folder.is_dir() else []
    raise FileNotFoundError(
        f"{folder} has neither params/ nor {safetensors_io.SINGLE_FILE}; expected a checkpoint, such as "
        f"checkpoints/<recipe>/<run>/<step>. There is: {', '.join(found) or 'nothing'}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, empty when there is none.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({first_line(error)}); expected a JSON object") from error


@dataclasses.dataclass(frozen=True)
class Block:
    """A tensor with PyTorch's axes, or rows of one: those from `start` on."""

    row: Row
    start: int
    values: np.ndarray

    @property
    def is_whole(self) -> bool:
        return self.values.shape == self.row.shape


class Weights(Protocol):
    """Parameters on disk that fit a model.

    Attributes:
        report: what is there of the model.
    """

    report: LoadReport

    def dtype(self, row: Row) -> np.dtype:
        """As stored."""
        ...

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        """Tensors that are there, in an order that suits the files; rows of one tensor follow one another.

        Args:
            only: of a tensor's released name, whether it is wanted; None = all are.
        """
        ...


def open_weights(config: Any, folder: Path, *, may_lack_adapters: bool = False) -> Weights:
    """The weights of a checkpoint (or of a `params/` folder), compared with the model by names and shapes.

    Args:
        config: of the model, or `names.dims_of` its tree.
        may_lack_adapters: LoRA factors need not be there.
    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: tensors are missing or have another shape (ten are shown), the file has adapters that the model has
            not, or it is damaged.
    """
    may_keep = ".*lora.*" if may_lack_adapters else _NONE
    if find_layout(folder) is Layout.JAX:
        return _OrbaxWeights(config, folder, may_keep)
    return _SafetensorsWeights(config, folder, may_keep)


def read_tree(
    config: Any,
    folder: Path,
    *,
    dtype: Any = None,
    only: Collection[str] | None = None,
    may_lack_adapters: bool = False,
) -> dict[str, Any]:
    """The published tree (NumPy) of a checkpoint in any layout; arguments and errors as of `open_weights`.

    Args:
        dtype: of the arrays; None = as stored, float32 where parts of one array differ.
        only: paths of the arrays to read; None = all.
    """
    return tree_of(config, open_weights(config, folder, may_lack_adapters=may_lack_adapters), dtype=dtype, only=only)


def tree_of(config: Any, weights: Weights, *, dtype: Any = None, only: Collection[str] | None = None) -> dict[str, Any]:
    """As `read_tree`, of weights that are open."""
    shapes = names.tree_shapes(config)
    dtypes: dict[str, np.dtype] = {}
    for row in names.rows(config):
        if row.released in weights.report.loaded and (only is None or row.tree in only):
            stored = weights.dtype(row)
            same = dtypes.get(row.tree, stored) == stored
            dtypes[row.tree] = np.dtype(dtype) if dtype is not None else stored if same else np.dtype(np.float32)
    flat = {path: np.empty(shapes[path], found) for path, found in dtypes.items()}
    wanted = {row.released for row in names.rows(config) if row.tree in flat}
    for block in weights.blocks(only=wanted.__contains__):
        put_into_tree(flat[block.row.tree], block)
    return unflatten(flat)


def check_tree(shapes: Shapes, folder: Path) -> LoadReport:
    """What loading a safetensors folder into a tree does, by paths of the tree; adapters may be missing.

    Args:
        shapes: of the whole tree.
    Raises:
        FileNotFoundError, ValueError: as of `open_weights`.
    """
    dims = names.dims_of(shapes)
    found = open_weights(dims, folder, may_lack_adapters=True).report
    lacking = {row.tree for row in names.rows(dims) if row.released in found.kept}
    stored = {path: shape for path, shape in shapes.items() if path not in lacking}
    report = compare(shapes, stored, may_keep=".*", source=found.source)
    return dataclasses.replace(report, unused=found.unused)


def put_into_tree(whole: np.ndarray, block: Block) -> None:
    """Writes a block to its place in the array of the tree that it is part of, cast to its dtype."""
    part = whole[block.row.index]
    if block.is_whole:
        part[...] = block.row.to_tree(block.values)
    else:
        part[block.start : block.start + len(block.values)] = block.values


class _OrbaxWeights:
    def __init__(self, config: Any, folder: Path, may_keep: str) -> None:
        from openpi.weights import orbax_parts

        self._table = names.rows(config)
        params = _params_folder(folder)
        assert params is not None
        base = AdapterBase.load(params.parent)
        self._arrays = orbax_parts.open_arrays(params)
        self._frozen = _frozen_arrays(base) if base is not None else {}
        stored = {path: array.shape for path, array in (self._frozen | self._arrays).items()}
        by_path = compare(names.tree_shapes(config), stored, may_keep=may_keep, source=str(params))
        _refuse_adapters(by_path)
        if base is not None:
            base.check(self._frozen)
        self.report = _by_tensor(by_path, self._table)

    def dtype(self, row: Row) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16) if self._is_frozen(row.tree) else self._arrays[row.tree].dtype

    def _is_frozen(self, path: str) -> bool:
        return path in self._frozen and path not in self._arrays

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        for path, rows in _by_path(self._table, only).items():
            array = (self._frozen | self._arrays).get(path)
            if array is None:
                continue
            for block in _blocks_of(array, rows):
                # As training held them.
                frozen = block.values.astype(ml_dtypes.bfloat16) if self._is_frozen(path) else block.values
                yield dataclasses.replace(block, values=frozen)


def _by_path(table: Collection[Row], only: Select | None) -> dict[str, dict[tuple[int, ...], Row]]:
    """Per array of the tree, its parts by index."""
    members: dict[str, dict[tuple[int, ...], Row]] = {}
    for row in table:
        if only is None or only(row.released):
            members.setdefault(row.tree, {})[row.index] = row
    return members


def _blocks_of(array: StoredArray, rows: Mapping[tuple[int, ...], Row]) -> Iterator[Block]:
    is_stacked = () not in rows
    if not is_stacked and not rows[()].is_plain:
        yield Block(rows[()], 0, rows[()].to_torch(array.read()))
        return
    for start, some in array.rows():
        if not is_stacked:
            yield Block(rows[()], start, some)
            continue
        for index, row in rows.items():
            if start <= index[0] < start + len(some):
                yield Block(row, 0, row.to_torch(some[(index[0] - start, *index[1:])]))


def _frozen_arrays(base: AdapterBase) -> dict[str, StoredArray]:
    from openpi.weights import orbax_parts

    folders = base.folders()
    opened = {folder: orbax_parts.open_arrays(folder) for folder in set(folders.values())}
    missing = [path for path, folder in folders.items() if path not in opened[folder]]
    if missing:
        raise ValueError(f"{base.params_path} has no {missing[0]} ({len(missing)} missing), which the adapters need")
    return {path: opened[folder][path] for path, folder in folders.items()}


def _by_tensor(report: LoadReport, table: Collection[Row]) -> LoadReport:
    loaded, kept = set(report.loaded), set(report.kept)
    return dataclasses.replace(
        report,
        loaded=tuple(row.released for row in table if row.tree in loaded),
        kept=tuple(row.released for row in table if row.tree in kept),
    )


class _SafetensorsWeights:
    def __init__(self, config: Any, folder: Path, may_keep: str) -> None:
        self._tensors = safetensors_io.open_tensors(folder)
        self._table = names.rows(config)
        _refuse_other_family(config, self._tensors, folder)
        self._names = {
            row.released: name for row in self._table if (name := names.stored_name(row, self._tensors)) is not None
        }
        base = AdapterBase.load(folder) if folder.is_dir() else None
        self._frozen = _frozen_arrays(base) if base is not None else {}
        if base is not None:
            base.check(self._frozen)
        self._elsewhere = [row for row in self._table if row.released not in self._names and row.tree in self._frozen]
        shapes, trees = self._tensors.shapes, names.tree_shapes(config)
        stored = {released: shapes[name] for released, name in self._names.items()}
        for row in self._elsewhere:
            whole = tuple(self._frozen[row.tree].shape)
            stored[row.released] = row.shape if whole == trees[row.tree] else whole
        used = set(self._names.values())
        unused = {name: shapes[name] for name in shapes if name not in used and not names.is_known_unused(name)}
        model = {row.released: row.shape for row in self._table}
        self.report = compare(model, stored | unused, may_keep=may_keep, source=str(folder))
        _refuse_adapters(self.report)

    def dtype(self, row: Row) -> np.dtype:
        if row.released not in self._names:
            return np.dtype(ml_dtypes.bfloat16)
        return self._tensors.spec(self._names[row.released]).dtype

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        for row in self._table:
            if row.released not in self._names or not (only is None or only(row.released)):
                continue
            tensor = self._tensors[self._names[row.released]]
            per_block = rows_per_block(tensor.shape, tensor.dtype.itemsize) if row.is_plain else len(tensor)
            if per_block >= len(tensor):
                yield Block(row, 0, tensor)
                continue
            for start in range(0, len(tensor), per_block):
                # Opened anew each time: pages that were read are let go.
                yield Block(row, start, self._tensors[self._names[row.released]][start : start + per_block])
        for path, rows in _by_path(self._elsewhere, only).items():
            for block in _blocks_of(self._frozen[path], rows):
                yield dataclasses.replace(
                    block, values=block.values.astype(ml_dtypes.bfloat16)
                )  # as training held them


def rows_per_block(shape: tuple[int, ...], itemsize: int) -> int:
    """Along axis 0; all of them, unless the tensor is very large."""
    row_bytes = math.prod(shape[1:]) * itemsize
    return shape[0] if row_bytes * shape[0] <= _WHOLE_BYTES else max(1, _BLOCK_BYTES // row_bytes)


def _refuse_other_family(config: Any, stored: Mapping[str, Any], folder: Path) -> None:
    """The names say what a file holds; its path does not."""
    bare = {name.removeprefix(names.LEROBOT_PREFIX) for name in stored}
    is_flow, is_pi05 = "action_in_proj.weight" in bare, "time_mlp_in.weight" in bare
    found = ("pi0.5" if is_pi05 else "pi0") if is_flow else "pi0-FAST"
    wanted = ("pi0.5" if config.pi05 else "pi0") if len(config.experts) > 1 else "pi0-FAST"
    if found != wanted:
        raise ValueError(f"{folder} holds {found}, and the recipe's model is {wanted}; name another recipe (--config)")


def _refuse_adapters(report: LoadReport) -> None:
    adapters = [name for name in report.unused if "lora" in name]
    if adapters:
        raise ValueError(
            f"{report.source} has adapters that the model has not, such as {adapters[0]}: without them it is another "
            "policy. Name the LoRA recipe that it was trained with, or merge them first: `openpi export --merge`"
        )


def _has_prefix(stored: Collection[str]) -> bool:
    return bool(stored) and all(name.startswith(names.LEROBOT_PREFIX) for name in stored)


def _params_folder(folder: Path) -> Path | None:
    for params in (folder / "params", folder):
        if (params / "_METADATA").is_file() or (params.name == "params" and params.is_dir()):
            return params
    return None
