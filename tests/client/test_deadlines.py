"""Limits of time hold whatever the peer does, and an answer to an old observation is not taken for a new one."""

import contextlib
import http.client
import itertools
import json
import os
import resource
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from websockets.frames import Frame, Opcode

import serving_live
from bad_peers import bad_server, binary, greet, masked, raw_session, read_message, trickle, upgrade
from openpi.serving import connection as server_connection
from openpi.serving.access import Limits
from openpi_client import freshness, msgpack_numpy, sockets, stream, websocket_client_policy
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.deadline import Deadline
from openpi_client.positronic_client import PositronicClient
from openpi_client.websocket_client_policy import StaleAnswerError, WebsocketClientPolicy
from serving_live import PATIENCE_S, ServerProcess, TestPolicy, server_thread, until

LIMIT_S = 0.3
# Far more than any limit here, and far less than what the faults cost: others load the machine.
SOON_S = 10.0
HUGE = {"image": np.zeros((4000, 4000, 3), np.uint8)}  # more than the buffers of a connection take
ANSWER = msgpack_numpy.packb({"actions": np.zeros((4, 2))})


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(websocket_client_policy, "_RETRY_INTERVAL_S", 0.02)


@contextlib.contextmanager
def soon():
    """What is inside ends soon."""
    start_s = time.monotonic()
    yield
    assert time.monotonic() - start_s < SOON_S


# Servers that misbehave: what they do behind the greeting


def silent(sock, over):
    over.wait(PATIENCE_S)


def trickling(sock, over):
    read_message(sock)
    trickle(sock, binary(ANSWER), over)


def pinging(sock, over):
    with contextlib.suppress(OSError):
        while not over.is_set():
            sock.sendall(Frame(Opcode.PING, b"").serialize(mask=False))
            over.wait(0.02)


def in_parts(sock, over):
    read_message(sock)
    sock.sendall(binary(b"\x80", is_last=False))
    part = Frame(Opcode.CONT, bytes(2000), False).serialize(mask=False)
    while not over.wait(0.02):
        sock.sendall(part)


@pytest.mark.parametrize("behave", [silent, trickling, pinging, in_parts])
@pytest.mark.parametrize("protocol", ["openpi", "positronic"])
def test_a_request_ends_within_its_limit(protocol, behave):
    def serve(sock, over):
        greet(sock, {"meta": {}})
        behave(sock, over)

    with bad_server(serve) as port, client_of(protocol, port, request_timeout_s=LIMIT_S) as client:
        # The bytes would go on for 7 s and more.
        start_s = time.monotonic()
        with pytest.raises(TimeoutError, match=r"gave no answer within 0.3 s \(request_timeout_s\)"):
            client.infer({"x": 1.0})
        assert time.monotonic() - start_s < 3.0


@pytest.mark.parametrize("protocol", ["openpi", "positronic"])
def test_so_does_one_that_the_server_does_not_read(protocol):
    def serve(sock, over):
        greet(sock, {"meta": {}})
        over.wait(PATIENCE_S)

    with (
        bad_server(serve) as port,
        client_of(protocol, port, request_timeout_s=LIMIT_S, resize=None) as client,
        soon(),
        pytest.raises(TimeoutError, match=r"within 0\.3 s"),
    ):
        client.infer(HUGE)


def client_of(protocol: str, port: int, **options):
    if protocol == "positronic":
        return PositronicClient("127.0.0.1", port, **options)
    options.pop("resize", None)
    return WebsocketClientPolicy("127.0.0.1", port, **options)


def silent_handshake(sock, over):
    over.wait(PATIENCE_S)


def trickling_handshake(sock, over):
    trickle(sock, b"HTTP/1.1 101 Switching Protocols\r\n" * 10, over)


def trickling_refusal(sock, over):
    sock.recv(4096)
    sock.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 1000\r\n\r\n")
    trickle(sock, b"x" * 1000, over)


def trickling_metadata(sock, over):
    upgrade(sock)
    trickle(sock, binary(ANSWER), over)


@pytest.mark.parametrize(
    ("behave", "scheme", "has_proxy"),
    [
        (silent_handshake, "ws", False),
        (trickling_handshake, "ws", False),
        (trickling_refusal, "ws", False),
        (trickling_metadata, "ws", False),
        (silent_handshake, "wss", False),
        (trickling_handshake, "wss", False),
        (trickling_handshake, "ws", True),
    ],
)
def test_connecting_ends_within_its_limit(behave, scheme, has_proxy, monkeypatch):
    with bad_server(behave) as port:
        if has_proxy:
            monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        host = "policy.test" if has_proxy else "127.0.0.1"
        start_s = time.monotonic()
        with pytest.raises((TimeoutError, OSError, EOFError)):
            WebsocketClientPolicy(f"{scheme}://{host}:{port}", connect_timeout_s=LIMIT_S)
        assert time.monotonic() - start_s < 3.0


def test_looking_up_a_name_ends_within_the_limit(monkeypatch):
    over = threading.Event()
    real = socket.getaddrinfo

    def slow(host, *args, **kwargs):
        if host == "robots.lab" and not kwargs.get("flags"):
            over.wait(PATIENCE_S)
        return real(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with soon(), pytest.raises(TimeoutError, match=r"no policy server at ws://robots\.lab"):
        WebsocketClientPolicy("robots.lab", 8000, connect_timeout_s=LIMIT_S)
    over.set()


def test_an_address_out_of_reach_leaves_the_next_one_its_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as full, socket.create_server(("127.0.0.1", 0)) as there:
        full.listen(0)
        waiting = [socket.socket() for _ in range(3)]  # nobody accepts, and the queue is full
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        infos = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each.getsockname()) for each in (full, there)]
        monkeypatch.setattr(sockets, "_resolve", lambda *_: infos)
        with soon(), sockets.connect("two.lab", 0, Deadline(2.0)) as sock:
            assert sock.getpeername() == there.getsockname()
        for sock in waiting:
            sock.close()


def test_a_signal_that_comes_again_and_again_does_not_extend_a_limit():
    """As a profiler's does; on some ways of waiting each starts the wait anew."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        left, right = socket.socketpair()
        with soon(), left, right, pytest.raises(stream.SilenceError):
            stream.MessageStream(left, is_client=True).read(LIMIT_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_clock_of_the_wall_does_not_matter(monkeypatch):
    with (
        server_thread(TestPolicy) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port, request_timeout_s=5) as client,
    ):
        jumps = itertools.cycle([0.0, 1e10, -1e9])
        monkeypatch.setattr(time, "time", lambda: next(jumps))
        for i in range(5):
            result = client.infer({"x": float(i)})
            assert result["actions"][0, 0] == i and 0 <= result["obs_age_s"] < SOON_S


@pytest.mark.parametrize(
    "actions", [np.full((4, 2), np.nan), np.array([[0, np.inf]], np.float32), [[0.0, float("nan")]]]
)
def test_actions_that_are_not_finite_reach_no_robot(actions):
    def serve(sock, over):
        greet(sock)
        for answer in (msgpack_numpy.packb({"actions": actions, "extra": np.array([np.nan])}), ANSWER):
            read_message(sock)
            sock.sendall(binary(answer))
        over.wait(PATIENCE_S)

    with bad_server(serve) as port, WebsocketClientPolicy("127.0.0.1", port) as client:
        with pytest.raises(ValueError, match=r"the answer has (nan|inf) in 'actions.*; expected finite numbers"):
            client.infer({})
        assert client.infer({})["actions"].shape == (4, 2)


@pytest.mark.parametrize(
    "options", [{"request_timeout_s": -1}, {"max_age_s": float("nan")}, {"connect_timeout_s": "soon"}]
)
def test_what_is_no_number_of_seconds_is_refused(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; expected seconds, 0 or more"):
        WebsocketClientPolicy("127.0.0.1", 1, **options)


# By default


def test_after_the_first_answer_a_request_has_a_limit_by_default(monkeypatch):
    monkeypatch.setattr(websocket_client_policy, "_REQUEST_TIMEOUT_S", LIMIT_S)

    def serve(sock, over):
        greet(sock)
        read_message(sock)
        over.wait(3 * LIMIT_S)  # It compiles.
        sock.sendall(binary(ANSWER))
        over.wait(PATIENCE_S)

    with bad_server(serve) as port, WebsocketClientPolicy("127.0.0.1", port) as client:
        assert client.infer({"x": 1.0})["obs_age_s"] > 2 * LIMIT_S
        with soon(), pytest.raises(TimeoutError, match=r"within 0\.3 s"):
            client.infer({"x": 1.0})


# Closing


@pytest.mark.parametrize("protocol", ["openpi", "positronic"])
def test_closing_a_client_ends_a_call_of_another_thread(protocol):
    asked = threading.Event()

    def serve(sock, over):
        greet(sock, {"meta": {}})
        read_message(sock)
        asked.set()
        over.wait(PATIENCE_S)

    with bad_server(serve) as port, ThreadPoolExecutor(2) as pool, soon():
        client = client_of(protocol, port)
        calls = [pool.submit(client.infer, {"x": 1.0}) for _ in range(2 if protocol == "openpi" else 1)]
        assert asked.wait(PATIENCE_S)
        client.close()
        for call in calls:
            with pytest.raises(ConnectionError, match="was closed"):
                call.result(PATIENCE_S)


def test_closing_a_client_ends_its_search_for_a_lost_server(monkeypatch):
    monkeypatch.setattr(websocket_client_policy, "_RETRY_INTERVAL_S", PATIENCE_S)
    searching = threading.Event()
    monkeypatch.setattr(websocket_client_policy.logger, "log", lambda *_: searching.set())
    with ServerProcess() as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port, reconnect_timeout_s=10 * PATIENCE_S)
    with ThreadPoolExecutor(1) as pool, soon():
        call = pool.submit(client.infer, {"x": 1.0})
        assert searching.wait(PATIENCE_S)
        client.close()
        with pytest.raises(ConnectionError, match="was closed"):
            call.result(PATIENCE_S)


# Old observations


def flaky(answer_after: int, metadata: dict | None = None, pause_s: float = 0.0):
    """A server whose first connections end with the request; later ones answer."""
    connections = itertools.count()

    def serve(sock, over):
        is_first = next(connections) < answer_after
        greet(sock, metadata)
        with contextlib.suppress(ConnectionResetError):
            while True:
                read_message(sock)
                if is_first:
                    over.wait(pause_s)
                    return
                sock.sendall(binary(ANSWER))

    return serve


CONTRACT = {"contract": {"actions": {"horizon": 10}, "control_hz": 20.0}}


def test_a_request_that_is_sent_again_too_late_raises_and_the_next_one_is_answered():
    with (
        bad_server(flaky(1, CONTRACT, pause_s=0.7)) as port,
        WebsocketClientPolicy("127.0.0.1", port) as client,
    ):
        with pytest.raises(StaleAnswerError, match=r"is 0\.\d s old, and answered up to 0.5 s \(max_age_s\)"):
            client.infer({"x": 1.0})
        assert client.infer({"x": 2.0})["obs_age_s"] < 0.5


@pytest.mark.parametrize(("metadata", "max_age_s"), [({}, "chunk"), (CONTRACT, None), (CONTRACT, 5.0)])
def test_in_time_or_where_any_age_will_do_it_is_answered(metadata, max_age_s):
    with (
        bad_server(flaky(1, metadata, pause_s=0.6)) as port,
        WebsocketClientPolicy("127.0.0.1", port, max_age_s=max_age_s) as client,
    ):
        assert client.infer({"x": 1.0})["obs_age_s"] > 0.5


def test_an_answer_that_comes_too_late_on_a_new_connection_is_not_waited_for():
    connections = itertools.count()

    def serve(sock, over):
        is_first = next(connections) == 0
        greet(sock, CONTRACT)
        read_message(sock)
        over.wait(0.0 if is_first else PATIENCE_S)

    with (
        bad_server(serve) as port,
        WebsocketClientPolicy("127.0.0.1", port) as client,
        soon(),
        pytest.raises(StaleAnswerError),
    ):
        client.infer({"x": 1.0})


def test_a_server_that_lost_its_connection_while_it_was_idle_counts_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(freshness, "_CHUNK_S", 0.001)
    with ServerProcess() as server:
        client = WebsocketClientPolicy("127.0.0.1", server.port)
        server.kill()
        with ThreadPoolExecutor(1) as pool:
            old = pool.submit(client.infer, {"x": 1.0})
            with ServerProcess(server.port), pytest.raises(StaleAnswerError):  # which takes longer to start
                old.result(PATIENCE_S)
            client.close()


@pytest.mark.parametrize(
    ("metadata", "seconds"),
    [
        (CONTRACT, 0.5),
        ({}, None),
        ({"contract": None}, None),
        ({"contract": {"actions": {"horizon": 10}, "control_hz": None}}, None),
        ({"contract": {"actions": {"horizon": True}, "control_hz": float("nan")}}, None),
        ({"contract": {"actions": [], "control_hz": "20"}}, None),
    ],
)
def test_how_long_a_chunk_lasts_is_taken_from_the_contract_if_it_tells(metadata, seconds):
    assert freshness.chunk_s(metadata) == seconds


def test_a_batch_tells_the_age_of_each_observation():
    with server_thread(TestPolicy) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        good, bad = client.infer_batch([{"x": 1.0}, {"refuse": "no"}])
        assert 0 <= good["obs_age_s"] < SOON_S
        assert set(bad) == {"error"}


def test_the_broker_never_plays_what_was_too_old_and_tells_the_age_of_each_row():
    with bad_server(flaky(1, CONTRACT, pause_s=0.7)) as port, WebsocketClientPolicy("127.0.0.1", port) as client:
        broker = ActionChunkBroker(client, action_horizon=4)
        with pytest.raises(StaleAnswerError):
            broker.infer({"x": 1.0})
        ages = [broker.infer({"x": 2.0})["obs_age_s"] for _ in range(4)]
        assert ages == sorted(ages) and len(set(ages)) == 4


# Answers


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"\x91" * 70 + b"\x80", "nested more than 64 deep"),
        (msgpack_numpy.packb([[]] * 2**15) * 40, "holds more than 1048576 values"),
        (b"\xdd\x7f\xff\xff\xff" * 3, "claims 6442450941 values"),
        (msgpack_numpy.packb([1]), "sent a list of int; expected a map"),
    ],
)
def test_an_answer_that_would_unpack_to_too_much_is_refused(answer, message):
    def serve(sock, over):
        greet(sock)
        for content in (answer, ANSWER):
            read_message(sock)
            sock.sendall(binary(content))
        over.wait(PATIENCE_S)

    with bad_server(serve) as port, WebsocketClientPolicy("127.0.0.1", port) as client:
        with pytest.raises(ValueError, match=message):
            client.infer({"x": 1.0})
        assert client.infer({"x": 1.0})["actions"].shape == (4, 2)  # the session goes on


def test_an_answer_of_too_many_bytes_ends_the_connection_before_it_is_received():
    def serve(sock, over):
        greet(sock)
        read_message(sock)
        sock.sendall(struct.pack("!BBQ", 0x82, 127, 2**62))
        over.wait(PATIENCE_S)

    text = r"the answer of .* was refused: 1009 message of 4611686018427387904 bytes; at most 268435456 are taken"
    with (
        bad_server(serve) as port,
        WebsocketClientPolicy("127.0.0.1", port) as client,
        pytest.raises(ConnectionError, match=text),
    ):
        client.infer({"x": 1.0})


def test_a_message_that_nobody_asked_for_is_never_the_answer_to_the_next_request():
    later = threading.Event()

    def serve(sock, over):
        greet(sock)
        read_message(sock)
        twice = binary(msgpack_numpy.packb({"number": 1})) + binary(msgpack_numpy.packb({"number": 2}))[:-1]
        if later.is_set():
            twice = binary(msgpack_numpy.packb({"number": 3}))
        sock.sendall(twice)
        over.wait(PATIENCE_S)

    with bad_server(serve) as port, WebsocketClientPolicy("127.0.0.1", port) as client:
        assert client.infer({})["number"] == 1
        later.set()
        assert client.infer({})["number"] == 3


# Many descriptors


def test_clients_work_with_thousands_of_descriptors_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        with contextlib.ExitStack() as stack:
            for _ in range(1500):
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            _, port = stack.enter_context(server_thread(TestPolicy))
            with WebsocketClientPolicy("127.0.0.1", port, request_timeout_s=PATIENCE_S) as client:
                assert client.infer(HUGE)["actions"].shape == (4, 2)
            with PositronicClient("127.0.0.1", port) as client:
                assert len(client.infer({"x": 1.0})) == 4
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# The server


def test_a_message_of_empty_parts_is_refused_at_once():
    with server_thread(TestPolicy) as (_, port), raw_session(port) as sock, soon():
        sock.sendall(masked(Opcode.BINARY, b"\x80", is_last=False))
        with contextlib.suppress(ConnectionError):
            sock.sendall(masked(Opcode.CONT, b"", is_last=False) * 20_000)
        assert sock.recv(4)[2:4] == (1008).to_bytes(2, "big")


@pytest.mark.parametrize("num_parts", [1, 2])
def test_text_of_megabytes_ends_its_session_without_being_decoded(num_parts):
    part = "é".encode() * (2**20 // num_parts)
    with server_thread(TestPolicy) as (_, port), raw_session(port) as sock, soon():
        for i in range(num_parts):
            opcode = Opcode.TEXT if i == 0 else Opcode.CONT
            sock.sendall(masked(opcode, part, is_last=i == num_parts - 1))
        assert sock.recv(4)[2:4] == (1009).to_bytes(2, "big")


def test_a_message_in_many_parts_of_some_size_is_taken_with_pings_between():
    content = msgpack_numpy.packb({"x": np.ones(10**6)})
    parts = [content[i : i + 4000] for i in range(0, len(content), 4000)]
    with server_thread(TestPolicy) as (_, port), raw_session(port) as sock:
        for i, part in enumerate(parts):
            opcode = Opcode.BINARY if i == 0 else Opcode.CONT
            ping = masked(Opcode.PING, b"") if i % 100 == 0 else b""
            sock.sendall(masked(opcode, part, is_last=i == len(parts) - 1) + ping)
        while (head := sock.recv(2))[0] == 0x8A:  # pongs
            pass
        assert head[0] == 0x82


def test_a_client_that_pings_without_end_is_sent_away_and_disturbs_nobody():
    with server_thread(TestPolicy) as (_, port), raw_session(port) as sock, soon():
        with WebsocketClientPolicy("127.0.0.1", port) as client, contextlib.suppress(OSError):
            for _ in range(100):
                sock.sendall(masked(Opcode.PING, b"") * 100)
                assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := sock.recv(2**16):
                received += part
        assert len(received) < 100 * 100


def pong(sock):
    sock.sendall(masked(Opcode.PONG, b""))


def byte_of_a_message(sock):
    sock.sendall(b"\x00")


@pytest.mark.parametrize("send", [pong, byte_of_a_message])
def test_only_requests_keep_a_session_open(send):
    """Neither pongs nor bytes that trickle."""
    with (
        server_thread(TestPolicy, limits=Limits(idle_timeout_s=LIMIT_S)) as (_, port),
        raw_session(port) as sock,
        soon(),
    ):
        sock.sendall(struct.pack("!BBQ", 0x82, 0xFF, 10**6) + bytes(4) if send is byte_of_a_message else b"")
        sock.settimeout(0.05)
        received = b""
        with contextlib.suppress(ConnectionError):
            while b"no request for 0.3 s" not in received:
                send(sock)
                with contextlib.suppress(TimeoutError):
                    received += sock.recv(1000)
        assert b"no request for 0.3 s" in received


def test_a_message_that_does_not_become_whole_ends_the_session(monkeypatch):
    monkeypatch.setattr(server_connection, "_MESSAGE_TIMEOUT_S", LIMIT_S)
    monkeypatch.setattr(server_connection, "_PING_INTERVAL_S", 0.1)
    with server_thread(TestPolicy) as (_, port), raw_session(port) as sock, soon():
        sock.sendall(struct.pack("!BBQ", 0x82, 0xFF, 10**6) + bytes(4))
        received = b""
        with contextlib.suppress(OSError):
            while b"not whole after 0.3 s" not in received:
                sock.sendall(b"\x00")
                received += sock.recv(1000)
        assert b"not whole after 0.3 s" in received


@pytest.mark.parametrize("max_sessions", [1, 2])
def test_a_client_that_reads_no_pings_while_it_pauses_keeps_its_place_while_nobody_wants_it(monkeypatch, max_sessions):
    """As libraries without a thread of their own do, while somebody puts the objects back."""
    monkeypatch.setattr(server_connection, "_PING_INTERVAL_S", 0.1)
    limits = Limits(max_sessions=max_sessions)
    with server_thread(TestPolicy, limits=limits) as (_, port), raw_session(port) as sock, soon():
        received = b""
        with contextlib.suppress(ConnectionError):
            while received.count(b"\x89\x00") < 4 and (part := sock.recv(1000)):
                received += part
        assert (received.count(b"\x89\x00") >= 4) == (max_sessions == 2)
        if max_sessions == 2:
            sock.sendall(masked(Opcode.BINARY, msgpack_numpy.packb({"x": 1.0})))
            while b"actions" not in received:
                received += sock.recv(1000)


@pytest.fixture
def large(monkeypatch):
    """The name of an answer that is larger than the buffers of a connection."""
    monkeypatch.setitem(serving_live.REPLIES, "large", np.zeros(10**8, np.uint8))
    return masked(Opcode.BINARY, msgpack_numpy.packb({"reply": "large"}))


def num_sessions(port: int) -> int:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as page:
        page.request("GET", "/status.json")
        return len(json.loads(page.getresponse().read())["sessions"])


def test_a_client_that_does_not_read_its_answer_is_cut_and_costs_nobody_else(large):
    limits = Limits(send_timeout_s=LIMIT_S)
    with server_thread(TestPolicy, limits=limits) as (_, port), raw_session(port) as sock, soon():
        sock.sendall(large)
        assert sock.recv(1)
        with WebsocketClientPolicy("127.0.0.1", port) as client:
            assert client.infer({"x": 1.0})["actions"][0, 0] == 1.0
            until(lambda: num_sessions(port) == 1)


def unread(sock, large):
    sock.sendall(large)
    assert sock.recv(1)


def refused(sock, large):
    sock.sendall(struct.pack("!BBQ", 0x82, 0xFF, 2**40) + bytes(4))
    assert sock.recv(1)


def in_the_middle(sock, large):
    sock.sendall(struct.pack("!BBQ", 0x82, 0xFF, 2**20) + bytes(4))


@pytest.mark.parametrize("begin", [unread, refused, in_the_middle])
def test_a_server_ends_within_seconds_whatever_its_clients_do(begin, large):
    over = threading.Event()

    def send_on(sock):
        with contextlib.suppress(OSError):
            while not over.wait(0.01):
                sock.sendall(bytes(100))

    with server_thread(TestPolicy) as (server, port), raw_session(port) as sock, ThreadPoolExecutor(1) as pool:
        begin(sock, large)
        if begin is not unread:
            pool.submit(send_on, sock)
        start_s = time.monotonic()
        server.stop()
        until(lambda: not any(thread.name == "openpi-session" for thread in threading.enumerate()))
        assert time.monotonic() - start_s < SOON_S
        over.set()
