"""Where numbers go: always the log and `metrics.jsonl`, and the trackers a run asks for. Nothing here ever prompts."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from openpi.shared import whole_file
from openpi.shared.errors import first_line, install_hint
from openpi.training.config import TrainConfig
from openpi.training.run.run_directory import METRICS_FILE, VALIDATION
from openpi.training.run.run_report import RunReport

logger = logging.getLogger(__name__)

WANDB_ID_FILE = "wandb_id.txt"


class Observer(Protocol):
    """Receives what a run reports."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """`image`: uint8[h w 3], RGB."""
        ...

    def close(self) -> None: ...


class MetricsFile:
    """One JSON object a line: `step`, and the numbers of that step.

    Args:
        start: lines of this step and later are dropped: the run writes them anew. Before its first checkpoint, all.
    """

    def __init__(self, directory: Path, *, start: int) -> None:
        path = directory / METRICS_FILE
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) < start]
            whole_file.write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def __str__(self) -> str:
        return METRICS_FILE

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        from PIL import Image

        stem = f"{name}_{step}" if name == VALIDATION else name
        Image.fromarray(image).save(Path(self._file.name).parent / f"{stem}.png")

    def close(self) -> None:
        self._file.close()


class WandbObserver:
    """Weights & Biases. Without a login the run is recorded on disk, for `wandb sync` later.

    The run id lies in `wandb_id.txt`; a resumed run continues it, and starts one if the first run had none.
    """

    def __init__(self, wandb: ModuleType, config: TrainConfig, directory: Path) -> None:
        self._wandb = wandb
        id_file = directory / WANDB_ID_FILE
        run_id = id_file.read_text().strip() if id_file.exists() else None
        self._run = wandb.init(
            project=config.project_name,
            name=config.exp_name,
            config=_plain(config),
            id=run_id,
            resume="allow" if run_id else None,
            mode=_wandb_mode(wandb),
            dir=str(directory),
        )
        id_file.write_text(self._run.id)

    def __str__(self) -> str:
        return "wandb"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoardObserver:
    """TensorBoard event files in `<run>/tensorboard`."""

    def __init__(self, tensorboardx: ModuleType, directory: Path, *, start: int) -> None:
        folder = directory / "tensorboard"
        # Files are called by the second: one of a start before, in the same, would be written over.
        suffix = f".{len(list(folder.glob('*'))):04}"
        self._writer = tensorboardx.SummaryWriter(str(folder), purge_step=start, filename_suffix=suffix)

    def __str__(self) -> str:
        return "tensorboard"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Observers:
    """Several as one. What one of them cannot take, for a full disk or a lost network, is told once: it is not worth
    the run.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)
        self._failed: set[Observer] = set()

    def __bool__(self) -> bool:
        return bool(self._observers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda observer: observer.log(step, metrics))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._each(lambda observer: observer.image(step, name, image))

    def close(self) -> None:
        self._each(lambda observer: observer.close())

    def _each(self, tell: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                tell(observer)
            except Exception as error:
                if observer not in self._failed:
                    logger.warning("%s lacks numbers of the run from here on: %s", observer, first_line(error))
                self._failed.add(observer)


def open_observers(config: TrainConfig, directory: Path, *, start: int) -> Observers:
    """The metrics file, the run's page, and the trackers that are asked for; see `check_installed`."""
    observers: list[Observer] = [MetricsFile(directory, start=start), RunReport(config, directory)]
    if config.wandb_enabled:
        observers.append(WandbObserver(importlib.import_module("wandb"), config, directory))
    if config.tensorboard_enabled:
        tensorboardx = importlib.import_module("tensorboardX")
        observers.append(TensorBoardObserver(tensorboardx, directory, start=start))
    return Observers(observers)


def check_installed(config: TrainConfig) -> None:
    """Raises ImportError, naming what to do, for a tracker that is asked for and not installed."""
    trackers = (
        ("wandb_enabled", config.wandb_enabled, "wandb", "wandb"),
        ("tensorboard_enabled", config.tensorboard_enabled, "tensorboardX", "tensorboard"),
    )
    for field, is_wanted, module, extra in trackers:
        if is_wanted and importlib.util.find_spec(module) is None:
            raise ImportError(
                f"{field} is set, and {module} is not installed; {install_hint(extra)}. Or train without it: "
                f"--no-{field.replace('_', '-')}"
            )


def _wandb_mode(wandb: ModuleType) -> str:
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if wandb.api.api_key is None:
        logger.warning("wandb is not logged in; recording offline, upload later with `wandb sync`")
        return "offline"
    return "online"


def _plain(config: TrainConfig) -> dict[str, object]:
    """For display: JSON types, everything else by its text."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _step_of(line: str) -> float:
    """Lines that a killed process left incomplete count as later than anything."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
