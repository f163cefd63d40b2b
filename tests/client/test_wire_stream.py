"""Websocket messages over real sockets: against the websockets library, in any cut, and with anything for bytes."""

import contextlib
import io
import socket
import ssl
import subprocess
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import websockets.sync.client
from PIL import Image
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side

from openpi.cli.serving.server import tls_context
from openpi.serving import wire
from openpi.serving.openpi_session import OpenpiSession
from openpi_client import msgpack_numpy
from openpi_client.stream import MessageStream, SilenceError, StreamClosed
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from openpi_client.wire_images import with_jpeg
from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.session import PositronicSession
from plain_values import ORDINARY
from serving_live import PATIENCE_S, TestPolicy, server_thread


@contextlib.contextmanager
def pair(**options):
    left, right = socket.socketpair()
    with left, right:
        yield MessageStream(left, is_client=True), MessageStream(right, is_client=False, **options)


def frames(*parts: tuple[Opcode, bytes, bool]) -> bytes:
    return b"".join(Frame(opcode, data, fin).serialize(mask=True) for opcode, data, fin in parts)


MESSAGES = st.lists(st.binary(max_size=300), max_size=5)


@hypothesis.given(MESSAGES, st.sampled_from([0, 125, 126, 65535, 65536, 200_000]))
def test_messages_of_any_length_arrive_as_they_were_sent(messages, large):
    with pair() as (client, server):
        assert_arrive(client, server, messages, large)


@hypothesis.given(MESSAGES, st.sampled_from([0, 65536, 2_000_000]))
def test_so_they_do_on_systems_without_sendmsg(messages, large):
    with pair() as (client, server):
        for end in (client, server):
            end._io._send = lambda parts, sock=end._socket: sock.send(parts[0])
        assert_arrive(client, server, messages, large)


@hypothesis.given(st.data(), MESSAGES, st.sampled_from([0, 125, 126, 65535, 65536]), st.booleans())
def test_the_library_reads_what_we_write_in_any_cut(data, messages, large, is_client):
    left, right = socket.socketpair()
    with left, right:
        ours = MessageStream(left, is_client=is_client)
        for message in [*messages, bytes(large)]:
            assert ours.start_write(message) is None
            ours.ping()
        ours.close(1001, "enough")
        left.shutdown(socket.SHUT_WR)
        sent = b"".join(iter(lambda: right.recv(2**20), b""))
    library = Protocol(Side.SERVER if is_client else Side.CLIENT)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=4)))
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        library.receive_data(sent[start:end])
    *events, end = library.events_received()
    assert [bytes(event.data) for event in events if event.opcode is Opcode.BINARY] == [*messages, bytes(large)]
    assert [event.opcode for event in events[1::2]] == [Opcode.PING] * (len(messages) + 1)
    assert (end.opcode, library.close_rcvd.code, library.close_rcvd.reason) == (Opcode.CLOSE, 1001, "enough")


def assert_arrive(client: MessageStream, server: MessageStream, messages: list[bytes], large: int) -> None:
    sender = threading.Thread(target=lambda: [client.write(message) for message in [*messages, bytes(large)]])
    sender.start()
    assert [bytes(server.read(PATIENCE_S)) for _ in messages] == messages
    assert len(server.read(PATIENCE_S)) == large
    sender.join()
    server.ping()
    client.attend()
    with pytest.raises(SilenceError):
        server.read(0.001)
    assert server.silence_s() < PATIENCE_S


@hypothesis.given(st.data())
def test_masked_messages_in_parts_with_pings_between_arrive_in_any_cut(data):
    content = data.draw(st.binary(min_size=3, max_size=2000))
    cut = data.draw(st.integers(1, len(content) - 1))
    sent = frames(
        (Opcode.BINARY, content[:cut], False), (Opcode.PING, b"there?", True), (Opcode.CONT, content[cut:], True)
    )
    left, right = socket.socketpair()
    with left, right:
        server = MessageStream(right, is_client=False)
        pieces = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=4)))
        for start, end in zip([0, *pieces], [*pieces, len(sent)], strict=True):
            left.sendall(sent[start:end])
            if end < len(sent):
                with pytest.raises(SilenceError):
                    server.read(0.0001)
        assert bytes(server.read(PATIENCE_S)) == content
        assert left.recv(100) == Frame(Opcode.PONG, b"there?").serialize(mask=False)


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.binary(max_size=200))
def test_anything_for_bytes_is_a_message_or_the_end_of_the_connection(data):
    left, right = socket.socketpair()
    with left, right:
        server = MessageStream(right, is_client=False, max_message_bytes=1000)
        left.sendall(data)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(StreamClosed):
            while True:
                server.read(PATIENCE_S)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (Frame(Opcode.BINARY, b"x").serialize(mask=False), 1002),
        (frames((Opcode.CONT, b"x", True)), 1002),
        (frames((Opcode.BINARY, b"x", False), (Opcode.TEXT, b"x", True)), 1002),
        (frames((Opcode.TEXT, b"\xff", True)), 1007),
        (frames((Opcode.BINARY, bytes(2000), True)), 1009),
        (frames((Opcode.BINARY, bytes(600), False), (Opcode.CONT, bytes(600), True)), 1009),
    ],
    # Masks are drawn at random, and names of tests must not be.
    ids=["unmasked", "no beginning", "two beginnings", "no text", "too long", "too long in parts"],
)
def test_a_peer_that_breaks_the_protocol_is_told_the_code(sent, code):
    left, right = socket.socketpair()
    with left, right:
        server = MessageStream(right, is_client=False, max_message_bytes=1000)
        left.sendall(sent)
        with pytest.raises(StreamClosed) as closed:
            server.read(PATIENCE_S)
        assert closed.value.code == code
        assert left.recv(4)[2:4] == code.to_bytes(2, "big")


def test_a_slow_peer_is_not_waited_for():
    with pair() as (client, server):
        rest = server.start_write(bytes(2**24))
        assert rest is not None
        with pytest.raises(StreamClosed, match="took nothing"):
            rest(0.05)
        assert not server.is_open
        assert client.is_open


# Decoders


def recorded(golden) -> list[bytes]:
    return [path.read_bytes() for path in sorted((golden / "wire").glob("*/*.bin"))]


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.data())
def test_damaged_messages_are_ordinary_errors_in_every_session(golden, data):
    message = bytearray(data.draw(st.sampled_from(recorded(golden)) | st.binary(max_size=100)))
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)):
        if place < len(message):
            message[place] = byte
    message = bytes(message[: data.draw(st.integers(0, len(message)))]) if data.draw(st.booleans()) else bytes(message)
    for session in (OpenpiSession(), PositronicSession(get_codec("ee")), PositronicSession()):
        try:
            session.received(message)
        except ORDINARY as error:
            assert session.failed(error)


@pytest.mark.parametrize(
    "item",
    [
        {b"__jpeg__": True, b"data": b"no image"},
        {b"__jpeg__": True, b"data": "text"},
        {b"__jpeg__": True},
    ],
)
def test_damaged_images_are_ordinary_errors(item):
    with pytest.raises(ORDINARY):
        wire.decode(msgpack_numpy.packb({"image": item}))


def test_an_image_that_claims_to_be_enormous_is_refused_before_it_is_decoded():
    buffer = io.BytesIO()
    Image.new("L", (8192, 4096)).save(buffer, "JPEG")
    with pytest.raises(ValueError, match="8192 x 4096; expected 16 million pixels at most"):
        wire.decode(msgpack_numpy.packb({b"__jpeg__": True, b"data": buffer.getvalue()}))


def test_camera_images_may_travel_as_jpeg():
    rows = np.linspace(0, 255, 224, dtype=np.uint8)
    image = np.stack([np.tile(rows, (224, 1))] * 3, -1)
    sent = with_jpeg({"images": {"a": image}, "state": np.zeros(8), "b": [image], "prompt": "x"}, 90)
    message = msgpack_numpy.packb(sent)
    assert len(message) < 2 * image.nbytes / 10
    got = wire.decode(message)
    for decoded in (got["images"]["a"], got["b"][0]):
        assert decoded.shape == image.shape and np.abs(decoded.astype(int) - image).max() < 8
    np.testing.assert_array_equal(got["state"], np.zeros(8))
    policy = TestPolicy()
    with (
        server_thread(lambda: policy) as (_, port),
        WebsocketClientPolicy("127.0.0.1", port, jpeg_quality=90) as client,
    ):
        client.infer({"image": image})
    assert policy.seen[0]["image"].shape == image.shape


# Encryption


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(
        [*command, "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True
    )
    return folder / "cert.pem", folder / "key.pem"


def test_clients_talk_to_an_encrypted_server(certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with server_thread(TestPolicy, tls=tls_context(*certificate)) as (_, port):
        with WebsocketClientPolicy(f"wss://127.0.0.1:{port}") as client:
            frames = np.arange(3 * 2**20, dtype=np.uint8)
            for _ in range(3):
                assert client.infer({"x": frames})["actions"][0, 0] == np.float32(frames.sum())
        context = ssl.create_default_context(cafile=certificate[0])
        with websockets.sync.client.connect(f"wss://127.0.0.1:{port}", ssl=context, legacy=True) as connection:
            connection.recv(PATIENCE_S)
            connection.send(msgpack_numpy.packb({"x": 2.0}))
            assert msgpack_numpy.unpackb(connection.recv(PATIENCE_S))["actions"][0, 0] == 2.0
            assert connection.ping().wait(PATIENCE_S)
        with pytest.raises((OSError, EOFError)):
            WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=1.5)


def test_half_a_certificate_is_refused(certificate, tmp_path):
    with pytest.raises(ValueError, match="--tls-cert and --tls-key go together"):
        tls_context(certificate[0], None)
    with pytest.raises(ValueError, match="are no certificate and its key"):
        tls_context(certificate[0], certificate[0])


def test_a_key_with_a_password_is_refused_and_not_asked_for(certificate, tmp_path):
    locked = tmp_path / "locked.pem"
    command = ["openssl", "rsa", "-aes128", "-passout", "pass:password", "-in", certificate[1], "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(ValueError, match="has a password; a server cannot ask for it"):
        tls_context(certificate[0], locked)
