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
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openpi.shared import download
from openpi.shared.errors import first_line
from openpi.shared.tree import flatten, unflatten
from openpi.weights import layout, names, safetensors_io
from openpi.weights.compare import LoadReport, Shapes, compare

logger = logging.getLogger("openpi")

PALIGEMMA_NPZ = "gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz"


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
    """A checkpoint's weights; adapters (`lora`) that it lacks keep their initial values.

    Attributes:
        params_path: a `params/` folder, released or from training, or a folder with `model.safetensors` (PyTorch,
            LeRobot). Local, a URL, or `package:<package>[/<folder>]` for weights inside an installed package.
    """

    params_path: str

    def check(self, params: Mapping[str, Any]) -> LoadReport:
        """What `load` would do, and its errors; reads shapes only, after the download.

        Raises:
            ValueError: as of `load`.
            FileNotFoundError, ConnectionError: as of `maybe_download`.
        """
        folder, shapes = download.maybe_download(self.params_path), _shapes(flatten(params))
        if safetensors_io.is_here(folder):
            return layout.check_tree(shapes, folder)
        from openpi.weights import orbax_io

        return compare(shapes, _shapes(orbax_io.params_metadata(folder)), may_keep=".*lora.*", source=self.params_path)

    def load(self, params: Mapping[str, Any]) -> dict[str, Any]:
        report = self.check(params)
        logger.info("%s", report)
        folder, wanted = download.maybe_download(self.params_path), set(report.loaded)
        if safetensors_io.is_here(folder):
            dims = names.dims_of(_shapes(flatten(params)))
            return overlay(params, layout.read_tree(dims, folder, only=wanted, may_lack_adapters=True))
        from openpi.weights import orbax_io

        return overlay(params, orbax_io.read_params(folder, only=wanted))


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


def overlay(reference: Mapping[str, Any], loaded: Mapping[str, Any]) -> dict[str, Any]:
    """The reference tree with the loaded leaves put in; unknown ones are dropped, dtypes follow the reference."""
    found = flatten(loaded)
    return unflatten(
        {
            path: found[path].astype(leaf.dtype, copy=False) if path in found else leaf
            for path, leaf in flatten(reference).items()
        }
    )


def _shapes(leaves: Mapping[str, Any]) -> Shapes:
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}


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
