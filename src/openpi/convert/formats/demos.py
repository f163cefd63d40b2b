"""HDF5 files with many episodes, `data/demo_<n>`, as robosuite, robomimic and LIBERO write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from openpi.convert.formats.hdf5 import Hdf5File
from openpi.convert.source import EpisodeRef, Numbers, found, joined, relative
from openpi.shared import strict_json
from openpi.shared.errors import listed
from openpi.shared.strict_json import Json

CONTROL_HZ = 20  # of robosuite, where a file does not say


def list_demos(root: Path, subset: str | None = None) -> list[EpisodeRef]:
    """Every episode of every file, in natural order.

    Args:
        subset: a list of episodes that the files name under `mask`; None = all.
    Raises:
        ValueError: a file is none of these, or has no such list.
    """
    refs = []
    for path in found(root, ["**/*.hdf5", "**/*.h5"], "HDF5 files of episodes (data/demo_<n>)"):
        with Hdf5File(path) as file:
            demos = [name for name in file.names("data") if file.is_group(f"data/{name}")] if file.has("data") else []
            if not demos:
                raise ValueError(f"{path} has no episodes data/demo_<n>; it has {listed(file.names())}")
            if subset is not None:
                wanted = set(_mask(file, subset))
                if absent := sorted(wanted - set(demos)):
                    raise ValueError(f"{path}: 'mask/{subset}' lists {listed(absent)}, which the file has not")
                demos = [demo for demo in demos if demo in wanted]
        name = relative(path, root)
        refs += [EpisodeRef(f"{name}/{demo}", (path,), (demo,)) for demo in demos]
    return refs


def _mask(file: Hdf5File, subset: str) -> list[str]:
    there = file.names("mask") if file.has("mask") else []
    if subset not in there:
        raise ValueError(f"{file.path} has no list 'mask/{subset}' of episodes; it has {listed(there)}")
    return file.texts(f"mask/{subset}")


def json_attribute(file: Hdf5File, group: str, name: str) -> Json:
    """Of JSON; empty where there is none.

    Raises:
        ValueError: it is no JSON object.
    """
    text = file.attribute(group, name)
    if text is None:
        return {}
    try:
        value = strict_json.parse(str(text))
    except ValueError as error:
        raise ValueError(f"{file.path}: the attribute {name} of {group} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file.path}: the attribute {name} of {group} is {str(value)[:80]}; expected an object")
    return value


def environment(file: Hdf5File) -> Mapping[str, object]:
    """What the simulator was made with."""
    kwargs = json_attribute(file, "data", "env_args").get("env_kwargs")
    return kwargs if isinstance(kwargs, dict) else {}


def control_hz(file: Hdf5File) -> float:
    rate = environment(file).get("control_freq")
    return float(rate) if isinstance(rate, int | float) else CONTROL_HZ


def side_by_side(file: Hdf5File, group: str, keys: Sequence[str]) -> Numbers:
    """Arrays of a group as one vector per frame, its dimensions named by array and place."""
    parts = {key: file.numbers(f"{group}/{key}") for key in keys}
    values = joined(parts, f"{file.path} /{group}")
    return Numbers(values, f"/{group}/{{{', '.join(keys)}}}", tuple(_names(parts)))


def _names(parts: Mapping[str, np.ndarray]) -> Iterable[str]:
    for key, values in parts.items():
        if values.ndim == 1 or values.shape[1] == 1:
            yield key
        else:
            yield from (f"{key}_{number}" for number in range(values.shape[1]))
