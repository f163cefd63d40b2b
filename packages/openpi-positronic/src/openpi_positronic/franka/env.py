"""The gymnasium face of the Franka world, at 15 Hz, and the adapter to the raw observation that codecs encode."""

import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from openpi.shared.strict_json import Json
from openpi_client.base_policy import Observation
from openpi_positronic.franka import stacking
from openpi_positronic.franka.render import HEIGHT, WIDTH, make_renderer
from openpi_positronic.franka.world import (
    EXTERIOR_CAMERA,
    JOINTS,
    MODEL_PATH,
    NUM_JOINTS,
    WRIST_CAMERA,
    FrankaWorld,
    signals,
)

CONTROL_HZ = 15
MAX_STEPS = 15 * CONTROL_HZ
CAMERAS = {"image.wrist": WRIST_CAMERA, "image.exterior": EXTERIOR_CAMERA}

CONTROLS: dict[str, Callable[[FrankaWorld, np.ndarray], None]] = {
    "ee_pose": FrankaWorld.move_to_pose,
    "joints": FrankaWorld.move_to_joints,
    "joint_deltas": FrankaWorld.move_joints_by,
}
"""How the first seven values of an action are meant: what codecs decode to."""

_MAX_DELTA_RAD = 0.2


class FrankaStackEnv(gymnasium.Env):
    """Stack the green cube on the red one.

    Observation: the raw signals of the robot (`robot_state.q`, `robot_state.dq` float64[7], `robot_state.ee_pose`
    float64[7], `grip` float64[1], `image.wrist` and `image.exterior` uint8[240, 320, 3]), and `prompt`.
    Action: float64[8], seven values as `control` says, then the gripper, 0 closed to 1 open.
    The reward is 1 on the step that ends a successful episode. A pose out of reach leaves the arm where it is, and sets
    `info["arm_failed"]`; `info["scores"]` are those of `stacking.scores`.

    Args:
        control: one of `CONTROLS`.
        renderer: `rays` (no graphics library needed) or `gl`.
        model_path: of another MuJoCo model with the same names.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  gymnasium's contract
        "render_modes": ["rgb_array"],
        "render_fps": CONTROL_HZ,
    }

    def __init__(
        self,
        control: str = "ee_pose",
        *,
        max_steps: int = MAX_STEPS,
        image_width: int = WIDTH,
        image_height: int = HEIGHT,
        renderer: str = "rays",
        render_mode: str | None = None,
        model_path: Path | str = MODEL_PATH,
    ):
        if control not in CONTROLS:
            raise ValueError(f"control is {control!r}; expected one of {', '.join(CONTROLS)}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode is {render_mode!r}; expected None or 'rgb_array'")
        self.world = FrankaWorld(model_path)
        self.render_mode = render_mode
        self._move = CONTROLS[control]
        self._max_steps = max_steps
        self._renderer = make_renderer(self.world, renderer, width=image_width, height=image_height)
        image = spaces.Box(0, 255, (image_height, image_width, 3), np.uint8)
        self.observation_space = _observation_space(image)
        self.action_space = _action_space(control, self.world)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, object] | None = None
    ) -> tuple[Observation, Json]:
        """Starts an episode; the same seed starts the same one.

        Raises:
            ValueError: an unknown option, or a `prompt` (the only one) for another task than this.
        """
        super().reset(seed=seed)
        options = dict(options or {})
        prompt = options.pop("prompt", stacking.TASK)
        if options:
            raise ValueError(f"reset option {min(options)!r} is unknown; expected prompt")
        if prompt != stacking.TASK:
            raise ValueError(f"prompt is {prompt!r}; this environment judges only {stacking.TASK!r}")
        self.world.reset(self.np_random)
        self._num_steps = 0
        self._end_ns = self.world.time_ns
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, Json]:
        """One control step of 1/15 s.

        Raises:
            ValueError: the action has another shape than [8] or is not finite.
        """
        action = np.asarray(action, np.float64)
        if action.shape != self.action_space.shape:
            raise ValueError(f"action has shape {action.shape}; expected {self.action_space.shape}")
        self._move(self.world, action[:NUM_JOINTS])
        self.world.set_gripper(float(action[NUM_JOINTS]))
        failed = self.world.has_failed
        if failed:
            self.world.recover()
        self._num_steps += 1
        self._end_ns += round(1e9 / CONTROL_HZ)  # a step of 66.7 ms is 33 or 34 of the physics
        self.world.step(round((self._end_ns - self.world.time_ns) / self.world.step_ns))
        info = self._info() | {"arm_failed": failed}
        truncated = not info["success"] and self._num_steps >= self._max_steps
        return self._observation(), float(info["success"]), info["success"], truncated, info

    def render(self) -> np.ndarray | None:
        """The exterior camera, uint8[h, w, 3], when `render_mode` is `rgb_array`."""
        return None if self.render_mode is None else self._renderer.render(EXTERIOR_CAMERA)

    def _observation(self) -> Observation:
        images = {name: self._renderer.render(camera) for name, camera in CAMERAS.items()}
        return {**signals(self.world), **images, "grip": np.array([self.world.grip]), "prompt": stacking.TASK}

    def _info(self) -> Json:
        scores = stacking.scores(self.world)
        return {"success": scores[stacking.SUCCESS] >= stacking.SOLVED_SCORE, "scores": scores, "arm_failed": False}


def franka_observation(observation: Observation) -> Observation:
    """The raw observation that codecs encode, from what `FrankaStackEnv` returns."""
    return {"task" if key == "prompt" else key: value for key, value in observation.items()}


def _action_space(control: str, world: FrankaWorld) -> spaces.Box:
    """What makes sense, to sample from; actions beyond it are allowed, and cut by the arm."""
    low, high = {
        "ee_pose": (np.full(NUM_JOINTS, -1.0), np.full(NUM_JOINTS, 1.0)),
        "joints": tuple(np.array([world.model.joint(name).range for name in JOINTS]).T),
        "joint_deltas": (np.full(NUM_JOINTS, -_MAX_DELTA_RAD), np.full(NUM_JOINTS, _MAX_DELTA_RAD)),
    }[control]
    return spaces.Box(np.append(low, 0.0), np.append(high, 1.0), dtype=np.float64)


def _observation_space(image: spaces.Box) -> spaces.Dict:
    limits = {"robot_state.q": 2 * np.pi, "robot_state.dq": 100.0, "robot_state.ee_pose": 2.0}
    return spaces.Dict(
        {
            **{name: spaces.Box(-limit, limit, (NUM_JOINTS,), np.float64) for name, limit in limits.items()},
            "grip": spaces.Box(-0.2, 1.2, (1,), np.float64),
            **dict.fromkeys(CAMERAS, image),
            "prompt": spaces.Text(len(stacking.TASK), charset=string.ascii_letters + " ."),
        }
    )
