"""Real processes for tests without the seconds of importing: forked off a server that has imported JAX and openpi once.

`Popen` and `run` are those of `subprocess`, for `python -m MODULE ...`, `python -c PROGRAM ...` and `python FILE ...`:
processes, signals, sockets, exit codes and standard streams are the kernel's own. What the server cannot give (another
program, variables that libraries read while they are imported, systems other than Linux) is started the usual way.

    test --- control socket: argv, environment, folder, three streams --> server (no threads, no JAX backend)
         <-- status socket of each command: its pid, its exit code ------   '- fork -> child
"""

import contextlib
import gc
import importlib
import importlib.util
import io
import json
import logging
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

JAX = (
    "openpi.training.loop",
    "openpi.training.backends.jax.backend",
    "openpi.policies.sampler_jax",
    "openpi.models.pi0",
)
PYTORCH = (
    "openpi.training.loop",
    "openpi.training.backends.pytorch.backend",
    "openpi.policies.sampler_pytorch",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch.distributed.fsdp",
    "tyro",
)
SERVING = ("openpi.cli.serving.serve", "openpi.serving.server", "openpi.serving.recording", "openpi.policies.guards")
_CAN_FORK = sys.platform == "linux" and hasattr(os, "pidfd_open")
# Variables that Python, the linker, or libraries read once: another value of one of them is no matter for a fork.
_READ_EARLY = ("PYTHON", "LD_", "MALLOC_", "JAX_", "OMP_", "OPENBLAS_", "MKL_", "TF_", "TORCH", "CUDA_", "MUJOCO_")
# Read while it is imported: nothing that is preloaded may do so.
_IMPORTED_LATE = "huggingface_hub"
_ERRORS = ["-W", "error"]
# JAX makes millions of objects while it traces, few of which are garbage.
GC_THRESHOLDS = (100_000, 20, 20)
_MAX_MESSAGE, _NUMBER_BYTES = 1 << 20, 8


class Popen(subprocess.Popen):
    """`subprocess.Popen`; `preloads` are modules that the command is going to import."""

    def __init__(self, command: Sequence[object], *, preloads: Sequence[str] = JAX, **options: Any) -> None:
        self._preloads = preloads
        self._status: socket.socket | None = None
        super().__init__([os.fspath(word) if isinstance(word, Path) else str(word) for word in command], **options)

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        names = ("executable", "preexec_fn", "close_fds", "pass_fds", "cwd", "env", "startupinfo", "creationflags")
        names += ("shell", "p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite", "restore_signals")
        names += ("gid", "gids", "uid", "umask", "start_new_session", "process_group")
        given: dict[str, Any] = dict(zip(names, rest, strict=True))
        environment = dict(os.environ if given["env"] is None else given["env"])
        if given["pass_fds"] or given["shell"] or given["preexec_fn"] or not _can_be_forked(args, environment):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        streams = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        request = {
            "argv": args[1:],
            "environment": environment,
            "folder": str(Path(given["cwd"] or ".").absolute()),
            "new_session": given["start_new_session"],
            "preloads": list(self._preloads),
        }
        self._status, theirs = socket.socketpair()
        with theirs:
            descriptors = [*(own if fd == -1 else fd for own, fd in enumerate(streams)), theirs.fileno()]
            assert _server is not None
            _server.send(request, descriptors)
        self.pid = self._next_number()
        _server.started[self.pid] = f"{shlex.join(args)[:300]} (of {environment.get('PYTEST_CURRENT_TEST', '?')})"
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[end] for end in ends))  # type: ignore[attr-defined]

    def _next_number(self) -> int:
        assert self._status is not None
        data = self._status.recv(_NUMBER_BYTES, socket.MSG_WAITALL)
        assert data, "the server that forks processes has ended; what it said is above"
        return int.from_bytes(data, "little", signed=True)

    def _internal_poll(self, *args: Any, **options: Any) -> int | None:
        if self._status is None:
            return super()._internal_poll(*args, **options)  # type: ignore[misc]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self._status is None:
            return super()._wait(timeout)  # type: ignore[misc]
        if self.returncode is None:
            watch = select.poll()
            watch.register(self._status, select.POLLIN)
            if not watch.poll(None if timeout is None else max(0, timeout) * 1000):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = self._next_number()
            self._status.close()
        return self.returncode


def run(
    command: Sequence[object],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def _can_be_forked(argv: list[str], environment: Mapping[str, str]) -> bool:
    if _server is None:
        return False

    def early(variables: Mapping[str, str]) -> dict[str, str]:
        return {name: value for name, value in variables.items() if name.startswith(_READ_EARLY)}

    first = argv[3] if argv[1:3] == _ERRORS else argv[1]
    is_ours = argv[0] == sys.executable and (first in ("-m", "-c") or first.endswith(".py"))
    return is_ours and early(environment) == early(_server.environment)


class _Server:
    """The process that forks, and our end of its control socket."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.started: dict[int, str] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def send(self, request: dict[str, Any], descriptors: list[int]) -> None:
        if self._process is None:
            self._start()
        socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def end(self) -> None:
        if self._process is not None:
            self._control.close()
            self._process.wait()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_MESSAGE)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            # A session of its own: Ctrl-C is for us, who then end it.
            self._process = subprocess.Popen(
                command, env=self.environment, pass_fds=[theirs.fileno()], start_new_session=True
            )


_server: _Server | None = None  # while tests run


def told(pid: int) -> str | None:
    """Command and test of a process that was forked; empty for the server's own; None for others."""
    if _server is None:
        return None
    return "" if pid == _server.pid else _server.started.get(pid)


@contextlib.contextmanager
def server() -> Iterator[None]:
    """Starts it when the first process is asked for, with the variables of now; ends it, and whatever it has forked."""
    global _server
    _server = _Server() if _CAN_FORK else None
    try:
        yield
    finally:
        if _server is not None:
            _server.end()
        _server = None


# --- in the server --------------------------------------------------------------------------------------------------


class _Running(NamedTuple):
    """A process that was forked, and where to tell its exit code."""

    pid: int
    status: socket.socket


def _serve(control: socket.socket) -> list[str] | None:
    """Forks until the test process is gone. Returns in every child, with the words after `python`; None at the end."""
    running: dict[int, _Running] = {}  # by the descriptor that tells that it has ended
    watch = select.poll()
    watch.register(control, select.POLLIN)
    while True:
        for descriptor, _ in watch.poll():
            if descriptor != control.fileno():
                watch.unregister(descriptor)
                os.close(descriptor)
                _tell_the_end(running.pop(descriptor))
                continue
            data, descriptors, _, _ = socket.recv_fds(control, _MAX_MESSAGE, 4)
            if not data:
                for process in running.values():
                    os.kill(process.pid, signal.SIGKILL)
                return None
            request = json.loads(data)
            pid = _fork(request["preloads"])
            if pid == 0:
                _leave(control, running)
                _become(request, descriptors)
                return request["argv"]
            ended = os.pidfd_open(pid)
            watch.register(ended, select.POLLIN)
            running[ended] = _Running(pid, _told(pid, descriptors))


def _fork(preloads: Sequence[str]) -> int:
    if new := [module for module in preloads if module not in sys.modules]:
        for module in new:
            importlib.import_module(module)
        gc.freeze()  # no child looks through what was imported, nor copies its pages for it
    assert _IMPORTED_LATE not in sys.modules
    with warnings.catch_warnings():  # of threads: an allocator's, which knows how to be forked
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _told(pid: int, descriptors: Sequence[int]) -> socket.socket:
    """Says the number of the process that has the streams now."""
    *streams, status = descriptors
    for stream in streams:
        os.close(stream)
    told = socket.socket(fileno=status)
    _tell(told, pid)
    return told


def _tell_the_end(process: _Running) -> None:
    with process.status:
        _tell(process.status, os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1]))


def _tell(status: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        status.sendall(number.to_bytes(_NUMBER_BYTES, "little", signed=True))


# --- in the child ---------------------------------------------------------------------------------------------------


def _leave(control: socket.socket, running: Mapping[int, _Running]) -> None:
    """What is the server's: who waits for the end of a stream would wait for us."""
    control.close()
    for descriptor, process in running.items():
        os.close(descriptor)
        process.status.close()


def _become(request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    """The process that was asked for, as it is after its start."""
    for number, stream in enumerate(descriptors[:3]):
        os.dup2(stream, number)
    for descriptor in descriptors:
        os.close(descriptor)
    if request["new_session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    # Some library has set it up while it was imported, before the program could.
    logging.root.handlers.clear()
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())


def _run(words: list[str]) -> None:
    """What Python does with its arguments."""
    if words[:2] == _ERRORS:
        warnings.simplefilter("error")
        words = words[2:]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    first, *rest = words
    if first == "-c":
        program, *rest = rest
        sys.argv, sys.path[0] = ["-c", *rest], ""
        exec(compile(program, "<string>", "exec"), vars(main))
    elif first == "-m":
        name, *rest = rest
        sys.path[0] = str(Path.cwd())
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        sys.argv = [spec.origin, *rest]
        main.__spec__, main.__file__ = spec, spec.origin
        exec(compile(Path(spec.origin).read_text(), spec.origin, "exec"), vars(main))
    else:
        sys.argv, sys.path[0] = words, str(Path(first).parent)
        main.__file__ = first
        exec(compile(Path(first).read_text(), first, "exec"), vars(main))


if __name__ == "__main__":
    # A shell that runs tests in the background ignores Ctrl-C for all of them; the test process has mended that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.set_threshold(*GC_THRESHOLDS)
    with socket.socket(fileno=int(sys.argv[1])) as control_of_server:
        words_of_child = _serve(control_of_server)
    if words_of_child is not None:
        _run(words_of_child)
