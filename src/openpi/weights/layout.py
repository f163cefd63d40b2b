"""Checkpoint folders of every layout: which one a folder has, and its parameters, tensor by tensor.

    jax       `params/`, an Orbax tree
    pytorch   `model.safetensors` or shards, in the names of the published converter
    lerobot   the same names behind `model.`, with a `config.json` that has a `type`

Where a checkpoint holds adapters alone, the rest is read from its base, which has any of these layouts, too.
Whatever the layout, `Weights` gives the tensors of `names.rows` with PyTorch's axes, a few hundred MB at a time, and
`arrays` the published tree, array by array. No framework here. Source: the checkpoint specification, sections 1 to 5.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from openpi.shared import strict_json
from openpi.shared.errors import first_line
from openpi.shared.file_kinds import found_instead
from openpi.shared.tree import unflatten
from openpi.weights import names, safetensors_io, second_names, spelling
from openpi.weights.adapter_base import AdapterBase, Digests, Frozen
from openpi.weights.compare import LoadReport, Shapes, compare
from openpi.weights.names import Row

CONFIG_FILE = "config.json"

logger = logging.getLogger(__name__)

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_QUANTISED = "If the file is quantised, convert it back to bfloat16 or float32 with the tool that made it"
_NONE = "(?!)"  # pattern that nothing matches
_ADAPTERS = ".*lora.*"

Select = Callable[[str], Any]
Box = tuple[tuple[int, int], ...]


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
        params = _params_folder(folder)
        if params is not None and any(params.iterdir()):
            raise ValueError(
                f"{folder} has weights twice, params/ (JAX) and {safetensors_io.SINGLE_FILE} (PyTorch), and they need "
                "not be the same: move those that are not meant out of the folder"
            )
        is_lerobot = "type" in read_config(folder) or _has_prefix(safetensors_io.open_tensors(folder))
        return Layout.LEROBOT if is_lerobot else Layout.PYTORCH
    if _params_folder(folder) is not None:
        return Layout.JAX
    found = sorted(path.name for path in folder.iterdir())[:10] if folder.is_dir() else []
    raise FileNotFoundError(
        f"{folder} has neither params/ nor {safetensors_io.SINGLE_FILE}; expected a checkpoint, such as "
        f"checkpoints/<recipe>/<run>/<step>. There is: {', '.join(found) or 'nothing'}{advice(found)}"
    )


def advice(found: Collection[str]) -> str:
    """On weights in a form that is not read."""
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in found):
        return f". These shards lack their {safetensors_io.INDEX_FILE}; bring the whole folder here again"
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in found):
        return ". Pickled weights are not read, since reading them runs what they say: save them with safetensors"
    return ""


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`, empty when there is none.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        return dict(strict_json.read(file))
    except (ValueError, TypeError) as error:
        why = found_instead(file) or first_line(error)
        raise ValueError(f"{file} is damaged ({why}); expected a JSON object") from error


@dataclasses.dataclass(frozen=True)
class Block:
    """A tensor with PyTorch's axes, or rows of one: those from `start` on."""

    row: Row
    start: int
    values: np.ndarray

    @property
    def is_whole(self) -> bool:
        return self.values.shape == self.row.shape


class Array(Protocol):
    """An array of the tree that is read when it is wanted."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray: ...

    def rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """Consecutive rows along axis 0, with the index of the first of them; of a small array, all at once."""
        ...


class Weights(Protocol):
    """Parameters on disk that fit a model.

    Attributes:
        table: the model's tensors.
        report: what is there of them, by released name.
        base: of a checkpoint of adapters alone: what is read from where.
    """

    table: Sequence[Row]
    report: LoadReport
    base: AdapterBase | None

    def dtype(self, row: Row) -> np.dtype:
        """As stored; of what is read from a base, bfloat16."""
        ...

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        """Tensors that are there, in an order that suits the files; rows of one tensor follow one another.

        Args:
            only: of a tensor's released name, whether it is wanted; None = all are.
        Raises:
            ValueError: an array of a base is not the one that the adapters were trained on.
        """
        ...


# --- opening ------------------------------------------------------------------------------------------------------


def open_weights(config: Any, folder: Path, *, without: Sequence[str] = (), layout: Layout | None = None) -> Weights:
    """The weights of a checkpoint (or of a `params/` folder), compared with the model by names and shapes.

    Args:
        config: of the model.
        without: names of tensors in the file that are not meant.
        layout: of the folder, where it is known; None = it is looked for.
    Raises:
        FileNotFoundError: no checkpoint, or the base of adapters is not there.
        ValueError: tensors are missing or have another shape (ten are shown), the file has adapters that the model has
            not, it holds a tensor under several names that differ, or it is damaged.
    """
    return _open(names.rows(config), folder, without=without, layout=layout)


def open_tree(
    shapes: Shapes,
    folder: Path,
    *,
    may_lack_adapters: bool = False,
    source: str | None = None,
    layout: Layout | None = None,
) -> Weights:
    """As `open_weights`, from path -> shape of a whole tree instead of a configuration.

    The tree may be of a model that is not among ours where the checkpoint is a `params/` folder.

    Args:
        may_lack_adapters: LoRA factors need not be there.
        source: what the report and errors call the folder.
        layout: as of `open_weights`.
    """
    may_keep = _ADAPTERS if may_lack_adapters else _NONE
    return _open(names.rows_of(shapes), folder, may_keep=may_keep, source=source, layout=layout)


def stored_shapes(folder: Path) -> Shapes:
    """Path -> shape of the whole tree in a `params/` folder, with what it reads from a base.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is damaged, or of another layout.
    """
    from openpi.weights import orbax_parts

    own = {path: array.shape for path, array in orbax_parts.open_arrays(folder).items()}
    base = AdapterBase.load(folder.parent)
    return own if base is None else {path: entry.shape for path, entry in base.frozen.items()} | own


def open_base(table: Sequence[Row], base: AdapterBase) -> Weights:
    """What adapters read from their base, in bfloat16, as training held it.

    Arrays of the tree that are read whole are compared with what the adapters expect.

    Args:
        table: arrays of it that are frozen are read.
    Raises:
        FileNotFoundError, ValueError: as of `open_weights`.
    """
    return _BaseWeights([row for row in table if row.tree in base.frozen], base)


def check_base(table: Sequence[Row], base: AdapterBase) -> None:
    """Reads it once. Raises what `open_base` and `Weights.blocks` do."""
    for _ in open_base(table, base).blocks():
        pass


def frozen_arrays(weights: Weights, paths: Collection[str]) -> dict[str, Frozen]:
    """What `AdapterBase` has to know of arrays of the tree; they are read once."""
    shapes = names.shapes_of(weights.table)
    digests, found = Digests(shapes), {}
    wanted = {row.released for row in weights.table if row.tree in paths}
    for block in weights.blocks(wanted.__contains__):
        digest = _digest(digests, block)
        if digest is not None:
            found[block.row.tree] = Frozen(shapes[block.row.tree], digest)
    return found


# --- the published tree -------------------------------------------------------------------------------------------


def read_tree(config: Any, folder: Path, *, dtype: Any = None, only: Collection[str] | None = None) -> dict[str, Any]:
    """The published tree (NumPy) of a checkpoint in any layout; arguments and errors as of `open_weights`, `arrays`."""
    return tree_of(open_weights(config, folder), dtype=dtype, only=only)


def tree_of(weights: Weights, *, dtype: Any = None, only: Collection[str] | None = None) -> dict[str, Any]:
    """As `read_tree`, of weights that are open."""
    return unflatten(dict(arrays(weights, dtype=dtype, only=only)))


def arrays(
    weights: Weights, *, dtype: Any = None, only: Collection[str] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Path and values of one array of the tree after the other.

    Args:
        dtype: of the arrays; None = as stored, float32 where parts of one array differ.
        only: paths of the arrays to read; None = all that are there.
    """
    shapes = names.shapes_of(weights.table)
    for path, rows in loaded_rows(weights).items():
        if only is None or path in only:
            array = np.empty(shapes[path], stored_dtype(weights, rows) if dtype is None else dtype)
            for block in weights.blocks({row.released for row in rows}.__contains__):
                put_into(array, block)
            yield path, array


def loaded_rows(weights: Weights) -> dict[str, list[Row]]:
    """Per array of the tree that is there whole, the tensors that it is made of."""
    found: dict[str, list[Row]] = {}
    for row in weights.table:
        found.setdefault(row.tree, []).append(row)
    lacking = set(weights.report.kept)
    return {path: rows for path, rows in found.items() if not any(row.released in lacking for row in rows)}


def stored_dtype(weights: Weights, rows: Iterable[Row]) -> np.dtype:
    """Of an array of the tree that is made of these; float32 where they differ."""
    dtypes = {weights.dtype(row) for row in rows}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def put_into(target: np.ndarray, block: Block, box: Box | None = None) -> None:
    """Writes a block to its place in the array of the tree that it is part of, cast to its dtype.

    Args:
        box: begin and end along each axis, of the part of that array that `target` is; None = it is all of it.
    """
    bounds = [(0, size) for size in target.shape] if box is None else list(box)
    index, values = block.row.index, block.row.to_tree(block.values) if block.is_whole else block.values
    if not all(begin <= place < end for place, (begin, end) in zip(index, bounds, strict=False)):
        return
    where: list[Any] = [place - begin for place, (begin, _) in zip(index, bounds, strict=False)]
    if values.ndim:
        (first, last), *others = bounds[len(index) :]
        begin, end = max(first, block.start), min(last, block.start + len(values))
        if begin >= end:
            return
        where.append(slice(begin - first, end - first))
        values = values[(slice(begin - block.start, end - block.start), *(slice(*bound) for bound in others))]
    target[tuple(where)] = values


def by_path(weights: Weights) -> LoadReport:
    """The report by paths of the tree; what is unused is called as in the file."""
    shapes = names.shapes_of(weights.table)
    there = {path: shapes[path] for path in loaded_rows(weights)}
    report = compare(shapes, there, may_keep=".*", source=weights.report.source)
    return dataclasses.replace(report, unused=weights.report.unused)


# --- the layouts --------------------------------------------------------------------------------------------------


def _open(
    table: Sequence[Row],
    folder: Path,
    *,
    may_keep: str = _NONE,
    source: str | None = None,
    is_base: bool = False,
    without: Sequence[str] = (),
    layout: Layout | None = None,
) -> Weights:
    """As of `open_tree` and `open_weights`; `is_base`: there may be more than the table has."""
    params = _params_folder(folder) if (layout or find_layout(folder)) is Layout.JAX else None
    base = AdapterBase.load(folder if params is None else params.parent)
    elsewhere = {} if base is None else {path: entry.shape for path, entry in base.frozen.items()}
    is_alone = base is None and not is_base
    own: ArrayWeights | _SafetensorsWeights
    if params is not None:
        if without:
            raise ValueError(f"{params} is no file of tensors: none of its arrays can be left out, as {without[0]}")
        own = _open_orbax(table, params, elsewhere, may_keep, source or str(params), is_alone=is_alone)
    else:
        tensors = safetensors_io.open_tensors(folder).without(without)
        own = _open_safetensors(table, tensors, elsewhere, may_keep, source or str(folder), is_alone=is_alone)
    if not is_base:
        _refuse_adapters(own.report)
    _refuse_integers(own, source or str(folder))
    return own if base is None else _WithBase(own, base)


def _open_orbax(
    table: Sequence[Row], params: Path, elsewhere: Shapes, may_keep: str, source: str, *, is_alone: bool
) -> ArrayWeights:
    from openpi.weights import orbax_parts

    found = orbax_parts.open_arrays(params)
    if is_alone:
        return of_arrays(table, found, may_keep=may_keep, source=source)
    stored = dict(elsewhere) | {path: array.shape for path, array in found.items()}
    report = compare(names.shapes_of(table), stored, may_keep=may_keep, source=source)
    return ArrayWeights(table, report, found)


def of_arrays(table: Sequence[Row], arrays: Mapping[str, Array], *, source: str, may_keep: str = _NONE) -> ArrayWeights:
    """Arrays of the tree as weights of a model.

    Raises:
        ValueError: as of `open_weights`.
    """
    _refuse_strangers(table, arrays, arrays, source)
    shapes = {path: array.shape for path, array in arrays.items()}
    return ArrayWeights(table, compare(names.shapes_of(table), shapes, may_keep=may_keep, source=source), arrays)


class ArrayWeights:
    """`Weights` of arrays of the tree.

    Args:
        report: by paths of the tree.
        arrays: by path.
    """

    base: AdapterBase | None = None

    def __init__(self, table: Sequence[Row], report: LoadReport, arrays: Mapping[str, Array]) -> None:
        self.table: Sequence[Row] = table
        loaded, kept = set(report.loaded), set(report.kept)
        self.report = dataclasses.replace(
            report,
            loaded=tuple(row.released for row in table if row.tree in loaded),
            kept=tuple(row.released for row in table if row.tree in kept),
        )
        self._arrays = arrays

    def has(self, row: Row) -> bool:
        return row.tree in self._arrays

    def dtype(self, row: Row) -> np.dtype:
        return self._arrays[row.tree].dtype

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        members: dict[str, dict[tuple[int, ...], Row]] = {}
        for row in self.table:
            if self.has(row) and (only is None or only(row.released)):
                members.setdefault(row.tree, {})[row.index] = row
        for path, rows in members.items():
            yield from _blocks_of(self._arrays[path], rows)


def _blocks_of(array: Array, rows: Mapping[tuple[int, ...], Row]) -> Iterator[Block]:
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


def _open_safetensors(
    table: Sequence[Row],
    tensors: safetensors_io.Tensors,
    elsewhere: Shapes,
    may_keep: str,
    source: str,
    *,
    is_alone: bool,
) -> _SafetensorsWeights:
    if peft := spelling.adapters_of_peft(tensors):
        raise ValueError(
            f"{source} holds adapters of the library peft, such as {peft[0]}, which are not read here: merge them into "
            "their base first (`merge_and_unload()` of peft), and save the result"
        )
    spelled = spelling.Spelling.of(tensors, {row.torch: row.released for row in table})
    if is_alone:
        _refuse_strangers(table, spelled.names, tensors, source)
    for remark in spelled.remarks:
        _say_once(f"{source}: {remark}")
    weights = _SafetensorsWeights(table, tensors, spelled, elsewhere, may_keep, source)
    if is_alone:
        _refuse_companions(weights.read_names, weights.report.unused, source)
    return weights


@functools.cache
def _say_once(text: str) -> None:
    """Weights are opened more than once on their way, to compare shapes and to read them."""
    logger.info("%s", text)


class _SafetensorsWeights:
    base: AdapterBase | None = None

    def __init__(
        self,
        table: Sequence[Row],
        tensors: safetensors_io.Tensors,
        spelled: spelling.Spelling,
        elsewhere: Shapes,
        may_keep: str,
        source: str,
    ) -> None:
        self.table: Sequence[Row] = table
        self._tensors = tensors
        self._names = {
            row.released: second_names.one_of(spelled.names[row.released], tensors, source)
            for row in table
            if row.released in spelled.names
        }
        shapes, trees = tensors.shapes, names.shapes_of(table)
        stored = {released: shapes[name] for released, name in self._names.items()}
        for row in table:
            if row.released not in self._names and row.tree in elsewhere:
                whole = elsewhere[row.tree]
                stored[row.released] = row.shape if whole == trees[row.tree] else whole
        unused = {
            name: shapes[name]
            for released, those in spelled.names.items()
            if released not in self._names and not spelling.is_known_unused(released)
            for name in those
        }
        unused |= {path: elsewhere[path] for path in elsewhere if path not in trees}
        model = {row.released: row.shape for row in table}
        self.report = compare(model, stored | unused, may_keep=may_keep, source=source)

    @property
    def read_names(self) -> Collection[str]:
        """Of the tensors, in the file."""
        return self._names.values()

    def has(self, row: Row) -> bool:
        return row.released in self._names

    def dtype(self, row: Row) -> np.dtype:
        return self._tensors.spec(self._names[row.released]).dtype

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        for row in self.table:
            if self.has(row) and (only is None or only(row.released)):
                for start, values in self._tensors.rows(self._names[row.released], whole=not row.is_plain):
                    yield Block(row, start, values)


class _WithBase:
    """Weights of a checkpoint, and behind them those of its base."""

    def __init__(self, own: ArrayWeights | _SafetensorsWeights, base: AdapterBase) -> None:
        self.table: Sequence[Row] = own.table
        self.report, self._own = own.report, own
        left_out = [row for row in own.table if not own.has(row)]
        of_base = {row.tree for row in left_out}
        self.base: AdapterBase | None = dataclasses.replace(
            base, frozen={k: v for k, v in base.frozen.items() if k in of_base}
        )
        self._behind = open_base(left_out, base)

    def dtype(self, row: Row) -> np.dtype:
        return self._own.dtype(row) if self._own.has(row) else self._behind.dtype(row)

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        yield from self._own.blocks(only)
        yield from self._behind.blocks(only)


class _BaseWeights:
    """See `open_base`."""

    base: AdapterBase | None = None

    def __init__(self, table: Sequence[Row], base: AdapterBase) -> None:
        self.table: Sequence[Row] = table
        self._base = base
        folder = base.folder()
        try:
            self._weights = _open(table, folder, source=base.place, is_base=True)
        except ValueError as error:
            raise ValueError(f"{error}\n{base.expected}") from error
        self.report = self._weights.report

    def dtype(self, row: Row) -> np.dtype:
        return _BFLOAT16

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        digests = Digests({path: entry.shape for path, entry in self._base.frozen.items()})
        for block in self._weights.blocks(only):
            frozen = dataclasses.replace(block, values=block.values.astype(_BFLOAT16))
            digest = _digest(digests, frozen)
            if digest is not None:
                self._base.check(block.row.tree, digest)
            yield frozen


def _digest(digests: Digests, block: Block) -> str | None:
    values = block.row.to_tree(block.values) if block.is_whole else block.values
    return digests.add(block.row.tree, values, block.row.index, block.start)


def _refuse_strangers(table: Sequence[Row], found: Collection[str], shown: Collection[str], source: str) -> None:
    """Weights of another family, or of none; the names say what is there, its path does not.

    Args:
        found: names of the table's kind, released ones or paths of the tree.
        shown: those in the file.
    """
    wanted = [row.released for row in table] + [row.tree for row in table]
    if table and not set(wanted) & set(found):
        raise ValueError(
            f"{source} holds no weights of these models: it has {_three(shown)}; expected names such as "
            f"{_three([row.released for row in table])}, or arrays such as {_three([row.tree for row in table])}"
        )
    family, expected = spelling.family(found), spelling.family({row.released for row in table})
    if family is not None and expected is not None and family != expected:
        alone = " (or PaliGemma alone: no name of an action expert)" if family == "pi0-FAST" else ""
        raise ValueError(
            f"{source} holds {family}{alone}, and the recipe's model is {expected}; name another recipe (--config)"
        )


def _three(listed: Collection[str]) -> str:
    return ", ".join(list(dict.fromkeys(listed))[:3]) or "nothing"


def _refuse_adapters(report: LoadReport) -> None:
    adapters = [name for name in report.unused if "lora" in name]
    if adapters:
        raise ValueError(
            f"{report.source} has adapters that the model has not, such as {adapters[0]}: without them it is another "
            "policy. Name the LoRA recipe that it was trained with, or merge them first: `openpi export --merge`"
        )


def _refuse_integers(weights: ArrayWeights | _SafetensorsWeights, source: str) -> None:
    for row in weights.table:
        if weights.has(row) and (dtype := weights.dtype(row)).kind in "iub":
            raise ValueError(f"{source} has '{row.released}' as {dtype}; expected floating point numbers. {_QUANTISED}")


def _refuse_companions(read: Collection[str], unused: Iterable[str], source: str) -> None:
    """Tensors of modules that the model has, which it would compute without: scales of a quantisation, a bias.

    Args:
        read, unused: names in the file.
    """
    modules = {name.rpartition(".")[0] for name in read}.union(read)
    for name in unused:
        if name.rpartition(".")[0] in modules and "lora" not in name:
            raise ValueError(
                f"{source} has '{name}' beside what the model reads of this module, and the model does not apply it: "
                f"it would be another policy. {_QUANTISED}"
            )


def _has_prefix(stored: Collection[str]) -> bool:
    return bool(stored) and all(spelling.unwrapped(name).startswith(spelling.LEROBOT_PREFIX) for name in stored)


def _params_folder(folder: Path) -> Path | None:
    for params in (folder / "params", folder):
        if (params / "_METADATA").is_file() or (params.name == "params" and params.is_dir()):
            return params
    return None
