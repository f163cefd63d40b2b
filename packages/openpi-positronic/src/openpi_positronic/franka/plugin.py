"""Positronic's simulated Franka as a world to be evaluated in, through one of its codecs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from openpi.envs.world import PRIVILEGED, Task
from openpi_client.base_policy import Observation
from openpi_positronic.codecs import catalog
from openpi_positronic.codecs.action import COMMAND, GRIP
from openpi_positronic.codecs.observation import TASK
from openpi_positronic.franka import expert, stacking
from openpi_positronic.franka.env import CAMERAS, CONTROL_HZ, MAX_STEPS
from openpi_positronic.franka.render import make_renderer
from openpi_positronic.franka.world import EXTERIOR_CAMERA, GREEN, RED, execute, signals
from openpi_positronic.franka.world import FrankaWorld as Physics

_POSES = ("ee", "ee_traj")  # codecs whose actions are poses, with the gripper as the simulator counts it
_EXPERT_HORIZON = 25
_MOST_PLANS = 64  # worlds that ask the same expert in turn


@dataclass(frozen=True)
class Franka:
    """Positronic's simulated Franka: stack the green cube on the red one.

    Attributes:
        codec: what the policy was trained with; of those whose state has 8 numbers, as the recipe's.
        renderer: rays, as everywhere; or gl, which is faster where there is a GPU.
    """

    codec: Literal["ee", "ee_traj", "ee_flip_grip", "joints_traj", "joints_ik"] = "ee"
    renderer: Literal["rays", "gl"] = "rays"

    recipe: ClassVar[str] = "pi05_positronic_lowmem"
    control_hz: ClassVar[float] = CONTROL_HZ
    execute_horizon: ClassVar[int] = CONTROL_HZ  # a second, as Positronic's codecs

    def tasks(self) -> Sequence[Task]:
        return [Task("stack", stacking.TASK, MAX_STEPS)]

    def open(self, *, privileged: bool = False) -> FrankaWorld:
        return FrankaWorld(self, privileged=privileged)

    def expert(self) -> FrankaExpert | None:
        return FrankaExpert() if self.codec in _POSES else None


class FrankaWorld:
    """See `World`."""

    def __init__(self, config: Franka, *, privileged: bool) -> None:
        self._name, self._is_privileged = config.codec, privileged
        self._codec = catalog.get_codec(config.codec)
        self._physics = Physics()
        self._renderer = make_renderer(self._physics, config.renderer)

    def reset(self, task: Task, seed: int) -> None:
        self._physics.reset(np.random.default_rng(seed))
        self._task, self._episode, self._num_steps = task, f"{task.name} {seed}", 0
        self._start_ns = self._physics.time_ns

    def observe(self) -> Observation:
        sent = self._codec.encode(self._raw())
        return {**sent, PRIVILEGED: self._known()} if self._is_privileged else sent

    def step(self, action: np.ndarray) -> None:
        """A pose out of reach leaves the arm where it is."""
        command: Any = self._codec.decode(np.asarray(action))
        execute(self._physics, command[COMMAND])
        self._physics.set_gripper(command[GRIP])
        if self._physics.has_failed:
            self._physics.recover()
        self._num_steps += 1
        end_ns = self._start_ns + round(1e9 * self._num_steps / CONTROL_HZ)  # 33 or 34 steps of the physics
        self._physics.step(round((end_ns - self._physics.time_ns) / self._physics.step_ns))

    def hold(self) -> np.ndarray:
        arm = self._physics.q if self._name.startswith("joints") else self._physics.ee_pose
        grip = self._physics.grip
        return np.append(arm, 1 - grip if self._name == "ee_flip_grip" else grip)

    @property
    def is_success(self) -> bool:
        return stacking.is_stacked(self._physics)

    def measurements(self) -> Mapping[str, float]:
        """Of Positronic's recordings: `box_distance` in metres, `stacking_success` and its parts."""
        return stacking.scores(self._physics)

    def render(self) -> np.ndarray:
        return self._renderer.render(EXTERIOR_CAMERA)

    def close(self) -> None:
        """Nothing is open."""

    def _raw(self) -> dict[str, object]:
        images = {name: self._renderer.render(camera) for name, camera in CAMERAS.items()}
        return {**signals(self._physics), **images, TASK: self._task.prompt}

    def _known(self) -> dict[str, object]:
        return {
            "episode": self._episode,
            "step": self._num_steps,
            "ee_pose": self._physics.ee_pose,
            "red": self._physics.cube_position(RED),
            "green": self._physics.cube_position(GREEN),
        }


class FrankaExpert:
    """See `Expert`. Asked after the end of its plan it looks again, so a cube that slipped is fetched once more."""

    def __init__(self) -> None:
        self._plans: OrderedDict[str, tuple[int, np.ndarray]] = OrderedDict()  # by episode: first step, rows

    def infer(self, obs: Observation) -> dict[str, object]:
        """{"actions": float32[25, 8]}, fewer at the end of a plan: pose and gripper."""
        known = obs[PRIVILEGED]
        start, rows = self._plans.pop(known["episode"], (0, np.empty((0, 8))))
        at = known["step"] - start
        if known["step"] == 0 or not 0 <= at < len(rows):
            poses, grips = expert.plan_from(known["ee_pose"], known["red"], known["green"])
            start, rows, at = known["step"], np.column_stack([poses, grips]), 0
        self._plans[known["episode"]] = (start, rows)
        if len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)
        return {"actions": rows[at : at + _EXPERT_HORIZON].astype(np.float32)}
