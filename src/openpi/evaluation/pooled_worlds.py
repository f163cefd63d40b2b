"""Worlds in the workers of a pool: an episode is a job, and its worker asks the policy server itself.

In processes of this machine (`worlds.py`) all that wait are answered with one message; over a network nobody waits for
others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from openpi.envs import world as worlds
from openpi.evaluation.asker import Asker, running_server
from openpi.evaluation.worlds import AnswerAll, Done, Job, Seat, failure, result_of
from openpi.shared.pools import Pool


@dataclass(frozen=True)
class Server:
    """A policy server as workers reach it."""

    host: str
    port: int
    api_key: str | None = field(default=None, repr=False)


class PooledWorlds:
    """As `Worlds`."""

    def __init__(self, seat: Seat, pool: Pool, server: Server) -> None:
        self._seat, self._pool, self._server = seat, pool, server

    def __enter__(self) -> PooledWorlds:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, jobs: Iterable[Job], answer: AnswerAll) -> Iterator[Done]:
        """
        Raises:
            ConnectionError: a worker does not reach the server.
            WorkerLostError: see `Pool`.
        """
        del answer  # workers ask by themselves
        for _, done in self._pool.each(functools.partial(_done, self._seat, self._server), list(jobs)):
            yield done


def _done(seat: Seat, server: Server, job: Job) -> Done:
    logging.getLogger("openpi_client").setLevel(logging.CRITICAL)  # warnings are in the episodes
    try:
        world = _world(seat.world, seat.config, seat.is_privileged)
        return Done(job, result_of(job, world, seat.player, lambda observation: _asker(server)[0]([observation])[0]))
    except (ConnectionError, TimeoutError):
        raise
    except Exception as error:
        _world.cache_clear()  # a world that has raised is not trusted with another episode
        return Done(job, error=f"{job}: {failure(error)}")


@functools.lru_cache(maxsize=1)
def _world(name: str, config: bytes, is_privileged: bool) -> worlds.World:
    """Of this worker: opening takes seconds."""
    worlds.find(name)
    return pickle.loads(config).open(privileged=is_privileged)


@functools.lru_cache(maxsize=1)
def _asker(server: Server) -> tuple[Asker, contextlib.ExitStack]:
    """Of this worker, with what keeps its connection open."""
    stack = contextlib.ExitStack()
    return stack.enter_context(running_server(server.host, server.port, server.api_key)), stack
