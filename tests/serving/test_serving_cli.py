"""`openpi serve` and the documented `scripts/serve_policy.py`."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import forked
from golden_kits import write_small
from openpi.checkpoints import checkpoint as checkpoints
from openpi.checkpoints.find import find_step
from openpi.cli.serving import serve_policy, server
from openpi.cli.serving.serve_policy import Checkpoint, EnvMode, Exported
from openpi.policies.droid_policy import DROID_SPEC, make_droid_example
from openpi.serving.recording import find_sessions, read_session
from openpi.serving.warm_up import example_observation
from openpi.training.config import get_config
from openpi.training.recipe_io import recipe_of, save_recipe
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from paths import SUPPORT
from serving_live import wait_for_line

RECIPE = f"{SUPPORT / 'recipes' / 'golden_droid.py'}:small"
PATIENCE_S = 300.0


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ("", Checkpoint("pi0_aloha_sim", "gs://openpi-assets/checkpoints/pi0_aloha_sim")),
        ("--env DROID", Checkpoint("pi05_droid", "gs://openpi-assets/checkpoints/pi05_droid")),
        ("--env=libero", Checkpoint("pi05_libero", "gs://openpi-assets/checkpoints/pi05_libero")),
        ("--env ALOHA policy:default", Checkpoint("pi05_aloha", "gs://openpi-assets/checkpoints/pi05_base")),
        ("policy:checkpoint --policy.config=a --policy.dir=b", Checkpoint("a", "b")),
        ("--env CALVIN", Exported()),
        ("--env ALOHA policy:exported", Exported()),
        ("--env ALOHA policy:exported --policy.dir=a --policy.processor=b", Exported("a", "b")),
        ("--port 8001 policy:checkpoint --policy.config a --policy.dir b", Checkpoint("a", "b")),
    ],
)
def test_the_documented_command_lines_name_their_checkpoints(words, chosen):
    assert serve_policy.choose_checkpoint(serve_policy.parse(words.split())) == chosen


def test_underscores_and_dashes_are_the_same_in_flags():
    for flag in ("--default_prompt", "--default-prompt"):
        args = serve_policy.parse([flag, "fold the towel", "--record", "--port=9000"])
        assert (args.default_prompt, args.record, args.port) == ("fold the towel", True, 9000)


def test_the_defaults_are_recipes_that_exist():
    for checkpoint in [*serve_policy.DEFAULT_CHECKPOINT.values(), *serve_policy._REPLACEMENTS.values()]:
        assert get_config(checkpoint.config).name == checkpoint.config
    assert set(serve_policy.DEFAULT_CHECKPOINT) == set(EnvMode) - {EnvMode.CALVIN}


def make_step(folder: Path) -> Path:
    (folder / "params").mkdir(parents=True)
    (folder / "params" / "_METADATA").write_text("{}")
    return folder


def test_a_run_s_folder_means_its_numerically_latest_complete_step(tmp_path):
    make_step(tmp_path / "9000"), make_step(tmp_path / "10000")
    (tmp_path / "11000").mkdir()
    (tmp_path / "11000.tmp").mkdir()
    assert find_step(str(tmp_path)) == tmp_path / "10000"
    assert find_step(str(tmp_path / "9000")) == tmp_path / "9000"


def test_a_folder_without_a_checkpoint_is_refused_with_what_is_there(tmp_path):
    (tmp_path / "videos").mkdir()
    with pytest.raises(FileNotFoundError, match=r"complete steps in it \(found: videos\)"):
        find_step(str(tmp_path))


def test_the_recipe_comes_with_the_checkpoint_and_differences_to_a_named_one_are_logged(tmp_path, caplog):
    saved = get_config("pi05_droid")
    other = dataclasses.replace(
        saved,
        model=dataclasses.replace(saved.model, action_horizon=7),
        data=dataclasses.replace(saved.data, exclude_episodes=(3,)),  # says nothing of how a policy is served
        policy_metadata={"home": (0.5, 1)},
    )
    save_recipe(tmp_path, other)
    assert recipe_of(checkpoints.Checkpoint(tmp_path)) == other
    assert not caplog.records
    assert recipe_of(checkpoints.Checkpoint(tmp_path), "pi05_droid") == saved
    told = "recipe 'pi05_droid' differs from the checkpoint's: "
    assert [record.getMessage() for record in caplog.records] == [
        f"{told}model.action_horizon is 15, the checkpoint was trained with 7",
        f"{told}policy_metadata is None, the checkpoint was trained with {{'home': (0.5, 1)}}",
    ]


def test_a_checkpoint_without_a_recipe_needs_a_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="--config"):
        recipe_of(checkpoints.Checkpoint(tmp_path))
    assert recipe_of(checkpoints.Checkpoint(tmp_path), "pi05_droid") == get_config("pi05_droid")


def test_the_example_for_warming_up_has_the_keys_and_shapes_that_robots_send():
    example = example_observation(DROID_SPEC.cameras, DROID_SPEC.state)
    sent = make_droid_example()
    assert {key: np.shape(value) for key, value in example.items()} == {
        key: np.shape(value) for key, value in sent.items()
    }


def test_help_answers_without_jax():
    program = (
        "import sys, contextlib\nfrom openpi.cli.serving import serve\n"
        "with contextlib.suppress(SystemExit): serve.main(['--help'])\n"
        "print('jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--port-file" in result.stdout and result.stdout.strip().endswith("False")


def test_a_place_without_a_checkpoint_ends_the_command_with_code_1(tmp_path):
    command = [sys.executable, "-m", "openpi.cli.main", "serve", str(tmp_path / "nothing"), "--port", "0"]
    result = forked.run(command, preloads=forked.SERVING, capture_output=True, text=True)
    assert result.returncode == 1
    assert "openpi serve: " in result.stderr and "does not exist" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_recorded_checkpoint_is_served_to_a_client(golden, tmp_path):
    checkpoint = write_small(golden / "pi05" / "checkpoint", tmp_path / "pi05" / "checkpoint")
    command = [sys.executable, "-m", "openpi.cli.main", "serve", str(checkpoint)]
    command += ["--config", RECIPE, "--num-steps", "1"]
    command += ["--record", str(tmp_path / "records"), "--record-format", "mcap"]
    command += ["--port", "0", "--port-file", str(tmp_path / "port")]
    example = make_droid_example()
    with forked.Popen(command, preloads=(*forked.SERVING, *forked.JAX), stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_line(process, "Policy server on ws://")
            port = int((tmp_path / "port").read_text())
            with WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=PATIENCE_S) as client:
                rtc = {"modes": ["guided"], "max_delay": 9, "horizon": 10, "rate": None}
                which = checkpoints.Checkpoint(checkpoint).identity
                told = client.get_server_metadata()
                assert told.pop("contract")["robot"] == "droid"
                assert told == {"robot": "golden", "rtc": rtc, "checkpoint": which}
                actions = client.infer(example)["actions"]
                assert actions.shape == (10, 8) and np.isfinite(actions).all()
                with pytest.raises(RuntimeError, match="observation/exterior_image_1_left"):
                    client.infer({"prompt": "do something"})
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0
        finally:
            process.kill()
    [session] = find_sessions(tmp_path / "records")
    exchange, refused = read_session(session)
    assert "observation/exterior_image_1_left" in refused.outputs["error"]
    assert session.suffix == ".mcap"
    np.testing.assert_array_equal(exchange.outputs["actions"], actions)
    camera = "observation/wrist_image_left"
    np.testing.assert_array_equal(exchange.inputs[camera], example[camera])


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("port", 99999, "0 to 65535"),
        ("port", -5, "0 to 65535"),
        ("num-steps", 0, "1 or more"),
        ("max-models", 0, "1 or more"),
        ("max-batch", 0, "1 or more"),
        ("batch-wait-ms", -1.0, "0 or more"),
        ("max-message-mib", 0, "1 or more"),
        ("max-sessions", 0, "1 or more"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path, capsys, flag, value, expected):
    assert server.serve(server.parse([str(tmp_path), f"--{flag}={value}"])) == 1
    assert capsys.readouterr().err == f"openpi serve: --{flag} is {value}; expected {expected}\n"


def test_the_documented_script_checks_before_it_listens(tmp_path, capfd):
    words = ["policy:checkpoint", "--policy.config=pi0_droid", f"--policy.dir={tmp_path / 'nowhere'}"]
    assert serve_policy.main(words) == 1
    said = capfd.readouterr().err
    assert said.startswith("serve_policy.py: ") and "nowhere" in said and "Listening" not in said
