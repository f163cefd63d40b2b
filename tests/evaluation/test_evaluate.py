"""`openpi evaluate`: worlds of our own and of somebody else's, in processes, over the wire."""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

import dot_world
import forked
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli.evaluation import evaluate as cli
from openpi.cli.serving.serve_dummy import of_recipe
from openpi.envs import world as worlds
from openpi.evaluation import asker as asker_module
from openpi.evaluation import fit
from openpi.evaluation.asker import own_server, running_server
from openpi.evaluation.episodes import Episode, EpisodeFolder
from openpi.evaluation.evaluate import Evaluation, compare, summary
from openpi.evaluation.expert_policy import ExpertPolicy
from openpi.evaluation.play import NoAnswerError, Player, film
from openpi.evaluation.report import render_comparison
from openpi.evaluation.worlds import Job, Seat, Worlds
from openpi.shared.children import Command, CommandFailedError
from openpi_demo.tabletop import PLACE, PROMPTS
from openpi_demo.tabletop.plugin import Tabletop
from openpi_positronic.franka.plugin import Franka
from serving_live import server_thread

DOT = f"{Path(dot_world.__file__)}:Dot"
PATIENCE_S = 300.0
CONTRACT = of_recipe("tabletop_place", 10.0)


def dot(*words: str) -> int:
    """`openpi evaluate` in the dot's world, in this process."""
    return cli.main([DOT, "--policy=expert", *words])


def player(strategy: str = "synchronous", *, latency_ms: float = 0.0, rows: int | None = 3, **metadata) -> Player:
    told = {"contract": CONTRACT.as_metadata(), **metadata}
    return Player(strategy, rows, latency_ms / 1e3, 10.0, told, sends_seed=True)


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


# --- the whole way


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """An evaluation of the dot by its expert, as a user starts it: the folder, and what was printed."""
    folder = tmp_path_factory.mktemp("dot") / "evaluation"
    command = [sys.executable, "-m", "openpi.cli.main", "evaluate", DOT, "--policy=expert", f"--output={folder}"]
    command += ["--trials=3", "--workers=2", "--videos=2"]
    preloads = ("openpi.cli.evaluation.evaluate", "openpi_demo.tabletop.plugin")
    done = forked.run(command, preloads=preloads, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.parametrize(("host", "port"), [("robot", 8000), ("wss://robot.example/pi0", 443)])
def test_a_server_that_is_named_without_a_port_is_asked_at_the_usual_one(host, port):
    assert cli._address(cli.Args("world", host=host))[:2] == (host, port)


def test_an_own_world_is_evaluated_by_its_file_and_every_task_has_its_interval(played):
    folder, printed = played
    results = results_of(folder)
    assert results["per_task"]["near"]["successes"] == results["per_task"]["near"]["trials"] == 3
    assert results["per_task"]["near"]["wilson_95"] == pytest.approx([0.4385, 1.0], abs=1e-3)
    assert results["total"]["trials"] == len(results["episodes"]) == 6
    assert [episode["seed"] for episode in results["episodes"]] == [0, 0, 1, 1, 2, 2]
    assert "3/3 = 100% [44%, 100%]" in printed and "[6/6] " in printed and "far [2]" in printed


def test_failures_are_filmed_first_and_the_report_needs_nothing_beside_it(played):
    folder, _ = played
    results = results_of(folder)
    outcomes = [video["success"] for video in results["videos"]]
    assert len(outcomes) == 2 and outcomes == sorted(outcomes)
    with av.open(str(folder / results["videos"][0]["path"])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == results["videos"][0]["num_steps"] + 1  # each tick at 10 Hz, and the beginning
    assert np.argwhere(frames[0][..., 0] > 128).mean(0) == pytest.approx([16, 16], abs=1)
    page = (folder / "report.html").read_text()
    assert page.count("data:video/mp4;base64,") == 2 and 'src="http' not in page and "far [2]" in page


def test_an_evaluation_is_not_overwritten_and_goes_on_where_it_was_cut(played, capsys):
    folder, _ = played
    before = results_of(folder)
    assert dot(f"--output={folder}") == 1
    assert "go on with --resume" in capsys.readouterr().err
    lines = (folder / "episodes.jsonl").read_text().splitlines(keepends=True)
    (folder / "episodes.jsonl").write_text("".join(lines[:4]) + lines[4][:30])  # killed while it wrote
    assert dot(f"--output={folder}", "--trials=3", "--workers=1", "--videos=0", "--resume") == 0
    after = results_of(folder)
    assert after["num_played"] == 2

    def facts(results):
        return [{**episode, "seconds": 0} for episode in results["episodes"]]

    assert facts(after) == facts(before)


def test_commands_that_a_crash_has_cut_cost_their_films_and_no_result(played, capsys):
    folder, _ = played
    cut, gone = sorted((folder / "commands").glob("*.npy"))[:2]
    kept = cut.read_bytes(), gone.read_bytes()
    cut.write_bytes(b"")
    gone.unlink()
    try:
        assert dot(f"--output={folder}", "--trials=3", "--workers=1", "--videos=6", "--resume") == 1
    finally:
        cut.write_bytes(kept[0])
        gone.write_bytes(kept[1])
    results = results_of(folder)
    assert results["total"]["trials"] == 6 and len(results["videos"]) == 4
    assert capsys.readouterr().err.count("its commands are damaged") == len(results["errors"]) == 2


def test_other_options_are_not_mixed_into_an_evaluation(played, capsys):
    folder, _ = played
    assert dot(f"--output={folder}", "--resume", "--latency-ms=50") == 1
    assert "latency_ms was 0.0 and is 50.0" in capsys.readouterr().err


def test_a_kill_loses_the_running_episodes_only_and_leaves_no_process(tmp_path):
    command = [sys.executable, "-m", "openpi.cli.main", "evaluate", "tabletop", "--policy=expert", "--trials=50"]
    command += [f"--output={tmp_path}", "--workers=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(3)]
        children = [os.pidfd_open(pid) for pid in descendants(process.pid)]
        process.kill()
    assert len(children) >= 2
    lines = (tmp_path / "episodes.jsonl").read_text().splitlines()
    assert len(lines) >= len(told) and all(json.loads(line)["success"] for line in lines)
    for child in children:
        assert select.select([child], [], [], PATIENCE_S)[0], "a world outlives the evaluation"
        os.close(child)


def descendants(pid: int) -> list[int]:
    found = [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
    return found + [below for child in found for below in descendants(child)]


# --- an episode


def test_without_latency_an_episode_is_what_the_published_programs_play():
    """They play so many rows of a chunk, one a step, then ask again."""
    world, policy = dot_world.Dot().open(), dot_world.Walker()
    for task in dot_world.Dot().tasks():
        episode, taken = player().play(world, task, 7, policy.infer)
        world.reset(task, 7)
        expected = []
        while len(expected) < task.max_steps and not world.is_success:
            for row in policy.infer(world.observe())["actions"][:3]:
                world.step(row)
                expected.append(row)
                if world.is_success or len(expected) == task.max_steps:
                    break
        np.testing.assert_array_equal(taken, np.array(expected, np.float64))
        assert (episode.num_steps, episode.success) == (len(expected), world.is_success)
        assert episode.end == ("success" if episode.success else "time is over")
        assert episode.num_held == 0


def test_a_latency_costs_a_robot_that_waits_for_its_answers_steps():
    world, policy, task = dot_world.Dot().open(), dot_world.Walker(), dot_world.Dot().tasks()[0]
    at_once, _ = player().play(world, task, 3, policy.infer)
    waits, taken = player(latency_ms=200).play(world, task, 3, policy.infer)
    asks_ahead, _ = player("receding", latency_ms=200).play(world, task, 3, policy.infer)
    assert waits.num_held > 0 == asks_ahead.num_held
    assert waits.num_steps > at_once.num_steps
    np.testing.assert_array_equal(taken[:2], np.zeros((2, 6)))  # stands still until the first answer


def test_each_question_has_a_seed_of_its_own_that_is_the_same_again():
    world, task = dot_world.Dot().open(), dot_world.Dot().tasks()[1]

    def seeds(number: int) -> list[int]:
        policy = dot_world.Walker()
        player().play(world, task, number, policy.infer)
        return [asked["seed"] for asked in policy.asked]

    assert seeds(1) == seeds(1) and len(set(seeds(1) + seeds(2))) == len(seeds(1)) + len(seeds(2)) > 4


def test_a_film_is_the_episode_again():
    world, task = dot_world.Dot().open(), dot_world.Dot().tasks()[0]
    episode, taken = player().play(world, task, 5, dot_world.Walker().infer)
    frames, fps, is_success = film(world, task, 5, taken, 10.0)
    assert (len(frames), fps, is_success) == (episode.num_steps + 1, 10.0, True)
    quick = film(world, task, 5, np.repeat(taken, 8, axis=0), 100.0)  # at 100 Hz each seventh is enough
    assert len(quick[0]) == 2 + 8 * len(taken) // 7


def test_a_policy_that_never_answers_is_a_mistake_and_no_failure():
    world, task = dot_world.Dot().open(), dot_world.Dot().tasks()[0]
    with pytest.raises(NoAnswerError, match="no camera"):
        player().play(world, task, 0, lambda obs: {"error": "ObservationError: no camera"})


def test_an_answer_that_is_no_use_ends_the_episode_as_on_a_robot():
    world, task, policy = dot_world.Dot().open(), dot_world.Dot().tasks()[1], dot_world.Walker()

    def fails_later(obs: dict) -> dict:
        answer = policy.infer(obs)
        return answer if len(policy.asked) == 1 else {"actions": np.full_like(answer["actions"], np.nan)}

    episode, taken = player().play(world, task, 0, fails_later)
    assert not episode.success and np.isfinite(taken).all()
    assert any("finite" in text for text in episode.warnings)


@pytest.mark.parametrize("count", [1, 100])
def test_a_server_in_trouble_makes_no_episode_a_failure(count):
    world, task, policy = dot_world.Dot().open(), dot_world.Dot().tasks()[1], dot_world.Walker()

    def in_trouble(obs: dict, error: str) -> dict:
        answer = policy.infer(obs)
        return answer if not 1 < len(policy.asked) <= 1 + count else {"error": error}

    with pytest.raises(NoAnswerError, match="out of memory"):
        player().play(world, task, 0, lambda obs: in_trouble(obs, "RuntimeError: CUDA out of memory"))
    policy.asked.clear()
    # What the model wrote is its own doing, and counts.
    episode, _ = player().play(world, task, 0, lambda obs: in_trouble(obs, "UndecodableActionsError: no tokens"))
    assert episode.num_held > 0


@pytest.mark.parametrize(
    ("strategy", "message"), [("guided-rtc", "offers no real-time chunking"), ("best", "expected one of")]
)
def test_a_strategy_that_cannot_be_is_refused_before_anything_is_played(strategy, message):
    with pytest.raises(ValueError, match=message):
        player(strategy).chunks()


def test_rtc_goes_to_servers_that_offer_it():
    world, task, policy = dot_world.Dot().open(), dot_world.Dot().tasks()[1], dot_world.Walker()
    player("guided-rtc", latency_ms=100, rtc={"modes": ["guided"]}).play(world, task, 0, policy.infer)
    assert any("prev_action_chunk" in asked and asked["inference_delay"] > 0 for asked in policy.asked)


# --- several worlds


def test_worlds_that_wait_are_answered_together():
    policy, sizes = dot_world.Walker(), []

    def answer(questions: list[dict]) -> list[dict]:
        sizes.append(len(questions))
        return [policy.infer(question) for question in questions]

    config = dot_world.Dot()
    jobs = [Job(task, seed) for task in config.tasks() for seed in range(2)]
    with Worlds(Seat.of(DOT, config, player(), is_privileged=False), 4) as processes:
        done = list(processes.run(jobs, answer))
    assert not [each.error for each in done if each.error]
    assert sizes[0] >= 2  # of four that play, half are waited for
    assert sum(sizes) == sum(each.result[0].num_questions for each in done)


@pytest.mark.parametrize(
    ("trouble", "why"), [("raise", r"ArithmeticError: the dot is lost \(dot_world"), ("die", "SIGKILL")]
)
def test_a_world_that_fails_is_named_with_its_task_and_seed_and_the_others_are_kept(trouble, why):
    config, policy = dot_world.Dot(trouble=trouble), dot_world.Walker()
    near = config.tasks()[0]
    with Worlds(Seat.of(DOT, config, player(), is_privileged=False), 1) as processes:
        done = list(processes.run([Job(near, seed) for seed in (1, 2, 3)], lambda obs: [policy.infer(o) for o in obs]))
    good, bad, after = done
    assert not good.error and not after.error
    with pytest.raises(AssertionError, match=f"task 'near', seed 2: .*{why}"):
        raise AssertionError(bad.error)


# --- servers


@pytest.mark.parametrize("contract", [CONTRACT, None])
def test_a_running_server_is_evaluated_one_that_tells_nothing_too(tmp_path, contract):
    policy = dot_world.Walking(contract)
    with server_thread(lambda: policy) as (_, port):
        code = cli.main([DOT, f"--port={port}", f"--output={tmp_path}", "--trials=1", "--workers=1", "--videos=0"])
    assert code == 0
    assert results_of(tmp_path)["per_task"]["near"]["successes"] == 1
    assert worlds.PRIVILEGED not in policy.walker.asked[0]
    assert ("seed" in policy.walker.asked[0]) == results_of(tmp_path)["repeatable"] == (contract is not None)


def test_an_evaluation_goes_on_with_the_checkpoint_that_it_began_with_only(tmp_path, capsys):
    policy = dot_world.Walking(CONTRACT)
    checkpoint = tmp_path / "run" / "100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checksums.json").write_text("{}")
    policy.checkpoint = Checkpoint(checkpoint).identity

    def resumed(port: int) -> int:
        out = f"--output={tmp_path / 'out'}"
        return cli.main([DOT, f"--port={port}", out, "--resume", "--trials=1", "--workers=1", "--videos=0"])

    with server_thread(lambda: policy) as (_, port):
        assert resumed(port) == 0
        assert resumed(port) == 0
        (checkpoint / "checksums.json").write_text("{ }")  # the run was made anew
        policy.checkpoint = Checkpoint(checkpoint).identity
        assert resumed(port) == 1
    assert "'run/100'" in capsys.readouterr().err
    assert results_of(tmp_path / "out")["policy"]["serves"]["name"] == "run/100"


def test_a_server_that_goes_away_or_becomes_another_ends_the_evaluation(monkeypatch):
    monkeypatch.setattr(asker_module, "_RECONNECT_TIMEOUT_S", 0.3)
    world = dot_world.Dot().open()
    world.reset(dot_world.Dot().tasks()[0], 0)
    with contextlib.ExitStack() as stack:
        with server_thread(lambda: dot_world.Walking(CONTRACT)) as (_, port):
            asker = stack.enter_context(running_server("127.0.0.1", port, None))
            assert "actions" in asker([world.observe()])[0]
        with pytest.raises(ConnectionError, match="away"):
            asker([world.observe()])
        other = dataclasses.replace(CONTRACT, robot="another")
        with (
            server_thread(lambda: dot_world.Walking(other), port=port),
            pytest.raises(ConnectionError, match="another policy"),
        ):
            asker([world.observe()])


def test_our_own_server_answers_lists_and_its_death_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_API_KEY", "sesame")  # it asks for a key then
    CONTRACT.save(tmp_path)
    world = dot_world.Dot().open()
    world.reset(dot_world.Dot().tasks()[0], 0)
    with own_server(Command(("serve", "--dummy", str(tmp_path))), tmp_path / "out") as asker:
        answers = asker([world.observe()] * 3)
        assert [answer["actions"].shape for answer in answers] == [(12, 6)] * 3
        refused = asker([world.observe(), {"prompt": "nothing else"}])
        assert "actions" in refused[0] and "camera" in refused[1]["error"]
        assert asker.timing()["mean_batch"] == 2.5
        assert asker._server is not None
        os.kill(asker._server.pid, signal.SIGKILL)
        with pytest.raises(CommandFailedError, match="killed by SIGKILL"):
            asker([world.observe()])
    with (
        pytest.raises(CommandFailedError, match="neither a checkpoint"),
        own_server(Command(("serve", str(tmp_path / "out"))), tmp_path / "out"),
    ):
        pass


# --- what is refused


def libero_checkpoint(folder: Path) -> Path:
    (folder / "params").mkdir(parents=True)
    of_recipe("pi05_libero", 20.0).save(folder)
    return folder


def test_a_checkpoint_of_another_robot_is_refused_before_anything_starts(tmp_path, capsys):
    place = libero_checkpoint(tmp_path / "checkpoint")
    assert cli.main(["tabletop", f"--checkpoint={place}", f"--output={tmp_path / 'out'}"]) == 1
    message = capsys.readouterr().err
    assert "robot 'libero'" in message and "actions have 7 dimensions, the world takes 6" in message
    assert "20 Hz" in message and "'observation/state' of 8 values" in message
    assert not (tmp_path / "out").exists()


def test_cameras_that_only_one_side_has_are_named_and_rates_may_be_waived():
    mine, other = CONTRACT.as_metadata(), CONTRACT.as_metadata()
    mine["cameras"][0] = {**mine["cameras"][0], "key": "observation/top"}
    with pytest.raises(ValueError, match=r"needs the camera 'observation/top'.*'observation/image' is none"):
        fit.check(mine, other, rate_hz=10.0)
    with pytest.raises(ValueError, match="--any-rate"):
        fit.check(other, other, rate_hz=50.0)
    fit.check(other, other, rate_hz=50.0, any_rate=True)
    with pytest.raises(ValueError, match="none of openpi's"):
        fit.check({"cameras": 3}, other, rate_hz=10.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moon", "--policy=expert"], "expected one of aloha, franka"),
        (["nowhere/my_world.py:World", "--policy=expert"], "does not exist"),
        ([f"{dot_world.__file__}:Walker", "--policy=expert"], "no world"),
        (["tabletop"], "which policy"),
        (["tabletop", "--policy=expert", "--port=1"], "which policy"),
        (["tabletop", "--policy=expert", "--tasks", "juggle"], "no task is named 'juggle'"),
        (["tabletop", "--policy=expert", "--trials=0"], "--trials is 0"),
        (["tabletop", "--policy=expert", "--latency-ms=-1"], "--latency-ms is -1.0"),
        (["tabletop", "--checkpoint=nowhere"], "nowhere"),
        (["franka", "--policy=expert", "--codec=joints_traj"], "no expert"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_left(tmp_path, capsys, words, message):
    output = tmp_path / "out"
    assert cli.main([*words, f"--output={output}"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("words", [(DOT,), ("someone/dataset",)])
def test_help_says_what_each_option_is_once(capsys, words):
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0 and ("--trials" in told or "--frames" in told)
    assert "Attributes:" not in told


def test_patterns_choose_tasks_and_names_may_have_brackets():
    def chosen(*tasks: str) -> list[str]:
        return [str(job.task.name) for job in Evaluation(DOT, dot_world.Dot(), tasks=tasks, trials=1).jobs]

    assert chosen("n*") == ["near"] and chosen("far [2]") == ["far [2]"] and chosen() == ["near", "far [2]"]


@pytest.mark.parametrize(("trials", "told"), [(2, False), (3, True)])
def test_trials_that_begin_again_at_the_same_places_are_told(trials, told, tmp_path, monkeypatch, caplog):
    tasks = [dataclasses.replace(task, num_starts=2) for task in dot_world.Dot().tasks()]
    monkeypatch.setattr(dot_world.Dot, "tasks", lambda self: tasks)
    monkeypatch.setattr(cli, "_run", lambda *_: 0)
    assert cli.main([f"{dot_world.__name__}:Dot", "--policy=expert", f"--output={tmp_path}", f"--trials={trials}"]) == 0
    assert ("begins at 2 places" in caplog.text) is told


def test_a_full_disk_is_an_error_and_no_half_episode(tmp_path):
    (tmp_path / "episodes.jsonl").symlink_to("/dev/full")
    with (
        contextlib.closing(EpisodeFolder(tmp_path, {}, resume=False)) as folder,
        pytest.raises(OSError, match="No space left"),
    ):
        folder.add(Episode("a", "a", 0, True, 1, "success", 1, 0, 0.1), np.zeros((1, 2)))
    assert not folder.episodes


def test_two_processes_do_not_play_into_one_folder(tmp_path):
    first = EpisodeFolder(tmp_path, {}, resume=True)
    with contextlib.closing(first), pytest.raises(BlockingIOError, match="another process"):
        EpisodeFolder(tmp_path, {}, resume=True)
    EpisodeFolder(tmp_path, {}, resume=True).close()


# --- comparing


def test_two_policies_are_compared_in_the_episodes_that_both_have_played(tmp_path):
    def results(outcomes: str) -> dict:
        episodes = [Episode("a", "a", i, mark == "x", 5, "", 2, 0, 0.1) for i, mark in enumerate(outcomes)]
        facts = {
            "world": "w",
            "world_options": {},
            "policy": {"checkpoint": f"<b>{outcomes}"},
            "strategy": "synchronous",
        }
        facts |= {"execute_horizon": 2, "latency_ms": 0.0, "repeatable": True, "videos": [], "errors": []}
        return {**summary(episodes), **facts, "episodes": [episode.to_dict() for episode in episodes]}

    a, b = results("xx......"), results(".xxxxxxx..")
    found = compare(a, b)
    total = found["total"]
    assert (total["only_a"], total["only_b"], total["difference"]) == (1, 6, 0.625)
    assert total["p_value"] == pytest.approx(2 * 8 / 128)
    page = render_comparison(found, a, b, [tmp_path, tmp_path])
    assert "+62 points" in page and "only A 1, only B 6" in page
    assert "A: &lt;b&gt;xx......" in page and "<b>xx" not in page  # names are no HTML
    with pytest.raises(ValueError, match="no episode in common"):
        compare(a, {**b, "episodes": []})


# --- our worlds


def solved(config: Tabletop | Franka, task_number: int, rows: int, seed: int = 4) -> Episode:
    contract, expert = of_recipe(config.recipe, config.control_hz), config.expert()
    assert expert is not None
    policy, told = ExpertPolicy(expert, contract), {"contract": contract.as_metadata()}
    world, task = config.open(privileged=True), config.tasks()[task_number]
    return Player("synchronous", rows, 0.0, config.control_hz, told, True).play(world, task, seed, policy.infer)[0]


def test_the_tabletop_s_expert_does_what_it_is_told_which_with_swapped_prompts_is_something_else():
    assert solved(Tabletop(), 0, 2).measurements == {"told": 1.0}
    swapped = solved(Tabletop(swap_prompts=True), 5, 12)
    assert (swapped.task, swapped.prompt) == (PROMPTS[PLACE][5], PROMPTS[PLACE][0])
    assert not swapped.success and swapped.measurements == {"told": 1.0}


def test_franka_s_expert_stacks_through_the_codec_under_the_recipe_s_contract():
    episode = solved(Franka(), 0, 15)
    assert episode.success and episode.measurements["stacking_success"] >= 0.5


def test_scenes_depend_on_task_and_seed_only():
    world, tasks = Tabletop().open(privileged=True), Tabletop().tasks()

    def blocks(task_number: int, seed: int) -> dict:
        world.reset(tasks[task_number], seed)
        return world.observe()[worlds.PRIVILEGED]["blocks"]

    assert blocks(0, 1) == blocks(0, 1) != blocks(1, 1) and blocks(0, 1) != blocks(0, 2)


def test_an_expert_says_what_it_is_to_a_robot():
    with pytest.raises(ValueError, match="openpi evaluate WORLD --policy expert"):
        ExpertPolicy(Tabletop().expert(), None).infer({"prompt": "go"})
