"""A recorded session as a folder in the form of `PolicyRecorder`.

<folder>/session.json      model, protocol, client, what it was told at the start
         step_0.npy        0-d object array around one flat dict: inputs/..., outputs/...
"""

import dataclasses
import io
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpi.policies.recorder import write_record
from openpi.serving.recorded import Exchange, Origin, SessionInfo
from openpi.shared.tree import flatten, unflatten

_INFO_FILE = "session.json"


class Writer:
    """See `recording.SessionWriter`."""

    def __init__(self, place: Path, info: SessionInfo) -> None:
        place.mkdir()
        self.place = place
        (place / _INFO_FILE).write_text(json.dumps(dataclasses.asdict(info), indent=2, default=str) + "\n")

    def write(self, exchange: Exchange) -> None:
        content = flatten({"inputs": exchange.inputs, "outputs": exchange.outputs})
        write_record(self.place / f"step_{exchange.step}.npy", content)

    def finish(self) -> None:
        pass


def origin_of(folder: Path) -> Origin:
    """Of a recorded session; that of `scripts/serve_policy.py --record` says nothing, and is openpi's."""
    told = folder / _INFO_FILE
    if not told.is_file():
        return Origin()
    info = json.loads(told.read_text())
    return Origin(info["protocol"], info.get("model"))


def read_session(folder: Path) -> Iterator[Exchange]:
    """The exchanges of a session in order.

    Raises:
        FileNotFoundError: no records there.
        ValueError: a file is damaged, or holds more than data.
    """
    found = {int(match.group(1)): path for path in folder.glob("step_*.npy") if (match := _STEP.fullmatch(path.name))}
    if not found:
        raise FileNotFoundError(f"{folder} has no step_<n>.npy; expected a folder that a server recorded a session in")
    for number in sorted(found):
        record = read_record(found[number])
        yield Exchange(number, _part(record, "inputs"), _part(record, "outputs"))


def _part(record: Mapping[str, Any], name: str) -> Any:
    """`inputs` or `outputs` of a flat record, nested where its keys are not those that clients join themselves."""
    if name in record:  # a list of observations
        return record[name]
    flat = {key.removeprefix(f"{name}/"): value for key, value in record.items() if key.startswith(f"{name}/")}
    return flat if name == "inputs" and any(key.startswith("observation/") for key in flat) else unflatten(flat)


def read_record(path: Path) -> dict[str, Any]:
    """One record. The documented form is a pickle, which could run anything: only arrays and plain values are taken.

    Raises:
        ValueError: damaged, or holds more than data.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
            if shape != () or dtype != np.dtype(object):
                raise ValueError(f"it holds an array of shape {shape} and dtype {dtype}")
            record = _DataOnly(io.BytesIO(file.read())).load()
        content = record.item() if isinstance(record, np.ndarray) else record
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content
    except (ValueError, pickle.UnpicklingError, EOFError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"{path} is no record of a request: {error}") from error


_STEP = re.compile(r"step_(\d+)\.npy")
_ALLOWED = re.compile(r"numpy(\._?core)?(\.(multiarray|numeric|_multiarray_umath))?")
_ALLOWED_NAMES = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer"}


class _DataOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if _ALLOWED.fullmatch(module) and name in _ALLOWED_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no data")
