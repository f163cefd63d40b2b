"""Where training starts from: parameters on disk, merged into a fresh initialisation.

The published interface: `load(params)` takes the reference tree (arrays or shapes) and returns the tree to start
from, NumPy where it was loaded and the reference's leaf where it keeps its initial value. Source: the checkpoint
specification, section 3. JAX-free at import; `weights.orbax_io` is imported when something is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openpi.shared import download
from openpi.shared.tree import flatten, unflatten

PALIGEMMA_NPZ = "gs://vertex-model-garden-paligemma-us/paligemma/pt_224.npz"


@runtime_checkable
class WeightLoader(Protocol):
    """Builds the starting parameters."""

    def load(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """A tree of the structure, shapes and dtypes of `params`; leaves may be those of `params` themselves.

        Raises:
            ValueError: what is on disk does not fit; every differing path is named.
        """
        ...


@dataclasses.dataclass(frozen=True)
class NoOpWeightLoader(WeightLoader):
    """Random initialisation."""

    def load(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return dict(params)


@dataclasses.dataclass(frozen=True)
class CheckpointWeightLoader(WeightLoader):
    """A `params/` folder, released or from training; adapters (`lora`) that it lacks keep their initial values.

    Attributes:
        params_path: local folder, URL, or `package:<package>[/<folder>]` for weights inside an installed package.
    """

    params_path: str

    def load(self, params: Mapping[str, Any]) -> dict[str, Any]:
        from openpi.weights import orbax_io

        loaded = orbax_io.read_params(download.maybe_download(self.params_path))
        return merge(params, loaded, may_keep=".*lora.*", source=self.params_path)


@dataclasses.dataclass(frozen=True)
class PaliGemmaWeightLoader(WeightLoader):
    """The official PaliGemma weights; everything that PaliGemma does not have keeps its initial values.

    Attributes:
        npz_path: the `pt_224.npz` of the big_vision release.
    """

    npz_path: str = PALIGEMMA_NPZ

    def load(self, params: Mapping[str, Any]) -> dict[str, Any]:
        path = download.maybe_download(self.npz_path, gs={"token": "anon"})
        with np.load(path, allow_pickle=False) as archive:
            flat = {name: archive[name] for name in archive.files if name.startswith("params/")}
        if not flat:
            raise ValueError(f"{path} has no arrays below 'params/'; expected the PaliGemma release pt_224.npz")
        loaded = {f"PaliGemma/{name.removeprefix('params/')}": array for name, array in flat.items()}
        return merge(params, unflatten(loaded), may_keep=".*", source=self.npz_path)


def merge(reference: Mapping[str, Any], loaded: Mapping[str, Any], *, may_keep: str, source: str) -> dict[str, Any]:
    """Overlays `loaded` on `reference`; unknown leaves are dropped, dtypes follow the reference.

    Args:
        may_keep: pattern of whole paths that may be missing in `loaded`.
        source: named in errors.
    Raises:
        ValueError: leaves are missing or have another shape; all of them are listed.
    """
    wanted, found = flatten(reference), flatten(loaded)
    missing = [path for path in wanted if path not in found and not re.fullmatch(may_keep, path)]
    misshaped = [p for p in wanted if p in found and tuple(found[p].shape) != tuple(wanted[p].shape)]
    if missing or misshaped:
        raise ValueError(_mismatch(wanted, found, missing, misshaped, source))
    return unflatten(
        {path: found[path].astype(leaf.dtype, copy=False) if path in found else leaf for path, leaf in wanted.items()}
    )


def _mismatch(wanted: Any, found: Any, missing: list[str], misshaped: list[str], source: str) -> str:
    lines = [f"{path}: missing, the model has {tuple(wanted[path].shape)}" for path in missing]
    lines += [
        f"{path}: shape {tuple(found[path].shape)}, the model has {tuple(wanted[path].shape)}" for path in misshaped
    ]
    lines += [f"{path}: not in the model" for path in found if path not in wanted]
    return f"the weights in {source} do not fit the model (is it the same model family and width?):\n  " + "\n  ".join(
        sorted(lines)
    )
