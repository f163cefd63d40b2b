"""Closed-loop episodes: an environment, a policy, and what came of it.

A simulator is treated as a robot: the policy sees only what a robot client would send and may as well sit
behind a socket. Chunks are executed through the same broker that robots use.

    env.reset -> observe -> broker -> policy     (a new chunk every `execute_horizon` steps)
        ^                      |
        '------ env.step <- one action
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from openpi.evaluation.stats import wilson_interval
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.base_policy import BasePolicy

Observe = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Episode:
    """One episode. `prompt` is what was judged, `told_prompt` what the policy was given: mostly the same."""

    seed: int
    prompt: str
    told_prompt: str
    success: bool
    num_steps: int
    seconds: float  # wall clock, physics, pictures and inference together
    frames: np.ndarray | None = field(default=None, repr=False, compare=False)  # uint8[t, h, w, 3], if filmed

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without the film."""
        names = ("seed", "prompt", "told_prompt", "success", "num_steps", "seconds")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Tally:
    """Successes out of trials."""

    successes: int
    trials: int

    @property
    def rate(self) -> float:
        return self.successes / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the true rate."""
        return wilson_interval(self.successes, self.trials)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "successes": self.successes,
            "trials": self.trials,
            "rate": self.rate,
            "wilson_95": list(self.interval),
        }

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.successes}/{self.trials} = {self.rate:.0%} (95 % interval {low:.0%} to {high:.0%})"


@dataclass(frozen=True)
class EvaluationReport:
    """What an evaluation found; `str(report)` is a table for people, `to_dict()` is for files."""

    episodes: tuple[Episode, ...]
    execute_horizon: int
    seconds: float

    @property
    def total(self) -> Tally:
        return _tally(self.episodes)

    @property
    def per_prompt(self) -> dict[str, Tally]:
        prompts = dict.fromkeys(episode.prompt for episode in self.episodes)
        return {prompt: _tally([e for e in self.episodes if e.prompt == prompt]) for prompt in prompts}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; films are left out."""
        return {
            "total": self.total.to_dict(),
            "per_prompt": {prompt: tally.to_dict() for prompt, tally in self.per_prompt.items()},
            "execute_horizon": self.execute_horizon,
            "seconds": self.seconds,
            "episodes": [episode.to_dict() for episode in self.episodes],
        }

    def __str__(self) -> str:
        width = max(len(prompt) for prompt in (*self.per_prompt, "all"))
        rows = [*self.per_prompt.items(), ("all", self.total)]
        return "\n".join(f"{prompt:<{width}}  {tally}" for prompt, tally in rows)


def run_episode(
    env: gymnasium.Env,
    policy: BasePolicy,
    *,
    seed: int,
    prompt: str | None = None,
    told_prompt: str | None = None,
    observe: Observe = dict,
    film: bool = False,
) -> Episode:
    """Plays one episode to its end.

    Args:
        env: its observations hold `prompt`; its `info` holds `success` (else termination counts as success);
            `reset` takes `options={"prompt": ...}` when a prompt is given.
        policy: answers each observation with one action, `{"actions": [d]}`: usually an `ActionChunkBroker`.
        prompt: what to do and to judge; None leaves the choice to the environment.
        told_prompt: what the policy is told instead, to see whether it listens.
        observe: turns the environment's observation into the one the policy is sent.
        film: keep `env.render()` of every step.
    """
    started = time.perf_counter()
    observation, info = env.reset(seed=seed, options=None if prompt is None else {"prompt": prompt})
    policy.reset()
    judged_prompt = observation["prompt"]
    said = judged_prompt if told_prompt is None else told_prompt
    frames: list[Any] = [env.render()] if film else []
    num_steps = 0
    terminated = truncated = False
    while not (terminated or truncated):
        answer = policy.infer(observe({**observation, "prompt": said}))
        observation, _, terminated, truncated, info = env.step(answer["actions"])
        num_steps += 1
        if film:
            frames.append(env.render())
    return Episode(
        seed=seed,
        prompt=judged_prompt,
        told_prompt=said,
        success=bool(info.get("success", terminated)),
        num_steps=num_steps,
        seconds=time.perf_counter() - started,
        frames=np.stack(frames) if film else None,
    )


def evaluate(
    make_env: Callable[[], gymnasium.Env],
    policy: BasePolicy,
    *,
    seeds: Iterable[int],
    prompts: Sequence[str] | None = None,
    told_prompts: Mapping[str, str] | None = None,
    execute_horizon: int = 6,
    observe: Observe = dict,
    num_filmed: int = 0,
    on_episode: Callable[[Episode], None] | None = None,
) -> EvaluationReport:
    """Plays one episode per seed and counts successes.

    Args:
        policy: answers an observation with a chunk, `{"actions": [h, d]}`, h >= `execute_horizon`.
        prompts: taken in turn over the seeds; None leaves the choice to the environment.
        told_prompts: judged prompt -> what the policy is told instead (see `swapped`).
        execute_horizon: steps of each chunk that are executed before the policy is asked again.
        num_filmed: keep the film of that many first episodes; `make_env` then sets `render_mode="rgb_array"`.
        on_episode: called after each episode, for progress.
    Raises:
        ValueError: there are no seeds.
    """
    started = time.perf_counter()
    broker = ActionChunkBroker(policy, execute_horizon)
    env = make_env()
    episodes: list[Episode] = []
    try:
        for i, seed in enumerate(seeds):
            prompt = prompts[i % len(prompts)] if prompts else None
            episode = run_episode(
                env,
                broker,
                seed=seed,
                prompt=prompt,
                told_prompt=(told_prompts or {}).get(prompt) if prompt else None,
                observe=observe,
                film=i < num_filmed,
            )
            episodes.append(episode)
            if on_episode is not None:
                on_episode(episode)
    finally:
        env.close()
    if not episodes:
        raise ValueError("seeds is empty; expected at least one seed, one per episode.")
    return EvaluationReport(tuple(episodes), execute_horizon, time.perf_counter() - started)


def swapped(prompts: Sequence[str]) -> dict[str, str]:
    """Each prompt with the next one in its place: a policy that listens now fails by the judged prompt."""
    return dict(zip(prompts, [*prompts[1:], *prompts[:1]], strict=True))


def _tally(episodes: Sequence[Episode]) -> Tally:
    return Tally(sum(episode.success for episode in episodes), len(episodes))
