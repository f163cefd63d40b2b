"""Several worlds at once: each in a process, which steps and draws it; what they ask is answered together.

parent      jobs -> |            | <- questions of whoever waits, as one message to the server
process     world.reset, step, render, observe -> question ... answer -> ... -> episode
"""

from __future__ import annotations

import collections
import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from openpi.envs import world as worlds
from openpi.envs.world import Task, WorldConfig
from openpi.evaluation.play import Player, film
from openpi.shared import worker_process
from openpi.shared.errors import first_line
from openpi_client.base_policy import Observation, Reply

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

AnswerAll = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]

_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Job:
    """An episode to be played, or one that was, to be filmed.

    Attributes:
        commands, video: of the one that is filmed: what its world took, and the file.
    """

    task: Task
    seed: int
    commands: np.ndarray | None = None
    video: Path | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Of its episode."""
        return self.task.name, self.seed

    def __str__(self) -> str:
        return f"task '{self.task.name}', seed {self.seed}"


@dataclass(frozen=True)
class Done:
    """What became of a job.

    Attributes:
        result: (Episode, commands) of one that was played; of a film, whether it ended as the episode did.
        error: why there is none, with task and seed; '' if there is.
    """

    job: Job
    result: Any = None
    error: str = ""


@dataclass(frozen=True)
class Seat:
    """What a process needs to play.

    Attributes:
        world: name, for `find`.
        config: pickled, since its class may be in a file that `world` names.
        is_privileged: whether observations hold what only an expert may know.
    """

    world: str
    config: bytes
    is_privileged: bool
    player: Player

    @classmethod
    def of(cls, world: str, config: WorldConfig, player: Player, *, is_privileged: bool) -> Seat:
        return cls(world, pickle.dumps(config), is_privileged, player)


class Worlds:
    """A context: leaving it ends the processes."""

    def __init__(self, seat: Seat, count: int) -> None:
        self._seat, self._count = seat, count
        self._idle: list[_Process] = []
        self._busy: dict[Connection, _Process] = {}

    def __enter__(self) -> Worlds:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (*self._idle, *self._busy.values()):
            process.end(is_patient=error is None)

    def run(self, jobs: Iterable[Job], answer: AnswerAll) -> Iterable[Done]:
        """Yields what became of each, as they end.

        Args:
            answer: answers the questions of all who wait; a dict with `error` for one that has no answer.
        """
        waiting = collections.deque(jobs)
        questions: dict[Connection, dict[str, Any]] = {}
        while waiting or self._busy:
            while waiting and len(self._busy) < self._count:
                process = self._idle.pop() if self._idle else _Process(self._seat)
                process.begin(waiting.popleft())
                self._busy[process.pipe] = process
            for pipe in multiprocessing.connection.wait([pipe for pipe in self._busy if pipe not in questions]):
                assert isinstance(pipe, Connection)
                kind, value = self._busy[pipe].received()
                if kind == "question":
                    questions[pipe] = value
                else:
                    yield self._over(self._busy.pop(pipe), kind, value)
            # One half steps while the other half is answered. Whoever is ready first alone would leave the others to
            # ask one by one as well.
            if questions and 2 * len(questions) >= len(self._busy):
                for pipe, result in zip(questions, answer(list(questions.values())), strict=True):
                    self._busy[pipe].send(result)
                questions = {}

    def _over(self, process: _Process, kind: str, value: object) -> Done:
        assert process.job is not None
        if kind == "done":
            self._idle.append(process)
            return Done(process.job, value)
        process.end(is_patient=False)  # a world that has raised is not trusted with another episode
        return Done(process.job, error=f"{process.job}: {value}")


class _Process:
    """One world."""

    def __init__(self, seat: Seat) -> None:
        context = _context(seat)
        self.job: Job | None = None
        self.pipe, other_end = context.Pipe()
        self._process = context.Process(target=_work, args=(other_end, seat), name="world", daemon=True)
        self._process.start()
        other_end.close()

    def begin(self, job: Job) -> None:
        self.job = job
        self.send(job)

    def send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # It has died: `received` says how.
            self.pipe.send(message)

    def received(self) -> tuple[str, Any]:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(_PATIENCE_S)
            code = self._process.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
            return "failed", f"the process of the world {how}"

    def end(self, *, is_patient: bool) -> None:
        """A world that closes properly leaves no messages of its graphics library."""
        if is_patient:
            self.send(None)
            self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(_PATIENCE_S)
        self.pipe.close()


def _context(seat: Seat) -> ForkServerContext | SpawnContext:
    """Worlds are forked off a process that has imported what all of them do, a second each; not off this one, which may
    hold threads."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, type(pickle.loads(seat.config)).__module__])
    return context


def _work(pipe: Connection, seat: Seat) -> None:
    """The life of a process: jobs in, episodes out."""
    worker_process.start()
    logging.getLogger("openpi_client").setLevel(logging.CRITICAL)  # warnings are in the episodes

    def ask(observation: Observation) -> Reply:
        pipe.send(("question", observation))
        return pipe.recv()

    try:
        worlds.find(seat.world)
        world = pickle.loads(seat.config).open(privileged=seat.is_privileged)
        while (job := pipe.recv()) is not None:
            pipe.send(("done", result_of(job, world, seat.player, ask)))
        world.close()
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        pipe.send(("failed", failure(error)))


def result_of(job: Job, world: worlds.World, player: Player, ask: Callable[[Observation], Reply]) -> object:
    """Plays an episode, or films one; see `Done.result`."""
    if job.commands is None or job.video is None:
        return player.play(world, job.task, job.seed, ask)
    from openpi.evaluation.video import write_video

    frames, fps, is_success = film(world, job.task, job.seed, job.commands, player.rate_hz)
    write_video(job.video, frames, fps=fps)
    return is_success


def failure(error: BaseException) -> str:
    """What a world has raised, in a line, and where."""
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first_line(error)}{where}"
