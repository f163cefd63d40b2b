"""Many clients on one server, three of them bad: does anybody else notice, and do clients survive its death?

    python benchmarks/serving_load.py [--seconds 60] [--report benchmarks/serving_load.md]

16 clients ask a policy that takes 5 ms per batch for chunks, three 224x224 RGB images each time: 13 of them as fast as
they can, one reads its answers slowly and little by little, one sends rubbish and comes back, one is killed in the
middle of a message and started again. Half-way the server is killed (kill -9) and started anew on its port. No
good client may see an error but that its observation is too old now, and each has to be answered when it asks anew.
Exit code 1 if one is not, or if one of the bad clients never did its work.
"""

import argparse
import datetime
import logging
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import websockets.sync.client

from openpi_client import msgpack_numpy
from openpi_client.base_policy import BasePolicy
from openpi_client.freshness import StaleAnswerError
from openpi_client.websocket_client_policy import WebsocketClientPolicy

NUM_CLIENTS = 16
INFER_S = 0.005


class BusyPolicy(BasePolicy):
    """Answers with each observation's number, after the time of one batch."""

    def infer(self, obs: dict) -> dict:
        return self.infer_batch([obs])[0]

    def infer_batch(self, observations: list[dict]) -> list[dict]:
        time.sleep(INFER_S)
        return [{"actions": np.full((50, 32), obs["number"], np.float32)} for obs in observations]


def serve(port: int) -> None:
    from openpi.serving.server import PolicyServer

    logging.disable(logging.ERROR)  # of the rubbish
    PolicyServer(BusyPolicy, port=port, on_listening=lambda port: print(port, flush=True)).run()


def start_server(port: int) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, __file__, "--serve", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def observation(number: float) -> dict:
    images = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    return {"a": images[0], "b": images[1], "c": images[2], "number": number, "prompt": "pick up the cup"}


class GoodClient(threading.Thread):
    """Asks as fast as it can, and checks that the answer is to its question."""

    def __init__(self, port: int, number: int, end: threading.Event) -> None:
        super().__init__()
        self.times_ms: list[float] = []
        self.errors: list[str] = []
        self.too_old = 0
        self._port, self._number, self._end = port, number, end

    def run(self) -> None:
        question = observation(0.0)
        with WebsocketClientPolicy("127.0.0.1", self._port) as client:
            while not self._end.is_set():
                question["number"] = float(self._number * 1_000_000 + len(self.times_ms))
                start_s = time.perf_counter()
                try:
                    actions = client.infer(question)["actions"]
                    if actions[0, 0] != np.float32(question["number"]):
                        self.errors.append("an answer to another question")
                except StaleAnswerError:  # away for longer than a chunk lasts: asks anew, as a robot does
                    self.too_old += 1
                    continue
                except Exception as error:
                    self.errors.append(repr(error))
                self.times_ms.append((time.perf_counter() - start_s) * 1000)


def slow(port: int) -> None:
    """Reads its answers in small bites, with pauses."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port))
        key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
        sock.sendall(
            f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{key}\r\n\r\n".encode()
        )
        message = msgpack_numpy.packb({"number": 1.0})
        frame = bytes([0x82, 0x80 | len(message)]) + bytes(4) + message
        while True:
            sock.sendall(frame)
            for _ in range(20):
                if not sock.recv(64):
                    return
                time.sleep(0.02)


def rubbish(port: int) -> None:
    """Bytes that are no message, messages that are no observation, and no websocket at all."""
    with websockets.sync.client.connect(f"ws://127.0.0.1:{port}", legacy=True) as connection:
        connection.recv()
        connection.send(random.choice([random.randbytes(1000), msgpack_numpy.packb([1, None]), b"", "text"]))
        connection.recv(5)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(random.randbytes(500))


def killed(port: int) -> None:
    """Dies in the middle of a message, as a robot that loses its power."""
    program = (
        "import os\nimport websockets.sync.client\n"
        f"connection = websockets.sync.client.connect('ws://127.0.0.1:{port}')\n"
        "connection.recv()\n"
        "connection.socket.sendall(bytes([0x82, 0xFF, 0, 0, 0, 0, 0, 16, 0, 0]) + bytes(100_000))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL, check=False)
    if done.returncode != -signal.SIGKILL:
        raise ConnectionRefusedError


def again_and_again(work: Callable[[int], None], port: int, end: threading.Event, counts: dict[str, int]) -> None:
    while not end.is_set():
        try:
            work(port)
        except ConnectionRefusedError:  # The server is away.
            pass
        except Exception:  # It was thrown out, or the server died.
            counts[work.__name__] = counts.get(work.__name__, 0) + 1
        else:
            counts[work.__name__] = counts.get(work.__name__, 0) + 1
        end.wait(0.05)


def run(seconds: float) -> tuple[list[GoodClient], dict[str, int], float]:
    """The good clients with their times, how often the bad ones came, and how long the server was away."""
    process, port = start_server(0)
    end = threading.Event()
    counts: dict[str, int] = {}
    clients = [GoodClient(port, number, end) for number in range(NUM_CLIENTS - 3)]
    bad = [
        threading.Thread(target=again_and_again, args=(work, port, end, counts), daemon=True)
        for work in (slow, rubbish, killed)
    ]
    for thread in [*clients, *bad]:
        thread.start()
    time.sleep(seconds / 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    down_s = time.monotonic()
    process, _ = start_server(port)
    down_s = time.monotonic() - down_s
    time.sleep(seconds / 2)
    end.set()
    for client in clients:
        client.join(60)
    process.terminate()
    process.wait()
    return clients, counts, down_s


def report(clients: list[GoodClient], counts: dict[str, int], down_s: float, seconds: float) -> str:
    times = np.concatenate([client.times_ms for client in clients])
    usual = times[times < 1000 * down_s]  # without the requests that waited for the server's return
    p50, p90, p99, p999 = np.percentile(usual, [50, 90, 99, 99.9])
    errors = [error for client in clients for error in client.errors]
    fewest, most = min(len(c.times_ms) for c in clients), max(len(c.times_ms) for c in clients)
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"""{len(clients)} good clients, {seconds:g} s, policy {INFER_S * 1000:g} ms per batch of at most 8.

| | |
|---|---|
| requests answered | {len(times)} ({len(times) / seconds:.0f} per s; per client {fewest} to {most}) |
| errors seen by good clients | {len(errors)} |
| refused as too old over the restart, and asked anew | {sum(client.too_old for client in clients)} |
| p50, p90, p99, p99.9 | {p50:.1f}, {p90:.1f}, {p99:.1f}, {p999:.1f} ms |
| slow clients that lost their connection | {counts.get("slow", 0)} |
| rounds of rubbish | {counts.get("rubbish", 0)} |
| clients killed in mid-message | {counts.get("killed", 0)} |
| kill -9 to listening again | {down_s:.1f} s |
| longest request (over the restart) | {times.max() / 1000:.1f} s |

{datetime.date.today()}, {cpu}, {os.cpu_count()} cores, Python {platform.python_version()}; load average
{os.getloadavg()[0]:.1f}. All clients ran on the same machine."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--report", type=Path, help="also write the result here")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.port)
        return 0
    clients, counts, down_s = run(args.seconds)
    text = report(clients, counts, down_s, args.seconds)
    print(text)
    if args.report:
        args.report.write_text(f"# Load\n\n`python benchmarks/serving_load.py`\n\n{text}\n")
    errors = [error for client in clients for error in client.errors]
    print(*errors[:5], sep="\n")
    stuck = [client for client in clients if client.is_alive() or not client.times_ms]
    absent = {"slow", "rubbish", "killed"} - counts.keys()
    print(*(f"no {kind} client came through" for kind in absent), sep="\n")
    return 1 if errors or stuck or absent else 0


if __name__ == "__main__":
    sys.exit(main())
