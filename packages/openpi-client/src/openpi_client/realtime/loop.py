"""The control loop: each tick plays a row or holds, and never waits for the policy.

tick k: wait for its deadline -> look for an answer -> command -> apply -> (observe, hand to the worker)
"""

import contextlib
import dataclasses
import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, FrozenSet, Iterator, Optional, Tuple

import numpy as np

from openpi_client.base_policy import Metadata
from openpi_client.deadline import check_seconds
from openpi_client.realtime import hanging, strategies
from openpi_client.realtime.actions import ActionSpec, Hold, contract_of
from openpi_client.realtime.clock import Clock, MonotonicClock, Pacer, Tick, TickBudget
from openpi_client.realtime.controller import Controller, EpisodeEnded
from openpi_client.realtime.limits import Limits
from openpi_client.realtime.log import EpisodeLog
from openpi_client.realtime.requests import Requester
from openpi_client.realtime.robot import Robot, check_names, checked_place, measured_pose
from openpi_client.realtime.safety import Safety
from openpi_client.realtime.watch import ObservationWatch

logger = logging.getLogger(__name__)

# How long a thread that computes in Python may keep the loop from running; Python's own 5 ms are a quarter of a tick.
_SWITCH_INTERVAL_S = 2e-4
# Some send a signal twice; from then on a second one is meant, and does not wait for the end of the tick.
_IMPATIENCE_S = 0.5
# Of SCHED_FIFO, 1 to 99; drivers' interrupts have 50.
_PRIORITY = 10


class ControlLoop:
    """Runs episodes of a robot with a policy.

    Attributes:
        last_log: of the last episode; None = there was none.
    """

    def __init__(
        self,
        robot: Robot,
        policy: Requester,
        *,
        strategy: Optional[strategies.Strategy] = None,
        safety: Optional[Safety] = None,
        rate_hz: Optional[float] = None,
        action_width: Optional[int] = None,
        hold: Optional[Hold] = None,
        log_folder: Optional[Path] = None,
        on_warning: Optional[Callable[[str], None]] = None,
        on_stop: Optional[Callable[[str], None]] = None,
        priority: bool = False,
        clock: Optional[Clock] = None,
    ) -> None:
        """
        Args:
            policy: a `ProcessRequester` for a policy server; it stays open.
            strategy: falls back to another one when the server cannot; None = `TrainedRTC()` if the server offers it,
                else `GuidedRTC()`.
            safety: None = `Safety()`.
            rate_hz: of the ticks; None = the robot's, or else that of the server's contract. At another rate than the
                contract's rows are interpolated.
            action_width: for servers without a contract; None = as many as the robot has names.
            hold: how the robot stands still: "stay" (positions), "zero" (velocities, steps), or one of them per
                dimension; None = as the contract says, or else the robot.
            log_folder: gets a folder per episode; None = no files.
            on_warning: called once for each warning of an episode, the server's included; they are logged anyway.
            on_stop: called with the reason when the robot has held for `stop_after_s`: a way to a safe pose, or brakes.
            priority: run the ticks before everything else on this machine (SCHED_FIFO: Linux, needs CAP_SYS_NICE).
            clock: `VirtualClock` for simulators.
        Raises:
            ValueError: the robot and the policy do not fit, or something that matters is not known.
        """
        self._priority = priority
        metadata = policy.metadata
        self._doubts = check_names(robot, metadata)
        self.spec = ActionSpec.from_metadata(
            metadata, width=action_width or len(robot.action_names) or None, hold=_hold_of(robot, metadata, hold)
        )
        rate_hz = next((rate for rate in (rate_hz, robot.rate_hz, self.spec.rate_hz) if rate is not None), None)
        if rate_hz is None:
            raise ValueError("the server does not tell its rate (no control_hz in a contract); give rate_hz=...")
        self.rate_hz = float(rate_hz)
        if not 0 < self.rate_hz < 1e4:
            raise ValueError(f"rate_hz is {rate_hz}; expected more than 0")
        self.strategy, self._why_other = strategies.usable(strategy or strategies.best(metadata), metadata)
        self._robot, self._policy, self._safety = robot, policy, safety or Safety()
        self._limits = (self._safety.limits or Limits.from_metadata(metadata)).narrowed(robot.limits)
        self._clock: Clock = MonotonicClock() if clock is None else clock
        self._log_folder, self._num_episodes = log_folder, 0
        self._on_warning, self._on_stop = on_warning, on_stop
        self.last_log: Optional[EpisodeLog] = None
        self._recent_delays: Tuple[int, ...] = ()
        self._budget = TickBudget(self.rate_hz)
        self._num_unseen = 0  # observations in a row that failed
        self._check_rate()

    def _check_rate(self) -> None:
        """Raises ValueError at a rate at which steps would become others."""
        recorded_hz = self.spec.rate_hz
        if recorded_hz is not None and recorded_hz != self.rate_hz and not self.spec.stays.all():
            moving = [name for name, stays in zip(self.spec.names, self.spec.stays) if not stays]
            raise ValueError(
                f"rate_hz is {self.rate_hz:g}, but the policy was trained at {recorded_hz:g} Hz, and "
                f"{', '.join(moving)} are velocities or steps, which cannot be interpolated; run at {recorded_hz:g} Hz"
            )

    def run(
        self,
        *,
        max_s: Optional[float] = None,
        until: Callable[[], bool] = lambda: False,
        home: Optional[np.ndarray] = None,
    ) -> Dict[str, Any]:
        """Runs one episode; the robot holds at its end, however it ends.

        Args:
            max_s: how long at most.
            until: asked after each tick; True ends the episode.
            home: float[width]; the robot goes there first, slowly.
        Returns:
            the summary of the episode (`log.summarize`), with `end`: why it ended.
        Raises:
            KeyboardInterrupt: Ctrl-C, after the robot holds and the log is written.
            SystemExit: SIGTERM or SIGHUP (a service or container that is stopped, a terminal that is closed), likewise.
            ValueError: the robot's pose is needed, and not known; it, or `home`, is no place to be; or `max_s` is no
                time.
        """
        check_seconds("max_s", max_s)
        log = self.last_log = EpisodeLog(self._next_folder(), self._clock, self.spec.width)
        controller = self._controller(log)
        end = "error"
        with _undisturbed(self._priority) as interrupted:
            try:
                self._begin(controller, home)
                end = self._ticks(controller, log, max_s, until, interrupted)
            except EpisodeEnded as error:
                end = str(error)
                logger.error("The episode ends, and the robot holds: %s", end)
            except BaseException as error:
                end = f"{type(error).__name__}: {error}"
                raise
            finally:
                try:
                    with hanging.told("the robot's hold()"):
                        self._hold(controller)
                except BaseException as error:
                    end = f"{end}; and it did not take its hold: {type(error).__name__}: {error}"
                    raise
                finally:
                    # The next episode need not learn them again; until it had, it would freeze more rows than it must.
                    self._recent_delays = controller.recent_delays
                    summary = log.close(end, **self._facts(controller))
        interrupted.end_program()
        return summary

    def _facts(self, controller: Controller) -> Dict[str, object]:
        """What whoever reads the summary was not told otherwise."""
        safety = {
            **dataclasses.asdict(self._safety),
            "max_age_s": controller.max_age_s,
            "limits": self._limits.listed(),
        }
        return {
            "robot": type(self._robot).__name__,
            "checkpoint": self._policy.metadata.get("checkpoint"),
            "strategy": self.strategy.name,
            "rate_hz": self.rate_hz,
            "horizon": controller.horizon,
            "names": self.spec.names,
            "units": self.spec.units,
            "safety": safety,
        }

    def _begin(self, controller: Controller, home: Optional[np.ndarray]) -> None:
        for doubt in (*self._doubts, *filter(None, [self._why_other])):
            controller.warn(doubt)
        if self.spec.rate_hz is not None and self.spec.rate_hz != self.rate_hz:
            controller.warn(
                f"the loop runs at {self.rate_hz:g} Hz, the policy was trained at {self.spec.rate_hz:g} Hz: "
                f"{controller.rows_per_tick:g} rows are played per tick"
            )
        if self._limits.is_empty:
            controller.warn(
                "no limits of commands are known: the server's contract has none; give Safety(limits=Limits(...))"
            )
        home = None if home is None else checked_place("home", home, self.spec.width)
        pose = self._pose()
        needs_pose = self.spec.stays.any() and (self._safety.blend_s > 0 or home is not None)
        if pose is None and needs_pose:
            raise ValueError(
                "a blended start needs to know where the robot is, and the contract names no state that is measured in "
                "the names and units of its actions: give the robot a method pose(), or Safety(blend_s=0) to start "
                "with a jump"
            )
        controller.begin(pose, home)

    def _pose(self) -> Optional[np.ndarray]:
        return measured_pose(self._robot, self._policy.metadata, self.spec.width)

    def _controller(self, log: EpisodeLog) -> Controller:
        return Controller(
            self.spec,
            self.strategy,
            self._safety,
            rate_hz=self.rate_hz,
            limits=self._limits,
            max_delay=strategies.max_delay(self._policy.metadata) if self.strategy.rtc_mode == "trained" else None,
            recent_delays=self._recent_delays,
            record=log.event,
            on_warning=self._warned,
            on_stop=self._on_stop,
        )

    def _warned(self, text: str) -> None:
        logger.warning("%s", text)
        if self._on_warning is not None:
            self._on_warning(text)

    def _ticks(
        self,
        controller: Controller,
        log: EpisodeLog,
        max_s: Optional[float],
        until: Callable[[], bool],
        interrupted: "_Interrupted",
    ) -> str:
        """Runs ticks until the episode is over; returns why."""
        pacer, self._budget = Pacer(self._clock, self.rate_hz), TickBudget(self.rate_hz)
        self._num_unseen = 0
        watch = ObservationWatch(self._safety.frozen_after_s, _state_keys(self._policy.metadata))
        while True:
            tick = pacer.wait()
            if interrupted.by is not None:
                return "interrupted" + ("" if interrupted.by == signal.SIGINT else f" by {interrupted.by.name}")
            if max_s is not None and tick.number >= max_s * self.rate_hz:
                return "time is over"
            self._tick(controller, log, watch, tick)
            if until():
                return "complete"

    def _tick(self, controller: Controller, log: EpisodeLog, watch: ObservationWatch, tick: Tick) -> None:
        log.begin_tick(tick)
        slow = self._budget.problem(tick)
        if slow:
            controller.warn(slow, subject="skipped")
        self._take_answer(controller, tick)
        # While the robot holds, its observation goes first; in a simulator, the answer may then be there at once.
        if controller.will_hold(self._clock.now_s()) and self._is_due(controller, tick):
            self._ask(controller, watch, tick)
            self._take_answer(controller, tick)
        now_s = self._clock.now_s()
        command = controller.command(tick.number, now_s, self._pose)
        if command.values is not None:
            with self._timed("apply"):
                self._robot.apply(command.values.copy())  # it may convert units in place
        log.end_tick(tick, command, now_s)
        if not controller.will_hold(now_s) and self._is_due(controller, tick):
            self._ask(controller, watch, tick)

    def _is_due(self, controller: Controller, tick: Tick) -> bool:
        # The answer to a question of an episode that is over may still be awaited.
        return not self._policy.is_busy and controller.is_due(tick.number, self._clock.now_s())

    def _take_answer(self, controller: Controller, tick: Tick) -> None:
        answer = self._policy.poll()
        if answer is not None and answer.number == controller.number:  # else of an episode that is over
            controller.take(answer, tick.number, self._clock.now_s(), self._pose)

    def _ask(self, controller: Controller, watch: ObservationWatch, tick: Tick) -> None:
        now_s = self._clock.now_s()
        try:
            with self._timed("observe"):
                observation = self._robot.observe()
        except (ConnectionError, TimeoutError) as error:  # motors of LeRobot lose one of some hundred answers
            self._num_unseen += 1
            if self._num_unseen >= self._safety.max_failures:
                raise
            text = f"the robot could not be observed: {type(error).__name__}: {error}"
            controller.warn(text, subject="unseen")
            return controller.ask_later(tick.number, text)
        self._num_unseen = 0
        problems = watch.problems(observation, now_s)
        for problem in problems:
            controller.warn(problem, subject=problem.partition("'")[2].partition("'")[0])
        if problems:  # What is left of the plan is played; then the robot holds.
            return controller.ask_later(tick.number, "; ".join(problems))
        question = controller.question(observation, tick.number, now_s)
        self._policy.submit(controller.number, question)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start_s = self._clock.now_s()
        yield
        self._budget.took(what, self._clock.now_s() - start_s)

    def _hold(self, controller: Controller) -> None:
        command = controller.stop_command()
        try:
            if command is not None:
                self._robot.apply(command)
        finally:
            self._robot.hold()

    def _next_folder(self) -> Optional[Path]:
        """A new folder for the log of an episode."""
        if self._log_folder is None:
            return None
        while (self._log_folder / f"episode_{self._num_episodes:04d}").exists():
            self._num_episodes += 1
        return self._log_folder / f"episode_{self._num_episodes:04d}"


def _state_keys(metadata: Metadata) -> Optional[FrozenSet[str]]:
    """Of the contract; None = there is none."""
    keys = frozenset(vector["key"] for vector in contract_of(metadata).get("state", ()))
    return keys or None


def _hold_of(robot: Robot, metadata: Metadata, hold: Optional[Hold]) -> Optional[Hold]:
    """How to stand still, where the contract does not say it; None = it does."""
    if hold is None and "hold" not in contract_of(metadata).get("actions", {}):
        return robot.holds
    return hold


class _Interrupted:
    """Signals that end the program, taken between ticks, so that none cuts a command in two."""

    def __init__(self) -> None:
        self.by: Optional[signal.Signals] = None
        self._taken_s = 0.0
        self._before: Dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Interrupted":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)
                # What a program handles, or ignores as `nohup` does, stays so; Ctrl-C is the loop's.
                ends = (signal.SIG_DFL, _end_program)
                if number is not None and (number == signal.SIGINT or signal.getsignal(number) in ends):
                    self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def _take(self, number: int, frame: object) -> None:
        if self.by is None:
            self.by, self._taken_s = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._taken_s > _IMPATIENCE_S:  # something hangs
            self.end_program()

    def end_program(self) -> None:
        """As the signal would have, but by an exception, so that the program can let go of its robot."""
        if self.by == signal.SIGINT:
            raise KeyboardInterrupt
        if self.by is not None:
            _end_program(self.by)


def end_by_exception() -> None:
    """From now on SIGTERM and SIGHUP end this program as Ctrl-C does, so that it lets go of its robot between episodes,
    too. What the program handles, or ignores, stays so; threads but the main one cannot ask for it."""
    for name in ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end_program)


def _end_program(number: int, frame: object = None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _undisturbed(priority: bool) -> Iterator[_Interrupted]:
    """Other threads give way sooner; signals wait for the end of the tick."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(min(interval_s, _SWITCH_INTERVAL_S))
    gc.collect()
    gc.freeze()  # What is there need not be looked through again in the middle of a tick.
    try:
        with _Interrupted() as interrupted, _first() if priority else contextlib.nullcontext():
            yield interrupted
    finally:
        gc.unfreeze()
        sys.setswitchinterval(interval_s)


@contextlib.contextmanager
def _first() -> Iterator[None]:
    """This thread runs before all ordinary ones; what it starts does not.

    Raises:
        OSError: this system does not allow it.
    """
    if not hasattr(os, "sched_setscheduler"):
        raise OSError("priority=True needs Linux")
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))
    except PermissionError as error:
        raise PermissionError(
            error.errno, "priority=True needs the right to it: CAP_SYS_NICE, or 'rtprio' in /etc/security/limits.conf"
        ) from error
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)
