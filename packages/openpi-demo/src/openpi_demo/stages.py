"""Runs the commands of a stage, with its time, its memory and its progress on the terminal."""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from openpi.shared.children import Child, Children, Command, wait, wait_for_file
from openpi_demo.plan import Plan
from openpi_demo.terminal import Terminal, Update

# What the commands print: `[12/50] note` from our own, `... Step 120: note` from the trainer (counted from 0).
_COUNTED = re.compile(r"^\[(\d+)/\d+\] (.*)$")
_TRAIN_STEP = re.compile(r"\bStep (\d+): (.*)$")


@dataclass
class Stage:
    """One stage and the processes it used; a server may belong to several."""

    name: str
    title: str
    seconds: float = 0.0
    children: list[Child] = field(default_factory=list)

    @property
    def peak_memory_bytes(self) -> int:
        """Upper bound, once its processes have ended: their peaks, and ours, added up."""
        return _own_peak_bytes() + sum(child.peak_memory_bytes for child in self.children)


class StageRunner:
    """Runs stages one after the other.

    Attributes:
        stages: so far.
        commands: so far, in order.
    """

    def __init__(self, plan: Plan, children: Children, terminal: Terminal):
        self.stages: list[Stage] = []
        self.commands: list[Command] = []
        self._plan = plan
        self._children = children
        self._terminal = terminal

    @contextlib.contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """What runs inside belongs to the new stage."""
        stage = Stage(name, title)
        self.stages.append(stage)
        self._terminal.stage(title)
        started = time.perf_counter()
        yield
        stage.seconds = time.perf_counter() - started
        self._terminal.say(f"{stage.seconds:.1f} s", "dim")

    def run(self, command: Command, *, log: str, total: int | None = None, server: Child | None = None) -> None:
        """Runs a command to its end.

        Args:
            log: name of its log.
            total: how far its progress counts; None shows no bar.
            server: has to stay alive meanwhile, and counts to this stage.
        Raises:
            CommandFailedError: it failed, or the server ended.
        """
        needs = [] if server is None else [server]
        self.stages[-1].children += [child for child in needs if child not in self.stages[-1].children]
        self._announce(command)
        if total is None:
            wait(self._start(command, log), needs=needs)
            return
        with self._terminal.bar(total) as update:
            wait(self._start(command, log, update), needs=needs)

    def serve(self, command: Command, *, name: str) -> Child:
        """Starts a server and waits until its port is known; `Child.stop` ends it.

        Raises:
            CommandFailedError: it ended instead.
        """
        self._announce(command)
        self._plan.port_file(name).parent.mkdir(parents=True, exist_ok=True)
        server = self._start(command, f"serve_{name}")
        wait_for_file(self._plan.port_file(name), written_by=server)
        return server

    def _announce(self, command: Command) -> None:
        self._terminal.command(command)
        self.commands.append(command)

    def _start(self, command: Command, log: str, update: Update | None = None) -> Child:
        child = self._children.start(command, self._plan.log(log), update and progress_parser(update))
        self.stages[-1].children.append(child)
        return child


def progress_parser(update: Update) -> Callable[[str], None]:
    """A function of a printed line that passes on what it says about progress."""

    def parse(line: str) -> None:
        if counted := _COUNTED.search(line):
            update(int(counted[1]), counted[2])
        elif step := _TRAIN_STEP.search(line):
            update(int(step[1]) + 1, step[2])

    return parse


def _own_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
