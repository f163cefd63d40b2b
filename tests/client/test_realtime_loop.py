"""The control loop under a virtual clock: what is played, when the policy is asked, and what happens when it fails."""

import contextlib
import datetime
import itertools
import json
import re
import signal
import threading
import time
from xml.etree import ElementTree

import numpy as np
import pytest

from openpi_client import realtime
from openpi_client.realtime.clock import MonotonicClock, Pacer, Tick, VirtualClock
from openpi_client.realtime.controller import Command
from openpi_client.realtime.log import EpisodeLog
from openpi_client.realtime.robot import check_names
from realtime_world import DT, HORIZON, NAMES, Arm, Walk, World, metadata

RTC = metadata(("guided", "trained"))


def asked(world: World, key: str) -> list:
    return [obs.get(key) for obs in world.policy.asked]


# Chunk strategies


def test_a_robot_that_plays_while_it_asks_never_holds_again():
    world = World(strategy=realtime.Receding(), delays=[15, 4, 7, 3, 8, 2, 6])
    summary = world.run(200)
    assert world.kinds == "n" * 15 + "r" * 185
    assert summary["ticks_without_row_after_start"] == summary["ticks_skipped"] == 0


def test_the_synchronous_strategy_holds_while_it_asks_and_plays_every_row_it_was_told_to():
    world = World(strategy=realtime.Synchronous(10), delays=[3])
    world.run(39)
    assert world.kinds == "nnn" + 2 * (10 * "r" + "hhh") + 10 * "r"
    assert np.allclose(np.diff([c[0] for c in world.arm.commands[:10]]), 0.01)


def test_without_latency_a_simulator_plays_at_every_tick():
    world = World(strategy=realtime.Synchronous(), delays=[0])
    world.run(50)
    assert world.kinds == 50 * "r"
    assert len(world.policy.asked) == 3


def test_ensembling_plays_the_weighted_mean_of_all_chunks_that_reach_a_row():
    policy = Walk()
    policy.change = lambda number, result: {"actions": np.full((HORIZON, 2), float(number))}
    world = World(strategy=realtime.TemporalEnsembling(rate_of_inference=5, m=0.5), delays=[1], policy=policy)
    world.run(14)
    weights = np.exp(-0.5 * np.arange(3))
    assert np.allclose(world.arm.commands[-1], weights @ [1, 2, 3] / weights.sum())


def test_ensembling_leaves_out_no_chunk_when_late_answers_made_it_ask_more_often():
    policy = Walk()
    policy.change = lambda number, result: {"actions": np.full((HORIZON, 2), float(number))}
    strategy = realtime.TemporalEnsembling(rate_of_inference=HORIZON, m=0.0)
    world = World(strategy=strategy, delays=[1, 1, 15, 15, 15, 1], policy=policy)
    world.run(90)
    assert [event["start"] for event in world.events("chunk")][-4:] == [47, 51, 55, 59]
    assert np.isclose(world.arm.commands[-1][0], np.mean([6, 7, 8, 9]))


def test_the_next_episode_knows_how_long_answers_take():
    """Rows that are frozen without need are rows that do not react."""
    world = World(strategy=realtime.TrainedRTC(execution_horizon=6), delays=[2], told=RTC)
    world.run(100)
    first, known = asked(world, "inference_delay"), len(world.policy.asked)
    assert first[1] == 6 and first[-1] == 3
    world.run(100)
    assert set(asked(world, "inference_delay")[known:]) == {None, 3}


def test_rows_that_will_be_too_old_when_they_are_due_are_not_promised():
    """The robot will hold instead: a new chunk that begins with them would bring them back as fresh ones."""
    world = World(strategy=realtime.GuidedRTC(), delays=[16, 8], told=RTC)
    world.run(24)
    assert world.kinds == "n" * 16 + "r" * 5 + "h" * 3
    assert [len(rows) for rows in asked(world, "prev_action_chunk") if rows is not None] == [5]


@pytest.mark.parametrize("name", ["ensembling", "guided"])
def test_a_new_prompt_is_not_bent_onto_what_was_planned_for_the_one_before(name):
    class Told(Arm):
        def observe(self):
            return {**super().observe(), "prompt": "up" if self.observed < 12 else "down"}

    def by_prompt(number, result):
        return {"actions": np.full((HORIZON, 2), 1.0 if policy.asked[-1]["prompt"] == "up" else -1.0)}

    policy = Walk()
    policy.change = by_prompt
    strategy = realtime.TemporalEnsembling(m=0.0) if name == "ensembling" else realtime.GuidedRTC()
    world = World([3], policy=policy, arm=Told(), told=metadata(["guided"]), strategy=strategy)
    world.run(200)
    assert set(np.ravel(world.arm.commands)) == {1.0, -1.0}
    left = [(asked["prompt"], len(asked.get("prev_action_chunk", ()))) for asked in policy.asked]
    first = [prompt for prompt, _ in left].index("down")
    if name == "guided":
        promised = policy.asked[first]["inference_delay"]
        assert left[first] == ("down", promised) and left[first - 1][1] > promised < left[first + 1][1]


def test_guided_chunking_sends_what_is_left_from_the_row_of_the_observation_on():
    """Cut when the question is asked, not when the last answer came; and as long as it is, without zeros behind it."""
    world = World(strategy=realtime.GuidedRTC(execution_horizon=8), delays=[3], told=RTC)
    world.run(40)
    [_, first, *_] = [obs for obs in world.policy.asked if "prev_action_chunk" in obs]
    prefix = first["prev_action_chunk"]
    assert 0 < len(prefix) < HORIZON and prefix.shape[1] == 2
    # The observation was made after the row of its tick was played, and the robot is at once where it is told to be.
    assert np.allclose(prefix[0], first["state"], atol=1e-6)
    assert np.allclose(np.diff(prefix, axis=0), 0.01, atol=1e-6)
    assert first["execution_horizon"] == 8


def test_the_first_question_has_no_prefix_and_all_others_have_whole_numbers():
    world = World(strategy=realtime.GuidedRTC(), delays=[3], told=RTC)
    world.run(100)
    assert "prev_action_chunk" not in world.policy.asked[0]
    assert all(type(delay) is int and delay >= 1 for delay in asked(world, "inference_delay")[1:])


def test_a_server_without_real_time_chunking_gets_no_keys_of_it_and_the_loop_says_so():
    world = World(strategy=realtime.TrainedRTC(fallback=realtime.TemporalEnsembling()))
    world.run(60)
    assert set(asked(world, "prev_action_chunk")) == {None} and world.summary["strategy"] == "TemporalEnsembling"
    assert "no real-time chunking: TrainedRTC becomes TemporalEnsembling" in world.warnings[0]


def test_the_strategy_is_one_that_the_server_offers():
    assert World(told=RTC).loop.strategy.name == "TrainedRTC"
    assert World(told=metadata(("guided",))).loop.strategy.name == "GuidedRTC"
    assert World(told=metadata(("trained",)), strategy=realtime.GuidedRTC(7)).loop.strategy == realtime.TrainedRTC(7)
    assert World(told=metadata(("of tomorrow",))).loop.strategy.name == "Receding"


def test_trained_chunks_that_come_too_late_are_thrown_away_and_asked_for_again():
    world = World(strategy=realtime.TrainedRTC(execution_horizon=6), delays=[2, 2, 2, 2, 2, 2, 2, 9, 2], told=RTC)
    world.run(200)
    [thrown] = world.events("discarded")
    assert thrown["consumed"] > thrown["made_for"]
    assert world.summary["end"] == "time is over" and world.summary["ticks_without_row_after_start"] == 0
    # Before enough was measured the most is assumed that the model was trained for, and never more.
    delays = asked(world, "inference_delay")[1:]
    assert delays[0] == 6 and max(delays) == 6 and delays[-1] == 3


def test_five_late_chunks_in_a_row_end_the_episode_in_hold():
    policy = Walk()
    policy.change = lambda number, result: {"actions": np.linspace(0, 1, 100)[:, None] * [1.0, 1.0]}
    told = metadata(("trained",), horizon=100)
    world = World(strategy=realtime.TrainedRTC(), delays=[1, 8], told=told, policy=policy)
    assert "5 chunks in a row came later than the 6 rows" in world.run(400)["end"]
    assert np.array_equal(world.arm.commands[-1], world.arm.commands[-2])


# Delays


def test_a_chunk_begins_with_its_first_row_when_the_robot_stood_still_meanwhile():
    """LeRobot's merge skipped 21 of 30 rows there: the delay is what was played, not what the clock says."""
    world = World(delays=[15])
    world.run(17)
    assert np.allclose(world.arm.commands[0], 0) and np.allclose(world.arm.commands[1], 0.01)
    assert world.events("chunk")[0]["consumed"] == 0 and world.events("chunk")[0]["delay_ticks"] == 15


def test_a_late_chunk_loses_the_rows_that_were_played_meanwhile_and_no_others():
    world = World(strategy=realtime.Receding(execution_horizon=10), delays=[1, 12, 1])
    world.run(60)
    late = next(event for event in world.events("chunk") if event["delay_ticks"] == 12)
    assert late["consumed"] <= 12
    # The walk goes on from where the robot was when it was asked, so without a jump whatever the delay.
    assert np.abs(np.diff([c[0] for c in world.arm.commands])).max() < 0.011


def test_the_forecast_forgets_the_first_answer_and_all_but_the_last_ten():
    world = World(strategy=realtime.GuidedRTC(execution_horizon=5), delays=[19, 2, 9, 2], told=RTC)
    world.run(200)
    delays = asked(world, "inference_delay")
    assert 19 not in delays and 20 not in delays  # compiling
    assert 10 in delays and delays[-1] == 3  # maximum of the last ten, and one more


def test_a_server_that_stalled_once_is_not_promised_whole_chunks_from_then_on():
    world = World([3] * 4 + [60, 3], told=metadata(["guided"]), strategy=realtime.GuidedRTC())
    world.run(400)
    [stale] = world.events("stale")
    assert stale["delay_ticks"] == 60
    promised = [event["inference_delay"] for event in world.events("ask") if "inference_delay" in event]
    assert len(promised) > 15 and max(promised) <= HORIZON / 4


def test_a_chunk_that_came_too_late_leaves_time_for_a_second_question():
    """The one that is thrown away was made for six rows, and came after seven."""
    world = World(strategy=realtime.TrainedRTC(), delays=[5] * 15 + [7] + [5] * 20, told=metadata(("trained",)))
    world.run(200)
    assert len(world.events("discarded")) == 1
    assert "h" not in world.kinds.lstrip("h")


@pytest.mark.parametrize("rate_hz", [30.0, 50.0])
def test_delays_are_counted_at_the_rate_of_the_contract(rate_hz):
    told = metadata(("guided",))
    told["contract"]["control_hz"] = rate_hz
    world = World(strategy=realtime.GuidedRTC(execution_horizon=5), delays=[6], told=told)
    world.loop.run(max_s=3)
    delay = [d for d in asked(world, "inference_delay") if d][-1]
    assert delay == int(np.ceil(6 * DT * rate_hz - 1e-9)) + 1


# Rates and speeds


def test_at_another_rate_rows_are_interpolated_and_it_is_said():
    world = World(rate_hz=100.0, delays=[2])
    world.loop.run(max_s=1)
    steps = np.diff([c[0] for c in world.arm.commands[10:-1]])
    assert np.allclose(steps, 0.005, atol=1e-4)
    assert any("100 Hz" in text and "50 Hz" in text for text in world.warnings)


def test_velocities_are_played_at_their_rate_only():
    with pytest.raises(ValueError, match="trained at 50 Hz, and shoulder, elbow are velocities"):
        World(rate_hz=25.0, told=metadata(hold=["zero", "zero"]))


def test_a_quarter_of_the_speed_takes_four_times_as_long():
    world = World(safety=realtime.Safety(blend_s=0, speed=0.25), delays=[4])
    world.run(104)
    assert np.allclose(world.arm.commands[-1], 0.25 * 0.01 * 99, atol=1e-4)
    assert world.summary["ticks_without_row_after_start"] == 0


# Safety


def test_the_start_is_a_slow_way_from_the_measured_pose_and_then_asks_anew():
    policy = Walk(step=0)
    policy.change = lambda number, result: {"actions": result["actions"] * 0 + [1.0, -1.0]}
    world = World(arm=Arm([0.5, 0.5]), policy=policy, safety=realtime.Safety(), delays=[5])
    world.run(300)
    assert world.kinds.startswith("n" * 5 + "b" * 250) and world.kinds.endswith("r")
    steps = np.abs(np.diff(np.array(world.arm.commands), axis=0))
    assert steps.max() <= 1.5 * 1.5 / 250 + 1e-9  # 1.5 rad in 250 ticks; a cubic's peak is 1.5 times its mean
    assert np.allclose(policy.asked[1]["state"], [1, -1])  # the answer that is played knows where the robot is


def test_home_comes_first():
    world = World(arm=Arm([0.4, 0.0]), safety=realtime.Safety(blend_s=0.2), delays=[2])
    world.run(30, home=np.zeros(2))
    assert world.kinds.startswith("b" * 10)
    assert np.allclose(world.policy.asked[0]["state"], 0)


def test_a_robot_whose_pose_is_not_known_does_not_start_blended():
    told = metadata()
    told["contract"]["state"] = []
    with pytest.raises(ValueError, match=r"pose\(\)"):
        World(told=told, safety=realtime.Safety()).run(10)


def test_without_answers_the_robot_holds_then_stops_and_comes_back_slowly():
    stops = []
    world = World(delays=[2, 2, 150, 2], safety=realtime.Safety(blend_s=0.5, stop_after_s=1.0), on_stop=stops.append)
    world.run(400)
    kinds = world.kinds
    start = kinds.index("r")
    hold = kinds.index("h", start)
    assert kinds[hold : hold + 49] == 49 * "h" and set(kinds[hold + 49 : kinds.index("b", hold)]) == {"n"}
    assert stops == ["no action for 1.00 s"]
    assert kinds[kinds.index("b", hold) :].startswith(25 * "b") and kinds.endswith("r")
    held = world.log.commands[hold - 1 : hold + 49]
    assert np.array_equal(held, np.tile(held[0], (50, 1)))
    assert [event["tick"] for event in world.events("hold")] == [hold + 1]  # within two ticks


def test_nothing_older_than_a_chunk_is_ever_played():
    """After a killed and restarted server an answer was 19.8 s old."""
    world = World(delays=[3, 3, 990, 21, 3], safety=realtime.Safety(blend_s=0, stop_after_s=100))
    world.run(1300)
    ages = world.log.ticks["age_s"]
    assert np.nanmax(ages) <= HORIZON * DT and len(world.events("stale")) == 2
    assert world.kinds.endswith("r") and len(world.warnings) == len(set(world.warnings))


def test_rows_that_grow_old_while_the_loop_is_stopped_are_not_played():
    world = World(strategy=realtime.Receding(execution_horizon=HORIZON), delays=[1, 30])
    arm, apply = world.arm, world.arm.apply

    def slow(action):
        apply(action)
        if len(arm.commands) == 5:
            world.clock.advance(1.0)  # the process was suspended

    arm.apply = slow
    world.run(80)
    assert world.summary["ticks_skipped"] == 49
    assert np.nanmax(world.log.ticks["age_s"]) <= HORIZON * DT


def test_velocities_become_zero_and_grippers_stay():
    policy = Walk()
    policy.change = lambda number, result: {"actions": np.full((HORIZON, 2), 0.7)}
    world = World(
        told=metadata(hold=["zero", "stay"]), policy=policy, delays=[1, 60], safety=realtime.Safety(blend_s=0)
    )
    world.run(40)
    assert world.kinds.endswith("h") and np.allclose(world.arm.commands[-1], [0.0, 0.7])


def test_how_to_hold_must_be_known():
    told = metadata(kind="joint velocities (released checkpoints) or absolute joint positions")
    with pytest.raises(ValueError, match="how does this robot hold"):
        World(told=told)
    assert World(told=told, hold="zero").loop.spec.stays.tolist() == [False, False]
    with pytest.raises(ValueError, match=r"no contract.*its action_names, or the loop action_width"):
        World(told={})
    with pytest.raises(ValueError, match="rate_hz"):
        World(told={}, action_width=2, hold="stay")


@pytest.mark.parametrize("strategy", [realtime.Receding(), realtime.TemporalEnsembling(rate_of_inference=5)])
def test_a_server_that_does_not_say_how_long_chunks_are_may_begin_with_a_short_one(strategy):
    policy = Walk()
    policy.change = lambda number, result: {"actions": result["actions"][: 3 if number == 1 else None]}
    world = World(policy=policy, told={}, delays=[2], action_width=2, hold="stay", rate_hz=50, strategy=strategy)
    world.run(40)
    assert not world.events("failed")
    assert "h" not in world.kinds.lstrip("nh")[10:]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (lambda rows: np.where(np.arange(HORIZON)[:, None] == 3, np.nan, rows), "'shoulder' in row 3 .* nan"),
        (lambda rows: rows[:, :1], r"shape \(20, 1\)"),
        (lambda rows: np.tile(rows, (2, 1)), "40 rows; expected at most 20"),
        (lambda rows: rows.tolist(), "list; expected an array"),
        (lambda rows: np.full((HORIZON, 2), 1e300), r"row 0 .* is 1e\+300; expected finite"),
    ],
)
def test_answers_of_no_use_are_not_played_and_five_in_a_row_end_the_episode(bad, text):
    policy = Walk()
    policy.change = lambda number, result: {"actions": bad(result["actions"])} if number > 2 else result
    world = World(policy=policy, delays=[2])
    summary = world.run(300)
    assert summary["failed"] == 5
    assert np.isfinite(world.arm.commands).all() and world.kinds.endswith("hh")
    assert re.search(f"5 answers in a row .*{text}", summary["end"])


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({"actions": "joints"}, "the contract of the server is none: expected a map for 'actions'"),
        ({"state": ["joints"]}, "lists of maps, each with its 'key', for 'state'"),
        ({"state": [{"names": ["shoulder"]}]}, "lists of maps, each with its 'key', for 'state'"),
        ({"cameras": 3}, "for 'state' and 'cameras'"),
        ({"state": [{"key": "state"}]}, "the contract names no state that is measured"),
        ({"control_hz": 1e300}, "control_hz of 1e\\+300; expected more than 0, at most 10000"),
        ({"actions": {"names": "ab"}}, "the names 'ab' of actions; expected a list of texts"),
        ({"actions": {"names": [1, 2]}}, r"the names \[1, 2\] of actions"),
        ({"actions": {"hold": 5}}, "hold is 5; expected 'stay'"),
        ({"actions": {"low": {}}}, r"limits\.low is {}; expected numbers"),
    ],
)
def test_a_contract_that_cannot_be_is_refused_before_the_robot_moves(told, text):
    contract = metadata()["contract"]
    actions = told.get("actions")
    changed = {"actions": {**contract["actions"], **actions}} if isinstance(actions, dict) else {}
    with pytest.raises(ValueError, match=text):
        World(told={"contract": {**contract, **told, **changed}}, safety=realtime.Safety()).run(1)


def test_one_bad_answer_is_survived():
    policy = Walk()
    policy.change = lambda number, result: {"actions": result["actions"] * np.nan} if number == 3 else result
    world = World(policy=policy, delays=[2])
    assert world.run(100)["end"] == "time is over"
    assert world.summary["ticks_without_row_after_start"] == 0


def test_a_server_that_warns_of_another_thing_each_time_is_not_told_of_for_ever():
    policy = Walk(warnings=[f"thing {i}: is odd" for i in range(5000)])
    world = World(policy=policy, safety=realtime.Safety(blend_s=0, accept_warnings=True))
    world.run(60)
    assert len(world.warnings) == 101 and "further ones are not told" in world.warnings[-1]
    assert len(World(policy=policy).run(30)["end"]) < 1000


def test_a_server_that_finds_the_first_observation_suspicious_does_not_move_the_robot():
    """A state in degrees was answered with targets of 57 "rad", and a warning that no program read."""
    text = "state 'shoulder': 57.3 is far outside the training range -1..1"
    world = World(policy=Walk(warnings=[text]))
    assert text in world.run(30)["end"]
    assert text in world.warnings and "r" not in world.kinds
    accepted = World(policy=Walk(warnings=[text]), safety=realtime.Safety(blend_s=0, accept_warnings=True))
    accepted.run(60)
    assert accepted.kinds.endswith("r") and accepted.warnings.count(text) == 1


def test_jumps_are_caught_up_with_in_allowed_steps():
    policy = Walk(step=0)
    policy.change = lambda number, result: {"actions": result["actions"] * 0 + (1.0 if number > 1 else 0.0)}
    limits = realtime.Limits(low=-2, high=0.9, max_jump=0.1)
    world = World(policy=policy, delays=[2], safety=realtime.Safety(blend_s=0, limits=limits))
    world.run(60)
    commands = np.array(world.arm.commands)
    assert np.abs(np.diff(commands, axis=0)).max() <= 0.1 + 1e-9 and np.allclose(commands[-1], 0.9)
    assert world.summary["clamped"] > 0 and len([w for w in world.warnings if "clamped" in w]) == 1


def test_limits_of_the_contract_hold_and_may_stop_the_robot():
    told = metadata(low=[-1.0, -1.0], high=[0.05, 1.0], max_step=[0.5, 0.5])
    world = World(told=told, delays=[2])
    world.run(60)
    assert np.array(world.arm.commands)[:, 0].max() <= 0.05 and np.array(world.arm.commands)[:, 1].max() > 0.05
    stop = realtime.Limits(high=0.05, on_violation="stop")
    world = World(delays=[2], safety=realtime.Safety(blend_s=0, limits=stop))
    assert "'shoulder' of 0.06 is outside its range; 0.05 is allowed" in world.run(60)["end"]
    assert float(np.float32(0.05)) > 0.05 and np.isclose(world.arm.commands[-1][0], 0.05, atol=0, rtol=1e-12)
    assert np.array(world.arm.commands).max() <= 0.05


def test_limits_are_found_in_recorded_actions():
    walk = np.concatenate([np.linspace(0, 1, 101), np.linspace(5, 6, 101)])[:, None] * [1.0, 0.0]
    limits = realtime.Limits.from_recorded(walk, episode_ends=[101, 202])
    assert np.allclose(limits.low, [-0.3, 0]) and np.allclose(limits.high, [6.3, 0])
    assert limits.max_step[0] == pytest.approx(0.015) and limits.max_step[1] == np.inf
    for bad in ({"low": np.nan}, {"max_step": 0}, {"low": 1, "high": 0}, {"on_violation": "ignore"}):
        with pytest.raises(ValueError, match=r"limits|on_violation"):
            realtime.Limits(**bad)


def test_a_camera_that_sends_the_same_picture_is_noticed_and_not_acted_on():
    world = World(delays=[2])
    world.arm.freeze = True
    world.run(120)
    assert any("'image' sends the same picture" in text for text in world.warnings)
    assert world.kinds.endswith("h") and world.summary["holds"] >= 1


def test_a_still_picture_of_a_robot_that_stands_still_is_no_fault():
    world = World(delays=[2], policy=Walk(step=0))
    world.arm.freeze = True
    world.run(120)
    assert world.kinds.endswith("r")


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda obs: obs.pop("image"), "camera 'image' is missing"),
        (lambda obs: obs.update(image=None), "camera 'image' is missing"),
        (lambda obs: obs.update(state=obs["state"] * np.nan), "'state' holds NaN"),
    ],
)
def test_observations_that_are_not_whole_are_not_sent(spoil, text):
    world = World(delays=[2])
    observe = world.arm.observe

    def spoilt():
        obs = observe()
        if len(world.policy.asked) >= 4:
            spoil(obs)
        return obs

    world.arm.observe = spoilt
    world.run(120)
    assert len(world.policy.asked) == 4 and any(text in warning for warning in world.warnings)
    assert world.kinds.endswith("h")


def test_a_program_error_in_the_robot_ends_in_hold_and_is_not_hidden():
    world = World(delays=[2])
    apply = world.arm.apply

    def failing(action):
        apply(action)
        world.arm.broken = len(world.arm.commands) > 20

    world.arm.apply = failing
    with pytest.raises(RuntimeError, match="thread has died"):
        world.run(100)
    assert "thread has died" in world.loop.last_log.events[-1]["reason"]
    assert np.array_equal(world.arm.commands[-1], world.arm.commands[-2])


def test_a_robot_that_does_not_hold_is_no_end_like_any_other():
    world = World(delays=[2])

    def hold() -> None:
        raise RuntimeError("the brake is stuck")

    world.arm.hold = hold
    with pytest.raises(RuntimeError, match="brake"):
        world.run(30)
    told = "time is over; and it did not take its hold: RuntimeError: the brake is stuck"
    assert world.loop.last_log.events[-1]["reason"] == told


@pytest.mark.parametrize(
    ("lost", "end"), [(1, "time is over"), (4, "time is over"), (5, "TimeoutError: no status packet")]
)
def test_a_robot_that_does_not_answer_once_is_asked_again_and_one_that_never_does_ends_in_hold(lost, end):
    """Buses of servos lose one of some hundred answers, which ended the episode."""
    world, num_asked = World([2]), itertools.count()
    observe = world.arm.observe

    def sometimes() -> dict:
        if 4 <= next(num_asked) < 4 + lost:
            raise TimeoutError("no status packet")
        return observe()

    world.arm.observe = sometimes
    with pytest.raises(TimeoutError) if lost == 5 else contextlib.nullcontext():
        world.run(200)
    log = world.loop.last_log
    assert log.events[-1] == {**log.events[-1], "kind": "end", "reason": end}
    assert "the robot could not be observed: TimeoutError: no status packet" in world.warnings
    assert np.array_equal(world.arm.commands[-1], world.arm.commands[-2]) or lost < 5


@pytest.mark.parametrize(
    ("call", "seconds", "told"),
    [
        ("apply", 0.3, "238 of 260 ticks were skipped"),
        ("observe", 0.05, "44 of 250 ticks were skipped"),
        ("apply", 0.021, ""),
        ("apply", 0.0, ""),
    ],
)
def test_a_robot_that_takes_longer_than_its_ticks_is_told_with_what_takes_so_long(call, seconds, told):
    world = World([4])
    do = getattr(world.arm, call)
    setattr(world.arm, call, lambda *args: (world.clock.advance(seconds), do(*args))[1])
    world.run(400)
    slow = [text for text in world.warnings if "were skipped" in text]
    assert len(slow) == bool(told) and all(text.startswith(told) for text in slow)
    assert all("a tick has 20 ms, " in text and f"{call} took up to {1e3 * seconds:.0f} ms" in text for text in slow)


def test_a_robot_with_its_joints_in_another_order_is_refused():
    arm = Arm()
    arm.action_names = NAMES[::-1]
    with pytest.raises(ValueError, match=r"'actions' of the robot is elbow, shoulder; .* shoulder, elbow"):
        World(arm=arm)
    arm = Arm()
    arm.state_names = {"state": ("elbow", "shoulder")}
    with pytest.raises(ValueError, match="'state' of the robot"):
        World(arm=arm)


@pytest.mark.parametrize(
    ("names", "is_taken"),
    [
        (["panda_joint1", "panda_joint2", "grip"], True),
        (["joint_0", "joint_1", "gripper"], True),
        (["joint_1.pos", "joint_2.pos", "gripper.pos"], True),
        (["joint_2", "joint_1", "gripper"], False),
        (["panda_joint2", "panda_joint1", "grip"], False),
        (["gripper", "joint_1", "joint_2"], False),
        (["shoulder", "elbow", "gripper"], False),
        (["1", "2", "3"], False),
        (["joint_1", "joint_2"], False),
    ],
)
def test_other_words_for_the_policy_s_names_are_told_and_other_dimensions_refused(names, is_taken):
    """As of published checkpoints, whose names are their recipe's."""
    arm = Arm()
    arm.state_names = {"state": names}
    told = {"contract": {"state": [{"key": "state", "names": ["joint_1", "joint_2", "gripper"]}]}}
    if is_taken:
        assert "are taken for each other by their place" in check_names(arm, told)[0]
    else:
        with pytest.raises(ValueError, match=r"trained with joint_1, joint_2, gripper.*give the robot"):
            check_names(arm, told)


def test_what_may_be_wrong_with_names_is_a_warning_of_the_episode():
    arm = Arm()
    arm.action_names = [f"left_{name}" for name in NAMES]
    world = World(arm=arm)
    assert any("are taken for each other" in text for text in world.run(10)["warnings"])


@pytest.mark.parametrize(
    "options",
    [{"speed": 0}, {"speed": 2}, {"max_age_s": 0}, {"blend_s": -1}, {"max_failures": 0}, {"hold_after_ticks": 0}],
)
def test_numbers_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        realtime.Safety(**options)


# Time


def test_what_is_more_than_a_tick_late_is_skipped_without_bursts():
    clock = VirtualClock()
    pacer = Pacer(clock, 10)
    times = []
    for delay_s in (0, 0.05, 0.35, 0, 0):
        tick = pacer.wait()
        times.append((tick.number, round(clock.now_s(), 3), tick.skipped))
        clock.advance(delay_s)
    assert times == [(0, 0.0, 0), (1, 0.1, 0), (2, 0.2, 0), (6, 0.6, 3), (7, 0.7, 0)]


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_a_simulator_whose_world_moves_with_the_clock_plays_each_row_when_it_is_due(delay):
    """The rows say themselves when that is: row i is due i ticks after the observation."""
    policy, played = Walk(step=1.0), []

    class Simulator(Arm):
        def apply(self, action):
            if action[0] > 0:
                played.append((self.position[0], action[0]))

        def move(self, seconds):
            self.position = self.position + round(seconds / DT)

    arm = Simulator(start=(1, 1))
    clock = VirtualClock(on_advance=arm.move)
    requester = realtime.SimulatedLatency(policy, clock, [DT * delay], metadata())
    safety = realtime.Safety(blend_s=0)
    realtime.ControlLoop(arm, requester, strategy=realtime.Receding(), safety=safety, clock=clock).run(max_s=60 * DT)
    # Of the first chunk, for which the robot held, no row was past.
    due, commanded = np.array(played)[HORIZON:-1].T
    assert len(policy.asked) > 4 and np.array_equal(due, commanded)


def test_a_tick_that_was_slept_through_is_skipped_too():
    """Most of the time a loop sleeps: there SIGSTOP finds it."""

    class Suspended(realtime.VirtualClock):
        def sleep_until(self, time_s):
            super().sleep_until(time_s + (10.0 if 0.99 < time_s < 1.01 else 0.0))

    pacer = Pacer(Suspended(), 50)
    ticks = [pacer.wait() for _ in range(60)]
    assert ticks[49].number == 49 and ticks[50].number == 50 + ticks[50].skipped
    assert 500 <= ticks[50].skipped <= 501
    assert max(tick.late_s for tick in ticks) <= DT + 1e-9


def test_an_error_of_one_tick_does_not_shift_those_that_follow():
    clock = VirtualClock()
    pacer = Pacer(clock, 10)
    pacer.wait()
    clock.advance(0.15)
    late = pacer.wait()
    assert late.late_s == pytest.approx(0.05) and late.skipped == 0
    pacer.wait()
    assert clock.now_s() == pytest.approx(0.2)


@pytest.mark.parametrize("max_s", [float("nan"), -1.0, "60"])
def test_an_episode_without_an_end_that_anybody_meant_does_not_begin(max_s):
    requester = realtime.ThreadRequester(Walk(), metadata())
    with pytest.raises(ValueError, match=r"max_s is .*; expected seconds"):
        realtime.ControlLoop(Arm(), requester, safety=realtime.Safety(blend_s=0)).run(max_s=max_s)
    requester.close()


def test_the_time_of_day_may_be_set_while_the_loop_runs(monkeypatch):
    days = itertools.count(2e9, -86400)
    monkeypatch.setattr(time, "time", lambda: next(days))
    policy = Walk()
    requester = realtime.ThreadRequester(policy, metadata())
    loop = realtime.ControlLoop(Arm(), requester, safety=realtime.Safety(blend_s=0), clock=MonotonicClock())
    assert loop.run(max_s=0.1)["end"] == "time is over"
    requester.close()


# How it ends, and what is left


def test_ctrl_c_ends_in_hold_with_the_log_written(tmp_path):
    world = World(delays=[2], log_folder=tmp_path)
    apply = world.arm.apply

    def press(action):
        apply(action)
        if len(world.arm.commands) == 30:
            signal.raise_signal(signal.SIGINT)

    world.arm.apply = press
    with pytest.raises(KeyboardInterrupt):
        world.run(100)
    assert len(world.arm.commands) == 31 and np.array_equal(world.arm.commands[-1], world.arm.commands[-2])
    assert json.loads((tmp_path / "episode_0000/summary.json").read_text())["end"] == "interrupted"


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda world: setattr(world.arm, "freeze", True), "camera 'image' sends the same picture as "),
        (lambda world: setattr(world.policy, "step", np.nan), "'shoulder' in row 0 of the answer is nan"),
    ],
)
def test_why_the_robot_held_is_beside_that_it_did(spoil, text):
    world = World(safety=realtime.Safety(blend_s=0, max_failures=99))
    apply = world.arm.apply
    world.arm.apply = lambda action: (apply(action), len(world.arm.commands) == 40 and spoil(world))
    world.run(200)
    [hold], [stop] = world.events("hold"), world.events("stop")
    assert text in hold["why"] and text in stop["why"]
    assert any(told.startswith("no action for 1.00 s: ") and text in told for told in world.warnings)
    silent = World(safety=realtime.Safety(blend_s=0, max_failures=99))
    silent.arm.observe = lambda: {"state": None, "prompt": "go"}
    silent.loop._robot.pose = lambda: np.zeros(2)
    silent.run(300)
    assert any(told.startswith("no answer for 5 s ('state' is missing); ") for told in silent.warnings)


def test_an_episode_leaves_a_log_a_summary_and_a_picture(tmp_path):
    limits = realtime.Limits(low=[-9, -np.inf], max_step=1.0)
    safety = realtime.Safety(blend_s=0.1, limits=limits)
    world = World(delays=[2, 2, 2, 30, 2], log_folder=tmp_path, safety=safety)
    world.run(150), world.run(20)
    folder = tmp_path / "episode_0000"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert {"ask", "chunk", "hold", "hold ends", "stale", "warning", "end"} <= {event["kind"] for event in events}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["holds"] == 1 and summary["ticks"] == 150 and summary["tick_error_ms"]["p99"] == 0
    assert summary["prompts"] == ["go"] and summary["robot"] == "Arm" and summary["latency_ms"]["whole"]["max"] == 600
    assert summary["safety"]["limits"]["low"] == [-9, None] and summary["safety"]["limits"]["max_step"] == [1.0]
    assert abs(datetime.datetime.fromisoformat(summary["started"]).timestamp() - time.time()) < 3600
    [hold] = [event for event in events if event["kind"] == "hold"]
    assert re.fullmatch(r"question \d+ is \d+ ticks old", hold["why"])
    with np.load(folder / "ticks.npz") as ticks:
        assert ticks["commands"].shape == (150, 2) and (ticks["ticks"]["chunk"][-1] > 0)
    picture = ElementTree.parse(folder / "timeline.svg").getroot()
    texts = " ".join(element.text or "" for element in picture.iter())
    assert sum(element.get("stroke") == "#d00" for element in picture.iter()) == summary["stale"] == 1
    assert picture.tag.endswith("svg") and all(f"{name}: " in texts for name in summary["names"])
    assert (tmp_path / "episode_0001/summary.json").is_file()


def test_an_answer_to_the_last_episode_is_not_played_in_the_next():
    world = World(delays=[2, 2, 30, 2])
    world.run(20)
    before = len(world.policy.asked)
    world.run(40)
    assert world.events("ask")[0]["chunk"] > before - 1 and world.kinds.endswith("r")
    assert all(event["tick"] >= 0 and event["consumed"] >= 0 for event in world.events("chunk"))


def test_a_policy_in_a_thread_gets_a_copy_of_the_observation():
    seen, gate = [], threading.Event()

    class Slow(Walk):
        def infer(self, obs):
            assert gate.wait(10)
            seen.append(obs["state"].copy())
            return super().infer(obs)

    requester = realtime.ThreadRequester(Slow(), metadata())
    state = np.zeros(2, np.float32)
    requester.submit(1, {"state": state})
    assert requester.is_busy and requester.poll() is None
    state += 5
    gate.set()
    while requester.is_busy:
        requester.poll()
    assert np.array_equal(seen[0], [0, 0])
    requester.close()


def test_the_picture_of_a_long_episode_has_the_jump_of_a_single_tick(tmp_path):
    log = EpisodeLog(tmp_path, VirtualClock(), 1)
    for number in range(20_000):
        values = np.array([1.0 if number == 12_345 else 0.0])
        log.end_tick(Tick(number, 0.0, 0), Command(values, "hold"), number * DT)
    log.close("over")
    svg = ElementTree.fromstring((tmp_path / "timeline.svg").read_text())
    [curve] = svg.iter("{http://www.w3.org/2000/svg}polyline")
    points = [point.split(",") for point in curve.attrib["points"].split()]
    heights = [float(y) for _, y in points]
    assert max(heights) - min(heights) > 200 and len(points) < 5_000
    assert float(points[int(np.argmin(heights))][0]) == pytest.approx(140 + 1040 * 12_345 / 19_999, abs=1)
