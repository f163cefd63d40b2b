"""Amazon's buckets, on a real S3 server (moto's) of this machine, and through a line that breaks."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from openpi.shared import download, transfer
from openpi.shared.remote import CutError, file_systems, find_files

LARGE = os.urandom(1_000_000)
FILES = {"ckpt/params/a": LARGE, "ckpt/params/d/b": b"2", "ckpt/assets/c.json": b"{}"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[tuple[str, int]]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture(scope="module")
def buckets(endpoint) -> None:
    """`public` may be read by everybody; `mine` lists its files to everybody, as moto does, and shows none."""
    owner = s3fs.S3FileSystem(key="owner", secret="secret", endpoint_url="http://{}:{}".format(*endpoint))
    for bucket, acl in (("public", "public-read"), ("mine", "private")):
        owner.mkdir(bucket)
        for name, content in FILES.items():
            owner.pipe_file(f"{bucket}/{name}", content)
            owner.chmod(f"{bucket}/{name}", acl)


@pytest.fixture(autouse=True)
def machine(buckets, endpoint, tmp_path, monkeypatch) -> Path:
    """A machine without credentials, its cache empty."""
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*endpoint))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENPI_OFFLINE", raising=False)
    monkeypatch.setattr(transfer, "RETRY_DELAYS_S", ())
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_public_bucket_is_read_without_credentials(machine):
    path = download.maybe_download("s3://public/ckpt")
    assert path == machine / "public" / "ckpt"
    assert contents(path) == {name.removeprefix("ckpt/"): content for name, content in FILES.items()}


def test_one_object_is_a_file(machine):
    assert download.maybe_download("s3://public/ckpt/params/a").read_bytes() == LARGE


def test_what_is_not_public_is_read_with_the_credentials_of_the_machine(monkeypatch):
    with pytest.raises(ConnectionError, match=r"cannot download s3://mine/ckpt/params/d/b: .*redentials"):
        download.maybe_download("s3://mine/ckpt/params/d/b")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "owner")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    s3fs.S3FileSystem.clear_instance_cache()
    assert download.maybe_download("s3://mine/ckpt/params/d/b").read_bytes() == b"2"


def test_credentials_may_be_given(monkeypatch):
    options = {"key": "owner", "secret": "secret"}
    assert download.maybe_download("s3://mine/ckpt/params/d/b", s3=options).read_bytes() == b"2"


@pytest.mark.parametrize("url", ["s3://public/none", "s3://nobody/ckpt"])
def test_what_a_bucket_does_not_have_is_a_missing_file(url):
    with pytest.raises(FileNotFoundError, match=f"{url} does not exist"):
        download.maybe_download(url)


def test_looking_up_knows_the_size():
    found = download.look_up("s3://public/ckpt")
    assert (found.is_here, found.num_files, found.num_bytes) == (False, 3, len(LARGE) + 3)


def test_an_object_that_is_changed_while_it_is_read_is_refused(endpoint, monkeypatch):
    monkeypatch.setattr(file_systems, "_BLOCK_BYTES", 5)
    owner = s3fs.S3FileSystem(key="owner", secret="secret", endpoint_url="http://{}:{}".format(*endpoint))
    owner.pipe_file("public/changing", b"old content")
    (file,) = find_files("s3://public/changing", {"key": "owner", "secret": "secret"})
    with file.open(0) as body:
        assert next(body.chunks) == b"old c"
        owner.pipe_file("public/changing", b"new content")
        with pytest.raises(ConnectionError, match="public/changing was changed while it was read") as raised:
            list(body.chunks)
    assert not isinstance(raised.value, CutError)  # which would be continued


def test_a_transfer_continues_when_the_line_is_back(endpoint, machine, monkeypatch):
    monkeypatch.setattr(file_systems, "_BLOCK_BYTES", 200_000)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # waits between them
    with Line(endpoint, breaks_after=500_000) as line:
        options = {"anon": True, "endpoint_url": line.url, "config_kwargs": {"retries": {"max_attempts": 0}}}
        with pytest.raises(ConnectionError, match=r"kB are kept, the next call continues"):
            download.maybe_download("s3://public/ckpt/params/a", s3=options)
        kept = next(machine.rglob("file.openpi-part")).stat().st_size
        assert kept in (200_000, 400_000)
        line.is_up, line.num_bytes = True, 0
        assert download.maybe_download("s3://public/ckpt/params/a", s3=options).read_bytes() == LARGE
        assert line.num_bytes < len(LARGE) - kept + 50_000


class Line:
    """Carries connections to a server, until so many bytes have come back over it."""

    def __init__(self, server: tuple[str, int], *, breaks_after: int):
        self.is_up, self.num_bytes = False, 0
        self._server, self._breaks_after = server, breaks_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Line":
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                threading.Thread(target=self._carry, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._carry, args=(server, client, True), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, is_back: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                if is_back:
                    self.num_bytes += len(data)
                if not self.is_up and self.num_bytes > self._breaks_after:
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
