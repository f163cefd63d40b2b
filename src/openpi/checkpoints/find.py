"""Where checkpoints are: from a place (a folder of this machine, a URL, a step, a run) to steps and what they hold.

    <run>/<step>/   `10000`, `checkpoint-10000`
        params/  or  model.safetensors  or  its shards with an index       weights: enough to be served
        train_state/  or  train_state.safetensors, train_state.json        what else training goes on from

Which layout a step has is told by `weights.layout.find_layout`. Source: the checkpoint specification, section 1.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from openpi.shared import download
from openpi.shared.remote import find_files
from openpi.weights import layout, safetensors_io

logger = logging.getLogger(__name__)

MARKS = ("params/_METADATA", safetensors_io.SINGLE_FILE, safetensors_io.INDEX_FILE)
"""Files of which a folder with weights has one, the last to be written."""
_TRAINING_STATE = {
    MARKS[0]: ("train_state/_METADATA",),
    MARKS[1]: ("train_state.safetensors", "train_state.json"),
}
_STEP = re.compile(r"(checkpoint-)?(\d+)")


def find_step(place: Path | str) -> Path:
    """The folder of one step, fetched if need be: `place` itself, or the numerically latest complete step in it.

    Raises:
        FileNotFoundError: there is no checkpoint; says what is there.
    """
    folder = download.maybe_download(place)
    if (folder / "params").is_dir() or safetensors_io.is_here(folder):
        return folder
    if steps := steps_in(folder):
        return Path(list(steps.values())[-1])
    found = sorted(entry.name for entry in _entries(folder))[:10]
    raise FileNotFoundError(
        f"{folder} is neither a checkpoint (a folder with params/ or {safetensors_io.SINGLE_FILE}) nor the folder of a "
        f"run with complete steps in it (found: {', '.join(found) or 'nothing'}){layout.advice(found)}"
    )


def steps_in(run: Path | str) -> dict[str, str]:
    """The complete steps of a run, a folder or a URL: name -> place, ascending.

    Empty where there are none, and where a URL cannot be listed, as offline.
    """
    if "://" in str(run):
        return {name: f"{str(run).rstrip('/')}/{name}" for name in _by_number(_complete_at(str(run)))}
    folders = {entry.name: entry for entry in _entries(Path(run)) if is_complete(entry)}
    return {name: str(folders[name]) for name in _by_number(folders)}


def complete_steps(run: Path | str) -> list[int]:
    """Numbers of the complete steps that a training run has left in its folder, ascending."""
    return [number for number, folder in _trained(run).items() if is_complete(folder)]


def damaged_steps(run: Path | str) -> dict[int, str]:
    """Steps in a training run's folder that it cannot go on from, and which files they lack."""
    lacking = {number: _lacks(folder) for number, folder in _trained(run).items()}
    return {number: names for number, names in lacking.items() if names}


def is_complete(folder: Path) -> bool:
    """Whether a folder holds weights, all written."""
    return any((folder / mark).is_file() for mark in MARKS)


def step_number(name: str) -> int | None:
    """10000 of `10000`, `010000` and `checkpoint-10000`; None of anything else."""
    match = _STEP.fullmatch(name)
    return int(match.group(2)) if match else None


def _lacks(folder: Path) -> str:
    """Which files of the weights, or of the training state that its framework writes, are missing; '' = none."""
    wanted = next((names for mark, names in _TRAINING_STATE.items() if (folder / mark).is_file()), None)
    if wanted is None:
        return " or ".join(_TRAINING_STATE)
    return " and ".join(name for name in wanted if not (folder / name).is_file())


def _trained(run: Path | str) -> dict[int, Path]:
    """The folders that training names by their step, complete or not, ascending."""
    numbers = sorted(int(entry.name) for entry in _entries(Path(run)) if re.fullmatch(r"0|[1-9]\d*", entry.name))
    return {number: Path(run) / str(number) for number in numbers}


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _complete_at(url: str) -> set[str]:
    try:
        names = [file.name for file in find_files(url)]
    except (OSError, ValueError, ImportError) as error:
        logger.debug("%s cannot be listed", url, exc_info=error)
        return set()
    return {name.removesuffix(f"/{mark}") for name in names for mark in MARKS if name.endswith(f"/{mark}")}


def _by_number(names: Iterable[str]) -> list[str]:
    numbers = {name: number for name in names if (number := step_number(name)) is not None}
    return sorted(numbers, key=lambda name: (numbers[name], name))
