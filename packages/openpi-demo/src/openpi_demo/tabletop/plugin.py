"""The table-top as a world to be evaluated in. A task is named by the prompt that is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from PIL import Image

from openpi.envs.world import PRIVILEGED, Task
from openpi_client.base_policy import Observation
from openpi_demo.tabletop import expert, tasks
from openpi_demo.tabletop.env import MAX_STEPS, STABLE_STEPS, tabletop_observation
from openpi_demo.tabletop.render import make_renderer
from openpi_demo.tabletop.world import CAMERAS, CONTROL_HZ, FRONT_CAMERA, WRIST_CAMERA, Block, Plate, Scene
from openpi_demo.tabletop.world import TabletopWorld as Physics

_FILM_PX, _GAP_PX = 192, 4
_NOT_RECORDED = 0x7AB1E  # other scenes than those of `openpi demo record`, whose seeds stand alone
_EXPERT_HORIZON = 12


@dataclass(frozen=True)
class Tabletop:
    """The table-top of the demo: an arm, three coloured blocks, two plates.

    Attributes:
        task: what is asked for.
        swap_prompts: tell the policy another prompt than the one it is judged by, to see whether it listens.
    """

    task: Literal["pick", "reach", "place"] = "place"
    swap_prompts: bool = False

    recipe: ClassVar[str] = "tabletop_place"
    control_hz: ClassVar[float] = CONTROL_HZ
    execute_horizon: ClassVar[int] = 2

    def tasks(self) -> Sequence[Task]:
        judged = tasks.PROMPTS[self.task]
        told = [*judged[1:], *judged[:1]] if self.swap_prompts else judged
        return [Task(name, prompt, MAX_STEPS) for name, prompt in zip(judged, told, strict=True)]

    def open(self, *, privileged: bool = False) -> TabletopWorld:
        return TabletopWorld(self.task, privileged=privileged)

    def expert(self) -> TabletopExpert:
        return TabletopExpert()


class TabletopWorld:
    """See `World`. Each task and seed has a scene of its own."""

    def __init__(self, kind: str, *, privileged: bool) -> None:
        self._kind, self._is_privileged = kind, privileged
        self._eye, self._film = make_renderer("rays"), make_renderer("rays", _FILM_PX)

    def reset(self, task: Task, seed: int) -> None:
        rng = np.random.default_rng([seed, tasks.PROMPTS[self._kind].index(task.name), _NOT_RECORDED])
        self._physics = Physics(tasks.sample_scene(rng, self._kind, num_blocks=3))
        self._task, self._episode = task, f"{task.name} {seed}"
        self._goal, self._told = tasks.parse_prompt(task.name), tasks.parse_prompt(task.prompt)
        self._num_steps = self._num_stable = 0
        self._came_true = False

    def observe(self) -> Observation:
        images = {camera: self._eye.render(self._physics, camera) for camera in CAMERAS}
        sent = tabletop_observation({"images": images, "state": self._physics.state, "prompt": self._task.prompt})
        return {**sent, PRIVILEGED: self._known()} if self._is_privileged else sent

    def step(self, action: np.ndarray) -> None:
        self._physics.step(np.asarray(action, np.float32))
        self._num_steps += 1
        self._num_stable = self._num_stable + 1 if tasks.is_success(self._physics, self._goal) else 0
        self._came_true |= tasks.is_success(self._physics, self._told)

    def hold(self) -> np.ndarray:
        return self._physics.state.astype(np.float64)

    @property
    def is_success(self) -> bool:
        return self._num_stable >= STABLE_STEPS

    def measurements(self) -> Mapping[str, float]:
        """`told`: whether what the policy was told came true at any time, whatever it is judged by."""
        return {"told": float(self._came_true)}

    def render(self) -> np.ndarray:
        """The front camera, and beside it what the policy sees through the wrist camera."""
        seen = Image.fromarray(self._eye.render(self._physics, WRIST_CAMERA))
        wrist = np.asarray(seen.resize((_FILM_PX, _FILM_PX), Image.Resampling.BICUBIC))
        gap = np.full((_FILM_PX, _GAP_PX, 3), 255, np.uint8)
        return np.concatenate([self._film.render(self._physics, FRONT_CAMERA), gap, wrist], axis=1)

    def close(self) -> None:
        """Nothing is open."""

    def _known(self) -> dict[str, object]:
        scene = self._physics.scene
        return {
            "episode": self._episode,
            "step": self._num_steps,
            "blocks": {block.colour: [block.x, block.y] for block in scene.blocks},
            "plates": {plate.colour: [plate.x, plate.y] for plate in scene.plates},
            "tip": list(scene.tip),
        }


class TabletopExpert:
    """See `Expert`. The path is a function of scene and prompt, so nothing has to be remembered."""

    def infer(self, obs: Observation) -> dict[str, object]:
        """{"actions": float32[12, 6]}: what is left of the path, then its end."""
        known = obs[PRIVILEGED]
        blocks = tuple(Block(colour, *place) for colour, place in known["blocks"].items())
        plates = tuple(Plate(colour, *place) for colour, place in known["plates"].items())
        x, y, z = known["tip"]
        path = expert.actions(expert.plan(Scene(blocks, plates, (x, y, z)), tasks.parse_prompt(obs["prompt"])))
        return {"actions": path[np.minimum(known["step"] + np.arange(_EXPERT_HORIZON), len(path) - 1)]}
