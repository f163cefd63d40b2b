"""Episodes of a policy in worlds, and what came of them: the folder with `results.json`, films and `report.html`."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openpi.envs.world import Task, WorldConfig
from openpi.evaluation import fit
from openpi.evaluation.asker import Asker
from openpi.evaluation.episodes import RESULTS_FILE, Episode, EpisodeFolder, write_json
from openpi.evaluation.play import Player
from openpi.evaluation.pooled_worlds import PooledWorlds
from openpi.evaluation.stats import Paired, Tally
from openpi.evaluation.worlds import Done, Job, Seat, Worlds
from openpi.shared.strict_json import Json
from openpi_client.base_policy import Observation, Reply

_MOST_ERRORS = 3
_LEAST = {"trials": 1, "workers": 1, "episodes": 1, "execute_horizon": 1, "seed": 0, "latency_ms": 0, "videos": 0}
_NOT_REPEATABLE = "played again from its commands it ended otherwise: the world is not repeatable"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What is played, whichever policy plays it.

    Attributes:
        world: name, for `find`.
        config: the world.
        recipe: contract of the recipe that the world speaks, as servers tell theirs; empty = unknown.
        tasks: names or patterns (`*red*`); empty = all.
        trials: episodes of each task, with seeds from `seed` on.
        episodes: at most so many in all, tasks taking turns; None = all.
        seed: of the first trial.
        workers: worlds at once.
        strategy, execute_horizon, latency_ms: see `Player`.
        videos: episodes that are filmed, failures first.
        any_rate: play one row a tick even if the policy was trained at another rate.
        is_privileged: let the policy see what only a simulator knows.
    """

    world: str
    config: WorldConfig
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tasks: Sequence[str] = ()
    trials: int = 10
    episodes: int | None = None
    seed: int = 0
    workers: int = 1
    strategy: str = "synchronous"
    execute_horizon: int | None = None
    latency_ms: float = 0.0
    videos: int = 0
    any_rate: bool = False
    is_privileged: bool = False

    @functools.cached_property
    def jobs(self) -> list[Job]:
        """All episodes, tasks taking turns, so that an evaluation that is cut short has something of each.

        Raises:
            ValueError: no task has such a name, or a number is out of range.
            ImportError: the world is not installed.
        """
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} is {value}; expected {least} or more")
        tasks = _selected(self.config.tasks(), self.tasks)
        jobs = [Job(task, seed) for seed in range(self.seed, self.seed + self.trials) for task in tasks]
        return jobs[: self.episodes]

    def player(self, metadata: Mapping[str, object]) -> Player:
        """For a server with this metadata.

        Raises:
            ValueError: its policy does not fit the world, or cannot be played so.
        """
        contract = metadata.get("contract")
        rate_hz = float(self.config.control_hz)
        if isinstance(contract, Mapping):
            fit.check(contract, self.recipe, rate_hz=rate_hz, any_rate=self.any_rate)
        told = fit.completed(metadata, self.recipe, rate_hz=rate_hz)
        rows = getattr(self.config, "execute_horizon", None) if self.execute_horizon is None else self.execute_horizon
        # pi0-FAST writes its actions token by token; servers that tell no contract are not ours.
        sends_seed = isinstance(contract, Mapping) and "fast" not in str(contract.get("model_type")).lower()
        player = Player(self.strategy, rows, self.latency_ms / 1e3, rate_hz, told, sends_seed)
        player.chunks()
        return player

    def options(self, policy: Mapping[str, object], player: Player) -> dict[str, object]:
        """What the outcome of an episode depends on, JSON-ready."""
        config: Any = self.config
        return {
            "world": self.world,
            "world_options": {name: str(value) for name, value in dataclasses.asdict(config).items()},
            "policy": policy,
            "contract": player.metadata["contract"],
            "strategy": self.strategy,
            "execute_horizon": player.execute_horizon,
            "latency_ms": self.latency_ms,
        }


def evaluate(
    plan: Evaluation,
    asker: Asker,
    output: Path,
    *,
    policy: Mapping[str, object],
    resume: bool = False,
    on_done: Callable[[Done, Tally], None] = lambda done, tally: None,
    open_worlds: Callable[[Seat], Worlds | PooledWorlds] | None = None,
) -> dict[str, object]:
    """Plays what is not there yet, films, and writes `results.json`.

    Args:
        policy: what is evaluated, JSON-ready.
        on_done: called after each episode that was played, or could not be, with what there is so far.
        open_worlds: where they are played; None = in `plan.workers` processes of this machine.
    Returns:
        the contents of `results.json`.
    Raises:
        ValueError: policy and world do not fit, or the folder is of another evaluation.
        FileExistsError, BlockingIOError: as of `EpisodeFolder`.
        ConnectionError, CommandFailedError: the server is away; the episodes so far are kept.
        RuntimeError: several episodes could not be played; of fewer the results tell, as `errors`.
        OSError: the disk is full.
    """
    player = plan.player(asker.metadata)
    folder = EpisodeFolder(output, plan.options(policy, player), resume=resume)
    try:
        todo = [job for job in plan.jobs if job.key not in folder.episodes]
        seat = Seat.of(plan.world, plan.config, player, is_privileged=plan.is_privileged)
        with open_worlds(seat) if open_worlds else Worlds(seat, plan.workers) as worlds:
            started = time.perf_counter()
            errors = _play(worlds, todo, asker, folder, on_done)
            timing = (
                {**asker.timing(), "wall_s": time.perf_counter() - started, "num_played": len(todo)} if todo else {}
            )
            played = [folder.episodes[job.key] for job in plan.jobs if job.key in folder.episodes]
            videos, film_errors = _film(worlds, plan, played, folder)
        results = {
            **summary(played),
            **folder.options,
            **({**timing, **asker.timing()} if todo else {}),
            "seed": plan.seed,
            "workers": plan.workers,
            "repeatable": player.sends_seed,
            "errors": [*errors, *film_errors],
            "videos": videos,
            "episodes": [episode.to_dict() for episode in played],
        }
        write_json(output / RESULTS_FILE, results)
    finally:
        folder.close()
    return results


def _play(
    worlds: Worlds | PooledWorlds,
    jobs: Sequence[Job],
    asker: Asker,
    folder: EpisodeFolder,
    on_done: Callable[[Done, Tally], None],
) -> list[str]:
    """Plays and keeps episodes; returns why some could not be played."""
    errors: list[str] = []
    for done in worlds.run(jobs, asker):
        if done.error:
            errors.append(done.error)
            if len(errors) >= _MOST_ERRORS or not folder.episodes:  # it will not get better
                raise RuntimeError(f"{len(errors)} episodes could not be played, the first: {errors[0]}")
        else:
            folder.add(*done.result)
        on_done(done, Tally.of(episode.success for episode in folder.episodes.values()))
    return errors


def _film(
    worlds: Worlds | PooledWorlds, plan: Evaluation, played: Sequence[Episode], folder: EpisodeFolder
) -> tuple[list[dict[str, object]], list[str]]:
    """Plays the chosen episodes once more, from their commands: which of them failed is known only now.

    Returns:
        the films, and why some are missing.
    """
    chosen = sorted(played, key=lambda episode: episode.success)[: plan.videos]
    tasks = {job.task.name: job.task for job in plan.jobs}
    jobs, videos, errors = {}, {}, []
    for episode in chosen:
        video = folder.path / "videos" / f"{folder.file_name(episode)}.mp4"
        try:
            commands = folder.commands(episode)
        except (OSError, ValueError, EOFError) as error:  # deleted, or cut by a crash; the results need none
            errors.append(f"no film of task '{episode.task}', seed {episode.seed}: its commands are damaged ({error})")
            continue
        jobs[episode.key] = Job(tasks[episode.task], episode.seed, commands, video)
    for done in worlds.run(jobs.values(), _never_asked):
        episode = folder.episodes[done.job.key]
        if done.error:
            errors.append(f"no film of {done.error}")
            continue
        videos[episode.key] = {
            **{name: getattr(episode, name) for name in ("task", "prompt", "seed", "success", "num_steps")},
            "path": str(Path("videos") / f"{folder.file_name(episode)}.mp4"),
            "note": "" if done.result == episode.success else _NOT_REPEATABLE,
        }
    return [videos[episode.key] for episode in chosen if episode.key in videos], errors


def summary(episodes: Sequence[Episode]) -> dict[str, object]:
    """Success with its intervals, and what else episodes have in common."""
    by_task: dict[str, list[Episode]] = {}
    for episode in episodes:
        by_task.setdefault(episode.task, []).append(episode)
    texts = Counter(text for episode in episodes for text in dict.fromkeys(episode.warnings))
    return {
        "total": Tally.of(episode.success for episode in episodes).to_dict() if episodes else None,
        "per_task": {task: Tally.of(e.success for e in them).to_dict() for task, them in by_task.items()},
        "steps_of_success": {task: _mean(e.num_steps for e in them if e.success) for task, them in by_task.items()},
        "held_steps": _mean(episode.num_held for episode in episodes),
        "ends": dict(Counter(episode.end for episode in episodes).most_common()),
        "warnings": dict(texts.most_common(20)),
        "measurements": {
            name: _mean(episode.measurements.get(name, 0.0) for episode in episodes)
            for name in dict.fromkeys(name for episode in episodes for name in episode.measurements)
        },
        "seconds": sum(episode.seconds for episode in episodes),
    }


def compare(a: Json, b: Json) -> Json:
    """Two contents of `results.json`, in the episodes that both have played, in all and per task.

    Raises:
        ValueError: there are none.
    """
    outcomes = [{(e["task"], e["seed"]): e["success"] for e in results["episodes"]} for results in (a, b)]
    common = [key for key in outcomes[0] if key in outcomes[1]]
    if not common:
        raise ValueError("the two evaluations have no episode in common")

    def paired(keys: Iterable[tuple[str, int]]) -> dict[str, object]:
        keys = list(keys)
        return Paired.of([outcomes[0][key] for key in keys], [outcomes[1][key] for key in keys]).to_dict()

    tasks = dict.fromkeys(task for task, _ in common)
    return {
        "a": a["policy"],
        "b": b["policy"],
        "total": paired(common),
        "per_task": {task: paired(key for key in common if key[0] == task) for task in tasks},
    }


def _selected(tasks: Sequence[Task], patterns: Sequence[str]) -> list[Task]:
    def is_meant(task: Task, pattern: str) -> bool:
        return task.name == pattern or fnmatch.fnmatchcase(task.name, pattern)

    for pattern in patterns:
        if not any(is_meant(task, pattern) for task in tasks):
            raise ValueError(f"no task is named {pattern!r}; there are {', '.join(repr(task.name) for task in tasks)}")
    return [task for task in tasks if not patterns or any(is_meant(task, pattern) for pattern in patterns)]


def _never_asked(questions: list[Observation]) -> list[Reply]:
    raise AssertionError("a film asks nothing")


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.fmean(known) if known else None
