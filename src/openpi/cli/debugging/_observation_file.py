"""Observations and action chunks as `.npz`: one array for each '/'-joined key, text as 0-d string arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from openpi.shared import whole_file
from openpi.shared.budgets import MAX_ARRAYS_BYTES, Budget, read_npy, read_npz
from openpi.shared.tree import flatten, unflatten
from openpi_client.base_policy import Observation


def load_observation(path: Path | str) -> Observation:
    """A client's observation. Values are found under nested keys and under '/'-joined ones alike.

    Robots differ in which of the two their clients send (`images` -> `cam_high`, but `observation/image`), and a file
    cannot tell. Once flattened, both are the same.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; what is wrong is named.
    """
    flat = {key: _value(array) for key, array in _read(Path(path)).items()}
    return {**unflatten(flat), **flat}


def load_array(path: Path | str, *, key: str) -> np.ndarray:
    """The array of a `.npy` file, or the one under `key` in an `.npz` file.

    Raises:
        FileNotFoundError, ValueError: not such a file; what is wrong is named.
    """
    path = Path(path)
    if path.suffix == ".npz":
        arrays = _read(path)
        if key not in arrays:
            raise ValueError(f"{path} has no array '{key}'; found: {', '.join(arrays) or 'nothing'}")
        return arrays[key]
    _require(path)
    try:
        with path.open("rb") as file:
            return read_npy(file, Budget(MAX_ARRAYS_BYTES), "an array")
    except ValueError as error:
        raise ValueError(f"{path} is no NumPy array file: {error}") from error


def save_arrays(path: Path | str, tree: Mapping[str, object]) -> Path:
    """Writes nested arrays and numbers under '/'-joined keys, complete or not at all; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file.replacing(path) as partial, partial.open("wb") as file:
        arrays = {key: np.asarray(value) for key, value in flatten(tree).items()}
        np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes the arrays for its own options
    return path


def _value(array: np.ndarray) -> object:
    """Text as `str` (or `bytes`), as clients send it."""
    return array.item() if array.dtype.kind in "US" and array.ndim == 0 else array


def _read(path: Path) -> dict[str, np.ndarray]:
    _require(path)
    try:
        with path.open("rb") as file:
            return read_npz(file, Budget(MAX_ARRAYS_BYTES))
    except ValueError as error:
        raise ValueError(
            f"{path} is no observation file: {error}. Expected an .npz made by np.savez with one array for each "
            "'/'-joined key, and text as 0-d string arrays"
        ) from error


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (absolute: {path.absolute()})")
