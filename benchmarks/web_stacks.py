"""Which server library moves a robot's messages fastest: `websockets` alone, or Starlette on uvicorn.

    uv run --with uvicorn --with starlette --with wsproto python benchmarks/web_stacks.py [--rounds 20]

Each stack is a process that reads three 224x224 RGB images as one binary message and answers with a [50, 32] float32
chunk; nothing is decoded. One blocking client; the stacks alternate in rounds. Result: docs/decisions/0007.
"""

import argparse
import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import websockets.asyncio.server
import websockets.sync.client

STACKS = ("websockets", "starlette+websockets", "starlette+websockets-sansio", "starlette+wsproto")
REQUEST = bytes(3 * 224 * 224 * 3)
ANSWER = bytes(50 * 32 * 4)
NUM_REQUESTS = 50


async def serve_websockets(port: int) -> None:
    async def session(connection: websockets.asyncio.server.ServerConnection) -> None:
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            while True:
                await connection.recv()
                await connection.send(ANSWER)

    async with websockets.asyncio.server.serve(session, "127.0.0.1", port, compression=None, max_size=None) as server:
        await server.serve_forever()


async def serve_starlette(implementation: str, port: int) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    async def session(connection: WebSocket) -> None:
        await connection.accept()
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                await connection.receive_bytes()
                await connection.send_bytes(ANSWER)

    config = uvicorn.Config(
        Starlette(routes=[WebSocketRoute("/", session)]),
        port=port,
        ws=implementation,
        ws_max_size=2**30,
        ws_per_message_deflate=False,
        log_level="error",
    )
    await uvicorn.Server(config).serve()


@contextlib.contextmanager
def client_of(stack: str) -> Iterator[websockets.sync.client.ClientConnection]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, __file__, "--serve", stack, "--port", str(port)]) as process:
        try:
            connection = None
            while connection is None:
                with contextlib.suppress(ConnectionRefusedError):
                    connection = websockets.sync.client.connect(
                        f"ws://127.0.0.1:{port}", compression=None, max_size=None
                    )
            yield connection
            connection.close()
        finally:
            process.terminate()


def times_ms(connection: websockets.sync.client.ClientConnection) -> list[float]:
    times = []
    for _ in range(NUM_REQUESTS):
        start = time.perf_counter()
        connection.send(REQUEST)
        assert len(connection.recv()) == len(ANSWER)
        times.append((time.perf_counter() - start) * 1000)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        implementation = args.serve.partition("+")[2]
        asyncio.run(serve_starlette(implementation, args.port) if implementation else serve_websockets(args.port))
        return
    with contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(client_of(name)) for name in STACKS}
        for client in clients.values():
            times_ms(client)
        rounds = {name: [] for name in STACKS}
        for index in range(args.rounds):
            for name in STACKS[index % len(STACKS) :] + STACKS[: index % len(STACKS)]:
                rounds[name] += times_ms(clients[name])
    print("| stack | p50 ms | p90 ms | p99 ms |\n|---|---|---|---|")
    for name, times in rounds.items():
        print("| {} | {:.3f} | {:.3f} | {:.3f} |".format(name, *np.percentile(times, [50, 90, 99])))


if __name__ == "__main__":
    main()
