"""Who says when an episode begins and ends: a clock, or somebody at the keyboard."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from openpi.envs.franka import stacking
from openpi.evaluation.franka.station import Station

logger = logging.getLogger("openpi")

_PAUSE_S = 0.5
_LISTEN_EVERY_S = 0.02


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
                station.run_for(self.simulation_time)
            solved += stacking.is_stacked(station.world)
            logger.info("episode %d of %d: %d stacked so far", iteration + 1, self.num_iterations, solved)


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
    tty.setcbreak(terminal)

    def next_key() -> str:
        # Not sys.stdin.read: what that has buffered, select does not know of.
        is_there = select.select([terminal], [], [], 0)[0]
        return os.read(terminal, 1).decode(errors="ignore") if is_there else ""

    try:
        yield next_key
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
