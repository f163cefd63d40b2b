"""Who says when an episode begins and ends: a clock, or somebody at the keyboard or at a window."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from openpi_positronic.franka import stacking
from openpi_positronic.simulation.eval_panel import OUTCOME_OF_BUTTON, QUIT, RESET, START, SUBMIT, EvalPanel
from openpi_positronic.simulation.station import Station
from openpi_positronic.simulation.window import open_window

logger = logging.getLogger(__name__)

_PAUSE_S = 0.5
_LISTEN_EVERY_S = 0.02
_TELL_EVERY_S = 5.0


class Driver(Protocol):
    """
    Attributes:
        show_gui: whether the cameras are to be shown in a window.
        is_real_time: whether somebody watches, so that the world must not run ahead of the clock.
    """

    show_gui: bool

    @property
    def is_real_time(self) -> bool: ...

    def check(self) -> None:
        """ValueError if it cannot drive; before anything is loaded."""
        ...

    def run(self, station: Station) -> None:
        """All episodes."""
        ...


@dataclass(frozen=True)
class Timed:
    """Episodes of a fixed length, one after the other; one ends early when its policy says that it is done.

    Attributes:
        simulation_time: of an episode, seconds.
        num_iterations: episodes.
        task: what the policy is told.
    """

    simulation_time: float = 15.0
    num_iterations: int = 1
    show_gui: bool = False
    task: str = stacking.TASK

    @property
    def is_real_time(self) -> bool:
        return self.show_gui

    def check(self) -> None:
        if self.simulation_time <= 0:
            raise ValueError(f"driver.simulation_time is {self.simulation_time}; expected seconds above 0")
        if self.num_iterations < 1:
            raise ValueError(f"driver.num_iterations is {self.num_iterations}; expected at least 1")

    def run(self, station: Station) -> None:
        solved = 0
        for iteration in range(self.num_iterations):
            if iteration:
                station.reset()
                station.run_for(_PAUSE_S)
            with _saved(station, {"task": self.task}, iteration, self.num_iterations):
                self._run_for(station, self.simulation_time, f"episode {iteration + 1} of {self.num_iterations}")
            solved += stacking.is_stacked(station.world)
            logger.info("episode %d of %d: %d stacked so far", iteration + 1, self.num_iterations, solved)

    def _run_for(self, station: Station, seconds: float, name: str) -> None:
        """Lets the episode run, and says now and then how far it is."""
        end_ns, told_at = station.world.time_ns + round(seconds * 1e9), time.monotonic()
        while (left_s := (end_ns - station.world.time_ns) / 1e9) > 0 and station.is_active:
            if time.monotonic() - told_at > _TELL_EVERY_S:
                told_at = time.monotonic()
                logger.info("%s: %.0f of %g simulated seconds", name, seconds - left_s, seconds)
            station.run_for(min(_PAUSE_S, left_s))


@dataclass(frozen=True)
class Keyboard:
    """Somebody at the terminal: `s` starts an episode, `p` stops and saves it, `r` resets without saving, `q` quits."""

    show_gui: bool = False
    task: str = stacking.TASK

    is_real_time = True

    def check(self) -> None:
        if not sys.stdin.isatty():
            raise ValueError("driver .keyboard reads keys from a terminal, and standard input is none; use .timed")

    def run(self, station: Station) -> None:
        iteration = 0
        print("s start   p stop and save   r reset without saving   q quit", flush=True)
        with _keys() as next_key, _discarded_at_end(station):
            while (key := next_key()) != "q":
                if key == "s" and not station.is_running:
                    station.start({"task": self.task}, {"simulation.iteration": str(iteration)})
                elif key == "p" and station.is_running:
                    station.save()
                    iteration += 1
                    station.reset()
                elif key == "r":
                    station.discard()
                    station.reset()
                station.run_for(_LISTEN_EVERY_S)


@dataclass(frozen=True)
class EvalUi:
    """Somebody at a window, who begins and ends episodes and judges each; what is judged is recorded with it."""

    show_gui: bool = False
    task: str = stacking.TASK
    make_panel: Callable[[], EvalPanel] = EvalPanel

    is_real_time = True

    def check(self) -> None:
        open_window("", "--driver=.eval_ui").destroy()

    def run(self, station: Station) -> None:
        with contextlib.closing(self.make_panel()) as panel, _discarded_at_end(station):
            iteration = began_ns = 0
            while (event := panel.next_event()) != QUIT:
                if event == START:
                    began_ns = station.world.time_ns
                    station.start({"task": self.task}, {"simulation.iteration": str(iteration)})
                    panel.await_end()
                elif event == RESET:
                    station.discard()
                    station.reset()
                    panel.await_start()
                elif event in OUTCOME_OF_BUTTON:
                    duration_s = (station.world.time_ns - began_ns) / 1e9
                    if not self._judged(panel, station, OUTCOME_OF_BUTTON[event], duration_s):
                        return
                    iteration += 1
                    panel.await_start()
                station.run_for(_LISTEN_EVERY_S)

    def _judged(self, panel: EvalPanel, station: Station, outcome: str, duration_s: float) -> bool:
        """Whether the episode was judged, or dropped by `reset`; the world stands still meanwhile. False at the end."""
        panel.ask(outcome)
        while (event := panel.next_event()) != QUIT:
            if event == RESET:
                station.discard()
            elif event == SUBMIT and (verdict := panel.verdict()) is not None:
                station.save(verdict.static(duration_s))
            else:
                time.sleep(_LISTEN_EVERY_S)
                continue
            station.reset()
            return True
        return False


@contextlib.contextmanager
def _saved(station: Station, context: dict[str, str], iteration: int, total: int) -> Iterator[None]:
    """An episode that is saved at its end, and also when its policy fails: what was recorded up to then is true."""
    station.start(context, {"simulation.iteration": str(iteration), "simulation.total_iterations": str(total)})
    try:
        yield
    except Exception as error:
        station.save({"inference.error": str(error) or type(error).__name__})
        raise
    except BaseException:
        station.discard()
        raise
    station.save()


@contextlib.contextmanager
def _discarded_at_end(station: Station) -> Iterator[None]:
    try:
        yield
    finally:
        station.discard()


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[], str]]:
    """Single keys of the terminal, without waiting for one: "" if there is none."""
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal, termios.TCSANOW)

    def next_key() -> str:
        # Not sys.stdin.read: what that has buffered, select does not know of.
        is_there = select.select([terminal], [], [], 0)[0]
        return os.read(terminal, 1).decode(errors="ignore") if is_there else ""

    try:
        yield next_key
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
