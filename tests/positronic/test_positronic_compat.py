"""The commands of Positronic as its users type them, run by openpi."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import s3fs

from openpi.data.lerobot.reader import LeRobotDataset
from openpi.shared import normalize
from openpi_positronic.codecs import catalog
from openpi_positronic.codecs.catalog import get_codec
from positronic.vendors.openpi import server

CODECS = "positronic.vendors.openpi.codecs"
PROGRAMS = ("positronic-to-lerobot", "openpi-stats", "openpi-train", "openpi-server", "positronic-inference")


@pytest.fixture
def recordings(golden) -> Path:
    return golden / "positronic_raw" / "dataset"


def test_the_commands_are_installed(golden):
    """As programs of their own, in the syntax of the documents."""
    folder = Path(sys.executable).parent
    for program in PROGRAMS:
        done = subprocess.run([folder / program, "--help"], capture_output=True, text=True, check=True)
        assert any(flag in done.stdout for flag in ("_path", "_dir", "sim"))


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["serve", "--port=1"], ["--port=1"]),
        (["eepose_absolute", "--port=1"], [f"--codec=@{CODECS}.eepose_absolute", "--port=1"]),
        (["--port=1"], ["--port=1"]),
        ([], []),
        (["phail", "--model.checkpoints_dir=x"], [f"--codec=@{CODECS}.phail_v1", "--checkpoints_dir=x"]),
        (
            ["droid", "--pipeline.source.config_name=pi05_droid", "--pipeline.codec.fps=10"],
            [f"--codec=@{CODECS}.droid", "--config_name=pi05_droid", "--codec.fps=10"],
        ),
    ],
)
def test_older_and_newer_forms_of_the_server_s_command_line_are_taken(words, meant):
    assert server.as_one_command(words) == meant


def test_the_recipe_of_the_documents_takes_what_the_converter_writes(positronic, recordings, tmp_path):
    assert not positronic(
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
    assert not positronic("openpi-stats", f"--input_path={tmp_path / 'set'}", f"--output_path={tmp_path / 'stats'}")
    stats = normalize.load(tmp_path / "stats" / "assets" / "pi05_positronic_lowmem" / "lerobot")
    np.testing.assert_allclose(stats["state"].mean[:8], dataset.column("observation.state").mean(axis=0), atol=1e-5)


def test_datasets_and_statistics_may_lie_in_buckets(positronic, golden, bucket, monkeypatch, tmp_path):
    s3, lab, url = bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    s3fs.S3FileSystem.clear_instance_cache()  # they remember where they lead
    assert not positronic(
        "positronic-to-lerobot",
        "convert",
        f"--dataset.dataset.path={golden / 'positronic_raw' / 'dataset'}",
        f"--output_dir=s3://{lab}/set",
        "--num_workers=0",
    )
    assert not positronic("openpi-stats", f"--input_path=s3://{lab}/set", f"--output_path=s3://{lab}/stats")
    s3.invalidate_cache()
    content = s3.cat(f"{lab}/stats/assets/pi05_positronic_lowmem/lerobot/norm_stats.json")
    assert normalize.deserialize_json(content.decode())["state"].width == 8
    s3fs.S3FileSystem.clear_instance_cache()


def test_recordings_are_appended_once_unless_asked_again(positronic, recordings, tmp_path, capsys):
    arguments = (f"--dataset.dataset.path={recordings}", f"--output_dir={tmp_path / 'set'}", "--num_workers=0")
    assert not positronic("positronic-to-lerobot", "convert", *arguments)
    assert positronic("positronic-to-lerobot", "append", *arguments) == 1
    assert "already" in capsys.readouterr().err
    assert not positronic("positronic-to-lerobot", "append", *arguments, "--repeat=True")
    assert len(LeRobotDataset(tmp_path / "set").metadata.episodes) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "--dataset.codec=.nothing"], "positronic.vendors.openpi.codecs has droid, droid_jointpos, ee,"),
        (["convert", f"--dataset.codec=@{CODECS}.nothing"], "libero, openpi_positronic, phail_v1"),
        (["convert", "--dataset.dataset=@positronic.cfg.ds.sim.nothing"], "has sim_pick_place, sim_stack_cubes"),
        (["convert", "--dataset.dataset=@positronic.cfg.phail.v1_0.ds.nothing"], "has human, rollouts, teleop"),
        (["convert", "--dataset.dataset=@positronic.cfg.nothing.x"], "positronic.cfg has driver, ds, observers"),
        (["convert", f"--dataset.codec=@{CODECS}.libero"], "inference only"),
        (["convert", "--dataset.codec=nothing"], "no codec 'nothing'; there are"),
        (["convert", "--dataset.codec=None"], "dataset.codec is None"),
        (["convert", f"--dataset.codec=@{CODECS}.openpi_positronic"], "allow no '/' in names"),
        (
            ["append", "--dataset.dataset=local"],
            "dataset.dataset is the text 'local'; expected a configuration: .local,",
        ),
        (["convert", f"--dataset.codec=@{CODECS}.droid"], "inference only"),
        (["convert", "--dataset.dataset.path=/nowhere"], "/nowhere does not exist"),
        (["convert", "--outputdir=x"], "unexpected keyword argument 'outputdir'"),
        (["convert", "--dataset.dataset=.local"], "'path'; give --dataset.dataset.path=..."),
        (["konvert"], "konvert"),
    ],
)
def test_what_is_mistyped_or_impossible_ends_in_one_line(positronic, recordings, tmp_path, capsys, arguments, message):
    command = arguments[:1]
    rest = [f"--dataset.dataset.path={recordings}", f"--output_dir={tmp_path / 'set'}", *arguments[1:]]
    if any(argument.startswith("--dataset.dataset=") for argument in arguments):  # a path belongs to `.local`
        rest = rest[1:]
    assert positronic("positronic-to-lerobot", *command, *(rest if command != ["konvert"] else ())) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2
    assert "Traceback" not in error
    assert not (tmp_path / "set").exists()


def test_codecs_are_also_named_as_in_openpi_and_found_in_the_current_folder(
    positronic, recordings, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "codec_of_this_folder.py").write_text(
        "import configuronic\nfrom openpi_positronic.codecs.catalog import get_codec\n"
        "codec = get_codec('ee_joints')\nchosen = configuronic.Config(get_codec, name='joints_traj')\n"
    )
    widths = []
    for name in ("ee", "codec_of_this_folder.py:codec", "@codec_of_this_folder.chosen"):
        folder = tmp_path / f"set{len(widths)}"
        arguments = ("convert", f"--dataset.dataset.path={recordings}", f"--output_dir={folder}", "--num_workers=0")
        assert not positronic("positronic-to-lerobot", *arguments, f"--dataset.codec={name}", "--video=False")
        assert f"written: {folder}" in capsys.readouterr().err
        widths += LeRobotDataset(folder).metadata.features["observation.state"]["shape"]
    assert widths == [8, 15, 8]


@pytest.mark.parametrize("name", catalog.PUBLISHED)
def test_every_published_codec_name_is_the_codec_of_that_name(name):
    from positronic.vendors.openpi import codecs

    assert getattr(codecs, name).instantiate() == get_codec(name)


def test_a_frame_that_nobody_converts_is_refused(positronic, tmp_path, capsys):
    arguments = ("ee", f"--pipeline.source.checkpoints_dir={tmp_path}", "--pipeline.ee_frame=hand")
    assert positronic("openpi-server", *arguments) == 1
    assert "converts no frames" in capsys.readouterr().err


def test_fields_of_a_codec_can_be_set():
    from positronic.vendors.openpi import codecs

    assert codecs.ee_traj.override(horizon_sec=None, binarise_observation=True).instantiate() == get_codec(
        "ee_traj", horizon_s=None, observed_binary=True
    )


def test_the_public_recordings_are_read_without_credentials():
    from positronic.cfg.ds import phail, sim
    from positronic.cfg.phail.v1_0 import ds

    assert sim.sim_stack_cubes is phail.sim_stack_cubes and sim.sim_pick_place is phail.sim_pick_place
    assert ds.teleop.instantiate().place == "s3://positronic-public/phail/v1.0/dataset/teleoperation/"
    for name in ("phail", "sim_stack_cubes", "sim_pick_place"):
        recordings = getattr(phail, name).instantiate()
        assert recordings.place == f"s3://positronic-public/datasets/{name.replace('_', '-')}/"
        assert recordings.options["s3"]["anon"] is True
