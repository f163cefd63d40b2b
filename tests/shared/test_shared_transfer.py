"""Downloads from servers that fail: what is cut is continued, what is short is never taken for the whole."""

import contextlib
import dataclasses
import errno
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest

from file_server import FileServer, GoogleServer, running
from openpi.shared import download, transfer
from openpi.shared.remote.files import Body, CutError
from openpi.shared.remote.google_bucket import google_files

LARGE = random.Random(0).randbytes(3_000_000)
FOLDER = {
    "/ckpt/params/a": LARGE[:900_000],
    "/ckpt/params/d/b": LARGE[900_000:],
    "/ckpt/assets/x y.json": b"{}",
    "/ckpt/empty": b"",
}
BELOW = {path.removeprefix("/ckpt/"): content for path, content in FOLDER.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    home = tmp_path / "cache"
    monkeypatch.setenv("OPENPI_DATA_HOME", str(home))
    monkeypatch.delenv("OPENPI_OFFLINE", raising=False)
    monkeypatch.setattr(transfer, "RETRY_DELAYS_S", (0, 0))
    return home


@pytest.fixture
def server() -> Iterator[FileServer]:
    with running(FileServer()) as server:
        yield server


@pytest.fixture
def google(monkeypatch) -> Iterator[GoogleServer]:
    with running(GoogleServer()) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left_over(cache: Path) -> list[str]:
    """What no finished download leaves in the cache."""
    return [str(path) for path in cache.rglob("*") if re.search(r"\.partial|\.replaced|.\.openpi-part$", path.name)]


# --- one file -------------------------------------------------------------------------------------------------


def test_a_cut_transfer_continues_where_it_stopped(server, cache):
    server.files["/model"], server.cuts = LARGE, [1_000_000, 1_500_000]
    assert download.maybe_download(f"{server.url}/model").read_bytes() == LARGE
    assert server.requests == ["HEAD /model", "GET /model", "GET /model from 1000000", "GET /model from 2500000"]
    assert left_over(cache) == []


def test_a_server_without_ranges_sends_it_all_again(server):
    server.files["/model"], server.cuts, server.has_ranges = LARGE, [1_000_000], False
    assert download.maybe_download(f"{server.url}/model").read_bytes() == LARGE


def test_without_a_version_nothing_is_continued_from_an_earlier_call(server):
    server.files["/model"], server.has_versions = LARGE, False
    server.cuts = [1_000_000, 0, 0, 0]
    with pytest.raises(ConnectionError):
        download.maybe_download(f"{server.url}/model")
    server.files["/model"] = LARGE[::-1]
    assert download.maybe_download(f"{server.url}/model").read_bytes() == LARGE[::-1]


def test_a_short_file_is_never_accepted(server, cache):
    server.files["/model"], server.extra_claimed = LARGE, 10
    with pytest.raises(ConnectionError, match=r"sent 3000000 of 3000010 bytes.*3\.0 MB are kept, the next call contin"):
        download.maybe_download(f"{server.url}/model")
    assert not download.cache_path(f"{server.url}/model").exists()


def test_a_file_of_unannounced_length_is_refused(server, cache):
    def send_until_the_end(request):
        request.send_response(200)
        request.end_headers()
        request.wfile.write(b"perhaps all")
        request.close_connection = True

    server.reply = send_until_the_end
    with pytest.raises(ConnectionError, match="without a length, so that a cut could not be noticed"):
        download.maybe_download(f"{server.url}/model")


def test_a_server_without_head_requests_is_read(server):
    server.files["/model"], server.has_head, server.cuts = LARGE, False, [0, 1_000_000]
    assert download.maybe_download(f"{server.url}/model").read_bytes() == LARGE


def test_the_next_call_continues_what_the_last_one_could_not_finish(server):
    server.files["/model"], server.cuts = LARGE, [1_000_000, 0, 0, 0]
    with pytest.raises(ConnectionError, match="sent 1000000 of 3000000 bytes"):
        download.maybe_download(f"{server.url}/model")
    server.requests.clear()
    assert download.maybe_download(f"{server.url}/model").read_bytes() == LARGE
    assert server.requests == ["HEAD /model", "GET /model from 1000000"]


def test_a_file_that_was_changed_after_the_cut_is_fetched_anew(server, cache):
    server.files["/model"], server.cuts = LARGE, [1_000_000, 0, 0, 0]
    with pytest.raises(ConnectionError):
        download.maybe_download(f"{server.url}/model")
    server.files["/model"] = LARGE[::-1]
    assert download.maybe_download(f"{server.url}/model").read_bytes() == LARGE[::-1]
    assert left_over(cache) == []


def test_a_file_that_is_changed_between_two_tries_is_fetched_from_its_start(server):
    server.files["/model"], server.cuts = LARGE, [1_000_000]

    def reply_and_change(request):
        content = server.files["/model"]
        if request.command == "GET":  # before the reply: who is cut asks again at once
            server.files["/model"] = LARGE[::-1]
        request.send_content(content)

    server.reply = reply_and_change
    assert download.maybe_download(f"{server.url}/model").read_bytes() == LARGE[::-1]
    assert server.requests == ["HEAD /model", "GET /model", "GET /model from 1000000", "GET /model"]


def test_no_key_of_an_address_is_told(server, cache, monkeypatch, caplog):
    server.files["/model"] = b"content"
    signed = f"{server.url}/model?X-Amz-Signature=SECRET"
    with caplog.at_level("INFO"):
        download.maybe_download(signed)
    assert f"downloading {server.url}/model?... to" in caplog.text
    monkeypatch.setenv("OPENPI_MIRROR", f"https://a.test={server.url}/none?token=SECRET&path=")
    fails = [f"{server.url}/none?sig=SECRET", "https://a.test/b?sig=SECRET", f"{server.url}/../x?sig=SECRET"]
    for url in (*fails, server.url.replace("//", "//me:SECRET@")):
        with pytest.raises((ConnectionError, ValueError), match=r"/none\?\.\.\.|comes with a login|'\.\.'") as caught:
            download.maybe_download(url)
        assert "SECRET" not in str(caught.value)
    assert "SECRET" not in caplog.text
    assert not [path for path in cache.rglob("*") if "SECRET" in path.name]


def test_what_a_server_says_of_its_status_moves_no_cursor_and_fills_no_log(server, monkeypatch):
    monkeypatch.setattr(server, "reply", lambda request: request.send_error(404, "gone\x1b[31m" + "!" * 5000))
    with pytest.raises(ConnectionError, match=r"HTTP 404 gone\\x1b\[31m!{60,80} from http"):
        download.maybe_download(f"{server.url}/none")


def test_a_disk_too_small_is_noticed_before_anything_is_transferred(server):
    server.files["/model"], server.extra_claimed = LARGE, 10**18
    with pytest.raises(
        OSError, match=r"1\.0 EB to download, .* free; the cache is .*, OPENPI_DATA_HOME moves it"
    ) as raised:
        download.maybe_download(f"{server.url}/model")
    assert raised.value.errno == errno.ENOSPC
    assert server.requests == ["HEAD /model"]


# --- processes ------------------------------------------------------------------------------------------------

FETCH = """
import logging, sys
from openpi.shared.download import maybe_download
logging.basicConfig(level=logging.INFO, format="%(message)s")
maybe_download(sys.argv[1])
"""


def start_fetching(url: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", FETCH, url], stderr=subprocess.PIPE, text=True)


def wait_for_line(process: subprocess.Popen, text: str) -> None:
    """Until the process says so; fails if it ends without."""
    assert any(text in line for line in process.stderr)


def wait_until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        time.sleep(0.01)


def test_a_killed_download_is_continued_by_the_next_process(server, cache):
    server.files, server.held = FOLDER, "/ckpt/params/d/b"
    with start_fetching(f"{server.url}/ckpt") as process:
        wait_until(lambda: {path.name for path in cache.rglob("*")} >= {"a", "x y.json", "b.openpi-part"})
        wait_until(lambda: next(cache.rglob("b.openpi-part")).stat().st_size > 0)
        process.send_signal(signal.SIGKILL)
    assert not download.cache_path(f"{server.url}/ckpt").exists()
    server.release.set()
    server.requests.clear()
    assert contents(download.maybe_download(f"{server.url}/ckpt")) == BELOW
    assert [request for request in server.requests if request.startswith("GET") and "." in request] == []
    assert "GET /ckpt/params/a" not in server.requests  # it was all there
    assert any(re.fullmatch(r"GET /ckpt/params/d/b from [1-9]\d+", request) for request in server.requests)
    assert left_over(cache) == []


def test_who_wants_what_lies_in_a_folder_waits_for_the_folder(server):
    server.files, server.held = FOLDER, "/ckpt/params/d/b"
    with start_fetching(f"{server.url}/ckpt") as whole:
        server.is_held.wait()
        with start_fetching(f"{server.url}/ckpt/params") as inside:
            wait_for_line(inside, "waiting for another process")
            server.release.set()
    assert (whole.returncode, inside.returncode) == (0, 0)
    wanted = {f"GET {quote(path)}" for path, content in FOLDER.items() if content}
    assert sorted(request for request in server.requests if request in wanted) == sorted(wanted)


# --- folders --------------------------------------------------------------------------------------------------


def test_a_folder_of_a_web_server_is_read_through_its_listings(server, cache):
    server.files = FOLDER
    path = download.maybe_download(f"{server.url}/ckpt")
    assert path == download.cache_path(f"{server.url}/ckpt")
    assert contents(path) == BELOW


def test_what_was_fetched_for_something_inside_a_folder_may_have_changed_since(server):
    server.files = dict(FOLDER)
    download.maybe_download(f"{server.url}/ckpt/params/a")
    server.files["/ckpt/params/a"] = changed = bytes(reversed(FOLDER["/ckpt/params/a"]))
    assert contents(download.maybe_download(f"{server.url}/ckpt")) == {**BELOW, "params/a": changed}


def test_a_folder_appears_only_when_every_file_is_there(server, cache):
    server.files, server.cuts = FOLDER, [0] * 50
    with pytest.raises(ConnectionError):
        download.maybe_download(f"{server.url}/ckpt")
    assert not download.cache_path(f"{server.url}/ckpt").exists()
    server.cuts.clear()
    assert contents(download.maybe_download(f"{server.url}/ckpt")) == BELOW


def test_a_page_that_lists_nothing_is_no_folder(server):
    server.reply = lambda request: request.send("text/html", b"<html><a href='https://example.org'>about</a></html>")
    with pytest.raises(FileNotFoundError, match="/page/ is a folder without files"):
        download.maybe_download(f"{server.url}/page/")


# --- public buckets of Google ---------------------------------------------------------------------------------


def test_a_public_bucket_is_read_without_any_extra(google, cache, monkeypatch):
    monkeypatch.setattr(fsspec, "filesystem", None)
    google.files, google.cuts = {f"/openpi-assets{path}": content for path, content in FOLDER.items()}, [0, 100]
    path = download.maybe_download("gs://openpi-assets/ckpt")
    assert path == cache / "openpi-assets" / "ckpt"
    assert contents(path) == BELOW
    assert download.maybe_download("gs://openpi-assets/ckpt/params/a", gs={"token": "anon"}) == path / "params" / "a"


def test_a_folder_reuses_what_was_fetched_for_something_inside_it_if_it_is_the_same(google):
    google.files = {f"/openpi-assets{path}": content for path, content in FOLDER.items()}
    download.maybe_download("gs://openpi-assets/ckpt/params")
    google.requests.clear()
    assert contents(download.maybe_download("gs://openpi-assets/ckpt")) == BELOW
    assert not [request for request in google.requests if "alt=media" in request and "params" in request]


def test_one_object_is_a_file(google, cache):
    google.files = {"/tokenizers/pali/model v1": b"pieces", "/tokenizers/pali/model v1.txt": b"notes"}
    path = download.maybe_download("gs://tokenizers/pali/model v1")
    assert path == cache / "tokenizers/pali/model v1" and path.read_bytes() == b"pieces"


def test_a_listing_cannot_lead_out_of_the_folder(google):
    google.files = {"/openpi-assets/ckpt/../../evil": b"1"}
    with pytest.raises(ValueError, match=r"lists a file '\.\./\.\./evil', which lies outside"):
        download.maybe_download("gs://openpi-assets/ckpt")


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("a//b",), "'a//b', which cannot be kept here: a part of its path is empty"),
        (("./a",), "a part of its path is empty"),
        (("a\\b",), "a backslash or a control character"),
        (("a\0b",), "a backslash or a control character"),
        (("x" * 256,), "x...', which cannot be kept here: it is too long"),
        (("/".join("d" * 65),), "it is too long"),
        (("params/.openpi-part",), "marks what is not all there"),
        (("a", "a/b"), "'a' as a file and as a folder"),
    ],
)
def test_names_that_no_file_can_have_are_refused_before_anything_is_fetched(google, cache, names, complaint):
    google.files = {f"/openpi-assets/ckpt/{name}": b"1" for name in names}
    with pytest.raises(ValueError, match=re.escape(complaint)):
        download.maybe_download("gs://openpi-assets/ckpt")
    assert not (cache / "openpi-assets").exists()


ITEM = {"name": "ckpt/a", "size": "1", "generation": "7"}


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        (b"[]", "list instead of an object"),
        (b"<html>", "does not answer as Google's storage does"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * (2**26 + 1), "more than 67,108,864 bytes in one page"),
        ({"items": [{**ITEM, "size": "-1"}]}, "an object of -1 bytes"),
        ({"items": [{**ITEM, "size": "many"}]}, "does not answer as Google's storage does"),
        ({"items": [{**ITEM, "md5Hash": "?"}]}, "does not answer as Google's storage does"),
        ({"items": [{"name": "ckpt/a"}]}, "no 'generation'"),
        ({"items": ["ckpt/a"]}, "does not answer as Google's storage does"),
        ({"items": [{**ITEM, "name": "other/a"}]}, "an object that was not asked for"),
        ({"items": [ITEM, ITEM]}, "lists the file 'a' twice"),
        ({"items": [ITEM], "nextPageToken": "same"}, "has no end"),
        ({"nextPageToken": "more {}"}, "has no end"),
    ],
)
def test_a_bucket_that_answers_nonsense_or_without_an_end_is_refused(monkeypatch, cache, page, complaint):
    with running(NonsenseServer(page=page)) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        with pytest.raises((ConnectionError, ValueError), match=re.escape(complaint)):
            download.maybe_download("gs://openpi-assets/ckpt")
    assert not (cache / "openpi-assets").exists()


@dataclasses.dataclass
class NonsenseServer(FileServer):
    """No object by its name; for every listing the same page, `{}` in it the number of the request."""

    page: object = b""

    def reply(self, request) -> None:
        if "?" not in request.path:
            request.send_error(404)
            return
        text = self.page if isinstance(self.page, bytes) else json.dumps(self.page).encode()
        request.send("application/json", text.replace(b" {}", str(len(self.requests)).encode()))


class EndlessServer(FileServer):
    """A page of folders, each of which is one; or content that never ends, where the path has no slash at its end."""

    def reply(self, request) -> None:
        if request.path.endswith("/"):
            request.send("text/html", b"<a href='deeper/'>deeper</a>")
            return
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        with contextlib.suppress(ConnectionError):
            while request.command == "GET":
                request.wfile.write(b"100000\r\n" + bytes(2**20) + b"\r\n")
        request.close_connection = True


def test_folders_without_an_end_are_refused():
    with running(EndlessServer()) as server, pytest.raises(ConnectionError, match="folders in folders in folders"):
        download.maybe_download(f"{server.url}/ckpt/")


def test_content_without_an_end_leaves_room_on_the_disk(cache, monkeypatch):
    free = shutil.disk_usage(cache.parent).free
    monkeypatch.setattr(transfer, "_RESERVE_BYTES", free - 2**25)
    with running(EndlessServer()) as server, pytest.raises(OSError, match="does not say how much is to come"):
        download.maybe_download(f"{server.url}/ckpt")
    assert left_over(cache) == []


def test_content_that_goes_on_after_its_end_is_not_read(google, cache, monkeypatch):
    google.files = {"/openpi-assets/a": b"0123"}

    def open_for_ever(start):
        return contextlib.nullcontext(Body(start, None, itertools.repeat(bytes(2**16))))

    found = google_files("gs://openpi-assets/a")[0]
    cache.mkdir()
    with pytest.raises(CutError, match="instead of 4"):
        transfer.fetch_files([dataclasses.replace(found, open=open_for_ever, md5=None)], cache, label="a")
    assert left_over(cache) == []


def test_what_a_public_bucket_does_not_have_is_a_missing_file(google):
    google.files = {"/openpi-assets/ckpt2/a": b"1"}
    with pytest.raises(FileNotFoundError, match="gs://openpi-assets/ckpt does not exist"):
        download.maybe_download("gs://openpi-assets/ckpt")


def test_a_damaged_object_is_never_accepted(google):
    google.files, google.is_damaging = {"/openpi-assets/model": LARGE}, True
    with pytest.raises(ConnectionError, match="its digest is wrong"):
        download.maybe_download("gs://openpi-assets/model")


def test_a_private_bucket_asks_for_credentials(google, monkeypatch):
    google.private = ("mine",)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    for ask in (download.maybe_download, download.look_up):
        with pytest.raises(ImportError, match=r"uv sync --extra gcs"):
            ask("gs://mine/ckpt")


# --- mirrors, and no network ----------------------------------------------------------------------------------


def test_a_mirror_is_read_instead_and_cached_under_the_original_name(server, cache, monkeypatch):
    server.files = FOLDER
    monkeypatch.setenv("OPENPI_MIRROR", f"gs://openpi-assets={server.url}, s3://other=https://192.0.2.1")
    path = download.maybe_download("gs://openpi-assets/ckpt/params")
    assert path == cache / "openpi-assets" / "ckpt" / "params"
    assert contents(path).keys() == {"a", "d/b"}


def test_a_mirror_may_be_a_folder_which_is_used_as_it_is(tmp_path, cache, monkeypatch):
    (tmp_path / "assets/ckpt").mkdir(parents=True)
    monkeypatch.setenv("OPENPI_MIRROR", f"gs://openpi-assets={tmp_path}/assets")
    assert download.maybe_download("gs://openpi-assets/ckpt") == tmp_path / "assets/ckpt"
    with pytest.raises(FileNotFoundError, match="assets/none does not exist"):
        download.maybe_download("gs://openpi-assets/none")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("url", "source"),
    [
        ("gs://a/b/c", "https://long/c"),
        ("gs://a/bc", "https://short/bc"),
        ("gs://ab/c", "s3://all/ab/c"),
        ("gs://a", "https://short"),
        ("https://a/b", "https://a/b"),
    ],
)
def test_the_longest_prefix_up_to_a_slash_names_the_mirror(url, source, monkeypatch):
    monkeypatch.setenv("OPENPI_MIRROR", "gs://a=https://short,gs://a/b=https://long/,gs://=s3://all")
    assert download.mirrored(url) == source


def test_a_malformed_mirror_is_refused(monkeypatch):
    monkeypatch.setenv("OPENPI_MIRROR", "openpi-assets:/mnt/mirror")
    with pytest.raises(ValueError, match=r"OPENPI_MIRROR has 'openpi-assets:/mnt/mirror'; expected <prefix>=<replac"):
        download.maybe_download("gs://openpi-assets/ckpt")


def test_offline_means_that_nobody_is_asked(server, monkeypatch):
    server.files["/model"] = LARGE
    monkeypatch.setenv("OPENPI_OFFLINE", "1")
    with pytest.raises(
        ConnectionError, match=r"is not cached, and OPENPI_OFFLINE is set\. .* by hand, as `openpi fetch http"
    ):
        download.maybe_download(f"{server.url}/model")
    assert server.requests == []


def test_looking_up_transfers_nothing(server):
    server.files = FOLDER
    url = f"{server.url}/ckpt"
    before = download.look_up(url)
    assert before == download.Found(download.cache_path(url), False, num_files=4, num_bytes=len(LARGE) + 2)
    assert not before.path.exists()
    download.maybe_download(url)
    assert download.look_up(url) == dataclasses.replace(before, is_here=True)
