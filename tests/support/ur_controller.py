"""A Universal Robots controller of our own: RTDE, dashboard, scripts, and the port of Robotiq's URCap.

Speaks the real protocols to the real library. Of the control script that the library uploads it acts what matters here:
a ready flag in an output register, and commands that come in input registers. Source: Universal Robots' RTDE guide.
"""

import contextlib
import itertools
import math
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator

RTDE, DASHBOARD, SCRIPT, GRIPPER = 30004, 29999, 30003, 63352

# Letters of `struct` for the types of RTDE's variables; all else is DOUBLE.
_FORMATS = {"DOUBLE": "d", "VECTOR3D": "3d", "VECTOR6D": "6d", "INT32": "i", "VECTOR6INT32": "6i", "UINT32": "I"}
_FORMATS["UINT64"] = "Q"
_VECTORS = {
    *("target_q", "target_qd", "target_qdd", "target_current", "target_moment", "actual_q", "actual_qd"),
    *("actual_current", "joint_control_output", "actual_TCP_pose", "actual_TCP_speed", "actual_TCP_force"),
    *("target_TCP_pose", "target_TCP_speed", "joint_temperatures", "actual_joint_voltage", "payload_inertia"),
}
# What the registers of the script say.
_READY, _DONE = 1, 2
SERVO_STOP, _SERVOJ, _STOP_SCRIPT = 16, 11, 255
_HZ = 125


def type_of(name: str) -> str:
    """Of a variable, as the guide has it."""
    if "int_register" in name or name in ("robot_mode", "safety_mode", "runtime_state"):
        return "INT32"
    if name.endswith("_bits"):
        return "UINT64" if "digital" in name else "UINT32"
    known = {"joint_mode": "VECTOR6INT32", "actual_tool_accelerometer": "VECTOR3D", "payload_cog": "VECTOR3D"}
    return known.get(name, "VECTOR6D" if name in _VECTORS else "DOUBLE")


class Controller:
    """One arm on a loopback address of its own.

    Attributes:
        joints: where the arm is, rad[6].
        servoed: the targets that came, with the seconds between two.
        commands: numbers of the script's commands that were no servoing.
        safety_mode: as RTDE has it: 1 normal, 3 protective stop, 5 safeguard stop.
        is_silent: whether it says nothing new, as when its cable is out.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.joints = [0.0, -1.5, 1.5, 0.0, 0.5, 0.0]
        self.servoed: list[tuple[list[float], float]] = []
        self.commands: list[int] = []
        self.is_silent = self.is_running = self.is_closed = False
        self.safety_mode = 1
        self.gripper = {"POS": 3, "ACT": 0, "STA": 0, "GTO": 0, "ATR": 0, "SPE": 0, "FOR": 0, "PRE": 3}
        self.positions: list[int] = []
        self._status = 0
        self._peers = 0
        self._nobody = threading.Condition()
        self._servers = [
            self._listen(port, talk)
            for port, talk in (
                (RTDE, self._rtde),
                (DASHBOARD, self._dashboard),
                (SCRIPT, self._script),
                (GRIPPER, self._robotiq),
            )
        ]

    def _listen(self, port: int, talk: Callable[[socket.socket], None]) -> socketserver.ThreadingTCPServer:
        controller = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with controller._peer(), contextlib.suppress(OSError, EOFError):
                    talk(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True
            block_on_close = False

        server = Server((self.host, port), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    @contextlib.contextmanager
    def _peer(self) -> Iterator[None]:
        with self._nobody:
            self._peers += 1
        try:
            yield
        finally:
            with self._nobody:
                self._peers -= 1
                self._nobody.notify_all()

    def heard_out(self) -> "Controller":
        """What it is when it has read all that programs sent that have ended: their last words may be on the way."""
        with self._nobody:
            assert self._nobody.wait_for(lambda: self._peers == 0, 30), "somebody is still connected"
        return self

    def close(self) -> None:
        self.is_closed = True
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # RTDE

    def _rtde(self, peer: socket.socket) -> None:
        sending = threading.Lock()
        recipes: dict[int, list[str]] = {}
        outputs: list[str] = []

        def send(kind: str, payload: bytes) -> None:
            with sending:
                peer.sendall(struct.pack(">HB", 3 + len(payload), ord(kind)) + payload)

        while True:
            size, kind = struct.unpack(">HB", _exactly(peer, 3))
            payload = _exactly(peer, size - 3)
            match chr(kind):
                case "V":
                    send("V", b"\x01")
                case "v":
                    send("v", struct.pack(">4I", 3, 15, 8, 0))
                case "O":
                    outputs = payload[8:].decode().strip(",").split(",")
                    send("O", b"\x01" + ",".join(map(type_of, outputs)).encode())
                case "I":
                    names = payload.decode().strip(",").split(",")
                    recipes[len(recipes) + 1] = names
                    send("I", bytes([len(recipes)]) + ",".join(map(type_of, names)).encode())
                case "S":
                    send("S", b"\x01")
                    threading.Thread(target=self._stream, args=(send, outputs), daemon=True).start()
                case "P":
                    send("P", b"\x01")
                case "U":
                    names = recipes[payload[0]]
                    self._take(dict(zip(names, _unpacked(names, payload[1:]), strict=True)))

    def _stream(self, send: Callable[[str, bytes], None], names: list[str]) -> None:
        for number in itertools.count():
            values = {"actual_q": self.joints, "timestamp": number / _HZ, "robot_mode": 7}
            values |= {"robot_status_bits": 3 if self.is_running else 1, "runtime_state": 2 if self.is_running else 1}
            values |= {"output_int_register_0": self._status, "output_int_register_24": self._status}
            values |= {"safety_mode": self.safety_mode, "safety_status_bits": 1 << (self.safety_mode - 1)}
            data = b"".join(_packed(type_of(name), values.get(name, 0)) for name in names)
            try:
                if not self.is_silent:
                    send("U", b"\x01" + data)
            except OSError:
                return
            if self.is_closed:
                return
            time.sleep(1 / _HZ)

    def _take(self, values: dict[str, float]) -> None:
        command = next((int(value) for name, value in values.items() if name.startswith("input_int_register")), 0)
        numbers = [value for name, value in values.items() if "double" in name]
        if command == _SERVOJ:
            self.servoed.append((numbers[:6], numbers[8]))
            self.joints = numbers[:6]
        elif command == _STOP_SCRIPT:
            self.is_running, self._status = False, 0
        elif command:
            self.commands.append(command)
            self._status = _DONE
        else:
            self._status = _READY if self.is_running else 0

    # The others

    def _dashboard(self, peer: socket.socket) -> None:
        peer.sendall(b"Connected: Universal Robots Dashboard Server\n")
        answers = {"stop": "Stopped", "PolyscopeVersion": "3.15.8.106339"}
        for line in peer.makefile("r"):
            if line.strip() == "stop":
                self.is_running, self._status = False, 0
            peer.sendall((answers.get(line.strip(), "ok") + "\n").encode())

    def _script(self, peer: socket.socket) -> None:
        received = b""
        while chunk := peer.recv(65536):
            received += chunk
            if b"def " in received and received.rstrip().endswith(b"end"):
                self.is_running, self._status, received = True, _READY, b""

    def _robotiq(self, peer: socket.socket) -> None:
        for line in peer.makefile("r"):
            word, *rest = line.split()
            if word == "GET":
                peer.sendall(f"{rest[0]} {self.gripper[rest[0]]}\n".encode())
                continue
            told = dict(zip(rest[::2], map(int, rest[1::2]), strict=True))
            self.gripper |= told
            if told.get("ACT"):
                self.gripper["STA"] = 3
            if "POS" in told:
                self.positions.append(told["POS"])
            peer.sendall(b"ack\n")


def _exactly(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = peer.recv(size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def _packed(kind: str, value: object) -> bytes:
    form = _FORMATS[kind]
    count = int(form[0]) if form[0].isdigit() else 1
    values = value if isinstance(value, list) else [value] * count
    return struct.pack(f">{form}", *values)


def _unpacked(names: list[str], data: bytes) -> Iterator[float]:
    offset = 0
    for name in names:
        form = ">" + _FORMATS[type_of(name)]
        yield struct.unpack_from(form, data, offset)[0]
        offset += struct.calcsize(form)
    assert math.isfinite(offset)
