"""The commands of Positronic as its users type them, run by openpi."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import s3fs

from openpi.codecs import catalog
from openpi.codecs.catalog import get_codec
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.raw_episodes import RawDataset
from openpi.shared import normalize
from openpi_client.positronic_client import PositronicClient
from positronic.vendors.openpi import server

CODECS = "positronic.vendors.openpi.codecs"
MODULES = {
    "positronic-to-lerobot": "positronic.to_lerobot",
    "openpi-stats": "positronic.vendors.openpi.stats",
    "openpi-train": "positronic.vendors.openpi.train",
    "openpi-server": "positronic.vendors.openpi.server",
}

pytestmark = pytest.mark.usefixtures("logging_as_before")


@pytest.fixture
def run(monkeypatch):
    """Runs a command in this process; returns its exit code."""

    def call(program: str, *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        try:
            importlib.import_module(MODULES[program]).main()
        except SystemExit as end:
            return end.code or 0
        return 0

    return call


@pytest.fixture
def recordings(golden) -> Path:
    return golden / "positronic_raw" / "dataset"


def test_the_commands_are_installed(golden):
    """As programs of their own, in the syntax of the documents."""
    folder = Path(sys.executable).parent
    for program in MODULES:
        done = subprocess.run([folder / program, "--help"], capture_output=True, text=True, check=True)
        assert any(flag in done.stdout for flag in ("_path", "output_dir", "checkpoints_dir"))


TINY = """
import dataclasses
import sys
sys.path.insert(0, {tests!r})
import tiny_arm
from openpi.training.config import get_config
from openpi.training.weight_loaders import NoOpWeightLoader

model = dataclasses.replace(tiny_arm.MODEL, action_dim=16, max_token_len=200)
recipe = dataclasses.replace(
    get_config("pi05_positronic_lowmem"), name="pi05_positronic_tiny", model=model, batch_size=2, num_workers=0,
    weight_loader=NoOpWeightLoader(), freeze_filter=tiny_arm.recipe.freeze_filter,
)
"""


def test_the_documented_way_from_recordings_to_a_checkpoint(run, recordings, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    recipe = tmp_path / "tiny_positronic.py"
    recipe.write_text(TINY.format(tests=str(Path(__file__).parent)))
    dataset, stats, checkpoints = (tmp_path / name for name in ("cubes lerobot", "stats", "checkpoints"))
    assert not run(
        "positronic-to-lerobot",
        "convert",
        "--dataset.dataset=.local",
        f"--dataset.dataset.path={recordings}",
        f"--dataset.codec=@{CODECS}.ee_joints",
        f"--output_dir={dataset}",
        "--fps=15",
        "--num_workers=0",
    )
    assert LeRobotDataset(dataset).metadata.features["observation.state"]["shape"] == [15]
    assert not run(
        "openpi-stats", f"--input_path={dataset}", f"--output_path={stats}", f"--config_name={recipe}:recipe"
    )
    folder = stats / "assets" / "pi05_positronic_tiny" / "lerobot"
    assert normalize.load(folder)["state"].width == 15
    assert not run(
        "openpi-train",
        f"--input_path={dataset}",
        f"--stats_path={stats}/assets/",
        f"--output_path={checkpoints}",
        f"--config_name={recipe}:recipe",
        "--exp_name=20240101",
        "--num_train_steps=2",
        "--extra_args=['--log-interval=1']",
    )
    (step,) = (checkpoints / "pi05_positronic_tiny" / "20240101").glob("[0-9]*")
    assert step.name == "1"
    assert (step / "assets" / "lerobot" / "norm_stats.json").read_text() == (folder / "norm_stats.json").read_text()
    contract = json.loads((step / "contract.json").read_text())
    assert "observation/image" in json.dumps(contract)
    assert_is_served(step.parent, recipe, recordings, tmp_path)


def assert_is_served(experiment: Path, recipe: Path, recordings: Path, tmp_path: Path) -> None:
    """The checkpoint answers recorded observations with robot commands, by the documented command."""
    records, port_file = tmp_path / "records", tmp_path / "port"
    command = [Path(sys.executable).parent / "openpi-server", "serve", f"--checkpoints_dir={experiment}"]
    command += [f"--codec=@{CODECS}.ee_joints", f"--config_name={recipe}:recipe", "--host=127.0.0.1", "--port=0"]
    command += [f"--recording_dir={records}", f"--extra_args=['--num-steps=1', '--port-file={port_file}']"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parent / ".cache" / "jax")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            assert any("Policy server on ws://" in line for line in process.stderr)
            robot = PositronicClient("127.0.0.1", int(port_file.read_text()), model_id="000001")
            raw = RawDataset(recordings)[0]
            at_start = raw.time[raw.start_ts]
            wanted = ("robot_state.ee_pose", "robot_state.q", "grip", "image.wrist", "image.exterior")
            steps = robot.infer({name: at_start[name] for name in wanted} | {"task": "stack the cubes"})
            meta = robot.meta
            robot.close()
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            assert process.returncode == 0
        finally:
            process.kill()
    assert steps[0]["robot_command"]["type"] == "cartesian_pos"
    assert steps[0]["robot_command"]["pose"].shape == (12,) and "timestamp" in steps[-1]
    assert (meta["type"], meta["server.checkpoint_id"], meta["server.experiment_name"]) == ("remote", "1", "20240101")
    assert len(list(records.glob("*/step_0.npy"))) == 1


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["serve", "--port=1"], ["--port=1"]),
        (["eepose_absolute", "--port=1"], [f"--codec=@{CODECS}.eepose_absolute", "--port=1"]),
        (["--port=1"], ["--port=1"]),
        ([], []),
    ],
)
def test_older_and_newer_forms_of_the_server_s_command_line_are_taken(words, meant):
    assert server.with_codec_flag(words) == meant


def test_the_recipe_of_the_documents_takes_what_the_converter_writes(run, recordings, tmp_path):
    assert not run(
        "positronic-to-lerobot",
        "convert",
        f"--dataset.dataset.path={recordings}",
        f"--output_dir={tmp_path / 'set'}",
        "--video=False",
        "--task=7",
        "--num_workers=0",
    )
    dataset = LeRobotDataset(tmp_path / "set")
    assert dataset.metadata.camera_keys == dataset.metadata.image_keys
    assert dict(dataset.metadata.tasks) == {0: "7"}  # a text, though it looks like a number
    assert not run("openpi-stats", f"--input_path={tmp_path / 'set'}", f"--output_path={tmp_path / 'stats'}")
    stats = normalize.load(tmp_path / "stats" / "assets" / "pi05_positronic_lowmem" / "lerobot")
    np.testing.assert_allclose(stats["state"].mean[:8], dataset.column("observation.state").mean(axis=0), atol=1e-5)


def test_datasets_and_statistics_may_lie_in_buckets(run, golden, bucket, monkeypatch, tmp_path):
    s3, lab, url = bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    s3fs.S3FileSystem.clear_instance_cache()  # they remember where they lead
    assert not run(
        "positronic-to-lerobot",
        "convert",
        f"--dataset.dataset.path={golden / 'positronic_raw' / 'dataset'}",
        f"--output_dir=s3://{lab}/set",
        "--num_workers=0",
    )
    assert not run("openpi-stats", f"--input_path=s3://{lab}/set", f"--output_path=s3://{lab}/stats")
    s3.invalidate_cache()
    content = s3.cat(f"{lab}/stats/assets/pi05_positronic_lowmem/lerobot/norm_stats.json")
    assert normalize.deserialize_json(content.decode())["state"].width == 8
    s3fs.S3FileSystem.clear_instance_cache()


def test_recordings_are_appended_once_unless_asked_again(run, recordings, tmp_path, capsys):
    arguments = (f"--dataset.dataset.path={recordings}", f"--output_dir={tmp_path / 'set'}", "--num_workers=0")
    assert not run("positronic-to-lerobot", "convert", *arguments)
    assert run("positronic-to-lerobot", "append", *arguments) == 1
    assert "already" in capsys.readouterr().err
    assert not run("positronic-to-lerobot", "append", *arguments, "--repeat=True")
    assert len(LeRobotDataset(tmp_path / "set").metadata.episodes) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "--dataset.codec=.nothing"], "codecs.nothing"),
        (["convert", f"--dataset.codec=@{CODECS}.droid"], "inference only"),
        (["convert", "--dataset.dataset.path=/nowhere"], "/nowhere does not exist"),
        (["convert", "--outputdir=x"], "outputdir"),
        (["konvert"], "konvert"),
    ],
)
def test_what_is_mistyped_or_impossible_ends_in_one_line(run, recordings, tmp_path, capsys, arguments, message):
    command = arguments[:1]
    rest = [f"--dataset.dataset.path={recordings}", f"--output_dir={tmp_path / 'set'}", *arguments[1:]]
    assert run("positronic-to-lerobot", *command, *(rest if command == ["convert"] else ())) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2
    assert "Traceback" not in error
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", [*catalog.CURRENT, *catalog.OLDER, "eepose"])
def test_every_published_codec_name_is_the_codec_of_that_name(name):
    from positronic.vendors.openpi import codecs

    assert getattr(codecs, name).instantiate() == get_codec(name)


def test_fields_of_a_codec_can_be_set():
    from positronic.vendors.openpi import codecs

    assert codecs.ee_traj.override(horizon_sec=None, binarise_observation=True).instantiate() == get_codec(
        "ee_traj", horizon_s=None, observed_binary=True
    )


def test_the_public_recordings_are_read_without_credentials():
    from positronic.cfg.ds import phail

    for name in ("phail", "sim_stack_cubes", "sim_pick_place"):
        recordings = getattr(phail, name).instantiate()
        assert recordings.place == f"s3://positronic-public/datasets/{name.replace('_', '-')}/"
        assert recordings.options["s3"]["anon"] is True
