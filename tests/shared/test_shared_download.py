"""The download cache, with a real HTTP server and an in-memory bucket."""

import functools
import http.server
import multiprocessing
import threading
from pathlib import Path

import fsspec
import pytest

from openpi.shared import download


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    home = tmp_path / "cache"
    monkeypatch.setenv("OPENPI_DATA_HOME", str(home))
    monkeypatch.delenv("OPENPI_OFFLINE", raising=False)
    return home


class CountingHandler(http.server.SimpleHTTPRequestHandler):
    requests: list[str]

    def do_GET(self):
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """A folder served over HTTP: (its path, its URL, the list of requests so far)."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Handler", (CountingHandler,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=folder)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}", handler.requests
        httpd.shutdown()
        thread.join()


@pytest.fixture
def bucket():
    """An in-memory bucket with a checkpoint folder."""
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({"/assets/ckpt/params/a": b"1", "/assets/ckpt/params/deep/b": b"2"})
    yield filesystem
    filesystem.rm("/assets", recursive=True)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_cache_lies_where_the_variable_says_or_at_home(cache, monkeypatch):
    assert download.get_cache_dir() == cache
    monkeypatch.delenv("OPENPI_DATA_HOME")
    assert download.get_cache_dir() == Path.home() / ".cache" / "openpi"


def test_local_paths_pass_through(tmp_path):
    (tmp_path / "weights").mkdir()
    assert download.maybe_download(tmp_path / "weights") == tmp_path / "weights"
    assert download.maybe_download(f"file://{tmp_path}/weights") == tmp_path / "weights"


def test_a_missing_local_path_is_named_absolutely(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"checkpoints/none does not exist .absolute: {tmp_path}/checkpoints"):
        download.maybe_download("checkpoints/none")


def test_a_missing_local_path_is_told_with_what_there_is_instead(tmp_path):
    for name in ("59", "100", "assets"):
        (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"run/20 does not exist .*\. There are the steps 59, 100$"):
        download.maybe_download(tmp_path / "run" / "20")
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'run'\?"):
        download.maybe_download(tmp_path / "runs")


def test_a_file_is_fetched_once_and_kept_under_bucket_and_path(server, cache):
    folder, url, requests = server
    (folder / "model").write_bytes(b"pieces")
    path = download.maybe_download(f"{url}/model")
    assert path.read_bytes() == b"pieces"
    assert path == cache / url.removeprefix("http://") / "model"
    (folder / "model").write_bytes(b"changed")
    assert download.maybe_download(f"{url}/model").read_bytes() == b"pieces"
    assert requests == ["/model"]
    assert download.maybe_download(f"{url}/model", force_download=True).read_bytes() == b"changed"


def test_what_a_query_asks_for_is_not_taken_for_the_answer_to_another(server):
    folder, url, requests = server
    (folder / "get.json").write_bytes(b"1")
    first = download.maybe_download(f"{url}/get.json?id=1")
    (folder / "get.json").write_bytes(b"2")
    second = download.maybe_download(f"{url}/get.json?id=2")
    assert [first.read_bytes(), second.read_bytes()] == [b"1", b"2"] and first.name == second.name == "get.json"
    assert download.maybe_download(f"{url}/get.json?id=1") == first and len(requests) == 2


def test_a_failed_download_leaves_nothing_and_says_where_to_put_the_file(server, cache):
    _, url, _ = server
    with pytest.raises(ConnectionError, match=rf"cannot download {url}/gone: .*404.*put it at .*/gone by hand"):
        download.maybe_download(f"{url}/gone")
    assert [name for name in names(cache) if not name.endswith((".lock", ".openpi-part"))] == []


def test_a_failed_refresh_keeps_what_was_there(server):
    folder, url, _ = server
    (folder / "model").write_bytes(b"pieces")
    path = download.maybe_download(f"{url}/model")
    (folder / "model").unlink()
    with pytest.raises(ConnectionError):
        download.maybe_download(f"{url}/model", force_download=True)
    assert path.read_bytes() == b"pieces"


def test_a_cache_that_cannot_be_written_to_is_named_with_the_way_out(server, cache):
    folder, url, _ = server
    (folder / "model").write_bytes(b"pieces")
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("a file")
    with pytest.raises(OSError, match=r"cannot keep http.*/model here: .*; the cache is .*OPENPI_DATA_HOME moves"):
        download.maybe_download(f"{url}/model")


def test_the_rest_of_a_killed_download_is_not_taken_for_the_file(server, cache):
    folder, url, _ = server
    (folder / "model").write_bytes(b"pieces")
    partial = cache / url.removeprefix("http://") / ".model.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"pie")
    assert download.maybe_download(f"{url}/model").read_bytes() == b"pieces"
    assert not partial.exists()


def fetch(url: str) -> bytes:
    return download.maybe_download(url).read_bytes()


def test_processes_that_want_the_same_file_fetch_it_once(server):
    folder, url, requests = server
    (folder / "model").write_bytes(b"pieces" * 100_000)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        contents = pool.map(fetch, [f"{url}/model"] * 6)
    assert set(contents) == {b"pieces" * 100_000}
    assert requests == ["/model"]


def test_a_url_cannot_lead_out_of_the_cache():
    with pytest.raises(ValueError, match=r"has '\.\.' in its path"):
        download.maybe_download("http://127.0.0.1:9/a/../../../etc/passwd")


@pytest.mark.usefixtures("bucket")
def test_a_folder_of_a_bucket_is_fetched_whole(cache):
    path = download.maybe_download("memory://assets/ckpt")
    assert path == cache / "assets" / "ckpt"
    assert names(path) == ["params/a", "params/deep/b"]
    assert (path / "params" / "deep" / "b").read_bytes() == b"2"


@pytest.mark.usefixtures("bucket")
def test_what_a_bucket_does_not_have_is_a_missing_file():
    with pytest.raises(FileNotFoundError, match="memory://assets/none does not exist"):
        download.maybe_download("memory://assets/none")


@pytest.mark.parametrize(
    ("scheme", "extra", "options"), [("gs", "gcs", {"token": "google_default"}), ("s3", "s3", {"anon": False})]
)
def test_a_missing_extra_is_named(scheme, extra, options, monkeypatch):
    def unavailable(protocol, **options):
        raise ImportError(f"no backend for {protocol}")

    monkeypatch.setattr(fsspec, "filesystem", unavailable)
    with pytest.raises(ImportError, match=rf"uv sync --extra {extra}"):
        download.maybe_download(f"{scheme}://assets/a", **{scheme: options})


def test_what_lies_inside_an_installed_package_is_found():
    assert download.maybe_download("package:openpi.training/recipes").is_dir()
    with pytest.raises(FileNotFoundError, match="does not exist in the installed package"):
        download.maybe_download("package:openpi.training/nothing")
    with pytest.raises(FileNotFoundError, match="'no_such_package', which is not installed"):
        download.maybe_download("package:no_such_package")
    with pytest.raises(FileNotFoundError, match="names no package"):
        download.maybe_download("package:")


def test_a_folder_made_for_something_inside_it_is_not_taken_for_the_whole(cache):
    remote = fsspec.filesystem("memory")
    remote.pipe({"/parts/model/params/a": b"1", "/parts/model/assets/b": b"2"})
    url = "memory://parts/model"
    with pytest.raises(FileNotFoundError):
        download.maybe_download(f"{url}/assets/missing")
    assert (download.maybe_download(f"{url}/assets") / "b").read_bytes() == b"2"
    whole = download.maybe_download(url)
    assert (whole / "params" / "a").read_bytes() == b"1"
    assert (whole / "assets" / "b").read_bytes() == b"2"
    remote.rm("/parts", recursive=True)
    assert download.maybe_download(url) == whole  # and now it is cached
