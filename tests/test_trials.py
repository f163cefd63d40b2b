"""`openpi trials`: two servers behind one port, a robot that asks it, and somebody who judges without knowing."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from openpi.cli import trials as command
from openpi.evaluation import trials
from openpi.evaluation.switchboard import Switchboard
from openpi_client.base_policy import BasePolicy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import server_thread


class Says(BasePolicy):
    metadata: ClassVar[dict] = {}

    def __init__(self, value: float) -> None:
        self._value = value

    def infer(self, obs: dict) -> dict:
        return {"actions": np.full((2, 1), self._value, np.float32)}


@pytest.fixture
def servers() -> Iterator[tuple[str, str]]:
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(server_thread(lambda v=v: Says(v)))[1] for v in (0.0, 1.0)]
        yield f"127.0.0.1:{ports[0]}", f"ws://127.0.0.1:{ports[1]}"


class Room:
    """The robot asks when the scene is arranged; the judge finds that the second policy succeeds."""

    def __init__(self, port: Callable[[], int], *, stops_at: int | None = None, answers: dict[str, str] | None = None):
        self.seen: list[float] = []
        self._port, self._stops_at, self._answers = port, stops_at, answers or {}

    def __call__(self, question: str) -> str:
        if "press Enter" in question:
            if len(self.seen) == self._stops_at:
                raise KeyboardInterrupt
            with WebsocketClientPolicy("127.0.0.1", self._port(), max_age_s=None) as client:
                self.seen.append(float(client.infer({})["actions"][0, 0]))
            return ""
        if "succeed" in question:
            return self._answers.get("succeed") or ("y" if self.seen[-1] else "n")
        return next((answer for words, answer in self._answers.items() if words in question), "")


@pytest.fixture
def started(monkeypatch) -> list[int]:
    """Ports of the switchboards."""
    ports: list[int] = []

    class Noted(Switchboard):
        def __enter__(self) -> Switchboard:
            ports.append(self.port)
            return super().__enter__()

    monkeypatch.setattr("openpi.evaluation.switchboard.Switchboard", Noted)
    return ports


def arguments(file: Path, servers: tuple[str, str], *words: str):
    return command._parser().parse_args([str(file), "--a", servers[0], "--b", servers[1], "--port", "0", *words])


def test_trials_are_blind_go_on_after_a_stop_and_name_the_policies_at_the_end(servers, started, tmp_path, capsys):
    file = tmp_path / "results.csv"
    flags = ("--pairs", "4", "--task", "stack", "--task", "pour")
    first = Room(lambda: started[-1], stops_at=5)
    with pytest.raises(KeyboardInterrupt):
        command.run(arguments(file, servers, *flags), first)
    rows = trials.read(file)
    assert len(rows) == 5 and {row.policy for row in rows} == {""}
    assert servers[0] not in capsys.readouterr().out
    second = Room(lambda: started[-1])
    command.run(arguments(file, servers, *flags), second)
    rows, seen = trials.read(file), first.seen + second.seen
    assert [row.policy for row in rows] == [servers[int(value)] for value in seen]
    assert [row.success for row in rows] == seen
    assert [row.task for row in rows] == ["stack", "stack", "pour", "pour"] * 2
    assert [set(pair) for pair in zip(seen[::2], seen[1::2], strict=True)] == [{0, 1}] * 4
    told = capsys.readouterr().out
    assert f"{servers[0]}: 0/4 = 0%" in told and f"{servers[1]}: 4/4 = 100%" in told and "+100 points" in told
    with pytest.raises(ValueError, match="is finished, and its policies are known"):
        command.run(arguments(file, servers, *flags), second)


def test_the_form_of_droid_asks_for_a_score_a_film_and_which_was_better(servers, started, tmp_path, capsys):
    file = tmp_path / "results.csv"
    room = Room(lambda: started[-1], answers={"succeed": "75", "film": "a.mp4", "better": "second"})
    command.run(arguments(file, servers, "--pairs", "1", "--form", "droid"), room)
    rows = trials.read(file)
    assert [(row.success, row.video_filename, row.better) for row in rows] == [
        (0.75, "a.mp4", ""),
        (0.75, "a.mp4", "second"),
    ]
    header = file.read_text().splitlines()[0].split(",")
    assert {"success", "duration", "video_filename"} <= set(header)
    told = capsys.readouterr().out
    assert "mean score 75" in told and "neither 0 times" in told


def test_a_file_of_other_trials_is_not_gone_on_with(servers, started, tmp_path):
    file = tmp_path / "results.csv"
    with pytest.raises(KeyboardInterrupt):
        command.run(arguments(file, servers, "--task", "stack"), Room(lambda: started[-1], stops_at=1))
    before = file.read_text()
    with pytest.raises(ValueError, match="has trial 1 of 'stack' where these flags have trial 1 of 'pour'"):
        command.run(arguments(file, servers, "--task", "pour"), Room(lambda: started[-1]))
    assert file.read_text() == before
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is no file of `openpi trials`"):
        trials.read(tmp_path / "other.csv")


@pytest.mark.parametrize("pairs", [6, 7])
def test_each_policy_begins_equally_often_in_an_order_of_its_seed(pairs):
    plan = trials.plan(pairs, ["stack"], seed=3)
    firsts = [trial.policy for trial in plan if trial.turn == 1]
    assert abs(2 * sum(firsts) - pairs) <= 1 and len(plan) == 2 * pairs
    assert plan == trials.plan(pairs, ["stack"], seed=3)
    assert len({tuple(trials.plan(pairs, ["stack"], seed)) for seed in range(10)}) > 3


def test_answers_are_yes_no_or_a_score():
    found = [trials.parse_outcome(text, "score") for text in ("y", "No", "40", "0", "101", "")]
    assert found == [1, 0, 0.4, 0, None, None]
    assert trials.parse_outcome("40", "success") is None
