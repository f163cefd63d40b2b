"""Episodes in processes and on a Ray cluster: the same bytes, though a worker is killed in the middle.

What needs Ray runs where the extra `ray` is installed: `uv sync --inexact --extra ray`.
"""

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import dot_world
import planted_mistakes as mistakes
import raw_recordings as raw
from openpi.cli import main as cli
from openpi.cli.serving.serve_dummy import of_recipe
from openpi.convert.engine import Options, convert
from openpi.convert.formats.aloha import AlohaHdf5
from openpi.data.check import runner
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.evaluation.asker import running_server
from openpi.evaluation.evaluate import Evaluation, evaluate
from openpi.evaluation.pooled_worlds import PooledWorlds, Server
from openpi.models.pi0_config import Pi0Config
from openpi.shared.pools import IN_PROCESS, Pool, Processes, WorkerLostError, open_pool
from openpi.training.config import TrainConfig
from openpi.training.data import frame_blocks, norm_stats
from openpi.training.data_config import AssetsConfig, DataConfig, SimpleDataConfig, repack
from pool_jobs import Deadly, doubled, killed
from serving_live import server_thread

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Pool]:
    """Two workers."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with open_pool("auto") as pool:
        yield pool
    assert ray.is_initialized()  # a cluster to which somebody else has connected stays
    ray.shutdown()


# --- what a pool is


def assert_is_a_pool(pool: Pool) -> None:
    assert sorted(pool.each(doubled, range(5))) == [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8)]
    assert list(pool.each(doubled, [])) == []
    with pytest.raises(KeyError, match="-7 has no double") as raised:
        list(pool.each(doubled, [3, -7]))
    assert type(raised.value) is KeyError


@pytest.mark.parametrize("num_workers", [0, 2])
def test_jobs_come_with_their_results_and_errors_are_those_of_the_job(num_workers):
    assert_is_a_pool(Processes(num_workers))


def test_a_process_that_is_killed_is_told(tmp_path):
    with pytest.raises(WorkerLostError, match="ended from outside"):
        list(Deadly(Processes(2), tmp_path / "deaths").each(doubled, range(4)))


def test_a_cluster_without_ray_names_the_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["convert", "aloha", str(tmp_path), str(tmp_path / "set"), "--ray", "auto"]) == 1
    assert "uv sync --extra ray" in capsys.readouterr().err


# --- on a cluster


@needs_ray
def test_a_cluster_is_a_pool(cluster):
    assert_is_a_pool(cluster)


@needs_ray
def test_a_worker_that_is_killed_again_and_again_is_told(cluster):
    with pytest.raises(WorkerLostError, match="lost a job 4 times"):
        list(cluster.each(killed, [0]))


@needs_ray
def test_an_address_where_nobody_listens_is_told(tmp_path):
    from openpi.shared import ray_pool

    with pytest.raises(OSError, match="refused"):
        ray_pool._check_answers("ray://127.0.0.1:1")


@needs_ray
def test_a_conversion_has_the_same_bytes_of_videos_too(cluster, tmp_path):
    (tmp_path / "raw").mkdir()
    for number in range(4):
        raw.aloha_episode(tmp_path / "raw" / f"episode_{number}.hdf5", number, cameras=("cam_high",))
    source, options = AlohaHdf5(tmp_path / "raw"), Options(task="fold the shirt")
    deadly = Deadly(cluster, tmp_path / "deaths")
    convert(source, tmp_path / "here", options, num_workers=0)
    convert(source, tmp_path / "there", options, pool=deadly)
    assert deadly.has_killed
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deaths", "here", "raw", "there"]


def contents(root: Path) -> dict[str, bytes]:
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith("run_metadata")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@needs_ray
def test_a_check_finds_the_same(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "_WORTH_PROCESSES", 1)
    root = mistakes.arm(6).write(tmp_path / "arm")
    deadly = Deadly(cluster, tmp_path / "deaths")
    found, expected = runner.check_dataset(root, pool=deadly), runner.check_dataset(root)
    assert deadly.has_killed
    assert dataclasses.replace(found, seconds=0) == dataclasses.replace(expected, seconds=0)
    assert cli.main(["dataset", "check", str(root), "--ray", "auto"]) == 0
    assert f"{expected.num_pictures} pictures looked at" in capsys.readouterr().out


@needs_ray
def test_statistics_have_the_same_bytes(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(frame_blocks, "BLOCK_FRAMES", 4)
    monkeypatch.setattr(norm_stats, "_BLOCKS_PER_JOB", 3)
    config = recipe(tmp_path)
    deadly = Deadly(cluster, tmp_path / "deaths")
    for name, pool in (("here", IN_PROCESS), ("there", deadly)):
        norm_stats.compute(config, path=tmp_path / name / "norm_stats.json", pool=pool)
    assert deadly.has_killed
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def recipe(folder: Path) -> TrainConfig:
    rng = np.random.default_rng(0)
    vector = {"dtype": "float32", "shape": [7], "names": None}
    with LeRobotWriter(folder / "set", fps=10, features={"state": vector, "actions": vector}) as writer:
        for length in (30, 41, 17):
            writer.add_episode(
                {key: rng.normal(size=(length, 7)).astype(np.float32) for key in ("state", "actions")}, "t"
            )
    base = DataConfig(repack_transforms=repack({"state": "state", "actions": "actions"}))
    data = SimpleDataConfig(repo_id=str(folder / "set"), assets=AssetsConfig(asset_id="arm"), base_config=base)
    model = Pi0Config(action_horizon=4)
    return TrainConfig(name="test", model=model, data=data, assets_base_dir=str(folder / "assets"))


@needs_ray
def test_an_evaluation_has_the_same_episodes(cluster, tmp_path):
    name = f"{Path(dot_world.__file__)}:Dot"
    plan = Evaluation(name, dot_world.Dot(), trials=2, videos=1, any_rate=True)
    deadly = Deadly(cluster, tmp_path / "deaths")
    with server_thread(lambda: dot_world.Walking(of_recipe("tabletop_place", 10.0))) as (_, port):
        places = {"here": None, "there": lambda seat: PooledWorlds(seat, deadly, Server("127.0.0.1", port))}
        found = {}
        for place, open_worlds in places.items():
            with running_server("127.0.0.1", port, None) as asker:
                found[place] = evaluate(plan, asker, tmp_path / place, policy={}, open_worlds=open_worlds)
        words = ["evaluate", name, "--ray=auto", f"--port={port}", f"--output={tmp_path / 'command'}", "--trials=1"]
        assert cli.main([*words, "--videos=0"]) == 0
    assert deadly.has_killed
    here, there = found["here"], found["there"]
    assert [told(e) for e in there["episodes"]] == [told(e) for e in here["episodes"]]
    for file in (tmp_path / "here/commands").iterdir():
        assert (tmp_path / "there/commands" / file.name).read_bytes() == file.read_bytes()
    assert len(there["videos"]) == 1 and (tmp_path / "there" / there["videos"][0]["path"]).is_file()
    assert not there["errors"] and "round_trip_ms" not in there


def told(episode: dict) -> dict:
    return {key: value for key, value in episode.items() if key != "seconds"}


def test_an_evaluation_on_a_cluster_asks_a_server_that_its_workers_reach(tmp_path, capsys):
    name = f"{Path(dot_world.__file__)}:Dot"
    assert cli.main(["evaluate", name, "--ray=auto", "--policy=expert", f"--output={tmp_path / 'out'}"]) == 1
    assert "give --host and --port" in capsys.readouterr().err
