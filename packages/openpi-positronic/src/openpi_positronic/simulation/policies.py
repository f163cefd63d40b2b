"""What can be in charge of the robot: raw signals in, commands with due times out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openpi_positronic.codecs.action import COMMAND, GRIP
from openpi_positronic.codecs.codec import Step
from openpi_positronic.franka import expert
from openpi_positronic.franka.world import FrankaWorld
from openpi_sim import poses


class RobotPolicy(Protocol):
    """`openpi_client.positronic_client.PositronicClient` is one."""

    @property
    def meta(self) -> Mapping[str, object]:
        """What is recorded of it, flat."""
        ...

    def reset(self) -> None:
        """A new episode begins."""
        ...

    def infer(self, observation: Mapping[str, object]) -> list[Step]:
        """Steps to carry out, each due `timestamp` seconds from now (0 if it has none); none when it is done."""
        ...


@runtime_checkable
class WatchingPolicy(Protocol):
    """A policy that sees more than a robot could."""

    def watch(self, world: FrankaWorld) -> None:
        """Told once, before the first episode."""
        ...


class ScriptedPolicy:
    """The expert, as a policy: one chunk for the whole task, another if that did not do, then nothing."""

    meta: Mapping[str, Any] = {"type": "scripted"}

    def __init__(self) -> None:
        self._world: FrankaWorld | None = None

    def watch(self, world: FrankaWorld) -> None:
        self._world = world

    def reset(self) -> None:
        """It looks anew each time it is asked."""

    def infer(self, observation: Mapping[str, object]) -> list[Step]:
        assert self._world is not None
        return [
            {
                COMMAND: {"type": "cartesian_pos", "pose": np.append(pose[:3], poses.rotation_of(pose))},
                GRIP: float(grip),
                "timestamp": i / expert.RATE_HZ,
            }
            for i, (pose, grip) in enumerate(zip(*expert.plan(self._world), strict=True))
        ]
