"""A Robotiq gripper on a UR, by the socket that its URCap opens on the controller.

Lines of text: `GET POS` -> `POS 128`; `SET POS 255 SPE 255 FOR 150` -> `ack`. Positions are 0 open .. 255 closed.
Source: Robotiq's manual of the URCap.
"""

import socket
import threading
import time
from typing import Optional

PORT = 63352
_TIMEOUT_S = 2.0
_PERIOD_S = 0.02
# Of `GET STA`.
_IS_ACTIVE = 3
_ACTIVATION_S = 10.0


class RobotiqGripper:
    """Read and told by a thread of its own, so that a control loop waits for no line."""

    def __init__(self, host: str, port: int = PORT, *, speed: int = 255, force: int = 150, moves: bool = True) -> None:
        """Activates the gripper, which opens and closes it, unless it is active already.

        Args:
            speed, force: 0 to 255.
            moves: False only reads.
        Raises:
            ConnectionError: no gripper.
            TimeoutError: it does not become active.
        """
        for name, value in (("speed", speed), ("force", force)):
            if not 0 <= value <= 255:
                raise ValueError(f"the gripper's {name} is {value}; expected 0 to 255")
        self._settings = f"SPE {speed} FOR {force}"
        try:
            self._socket = socket.create_connection((host, port), _TIMEOUT_S)
        except OSError as error:
            raise ConnectionError(f"no gripper at {host}:{port} ({error}): is Robotiq's URCap installed?") from error
        self._lines = self._socket.makefile("r", encoding="ascii", newline="\n")
        self._target: Optional[int] = None
        self._error: Optional[BaseException] = None
        self._is_closed = False
        try:
            if moves:
                self._activate()
            self._position = self._get("POS")
        except BaseException:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._run, name="robotiq", daemon=True)
        self._thread.start()

    @property
    def position(self) -> float:
        """0 open .. 1 closed, as measured.

        Raises:
            RuntimeError: the gripper is gone.
        """
        if self._error is not None:
            raise RuntimeError(f"the gripper is gone: {self._error}")
        return self._position / 255

    def move(self, position: float) -> None:
        """Where to go, 0 open .. 1 closed. Does not wait."""
        self._target = round(255 * min(max(position, 0.0), 1.0))

    def close(self) -> None:
        self._is_closed = True
        self._thread.join(_TIMEOUT_S)
        self._lines.close()
        self._socket.close()

    def _run(self) -> None:
        sent: Optional[int] = None
        try:
            while not self._is_closed:
                target = self._target
                if target is not None and target != sent:
                    self._ask(f"SET POS {target} {self._settings}")
                    sent = target
                self._position = self._get("POS")
                time.sleep(_PERIOD_S)
        except (OSError, ValueError) as error:
            if not self._is_closed:
                self._error = error

    def _activate(self) -> None:
        if self._get("STA") != _IS_ACTIVE:
            for line in ("SET ACT 0", "SET ATR 0", "SET ACT 1"):
                self._ask(line)
        deadline_s = time.monotonic() + _ACTIVATION_S
        while self._get("STA") != _IS_ACTIVE:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"the gripper is not active after {_ACTIVATION_S:g} s: see its light")
            time.sleep(_PERIOD_S)
        self._ask("SET GTO 1")

    def _get(self, variable: str) -> int:
        words = self._ask(f"GET {variable}").split()
        if len(words) != 2 or words[0] != variable or not words[1].isdigit():
            raise ConnectionError(f"the gripper answered {' '.join(words)!r} to GET {variable}; expected a number")
        return int(words[1])

    def _ask(self, line: str) -> str:
        try:
            self._socket.sendall(line.encode("ascii") + b"\n")
            answer = self._lines.readline()
        except socket.timeout as error:
            raise ConnectionError(f"the gripper does not answer to {line} within {_TIMEOUT_S:g} s") from error
        if not answer:
            raise ConnectionError("the gripper has closed the connection")
        return answer.strip()
