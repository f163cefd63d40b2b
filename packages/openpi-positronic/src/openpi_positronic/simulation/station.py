"""A simulated robot with a policy in charge, tick by tick.

```
tick   cameras due -> state, scores -> recording
       poll (10 ms): steps that are due -> arm, gripper; none left -> ask the policy
       2 ms of physics
```

Simulated time stands still while the policy thinks, unless that is to be simulated too. Source: the serving
specification, section 6.8.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from openpi.shared.errors import listed
from openpi_positronic.codecs.action import COMMAND, GRIP
from openpi_positronic.codecs.codec import Step
from openpi_positronic.franka.render import Renderer
from openpi_positronic.franka.world import FrankaWorld, execute, signals
from openpi_positronic.raw_episodes import EpisodeWriter, RawDatasetWriter
from openpi_positronic.simulation.policies import RobotPolicy, WatchingPolicy
from openpi_sim import poses

logger = logging.getLogger(__name__)

Observer = Callable[[FrankaWorld], Mapping[str, float]]
OnFrames = Callable[[Mapping[str, np.ndarray]], None]

_NS_PER_S = 1_000_000_000
_POLL_NS = 10_000_000
_RECORDED_AS = {
    "cartesian_pos": ("robot_commands.pose", lambda command: poses.pose_of_command(command["pose"])),
    "joint_pos": ("robot_commands.joints", lambda command: np.asarray(command["positions"], np.float64)),
    "joint_delta": ("robot_commands.joint_deltas", lambda command: np.asarray(command["velocities"], np.float64)),
    "reset": ("robot_commands.reset", lambda command: 1),
}


class Station:
    """World, cameras, policy and recording as one robot; one instance serves one thread.

    Args:
        cameras: image signal -> camera of the model.
        observers: recorded at every tick beside the robot's own signals.
        recordings: where episodes are saved; None keeps none.
        seed: of the scenes; scene k of a seed is always the same.
        simulate_timeout: physics goes on for as long as the policy thinks.
        on_frames: shown what the cameras see, when they see something new.
        is_real_time: never runs ahead of the clock on the wall; for people who watch.
    """

    def __init__(
        self,
        world: FrankaWorld,
        policy: RobotPolicy,
        *,
        renderer: Renderer,
        cameras: Mapping[str, str],
        camera_fps: float = 15.0,
        observers: Sequence[Observer] = (),
        recordings: RawDatasetWriter | None = None,
        seed: int = 0,
        simulate_timeout: bool = False,
        on_frames: OnFrames | None = None,
        is_real_time: bool = False,
    ):
        self.world, self.policy, self.seed = world, policy, seed
        self._cameras = _Cameras(renderer, cameras, camera_fps)
        self._observers, self._recordings = tuple(observers), recordings
        self._simulate_timeout, self._on_frames, self._is_real_time = simulate_timeout, on_frames, is_real_time
        self._control: _Control | None = None
        self._recording: EpisodeWriter | None = None
        self._static: dict[str, Any] = {}
        self._num_scenes = 0
        self._paced_to_ns = 0
        if isinstance(policy, WatchingPolicy):
            policy.watch(world)
        self._draw_scene()

    @property
    def is_running(self) -> bool:
        """Whether an episode was started and not ended."""
        return self._control is not None

    @property
    def is_active(self) -> bool:
        """Whether the policy is in charge and not done."""
        return self._control is not None and not self._control.is_done

    def start(self, context: Mapping[str, object], static: Mapping[str, object] | None = None) -> None:
        """Puts the policy in charge and begins to record.

        Args:
            context: sent with every observation, such as `task`.
            static: further constants of the recorded episode.
        """
        self._control = _Control(self.world, self.policy, context, simulate_timeout=self._simulate_timeout)
        self._static = {
            **{key: value for key, value in context.items() if key == "task"},
            **{f"inference.context.{key}": value for key, value in context.items()},
            "inference.simulate_timeout": self._simulate_timeout,
            "simulation.mujoco_model_path": str(self.world.model_path),
            "simulation.seed": str(self.seed),
            "simulation.scene": str(self._num_scenes - 1),
            **(static or {}),
        }
        if self._recordings is not None:
            self._recording = self._recordings.new_episode()

    def run_for(self, seconds: float) -> None:
        """Lets simulated time pass; ends early if the policy is in charge and says that it is done."""
        was_active = self.is_active
        end_ns = self.world.time_ns + round(seconds * _NS_PER_S)
        while self.world.time_ns < end_ns and self.is_active == was_active:
            self.tick()

    def tick(self) -> None:
        """One step of the physics, and what is due before it."""
        now_ns = self.world.time_ns
        is_seen = self.is_running or self._on_frames is not None
        frames = self._cameras.due(now_ns) if is_seen else {}
        if frames and self._on_frames is not None:
            self._on_frames(frames)
        if self._recording is not None:
            self._record(self._recording, now_ns, frames)
        if self._control is not None:
            for name, value in self._control.poll(now_ns, self._cameras.latest):
                if self._recording is not None:
                    self._recording.append(name, value, now_ns)
        self.world.step()
        if self._is_real_time:
            self._keep_pace()

    def save(self, static: Mapping[str, object] | None = None) -> None:
        """Takes the policy out of charge, and completes the recording.

        Args:
            static: further constants of the episode.
        """
        self._release()
        recording, self._recording = self._recording, None
        if recording is not None:
            policy = {f"inference.policy.{key}": _plain(value) for key, value in self.policy.meta.items()}
            for name, value in {**self._static, **policy, **(static or {})}.items():
                if value is not None:
                    recording.set_static(name, value)
            logger.info("saved %s", recording.finish())

    def discard(self) -> None:
        """Takes the policy out of charge, and drops the recording."""
        self._release()
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.abort()

    def reset(self) -> None:
        """The arm at its start, new cubes, and a new episode for the policy."""
        self.policy.reset()
        self._draw_scene()

    def _release(self) -> None:
        """Takes the policy out of charge."""
        control, self._control = self._control, None
        if control is not None and control.num_unreachable:
            logger.warning(
                "%d times in this episode the arm could not reach what it was told; the rest of the chunk was dropped",
                control.num_unreachable,
            )

    def _draw_scene(self) -> None:
        self.world.reset(np.random.default_rng([self.seed, self._num_scenes]))
        self._num_scenes += 1

    def _record(self, recording: EpisodeWriter, now_ns: int, frames: Mapping[str, np.ndarray]) -> None:
        for name, value in (*signals(self.world).items(), *frames.items()):
            recording.append(name, value, now_ns)
        recording.append("robot_state.error", int(self.world.has_failed), now_ns)
        for observer in self._observers:
            for name, value in observer(self.world).items():
                recording.append(name, value, now_ns)

    def _keep_pace(self) -> None:
        """Sleeps while the world is ahead; what was slow is not caught up with."""
        self._paced_to_ns = max(self._paced_to_ns + self.world.step_ns, time.monotonic_ns() - _POLL_NS)
        ahead_ns = self._paced_to_ns - time.monotonic_ns()
        if ahead_ns > 0:
            time.sleep(ahead_ns / _NS_PER_S)


class _Cameras:
    """Pictures at a steady rate."""

    def __init__(self, renderer: Renderer, cameras: Mapping[str, str], fps: float):
        if not fps > 0:
            raise ValueError(f"camera_fps is {fps}; expected a rate above 0")
        self._renderer, self._cameras, self._fps = renderer, dict(cameras), fps
        self._next_ns = 0
        self.latest: dict[str, np.ndarray] = {}

    def due(self, now_ns: int) -> dict[str, np.ndarray]:
        """New pictures by signal, if it is time for some."""
        if now_ns < self._next_ns:
            return {}
        period_ns = round(_NS_PER_S / self._fps)
        is_steady = now_ns < self._next_ns + period_ns  # else nobody has looked for a while
        self._next_ns = (self._next_ns if is_steady else now_ns) + period_ns
        self.latest = {name: self._renderer.render(camera) for name, camera in self._cameras.items()}
        return self.latest


@dataclasses.dataclass
class _Answer:
    """What the policy said, and from when on it counts."""

    steps: list[Step]
    from_ns: int


class _Control:
    """Asks the policy, and carries out what it said when it is due."""

    def __init__(
        self, world: FrankaWorld, policy: RobotPolicy, context: Mapping[str, object], *, simulate_timeout: bool
    ):
        self._world, self._policy, self._context = world, policy, dict(context)
        self._simulate_timeout = simulate_timeout
        self._queue: deque[tuple[int, Step]] = deque()
        self._answer: _Answer | None = None
        self._next_poll_ns = 0
        self.num_unreachable = 0
        self.is_done = False

    def poll(self, now_ns: int, frames: Mapping[str, np.ndarray]) -> list[tuple[str, object]]:
        """Returns what was commanded, as (signal, value) to record: each signal once, with its last value."""
        if now_ns < self._next_poll_ns or self.is_done:
            return []
        self._next_poll_ns = now_ns + _POLL_NS
        if self._world.has_failed:
            self.num_unreachable += 1  # told at the end: a policy that has learnt little does it with every chunk
            self._queue.clear()
            self._world.recover()
            return []
        sent = self._send_due(now_ns)
        if not self._queue:
            self._think(now_ns, frames)
            sent |= self._send_due(now_ns)
        return list(sent.items())

    def _think(self, now_ns: int, frames: Mapping[str, np.ndarray]) -> None:
        if self._answer is None:
            started_ns = time.perf_counter_ns()
            steps = self._policy.infer(self._observation(now_ns, frames))
            took_ns = time.perf_counter_ns() - started_ns if self._simulate_timeout else 0
            self._answer = _Answer(steps, now_ns + took_ns)
        if now_ns < self._answer.from_ns:
            return
        steps, self._answer = self._answer.steps, None
        self.is_done = not steps
        stamped = ((now_ns + round(step.get("timestamp", 0.0) * _NS_PER_S), step) for step in steps)
        self._queue.extend(stamped)

    def _send_due(self, now_ns: int) -> dict[str, object]:
        sent: dict[str, Any] = {}
        while self._queue and self._queue[0][0] <= now_ns and not self._world.has_failed:
            _, step = self._queue.popleft()
            command, grip = _checked(step)
            execute(self._world, command)
            self._world.set_gripper(grip)
            if command["type"] in _RECORDED_AS:
                name, value_of = _RECORDED_AS[command["type"]]
                sent[name] = value_of(command)
            sent[GRIP] = grip
        return sent

    def _observation(self, now_ns: int, frames: Mapping[str, np.ndarray]) -> dict[str, object]:
        return {
            **signals(self._world),
            **frames,
            "__wall_time_ns__": time.time_ns(),
            "__inference_time_ns__": now_ns,
            **self._context,
        }


def _checked(step: Step) -> tuple[Step, float]:
    if missing := [key for key in (COMMAND, GRIP) if key not in step]:
        raise ValueError(
            f"a step of the policy lacks {listed(missing)}; it has {listed(step)}. A server without a codec needs one "
            "on this side: --policy.codec=@positronic.vendors.openpi.codecs.ee"
        )
    return step[COMMAND], float(step[GRIP])


def _plain(value: object) -> object:
    """As JSON holds it."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
