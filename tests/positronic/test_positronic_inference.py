"""`positronic-inference`, as its users type it, with a real server on the other side of the wire."""

import contextlib
import functools
import json
import logging
import socket
import threading

import numpy as np
import pytest
import websockets.exceptions
import websockets.sync.server

from openpi_client import msgpack_numpy
from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.franka import stacking
from openpi_positronic.raw_episodes import RawDataset

QUICK = ("--camera_fps=2", "--driver.simulation_time=1.5", "--seed=4")


@pytest.fixture
def run(positronic):
    """Runs the command in this process; returns its exit code."""
    return functools.partial(positronic, "positronic-inference")


class Server:
    """Encodes, decides and decodes as an inference server does: the arm is told to stay, the gripper to open."""

    def __init__(self):
        self.codec = get_codec("ee")
        self.paths: list[str] = []
        self.requests: list[dict] = []
        self.fails_after = 10**6

    def handle(self, ws) -> None:
        self.paths.append(ws.request.path)
        ready = {"status": "ready", "meta": {"type": "openpi", "checkpoint_id": "7", **self.codec.served_meta}}
        ws.send(msgpack_numpy.packb(ready))
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            while True:
                ws.send(msgpack_numpy.packb(self.answer(msgpack_numpy.unpackb(ws.recv()))))

    def answer(self, raw: dict) -> dict:
        self.requests.append(raw)
        if len(self.requests) > self.fails_after:
            return {"error": "the model is on fire"}
        state = self.codec.encode(raw)["observation/state"]
        return {"result": self.codec.decode(np.tile([*state[:7], 1.0], (50, 1)))}


@pytest.fixture
def server():
    server = Server()
    with websockets.sync.server.serve(server.handle, "127.0.0.1", 0, compression=None) as listening:
        server.arguments = (
            "--policy=.remote",
            "--policy.host=127.0.0.1",
            f"--policy.port={listening.socket.getsockname()[1]}",
        )
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield server
        listening.shutdown()
        thread.join()


def test_a_remote_policy_moves_the_robot_and_everything_is_logged(run, server, tmp_path):
    code = run("sim", *server.arguments, *QUICK, "--driver.num_iterations=2", "--policy.model_id=00010",
               f"--output_dir={tmp_path / 'logs'}", "--driver.task=stack them")  # fmt: skip
    assert code == 0
    assert server.paths == ["/api/v1/session/00010"] * 2  # a session for each episode
    first = server.requests[0]
    assert first["task"] == "stack them"
    assert first["image.wrist"].shape == first["image.exterior"].shape == (168, 224, 3)  # as the server wants them
    episodes = RawDataset(tmp_path / "logs")
    assert len(episodes) == 2
    assert (
        episodes[0].static
        | {
            "task": "stack them",
            "inference.policy.type": "remote",
            "inference.policy.server.type": "openpi",
            "inference.policy.server.checkpoint_id": "7",
            "inference.policy.server.image_sizes": [224, 224],
            "simulation.total_iterations": "2",
            "simulation.seed": "4",
        }
        == episodes[0].static
    )
    grip = episodes[0].signal("grip")
    assert grip.values([0])[0] < 0.05 and grip.values([len(grip) - 1])[0] > 0.95  # 1 opens, in simulation
    assert episodes[0].signal("image.wrist").shape == (240, 320, 3)
    assert set(episodes[0].signals) > {"robot_commands.pose", "target_grip", "box_distance"}
    (metadata,) = (tmp_path / "logs").glob("run_metadata_*.yaml")
    assert json.loads(metadata.read_text())["seed"] == 4
    # The next run goes on where this one ended.
    assert run("sim", *server.arguments, *QUICK, f"--output_dir={tmp_path / 'logs'}", "--observers=.none") == 0
    assert len(RawDataset(tmp_path / "logs")) == 3
    assert stacking.SUCCESS not in RawDataset(tmp_path / "logs")[2].signals


def test_a_server_that_is_not_listening_yet_is_waited_for(run):
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    server, refused, done = Server(), threading.Event(), threading.Event()

    def serve_late() -> None:
        refused.wait(30)
        with websockets.sync.server.serve(server.handle, "127.0.0.1", port, compression=None) as listening:
            threading.Thread(target=lambda: (done.wait(60), listening.shutdown())).start()
            listening.serve_forever()

    class Notice(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Trying again for 20 s" in record.getMessage():
                refused.set()

    thread, notice = threading.Thread(target=serve_late), Notice()
    thread.start()
    logging.getLogger("openpi_positronic").addHandler(notice)
    try:
        arguments = ("--policy=.remote", "--policy.host=127.0.0.1", f"--policy.port={port}", "--connect_timeout_s=20")
        assert run("sim", *arguments, *QUICK, "--driver.simulation_time=0.1") == 0
    finally:
        logging.getLogger("openpi_positronic").removeHandler(notice)
        refused.set()
        done.set()
        thread.join()
    assert len(server.requests) == 1


def test_a_failing_server_ends_the_run_in_one_line_and_keeps_the_log(run, server, tmp_path, capsys):
    server.fails_after = 1
    assert run("sim", *server.arguments, *QUICK, f"--output_dir={tmp_path / 'logs'}") == 1
    error = capsys.readouterr().err
    assert "positronic-inference: Server error: the model is on fire" in error
    assert "Traceback" not in error
    (episode,) = RawDataset(tmp_path / "logs")
    assert episode.static["inference.error"] == "Server error: the model is on fire"


def test_a_seed_is_one_scene(run, tmp_path):
    for name in ("a", "b"):
        assert (
            run("sim", "--policy=.scripted", *QUICK, "--driver.simulation_time=0.1", f"--output_dir={tmp_path / name}")
            == 0
        )
    first, second = (RawDataset(tmp_path / name)[0].signal("box_distance").values([0]) for name in ("a", "b"))
    assert first == second


def test_recordings_of_several_runs_are_sent_to_a_bucket_side_by_side(run, tmp_path, bucket, monkeypatch):
    s3, name, url = bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    s3.clear_instance_cache()
    arguments = ("sim", "--policy=.scripted", *QUICK, "--driver.simulation_time=0.1", f"--output_dir=s3://{name}/logs")
    assert run(*arguments) == run(*arguments) == 0
    s3.get(f"{name}/logs/", str(tmp_path / "fetched"), recursive=True)
    assert len(RawDataset(tmp_path / "fetched")) == 2
    assert list((tmp_path / "cache" / "recordings").iterdir()) == []
    s3.clear_instance_cache()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--policy=.remote"),
        (("--policy=.nothing",), "nothing"),
        (("--policy=.remote", "--policy.port=1", "--connect_timeout_s=0"), "ws://localhost:1/api/v1/session"),
        (("--policy=remote",), "policy is the text 'remote'; expected a configuration: .remote, with a dot,"),
        (("--policy=.scripted", "--driver=timed"), "driver is the text 'timed'"),
        (("--policy=.scripted", "--observers=none"), "observers is the text 'none'"),
        (("--policy=.remote", "--policy.codec=nothing"), "no codec 'nothing'"),
        (("--policy=.scripted", "--driver.num_iterations=0"), "num_iterations"),
        (("--policy=.scripted", "--driver.simulation_time=-1"), "simulation_time"),
        (("--policy=.scripted", "--driver=.keyboard"), "terminal"),
        (("--policy=.scripted", "--driver.show_gui=True"), "display"),
        (("--policy=.scripted", "--camera_dict={'image.wrist': 'eye'}"), "no camera 'eye'"),
        (("--policy=.scripted", "--camera_fps=0"), "camera_fps"),
        (("--policy=.scripted", "--renderer=crayon"), "crayon"),
        (("--policy=.scripted", "--mujoco_model_path=/nowhere.xml"), "/nowhere.xml"),
    ],
)
def test_what_cannot_be_ends_in_one_line_before_anything_is_recorded(
    run, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.delenv("DISPLAY", raising=False)
    assert run("sim", *arguments, f"--output_dir={tmp_path / 'logs'}") == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2
    assert "Traceback" not in error
    assert not (tmp_path / "logs").exists()
