"""A recorded session as a folder in the form of `PolicyRecorder`.

<folder>/session.json      model, protocol, client, what it was told at the start
         step_0.npy        0-d object array around one flat dict: inputs/..., outputs/...
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from openpi.policies.recorder import write_record
from openpi.serving.recorded import Exchange, Origin, SessionInfo
from openpi.shared import plain_pickle, strict_json
from openpi.shared.budgets import MAX_ARRAYS_BYTES, Budget, read_npy_header
from openpi.shared.tree import flatten, unflatten

_INFO_FILE = "session.json"
_MAX_DEPTH = 64  # of maps within each other; messages have fewer


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
    """Of a recorded session; that of `scripts/serve_policy.py --record` says nothing, and is openpi's.

    Raises:
        ValueError: what is said is damaged.
    """
    told = folder / _INFO_FILE
    if not told.is_file():
        return Origin()
    try:
        info = strict_json.read(told)
        return Origin(info["protocol"], info.get("model"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{told} is damaged, or of no recording: {error!r}") from error


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
        try:
            exchange = Exchange(number, _part(record, "inputs"), _part(record, "outputs"))
        except ValueError as error:
            raise ValueError(f"{found[number]} is no record of a request: {error}") from error
        yield exchange


def _part(record: Mapping[str, object], name: str) -> object:
    """`inputs` or `outputs` of a flat record, nested where its keys are not those that clients join themselves."""
    if name in record:  # a list of observations
        return record[name]
    flat = {key.removeprefix(f"{name}/"): value for key, value in record.items() if key.startswith(f"{name}/")}
    return flat if name == "inputs" and any(key.startswith("observation/") for key in flat) else unflatten(flat)


def read_record(path: Path) -> dict[str, object]:
    """One record. The documented form is a pickle, which could run anything: only arrays and plain values are taken.

    Raises:
        ValueError: damaged, larger than any request, or holds more than data.
    """
    try:
        if path.stat().st_size > MAX_ARRAYS_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        with path.open("rb") as file:
            descr, shape, _ = read_npy_header(file)
            if shape != () or descr != "|O":
                raise ValueError(f"it holds an array of shape {shape} and dtype {descr}")
            content = plain_pickle.loads(file.read(), Budget(MAX_ARRAYS_BYTES))
        if not (isinstance(content, dict) and all(isinstance(key, str) for key in content)):
            raise ValueError(f"it holds a {type(content).__name__}; expected values by name")
        if deep := [key for key in content if key.count("/") > _MAX_DEPTH]:
            raise ValueError(f"its key {deep[0][:80]!r}... is nested too deeply")
        return content
    except ValueError as error:
        raise ValueError(f"{path} is no record of a request: {error}") from error


_STEP = re.compile(r"step_(\d+)\.npy")
