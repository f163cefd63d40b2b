"""The control loop of a robot program."""

import logging
import threading
import time
from typing import List

from openpi_client.rate_watch import RateWatch
from openpi_client.runtime import agent as _agent
from openpi_client.runtime import environment as _environment
from openpi_client.runtime import subscriber as _subscriber

logger = logging.getLogger(__name__)


class Runtime:
    """Runs episodes: observe, act, apply, tell the subscribers, at a steady rate.

    A step waits for all of these, so it is late whenever the policy is asked. A rate that is not held is logged, once
    per episode; `openpi_client.realtime` holds it.
    """

    def __init__(
        self,
        environment: _environment.Environment,
        agent: _agent.Agent,
        subscribers: List[_subscriber.Subscriber],
        max_hz: float = 0,
        num_episodes: int = 1,
        max_episode_steps: int = 0,
    ) -> None:
        """
        Args:
            max_hz: control rate; 0 means as fast as possible.
            num_episodes: episodes that `run` runs.
            max_episode_steps: 0 means no limit. A limit of N lets N + 1 steps happen: published
                robot programs, and the episode lengths they report, rely on that count.
        """
        self._environment = environment
        self._agent = agent
        self._subscribers = subscribers
        self._max_hz = max_hz
        self._period_s = 1 / max_hz if max_hz > 0 else 0.0
        self._num_episodes = num_episodes
        self._max_episode_steps = max_episode_steps
        self._in_episode = False

    def run(self) -> None:
        """Runs all episodes, then resets the environment once more: the robot ends in its start pose."""
        for _ in range(self._num_episodes):
            self._run_episode()
        self._environment.reset()

    def run_in_new_thread(self) -> threading.Thread:
        """Like `run`, in a thread of its own, which is returned started."""
        thread = threading.Thread(target=self.run, name="openpi-runtime")
        thread.start()
        return thread

    def mark_episode_complete(self) -> None:
        """Ends the current episode after the running step; may be called from any thread or subscriber."""
        self._in_episode = False

    def _run_episode(self) -> None:
        logger.info("Episode starts")
        self._environment.reset()
        self._agent.reset()
        for subscriber in self._subscribers:
            subscriber.on_episode_start()

        self._in_episode = True
        num_steps = 0
        clock, rate = _Pacer(self._period_s), RateWatch(self._max_hz)
        while self._in_episode:
            self._step()
            if self._environment.is_episode_complete() or 0 < self._max_episode_steps <= num_steps:
                self.mark_episode_complete()
            num_steps += 1
            clock.wait()
            self._check_rate(rate)

        logger.info("Episode ends after %d steps", num_steps)
        for subscriber in self._subscribers:
            subscriber.on_episode_end()

    def _check_rate(self, rate: RateWatch) -> None:
        held_hz = rate.tick() if self._max_hz > 0 else None
        if held_hz is not None:
            logger.warning(
                "The episode runs at %.1f Hz instead of %g: its steps (observation, policy, action, subscribers) take "
                "longer than %.0f ms. openpi_client.realtime asks the policy while it plays",
                held_hz,
                self._max_hz,
                1e3 * self._period_s,
            )

    def _step(self) -> None:
        observation = self._environment.get_observation()
        action = self._agent.get_action(observation)
        self._environment.apply_action(action)
        for subscriber in self._subscribers:
            subscriber.on_step(observation, action)


class _Pacer:
    """Waits for the ticks of a fixed rate, on a grid: an overshooting wait does not shift later ticks.

    A step that ends late by more than `_SLACK` of a period (a slow inference) starts the grid anew, so a
    robot is never sent its actions faster than its rate to make up for lost time.
    """

    _SLACK = 0.1

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._next_tick_s = time.monotonic() + period_s

    def wait(self) -> None:
        now_s = time.monotonic()
        late_s = now_s - self._next_tick_s
        if late_s < 0:
            time.sleep(-late_s)
        elif late_s > self._SLACK * self._period_s:
            self._next_tick_s = now_s
        self._next_tick_s += self._period_s
