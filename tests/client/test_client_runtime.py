"""The chunk broker and the control runtime: what robot programs rely on."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.base_policy import BasePolicy
from openpi_client.rate_watch import RateWatch
from openpi_client.runtime.agents.policy_agent import PolicyAgent
from openpi_client.runtime.environment import Environment
from openpi_client.runtime.runtime import Runtime, _Pacer
from openpi_client.runtime.subscriber import Subscriber


class CountingPolicy(BasePolicy):
    """Chunk number n of 6 rows holds n * 100 + row; a row is [2]."""

    def __init__(self, rows: int = 6):
        self.rows, self.num_calls, self.num_resets = rows, 0, 0

    def infer(self, obs: dict) -> dict:
        rows = np.arange(self.rows) + 100 * self.num_calls
        self.num_calls += 1
        return {
            "actions": np.stack([rows, rows], -1),
            "nested": {"speed": rows * 0.5, "parts": [rows]},
            "timing": {"infer_ms": 1.5},
            "label": "pick",
        }

    def reset(self) -> None:
        self.num_resets += 1


def test_the_broker_plays_the_rows_of_a_chunk_then_asks_for_the_next():
    policy = CountingPolicy()
    broker = ActionChunkBroker(policy, action_horizon=4)
    played = [int(broker.infer({})["actions"][0]) for _ in range(10)]
    assert played == [0, 1, 2, 3, 100, 101, 102, 103, 200, 201]
    assert policy.num_calls == 3


def test_the_broker_asks_only_when_an_action_is_needed():
    policy = CountingPolicy()
    broker = ActionChunkBroker(policy, action_horizon=2)
    broker.infer({}), broker.infer({})
    assert policy.num_calls == 1


def test_the_broker_indexes_every_array_and_keeps_everything_else():
    action = ActionChunkBroker(CountingPolicy(), action_horizon=4).infer({})
    assert action["actions"].shape == (2,)
    assert action["nested"]["speed"] == 0.0 and action["nested"]["parts"] == [0]
    assert action["timing"] == {"infer_ms": 1.5} and action["label"] == "pick"


def test_the_broker_does_not_change_the_policy_s_result():
    policy = CountingPolicy()
    result = policy.infer({})
    policy.infer = lambda obs: result
    broker = ActionChunkBroker(policy, action_horizon=3)
    for _ in range(3):
        broker.infer({})
    assert result["actions"].shape == (6, 2) and result["nested"]["parts"][0].shape == (6,)


def test_reset_drops_the_chunk_and_resets_the_policy():
    policy = CountingPolicy()
    broker = ActionChunkBroker(policy, action_horizon=4)
    broker.infer({})
    broker.reset()
    assert int(broker.infer({})["actions"][0]) == 100
    assert policy.num_resets == 1


def test_a_chunk_shorter_than_the_horizon_raises_on_its_end():
    broker = ActionChunkBroker(CountingPolicy(rows=2), action_horizon=4)
    broker.infer({}), broker.infer({})
    with pytest.raises(IndexError, match=r"'result/actions' .* shape \(2, 2\)"):
        broker.infer({})
    assert broker.infer({})["actions"].shape == (2,)  # of a new chunk


def test_a_horizon_of_no_actions_is_refused():
    with pytest.raises(ValueError, match="action_horizon is 0"):
        ActionChunkBroker(CountingPolicy(), action_horizon=0)


class Log(Environment, Subscriber):
    """A world that ends after `num_steps`, and a subscriber; both write to one list of events."""

    def __init__(self, num_steps: int | None = None):
        self.num_steps, self.events, self.step = num_steps, [], 0

    def reset(self) -> None:
        self.events.append("reset")
        self.step = 0

    def is_episode_complete(self) -> bool:
        return self.step == self.num_steps

    def get_observation(self) -> dict:
        return {"step": self.step}

    def apply_action(self, action: dict) -> None:
        self.events.append("apply")
        self.step += 1

    def on_episode_start(self) -> None:
        self.events.append("start")

    def on_step(self, observation: dict, action: dict) -> None:
        self.events.append(("step", observation["step"], int(action["actions"][0, 0])))

    def on_episode_end(self) -> None:
        self.events.append("end")


def test_an_episode_observes_acts_applies_and_tells_in_this_order():
    log, policy = Log(num_steps=2), CountingPolicy()
    Runtime(log, PolicyAgent(policy), [log]).run()
    assert log.events == [
        *["reset", "start", "apply", ("step", 0, 0), "apply", ("step", 1, 100), "end"],
        "reset",  # once more after the last episode
    ]
    assert policy.num_resets == 1


def test_every_episode_resets_environment_and_agent():
    log, policy = Log(num_steps=1), CountingPolicy()
    Runtime(log, PolicyAgent(policy), [], num_episodes=3).run()
    assert log.events.count("reset") == 4 and log.events.count("apply") == 3
    assert policy.num_resets == 3


@pytest.mark.parametrize("limit", [1, 5])
def test_a_step_limit_lets_one_step_more_happen(limit):
    log = Log()
    Runtime(log, PolicyAgent(CountingPolicy()), [], max_episode_steps=limit).run()
    assert log.events.count("apply") == limit + 1


def test_an_episode_can_be_ended_from_outside():
    class Stopper(Log):
        def on_step(self, observation: dict, action: dict) -> None:
            if observation["step"] == 3:
                runtime.mark_episode_complete()

    log = Stopper()
    runtime = Runtime(log, PolicyAgent(CountingPolicy()), [log])
    runtime.run()
    assert log.events.count("apply") == 4


def test_a_runtime_can_run_in_a_thread_of_its_own():
    log = Log(num_steps=2)
    thread = Runtime(log, PolicyAgent(CountingPolicy()), []).run_in_new_thread()
    assert isinstance(thread, threading.Thread)
    thread.join(timeout=10)
    assert not thread.is_alive() and log.events.count("apply") == 2


class FakeClock:
    """Time that passes only when somebody works or sleeps."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now_s)
        monkeypatch.setattr("time.sleep", self.work)

    def work(self, seconds: float) -> None:
        self.now_s += seconds


def ticks(pacer: _Pacer, clock: FakeClock, work_s: list[float]) -> list[float]:
    times = []
    for seconds in work_s:
        clock.work(seconds)
        pacer.wait()
        times.append(round(clock.now_s - 100, 6))
    return times


def test_the_pace_holds_its_grid_whatever_a_step_takes(monkeypatch):
    clock = FakeClock(monkeypatch)
    assert ticks(_Pacer(0.1), clock, [0.01, 0.09, 0.105, 0.05]) == [0.1, 0.2, 0.305, 0.4]


def test_a_late_step_is_not_made_up_for_by_sending_actions_faster(monkeypatch):
    clock = FakeClock(monkeypatch)
    assert ticks(_Pacer(0.1), clock, [0.35, 0.01, 0.01]) == [0.35, 0.45, 0.55]


def test_without_a_rate_nothing_waits(monkeypatch):
    clock = FakeClock(monkeypatch)
    assert ticks(_Pacer(0.0), clock, [0.25, 0.5]) == [0.25, 0.75]


def test_the_client_imports_no_machine_learning():
    program = (
        "import sys, openpi_client.websocket_client_policy, openpi_client.action_chunk_broker, "
        "openpi_client.image_tools, openpi_client.runtime.runtime, openpi_client.runtime.agents.policy_agent\n"
        "print(sorted({'jax', 'torch', 'tensorflow', 'tree', 'openpi', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


class Seconds:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def rates(*periods_s: float, **options) -> list[float]:
    clock = Seconds()
    watch = RateWatch(50.0, clock_s=clock, **options)
    found = [watch.tick()]
    for period_s in periods_s:
        clock.now += period_s
        found.append(watch.tick())
    return [rate for rate in found if rate is not None]


def test_a_rate_that_is_not_held_is_told_once_with_its_number():
    assert rates(*[1 / 37] * 300) == [pytest.approx(37, rel=0.02)]
    assert rates(*[1 / 50] * 300) == [] and rates(*[1 / 100] * 300) == [pytest.approx(100, rel=0.02)]


def test_a_pause_of_somebody_else_is_no_slow_rate():
    assert rates(*[1 / 50] * 90, 30.0, *[1 / 50] * 90, pause_s=1.0) == []
    assert rates(*[1 / 50] * 90, 30.0, *[1 / 50] * 90) != []


def test_the_runtime_says_that_it_is_slower_than_it_was_told_to_be(monkeypatch, caplog):
    clock = Seconds()
    monkeypatch.setattr("openpi_client.runtime.runtime.RateWatch", lambda hz: RateWatch(hz, clock_s=clock))

    class Slow(Log):
        def apply_action(self, action: dict) -> None:
            clock.now += 1 / 37
            super().apply_action(action)

    Runtime(Slow(num_steps=200), PolicyAgent(CountingPolicy()), [], max_hz=1e6).run()
    assert [r.message for r in caplog.records if "37.0 Hz instead of 1e+06" in r.message]


def test_the_broker_says_that_actions_are_played_at_another_rate_than_the_contract_s(monkeypatch, caplog):
    clock = Seconds()
    policy = CountingPolicy()
    policy.get_server_metadata = lambda: {"contract": {"control_hz": 50}}
    monkeypatch.setattr(
        "openpi_client.action_chunk_broker.RateWatch", lambda hz, pause_s: RateWatch(hz, pause_s=pause_s, clock_s=clock)
    )
    broker = ActionChunkBroker(policy, action_horizon=4)
    for _ in range(200):
        broker.infer({})
        clock.now += 1 / 30
    assert [r.message for r in caplog.records] == [
        "Actions are played at 30.0 Hz; the policy was trained at 50 Hz (control_hz of its contract), so the robot "
        "moves at another speed. openpi_client.realtime keeps the rate"
    ]
