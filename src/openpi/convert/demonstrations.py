"""A simulator's scripted expert -> a LeRobot dataset v3.0, under the names of the recipe that will train on it.

```
attempt    world, task and seed -> an episode, prepared (checked, encoded), if it succeeded; in several processes
           -> .<name>.converting/<digest>/    kept until the dataset is there, so that a stopped run goes on
assemble   the successes in order of their seeds, which do not depend on the number of processes
```

Disturbed on purpose (`noise`), the robot strays while what is recorded is still what the expert wanted at that moment:
a policy learns to come back. Source: Laskey et al. 2017, DART (arXiv:1703.09327).
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import hashlib
import itertools
import json
import logging
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from openpi.convert.progress import Progress
from openpi.convert.work_folder import WorkFolder
from openpi.data.dataset import Sample
from openpi.data.lerobot import video_writer
from openpi.data.lerobot.episode_check import complete_features
from openpi.data.lerobot.existing import check_room
from openpi.data.lerobot.features import Feature, read_features
from openpi.data.lerobot.prepared import PreparedEpisode, prepare_episode
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.envs.world import Expert, Task, World, WorldConfig
from openpi.shared import worker_process
from openpi.shared.errors import listed, missing_key
from openpi.shared.tree import flatten

logger = logging.getLogger(__name__)

RECORD_FILE = "meta/recording.json"  # how the dataset came about
_FEATURES = "features.json"
_FAILED = ".failed"
_MEMORY = 0.9  # of a disturbance, from one step to the next: it wanders
_HOPELESS = 10  # failures in a row


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset the keys of a policy are recorded in.

    Attributes:
        names: '/'-joined key of the observation, or `actions` -> column.
        dimensions: '/'-joined key -> the names of its dimensions.
        clean: bool[action_dim], true for what is never disturbed: grippers.
        robot: for the dataset's metadata.
    """

    names: Mapping[str, str]
    dimensions: Mapping[str, tuple[str, ...]]
    clean: tuple[bool, ...]
    robot: str


@dataclass(frozen=True)
class Recording:
    """What to record.

    Attributes:
        world: with the tasks that share the episodes evenly.
        columns: of the recipe.
        num_episodes: successes in all.
        tasks: names or patterns; empty = all.
        seed: of the first attempt of each task; the others follow.
        noise: standard deviation of the disturbance of what is executed, in the units of the actions.
        use_videos: cameras as video; else as images.
    """

    world: WorldConfig
    columns: Columns
    num_episodes: int
    tasks: tuple[str, ...] = ()
    seed: int = 0
    noise: float = 0.0
    use_videos: bool = True

    def __post_init__(self) -> None:
        if self.num_episodes < 1:
            raise ValueError(f"episodes is {self.num_episodes}; expected at least 1")
        if not 0 <= self.noise < np.inf:
            raise ValueError(f"noise is {self.noise}; expected a standard deviation, 0 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected 0 or more")


def record(recording: Recording, output: Path, *, overwrite: bool = False, num_workers: int = 1) -> Path:
    """Records successful episodes of the expert. A stopped run goes on when it is asked for the same again.

    Args:
        output: folder of the dataset; new, unless `overwrite`.
        num_workers: processes, each with a world of its own; 1 = this one. A script that calls this with more guards
            itself with `if __name__ == "__main__"`.
    Returns:
        `output`.
    Raises:
        FileExistsError: `output` is there, or something else in its place.
        ValueError: there is no expert, it hardly ever succeeds, or another run writes the same dataset.
        KeyError: the world does not give what the recipe records.
        ImportError, RuntimeError: see `WorldConfig`.
    """
    check_room(output, overwrite=overwrite)
    tasks = _chosen(recording.world.tasks(), recording.tasks)
    if recording.world.expert() is None:
        raise ValueError(f"{recording.world} has no expert, so there is nothing to record")
    shares = [len(part) for part in np.array_split(np.arange(recording.num_episodes), len(tasks))]
    with WorkFolder(output) as work:
        recorded: list[_Attempt] = []
        with _pool(num_workers) as pool, Progress("episodes", recording.num_episodes) as progress:
            for task, share in zip(tasks, shares, strict=True):
                for attempt in _successes(recording, task, share, work.path, pool, num_workers):
                    recorded.append(attempt)
                    progress.advance()
        recorded.sort(key=lambda attempt: (tasks.index(attempt.task), attempt.seed))
        return _assemble(recording, recorded, output, scratch=work.path, overwrite=overwrite)


def _chosen(tasks: Sequence[Task], patterns: Sequence[str]) -> list[Task]:
    chosen = [task for task in tasks if not patterns or any(fnmatch.fnmatch(task.name, p) for p in patterns)]
    if not chosen:
        raise ValueError(f"no task is called {listed(patterns)}; there are {listed(task.name for task in tasks)}")
    return chosen


def play(
    world: World, expert: Expert, task: Task, seed: int, *, noise: float, clean: np.ndarray
) -> tuple[list[Sample], bool]:
    """One episode: what was observed, with the expert's `actions` beside it, and whether it succeeded."""
    world.reset(task, seed)
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    stray, frames = np.zeros(len(clean)), []
    while len(frames) < task.max_steps and not world.is_success:
        observation = world.observe()
        action = np.asarray(expert.infer(observation)["actions"])[0]
        frames.append({**observation, "actions": action})
        stray = _MEMORY * stray + np.sqrt(1 - _MEMORY**2) * rng.normal(0.0, noise, len(clean))
        world.step(action + np.where(clean, 0.0, stray))
    return frames, world.is_success


# --- one attempt, in whichever process ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Attempt:
    recording: Recording
    task: Task
    seed: int
    work: Path

    @functools.cached_property
    def folder(self) -> Path:
        """Of the prepared episode; named by all that it depends on."""
        options = (self.recording.world, self.recording.columns, self.recording.noise, self.recording.use_videos)
        digest = hashlib.sha256(repr((*options, self.task, self.seed)).encode()).hexdigest()
        return self.work / digest[:20]

    @property
    def failure(self) -> Path:
        """Exists when it was played, and failed."""
        return self.folder.with_suffix(_FAILED)


def _attempt(attempt: _Attempt) -> bool:
    """Plays and prepares it, if that is not done; whether it succeeded."""
    if attempt.folder.is_dir() or attempt.failure.exists():
        return attempt.folder.is_dir()
    recording, columns = attempt.recording, attempt.recording.columns
    world, expert = _opened(recording.world)
    clean = np.array(columns.clean)
    frames, has_succeeded = play(world, expert, attempt.task, attempt.seed, noise=recording.noise, clean=clean)
    if not has_succeeded:
        attempt.failure.touch()
        return False
    partial = Path(tempfile.mkdtemp(prefix=f"{attempt.folder.name}.", dir=attempt.work))
    try:
        _prepare(frames, recording, partial)
        partial.rename(attempt.folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


@functools.lru_cache(maxsize=1)
def _opened(config: WorldConfig) -> tuple[World, Expert]:
    """Of this process: opening takes seconds."""
    expert = config.expert()
    assert expert is not None
    return config.open(privileged=True), expert


def _prepare(frames: list[Sample], recording: Recording, folder: Path) -> None:
    leaves = [flatten(frame) for frame in frames]
    arrays, features = {}, {}
    for key, column in recording.columns.names.items():
        if key not in leaves[0]:
            raise missing_key(key, leaves[0], wanted_by=f"the recipe '{recording.world.recipe}'")
        arrays[column] = np.stack([np.asarray(leaf[key]) for leaf in leaves])
        features[column] = _feature(key, arrays[column], recording)
    stored = complete_features(features, recording.use_videos)
    encoder = video_writer.choose_encoder(None) if recording.use_videos else ""
    prepared = prepare_episode(
        arrays, stored, folder=folder, fps=recording.world.control_hz, encoder=encoder, threads=1
    )
    prepared.save(folder)
    (folder / _FEATURES).write_text(json.dumps(features), encoding="utf-8")


def _feature(key: str, values: np.ndarray, recording: Recording) -> Feature:
    if values.ndim == 4:
        sides = [size for size in values.shape[1:] if size != 3][:2] if values.shape[1] == 3 else values.shape[1:3]
        dtype = "video" if recording.use_videos else "image"
        return {"dtype": dtype, "shape": [*map(int, sides), 3], "names": ["height", "width", "channels"]}
    names = recording.columns.dimensions.get(key)
    return {"dtype": "float32", "shape": list(values.shape[1:]), "names": list(names) if names else None}


# --- as many successes as are wanted ------------------------------------------------------------------------


def _successes(
    recording: Recording, task: Task, count: int, work: Path, pool: Executor | None, num_workers: int
) -> Iterator[_Attempt]:
    """The first `count` attempts that succeed, in any order.

    No more are under way than are still wanted, so which ones succeed is decided by the seeds alone.
    """
    seeds, failures = itertools.count(recording.seed), 0
    if task.num_starts is not None and count > task.num_starts and not recording.noise:
        raise ValueError(
            f"{task.name} begins at {task.num_starts} places, and {count} episodes are asked for: some would be "
            "recorded twice. Ask for fewer, disturb them (--noise), or let the world draw where they begin"
        )
    running: dict[Future[bool], _Attempt] = {}
    while count:
        while len(running) < min(num_workers, count):
            attempt = _Attempt(recording, task, next(seeds), work)
            running[_submit(pool, attempt)] = attempt
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            attempt = running.pop(future)
            if _result(future):
                count, failures = count - 1, 0
                yield attempt
                continue
            failures += 1
            logger.info("%s, seed %d: the expert failed; not recorded", task.name, attempt.seed)
            if failures >= _HOPELESS:
                raise ValueError(f"{task.name}: the expert failed {failures} times in a row; less --noise may help")


def _pool(num_workers: int) -> contextlib.AbstractContextManager[Executor | None]:
    if num_workers < 2:
        return contextlib.nullcontext()
    # Spawned, not forked: OpenGL does not survive a fork. On Ctrl-C they finish the episode they are at.
    return ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=worker_process.start)


def _submit(pool: Executor | None, attempt: _Attempt) -> Future[bool]:
    if pool is not None:
        return pool.submit(_attempt, attempt)
    done: Future[bool] = Future()
    done.set_result(_attempt(attempt))
    return done


def _result(future: Future[bool]) -> bool:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a process was ended from outside, perhaps for lack of memory; run it again, with fewer workers: what is "
            "recorded is kept"
        ) from error


# --- the dataset --------------------------------------------------------------------------------------------


def _assemble(recording: Recording, attempts: list[_Attempt], output: Path, *, scratch: Path, overwrite: bool) -> Path:
    features = read_features(json.loads((attempts[0].folder / _FEATURES).read_text("utf-8")), _FEATURES)
    with LeRobotWriter(
        output,
        fps=recording.world.control_hz,
        features=features,
        robot_type=recording.columns.robot,
        overwrite=overwrite,
        scratch=scratch,
    ) as writer:
        for attempt in attempts:
            writer.add_prepared(PreparedEpisode.load(attempt.folder), attempt.task.prompt)
        told = writer.temporary / RECORD_FILE
        told.parent.mkdir(exist_ok=True)
        told.write_text(json.dumps(_told(recording, attempts), indent=4), encoding="utf-8")
    return output


def _told(recording: Recording, attempts: list[_Attempt]) -> dict[str, object]:
    world: Any = recording.world
    return {
        "world": {"class": type(world).__qualname__, **asdict(world)},
        "recipe": world.recipe,
        "noise": recording.noise,
        "episodes": [{"task": attempt.task.name, "seed": attempt.seed} for attempt in attempts],
    }
