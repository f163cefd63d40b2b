"""What a simulator is to us: a robot that can be put back to where an episode begins, and knows whether it succeeded.

    config = find("libero")(suite="object")     # data: tasks, and how to open the world; goes to other processes
    world = config.open()                       # physics and pictures
    world.reset(task, seed); world.observe(); world.step(action); world.is_success

Worlds are found by the entry point `openpi.worlds`: name -> a frozen dataclass that is a `WorldConfig`, the fields of
which are flags of `openpi evaluate NAME` and `openpi record NAME`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import numpy as np

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

    def observe(self) -> dict[str, Any]:
        """What the robot's program sends: the keys, dtypes, shapes and prompt that the recipe wants, and
        `PRIVILEGED` where it was asked for.
        """
        ...

    def step(self, action: np.ndarray) -> None:
        """One control tick, with a row of a chunk as the policy answers it, float[action_dim]."""
        ...

    def hold(self) -> np.ndarray:
        """The action, float64[action_dim], that stands still: played while no row is there."""
        ...

    @property
    def is_success(self) -> bool:
        """Whether the task is done; the episode ends with it."""
        ...

    def render(self) -> np.ndarray:
        """A picture for people, uint8[h, w, 3], RGB."""
        ...

    def close(self) -> None: ...


class Expert(Protocol):
    """A policy that solves the tasks with what only a simulator knows, under the recipe's keys and actions.

    It is asked as a policy is, through a server too: whatever it remembers it keeps by `privileged/episode`.
    """

    def infer(self, obs: dict[str, Any]) -> dict[str, Any]:
        """{"actions": float32[horizon, action_dim]}."""
        ...


@runtime_checkable
class WorldConfig(Protocol):
    """A frozen dataclass: which tasks, and how to open the world. Pickled to where episodes are played."""

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
    return sorted({point.name for point in metadata.entry_points(group=ENTRY_POINTS)})


def find(name: str) -> type[WorldConfig]:
    """The dataclass of a world.

    Raises:
        ValueError: there is none of that name.
    """
    points: Mapping[str, metadata.EntryPoint] = {
        point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)
    }
    if name not in points:
        raise ValueError(f"the world is {name!r}; expected one of {', '.join(sorted(points)) or '(none installed)'}")
    return points[name].load()
