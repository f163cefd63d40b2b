"""Closed-loop episodes against a policy server, with films: `openpi demo evaluate`.

The simulated robot talks to the server exactly as a real one would: through `openpi_client`, over a websocket.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from PIL import Image

from openpi.envs.tabletop import PROMPTS, TabletopEnv, tabletop_observation, tasks
from openpi.envs.tabletop.render import make_renderer
from openpi.envs.tabletop.world import CONTROL_HZ, FRONT_CAMERA, WRIST_CAMERA
from openpi.evaluation.rollout import Episode, EvaluationReport, Tally, evaluate, swapped
from openpi.evaluation.video import write_video
from openpi_client.base_policy import BasePolicy
from openpi_client.websocket_client_policy import WebsocketClientPolicy

_CONNECT_TIMEOUT_S = 300.0  # a model may compile before its server is ready
_FILM_PX = 192
_GAP_PX = 4


@dataclass(frozen=True)
class EvaluateOptions:
    """Plays closed-loop episodes against a running `openpi serve`, one at a time.

    Attributes:
        output: JSON file for the result; films lie beside it in `<name>_videos/`.
        host: of the server.
        port: of the server.
        port_file: read the port from here, where `openpi serve --port-file` wrote it.
        episodes: number of episodes; the prompts take turns.
        task: what is asked for.
        execute_horizon: steps of each chunk that are executed before the policy is asked again.
        seed: of the first scene; the following count up from it.
        videos: keep films of that many first episodes.
        swap_prompts: tell the policy another prompt than the one it is judged by, to see whether it listens.
    """

    output: Path
    host: str = "127.0.0.1"
    port: int | None = None
    port_file: Path | None = None
    episodes: int = 50
    task: Literal["pick", "reach", "place"] = "place"
    execute_horizon: int = 2
    seed: int = 1_000_000
    videos: int = 0
    swap_prompts: bool = False

    def __post_init__(self) -> None:
        if (self.port is None) == (self.port_file is None):
            raise ValueError("where is the server? Give either --port or --port-file.")
        if self.episodes < 1:
            raise ValueError(f"episodes is {self.episodes}; expected at least 1.")

    def server_port(self) -> int:
        """FileNotFoundError when the server has not written its port."""
        if self.port is not None:
            return self.port
        assert self.port_file is not None
        return int(self.port_file.read_text())


def evaluate_server(options: EvaluateOptions, on_episode: Callable[[int, Episode], None]) -> EvaluationReport:
    """Plays the episodes, and writes the films and the JSON file.

    Args:
        on_episode: called with the number of episodes so far and the latest.
    Raises:
        TimeoutError: no server there.
        RuntimeError: the server answered with an error.
    """
    prompts = PROMPTS[options.task]
    told_prompts = swapped(prompts) if options.swap_prompts else None
    count = 0

    def count_episode(episode: Episode) -> None:
        nonlocal count
        count += 1
        on_episode(count, episode)

    port = options.server_port()
    # A simulated world waits: no observation is too old.
    with WebsocketClientPolicy(options.host, port, connect_timeout_s=_CONNECT_TIMEOUT_S, max_age_s=None) as client:
        policy = TimedPolicy(client)
        table = TabletopEnv(options.task, num_blocks=3)
        watch = ToldGoalWatch(table, told_prompts or {})
        report = evaluate(
            lambda: BothCameras(watch, table),
            policy,
            seeds=range(options.seed, options.seed + options.episodes),
            prompts=prompts,
            told_prompts=told_prompts,
            execute_horizon=options.execute_horizon,
            observe=tabletop_observation,
            num_filmed=options.videos,
            on_episode=count_episode,
        )
    result = {
        **report.to_dict(),
        "task": options.task,
        "told": watch.tally.to_dict(),
        "round_trip_ms": policy.percentiles_ms(),
        "videos": _write_videos(report, options.output),
    }
    _write_json(options.output, result)
    return report


def progress_line(episode: Episode) -> str:
    """One episode for the terminal."""
    told = "" if episode.told_prompt == episode.prompt else f" (told: {episode.told_prompt})"
    outcome = "success" if episode.success else "failure"
    return f"{outcome} after {episode.num_steps} steps: {episode.prompt}{told}"


class TimedPolicy(BasePolicy):
    """Passes on what a policy answers, and keeps how long each answer took."""

    def __init__(self, policy: BasePolicy):
        self._policy = policy
        self._durations_ms: list[float] = []

    def infer(self, obs: dict) -> dict:
        started = time.perf_counter()
        answer = self._policy.infer(obs)
        self._durations_ms.append(1e3 * (time.perf_counter() - started))
        return answer

    def reset(self) -> None:
        self._policy.reset()

    def percentiles_ms(self) -> dict[str, float]:
        """Median and 95th percentile, without the first answer, which may include compilation."""
        durations = self._durations_ms[1:] or self._durations_ms
        return {f"p{q}": float(np.percentile(durations, q)) for q in (50, 95)}


class ToldGoalWatch(gymnasium.Wrapper):
    """Watches whether what the policy was told came true at any time, whatever the episode is judged by.

    Attributes:
        tally: episodes in which it did, out of all.
    """

    def __init__(self, env: TabletopEnv, told_prompts: dict[str, str]):
        super().__init__(env)
        self._table = env
        self._told_prompts = told_prompts
        self._came_true: list[bool] = []

    @property
    def tally(self) -> Tally:
        return Tally(sum(self._came_true), len(self._came_true))

    def reset(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        observation, info = super().reset(**kwargs)
        prompt: str = observation["prompt"]
        self._told_goal = tasks.parse_prompt(self._told_prompts.get(prompt) or prompt)
        self._came_true.append(False)
        return observation, info

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        result = super().step(action)
        self._came_true[-1] |= tasks.is_success(self._table.world, self._told_goal)
        return result


class BothCameras(gymnasium.Wrapper):
    """Films the front camera, and beside it what the policy sees through the wrist camera: uint8[h, w, 3]."""

    def __init__(self, env: gymnasium.Env, table: TabletopEnv):
        super().__init__(env)
        self._table = table
        self._renderer = make_renderer("rays", _FILM_PX)

    def reset(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        observation, info = super().reset(**kwargs)
        self._wrist = observation["images"][WRIST_CAMERA]
        return observation, info

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        result = super().step(action)
        self._wrist = result[0]["images"][WRIST_CAMERA]
        return result

    def render(self) -> Any:
        front = self._renderer.render(self._table.world, FRONT_CAMERA)
        wrist = Image.fromarray(self._wrist).resize((_FILM_PX, _FILM_PX), Image.Resampling.BICUBIC)
        return np.concatenate([front, np.full((_FILM_PX, _GAP_PX, 3), 255, np.uint8), np.asarray(wrist)], axis=1)


def _write_videos(report: EvaluationReport, output: Path) -> list[dict[str, Any]]:
    """One entry per film: what `Episode.to_dict` says, and `path` relative to the folder of `output`."""
    folder = output.with_name(f"{output.stem}_videos")
    entries = []
    for i, episode in enumerate(report.episodes):
        if episode.frames is not None:
            path = write_video(folder / f"{i:02d}.mp4", episode.frames, fps=CONTROL_HZ)
            entries.append({**episode.to_dict(), "path": f"{folder.name}/{path.name}"})
    return entries


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(value, indent=2))
    unfinished.replace(path)
