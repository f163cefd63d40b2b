"""Images through shared memory: the same answers, nothing left behind, and nothing to forge."""

import contextlib
import mmap
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import websockets.sync.client
from websockets.datastructures import Headers

from openpi.policies.guards import ObservationError
from openpi.serving.access import Limits
from openpi.serving.shared_memory import SharedMemory
from openpi_client import connection, msgpack_numpy, shared_memory, websocket_client_policy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import PATIENCE_S, ServerProcess, TestPolicy, get, held_by, raw_connection, server_thread

pytestmark = pytest.mark.skipif(not shared_memory.is_supported(), reason="needs memory files (Linux)")

FRAMES = np.arange(3 * 2**20, dtype=np.uint8).reshape(4, 512, 512, 3)
ASKING = {connection.FEATURES_HEADER: shared_memory.FEATURE}


def wait_until(is_so, what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s, what
        threading.Event().wait(0.01)


@contextlib.contextmanager
def sharing_connection(port: int):
    """A client of the websockets library that asked for shared memory, and the file that it was offered."""
    with raw_connection(port, additional_headers=ASKING) as ws:
        pid, fd, _ = ws.response.headers[shared_memory.HEADER].split("/")
        with Path(f"/proc/{pid}/fd/{fd}").open("r+b", buffering=0) as file:
            ws.recv(PATIENCE_S)
            yield ws, file


def shared(offset: int, count: int, *, shape=None) -> dict:
    """A message whose array lies in shared memory."""
    place = {shared_memory.KEY: [offset, count]}
    return {"x": {b"__ndarray__": True, b"data": place, b"dtype": "|u1", b"shape": shape or [count]}}


def asked(ws, message: dict):
    ws.send(msgpack_numpy.packb(message))
    answer = ws.recv(PATIENCE_S)
    return answer if isinstance(answer, str) else msgpack_numpy.unpackb(answer)


def received_bytes(port: int) -> float:
    return float(get(port, "/metrics")[2].partition('openpi_received_bytes_total{model="default"} ')[2].split()[0])


def test_answers_are_the_same_and_the_images_do_not_go_over_the_socket():
    policy = TestPolicy()
    with server_thread(lambda: policy, shared_memory=True) as (_, port):
        with WebsocketClientPolicy("127.0.0.1", port) as client:
            for i in range(3):
                result = client.infer({"x": FRAMES[i:, ::-1], "images": {"a": FRAMES[i].T}, "name": "small"})
                assert result["actions"][0, 0] == np.float32(FRAMES[i:].sum())
            batch = client.infer_batch([{"x": FRAMES[0]}, {"x": FRAMES[1]}])
            assert [item["actions"][0, 0] for item in batch] == [FRAMES[0].sum(), FRAMES[1].sum()]
        assert received_bytes(port) < 10_000
        assert re.search(r"openpi_shared_memory_bytes_total (\S+)", get(port, "/metrics")[2]).group(1) != "0.0"
    # Copies: the requests that followed have not changed what the first ones held.
    for i in range(3):
        np.testing.assert_array_equal(policy.seen[i]["x"], FRAMES[i:, ::-1])
        np.testing.assert_array_equal(policy.seen[i]["images"]["a"], FRAMES[i].T)
        assert not policy.seen[i]["x"].flags.writeable
    assert held_by(os.getpid()) == set()


def test_threads_that_share_a_client_and_clients_beside_each_other_get_their_own_answers():
    def ask(client: WebsocketClientPolicy, number: int) -> bool:
        frames = np.full((64, 64, 3), number, np.uint8)
        return bool(client.infer({"x": frames})["actions"][0, 0] == np.float32(frames.sum()))

    with (
        server_thread(TestPolicy, shared_memory=True) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as one,
        WebsocketClientPolicy("127.0.0.1", port) as other,
        ThreadPoolExecutor(4) as pool,
    ):
        assert all(pool.map(lambda i: ask(one if i % 2 else other, i), range(60)))


def test_only_those_who_ask_from_this_host_are_offered_memory():
    with server_thread(TestPolicy, shared_memory=True) as (_, port):
        for path, headers in (("/", {}), ("/api/v1/session", ASKING)):
            uri = f"ws://127.0.0.1:{port}{path}"
            with websockets.sync.client.connect(uri, additional_headers=headers, legacy=True) as ws:
                assert shared_memory.HEADER not in ws.response.headers
        with raw_connection(port) as ws:
            ws.recv(PATIENCE_S)
            assert "this session has none" in asked(ws, shared(0, 8))
            assert asked(ws, {"x": 1.0})["actions"][0, 0] == 1.0
    with server_thread(TestPolicy) as (_, port), raw_connection(port, additional_headers=ASKING) as ws:
        assert shared_memory.HEADER not in ws.response.headers
    for peer in ("192.168.1.20", "::ffff:10.0.0.1", "fe80::1%eth0"):
        assert SharedMemory.open_for(Headers(ASKING), peer, 2**20) is None
    for peer in ("127.0.0.1", "127.8.0.1", "::1", "::ffff:127.0.0.1"):
        memory = SharedMemory.open_for(Headers(ASKING), peer, 2**20)
        assert memory is not None
        memory.close()


SIZE = 600_000
FORGED = [
    (shared(0, SIZE + mmap.PAGESIZE), "where nothing was written"),
    (shared(2**62, 16), "where nothing was written"),
    (shared(2**20 - 8, 16), f"bytes {2**20 - 8} to {2**20 + 8} of the shared memory"),
    (shared(-16, 16), "expected [offset >= 0, count > 0]"),
    (shared(16, -16, shape=[16]), "expected [offset >= 0, count > 0]"),
    (shared(0, 2**40), "more than 1048576 bytes in shared memory"),
    ({str(i): shared(0, SIZE)["x"] for i in range(2)}, "more than 1048576 bytes in shared memory"),
    ({"x": {shared_memory.KEY: "/dev/shm/other"}}, "a place in shared memory is '/dev/shm/other'"),
    ({"x": {shared_memory.KEY: [0.0, True]}}, "expected [offset >= 0, count > 0]"),
]


def test_forged_references_are_refused_and_the_session_lives_on():
    limits = Limits(max_message_bytes=2**20)
    with (
        server_thread(TestPolicy, shared_memory=True, limits=limits) as (_, port),
        sharing_connection(port) as (ws, file),
    ):
        os.pwrite(file.fileno(), bytes(range(100)) * (SIZE // 100), 0)
        for message, told in FORGED:
            answer = asked(ws, message)
            assert isinstance(answer, str) and answer.startswith("ObservationError: ") and told in answer, answer
            assert asked(ws, shared(8, 8))["actions"][0, 0] == sum(range(8, 16))
        for size in (0, 2**21):  # A server that reads behind the end would be killed.
            with pytest.raises(PermissionError):
                os.truncate(file.fileno(), size)


@hypothesis.given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_whatever_stands_for_a_place_is_an_error_that_says_so(place):
    memory = SharedMemory(2**20)
    try:
        with pytest.raises(ObservationError, match="shared memory"):
            memory.reader()(place)
    finally:
        memory.close()


def test_a_client_that_is_killed_leaves_nothing_behind():
    program = (
        "import numpy as np, sys\n"
        "from openpi_client.websocket_client_policy import WebsocketClientPolicy\n"
        "client = WebsocketClientPolicy('127.0.0.1', int(sys.argv[1]))\n"
        "print(client.infer({'x': np.ones(2**20, np.uint8)})['actions'][0, 0], flush=True)\n"
        "sys.stdin.read()\n"
    )
    with ServerProcess() as server:
        command = [sys.executable, "-c", program, str(server.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as robot:
            assert robot.stdout is not None and float(robot.stdout.readline()) == 2**20
            assert len(held_by(server.pid)) == 1 and held_by(robot.pid) == held_by(server.pid)
            robot.kill()
        wait_until(lambda: not held_by(server.pid), "the server still has the memory of a client that was killed")
        with WebsocketClientPolicy("127.0.0.1", server.port) as client:
            assert client.infer({"x": FRAMES})["actions"][0, 0] == np.float32(FRAMES.sum())


def test_a_request_under_way_when_the_server_is_killed_is_written_again_for_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(websocket_client_policy, "_RETRY_INTERVAL_S", 0.02)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ServerProcess() as server, ThreadPoolExecutor(1) as pool:
        client = WebsocketClientPolicy("127.0.0.1", server.port, max_age_s=None)
        answer = pool.submit(client.infer, {"wait_for": str(pipe), "x": FRAMES})
        assert server.line() == "inferring"
        server.kill()
        with ServerProcess(server.port) as successor:
            assert successor.line() == "inferring"
            pipe.write_text("go on")
            assert answer.result(PATIENCE_S)["actions"][0, 0] == np.float32(FRAMES.sum())
            assert held_by(os.getpid()) == held_by(successor.pid) != set()
            client.close()
    assert held_by(os.getpid()) == set()


def test_arrays_for_which_there_is_no_room_go_over_the_socket():
    parts = [np.full(18_000, i, np.uint8) for i in range(8)]
    limits = Limits(max_message_bytes=100_000)
    with (
        server_thread(TestPolicy, shared_memory=True, limits=limits) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        for _ in range(2):
            answers = client.infer_batch([{"x": part} for part in parts])
            assert [item["actions"][0, 0] for item in answers] == [18_000 * i for i in range(8)]
        assert 2 * 3 * 18_000 < received_bytes(port) < 2 * 4 * 18_000


def test_a_client_that_does_not_find_the_memory_uses_the_socket(tmp_path, monkeypatch):
    (tmp_path / "self").symlink_to("/proc/self")
    with ServerProcess() as server:
        monkeypatch.setattr(shared_memory, "PROCESSES", tmp_path)  # as in a container of its own
        with WebsocketClientPolicy("127.0.0.1", server.port) as client:
            assert client.infer({"x": FRAMES})["actions"][0, 0] == np.float32(FRAMES.sum())
        assert received_bytes(server.port) > FRAMES.nbytes


def test_a_file_that_is_not_the_one_offered_is_not_written_to(tmp_path):
    name = f"openpi-{'0' * 32}"
    path = tmp_path / name
    path.write_bytes(bytes(2**20))
    arrays = shared_memory.SharedArrays()
    with path.open("r+b") as file:
        arrays.open(f"{os.getpid()}/{file.fileno()}/{name}")
        assert arrays.pack(FRAMES)[b"data"] == FRAMES.tobytes()
    for offer in ("", "1/2", f"../{os.getpid()}/3/{name}", "1/2/openpi-../../x"):
        arrays.open(offer)
        assert arrays.pack(FRAMES)[b"data"] == FRAMES.tobytes()
    assert path.read_bytes() == bytes(2**20)
