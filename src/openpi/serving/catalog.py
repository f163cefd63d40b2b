"""Which models a server has: one policy, or the checkpoints of an experiment and others beside them."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from openpi.serving.errors import UnknownModelError
from openpi.shared.errors import listed
from openpi_client.base_policy import BasePolicy

_STEP_FOLDER = re.compile(r"(checkpoint-)?(\d+)")


class Catalog(Protocol):
    """What a server has to offer. A model's id is text."""

    def ids(self) -> list[str]:
        """All models, those of an experiment by ascending step."""
        ...

    def resolve(self, requested: str | None) -> str:
        """The id of what a client asks for; None = the default.

        Raises:
            UnknownModelError: there is none.
        """
        ...

    def load(self, model_id: str) -> BasePolicy:
        """The policy, warm. Slow; runs in the model's own thread."""
        ...

    def describe(self, model_id: str) -> Mapping[str, Any]:
        """What Positronic's clients are told: `config_name`, `checkpoint_path`, `experiment_name`, ..."""
        ...


@dataclasses.dataclass(frozen=True)
class OnePolicy:
    """A server with a single policy."""

    make: Callable[[], BasePolicy]
    name: str = "default"

    def ids(self) -> list[str]:
        return [self.name]

    def resolve(self, requested: str | None) -> str:
        if requested not in (None, self.name):
            raise unknown_model(requested)
        return self.name

    def load(self, model_id: str) -> BasePolicy:
        return self.make()

    def describe(self, model_id: str) -> Mapping[str, Any]:
        return {}


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of an experiment (folders such as `10000` or `checkpoint-10000`), and others by name.

    Attributes:
        load_folder: a checkpoint's folder -> its policy.
        experiment: folder with the steps; they are listed anew each time, so that a running training shows up. None =
            there are only `named` ones.
        named: further checkpoints, such as the adapters of another task.
        default: id that clients get who ask for none; None = the latest step, else the first named.
        description: see `Catalog.describe`.
    """

    load_folder: Callable[[Path], BasePolicy]
    experiment: Path | None = None
    named: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    default: str | None = None
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def ids(self) -> list[str]:
        return [*self._steps(), *self.named]

    def resolve(self, requested: str | None) -> str:
        """Steps match by number: `5000`, `005000` and `checkpoint-5000` are the same.

        Raises:
            UnknownModelError: there is no such checkpoint.
            ValueError: there is none at all.
        """
        requested = self.default if requested is None else requested
        steps = self._steps()
        if requested is None:
            if not steps and not self.named:
                raise ValueError(f"{self.experiment} has no checkpoints (found: {listed(_entries(self.experiment))})")
            return list(steps)[-1] if steps else next(iter(self.named))
        if requested in self.named:
            return requested
        number = step_number(requested)
        for model_id in steps:
            if number is not None and step_number(model_id) == number:
                return model_id
        raise unknown_model(requested)

    def load(self, model_id: str) -> BasePolicy:
        return self.load_folder(self.folder(model_id))

    def folder(self, model_id: str) -> Path:
        return self.named[model_id] if model_id in self.named else self._steps()[model_id]

    def describe(self, model_id: str) -> Mapping[str, Any]:
        return self.description

    def _steps(self) -> dict[str, Path]:
        return {} if self.experiment is None else step_folders(self.experiment)


def step_folders(experiment: Path) -> dict[str, Path]:
    """The complete checkpoints in a folder by name, ascending by step."""
    if not experiment.is_dir():
        return {}
    found = [(step_number(entry.name), entry) for entry in experiment.iterdir() if is_complete(entry)]
    return {entry.name: entry for number, entry in sorted(found, key=lambda item: item[0] or 0) if number is not None}


def is_complete(folder: Path) -> bool:
    """Whether a folder holds weights, all written."""
    return (folder / "params" / "_METADATA").is_file() or (folder / "model.safetensors").is_file()


def step_number(name: str) -> int | None:
    """10000 of `10000`, `010000` and `checkpoint-10000`; None of anything else."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match.group(2)) if match else None


def unknown_model(requested: object) -> UnknownModelError:
    return UnknownModelError(f"Checkpoint not found or invalid ID: {requested}.")


def _entries(folder: Path | None) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())[:10] if folder is not None and folder.is_dir() else []
