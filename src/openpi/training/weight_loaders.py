"""Where training starts from: parameters on disk, merged into a fresh initialisation.

The published interface: `load(params)` takes the reference tree (arrays or shapes) and returns the tree to start
from, NumPy where it was loaded and the reference's leaf where it keeps its initial value. Besides, `check(params)`
says what would be loaded, from shapes alone. Source: the checkpoint specification, section 3. JAX-free at import;
`weights.orbax_io` is imported when something is read.
"""

from __future__ import annotations

import abc
import dataclasses
import logging
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Protocol, Self, TypeGuard, runtime_checkable

import numpy as np

from openpi.shared import download
from openpi.shared.errors import first_line
from openpi.shared.tree import Params, Tree, flatten, unflatten
from openpi.weights import names, opening, published_tree
from openpi.weights.blocks import Array, Weights
from openpi.weights.compare import LoadReport, Shapes, compare
from openpi.weights.safetensors_io import rows_per_block
from openpi.weights.stored import ArrayWeights

logger = logging.getLogger(__name__)

PALIGEMMA_NPZ = "gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz"


@runtime_checkable
class WeightLoader(Protocol):
    """Builds the starting parameters."""

    def load(self, params: Mapping[str, object]) -> Params:
        """A tree of the structure, shapes and dtypes of `params`; leaves may be those of `params` themselves.

        Raises:
            ValueError: what is on disk does not fit, or is damaged.
        """
        ...


class _OpenedWeightLoader(WeightLoader):
    """Loaders of ours: `open` says what there is, tensor by tensor, and the rest follows from it."""

    @abc.abstractmethod
    def open(self, params: Mapping[str, object]) -> Weights:
        """What `load` would read; errors as of `check`."""

    def check(self, params: Mapping[str, object]) -> LoadReport:
        """What `load` would do, and its errors; reads shapes only, after the download.

        Raises:
            ValueError: as of `load`.
            FileNotFoundError, ConnectionError: as of `maybe_download`.
        """
        return published_tree.by_path(self.open(params))

    def load(self, params: Mapping[str, object]) -> Params:
        weights = self.open(params)
        logger.info("%s", published_tree.by_path(weights))
        return overlay(params, published_tree.tree_of(weights))


@dataclasses.dataclass(frozen=True)
class NoOpWeightLoader(_OpenedWeightLoader):
    """Random initialisation."""

    def open(self, params: Mapping[str, object]) -> Weights:
        return _weights_of({}, _shapes(flatten(params)), source="nowhere (random initialisation)")


@dataclasses.dataclass(frozen=True)
class CheckpointWeightLoader(_OpenedWeightLoader):
    """A checkpoint's weights; adapters (`lora`) that it lacks keep their initial values.

    Attributes:
        params_path: a `params/` folder, released or from training, or a folder with `model.safetensors` (PyTorch,
            LeRobot). Local, a URL, or `package:<package>[/<folder>]` for weights inside an installed package.
    """

    params_path: str

    def open(self, params: Mapping[str, object]) -> Weights:
        folder, shapes = download.maybe_download(self.params_path), _shapes(flatten(params))
        return opening.open_tree(shapes, folder, may_lack_adapters=True, source=self.params_path)


@dataclasses.dataclass(frozen=True)
class PaliGemmaWeightLoader(_OpenedWeightLoader):
    """The official PaliGemma weights; everything that PaliGemma does not have keeps its initial values.

    Attributes:
        npz_path: the `pt_224.npz` of the big_vision release.
    """

    npz_path: str = PALIGEMMA_NPZ

    def open(self, params: Mapping[str, object]) -> Weights:
        file = download.maybe_download(self.npz_path, gs={"token": "anon"})
        try:
            with zipfile.ZipFile(file) as archive:
                paths = {name: path for name in archive.namelist() if (path := _from_paligemma(name)) is not None}
                members = {path: _Member.of(archive, name) for name, path in paths.items()}
        except zipfile.BadZipFile as error:
            raise ValueError(f"{file} is damaged, or no npz file ({first_line(error)}); bring it here again") from error
        if not members:
            raise ValueError(f"{file} has no arrays below 'params/'; expected the PaliGemma release pt_224.npz")
        return _weights_of(members, _shapes(flatten(params)), source=self.npz_path)


def opens(loader: WeightLoader) -> TypeGuard[_OpenedWeightLoader]:
    """Whether a loader says what it has before that is read: of a subclass with a `load` of its own, that is meant."""
    owners = [kind for kind in type(loader).__mro__ if {"open", "load"} & vars(kind).keys()]
    return bool(owners) and "open" in vars(owners[0])


def open_weights(loader: WeightLoader, params: Mapping[str, object]) -> Weights:
    """What a loader has, tensor by tensor; one of a user's own, with `load` alone, reads all of it now.

    Args:
        params: the reference tree, as shapes.
    Raises:
        FileNotFoundError, ValueError: as of `WeightLoader.load`; or what it returns is not all of `params`.
    """
    weights = loader.open(params) if opens(loader) else _weights_of_own(loader, params)
    logger.info("%s", published_tree.by_path(weights))
    return weights


def _weights_of_own(loader: WeightLoader, params: Mapping[str, object]) -> ArrayWeights:
    """What its `load` returns, all of it: a leaf that is not in it would be random, and nobody would know."""
    tree, shapes, source = flatten(loader.load(params)), _shapes(flatten(params)), type(loader).__name__
    compare(shapes, _shapes(tree), may_keep="", source=source)
    arrays = {path: _InMemory(np.asarray(leaf)) for path, leaf in tree.items() if hasattr(leaf, "__array__")}
    return _weights_of(arrays, shapes, source=source)


def _weights_of(arrays: Mapping[str, Array], shapes: Shapes, *, source: str) -> ArrayWeights:
    """All of which may be missing."""
    report = compare(shapes, _shapes(arrays), may_keep=".*", source=source)
    return ArrayWeights(names.rows_of(shapes), report, arrays)


def overlay(reference: Mapping[str, object], loaded: Mapping[str, object], may_keep: str = ".*") -> dict[str, object]:
    """The reference tree with the loaded leaves put in; unknown ones are dropped, dtypes follow the reference.

    Args:
        may_keep: what lacks a loaded leaf and matches this, whole, has the reference's; what does not is left out.
    """
    found, is_kept = flatten(loaded), re.compile(may_keep).fullmatch
    return unflatten(
        {
            path: found[path].astype(leaf.dtype, copy=False) if path in found else leaf
            for path, leaf in flatten(reference).items()
            if path in found or is_kept(path)
        }
    )


def _merge_params(
    loaded_params: Mapping[str, object], params: Mapping[str, object], *, missing_regex: str
) -> dict[str, object]:
    """`overlay` as loaders of users' own call it, by its published name."""
    return overlay(params, loaded_params, missing_regex)


def _shapes(leaves: Tree) -> Shapes:
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def _from_paligemma(member: str) -> str | None:
    """Our path of a member of the released archive, `params/<path>.npy`; None for what is no parameter."""
    path = member.removesuffix(".npy").removeprefix("params/")
    return f"PaliGemma/{path}" if member.startswith("params/") else None


@dataclasses.dataclass(frozen=True)
class _InMemory:
    """A `blocks.Array` that is there already."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    def read(self) -> np.ndarray:
        return self.values

    def rows(self) -> Iterator[tuple[int, np.ndarray]]:
        yield 0, self.values


@dataclasses.dataclass(frozen=True)
class _Member:
    """A `blocks.Array` in an npz file."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    is_in_c_order: bool

    @classmethod
    def of(cls, archive: zipfile.ZipFile, name: str) -> Self:
        with archive.open(name) as stream:
            shape, is_fortran, dtype = _read_header(stream)
        return cls(str(archive.filename), name, shape, dtype, not is_fortran)

    def read(self) -> np.ndarray:
        with zipfile.ZipFile(self.file) as archive, archive.open(self.name) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    def rows(self) -> Iterator[tuple[int, np.ndarray]]:
        per_block = rows_per_block(self.shape, self.dtype.itemsize) if self.shape and self.is_in_c_order else 0
        if not per_block or per_block >= self.shape[0]:
            yield 0, self.read()
            return
        with zipfile.ZipFile(self.file) as archive, archive.open(self.name) as stream:
            _read_header(stream)
            for start in range(0, self.shape[0], per_block):
                extents = (min(per_block, self.shape[0] - start), *self.shape[1:])
                data = stream.read(math.prod(extents) * self.dtype.itemsize)
                yield start, np.frombuffer(data, self.dtype).reshape(extents)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)
