"""Round trip of one observation: our client and server, against plain `websockets` and `msgpack`, and against
`websockets` as fast as it can be made.

    python benchmarks/round_trip.py [--rounds 40] [--requests 50] [--report benchmarks/round_trip.md]

Each side is a server process with a policy that computes nothing (a [50, 32] float32 chunk), and a blocking client
in this process; the observation is three RGB images and a state. The plain side is the shortest program that speaks the
same protocol: it runs the policy on its event loop, has no timing, no health checks, no reconnect. The tuned side has
blocking sockets and threads on both ends, packers that keep their buffers, our packing and setting of the allocator:
all of our stack but the stream itself. The sides take turns in rounds, so that a change of the machine's load meets all
of them. Times are of the whole `infer`.
"""

import argparse
import asyncio
import contextlib
import datetime
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

import msgpack
import numpy as np
import websockets.asyncio.server
import websockets.sync.client
import websockets.sync.server

from openpi_client import msgpack_numpy
from openpi_client.base_policy import BasePolicy
from openpi_client.websocket_client_policy import WebsocketClientPolicy

CHUNK = np.zeros((50, 32), np.float32)
SIDES = ("plain", "tuned", "ours")
SIZES_HW = ((224, 224), (480, 640), (1080, 1920))
WARM_UP_ROUNDS = 2


class NoPolicy(BasePolicy):
    """Answers at once."""

    def infer(self, obs: dict) -> dict:
        return {"actions": CHUNK}


def observation(rng: np.random.Generator, size_hw: tuple[int, int]) -> dict:
    images = rng.integers(0, 256, (3, *size_hw, 3), np.uint8)
    return {
        "observation/exterior_image_1_left": images[0],
        "observation/exterior_image_2_left": images[1],
        "observation/wrist_image_left": images[2],
        "observation/state": rng.random(8),
        "prompt": "pick up the cup",
    }


def plain_encode(value: object) -> object:
    if isinstance(value, np.ndarray):
        return {b"nd": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return value


def plain_decode(value: dict) -> object:
    if b"nd" in value:
        return np.ndarray(buffer=value[b"data"], dtype=value[b"dtype"], shape=value[b"shape"])
    return value


async def plain_session(connection: websockets.asyncio.server.ServerConnection) -> None:
    policy = NoPolicy()
    async for message in connection:
        result = policy.infer(msgpack.unpackb(message, object_hook=plain_decode))
        await connection.send(msgpack_numpy.packb(result, default=plain_encode))


async def serve_plain() -> None:
    async with websockets.asyncio.server.serve(
        plain_session, "127.0.0.1", 0, compression=None, max_size=None
    ) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await server.serve_forever()


def tuned_session(connection: websockets.sync.server.ServerConnection) -> None:
    connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    policy, packed = NoPolicy(), tuned_packer()
    for message in connection:
        connection.send(packed(policy.infer(msgpack_numpy.unpackb(message))))


def tuned_packer() -> Callable[[object], memoryview]:
    """Into one buffer, which is grown once."""
    packer = msgpack_numpy.Packer(autoreset=False)

    def packed(content: object) -> memoryview:
        packer.reset()
        packer.pack(content)
        return packer.getbuffer()

    return packed


def serve_tuned() -> None:
    from openpi.serving.memory import keep_freed_memory

    keep_freed_memory()
    with websockets.sync.server.serve(tuned_session, "127.0.0.1", 0, compression=None, max_size=None) as server:
        print(server.socket.getsockname()[1], flush=True)
        server.serve_forever()


def serve_ours() -> None:
    from openpi.serving.server import PolicyServer

    def tell(port: int) -> None:
        print(port, flush=True)

    PolicyServer(NoPolicy, port=0, metadata={}, on_listening=tell).run()


@contextlib.contextmanager
def server_process(side: str) -> Iterator[int]:
    """The port of a server that runs in a process of its own."""
    command = [sys.executable, __file__, "--serve", side]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def plain_client(port: int) -> Callable[[dict], dict]:
    connection = websockets.sync.client.connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, legacy=True)

    def infer(obs: dict) -> dict:
        connection.send(msgpack_numpy.packb(obs, default=plain_encode))
        return msgpack.unpackb(connection.recv(), object_hook=plain_decode)

    return infer


def tuned_client(port: int) -> Callable[[dict], dict]:
    connection = websockets.sync.client.connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, legacy=True)
    packed = tuned_packer()

    def infer(obs: dict) -> dict:
        connection.send(packed(obs))
        return msgpack_numpy.unpackb(connection.recv())

    return infer


def client_of(side: str, port: int) -> Callable[[dict], dict]:
    makers = {"plain": plain_client, "tuned": tuned_client}
    return makers[side](port) if side in makers else WebsocketClientPolicy("127.0.0.1", port).infer


def times_ms(infer: Callable[[dict], dict], obs: dict, num_requests: int) -> list[float]:
    times = []
    for _ in range(num_requests):
        start = time.perf_counter()
        result = infer(obs)
        times.append((time.perf_counter() - start) * 1000)
        assert result["actions"].shape == CHUNK.shape
    return times


def measure(sizes_hw: Iterable[tuple[int, int]], num_rounds: int, num_requests: int) -> Iterator[tuple[str, str]]:
    """For each size of image: its name, and the table."""
    with contextlib.ExitStack() as stack:
        ports = {side: stack.enter_context(server_process(side)) for side in SIDES}
        clients = {side: client_of(side, port) for side, port in ports.items()}
        for height, width in sizes_hw:
            obs = observation(np.random.default_rng(0), (height, width))
            # About as many seconds for each size.
            count = max(5, num_requests * 224 * 224 // (height * width))
            for infer in clients.values():
                times_ms(infer, obs, WARM_UP_ROUNDS * count)
            rounds = {side: [] for side in clients}
            for index in range(num_rounds):
                for side in SIDES[index % len(SIDES) :] + SIDES[: index % len(SIDES)]:
                    rounds[side].append(times_ms(clients[side], obs, count))
            yield f"Three images of {width}x{height}", table({side: np.array(times) for side, times in rounds.items()})


def table(times: dict[str, np.ndarray]) -> str:
    """Of times in ms[num_rounds, num_requests] by side."""
    rows = ["| side | p50 ms | p90 ms | p99 ms | mean ms |", "|---|---|---|---|---|"]
    for side, values in times.items():
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        rows.append(f"| {side} | {p50:.3f} | {p90:.3f} | {p99:.3f} | {values.mean():.3f} |")
    wins = []
    for side, base in (
        ("tuned", "plain"),
        ("ours", "plain"),
        ("ours", "tuned"),
    ):
        mine, other = times[side], times[base]
        ratios = [f"{np.percentile(mine, p) / np.percentile(other, p):.2f}" for p in (50, 90, 99)]
        rows.append(f"| ({side}) / {base} | {' | '.join(ratios)} | {mine.mean() / other.mean():.2f} |")
        won = int(np.sum(np.median(mine, axis=1) < np.median(other, axis=1)))
        wins.append(f"({side}) before {base} in {won}")
    rows.append(f"\nRounds in which the median was lower: {', '.join(wins)} of {len(times['plain'])}.")
    return "\n".join(rows)


def setting(num_rounds: int, num_requests: int) -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return (
        f"{datetime.date.today()}, {cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"websockets {metadata.version('websockets')}, msgpack {'.'.join(map(str, msgpack.version))}, "
        f"NumPy {np.__version__}; "
        f"{num_rounds} rounds of {num_requests} requests, fewer of larger images; "
        f"load average {os.getloadavg()[0]:.1f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--report", type=Path, help="also write the result here")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        with contextlib.suppress(KeyboardInterrupt):
            if args.serve == "plain":
                asyncio.run(serve_plain())
            elif args.serve == "tuned":
                serve_tuned()
            else:
                serve_ours()
        return
    tables = []
    for title, text in measure(SIZES_HW, args.rounds, args.requests):
        print(f"{title}\n\n{text}\n", flush=True)
        tables.append(f"## {title}\n\n{text}")
    where = setting(args.rounds, args.requests)
    print(where)
    if args.report:
        parts = ["# Round trip", "`python benchmarks/round_trip.py`", *tables, where]
        args.report.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
