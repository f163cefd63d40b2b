"""`openpi trials`: two servers behind one port, a robot that asks it, and somebody who judges without knowing."""

import contextlib
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from browser import BROWSER, MISSING, dom, on_a_telephone
from openpi.cli import _pages
from openpi.cli.evaluation import trials as command
from openpi.cli.evaluation._trials_page import TrialsPage
from openpi.evaluation import trials
from openpi.evaluation.switchboard import Switchboard
from openpi.shared.page import template
from openpi_client.base_policy import BasePolicy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import PATIENCE_S, server_thread


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


class Browser:
    """Answers on a page what the people of a room would answer."""

    def __init__(self, address: str, room: Room) -> None:
        self.address, self._room, self._number, self.summary = address, room, 0, []

    def fetch(self, path: str, content: dict | None = None, **headers: str) -> tuple[int, str]:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def state(self) -> dict:
        return json.loads(self.fetch("state.json")[1])

    def question(self) -> dict:
        """The next one."""
        while (state := self.state())["number"] == self._number:
            pass
        self._number = state["number"]
        return state

    def play(self) -> None:
        while not (state := self.question())["summary"]:
            question = state["question"].replace("press start", "press Enter")
            text = self._room(question)
            assert not state["choices"] or text in [*state["choices"].values(), "75"]
            assert self.fetch("answer", {"number": state["number"], "text": text})[0] == 200
        self.summary = state["summary"]
        self.fetch("answer", {"number": state["number"], "text": ""})


@contextlib.contextmanager
def on_a_page(file: Path, servers: tuple[str, str], *words: str) -> Iterator[str]:
    """The address of a page whose trials run; they are over at the end."""
    page = TrialsPage(file)

    def run() -> None:
        page.finish(command.run(arguments(file, servers, *words), page))

    with _pages.served(_pages.open_server(page)) as address:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield address
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_a_page_asks_what_the_terminal_asks_stays_blind_and_shows_the_interval_at_the_end(servers, started, tmp_path):
    file = tmp_path / "results.csv"
    room = Room(lambda: started[-1], answers={"Notes": "the cup <b>slid</b>\nand fell"})
    with on_a_page(file, servers, "--pairs", "2", "--task", "stack") as address:
        browser = Browser(address, room)
        first = browser.state()
        browser.play()
        after = browser.fetch("results.csv")[1]
    assert servers[0] not in json.dumps(first) and first["done"] == []
    rows = trials.read(file)
    assert after == file.read_bytes().decode()
    assert [row.policy for row in rows] == [servers[int(value)] for value in room.seen]
    assert [row.success for row in rows] == room.seen and rows[0].notes == "the cup <b>slid</b>\nand fell"
    assert f"{servers[1]}: 2/2 = 100%" in browser.summary[2] and "95 % interval" in browser.summary[3]


def test_the_page_of_droid_s_form_has_the_same_questions(servers, started, tmp_path):
    file = tmp_path / "results.csv"
    room = Room(lambda: started[-1], answers={"succeed": "75", "film": "a.mp4", "better": "second"})
    with on_a_page(file, servers, "--pairs", "1", "--form", "droid") as address:
        Browser(address, room).play()
    found = [(row.success, row.video_filename, row.better) for row in trials.read(file)]
    assert found == [(0.75, "a.mp4", ""), (0.75, "a.mp4", "second")]


def test_an_answer_that_comes_twice_is_no_answer_to_the_next_question_nor_are_damaged_ones(tmp_path):
    page = TrialsPage(tmp_path / "none.csv")
    answers: list[str] = []
    asking = threading.Thread(target=lambda: answers.extend(page(text) for text in ("one?", "two?")))
    asking.start()
    with _pages.served(_pages.open_server(page)) as address:
        browser = Browser(address, Room(lambda: 0))
        for body in ({"number": 1}, {"number": "x", "text": ""}, {"number": 1, "text": "\ud800"}, {}):
            browser.question() if not answers and browser._number == 0 else None
            assert browser.fetch("answer", body)[0] == 400
        assert browser.fetch("answer", {"number": 1, "text": "x" * 70_000})[0] == 413
        assert [browser.fetch("answer", {"number": 1, "text": "first"})[0] for _ in range(2)] == [200, 409]
        assert browser.question()["number"] == 2
        assert browser.fetch("answer", {"number": 1, "text": "late"})[0] == 409
        assert browser.fetch("answer", {"number": 2, "text": "second"})[0] == 200
        asking.join(PATIENCE_S)
        assert [browser.fetch(path)[0] for path in ("results.csv", "../x", "")] == [404, 404, 200]
    assert answers == ["first", "second"]


def test_pages_of_others_do_not_reach_it_and_other_machines_need_a_key(tmp_path, servers, monkeypatch, capsys):
    page = TrialsPage(tmp_path / "none.csv")
    with _pages.served(_pages.open_server(page, api_key="secret")) as address:
        browser, key = Browser(address, Room(lambda: 0)), {"Authorization": "Api-Key secret"}
        assert [browser.fetch("state.json", **each)[0] for each in ({}, {"Authorization": "Bearer no"}, key)] == [
            401,
            401,
            200,
        ]
        for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
            assert browser.fetch("state.json", **key, **headers)[0] == 403
            assert browser.fetch("answer", {"number": 0, "text": ""}, **key, **headers)[0] == 403
    monkeypatch.delenv("OPENPI_API_KEY", raising=False)
    flags = [str(tmp_path / "x.csv"), "--a", servers[0], "--b", servers[1], "--page", "--page-host", "0.0.0.0"]
    assert command.main([*flags, "--page-port", "0"]) == 1
    assert "there is no key; give one with --api-key" in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason=MISSING)
def test_a_telephone_shows_the_question_and_its_buttons_without_scrolling_sideways(servers, started, tmp_path):
    room = Room(lambda: started[-1], answers={"Notes": "the cup slid"})
    with on_a_page(tmp_path / "results.csv", servers, "--pairs", "1", "--task", "stack the cups") as address:
        browser = Browser(address, room)
        browser.question()
        live = dom(tmp_path, address)
        browser._number = 0
        browser.play()
        telephone = on_a_telephone(tmp_path, browser.fetch("")[1], state=json.dumps(browser.state()))
    assert "trial 1 of 2, pair 1, first: stack the cups" in live and ">start</button>" in live
    assert "<title>width 390 of 390</title>" in telephone
    assert "the cup slid" in telephone and "95 % interval" in telephone


def test_a_file_of_other_trials_is_not_gone_on_with(servers, started, tmp_path):
    file = tmp_path / "results.csv"
    with pytest.raises(KeyboardInterrupt):
        command.run(arguments(file, servers, "--task", "stack"), Room(lambda: started[-1], stops_at=1))
    before = file.read_text()
    with pytest.raises(ValueError, match="has trial 1 of 'stack' where these flags have trial 1 of 'pour'"):
        command.run(arguments(file, servers, "--task", "pour"), Room(lambda: started[-1]))
    for others in (arguments(file, servers[::-1]), arguments(file, servers, "--form", "score")):
        others.task = ["stack"]
        with pytest.raises(ValueError, match="the other way round, or with another --form"):
            command.run(others, Room(lambda: started[-1]))
    assert file.read_text() == before
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is no file of `openpi trials`"):
        trials.read(tmp_path / "other.csv")


@pytest.mark.parametrize("pairs", ["2", "5"])
def test_whoever_asks_for_fewer_or_more_pairs_on_the_way_gets_the_policies_that_played(
    servers, started, tmp_path, monkeypatch, pairs
):
    monkeypatch.setattr("secrets.randbits", lambda _: 2)
    file, first = tmp_path / "results.csv", Room(lambda: started[-1], stops_at=3)
    with pytest.raises(KeyboardInterrupt):
        command.run(arguments(file, servers, "--pairs", "8"), first)
    second = Room(lambda: started[-1])
    command.run(arguments(file, servers, "--pairs", pairs), second)
    played = [servers[int(value)] for value in first.seen + second.seen]
    assert [row.policy for row in trials.read(file)] == played


@pytest.mark.parametrize("pairs", [6, 7])
def test_each_policy_begins_equally_often_in_an_order_of_its_seed(pairs):
    plan = trials.plan(pairs, ["stack"], seed=3)
    firsts = [trial.policy for trial in plan if trial.turn == 1]
    assert abs(2 * sum(firsts) - pairs) <= 1 and len(plan) == 2 * pairs
    assert plan == trials.plan(pairs, ["stack"], seed=3) == trials.plan(20, ["stack"], seed=3)[: 2 * pairs]
    assert len({tuple(trials.plan(pairs, ["stack"], seed)) for seed in range(10)}) > 3


@pytest.mark.parametrize(("pairs", "shown"), [(2, False), (5, False), (6, True)])
def test_a_few_equal_scores_show_no_difference(pairs, shown):
    planned = trials.plan(pairs, ["stack"], 0)
    rows = [
        trials.Outcome(trial.number, trial.pair, trial.turn, trial.task, (0.5, 0.6)[trial.policy], 1.0)
        for trial in planned
    ]
    told = trials.summary(rows, planned, ("a", "b"), "score")
    assert "b less a: +10 points" in "\n".join(told)
    assert ("no difference is shown" in told[-1]) is not shown


def test_answers_are_yes_no_or_a_score():
    found = [trials.parse_outcome(text, "score") for text in ("y", "No", "40", "0", "101", "")]
    assert found == [1, 0, 0.4, 0, None, None]
    assert trials.parse_outcome("40", "success") is None


_GONE_FOR_A_WHILE = """<script>
let asked = 0;
const asks = { number: 1, question: "did it?", about: "", note: "say y or n", choices: { yes: "y" } };
window.fetch = async () => {
  asked += 1;
  if (asked === 2) throw new TypeError("gone");
  return { json: async () => ({ ...asks, summary: [], done: [] }) };
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason=MISSING)
def test_a_page_that_was_without_an_answer_for_a_while_no_longer_says_so(tmp_path):
    page = template("openpi.cli.evaluation", "trials.html").replace("<script>", f"{_GONE_FOR_A_WHILE}<script>", 1)
    (tmp_path / "page.html").write_text(page)
    assert '<p id="note">say y or n</p>' in dom(tmp_path, f"file://{tmp_path}/page.html")
