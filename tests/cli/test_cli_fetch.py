"""`openpi fetch`, as a process, against a bucket and a hub on this machine."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import forked
import paths
from file_server import GoogleServer, HubServer, running

RECIPE = """
import dataclasses, sys
sys.path.append({tests!r})
from tiny_recipe import MODEL, arm
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.training.config import TrainConfig
from openpi.training.data_config import AssetsConfig
from openpi.training.weight_loaders import CheckpointWeightLoader

everything = dataclasses.replace(
    arm,
    model=dataclasses.replace(MODEL, tokenizer_path=None),
    weight_loader=CheckpointWeightLoader("gs://openpi-assets/checkpoints/base/params"),
    data=dataclasses.replace(
        arm.data,
        repo_id="lab/arm",
        assets=AssetsConfig("gs://openpi-assets/checkpoints/base/assets", "trossen"),
    ),
)
serves_fast = TrainConfig(name="serves_fast", model=Pi0FASTConfig(), data=dataclasses.replace(arm.data, repo_id=None))
"""

BASE = {
    "/openpi-assets/checkpoints/base/params/_METADATA": b"{}",
    "/openpi-assets/checkpoints/base/params/d/1": b"1" * 2_000_000,
    "/openpi-assets/checkpoints/base/assets/trossen/norm_stats.json": b"{}",
    "/big_vision/paligemma_tokenizer.model": b"pieces",
}
DATASET = paths.GOLDEN / "lerobot_v21/video"
DATASET_FILES = [path for path in DATASET.rglob("*") if path.is_file()]
ROWS = "data/chunk-000/episode_000001.parquet"
HUB = {
    "/physical-intelligence/fast/processor_config.json": b"{}",
    "/physical-intelligence/fast/tokenizer.json": b"{}",
    "/physical-intelligence/fast/README.md": b"not needed",
    **{f"/datasets/lab/arm/{file.relative_to(DATASET)}": file.read_bytes() for file in DATASET_FILES},
}

Fetch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def google() -> Iterator[GoogleServer]:
    with running(GoogleServer(files=dict(BASE))) as server:
        yield server


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with running(HubServer(files=dict(HUB), commits={"main": "a" * 40, "v2.1": "b" * 40})) as server:
        yield server


@pytest.fixture
def fetch(google, hub, tmp_path) -> Fetch:
    (tmp_path / "recipes.py").write_text(RECIPE.format(tests=str(paths.SUPPORT)))
    places = {"OPENPI_DATA_HOME": "cache", "HF_HOME": "hf", "HF_LEROBOT_HOME": "lerobot"}
    environment = {
        **os.environ,
        **{name: str(tmp_path / folder) for name, folder in places.items()},
        "STORAGE_EMULATOR_HOST": google.url,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "OPENPI_OFFLINE": "0",
    }

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "openpi.cli.main", "fetch", *arguments]
        preloads = (
            "openpi.cli.recipes.fetch",
            "openpi.training.config",
            "openpi.training.recipe.requirements",
            "openpi.shared.hub",
        )
        return forked.run(
            command, preloads=preloads, cwd=tmp_path, env=environment | more, capture_output=True, text=True
        )

    return run


def rows(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """Kind and state of each line, the URL's last part, and the path below the test's folder."""
    lines = done.stdout.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    return [[head[:12].strip(), head[14:29].strip(), head.rpartition("/")[2]] for head in heads]


def test_all_that_a_recipe_needs_is_listed_with_sizes_and_nothing_fetched(fetch, google, tmp_path):
    done = fetch("recipes.py:everything", "--list")
    assert done.returncode == 0, done.stderr
    assert rows(done) == [
        ["weights", "to fetch", "params"],
        ["statistics", "to fetch", "trossen"],
        ["tokenizer", "to fetch", "paligemma_tokenizer.model"],
        ["dataset", "needs --dataset", "arm"],
    ]
    assert "2.0 MB  gs://openpi-assets/checkpoints/base/params" in done.stdout
    size = sum(len(content) for path, content in HUB.items() if path.startswith("/datasets/"))
    assert f"{size / 1000:.1f} kB  hf://datasets/lab/arm" in done.stdout
    assert not (tmp_path / "cache").exists()
    assert not [request for request in google.requests if "alt=media" in request]


def test_all_that_a_recipe_needs_is_fetched_once_and_then_there_without_a_network(fetch, google, hub, tmp_path):
    done = fetch("recipes.py:everything", "--dataset")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [state for _, state, _ in rows(done)] == ["fetched"] * 4
    base = tmp_path / "cache/openpi-assets/checkpoints/base"
    assert (base / "params/d/1").stat().st_size == 2_000_000
    assert f"    {base}/assets/trossen" in done.stdout
    assert (tmp_path / "lerobot/lab/arm" / ROWS).read_bytes() == (DATASET / ROWS).read_bytes()
    google.requests.clear()
    hub.requests.clear()
    done = fetch("recipes.py:everything", "--dataset", OPENPI_OFFLINE="1", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout
    assert [state for _, state, _ in rows(done)] == ["was here"] * 4
    assert google.requests + hub.requests == []


def test_what_cannot_be_fetched_does_not_stop_the_rest(fetch, google):
    del google.files["/openpi-assets/checkpoints/base/params/_METADATA"]
    del google.files["/openpi-assets/checkpoints/base/params/d/1"]
    done = fetch("recipes.py:everything")
    assert done.returncode == 1
    assert [state for _, state, _ in rows(done)] == ["FAILED", "fetched", "fetched", "needs --dataset"]
    assert "gs://openpi-assets/checkpoints/base/params does not exist" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_recipe_that_only_serves_needs_its_tokenizers_and_a_checkpoint(fetch, tmp_path):
    done = fetch("recipes.py:serves_fast")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'serves_fast' only serves: fetch a checkpoint with `openpi fetch URL --config" in done.stdout
    assert [row for row in rows(done) if row[1] == "fetched"] == [
        ["tokenizer", "fetched", "paligemma_tokenizer.model"],
        ["tokenizer", "fetched", "processor_config.json"],
        ["tokenizer", "fetched", "tokenizer.json"],
    ]
    assert not list((tmp_path / "hf").rglob("README.md"))


def test_a_checkpoint_comes_with_what_serving_it_takes(fetch):
    url = "gs://openpi-assets/checkpoints/base"
    assert [row[0] for row in rows(fetch(url))] == ["checkpoint", "tokenizer"]
    done = fetch(url, "--config", "recipes.py:serves_fast")
    assert [row[:2] for row in rows(done)] == [
        ["checkpoint", "was here"],
        ["tokenizer", "was here"],
        ["tokenizer", "fetched"],
        ["tokenizer", "fetched"],
    ]


def test_any_url_may_be_fetched_and_fetched_again(fetch, google, hub, tmp_path):
    name = next(path for path in hub.files if path.startswith("/physical-intelligence")).rpartition("/")
    done = fetch(f"{hub.url}{name[0]}/resolve/main/{name[2]}?signature=SECRET")
    assert [row[:2] for row in rows(done)] == [["files", "fetched"]]
    assert "SECRET" not in done.stdout + done.stderr
    assert rows(fetch("gs://big_vision/paligemma_tokenizer.model"))[0][:2] == ["files", "fetched"]
    google.files["/big_vision/paligemma_tokenizer.model"] = b"changed"
    assert rows(fetch("gs://big_vision/paligemma_tokenizer.model"))[0][:2] == ["files", "was here"]
    assert rows(fetch("gs://big_vision/paligemma_tokenizer.model", "--force"))[0][:2] == ["files", "fetched"]
    assert (tmp_path / "cache/big_vision/paligemma_tokenizer.model").read_bytes() == b"changed"


def test_a_dataset_that_was_cut_is_not_taken_for_the_whole(fetch, hub, tmp_path):
    hub.missing = {f"/datasets/lab/arm/{ROWS}"}
    done = fetch("recipes.py:everything", "--dataset")
    assert done.returncode == 1
    assert rows(done)[-1][:2] == ["dataset", "FAILED"]
    hub.missing = set()
    done = fetch("recipes.py:everything", "--dataset")
    assert rows(done)[-1][:2] == ["dataset", "fetched"], done.stdout + "\n".join(hub.requests)
    assert (tmp_path / "lerobot/lab/arm" / ROWS).read_bytes() == (DATASET / ROWS).read_bytes()


def meta_only(folder: Path) -> None:
    shutil.rmtree(folder / "data")
    shutil.rmtree(folder / "videos")


def pointer(folder: Path) -> None:
    (folder / ROWS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def no_table(folder: Path) -> None:
    (folder / "meta/episodes.jsonl").unlink()


@pytest.mark.parametrize("spoil", [meta_only, pointer, no_table])
def test_a_dataset_that_another_program_brought_in_part_is_completed(spoil, fetch, hub, tmp_path):
    local = tmp_path / "lerobot/lab/arm"
    shutil.copytree(DATASET, local)
    spoil(local)
    assert rows(fetch("recipes.py:everything", "--dataset", "--list"))[-1][:2] == ["dataset", "to fetch"]
    done = fetch("recipes.py:everything", "--dataset")
    assert rows(done)[-1][:2] == ["dataset", "fetched"], done.stdout
    assert all(same(file, local) for file in DATASET_FILES)
    assert rows(fetch("recipes.py:everything", "--dataset", OPENPI_OFFLINE="1"))[-1][:2] == ["dataset", "was here"]


def same(file: Path, folder: Path) -> bool:
    return (folder / file.relative_to(DATASET)).read_bytes() == file.read_bytes()


def test_a_dataset_that_is_here_is_left_alone_unless_that_is_asked_for(fetch, tmp_path):
    local = tmp_path / "lerobot/lab/arm"
    shutil.copytree(DATASET, local)
    tasks = local / "meta/tasks.jsonl"
    tasks.unlink()
    tasks.write_text('{"task_index": 0, "task": "of our own"}\n')
    assert rows(fetch("recipes.py:everything", "--dataset"))[-1][:2] == ["dataset", "was here"]
    assert "of our own" in tasks.read_text()
    assert rows(fetch("recipes.py:everything", "--dataset", "--force"))[-1][:2] == ["dataset", "fetched"]
    assert same(DATASET / "meta/tasks.jsonl", local)


def test_offline_the_hub_is_not_asked_for_a_dataset_either_and_its_place_is_named(fetch, hub, tmp_path):
    done = fetch("recipes.py:everything", "--dataset", OPENPI_OFFLINE="1")
    assert done.returncode == 1
    assert f"dataset 'lab/arm' is not in {tmp_path / 'lerobot/lab/arm'}" in done.stdout
    assert hub.requests == []


def test_what_is_logged_of_a_download_is_not_every_request(fetch):
    assert "HTTP Request" not in fetch("recipes.py:everything", "--dataset").stderr
