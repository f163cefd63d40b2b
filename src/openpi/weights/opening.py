"""The weights of a checkpoint in any layout, compared with a model by names and shapes.

Where a checkpoint holds adapters alone, the rest is read from its base, which has any of the layouts, too. No framework
here. Source: the checkpoint specification, sections 1 to 5.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from openpi.weights import names, safetensors_io, spelling
from openpi.weights.adapter_base import AdapterBase, Digests, Frozen
from openpi.weights.blocks import Array, Block, Select, Weights
from openpi.weights.compare import Shapes, compare
from openpi.weights.layout import Layout, find_layout, params_folder
from openpi.weights.names import Row
from openpi.weights.refusals import refuse_adapters, refuse_companions, refuse_integers, refuse_strangers
from openpi.weights.stored import ArrayWeights, TensorWeights

logger = logging.getLogger(__name__)

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_NONE = "(?!)"  # pattern that nothing matches
_ADAPTERS = ".*lora.*"


def open_weights(config: object, folder: Path, *, without: Sequence[str] = (), layout: Layout | None = None) -> Weights:
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


def open_base(table: Sequence[Row], base: AdapterBase, above: Sequence[Path] = (Path(),)) -> Weights:
    """What adapters read from their base, in bfloat16, as training held it.

    Arrays of the tree that are read whole are compared with what the adapters expect.

    Args:
        table: arrays of it that are frozen are read.
        above: the folders whose base it is.
    Raises:
        FileNotFoundError, ValueError: as of `open_weights`.
    """
    return _BaseWeights([row for row in table if row.tree in base.frozen], base, above)


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


def _open(
    table: Sequence[Row],
    folder: Path,
    *,
    may_keep: str = _NONE,
    source: str | None = None,
    above: Sequence[Path] = (),
    without: Sequence[str] = (),
    layout: Layout | None = None,
) -> Weights:
    """As of `open_tree` and `open_weights`.

    Args:
        above: whose base it is, and whose base that is; there may be more in a base than the table has.
    """
    is_base = bool(above)
    if folder.resolve() in above:
        raise ValueError(f"{folder} holds adapters whose base is, in the end, that folder itself")
    params = params_folder(folder) if (layout or find_layout(folder)) is Layout.JAX else None
    base = AdapterBase.load(folder if params is None else params.parent)
    elsewhere = {} if base is None else {path: entry.shape for path, entry in base.frozen.items()}
    is_alone = base is None and not is_base
    own: ArrayWeights | TensorWeights
    if params is not None:
        if without:
            raise ValueError(f"{params} is no file of tensors: none of its arrays can be left out, as {without[0]}")
        own = _open_orbax(table, params, elsewhere, may_keep, source or str(params), is_alone=is_alone)
    else:
        tensors = safetensors_io.open_tensors(folder).without(without)
        own = _open_safetensors(table, tensors, elsewhere, may_keep, source or str(folder), is_alone=is_alone)
    if not is_base:
        refuse_adapters(own.report)
    refuse_integers(own, source or str(folder))
    return own if base is None else _WithBase(own, base, (*above, folder.resolve()))


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
    refuse_strangers(table, arrays, arrays, source)
    shapes = {path: array.shape for path, array in arrays.items()}
    return ArrayWeights(table, compare(names.shapes_of(table), shapes, may_keep=may_keep, source=source), arrays)


def _open_safetensors(
    table: Sequence[Row],
    tensors: safetensors_io.Tensors,
    elsewhere: Shapes,
    may_keep: str,
    source: str,
    *,
    is_alone: bool,
) -> TensorWeights:
    if peft := spelling.adapters_of_peft(tensors):
        raise ValueError(
            f"{source} holds adapters of the library peft, such as {peft[0]}, which are not read here: merge them into "
            "their base first (`merge_and_unload()` of peft), and save the result"
        )
    spelled = spelling.Spelling.of(tensors, {row.torch: row.released for row in table})
    if is_alone:
        refuse_strangers(table, spelled.names, tensors, source)
    for remark in spelled.remarks:
        _say_once(f"{source}: {remark}")
    weights = TensorWeights(table, tensors, spelled, elsewhere, may_keep, source)
    if is_alone:
        refuse_companions(weights.read_names, weights.report.unused, source)
    return weights


@functools.cache
def _say_once(text: str) -> None:
    """Weights are opened more than once on their way, to compare shapes and to read them."""
    logger.info("%s", text)


class _WithBase:
    """Weights of a checkpoint, and behind them those of its base."""

    def __init__(self, own: ArrayWeights | TensorWeights, base: AdapterBase, above: Sequence[Path]) -> None:
        self.table: Sequence[Row] = own.table
        self.report, self._own = own.report, own
        left_out = [row for row in own.table if not own.has(row)]
        of_base = {row.tree for row in left_out}
        self.base: AdapterBase | None = dataclasses.replace(
            base, frozen={k: v for k, v in base.frozen.items() if k in of_base}
        )
        self._behind = open_base(left_out, base, above)

    def dtype(self, row: Row) -> np.dtype:
        return self._own.dtype(row) if self._own.has(row) else self._behind.dtype(row)

    def blocks(self, only: Select | None = None) -> Iterator[Block]:
        yield from self._own.blocks(only)
        yield from self._behind.blocks(only)


class _BaseWeights:
    """See `open_base`."""

    base: AdapterBase | None = None

    def __init__(self, table: Sequence[Row], base: AdapterBase, above: Sequence[Path]) -> None:
        self.table: Sequence[Row] = table
        self._base = base
        folder = base.folder()
        try:
            self._weights = _open(table, folder, source=base.place, above=above)
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
