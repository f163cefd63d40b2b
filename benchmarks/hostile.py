"""What one robot notices of a hostile client: its round trip beside each attack, and the server's memory.

    python benchmarks/hostile.py [--seconds 5] [--only NAME ...] [--report FILE] [--fuzz 100000]

A server process with a small policy of the DROID form (its transforms and its contract, no model: 2 ms per batch), a
robot in this process that asks for a chunk every 5 ms, and each attack in a process of its own and of low priority,
over loopback. Times are of the robot's whole `infer`, and of those that it would have asked for while it waited; memory
is the server's resident set. `--fuzz N` sends N random messages instead. Exit code 1: the robot saw an error, its p99
was over 50 ms, or the server's memory grew by more than its budget.
"""

import argparse
import contextlib
import dataclasses
import datetime
import io
import os
import platform
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import numpy as np
import websockets.exceptions

from openpi_client import connection, msgpack_numpy
from openpi_client.deadline import Deadline
from openpi_client.stream import BINARY, MessageStream, StreamClosed
from openpi_client.websocket_client_policy import WebsocketClientPolicy

HOST = "127.0.0.1"
PERIOD_S = 0.005
# Attackers have processors of their own, which here are those of the server.
_NICE = 10
LARGEST_P99_MS = 50.0
MEMORY_MIB = 2048  # the default of `openpi serve`
UPGRADE = (
    "GET / HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


# The server


def serve() -> None:
    from openpi.models.model_config import ModelType
    from openpi.policies.contract import Contract
    from openpi.policies.droid_policy import DroidInputs, DroidOutputs
    from openpi.policies.policy import Policy
    from openpi.serving.server import PolicyServer

    class Sampler:
        takes_noise, action_horizon, action_dim = True, 15, 32

        def sample(self, inputs: dict, noise: np.ndarray | None, **_: object) -> np.ndarray:
            time.sleep(0.002)
            return np.zeros((len(inputs["state"]), 15, 32), np.float32)

    def load() -> Policy:
        spec = DroidInputs(ModelType.PI05).spec
        contract = Contract(
            robot="droid",
            model_type="pi05",
            cameras=spec.cameras,
            state=spec.state,
            actions=spec.actions,
            action_kind=spec.action_kind,
            trained_relative=(),
            action_horizon=15,
            control_hz=15.0,
            state_q01=None,
            state_q99=None,
        )
        transforms = [DroidInputs(ModelType.PI05)]
        return Policy(Sampler(), transforms=transforms, output_transforms=[DroidOutputs()], contract=contract)

    PolicyServer(load, port=0, on_listening=lambda port: print(port, flush=True)).run()


@contextlib.contextmanager
def server_process() -> Iterator[tuple[int, int]]:
    """Its port and process number."""
    with subprocess.Popen(
        [sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        threading.Thread(target=process.stderr.read, daemon=True).start()
        try:
            yield int(process.stdout.readline()), process.pid
        finally:
            process.kill()


def memory_mib(pid: int) -> float:
    """Resident set of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


# The robot


def observation(rng: np.random.Generator) -> dict:
    from openpi.policies.droid_policy import make_droid_example

    example = make_droid_example()
    images = {key: rng.integers(0, 256, value.shape, np.uint8) for key, value in example.items() if np.ndim(value) == 3}
    return {**example, **images, "prompt": "pick up the cup"}


class Robot(threading.Thread):
    """Asks for a chunk every few milliseconds until it is told to end."""

    def __init__(self, port: int, end: threading.Event) -> None:
        super().__init__(daemon=True)  # it waits for a server that is gone
        self.times_ms: list[float] = []
        self.errors: list[str] = []
        self._port, self._end = port, end

    def run(self) -> None:
        question = observation(np.random.default_rng(0))
        with WebsocketClientPolicy(HOST, self._port) as client:
            while not self._end.wait(PERIOD_S):
                start_s = time.perf_counter()
                try:
                    client.infer(question)
                except Exception as error:
                    self.errors.append(repr(error))
                self.times_ms.append((time.perf_counter() - start_s) * 1000)


# The attacks, each for a number of seconds; they return the bytes that they were answered with


def opened(port: int, path: str = "/") -> MessageStream:
    """A session that has got its metadata."""
    stream, _ = connection.open_stream(f"ws://{HOST}:{port}{path}", {}, Deadline(30.0))
    stream.read(30.0)
    return stream


def ask(port: int, message: bytes, seconds: float, *, answers: int = 10_000) -> int:
    """Sends one message again and again, each after the answer to the one before; the largest answer."""
    end_s = time.monotonic() + seconds
    largest, stream = 0, None
    while time.monotonic() < end_s and answers > 0:
        answers -= 1
        try:
            stream = stream or opened(port)
            stream.write(message, timeout_s=60.0)
            largest = max(largest, len(stream.read(120.0)))
        except OSError:
            stream = None
    return largest


def in_parallel(work: Callable[[], int], count: int) -> int:
    """The largest result of several threads that do the same."""
    results: list[int] = []
    threads = [threading.Thread(target=lambda: results.append(work()), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    return max(results, default=0)


def nobody(port: int, seconds: float) -> int:
    time.sleep(seconds)
    return 0


def empty_maps(port: int, seconds: float) -> int:
    return ask(port, b"\xdd" + (100_000).to_bytes(4, "big") + b"\x80" * 100_000, seconds, answers=1)


def tiny_observations(port: int, seconds: float) -> int:
    tiny = {
        key: np.zeros((1, 1, 3), np.uint8) if np.ndim(value) == 3 else value
        for key, value in observation(np.random.default_rng(0)).items()
    }
    return ask(port, msgpack_numpy.packb([tiny] * 1500), seconds, answers=1)


def whole_lists(port: int, seconds: float) -> int:
    """Lists as long as they may be, of observations that fit."""
    message = msgpack_numpy.packb([observation(np.random.default_rng(0))] * 64)
    return in_parallel(lambda: ask(port, message, seconds), 4)


def large_jpegs(port: int, seconds: float) -> int:
    return ask(port, jpegs(40, 4096), seconds, answers=2)


def allowed_jpegs(port: int, seconds: float) -> int:
    message = jpegs(2, 4096)
    return in_parallel(lambda: ask(port, message, seconds), 8)


def jpegs(count: int, side: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (120, 30, 200)).save(buffer, "JPEG", quality=30)
    image = {b"__jpeg__": True, b"data": buffer.getvalue()}
    return msgpack_numpy.packb({f"camera_{i}": image for i in range(count)})


def deep(port: int, seconds: float) -> int:
    return ask(port, b"\x91" * 100_000 + b"\x80", seconds)


def many_values(port: int, seconds: float) -> int:
    message = msgpack_numpy.packb({"observation/joint_position": [0] * 3_000_000})
    return in_parallel(lambda: ask(port, message, seconds), 4)


def many_maps(port: int, seconds: float) -> int:
    message = msgpack_numpy.packb({"a": [{}] * 1_000_000})
    return in_parallel(lambda: ask(port, message, seconds), 4)


def long_keys(port: int, seconds: float) -> int:
    message = msgpack_numpy.packb({f"{i}" + "k" * 2**20: i for i in range(20)})
    return in_parallel(lambda: ask(port, message, seconds), 4)


def long_prompts(port: int, seconds: float) -> int:
    message = msgpack_numpy.packb({**observation(np.random.default_rng(0)), "prompt": "pick the cup " * 500_000})
    return in_parallel(lambda: ask(port, message, seconds), 4)


def empty_arrays(port: int, seconds: float) -> int:
    def array(dtype: str, shape: list[int]) -> dict:
        return {b"__ndarray__": True, b"data": b"", b"dtype": dtype, b"shape": shape}

    items = [array("<f4", [2**40, 0]), array("|S0", [2**40]), array("<U0", [10**9]), array("<f4", [2**20, 2**20, 0])]
    messages = [msgpack_numpy.packb({"observation/joint_position": item}) for item in items]
    return max(ask(port, message, seconds / 4) for message in messages)


def swollen_scalars(port: int, seconds: float) -> int:
    scalar = {b"__npgeneric__": True, b"data": 3 * 2**30, b"dtype": "|S1"}
    return ask(port, msgpack_numpy.packb({"a": scalar}), seconds)


def large_arrays(port: int, seconds: float) -> int:
    message = msgpack_numpy.packb({"observation/wrist_image_left": np.zeros((9000, 9000, 3), np.uint8)})
    return in_parallel(lambda: ask(port, message, seconds), 2)


def half_messages(port: int, seconds: float) -> int:
    """Most of a message of 250 MiB in each of 16 sessions, and then nothing more."""
    streams = []
    for _ in range(16):
        stream = opened(port)
        with contextlib.suppress(OSError):
            stream._socket.settimeout(5.0)
            stream._socket.sendall(bytes([0x82, 0xFF]) + (250 * 2**20).to_bytes(8, "big") + bytes(4))
            for _ in range(240):
                stream._socket.sendall(bytes(2**20))
        streams.append(stream)
    time.sleep(seconds)
    return 0


def failures(port: int, seconds: float) -> int:
    message = msgpack_numpy.packb({"observation/joint_position": "x", "prompt": 3})
    return in_parallel(lambda: ask(port, message, seconds, answers=10**6), 8)


def refusals_of_long_texts(port: int, seconds: float) -> int:
    message = msgpack_numpy.packb({f"camera_{i}_{'x' * 1000}": i for i in range(200)})
    return in_parallel(lambda: ask(port, message, seconds, answers=10**6), 4)


def never_reading(port: int, seconds: float) -> int:
    """Sessions that ask for lists and do not read the answers."""
    message = msgpack_numpy.packb([observation(np.random.default_rng(0))] * 8)
    streams = [opened(port) for _ in range(16)]
    end_s = time.monotonic() + seconds
    for stream in streams:
        stream._socket.settimeout(0.2)
    while time.monotonic() < end_s:
        for stream in streams:
            with contextlib.suppress(OSError):
                stream._socket.sendall(bytes([0x82, 0xFF]) + len(message).to_bytes(8, "big") + bytes(4) + message)
    return 0


def half_closed(port: int, seconds: float) -> int:
    """Sessions whose clients ask, and close their sending side before the answer."""
    message = msgpack_numpy.packb(observation(np.random.default_rng(0)))
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        stream = opened(port)
        with contextlib.suppress(OSError):
            stream.write(message, timeout_s=5.0)
            stream._socket.shutdown(socket.SHUT_WR)
            stream.read(5.0)
        stream.abort()
    return 0


def silent(port: int, seconds: float, count: int = 1000) -> int:
    """Connections from one address that say nothing."""
    sockets = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            sockets.append(socket.create_connection((HOST, port), 1.0))
    time.sleep(seconds)
    return 0


def trickling(port: int, seconds: float) -> int:
    """Requests that come byte by byte."""
    head = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 10_000
    end_s = time.monotonic() + seconds
    sockets = [socket.create_connection((HOST, port), 5.0) for _ in range(190)]
    for byte in head:
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.send(bytes([byte]))
        if time.monotonic() > end_s:
            break
        time.sleep(0.05)
    return 0


def pages(port: int, seconds: float) -> int:
    """The status page's data, asked for by 50 clients as fast as they can."""
    end_s = time.monotonic() + seconds

    def poll() -> int:
        largest = 0
        while time.monotonic() < end_s:
            for path in ("/status.json", "/metrics", "/api/v1/models"):
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{port}{path}") as answer:
                    largest = max(largest, len(answer.read()))
        return largest

    return in_parallel(poll, 50)


def odd_requests(port: int, seconds: float) -> int:
    """What is no request, or one that may be read in two ways."""
    heads = [
        "GET //[ HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET http://a/status.json HTTP/1.1\r\nHost: a\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 0\r\n\r\nhello",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET / HTTP/1.1\r\n" + "A: b\r\n" * 5000 + "\r\n",
        "GET /" + "a" * 100_000 + " HTTP/1.1\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "\x16\x03\x01\x00\xa5\x01\x00\x00",
        UPGRADE.format(host=HOST) + UPGRADE.format(host=HOST),
    ]
    end_s, largest = time.monotonic() + seconds, 0
    while time.monotonic() < end_s:
        for head in heads:
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), 2.0) as sock:
                sock.sendall(head.encode("latin-1"))
                sock.shutdown(socket.SHUT_WR)
                largest = max(largest, len(sock.recv(2**16)))
    return largest


ATTACKS: dict[str, Callable[[int, float], int]] = {
    "nobody else": nobody,
    "100 kB of empty maps": empty_maps,
    "1500 tiny observations": tiny_observations,
    "4 sessions with lists of 64": whole_lists,
    "40 JPEGs of 4096x4096": large_jpegs,
    "8 sessions, 2 such JPEGs each": allowed_jpegs,
    "100,000 levels": deep,
    "3 million numbers": many_values,
    "1 million maps": many_maps,
    "20 keys of 1 MB": long_keys,
    "prompts of 6.5 MB": long_prompts,
    "arrays of no bytes, 2^40 items": empty_arrays,
    "text scalars of 3 GiB": swollen_scalars,
    "images of 9000x9000": large_arrays,
    "16 halves of 250 MiB": half_messages,
    "requests that fail": failures,
    "200 long unknown keys": refusals_of_long_texts,
    "answers that nobody reads": never_reading,
    "half-closed connections": half_closed,
    "1000 silent connections": silent,
    "190 trickling requests": trickling,
    "50 pollers of the pages": pages,
    "requests that are none": odd_requests,
}


# Fuzzing


def random_value(rng: random.Random, depth: int) -> object:
    kind = rng.randrange(12 if depth < 5 else 8)
    match kind:
        case 0 | 1:
            return rng.choice([None, True, -1, 2**63, 1.5, float("nan"), "x" * rng.randrange(300), b"y" * 40])
        case 2 | 3:
            dtype = rng.choice(["<f4", "|u1", "<i8", "|b1", "<U3", "|S0", "<f4,<f4", "|O", "<M8[ns]", 7])
            shape = [rng.choice([0, 1, 3, 7, 224, 2**33, -1]) for _ in range(rng.randrange(4))]
            data = rng.randbytes(rng.choice([0, 7, 28, 56, 5000]))
            return {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
        case 4:
            return {
                b"__npgeneric__": True,
                b"data": rng.choice([1, "a", 2**33, [1]]),
                b"dtype": rng.choice(["<i4", "|S9"]),
            }
        case 5:
            return {b"__jpeg__": True, b"data": rng.randbytes(50)}
        case 6:
            return msgpack.ExtType(rng.randrange(128), rng.randbytes(8))
        case 7:
            return {b"__shared__": [rng.randrange(2**40), rng.randrange(2**40)]}
        case 8 | 9:
            return [random_value(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 20]))]
    return {
        rng.choice(["prompt", "a", b"b", "observation/joint_position"]): random_value(rng, depth + 1) for _ in range(4)
    }


def random_message(rng: random.Random, good: bytes) -> bytes:
    """A message that is wrong in some way: random values, random bytes, or a good one with some bytes changed."""
    match rng.randrange(3):
        case 0:
            return msgpack_numpy.packb(random_value(rng, 0))
        case 1:
            return rng.randbytes(rng.randrange(200))
    damaged = bytearray(good if rng.random() < 0.05 else good[: rng.randrange(2000)])
    for _ in range(rng.randrange(8)):
        damaged[rng.randrange(len(damaged)) if damaged else 0 :][:1] = rng.randbytes(1)
    for _ in range(rng.randrange(8)):
        if damaged:
            damaged[rng.randrange(min(len(damaged), 600))] = rng.randrange(256)
    return bytes(damaged)


def fuzz(port: int, count: int, sessions: int = 4) -> int:
    """Sends random messages; each has to be answered, or its session to be ended. Returns how many were."""
    good = msgpack_numpy.packb(observation(np.random.default_rng(0)))

    def work(seed: int) -> int:
        rng, stream, answered = random.Random(seed), None, 0
        for _ in range(count // sessions):
            try:
                stream = stream or opened(port)
                stream.write(random_message(rng, good), BINARY, 30.0)
                stream.read(30.0)
            except StreamClosed:
                stream = None
            answered += 1
        return answered

    seeds = iter(range(sessions))
    return in_parallel(lambda: work(next(seeds)), sessions)


# The measurement


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was seen of one attack; times in ms, memory in MiB."""

    times_ms: np.ndarray  # with what the robot would have seen had it not waited for each answer
    errors: list[str]
    before_mib: float
    peak_mib: float
    after_mib: float
    answer_bytes: int
    opens_s: float
    is_healthy: bool

    @property
    def holds(self) -> bool:
        p99_ms = float(np.percentile(self.times_ms, 99))
        grown = self.peak_mib - self.before_mib
        return not self.errors and p99_ms < LARGEST_P99_MS and grown < MEMORY_MIB and self.is_healthy

    def row(self, name: str) -> str:
        p50, p99 = np.percentile(self.times_ms, [50, 99])
        health = "yes" if self.is_healthy else "no"
        memory = f"{self.before_mib:.0f} / {self.peak_mib:.0f} / {self.after_mib:.0f}"
        opens = f"{self.opens_s:.2f}" if self.opens_s < 30 else "never"
        return (
            f"| {name} | {p50:.1f} | {p99:.1f} | {self.times_ms.max():.0f} | {len(self.errors)} | {memory} "
            f"| {self.answer_bytes:,} | {opens} | {health} |"
        )


HEADER = (
    "| beside | p50 ms | p99 ms | max ms | errors | memory MiB before / peak / after | largest answer, bytes "
    "| another session opens in s | healthy |\n|---|---|---|---|---|---|---|---|---|"
)


def measure(command: list[str], seconds: float) -> Seen:
    """The robot beside an attack of a process of its own."""
    with server_process() as (port, pid):
        end = threading.Event()
        robot = Robot(port, end)
        robot.start()
        time.sleep(0.5)
        before = peak = memory_mib(pid)
        attack = subprocess.Popen([sys.executable, __file__, *command, "--port", str(port)], stdout=subprocess.PIPE)
        assert attack.stdout is not None
        attack.stdout.readline()
        deadline_s = time.monotonic() + seconds + 120
        opens_s, is_healthy, probe_s = 0.0, True, time.monotonic() + 1.0 + seconds / 2
        while attack.poll() is None and time.monotonic() < deadline_s:
            peak = max(peak, memory_mib(pid))
            time.sleep(0.02)
            if time.monotonic() > probe_s and not opens_s:
                opens_s, is_healthy = time_to_open(port), health(port)
        attack.kill()
        out = attack.communicate()[0]
        end.set()
        robot.join(60)
        time.sleep(0.5)
        times = without_omission(robot.times_ms or [np.inf])
        answered = int(out or 0)
        return Seen(times, robot.errors, before, peak, memory_mib(pid), answered, opens_s, is_healthy)


def without_omission(times_ms: list[float]) -> np.ndarray:
    """A robot that waits 10 s for one answer has missed the two thousand that it would have asked for meanwhile."""
    step = PERIOD_S * 1000
    return np.array([left for time_ms in times_ms for left in (time_ms, *np.arange(time_ms - step, 0.0, -step))])


def time_to_open(port: int) -> float:
    start_s = time.monotonic()
    try:
        opened(port).abort()
    except (OSError, websockets.exceptions.WebSocketException):
        return float("inf")
    return max(1e-3, time.monotonic() - start_s)


def health(port: int) -> bool:
    """Whether both health checks answer within two seconds."""
    try:
        for path in ("/healthz", "/readyz"):
            with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=2.0) as answer:
                answer.read()
    except OSError:
        return False
    return True


def setting() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return (
        f"{datetime.date.today()}, {cpu}, {os.cpu_count()} cores, Python {platform.python_version()}; load average "
        f"{os.getloadavg()[0]:.1f}. All processes ran on the same machine."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each attack")
    parser.add_argument("--only", nargs="*", help="of the attacks", default=list(ATTACKS))
    parser.add_argument("--fuzz", type=int, metavar="N", help="random messages instead of the attacks")
    parser.add_argument("--report", type=Path, help="also write the table here")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
    elif args.attack:
        os.nice(_NICE)
        print("begins", flush=True)
        print(ATTACKS[args.attack](args.port, args.seconds))
    elif args.fuzz and args.port:
        os.nice(_NICE)
        print("begins", flush=True)
        print(fuzz(args.port, args.fuzz))
    else:
        return run(args)
    return 0


def run(args: argparse.Namespace) -> int:
    print(HEADER, flush=True)
    rows, failed = [], []
    if args.fuzz:
        tries = {f"{args.fuzz:,} random messages": ["--fuzz", str(args.fuzz)]}
    else:
        tries = {name: ["--attack", name, "--seconds", str(args.seconds)] for name in args.only}
    for name, command in tries.items():
        seen = measure(command, args.seconds if not args.fuzz else args.fuzz / 100)
        rows.append(seen.row(name))
        print(rows[-1], flush=True)
        if not seen.holds:
            failed.append(name)
            print(*seen.errors[:3], sep="\n", file=sys.stderr)
    print(f"\n{setting()}")
    if args.report:
        args.report.write_text("\n".join([HEADER, *rows, "", setting()]) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
