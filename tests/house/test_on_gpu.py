"""`benchmarks/on_gpu.py`, on tiny models, as a machine runs it that has little more than PyTorch and JAX."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import paths

SCRIPT = paths.ROOT / "benchmarks" / "on_gpu.py"
# A minute where nothing else runs, and ten beside fifteen busy processes.
PATIENCE_S = 1500
# Of what the project installs, a machine with a GPU for a quarter of an hour has none of these.
MISSING = ("augmax", "av", "beartype", "google_crc32c", "gymnasium", "mujoco", "tyro")
_HIDES = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {missing} else super().find_spec(name, path, target)

Hiding.__name__ = PathFinder.__name__  # by which jaxtyping finds it
sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def run(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": "" if path is None else str(path)}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def states(folder: Path) -> dict[str, str]:
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return {record["part"]: record["state"] for record in records if record["case"] == "status"}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder on the path of Python that hides what is missing."""
    (tmp_path / "hides").mkdir()
    (tmp_path / "hides" / "sitecustomize.py").write_text(_HIDES.format(missing=set(MISSING)))
    return tmp_path / "hides"


@pytest.mark.timeout(PATIENCE_S + 100)
def test_every_part_runs_where_little_is_installed_and_leaves_the_page(bare: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "out"
    done = run("--smoke", "--out", out, "--limit-s", PATIENCE_S - 100, path=bare)
    page = (out / "on_gpu.md").read_text()
    assert done.returncode == 0, page + (out / "log.txt").read_text()[-4000:]
    assert set(states(out).values()) == {"done"}, page
    assert page in done.stdout and "nothing else" in page
    goals = page.partition("## Goals")[2].partition("##")[0]
    reached = [line.split(" | ")[2] for line in goals.splitlines() if line.startswith("| ")][2:]
    # No GPU tells the peak of its memory.
    assert len(reached) == 11 and reached.count("open") == 1, page


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))
    yield importlib.import_module("on_gpu")
    sys.path.remove(str(SCRIPT.parent))


def test_a_part_that_is_stopped_at_its_limit_leaves_what_was_done_and_is_named(
    on_gpu: ModuleType, tmp_path: Path
) -> None:
    args = argparse.Namespace(out=tmp_path, smoke=True)
    records = on_gpu.Records(tmp_path)
    on_gpu.run_here(["environment"], tmp_path, is_smoke=True)
    on_gpu.run_apart([on_gpu.PARTS["ceilings"]], 0.05, args, records)
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"part": "latency/jax", "case": "cut in the mid')
    on_gpu.write_page(tmp_path, "the command")
    page = (tmp_path / "on_gpu.md").read_text()
    assert "| environment | done |" in page and "the command" in page
    assert "| ceilings | stopped | 0 | not done after 0 s |" in page
    assert "| latency/jax | not run |" in page


def test_a_part_that_lacks_a_library_is_skipped_and_one_that_fails_is_told_from_it(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(size: object, records: object) -> None:
        raise ModuleNotFoundError("No module named 'websockets.client'", name="websockets.client")

    def fails(size: object, records: object) -> None:
        importlib.import_module("openpi.is_not_there")

    for name, run in (("lacks", lacks), ("fails", fails)):
        monkeypatch.setitem(on_gpu.PARTS, name, on_gpu.Part(name, run, 1, 1, "jax"))
    on_gpu.run_here(["fails", "lacks"], tmp_path, is_smoke=True)
    assert states(tmp_path) == {"fails": "failed", "lacks": "skipped"}
    on_gpu.write_page(tmp_path, "")
    assert "| lacks | skipped | 0 | No module named 'websockets.client' |" in (tmp_path / "on_gpu.md").read_text()


def test_parts_are_chosen_by_the_beginning_of_their_names(on_gpu: ModuleType) -> None:
    names = [part.name for part in on_gpu.chosen(["training/jax", "ceilings"])]
    assert names[0] == "ceilings" and len(names) == 5
    with pytest.raises(SystemExit, match="no part 'latancy'; there are: environment"):
        on_gpu.chosen(["latancy"])
