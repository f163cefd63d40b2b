"""The gymnasium face of the table-top, and the adapter to the observation that policies are given."""

import string
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from openpi.shared.strict_json import Json
from openpi_client.base_policy import Observation
from openpi_demo.tabletop import arm, tasks
from openpi_demo.tabletop.render import make_renderer
from openpi_demo.tabletop.world import CAMERAS, CONTROL_HZ, FRONT_CAMERA, WRIST_CAMERA, Scene, TabletopWorld

MAX_STEPS = 70  # more than twice what the expert needs
STABLE_STEPS = 2  # success must hold this long: a block flung past the mark is no pick
_RENDER_SIZE = 256
_OPTIONS = ("prompt", "scene", "num_blocks")


class TabletopEnv(gymnasium.Env):
    """Do what the prompt says, at 10 Hz.

    Observation: `images` (`front`, `wrist`: uint8[size, size, 3], RGB), `state` float32[6] and `prompt`.
    Action: float32[6], absolute targets in the layout of the state (`arm.STATE_NAMES`): rad, gripper 0 to 1.
    The reward is 1 on the step that ends a successful episode; after `max_steps` it is truncated.
    `info["success"]` tells whether the goal is met right now.

    Args:
        task: `pick`, `reach` or `place`.
        num_blocks: in scenes that `reset` draws, 1 to 3; None draws the number too.
        renderer: `rays` (no graphics library needed) or `gl`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  gymnasium's contract
        "render_modes": ["rgb_array"],
        "render_fps": CONTROL_HZ,
    }

    def __init__(
        self,
        task: str = tasks.PICK,
        *,
        image_size: int = 64,
        num_blocks: int | None = 3,
        max_steps: int = MAX_STEPS,
        renderer: str = "rays",
        render_mode: str | None = None,
    ):
        if task not in tasks.GOALS:
            raise ValueError(f"task is {task!r}; expected one of {sorted(tasks.GOALS)}.")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is {render_mode!r}; expected None or 'rgb_array'.")
        self.task = task
        self.render_mode = render_mode
        self.observation_space = _observation_space(image_size)
        self.action_space = spaces.Box(arm.STATE_LOW, arm.STATE_HIGH, dtype=np.float32)
        self._num_blocks = num_blocks
        self._max_steps = max_steps
        self._renderer = make_renderer(renderer, image_size)
        self._film_renderer = make_renderer(renderer, _RENDER_SIZE)
        self._world: TabletopWorld | None = None

    @property
    def world(self) -> TabletopWorld:
        """The physics of this episode; RuntimeError before the first `reset`."""
        if self._world is None:
            raise RuntimeError("the environment has no scene yet; call reset() first.")
        return self._world

    @property
    def goal(self) -> tasks.Goal:
        """What this episode's prompt asks for."""
        assert self.world is not None
        return self._goal

    def reset(self, *, seed: int | None = None, options: Json | None = None) -> tuple[Observation, Json]:
        """Starts an episode; the same seed and options start the same one.

        Options, all optional: `prompt` (else one that fits the scene is drawn), `scene` (a `world.Scene`,
        else drawn) and `num_blocks` (for the drawn scene).

        Raises:
            ValueError: an option is unknown, or the prompt asks for something that is not there.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        if unknown := sorted(set(options) - set(_OPTIONS)):
            raise ValueError(f"reset option {unknown[0]!r} is unknown; expected {', '.join(_OPTIONS)}.")
        scene = options.get("scene") or tasks.sample_scene(
            self.np_random, self.task, num_blocks=options.get("num_blocks", self._num_blocks)
        )
        self._goal = self._choose_goal(scene, options.get("prompt"))
        self._world = TabletopWorld(scene)
        self._num_steps = 0
        self._num_stable_steps = 0
        return self._observation(), {"success": False}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, Json]:
        """One control step of 0.1 s; `action` is clipped to the action space.

        Raises:
            ValueError: the action has another shape than [6] or is not finite.
        """
        self.world.step(_checked(action))
        self._num_steps += 1
        success = tasks.is_success(self.world, self._goal)
        self._num_stable_steps = self._num_stable_steps + 1 if success else 0
        terminated = self._num_stable_steps >= STABLE_STEPS
        truncated = not terminated and self._num_steps >= self._max_steps
        return self._observation(), float(terminated), terminated, truncated, {"success": success}

    def render(self) -> np.ndarray | None:
        """The front camera, uint8[256, 256, 3], when `render_mode` is `rgb_array`."""
        if self.render_mode is None:
            return None
        return self._film_renderer.render(self.world, FRONT_CAMERA)

    def _choose_goal(self, scene: Scene, prompt: str | None) -> tasks.Goal:
        goals = tasks.goals_in(scene, self.task)
        if prompt is None:
            return goals[self.np_random.integers(len(goals))]
        goal = tasks.parse_prompt(prompt)
        if goal not in goals:
            possible = "; ".join(other.prompt for other in goals)
            raise ValueError(f"prompt is {prompt!r}, but this scene only allows: {possible}.")
        return goal

    def _observation(self) -> dict[str, object]:
        images = {camera: self._renderer.render(self.world, camera) for camera in CAMERAS}
        return {"images": images, "state": self.world.state, "prompt": self._goal.prompt}


def tabletop_observation(observation: Observation) -> Observation:
    """What a client of this robot sends to a policy, from what `TabletopEnv` returns; LIBERO's key names."""
    return {
        "observation/image": observation["images"][FRONT_CAMERA],
        "observation/wrist_image": observation["images"][WRIST_CAMERA],
        "observation/state": observation["state"],
        "prompt": observation["prompt"],
    }


def _observation_space(image_size: int) -> spaces.Dict:
    image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
    low = np.array([*[-np.pi] * arm.NUM_JOINTS, 0.0], dtype=np.float32)
    high = np.array([*[np.pi] * arm.NUM_JOINTS, 1.0], dtype=np.float32)
    longest = max(len(prompt) for prompts in tasks.PROMPTS.values() for prompt in prompts)
    return spaces.Dict(
        {
            "images": spaces.Dict(dict.fromkeys(CAMERAS, image)),
            "state": spaces.Box(low, high, dtype=np.float32),
            "prompt": spaces.Text(longest, charset=string.ascii_lowercase + " "),
        }
    )


def _checked(action: np.ndarray) -> np.ndarray:
    action = np.asarray(action, dtype=np.float32)
    if action.shape != (arm.STATE_DIM,):
        raise ValueError(f"action has shape {action.shape}; expected ({arm.STATE_DIM},): {', '.join(arm.STATE_NAMES)}.")
    if not np.isfinite(action).all():
        raise ValueError(f"action holds values that are not finite: {action}.")
    return action
