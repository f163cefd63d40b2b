"""Questions to a policy server through a process of their own.

Packing 2.8 MB in a thread holds the interpreter, and cost 117 of 500 ticks; here a tick copies the pictures to shared
memory, and everything else happens elsewhere (docs/decisions/0019).
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

from typing_extensions import Literal

import openpi_client
from openpi_client import msgpack_numpy
from openpi_client.base_policy import Metadata, Observation
from openpi_client.realtime.arena import Arena, memory_file, packed
from openpi_client.realtime.requests import Answer
from openpi_client.realtime.worker import QUESTION

# Files of the folder in which a robot's program is started are no modules of this one.
_MAIN = """
import sys
sys.path[:] = [path for path in sys.path if path]
from openpi_client.realtime.worker import main
main(int(sys.argv[1]), int(sys.argv[2]))
"""
_GOODBYE_S = 2.0


class ProcessRequester:
    """A policy server, as `WebsocketClientPolicy` sees it, for a `ControlLoop`. Linux and macOS."""

    def __init__(
        self,
        host: str = "0.0.0.0",
        port: Optional[int] = None,
        api_key: Optional[str] = None,
        *,
        image_size: Optional[Tuple[int, int]] = (224, 224),
        image_layout: Literal["hwc", "chw"] = "hwc",
        memory_mib: int = 64,
        **options: object,
    ) -> None:
        """Blocks until the server is there and ready.

        Args:
            image_size: height and width to which pictures are resized (with their aspect kept) before they are sent,
                where the contract does not say; None = sent as they are.
            image_layout: "chw" sends them as [3, h, w], which published servers of ALOHA take only; the robot gives
                [h, w, 3].
            memory_mib: for one observation, before it is resized.
            options: further arguments of `WebsocketClientPolicy`; its `resend` is off.
        Raises:
            ConnectionError: no server, or none that is ready; the text says why.
            OSError: this system has no such processes; use `ThreadRequester`.
        """
        if os.name != "posix":
            raise OSError("ProcessRequester needs Linux or macOS; use ThreadRequester(WebsocketClientPolicy(...))")
        mine, theirs = socket.socketpair()
        with memory_file(memory_mib << 20) as memory, theirs:
            self._process = _started(theirs.fileno(), memory.fileno())
            self._arena = Arena(memory.fileno())
        self._line = Connection(mine.detach())
        try:
            asked = {"host": host, "port": port, "api_key": api_key, **options, "resend": False}
            self._line.send_bytes(packed({**asked, "image_size": image_size, "image_layout": image_layout}))
            opening = msgpack_numpy.unpackb(self._line.recv_bytes())
        except (EOFError, OSError) as error:
            self.close()
            raise ConnectionError(f"the process that asks the server ended: {self._process.returncode}") from error
        except BaseException:
            self.close()
            raise
        if "error" in opening:
            self.close()
            raise ConnectionError(opening["error"])
        self._metadata: Dict[str, Any] = opening["metadata"]
        self._number = 0
        self._is_busy = False

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    @property
    def is_busy(self) -> bool:
        return self._is_busy

    def submit(self, number: int, observation: Observation) -> None:
        assert not self._is_busy
        place = self._arena.write(observation)
        self._number, self._is_busy = number, True
        with contextlib.suppress(OSError):  # If the process is gone, `poll` says so.
            self._line.send_bytes(QUESTION.pack(number, time.monotonic_ns(), *place))

    def poll(self) -> Optional[Answer]:
        try:
            if not self._is_busy or not self._line.poll(0):
                return None
            message = msgpack_numpy.unpackb(self._line.recv_bytes())
        except (EOFError, OSError):
            message = {"number": self._number, "failure": "fatal", "error": self._obituary()}
        self._is_busy = False
        done_ns = message.pop("done_ns", None)
        if done_ns is not None:
            message["timing_ms"]["merge_ms"] = 1e-6 * (time.monotonic_ns() - done_ns)
        return Answer(**message)

    def _obituary(self) -> str:
        try:
            code: Any = self._process.wait(_GOODBYE_S / 20)
        except subprocess.TimeoutExpired:
            code = "unknown"
        return f"the process that asks the server ended (exit code {code})"

    def close(self) -> None:
        """Ends the connection and the process."""
        self._line.close()
        try:
            self._process.wait(_GOODBYE_S)
        except subprocess.TimeoutExpired:  # It waits for the server.
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "ProcessRequester":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _started(socket_fd: int, memory_fd: int) -> "subprocess.Popen[bytes]":
    here = str(Path(openpi_client.__file__).parents[1])
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN, str(socket_fd), str(memory_fd)],
        pass_fds=(socket_fd, memory_fd),
        env={**os.environ, "PYTHONPATH": paths},
        start_new_session=True,  # The terminal's Ctrl-C is for the loop.
        stdin=subprocess.DEVNULL,
    )
