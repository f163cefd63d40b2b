"""An episode, played as a robot would: the control loop of `openpi_client.realtime` under a virtual clock.

tick k     the clock moves: the world takes the command of tick k - 1 -> answer, if there -> observe, ask -> command
"""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from openpi.envs.world import MeasuredWorld, Task, World
from openpi.evaluation.episodes import Episode
from openpi_client import realtime
from openpi_client.base_policy import BasePolicy, Metadata, Observation
from openpi_client.realtime import strategies

Ask = Callable[[dict[str, Any]], dict[str, Any]]

STRATEGIES: Mapping[str, Callable[[int | None], strategies.Strategy]] = {
    "synchronous": realtime.Synchronous,
    "receding": realtime.Receding,
    "ensembling": lambda rows: realtime.TemporalEnsembling(rate_of_inference=rows or 1),
    "guided-rtc": realtime.GuidedRTC,
    "trained-rtc": realtime.TrainedRTC,
}
_FILM_HZ = 15.0
# What servers answer when the model has written no actions: a failure of the policy, as on a robot, where it holds.
_FAILURES_OF_POLICY = ("UndecodableActionsError", "ActionsError")


class NoAnswerError(RuntimeError):
    """Nothing to play came in a whole episode, or the server refused or failed in it: a mistake in the setup, and no
    failure of the policy."""


@dataclasses.dataclass(frozen=True)
class Player:
    """How episodes are played; goes to other processes.

    Attributes:
        strategy: one of `STRATEGIES`.
        execute_horizon: rows of a chunk that are played before the policy is asked again; None = the strategy's.
        latency_s: of each answer, on the world's clock.
        rate_hz: of the control ticks.
        metadata: of the server, with what it does not tell from the world's recipe.
        sends_seed: whether each request carries one, so that the answer can be repeated.
    """

    strategy: str
    execute_horizon: int | None
    latency_s: float
    rate_hz: float
    metadata: Mapping[str, Any]
    sends_seed: bool

    def chunks(self) -> strategies.Strategy:
        """
        Raises:
            ValueError: an unknown strategy, one that the server cannot serve, or an impossible horizon.
        """
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is {self.strategy!r}; expected one of {', '.join(STRATEGIES)}")
        wanted = STRATEGIES[self.strategy](self.execute_horizon)
        _, why_other = strategies.usable(wanted, self.metadata)
        if why_other:
            raise ValueError(f"--strategy {self.strategy}: {why_other}. Serve the policy otherwise, or choose another")
        return wanted

    def play(self, world: World, task: Task, seed: int, ask: Ask) -> tuple[Episode, np.ndarray]:
        """One episode, and the actions that the world took, float64[num_steps, action_dim].

        Raises:
            NoAnswerError: no answer of the policy could be played, or the server had trouble with one.
            Exception: whatever the world raises.
        """
        started = time.perf_counter()
        world.reset(task, seed)
        body, warnings = _Body(world, self.rate_hz), []
        policy = _Asked(ask, f"{task.name} {seed}" if self.sends_seed else None)
        clock = realtime.VirtualClock(on_advance=body.move)
        loop = realtime.ControlLoop(
            body,
            realtime.SimulatedLatency(policy, clock, [self.latency_s], self.metadata),
            strategy=self.chunks(),
            # What a benchmark counts is the policy's own actions; the robot is not dangerous, and starts where it is.
            safety=realtime.Safety(
                blend_s=0, accept_warnings=True, frozen_after_s=None, limits=realtime.Limits(low=-np.inf)
            ),
            rate_hz=self.rate_hz,
            action_width=len(body.pose()),
            hold=None if _tells_hold(self.metadata) else _holds(body.pose()),
            on_warning=warnings.append,
            clock=clock,
        )
        summary = loop.run(max_s=task.max_steps / self.rate_hz, until=lambda: body.is_success or bool(policy.trouble))
        if not summary["rows_played"]:
            reason = policy.last_error or [summary["end"], *warnings][-1]
            raise NoAnswerError(f"no row of the policy was played: {reason}")
        if policy.trouble:
            raise NoAnswerError(f"the server refused or failed, so the episode does not count: {policy.trouble}")
        episode = Episode(
            task.name,
            policy.prompt or task.prompt,
            seed,
            body.is_success,
            len(body.taken),
            "success" if body.is_success else summary["end"],
            policy.count,
            summary["ticks_without_row_after_start"],
            time.perf_counter() - started,
            tuple(warnings),
            dict(world.measurements()) if isinstance(world, MeasuredWorld) else {},
        )
        return episode, np.array(body.taken)


def film(world: World, task: Task, seed: int, commands: np.ndarray, rate_hz: float) -> tuple[np.ndarray, float, bool]:
    """An episode once more, from its commands: uint8[t, h, w, 3], frames per second, and whether it succeeded."""
    stride = max(1, round(rate_hz / _FILM_HZ))
    world.reset(task, seed)
    frames = [world.render()]
    for count, command in enumerate(commands, start=1):
        world.step(command)
        if count % stride == 0 or count == len(commands):
            frames.append(world.render())
    return np.stack(frames), rate_hz / stride, world.is_success


class _Body(realtime.Robot):
    """A world as a robot: what is commanded is done while the clock moves.

    Attributes:
        taken: the actions so far.
        is_success: whether the task was done at the end of a tick; the world then rests.
    """

    def __init__(self, world: World, rate_hz: float) -> None:
        self._world, self._rate_hz = world, rate_hz
        self._command = self._start = np.asarray(world.hold(), np.float64)
        self.taken: list[np.ndarray] = []
        self.is_success = False

    def observe(self) -> Observation:
        return self._world.observe()

    def apply(self, action: np.ndarray) -> None:
        self._command = action

    def pose(self) -> np.ndarray:
        """As far as the loop knows it: it holds there until the first answer."""
        return self._start

    def move(self, seconds: float) -> None:
        for _ in range(round(seconds * self._rate_hz)):
            if self.is_success:
                return
            self.taken.append(self._command.copy())
            self._world.step(self._command.copy())
            self.is_success = bool(self._world.is_success)


class _Asked(BasePolicy):
    """Counts the questions of an episode, and numbers the noise of their answers.

    Attributes:
        last_error: of an answer.
        trouble: the last one that says nothing of the policy.
    """

    def __init__(self, ask: Ask, seed: str | None) -> None:
        self._ask, self._seed = ask, seed
        self.count = 0
        self.prompt = self.last_error = self.trouble = ""

    def infer(self, obs: Observation) -> dict[str, object]:
        self.count += 1
        self.prompt = str(obs.get("prompt", ""))
        seed = {} if self._seed is None else {"seed": zlib.crc32(f"{self._seed} {self.count}".encode())}
        answer = self._ask({**obs, **seed})
        if "error" in answer:
            self.last_error = str(answer["error"])
            if self.last_error.partition(":")[0] not in _FAILURES_OF_POLICY:
                self.trouble = self.last_error
            raise RuntimeError(self.last_error)
        return answer


def _holds(start: np.ndarray) -> Sequence[Literal["stay", "zero"]]:
    """How each dimension stands still, by what does so at the start: a command of zeros, but for the gripper, is one of
    steps or velocities; any other is a place, in which single joints may well be at zero.
    """
    is_place = bool(start[:-1].any())
    return [*("stay" if is_place else "zero" for _ in start[:-1]), "stay"]


def _tells_hold(metadata: Metadata) -> bool:
    actions = metadata.get("contract", {}).get("actions", {})
    return "hold" in actions or any(
        word in actions.get("kind", "") for word in ("absolute", "veloc", "relative", "delta")
    )
