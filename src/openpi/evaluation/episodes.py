"""The folder of an evaluation: every episode is in it as soon as it ends, so that a kill loses those that run.

options.json     what an episode's outcome depends on; another evaluation is not mixed in
episodes.jsonl   an episode a line, in the order in which they ended
commands/        per episode the actions that its world took, float64[num_steps, action_dim]: films are made of them
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openpi.shared import whole_file
from openpi.shared.locks import FileLock, HeldElsewhereError
from openpi.shared.strict_json import Json

RESULTS_FILE = "results.json"
_OPTIONS, _EPISODES, _COMMANDS, _LOCK = "options.json", "episodes.jsonl", "commands", ".lock"


@dataclasses.dataclass(frozen=True)
class Episode:
    """What came of one.

    Attributes:
        prompt: what the policy was told.
        num_steps: control ticks that the world took.
        end: why it ended: `success`, `time is over`, or what stopped it.
        num_questions, num_held: to the policy; ticks without a row of its after the first.
        seconds: wall clock.
        warnings: of the loop and the server.
        measurements: of the world, at the end.
    """

    task: str
    prompt: str
    seed: int
    success: bool
    num_steps: int
    end: str
    num_questions: int
    num_held: int
    seconds: float
    warnings: tuple[str, ...] = ()
    measurements: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int]:
        """What it is known by: task and seed."""
        return self.task, self.seed

    def to_dict(self) -> Json:
        """JSON-ready."""
        return dataclasses.asdict(self)


class EpisodeFolder:
    """Open for one process at a time.

    Attributes:
        options: what an episode's outcome depends on.
        episodes: by task and seed.
    """

    def __init__(self, path: Path, options: Mapping[str, object], *, resume: bool) -> None:
        """
        Args:
            options: JSON-ready; what the outcome of an episode depends on.
            resume: go on with the episodes that are there, if there are any.
        Raises:
            FileExistsError: there is an evaluation, and `resume` is not set.
            ValueError: it was made with other options, or is damaged.
            BlockingIOError: another process plays it.
        """
        self.path = path
        self.options: dict[str, Any] = json.loads(json.dumps(options))
        self.episodes: dict[tuple[str, int], Episode] = {}
        (path / _COMMANDS).mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / _LOCK)
        try:
            self._lock.acquire(wait=False)
        except HeldElsewhereError as error:
            raise BlockingIOError(
                f"{path} is being played by another process; wait for it, or choose another"
            ) from error
        try:
            self._open(resume=resume)
        except BaseException:
            self.close()
            raise

    def _open(self, *, resume: bool) -> None:
        check_free(self.path, resume=resume)
        before = self.path / _OPTIONS
        if before.is_file():
            _check_same(self.path, json.loads(before.read_text()), self.options)
        else:
            write_json(before, self.options)
        file = self.path / _EPISODES
        if file.is_file():
            _drop_half_line(file)
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    fields = json.loads(line)
                    episode = Episode(**{**fields, "warnings": tuple(fields["warnings"])})
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"{file}, line {number} is no episode ({error}); remove the line") from error
                self.episodes[episode.key] = episode

    def add(self, episode: Episode, commands: np.ndarray) -> None:
        """Raises OSError: the disk is full; nothing half-written is taken for an episode."""
        np.save(self._commands_file(episode), commands)
        line = json.dumps(episode.to_dict()) + "\n"
        with (self.path / _EPISODES).open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.episodes[episode.key] = episode

    def commands(self, episode: Episode) -> np.ndarray:
        return np.load(self._commands_file(episode), allow_pickle=False)

    def file_name(self, episode: Episode) -> str:
        """For files that belong to it: unlike for tasks that differ in other characters only."""
        readable = re.sub(r"[^\w-]+", "_", episode.task)[:80]
        return f"{readable}-{zlib.crc32(episode.task.encode()):08x}-{episode.seed}"

    def _commands_file(self, episode: Episode) -> Path:
        return self.path / _COMMANDS / f"{self.file_name(episode)}.npy"

    def close(self) -> None:
        self._lock.release()


def check_free(path: Path, *, resume: bool) -> None:
    """Raises FileExistsError where there is an evaluation that is not gone on with, or none that can be."""
    is_played = (path / _OPTIONS).is_file()
    if is_played and not resume:
        raise FileExistsError(f"{path} holds an evaluation; go on with --resume, or choose another --output")
    if not is_played and (path / RESULTS_FILE).is_file():  # of recorded episodes, or a comparison
        raise FileExistsError(f"{path} holds the results of another evaluation; choose another --output")


def write_json(path: Path, value: object) -> None:
    """Whole or not at all."""
    whole_file.write_text(path, json.dumps(value, indent=2) + "\n")


def _drop_half_line(file: Path) -> None:
    """A line without an end was being written when the process was killed."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with file.open("r+b") as episodes:
            episodes.truncate(whole)


def _check_same(path: Path, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    different = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if different:
        raise ValueError(
            f"{path} was played with other options: {'; '.join(different)}. Give the same, or another --output"
        )
