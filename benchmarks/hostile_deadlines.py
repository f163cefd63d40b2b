"""What peers that do not play along cost in time: a client with a limit of 2 s against such servers, and our server
against such clients.

    python benchmarks/hostile_deadlines.py [--report benchmarks/hostile_deadlines.md] [--title TEXT]

Each line is one run. A case that does not end is given up after 60 s, so that versions without limits can be measured,
too.
"""

import argparse
import contextlib
import os
import platform
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from openpi_client import msgpack_numpy
from openpi_client.base_policy import BasePolicy
from openpi_client.websocket_client_policy import WebsocketClientPolicy

LIMIT_S = 2.0
GIVEN_UP_S = 60.0
HUGE = {"image": np.zeros((2000, 2000, 3), np.uint8)}  # more than the buffers of a connection take

CASES: list[tuple[str, Callable[[], str]]] = []


def case(title: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def add(function: Callable[[], str]) -> Callable[[], str]:
        CASES.append((title, function))
        return function

    return add


# Servers that misbehave


def frame(payload: bytes, opcode: int = 2, *, is_last: bool = True, mask: bool = False) -> bytes:
    """A websocket frame; clients mask theirs, here with zeros."""
    first, bit = (0x80 if is_last else 0) | opcode, 0x80 if mask else 0
    length = len(payload)
    if length < 126:
        head = struct.pack("!BB", first, bit | length)
    elif length < 2**16:
        head = struct.pack("!BBH", first, bit | 126, length)
    else:
        head = struct.pack("!BBQ", first, bit | 127, length)
    return head + (bytes(4) if mask else b"") + payload


def upgrade(sock: socket.socket) -> None:
    import base64
    import hashlib

    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(4096)
    lines = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if ": " in line)
    key = {name.lower(): value for name, value in lines.items()}["sec-websocket-key"]
    accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()).decode()
    sock.sendall(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
    )


def greet(sock: socket.socket) -> None:
    upgrade(sock)
    sock.sendall(frame(msgpack_numpy.packb({})))


@contextlib.contextmanager
def bad_server(behave: Callable[[socket.socket, threading.Event], None]) -> Iterator[int]:
    """The port of a server that does `behave` with each connection."""
    over = threading.Event()
    threads = []

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            behave(sock, over)

    def accept(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                thread = threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True)
                thread.start()
                threads.append(thread)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=accept, args=(listening,), daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        over.set()
        listening.shutdown(socket.SHUT_RDWR)


def seconds(function: Callable[[], object]) -> str:
    """How long it took, and what it raised; or that it did not end."""
    outcome: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run() -> None:
        start_s = time.monotonic()
        raised = ""
        try:
            function()
        except Exception as error:
            raised = f", {type(error).__name__}"
        outcome.put(f"{time.monotonic() - start_s:.2f} s{raised}")

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.get(timeout=GIVEN_UP_S)
    except queue.Empty:
        return f"not within {GIVEN_UP_S:.0f} s"


def ask_bad_server(behave: Callable[[socket.socket, threading.Event], None], obs: dict) -> str:
    with bad_server(behave) as port:
        client = WebsocketClientPolicy("127.0.0.1", port, request_timeout_s=LIMIT_S, reconnect_timeout_s=0)
        return seconds(lambda: client.infer(obs))


@case(f"Client, limit {LIMIT_S:g} s: the server does not read the request (12 MB)")
def _() -> str:
    def behave(sock: socket.socket, over: threading.Event) -> None:
        greet(sock)
        over.wait()

    return ask_bad_server(behave, HUGE)


@case(f"Client, limit {LIMIT_S:g} s: the answer trickles, a byte each 0.5 s")
def _() -> str:
    def behave(sock: socket.socket, over: threading.Event) -> None:
        greet(sock)
        answer = frame(msgpack_numpy.packb({"actions": np.zeros(10)}))
        for i in range(len(answer)):
            if over.wait(0.5):
                return
            sock.sendall(answer[i : i + 1])

    return ask_bad_server(behave, {"x": 1})


@case(f"Client, limit {LIMIT_S:g} s: no answer, and none to the goodbye")
def _() -> str:
    def behave(sock: socket.socket, over: threading.Event) -> None:
        greet(sock)
        over.wait()

    return ask_bad_server(behave, {"x": 1})


@case(f"Client, limit {LIMIT_S:g} s: pings without end instead of an answer")
def _() -> str:
    def behave(sock: socket.socket, over: threading.Event) -> None:
        greet(sock)
        while not over.is_set():
            sock.sendall(frame(b"", 9) * 100)

    return ask_bad_server(behave, {"x": 1})


@case(f"Client, connect_timeout_s {LIMIT_S:g}: a refusal trickles, a byte each 0.5 s")
def _() -> str:
    def behave(sock: socket.socket, over: threading.Event) -> None:
        sock.recv(4096)
        sock.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 1000\r\n\r\n")
        for byte in b"x" * 1000:
            if over.wait(0.5):
                return
            sock.sendall(bytes([byte]))

    with bad_server(behave) as port:
        return seconds(lambda: WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=LIMIT_S))


@case("Client, no limit given: close() from another thread ends a call that waits")
def _() -> str:
    asked = threading.Event()

    def behave(sock: socket.socket, over: threading.Event) -> None:
        greet(sock)
        sock.recv(1)
        asked.set()
        over.wait()

    with bad_server(behave) as port:
        client = WebsocketClientPolicy("127.0.0.1", port)

        def ask() -> None:
            with contextlib.suppress(Exception):
                client.infer({"x": 1})

        threading.Thread(target=ask, daemon=True).start()
        asked.wait()
        return seconds(client.close)


@case("Client, limit 2 s, with 2,000 descriptors open")
def _() -> str:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))

    def behave(sock: socket.socket, over: threading.Event) -> None:
        greet(sock)
        over.wait()

    with contextlib.ExitStack() as stack:
        for _ in range(2000):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        return ask_bad_server(behave, HUGE)


# Clients that misbehave


class EchoPolicy(BasePolicy):
    def infer(self, obs: dict) -> dict:
        if "size" in obs:
            return {"actions": np.zeros(obs["size"], np.uint8)}
        if "wait_s" in obs:
            time.sleep(obs["wait_s"])
        return {"actions": np.zeros((4, 2), np.float32)}


def serve(port: int) -> None:
    from openpi.serving.server import PolicyServer

    def tell(port: int) -> None:
        print(port, flush=True)

    PolicyServer(EchoPolicy, port=port, metadata={}, on_listening=tell).run()


@contextlib.contextmanager
def server_process(port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, __file__, "--serve", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def session(port: int) -> socket.socket:
    """A websocket by hand."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.sendall(
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    received = b""
    while b"\r\n\r\n" not in received or len(received.partition(b"\r\n\r\n")[2]) < 3:  # with the metadata
        received += sock.recv(4096)
    return sock


def stop(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    return seconds(process.wait)


@case("Server: a message in 20,000 empty parts, until it is answered or refused; then SIGTERM")
def _() -> str:
    with server_process() as (process, port), session(port) as sock:
        parts = frame(b"\x80", is_last=False, mask=True) + frame(b"", 0, is_last=False, mask=True) * 20000

        def exchange() -> None:
            with contextlib.suppress(ConnectionError):
                sock.sendall(parts + frame(b"", 0, mask=True))
            sock.recv(4)

        took = seconds(exchange)
        return f"{took}; SIGTERM {stop(process)}"


@case("Server: SIGTERM within a message of 20,000 empty parts, which is never finished")
def _() -> str:
    with server_process() as (process, port), session(port) as sock:

        def flood() -> None:
            with contextlib.suppress(OSError):
                sock.sendall(frame(b"\x80", is_last=False, mask=True))
                while True:
                    sock.sendall(frame(b"", 0, is_last=False, mask=True) * 1000)

        threading.Thread(target=flood, daemon=True).start()
        time.sleep(3)
        return f"SIGTERM {stop(process)}"


@case("Server: SIGTERM while a client does not read a large answer (200 MB)")
def _() -> str:
    with server_process() as (process, port), session(port) as sock:
        sock.sendall(frame(msgpack_numpy.packb({"size": 200_000_000}), mask=True))
        sock.recv(1)
        return f"SIGTERM {stop(process)}"


@case("Server: SIGTERM while a client that was refused (message too large) sends on and on")
def _() -> str:
    with server_process() as (process, port), session(port) as sock:

        def flood() -> None:
            with contextlib.suppress(OSError):
                sock.sendall(struct.pack("!BBQ", 0x82, 0xFF, 2**40) + bytes(4))
                while True:
                    sock.sendall(bytes(10**5))

        threading.Thread(target=flood, daemon=True).start()
        time.sleep(1)
        return f"SIGTERM {stop(process)}"


@case("Server: a client pings without end; another's slowest of 200 answers")
def _() -> str:
    with server_process() as (_, port), session(port) as sock:
        over = threading.Event()

        def flood() -> None:
            with contextlib.suppress(OSError):
                while not over.is_set():
                    sock.sendall(frame(b"", 9, mask=True) * 100)

        threading.Thread(target=flood, daemon=True).start()
        times = []
        with WebsocketClientPolicy("127.0.0.1", port) as client:
            for _ in range(200):
                start_s = time.monotonic()
                client.infer({"x": 1})
                times.append(time.monotonic() - start_s)
        over.set()
        return f"{1000 * max(times):.1f} ms, median {1000 * sorted(times)[100]:.2f} ms"


@case("The server is killed during a request and comes back after 10 s: what the robot gets")
def _() -> str:
    with contextlib.ExitStack() as stack:
        process, port = stack.enter_context(server_process())
        client = WebsocketClientPolicy("127.0.0.1", port)
        client.infer({"x": 1})
        outcome: queue.SimpleQueue[str] = queue.SimpleQueue()

        def ask() -> None:
            start_s = time.monotonic()
            try:
                client.infer({"wait_s": 2.0})
                what = "an action as if it were new"
            except Exception as error:
                what = type(error).__name__
            outcome.put(f"{what}, after {time.monotonic() - start_s:.1f} s")
            client.close()

        threading.Thread(target=ask, daemon=True).start()
        time.sleep(1)
        process.kill()
        process.wait()
        time.sleep(10)
        stack.enter_context(server_process(port))
        return outcome.get(timeout=GIVEN_UP_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--title", default="Now")
    parser.add_argument("--only", default="")
    parser.add_argument("--serve", type=int)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return
    rows = []
    for title, function in CASES:
        if arguments.only in title:
            try:
                measured = function()
            except Exception as error:
                measured = f"{type(error).__name__}: {error}"
            rows.append(f"| {title} | {measured} |")
            print(rows[-1], flush=True)
    load = os.getloadavg()[0]
    where = f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, load average {load:.1f}"
    if arguments.report:
        table = "\n".join([f"## {arguments.title}", "", where, "", "| case | measured |", "|---|---|", *rows, ""])
        with arguments.report.open("a") as report:
            report.write(table + "\n")
    os._exit(0)  # Threads may hang in what was given up.


if __name__ == "__main__":
    main()
