"""The policy that is evaluated: a server, which answers all worlds that wait in one message."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from openpi.shared.children import Child, Children, Command, require_alive, wait_for_file
from openpi_client.base_policy import Observation, Reply
from openpi_client.connection import api_key_of
from openpi_client.realtime.requests import is_other_server
from openpi_client.websocket_client_policy import WebsocketClientPolicy

_CONNECT_TIMEOUT_S = 300.0  # a model may compile before its server is ready
_ATTEMPT_S = 5.0  # to connect, until we look whether our own server still lives
_RECONNECT_TIMEOUT_S = 60.0
_DEATH_S = 2.0
_MOST_OBSERVATIONS = 32  # in a message; servers of openpi take 64


class Asker:
    """Call it with observations; it returns an answer for each.

    Attributes:
        metadata: what the server says of its policy.
        round_trips_ms, batch_sizes: of the messages so far.
    """

    def __init__(self, client: WebsocketClientPolicy, server: Child | None = None) -> None:
        """
        Args:
            server: if it is ours.
        """
        self._client, self._server = client, server
        self._takes_batches = True
        self.metadata: Mapping[str, Any] = client.get_server_metadata()
        self.round_trips_ms: list[float] = []
        self.batch_sizes: list[int] = []

    def __call__(self, observations: list[Observation]) -> list[dict[str, object]]:
        """
        Returns:
            what the server answers; `{"error": text}` where it refuses.
        Raises:
            ConnectionError: the server is away, or has another policy now.
            CommandFailedError: our own server has ended.
        """
        answers: list[dict[str, Any]] = []
        for first in range(0, len(observations), _MOST_OBSERVATIONS):
            answers += self._timed(observations[first : first + _MOST_OBSERVATIONS])
        if is_other_server(self.metadata, self._client.get_server_metadata()):
            raise ConnectionError("the server was restarted with another policy; the episodes would not be alike")
        return answers

    def timing(self) -> dict[str, object]:
        """Median and 95th percentile of the messages, without the first, which may include compilation; empty where
        there were none."""
        if not self.round_trips_ms:
            return {}
        times = self.round_trips_ms[1:] or self.round_trips_ms
        return {
            "round_trip_ms": {f"p{q}": float(np.percentile(times, q)) for q in (50, 95)},
            "mean_batch": float(np.mean(self.batch_sizes)),
        }

    def _timed(self, observations: list[Observation]) -> list[Reply]:
        started = time.perf_counter()
        try:
            answers = self._answers(observations)
        except (ConnectionError, TimeoutError) as error:
            self._check_server()
            raise ConnectionError(f"the policy server is away: {error}") from error
        self.round_trips_ms.append(1e3 * (time.perf_counter() - started))
        self.batch_sizes.append(len(observations))
        return answers

    def _answers(self, observations: list[Observation]) -> list[Reply]:
        if len(observations) > 1 and self._takes_batches:
            try:
                return self._client.infer_batch(observations)
            except NotImplementedError:
                self._takes_batches = False
            except RuntimeError as error:  # one for all
                return [{"error": _reason(error)}] * len(observations)
        return [self._answer(observation) for observation in observations]

    def _answer(self, observation: Observation) -> dict[str, object]:
        try:
            return self._client.infer(observation)
        except RuntimeError as error:
            return {"error": _reason(error)}

    def _check_server(self) -> None:
        deadline_s = time.monotonic() + _DEATH_S
        while self._server is not None and time.monotonic() < deadline_s:
            require_alive(self._server)
            time.sleep(0.05)


@contextlib.contextmanager
def own_server(command: Command, folder: Path) -> Iterator[Asker]:
    """Starts a server with a free port, and ends it.

    Args:
        folder: for its log and its port.
    Raises:
        CommandFailedError: it ended instead.
    """
    api_key = api_key_of()  # The process inherits the environment, and asks for this one.
    folder.mkdir(parents=True, exist_ok=True)
    port_file = folder / "server.port"
    port_file.unlink(missing_ok=True)
    flags = ("--host=127.0.0.1", "--port=0", f"--port-file={port_file}")
    with Children() as children:
        server = children.start(replace(command, args=(*command.args, *flags)), folder / "server.log")
        wait_for_file(port_file, written_by=server)
        port = int(port_file.read_text())
        while True:
            require_alive(server)
            try:
                # Nothing but its death ends a connection to our own server.
                client = _client("127.0.0.1", port, api_key, connect_timeout_s=_ATTEMPT_S, reconnect_timeout_s=0.0)
                break
            except TimeoutError:  # It loads, or is about to end.
                continue
        with client:
            yield Asker(client, server)
        port_file.unlink(missing_ok=True)


@contextlib.contextmanager
def running_server(host: str, port: int, api_key: str | None) -> Iterator[Asker]:
    """One that somebody else has started.

    Raises:
        TimeoutError: it is not there.
    """
    with _client(host, port, api_key, _CONNECT_TIMEOUT_S, _RECONNECT_TIMEOUT_S) as client:
        yield Asker(client)


def _client(
    host: str, port: int, api_key: str | None, connect_timeout_s: float, reconnect_timeout_s: float
) -> WebsocketClientPolicy:
    # A simulated world waits: no observation is too old.
    return WebsocketClientPolicy(
        host,
        port,
        api_key,
        connect_timeout_s=connect_timeout_s,
        reconnect_timeout_s=reconnect_timeout_s,
        max_age_s=None,
    )


def _reason(error: RuntimeError) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
