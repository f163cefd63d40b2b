"""What the training loop needs of a framework. One loop, and for each framework a `Backend` beside it.

    backends/jax/       JaxBackend
    backends/pytorch/   PyTorchBackend

Everything here, and everything that uses it, is free of frameworks: states and placed batches are passed around and
never looked into. Paths of parameters are those of the published tree, whatever a framework calls them.
Source: the design, "one loop, two steps".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

from openpi.shared import frameworks
from openpi.shared.tree import Params
from openpi.training.freeze import Filter

if TYPE_CHECKING:
    from openpi.training.config import TrainConfig
    from openpi.weights.blocks import Weights

# Of the backend that made it; opaque to everyone else.
State = Any
PlacedBatch = Any
Batch = Mapping[str, Any]

# How far the host may be ahead of the device: enough to keep it busy, and a request to stop is noticed soon.
STEPS_IN_FLIGHT = 2


class Spec(Protocol):
    """A parameter without its values."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> DTypeLike:
        """Something that `np.dtype` takes."""
        ...


class Metric(Protocol):
    """A number that may still be being computed."""

    def __float__(self) -> float:
        """Waits for the step that computes it."""
        ...


class Backend(Protocol):
    """A recipe on the devices of one framework.

    In a run of several processes all of them call the same methods in the same order, and batches are the rows of the
    process that has read them. Nothing is computed and no device is touched before `check`.

    Attributes:
        name: as of `TrainConfig.backend`.
        num_devices: of all processes together.
        device_kind: of one of them, as in "NVIDIA H200".
        device_bytes: memory of one of them; None = that of this machine.
    """

    name: str

    @property
    def num_devices(self) -> int: ...

    @property
    def device_kind(self) -> str: ...

    @property
    def device_bytes(self) -> int | None: ...

    def check(self) -> None:
        """Raises ValueError for a recipe that these devices, or this framework, cannot train."""
        ...

    def param_specs(self) -> Mapping[str, Spec]:
        """By path, the parameters as the model is created with them (f32); nothing is computed."""
        ...

    def required_bytes(self, is_left_out: Filter) -> int:
        """Disk space of one checkpoint without the parameters left out; an upper bound."""
        ...

    def create_state(self, weights: Weights | None = None) -> State:
        """A fresh state, started from the recipe's weights.

        Args:
            weights: those, where they are open already.
        Raises:
            ValueError: the weights do not fit the model.
            FileNotFoundError: they are not there.
        """
        ...

    def restore_state(self, directory: Path) -> State:
        """The state in a checkpoint's folder.

        Raises:
            ValueError: it is of another model or optimiser; the differing leaves are named.
        """
        ...

    def begin_write(self, directory: Path, state: State, is_left_out: Filter) -> Callable[[], None]:
        """Copies the state to the host; the function returned writes it into the folder, in whatever thread.

        The state may be given away to the next step as soon as this returns.

        Args:
            directory: of an unfinished checkpoint; it exists, and process 0 has written the small files.
            is_left_out: parameters that are not written; an `AdapterBase` beside them says where they are.
        """
        ...

    def digests(self, state: State, paths: Iterable[str]) -> dict[str, str]:
        """Of weights (not their average) by path, as of `weights.adapter_base.Digests`."""
        ...

    def place(self, batch: Batch, step: int) -> PlacedBatch:
        """A loader's batch on the devices, without what the model does not use. Called in the prefetch thread.

        Args:
            step: that takes the batch. Random numbers that the host draws for it go to the devices with it.
        """
        ...

    def local_rows(self, placed: PlacedBatch) -> Params:
        """This process's rows of a placed batch as NumPy arrays, for people to look at."""
        ...

    def train_step(self, state: State, placed: PlacedBatch) -> tuple[State, Mapping[str, Metric]]:
        """The next state, and `loss`, `grad_norm`, `param_norm`, `learning_rate`. The state given is used up.

        Does not wait for the device.

        Args:
            placed: for this step.
        """
        ...

    def wait(self, metrics: Mapping[str, Metric]) -> None:
        """Returns when the device is done with the step that gave these metrics; later ones go on."""
        ...

    def evaluate(self, state: State, batch: Batch, index: int, **sample_options: object) -> tuple[float, np.ndarray]:
        """Of the weights that are served: the loss of a validation batch, and actions sampled for it.

        Args:
            batch: as the loader gives it; nothing that sampling reads may be cut from it.
            index: of the batch. Decides noise and flow time, which depend on nothing else.
            sample_options: for the model's sampler.
        Returns:
            the mean loss over the rows of all processes; of this process's rows the action chunks f32[b ah ad] in the
            model's normalised space, or of pi0-FAST the tokens f32[b m].
        """
        ...

    def vote(self, value: int) -> int:
        """Called once per step: the largest value that any process gave `STEPS_IN_FLIGHT` calls ago. Alone, `value`."""
        ...


def open_backend(config: TrainConfig) -> Backend:
    """The backend that `config.backend` names.

    Raises:
        ImportError: its framework is not installed; the extra is named.
    """
    frameworks.require_backend(config.backend)
    if config.backend == "pytorch":
        from openpi.training.backends.pytorch.backend import PyTorchBackend

        return PyTorchBackend(config)
    from openpi.training.backends.jax.backend import JaxBackend

    return JaxBackend(config)
