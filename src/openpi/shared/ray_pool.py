"""A Ray cluster as a `Pool`: Ray decides which worker does what, and does again what was lost with one.

Workers have openpi installed as it is here, and see the same files at the same paths.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from openpi.shared.errors import first_line, install_hint
from openpi.shared.pools import Job, Result, WorkerLostError

LOCAL = "local"
_CONNECT_TIMEOUT_S = 10.0
_RETRIES = 3  # of a job whose worker is gone; what a job raises is an answer


class RayCluster:
    """A context; leaving it ends what it has begun. A cluster to which this program is connected already is used.

    Args:
        address: `auto` (a cluster of which this machine is part), `host:6379`, `ray://host:10001`; or `local`, one of
            this machine's processors that ends with this program.
    Raises:
        ImportError: the extra `ray` is missing.
        ConnectionError: nobody answers there.
    """

    def __init__(self, address: str) -> None:
        self._ray: Any = _imported()
        self._is_ours = not self._ray.is_initialized()
        if not self._is_ours:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of the cluster that we start, nobody else is told
        try:
            _check_answers(address)
            self._ray.init(address, log_to_driver=False, include_dashboard=False if address == LOCAL else None)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConnectionError(
                f"no Ray cluster at {address} ({first_line(error)}). Start one with `ray start --head`, or give its "
                "address (auto, host:6379, ray://host:10001), or local"
            ) from error

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_ours:
            self._ray.shutdown()

    def threads(self, num_jobs: int) -> int:
        """Ray gives each job a processor."""
        del num_jobs
        return 1

    def each(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        run, dumps = self._ray.remote(max_retries=_RETRIES)(_run), self._ray.cloudpickle.dumps
        sent = _Sent(self._ray.put((sys.path, dumps(function))))
        references = [run.remote(sent, dumps(job)) for job in jobs]
        running = {ref.future(): (ref, job) for ref, job in zip(references, jobs, strict=True)}
        del references  # what is done is forgotten as soon as it was handed on
        try:
            for future in as_completed(list(running)):
                _, job = running.pop(future)
                yield job, self._result(future)
        finally:
            for ref, _ in running.values():  # of a run that is given up
                self._ray.cancel(ref, force=True)

    def _result(self, future: Future[object]) -> Any:
        """What a job has returned or raised, as if it had been called here."""
        errors = self._ray.exceptions
        try:
            return future.result()
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.RayError as error:
            raise WorkerLostError(
                f"the cluster has lost a job {_RETRIES + 1} times ({type(error).__name__}: {first_line(error)}); see "
                "`ray status` and the logs of its nodes, then run it again"
            ) from error


def _imported() -> ModuleType:
    try:
        import ray  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise ImportError(f"a Ray cluster needs the package ray; {install_hint('ray')}") from error
    return ray


def _check_answers(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself tries for minutes, and then ends this process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()


@dataclass(frozen=True)
class _Sent:
    """A function in the cluster's store; as a field it travels when a worker asks for it, and not with every job."""

    reference: Any


_held: tuple[str, Callable[[Any], Any]] | None = None


def _run(sent: _Sent, job: bytes) -> object:
    """In a worker, which imports from where the program does, so that files of users are found as in its processes."""
    global _held
    key = sent.reference.hex()
    if _held is None or _held[0] != key:
        paths, function = _imported().get(sent.reference)
        sys.path += [path for path in paths if path not in sys.path]
        _held = key, pickle.loads(function)
    return _held[1](pickle.loads(job))
