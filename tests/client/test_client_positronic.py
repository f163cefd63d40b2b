"""The client of `/api/v1/session`, against a server that says what was recorded."""

import contextlib
import queue
import threading
from pathlib import Path

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.server

from openpi_client import msgpack_numpy, positronic_client
from openpi_client.positronic_client import PositronicClient
from openpi_positronic.codecs.catalog import get_codec


@pytest.fixture
def recorded(golden) -> Path:
    return golden / "wire" / "positronic_session"


class Server:
    """Answers each session with frames in order: some at once, then one per request. Keeps what it was sent."""

    def __init__(self):
        self.greeting: list[bytes] = []
        self.replies: list[bytes] = []
        self.close: tuple[int, str] | None = None
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.port = 0

    def handle(self, ws) -> None:
        self.paths.append(ws.request.path)
        self.keys.append(ws.request.headers.get("Authorization"))
        for frame in self.greeting:
            ws.send(frame)
        if self.close is not None:
            ws.close(*self.close)
            return
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            for frame in self.replies:
                self.requests.put(ws.recv())
                ws.send(frame)
            ws.recv()


@pytest.fixture
def server():
    server = Server()
    with websockets.sync.server.serve(server.handle, "127.0.0.1", 0, compression=None) as listening:
        server.port = listening.socket.getsockname()[1]
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield server
        listening.shutdown()
        thread.join()


@pytest.fixture
def client(server):
    with PositronicClient("127.0.0.1", server.port) as client:
        yield client


def test_the_recorded_session_is_spoken_byte_for_byte(server, client, recorded):
    server.greeting = [(recorded / "00_ready.bin").read_bytes()]
    server.replies = [
        (recorded / name).read_bytes()
        for name in ("01_response.bin", "02_error_session_stays_open.bin", "04_response_after_errors.bin")
    ]
    requests = [(recorded / f"{name}.bin").read_bytes() for name in ("01_request", "02_request_missing_grip")]
    first, lacking = map(msgpack_numpy.unpackb, requests)

    steps = client.infer(first)
    expected = msgpack_numpy.unpackb(server.replies[0])["result"]
    assert len(steps) == len(expected) == 15
    for step, known in zip(steps, expected, strict=True):
        np.testing.assert_array_equal(step["robot_command"].pop("pose"), known["robot_command"].pop("pose"))
        assert step == known
    with pytest.raises(RuntimeError, match=r"Server error: .*'grip'"):
        client.infer(lacking)
    assert len(client.infer(first)) == 15  # the session goes on
    assert [server.requests.get(timeout=10) for _ in range(3)] == [requests[0], requests[1], requests[0]]
    assert server.paths == ["/api/v1/session"]
    assert client.meta["type"] == "remote"
    assert client.meta["server.type"] == "openpi"
    assert client.meta["server.checkpoint_id"] == "20000"
    assert client.meta["server.image_sizes"] == [224, 224]


def test_a_reset_is_a_new_session_and_loading_is_waited_for(server, recorded):
    server.greeting = [(recorded / f"20_load_{i}.bin").read_bytes() for i in range(2)]
    with PositronicClient(f"ws://127.0.0.1:{server.port}", None, model_id="10000", api_key="secret") as client:
        client.reset()
        client.reset()
        assert client.meta["server.checkpoint_id"] == "10000"
    assert server.paths == ["/api/v1/session/10000"] * 2
    assert server.keys == ["Bearer secret"] * 2


def test_minimal_servers_say_meta_without_a_status(server, client):
    server.greeting = [msgpack_numpy.packb({"meta": {"a": {"b": 1}}})]
    client.reset()
    assert client.meta == {"type": "remote", "server.a.b": 1}


def test_an_unknown_checkpoint_is_told_in_the_servers_words(server, client, recorded):
    server.greeting = [(recorded / "10_unknown_checkpoint.bin").read_bytes()]
    server.close = (1008, "Checkpoint not found or invalid ID: 777.")
    with pytest.raises(RuntimeError, match="Server error: Checkpoint not found or invalid ID: 777"):
        client.reset()


@pytest.mark.parametrize(
    ("greeting", "error", "message"),
    [
        ([], ConnectionError, "closed the session"),
        ([msgpack_numpy.packb({"status": "dancing"})], RuntimeError, "Unexpected server response"),
        ([msgpack_numpy.packb([1])], RuntimeError, "a list; expected a map"),
        ([msgpack_numpy.packb({"status": "ready", "meta": [1]})], RuntimeError, r"its meta is \[1\]; expected a map"),
        *(
            (
                [msgpack_numpy.packb({"meta": {"image_sizes": sizes}})],
                RuntimeError,
                r"its image_sizes \[width, height\]",
            )
            for sizes in (5, [0, 0], [-4, -4], ["a", "b"], {"left": [640, 0]})  # pictures of one pixel were sent
        ),
    ],
)
def test_what_is_no_greeting_is_an_error(server, client, greeting, error, message):
    server.greeting, server.close = greeting, (1008, "no")
    with pytest.raises(error, match=message):
        client.reset()


def test_silence_while_loading_ends(server, client, monkeypatch):
    monkeypatch.setattr(positronic_client, "_SILENCE_S", 0.05)
    with pytest.raises(TimeoutError, match="said nothing"):
        client.reset()


def test_no_server_is_said_with_the_address():
    with pytest.raises(ConnectionError, match=r"ws://127\.0\.0\.1:1/api/v1/session .*is it running"):
        PositronicClient("127.0.0.1", 1).reset()


def test_a_dropped_session_is_an_error_until_the_next_reset(server, client, recorded):
    server.greeting = [(recorded / "00_ready.bin").read_bytes()]
    client.reset()
    server.close = (1011, "gone")
    client.reset()
    with pytest.raises(ConnectionError, match="ended"):
        client.infer({"x": 1})
    server.close = None
    client.reset()


@pytest.mark.parametrize(
    ("sizes", "resize", "shape", "sent"),
    [
        ([224, 224], 640, (240, 320, 3), (168, 224, 3)),
        ([224, 224], 640, (100, 50, 3), (100, 50, 3)),  # never enlarged
        ({"image.a": [64, 100]}, None, (240, 320, 3), (48, 64, 3)),
        ({"image.b": [64, 100]}, None, (240, 320, 3), (240, 320, 3)),
        ({"image.b": [64, 100]}, 100, (240, 320, 3), (75, 100, 3)),
        (None, 640, (1080, 1920, 3), (360, 640, 3)),
    ],
)
def test_images_are_shrunk_to_what_the_server_wants(server, sizes, resize, shape, sent):
    server.greeting = [
        msgpack_numpy.packb({"status": "ready", "meta": {} if sizes is None else {"image_sizes": sizes}})
    ]
    server.replies = [msgpack_numpy.packb({"result": []})]
    image = np.zeros(shape, np.uint8)
    with PositronicClient("127.0.0.1", server.port, resize=resize) as client:
        assert client.infer({"image.a": image, "pose": np.zeros((4, 5, 2))}) == []
    request = msgpack_numpy.unpackb(server.requests.get(timeout=10))
    assert request["image.a"].shape == sent
    assert request["pose"].shape == (4, 5, 2)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([{"robot_command": {"positions": np.array([0.0, np.nan])}}], r"has nan in 'result/0/robot_command/positions'"),
        ([{"target_grip": float("inf")}], "has inf in 'result/0/target_grip'"),
        ("abc", "answered with 'abc'; expected steps, a list of maps"),
        ([1, 2], r"answered with \[1, 2\]; expected steps"),
        ([{"timestamp": "soon"}], "the timestamp 'soon'; expected seconds"),
    ],
)
def test_steps_that_no_robot_may_carry_out_are_refused(server, result, message):
    server.greeting = [msgpack_numpy.packb({"status": "ready", "meta": {}})]
    server.replies = [msgpack_numpy.packb({"result": result})]
    with (
        PositronicClient("127.0.0.1", server.port, horizon_sec=1.0) as client,
        pytest.raises(ValueError, match=message),
    ):
        client.infer({"x": 1})


def test_steps_beyond_the_horizon_are_dropped(server, recorded):
    server.greeting = [(recorded / "00_ready.bin").read_bytes()]
    server.replies = [(recorded / "01_response.bin").read_bytes()]
    with PositronicClient("127.0.0.1", server.port, horizon_sec=8 / 15) as client:
        assert [step["timestamp"] for step in client.infer({})] == [i / 15 for i in range(8)]


def test_a_codec_of_the_clients_own_serves_a_server_without_one(server, recorded):
    raw = msgpack_numpy.unpackb((recorded / "01_request.bin").read_bytes())
    row = np.array([0.4, 0, 0.4, 0, 1, 0, 0, 0.7], np.float32)
    server.greeting = [msgpack_numpy.packb({"status": "ready", "meta": {}})]
    server.replies = [msgpack_numpy.packb({"result": [{"action": row}] * 20})]
    codec = get_codec("ee")
    with PositronicClient("127.0.0.1", server.port, codec=codec) as client:
        steps = client.infer(raw)
    request = msgpack_numpy.unpackb(server.requests.get(timeout=10))
    np.testing.assert_array_equal(request["observation/state"], codec.encode(raw)["observation/state"])
    assert len(steps) == 15 and steps[0]["robot_command"]["type"] == "cartesian_pos"
