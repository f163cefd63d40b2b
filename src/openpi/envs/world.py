"""What a simulator is to us: a robot that can be put back to where an episode begins, and knows whether it succeeded.

    config = find("libero")(suite="object")     # data: tasks, and how to open the world; goes to other processes
    world = config.open()                       # physics and pictures
    world.reset(task, seed); world.observe(); world.step(action); world.is_success

Worlds are found by the entry point `openpi.worlds`: name -> a frozen dataclass that is a `WorldConfig`, the fields of
which are flags of `openpi evaluate NAME` and `openpi record NAME`. One that is not installed is named by its file,
`path/to/my_world.py:MyWorld`, or its module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Protocol, cast, runtime_checkable

import numpy as np

from openpi.shared import plugins, references
from openpi_client.base_policy import Observation

ENTRY_POINTS = "openpi.worlds"
# Beside the keys of the policy, what only an expert may know; asked for by `open(privileged=True)`.
PRIVILEGED = "privileged"


@dataclass(frozen=True)
class Task:
    """What is asked for.

    Attributes:
        name: stable and unique in its world, for tables and seeds: `libero_object/3`.
        prompt: what a policy is told.
        max_steps: control ticks until the episode is a failure.
        num_starts: places to begin from; seed n begins at n modulo this. None = every seed is another one.
    """

    name: str
    prompt: str
    max_steps: int
    num_starts: int | None = None


class World(Protocol):
    """A simulator at one control tick after the other. One process, one thread."""

    def reset(self, task: Task, seed: int) -> None:
        """Puts everything where the episode begins, settled: what a benchmark waits before it asks is over."""
        ...

    def observe(self) -> Observation:
        """What the robot's program sends: the keys, dtypes, shapes and prompt that the recipe wants, and
        `PRIVILEGED` where it was asked for.
        """
        ...

    def step(self, action: np.ndarray) -> None:
        """One control tick, with a row of a chunk as the policy answers it, float[action_dim]."""
        ...

    def hold(self) -> np.ndarray:
        """The action, float64[action_dim], that stands still where nothing has been commanded yet."""
        ...

    @property
    def is_success(self) -> bool:
        """Whether the task is done; the episode ends with it."""
        ...

    def render(self) -> np.ndarray:
        """A picture for people, uint8[h, w, 3], RGB."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class MeasuredWorld(Protocol):
    """A world that knows more of an episode than whether it succeeded."""

    def measurements(self) -> Mapping[str, float]:
        """Asked at the end of an episode: name -> number; the same names always."""
        ...


class Expert(Protocol):
    """A policy that solves the tasks with what only a simulator knows, under the recipe's keys and actions.

    It is asked as a policy is, through a server too: whatever it remembers it keeps by `privileged/episode`.
    """

    def infer(self, obs: Observation) -> dict[str, object]:
        """{"actions": float32[horizon, action_dim]}."""
        ...


@runtime_checkable
class WorldConfig(Protocol):
    """A frozen dataclass: which tasks, and how to open the world. Pickled to where episodes are played.

    It may have an attribute `execute_horizon`: rows of a chunk that are played before the policy is asked again, where
    a benchmark's published numbers were made so.
    """

    @property
    def recipe(self) -> str:
        """The name of the recipe whose keys and actions it speaks."""
        ...

    @property
    def control_hz(self) -> float: ...

    def tasks(self) -> Sequence[Task]:
        """Without physics or pictures.

        Raises:
            ImportError: what it needs is not installed; the message has the command that installs it.
        """
        ...

    def open(self, *, privileged: bool = False) -> World:
        """
        Raises:
            ImportError: as `tasks`.
            RuntimeError: no pictures can be drawn here; the message says what to install.
        """
        ...

    def expert(self) -> Expert | None:
        """None: there is none."""
        ...


def names() -> list[str]:
    """Of the worlds that are installed."""
    return plugins.names(ENTRY_POINTS)


def find(name: str) -> type[WorldConfig]:
    """The dataclass of a world.

    Args:
        name: of an entry point, or `path/to/file.py:attribute`, or `package.module:attribute`.
    Raises:
        ValueError: there is none of that name, or it is none.
        FileNotFoundError, ImportError: no such file or module.
    """
    if references.is_reference(name):
        where, module, attribute = references.resolve(name, "world")
        found = getattr(module, attribute, None)
    else:
        where, found = name, _installed(name)
    if not isinstance(found, type) or not is_dataclass(found):
        raise ValueError(f"{name} is {type(found).__name__}, no world: expected a frozen dataclass in {where}")
    if missing := sorted(_MEMBERS - set(dir(found)) - {field.name for field in fields(found)}):
        raise ValueError(f"world {name} has no {missing[0]!r}; expected {', '.join(sorted(_MEMBERS))}")
    return cast(type[WorldConfig], found)


def _installed(name: str) -> object:
    installed = names()
    if name not in installed:
        raise ValueError(
            f"the world is {name!r}; expected one of {', '.join(installed) or '(none installed)'}, or your own as "
            f"path/to/my_world.py:MyWorld; `openpi evaluate` takes the folder of a LeRobot dataset, too"
            f"{plugins.hint(ENTRY_POINTS, name)}"
        )
    return plugins.load(ENTRY_POINTS, name)


_MEMBERS = {name for name in vars(WorldConfig) if not name.startswith("_")}
