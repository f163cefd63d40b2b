"""Commands of `openpi` as child processes: output to log files, progress line by line, peak memory, and nothing left
behind.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_S = 0.05
_GRACE_S = 10.0  # for a child that is asked to stop; a trainer saves first
_LAST_LINES = 12
_KILL_S = 3.0  # for the kernel; zombies whose parent never looks stay longer, and harm nobody
_BYTES_PER_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in


class CommandFailedError(RuntimeError):
    """A command ended badly; the message says which one, why, and where its log is."""


@dataclass(frozen=True)
class Command:
    """One call of `openpi`; `str(command)` is what a user would type."""

    args: tuple[str, ...]
    in_background: bool = False

    @property
    def argv(self) -> list[str]:
        """The same call with this Python, whether or not `openpi` is on the PATH."""
        return [sys.executable, "-m", "openpi.cli.main", *self.args]

    def __str__(self) -> str:
        return f"openpi {shlex.join(self.args)}{' &' if self.in_background else ''}"


class Child:
    """A running command.

    Attributes:
        command: what runs.
        log: file with everything it printed.
        pid: of the process, and of the group that it and its own children form.
        peak_memory_bytes: once it has ended, the most memory it, or its largest child, ever held; else 0.
    """

    def __init__(self, command: Command, log: Path, on_line: Callable[[str], None] | None = None):
        log.parent.mkdir(parents=True, exist_ok=True)
        self.command = command
        self.log = log
        self.peak_memory_bytes = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "openpi.shared.lifeline", *command.args],
            stdin=subprocess.PIPE,  # the lifeline: never written to, and closed by the kernel when we are killed
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches us only, and the child's own workers can be ended with it
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        """The exit code, or None while it runs. Reaps by hand: only `wait4` tells the memory of one child."""
        if self._process.returncode is None:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
                self.peak_memory_bytes = usage.ru_maxrss * _BYTES_PER_RSS_UNIT
                self._reader.join(timeout=5)
                assert self._process.stdin is not None
                self._process.stdin.close()
        return self._process.returncode

    def stop(self) -> None:
        """Asks the child to end, and ends it and everything it started if it does not."""
        if self.poll() is None:
            self._signal(signal.SIGTERM)
            deadline_s = time.monotonic() + _GRACE_S
            while self.poll() is None and time.monotonic() < deadline_s:
                time.sleep(_POLL_S)
        deadline_s = time.monotonic() + _KILL_S
        while self._signal(signal.SIGKILL) or self.poll() is None:  # also whatever of its group is left
            if time.monotonic() > deadline_s:
                break
            time.sleep(_POLL_S)

    def last_lines(self) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LAST_LINES:])

    def _signal(self, signum: int) -> bool:
        """False when nothing of the group is left."""
        try:
            os.killpg(self.pid, signum)
        except (ProcessLookupError, PermissionError):  # the latter on macOS, when only zombies are left
            return False
        return True

    def _read(self, on_line: Callable[[str], None] | None) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines, self.log.open("w") as log:
            log.write(f"$ {self.command}\n")
            for line in lines:
                log.write(line)
                log.flush()
                if on_line is not None:
                    on_line(line.rstrip())


class Children:
    """Starts commands; leaving the context stops those that still run, whatever the reason for leaving.

    Attributes:
        all: started so far, running or not.
    """

    def __init__(self) -> None:
        self.all: list[Child] = []

    def start(self, command: Command, log: Path, on_line: Callable[[str], None] | None = None) -> Child:
        with _signals_held_back():
            child = Child(command, log, on_line)
            self.all.append(child)
        return child

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: object) -> None:
        for child in reversed(self.all):
            child.stop()


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """What arrives inside takes effect at the end: a process must not be started and then forgotten."""
    if threading.current_thread() is not threading.main_thread():  # only there Python handles signals
        yield
        return
    arrived: list[int] = []
    previous = {number: signal.signal(number, lambda signum, _: arrived.append(signum)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for signum in arrived:
        signal.raise_signal(signum)


def wait(child: Child, *, needs: Sequence[Child] = ()) -> None:
    """Waits for a command to succeed.

    Args:
        needs: servers that have to stay alive meanwhile.
    Raises:
        CommandFailedError: it failed, or one that it needs ended.
    """
    while (code := child.poll()) is None:
        for server in needs:
            require_alive(server)
        time.sleep(_POLL_S)
    if code != 0:
        raise CommandFailedError(_failure(child, code))


def wait_for_file(path: Path, *, written_by: Child) -> None:
    """Waits until a server has written a file.

    Raises:
        CommandFailedError: the server ended instead.
    """
    while not path.is_file():
        require_alive(written_by)
        time.sleep(_POLL_S)


def require_alive(server: Child) -> None:
    """Raises CommandFailedError when it has ended."""
    if (code := server.poll()) is not None:
        raise CommandFailedError(_failure(server, code))


def _failure(child: Child, code: int) -> str:
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    return f"{child.command}\nended with {how}; its last lines:\n{child.last_lines()}\nThe whole log: {child.log}"
