"""The programs of `examples/` as processes, their counterparts, and servers without a checkpoint for them."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from openpi.cli.serving import serve_dummy
from openpi.policies.contract import Contract
from openpi.policies.dummy_policy import DummyPolicy
from paths import ROOT
from serving_live import server_thread

# Of a program that takes a second or a few: machines are shared.
PATIENCE_S = 120.0
COUNTERPARTS = Path(__file__).parent / "counterparts"


class Served(DummyPolicy):
    """`openpi serve --dummy RECIPE`, with a motion of its own; keeps what it was asked."""

    def __init__(self, recipe: str, chunk: Callable[[np.ndarray], np.ndarray], rate_hz: float | None, **changes: Any):
        contract, _ = serve_dummy._contract(serve_dummy.Args(recipe))
        super().__init__(dataclasses.replace(contract, control_hz=rate_hz, **changes), chunk)
        self.asked: list[dict] = []

    def infer(self, obs: dict) -> dict:
        self.asked.append(obs)
        return super().infer(obs)


@contextlib.contextmanager
def serving(
    recipe: str, move: np.ndarray, *, rate_hz: float | None = None, is_relative: bool = False, **changes: Any
) -> Iterator[tuple[Served, int]]:
    """A server of a recipe whose policy goes by `move` in each row, from the state on, and its port.

    Args:
        is_relative: rows are `move` itself.
    """

    def chunk(state: np.ndarray) -> np.ndarray:
        steps = np.arange(1, policy.contract.action_horizon + 1)[:, None]
        if is_relative:
            return np.tile(move, (len(steps), 1))
        return state[: len(move)] + steps * move

    policy = Served(recipe, chunk, rate_hz, **changes)
    with server_thread(lambda: policy) as (_, port):
        yield policy, port


class Program:
    """A program of `examples/` in a process of its own, in an empty folder."""

    def __init__(self, folder: Path, file: str, *words: object, faults: str = "", answers: str = "") -> None:
        self.folder, self._log = folder, folder / "counterpart.jsonl"
        paths = os.pathsep.join([str(COUNTERPARTS), os.environ.get("PYTHONPATH", "")])
        environment = {"COUNTERPART_LOG": str(self._log), "COUNTERPART_FAULTS": faults, "PYTHONPATH": paths}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(ROOT / "examples" / file), *map(str, words)],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(answers)
        self._process.stdin.flush()

    def told(self, kind: str | None = None) -> list[dict]:
        """What it told its counterpart so far."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        told = [json.loads(line) for line in lines]
        return told if kind is None else [entry for entry in told if entry["kind"] == kind]

    def commands(self, topic: str) -> list:
        """Under a topic of ROS that ends so."""
        return [entry["cmd"] for entry in self.told("command") if entry["topic"].endswith(topic)]

    def wait_for(self, kind: str, count: int) -> None:
        self.wait_until(lambda: len(self.told(kind)) >= count)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_so():
            assert self._process.poll() is None, self.end()
            assert time.monotonic() < deadline_s, self.told()[-3:]
            time.sleep(0.02)

    def interrupt(self, by: signal.Signals = signal.SIGINT) -> None:
        self._process.send_signal(by)

    def end(self, code: int | None = None) -> str:
        """What it printed, when it is over."""
        try:
            output, _ = self._process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"it does not end: {self._process.communicate()[0]}") from None
        assert code is None or self._process.returncode == code, output
        return output


def summaries(folder: Path) -> list[dict]:
    """Of the episodes that a program has logged."""
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("summary.json"))]


def contract_of(recipe: str) -> Contract:
    return serve_dummy.of_recipe(recipe, None)
