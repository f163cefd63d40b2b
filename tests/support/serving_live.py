"""Live policy servers for the tests: in a thread of this process, or a process of their own.

Run as a program it serves `TestPolicy` on a port: `python serving_live.py PORT [--record FOLDER --record-format FORM]`.
"""

import argparse
import contextlib
import functools
import http.client
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import websockets.sync.client

import forked
from openpi.models.fast_codec import UndecodableActionsError
from openpi.policies.guards import ObservationError
from openpi.serving.recording import SessionRecorder
from openpi.serving.server import PolicyServer
from openpi_client.base_policy import BasePolicy
from openpi_positronic.protocol import PositronicProtocol

PATIENCE_S = 30.0
METADATA = {"reset_pose": [0, -1.5, 1.5, 0, 0, 0]}


class TestPolicy(BasePolicy):
    """Answers with what it was asked for: the sum of `x`, a failure, or after somebody wrote to a pipe.

    obs: `x` array; `fail`, `refuse`, `undecodable` text; `wait_for` path of a named pipe; `reply` the result.
    """

    __test__ = False
    metadata = METADATA

    def __init__(self) -> None:
        self.seen: list[dict] = []
        self.gate = threading.Event()
        self.entered: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._running = threading.Lock()

    def infer(self, obs: dict) -> dict:
        assert self._running.acquire(blocking=False), "two inferences at once"
        try:
            self.seen.append(obs)
            return self._answer(obs)
        finally:
            self._running.release()

    def _answer(self, obs: dict) -> dict:
        if "fail" in obs:
            raise ValueError(obs["fail"])
        if "refuse" in obs:
            raise ObservationError(obs["refuse"])
        if "undecodable" in obs:
            raise UndecodableActionsError(obs["undecodable"])
        if "reply" in obs:
            return {"value": REPLIES[obs["reply"]]}
        if "wait" in obs:
            self.entered.put(None)
            assert self.gate.wait(PATIENCE_S)
        if "wait_for" in obs:
            print("inferring", flush=True)
            Path(obs["wait_for"]).read_text()
        return {"actions": np.full((4, 2), np.sum(obs.get("x", 0.0)), np.float32), "name": obs.get("name", "")}


REPLIES = {"object": object(), "complex": np.zeros(2, np.complex64)}


@contextlib.contextmanager
def server_thread(load: Callable[[], BasePolicy], **options) -> Iterator[tuple[PolicyServer, int]]:
    """A server in a thread of this process, and its port. Errors of `run` are raised at the end."""
    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    errors: list[BaseException] = []
    if "codec" in options:
        options["protocols"] = [PositronicProtocol(options.pop("codec"))]
    server = PolicyServer(load, **{"port": 0, **options}, on_listening=ports.put)

    def run() -> None:
        try:
            server.run()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server, ports.get(timeout=PATIENCE_S)
    finally:
        if thread.is_alive():
            server.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive() and server.finish_thread(PATIENCE_S)
    if errors:
        raise errors[0]


class ServerProcess:
    """A server in a process of its own; `line` waits for what it prints."""

    def __init__(self, port: int = 0, *arguments: str) -> None:
        command = [sys.executable, "-W", "error", __file__, port, *arguments]
        self._process = forked.Popen(command, preloads=forked.SERVING, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.port = int(self.line())

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait(PATIENCE_S)

    def kill(self) -> None:
        self._process.kill()
        self.wait()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


def get(port: int, path: str) -> tuple[int, str, str]:
    """Status, content type and body of a GET."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()


@contextlib.contextmanager
def raw_connection(port: int, **options):
    with websockets.sync.client.connect(
        f"ws://127.0.0.1:{port}", compression=None, max_size=None, **options
    ) as connection:
        yield connection


def until(condition) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def wait_for_line(process: subprocess.Popen, text: str) -> None:
    assert process.stderr is not None
    assert any(text in line for line in process.stderr), "the server ended before it listened"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--record-format", default="npy")
    arguments = parser.parse_args()
    recorder = SessionRecorder(arguments.record, arguments.record_format) if arguments.record else None
    announce = functools.partial(print, flush=True)
    PolicyServer(TestPolicy, port=arguments.port, recorder=recorder, on_listening=announce).run()
