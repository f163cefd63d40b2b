"""`hf://` URLs: the hub's own library, pointed at a server on this machine that answers as the hub does."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import HfUri

import forked
from file_server import HubServer, running
from openpi.shared import download, hub

FILES = {"params/a": b"1" * 500_000, "params/d/b": b"2", "params_old/c": b"3", "README.md": b"about"}
FETCH = """
import sys
from openpi.shared import download
print(*(download.maybe_download(url) for url in sys.argv[1:]), sep="\\n")
print(download.look_up(sys.argv[1]), file=sys.stderr)
"""

Fetch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def server() -> Iterator[HubServer]:
    with running(HubServer(files={f"/lab/pi05/{name}": content for name, content in FILES.items()})) as server:
        yield server


@pytest.fixture
def fetch(server, tmp_path) -> Fetch:
    """Fetches URLs in a process of their own: the hub's library reads its variables when it is imported."""

    def run(*urls: str, **variables: str) -> subprocess.CompletedProcess[str]:
        places = {"HF_HOME": str(tmp_path / "hf"), "OPENPI_DATA_HOME": str(tmp_path / "cache")}
        hub_is = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OPENPI_OFFLINE": ""}
        environment = {**os.environ, **places, **hub_is, **variables}
        command, preloads = [sys.executable, "-c", FETCH, *urls], ("openpi.shared.download", "openpi.shared.hub")
        return forked.run(command, preloads=preloads, env=environment, capture_output=True, text=True)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_repository_or_what_lies_in_it_is_linked_from_the_cache(fetch, server, tmp_path):
    done = fetch("hf://lab/pi05/params", "hf://lab/pi05/README.md", "hf://lab/pi05@main")
    assert done.returncode == 0, done.stderr
    params, readme, whole = map(Path, done.stdout.split())
    assert params == tmp_path / "cache/hf/lab/pi05/params"
    assert contents(params.resolve()) == {"a": FILES["params/a"], "d/b": b"2"}
    assert readme.read_bytes() == b"about"
    assert contents(whole.resolve()) == FILES
    assert whole.resolve().is_relative_to(tmp_path / "hf")
    assert "is_here=True, num_files=2, num_bytes=500001" in done.stderr
    server.requests.clear()
    assert fetch("hf://lab/pi05/params", "hf://lab/pi05@main/params/d", HF_HUB_OFFLINE="1").returncode == 0
    assert server.requests == []


def test_a_repository_that_was_cut_is_not_taken_for_the_whole(fetch, server):
    server.cuts = [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    done = fetch("hf://lab/pi05")
    assert done.returncode != 0
    assert "cannot download hf://lab/pi05" in done.stderr
    server.cuts.clear()
    done = fetch("hf://lab/pi05", HF_HUB_OFFLINE="1")
    assert "ConnectionError: cannot download hf://lab/pi05" in done.stderr
    done = fetch("hf://lab/pi05")
    assert done.returncode == 0, done.stderr
    assert contents(Path(done.stdout.strip()).resolve()) == FILES


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("hf://lab/pi05/none", "FileNotFoundError: hf://lab/pi05/none does not exist: repository 'lab/pi05' has no"),
        ("hf://lab/pi07", "ConnectionError: cannot download hf://lab/pi07: RepositoryNotFoundError"),
        ("hf://lab/pi05@v2", "ConnectionError: cannot download hf://lab/pi05@v2: RevisionNotFoundError"),
    ],
)
def test_what_the_hub_does_not_have_is_named(fetch, url, message):
    done = fetch(url)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_mirror_may_stand_in_for_the_hub(tmp_path, monkeypatch):
    (tmp_path / "lab/pi05").mkdir(parents=True)
    monkeypatch.setenv("OPENPI_MIRROR", f"hf://lab={tmp_path}/lab")
    assert download.maybe_download("hf://lab/pi05") == tmp_path / "lab/pi05"


def test_hub_urls_name_repository_revision_and_path():
    assert hub.parse("hf://lab/pi05/") == HfUri("model", "lab/pi05")
    assert hub.parse("hf://datasets/lab/arm@v3.0/meta/info.json") == HfUri(
        "dataset", "lab/arm", "v3.0", "meta/info.json"
    )
    with pytest.raises(ValueError, match="names no repository of the hub; expected hf://<org>/<repository>"):
        hub.parse("hf://pi05")
