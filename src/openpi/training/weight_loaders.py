"""Where training starts from: parameters on disk, merged into a fresh initialisation.

The published interface: `load(params)` takes the reference tree (arrays or shapes) and returns the tree to start
from, NumPy where it was loaded and the reference's leaf where it keeps its initial value. Besides, `check(params)`
says what would be loaded, from shapes alone. Source: the checkpoint specification, section 3. JAX-free at import;
`weights.orbax_io` is imported when something is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openpi.shared import download
from openpi.shared.errors import first_line
from openpi.shared.tree import flatten, unflatten

logger = logging.getLogger("openpi")

PALIGEMMA_NPZ = "gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz"

_MAX_SHOWN = 10
_Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What becomes of each parameter, by '/'-joined path.

    Attributes:
        source: the weights, as the recipe names them.
        loaded: of the model, from the source.
        kept: of the model, not in the source: they keep their initial values.
        unused: in the source, not in the model.
        num_values: how many numbers are loaded, and how many keep their initial value.
    """

    source: str
    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]
    num_values: tuple[int, int]

    def __str__(self) -> str:
        loaded, kept = self.num_values
        parts = [f"{len(self.loaded)} arrays ({loaded:,} values) loaded"]
        if self.kept:
            parts.append(f"{len(self.kept)} ({kept:,} values) keep their initial values: {_some(self.kept)}")
        if self.unused:
            parts.append(f"{len(self.unused)} unused: {_some(self.unused)}")
        return f"weights from {self.source}: {'; '.join(parts)}"


@runtime_checkable
class WeightLoader(Protocol):
    """Builds the starting parameters."""

    def load(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A tree of the structure, shapes and dtypes of `params`; leaves may be those of `params` themselves.

        Raises:
            ValueError: what is on disk does not fit, or is damaged.
        """
        ...


@dataclasses.dataclass(frozen=True)
class NoOpWeightLoader(WeightLoader):
    """Random initialisation."""

    def check(self, params: Mapping[str, Any]) -> LoadReport:
        """Everything keeps its initial value."""
        return compare(_shapes(flatten(params)), {}, may_keep=".*", source="nowhere (random initialisation)")

    def load(self, params: Mapping[str, Any]) -> dict[str, Any]:
        logger.info("%s", self.check(params))
        return dict(params)


@dataclasses.dataclass(frozen=True)
class CheckpointWeightLoader(WeightLoader):
    """A `params/` folder, released or from training; adapters (`lora`) that it lacks keep their initial values.

    Attributes:
        params_path: local folder, URL, or `package:<package>[/<folder>]` for weights inside an installed package.
    """

    params_path: str

    def check(self, params: Mapping[str, Any]) -> LoadReport:
        """What `load` would do, and its errors; reads shapes only, after the download.

        Raises:
            ValueError: as of `load`.
            FileNotFoundError, ConnectionError: as of `maybe_download`.
        """
        from openpi.weights import orbax_io

        stored = orbax_io.params_metadata(download.maybe_download(self.params_path))
        return compare(_shapes(flatten(params)), _shapes(stored), may_keep=".*lora.*", source=self.params_path)

    def load(self, params: Mapping[str, Any]) -> dict[str, Any]:
        from openpi.weights import orbax_io

        report = self.check(params)
        logger.info("%s", report)
        return overlay(params, orbax_io.read_params(download.maybe_download(self.params_path), only=set(report.loaded)))


@dataclasses.dataclass(frozen=True)
class PaliGemmaWeightLoader(WeightLoader):
    """The official PaliGemma weights; everything that PaliGemma does not have keeps its initial values.

    Attributes:
        npz_path: the `pt_224.npz` of the big_vision release.
    """

    npz_path: str = PALIGEMMA_NPZ

    def check(self, params: Mapping[str, Any]) -> LoadReport:
        """As of `CheckpointWeightLoader`."""
        with self._opened() as archive:
            stored = {_from_paligemma(name): _npy_shape(archive, name) for name in archive.namelist()}
        stored = {path: shape for path, shape in stored.items() if path is not None}
        return compare(_shapes(flatten(params)), stored, may_keep=".*", source=self.npz_path)

    def load(self, params: Mapping[str, Any]) -> dict[str, Any]:
        report = self.check(params)
        logger.info("%s", report)
        with self._opened() as archive:
            names = {_from_paligemma(name): name for name in archive.namelist()}
            loaded = {path: _read_npy(archive, names[path]) for path in report.loaded}
        return overlay(params, unflatten(loaded))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        path = download.maybe_download(self.npz_path, gs={"token": "anon"})
        try:
            with zipfile.ZipFile(path) as archive:
                if not any(map(_from_paligemma, archive.namelist())):
                    raise ValueError(f"{path} has no arrays below 'params/'; expected the PaliGemma release pt_224.npz")
                yield archive
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is damaged, or no npz file ({first_line(error)}); bring it here again") from error


def compare(model: _Shapes, stored: _Shapes, *, may_keep: str, source: str) -> LoadReport:
    """What loading `stored` into `model` does, both as shapes by path.

    Args:
        may_keep: pattern of whole paths that may be missing in `stored`.
        source: named in the report and in errors.
    Raises:
        ValueError: leaves are missing or have another shape; they are counted, and ten are shown.
    """
    kept = tuple(path for path in model if path not in stored)
    unused = tuple(path for path in stored if path not in model)
    problems = [f"{path}: missing, the model has {model[path]}" for path in kept if not re.fullmatch(may_keep, path)]
    problems += [
        f"{path}: shape {stored[path]}, the model has {model[path]}"
        for path in model
        if path in stored and stored[path] != model[path]
    ]
    if problems:
        raise ValueError(_mismatch(sorted(problems), unused, len(model), source))
    loaded = tuple(path for path in model if path in stored)
    num_values = (_num_values(model, loaded), _num_values(model, kept))
    return LoadReport(source, loaded, kept, unused, num_values)


def overlay(reference: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The reference tree with the loaded leaves put in; unknown ones are dropped, dtypes follow the reference."""
    found = flatten(loaded)
    return unflatten(
        {
            path: found[path].astype(leaf.dtype, copy=False) if path in found else leaf
            for path, leaf in flatten(reference).items()
        }
    )


def _shapes(leaves: Mapping[str, Any]) -> _Shapes:
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


def _num_values(shapes: _Shapes, paths: Collection[str]) -> int:
    return sum(math.prod(shapes[path]) for path in paths)


def _mismatch(problems: list[str], unused: tuple[str, ...], num_model: int, source: str) -> str:
    lines = problems[:_MAX_SHOWN]
    if len(problems) > _MAX_SHOWN:
        lines.append(f"and {len(problems) - _MAX_SHOWN} more")
    if unused:
        lines.append(f"{len(unused)} of the weights are not in the model: {_some(unused)}")
    return (
        f"the weights in {source} do not fit the model, {len(problems)} of {num_model} arrays differ (is it the same "
        "model family and width?):\n  " + "\n  ".join(lines)
    )


def _some(paths: tuple[str, ...]) -> str:
    return ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")


def _from_paligemma(member: str) -> str | None:
    """Our path of a member of the released archive, `params/<path>.npy`; None for what is no parameter."""
    path = member.removesuffix(".npy").removeprefix("params/")
    return f"PaliGemma/{path}" if member.startswith("params/") else None


def _npy_shape(archive: zipfile.ZipFile, member: str) -> tuple[int, ...]:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)[0]


def _read_npy(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
