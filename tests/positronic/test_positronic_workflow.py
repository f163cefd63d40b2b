"""The whole way of Positronic's documents, each command as it is typed: from recordings to a policy that moves a robot,
and from its logs to a dataset again. The model has the true architecture and is tiny: the one of the documents.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import paths
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.serving.recording import find_sessions, read_session
from openpi.shared import normalize
from openpi_client.positronic_client import PositronicClient
from openpi_positronic.raw_episodes import RawDataset

CODEC = "@positronic.vendors.openpi.codecs.ee_joints"
# A layer is compiled three times faster than three are, and is not computed again in the backward pass.
SMALL = [f"--model.{stack}-variant.depth=1" for stack in ("paligemma", "action-expert", "image-encoder")]
SMALL += ["--model.no-augmentation", "--model.remat=none"]
PAGE = paths.ROOT / "docs" / "how-to" / "positronic.md"


def test_from_recordings_to_a_robot_and_its_logs(positronic, golden, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    recipe = tmp_path / "tiny_positronic.py"
    (source,) = re.findall(r"```python\n(# tiny_positronic\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    recipe.write_text(source)
    raw, dataset, stats, checkpoints, logs = (
        tmp_path / name for name in ("raw", "cubes lerobot", "stats", "checkpoints", "logs")
    )
    convert = ("positronic-to-lerobot", "convert", f"--dataset.codec={CODEC}", "--num_workers=0")
    quick = ("--camera_fps=2", "--seed=0")

    assert not positronic("positronic-inference", "sim", "--policy=.scripted", *quick, f"--output_dir={raw / 'sim'}")
    (raw / "real").symlink_to(golden / "positronic_raw" / "dataset")
    assert not positronic(
        *convert, "--dataset.dataset=.local", f"--dataset.dataset.path={raw}", f"--output_dir={dataset}", "--fps=15"
    )
    converted = LeRobotDataset(dataset)
    assert len(converted.metadata.episodes) == 4
    assert converted.metadata.features["observation.state"]["shape"] == [15]

    named = f"--config_name={recipe}:recipe"
    assert not positronic("openpi-stats", f"--input_path={dataset}", f"--output_path={stats}", named)
    folder = stats / "assets" / "pi05_positronic_tiny" / "lerobot"
    assert normalize.load(folder)["state"].width == 15
    assert not positronic(
        "openpi-train",
        f"--input_path={dataset}",
        f"--stats_path={stats}/assets/",
        f"--output_path={checkpoints}",
        named,
        "--exp_name=20240101",
        "--num_train_steps=2",
        f"--extra_args={['--log-interval=1', '--batch-size=2', '--holdout-episodes=0', *SMALL]}",
    )
    experiment = checkpoints / "pi05_positronic_tiny" / "20240101"
    (step,) = experiment.glob("[0-9]*")
    assert step.name == "1"
    assert (step / "assets" / "lerobot" / "norm_stats.json").read_text() == (folder / "norm_stats.json").read_text()
    assert "observation/image" in json.dumps(json.loads((step / "contract.json").read_text()))

    records = tmp_path / "records"
    with Server(experiment, f"--recording_dir={records}", "--extra_args=['--num-steps=1']") as server:
        assert not positronic(
            "positronic-inference",
            "sim",
            "--policy=.remote",
            "--policy.host=127.0.0.1",
            f"--policy.port={server.port}",
            "--policy.model_id=0001",
            "--driver.simulation_time=1",
            *quick,
            f"--output_dir={logs}",
        )
        with pytest.raises(RuntimeError, match="Checkpoint not found or invalid ID: 777"):
            PositronicClient("127.0.0.1", server.port, model_id="777").reset()
        assert server.stop() == 0
    (log,) = RawDataset(logs)
    said = {key.rpartition(".")[2]: value for key, value in log.static.items() if "policy.server" in key}
    assert [entry["name"] for entry in said.pop("seq")] == ["chunked_schedule", "restrict_image_size"]
    assert said == {
        "type": "openpi",
        "host": "127.0.0.1",
        "port": server.port,
        "config_name": "pi05_positronic_tiny",
        "checkpoint_path": str(experiment),
        "experiment_name": "20240101",
        "checkpoint_id": "1",
        "action_fps": 15.0,
        "action_horizon_sec": 1.0,
        "image_sizes": [224, 224],
    }
    assert len(log.signal("target_grip")) > 10
    (session,) = find_sessions(records)
    for exchange in read_session(session):
        steps = exchange.outputs["result"]
        assert [step["timestamp"] for step in steps] == pytest.approx(np.arange(len(steps)) / 15)
        for step in steps:
            assert step["robot_command"]["type"] == "cartesian_pos"
            assert step["robot_command"]["pose"].shape == (12,) and np.isfinite(step["robot_command"]["pose"]).all()
            assert isinstance(step["target_grip"], float)

    assert not positronic(*convert, f"--dataset.dataset.path={logs}", f"--output_dir={tmp_path / 'again'}")
    assert LeRobotDataset(tmp_path / "again").metadata.features == converted.metadata.features


class Server:
    """`openpi-server` as a program; its log line tells the port."""

    def __init__(self, experiment: Path, *more: str):
        program = Path(sys.executable).parent / "openpi-server"
        arguments = [f"--checkpoints_dir={experiment}", f"--codec={CODEC}", "--host=127.0.0.1", "--port=0"]
        self._process = subprocess.Popen([program, "serve", *arguments, *more], stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        heard = []
        for line in self._process.stderr:
            heard.append(line)
            if "Listening on" in line:
                self.port = int(line.rpartition(":")[2])
                return
        raise AssertionError("".join(heard))

    def stop(self) -> int:
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(60)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
