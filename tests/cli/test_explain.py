"""`openpi explain`: shows the very samples that training and serving use, and what is wrong with them."""

import dataclasses
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import forked
import paths
import tiny_arm
from arm_files import arm_observation, run, write_checkpoint, write_stats
from openpi.cli.debugging._explain_view import StageReport, TextView
from openpi.shared.tree import flatten
from openpi.training import data_loader
from openpi.training.data.sample_checks import Finding
from openpi.training.data.sample_trace import leaves

RECIPE = f"{tiny_arm.__file__}:recipe"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the statistics of the tiny arm."""
    monkeypatch.chdir(tmp_path)
    write_stats(tmp_path)
    return tmp_path


@pytest.fixture
def explain(capsys: pytest.CaptureFixture):
    """Runs the command with --json; returns the document."""

    def call(*argv: str, code: int = 0) -> dict:
        capsys.readouterr()
        assert run("explain", *argv, "--json") == code, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


def findings(document: dict) -> list[tuple[str, str, bool]]:
    return [(f["key"], f["message"], f["is_surprise"]) for stage in document["stages"] for f in stage["findings"]]


def surprises(document: dict) -> dict[str, str]:
    return {key: message for key, message, is_surprise in findings(document) if is_surprise}


def titles(document: dict, direction: str) -> list[str]:
    return [stage["title"] for stage in document["stages"] if stage["direction"] == direction]


def stage(document: dict, title: str) -> dict:
    return next(stage for stage in document["stages"] if stage["title"].startswith(title))


def save_observation(path: Path, **changes) -> Path:
    np.savez(path, **arm_observation(**changes))
    return path


# --- the stages ---------------------------------------------------------------------------------------------------


def test_stages_of_a_dataset_frame_are_those_of_training_in_their_order(here, explain):
    document = explain(RECIPE, "--index", "4")
    assert titles(document, "input") == [
        "dataset item",
        "dataset: PromptFromLeRobotTask",
        "repack: RepackTransform",
        "robot: LiberoInputs",
        "robot: DeltaActions",
        "statistics: Normalize",
        "model: InjectDefaultPrompt",
        "model: ResizeImages",
        "model: TokenizePrompt",
        "model: PadStatesAndActions",
        "Observation: what the model gets",
    ]
    assert titles(document, "output") == [
        "model output",
        "statistics: Unnormalize",
        "robot: AbsoluteActions",
        "robot: LiberoOutputs",
        "round trip",
    ]


def test_what_the_model_gets_is_what_the_loader_gives(here, explain):
    config = dataclasses.replace(tiny_arm.recipe, batch_size=5, num_workers=0)
    batch = next(iter(data_loader.create_batch_loader(config, shuffle=False, num_batches=1)))
    shown = {leaf["key"]: leaf for leaf in stage(explain(RECIPE, "--index", "4"), "Observation")["leaves"]}
    loaded = {key: np.asarray(value)[4] for key, value in flatten(batch).items()}
    assert shown.keys() == loaded.keys()
    for key, value in loaded.items():
        value = value / 255 * 2 - 1 if key.startswith("image/") else value
        assert tuple(shown[key]["shape"][1:]) == value.shape
        np.testing.assert_allclose(shown[key]["mean"], value.mean(dtype=np.float64), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(shown[key]["max"], value.max(), rtol=1e-6)


def test_recorded_actions_come_back_from_the_output_chain(here, explain):
    key, message, is_surprise = findings(explain(RECIPE))[-1]
    assert key == "actions" and "come back" in message and not is_surprise


def test_an_ordinary_frame_surprises_nobody(here, explain):
    document = explain(RECIPE, "--index", "4")
    assert surprises(document) == {}
    assert document["surprises"] == 0 and document["error"] is None


def test_the_prompt_is_shown_as_the_model_reads_it(here, explain):
    messages = [message for key, message, _ in findings(explain(RECIPE)) if key == "tokenized_prompt"]
    assert len(messages) == 1
    assert "'Task: pick up the red cube, State: " in messages[0] and "Action: " in messages[0]


def test_another_dataset_is_read_with_the_statistics_of_the_recipe(here, explain, golden):
    document = explain(RECIPE, "--dataset", str(golden / "lerobot_v21" / "image"))
    assert "lerobot_v21" in document["sample"]
    assert surprises(document) == {}


def test_fields_of_the_recipe_can_be_set_as_for_training(here, explain):
    document = explain(RECIPE, "--model.max-token-len=12")
    assert "is cut to 12" in surprises(document)["tokenized_prompt"]


def test_images_of_the_stages_that_make_some_can_be_written(here, explain):
    explain(RECIPE, "--images", here / "png")
    sizes = {}
    for path in (here / "png").rglob("*base_0_rgb.png"):
        with Image.open(path) as image:
            sizes[path.parent.name] = image.size
    assert sizes == {"03_LiberoInputs": (64, 64), "07_ResizeImages": (28, 28)}


# --- what it finds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("wider_state", "joints", "has 3 dimensions; robot 'arm_of_4_and_3' has 4: joint_0, joint_1"),
        ("fewer_actions", "actions", "has 3 dimensions; robot 'arm_of_3_and_2' has 2: joint_0, joint_1"),
        ("padding_returned", "actions", "(3, 3) went in and (3, 4) came out: dimensions were lost or added"),
    ],
)
def test_a_robot_that_is_not_the_one_of_the_dataset_is_shown(name, key, message, here, explain, arm_dataset):
    recipe = paths.SUPPORT / "tiny_recipe.py"
    document = explain(f"{recipe}:{name}", "--dataset", str(arm_dataset))
    assert any(found == key and text.startswith(message) for found, text, is_bad in findings(document) if is_bad)


def test_values_outside_the_quantiles_are_named_with_their_dimension(here, explain):
    def narrow(stats):
        q01, q99 = stats.q01.copy(), stats.q99.copy()
        q01[2], q99[2] = 5.0, 6.0
        return dataclasses.replace(stats, q01=q01, q99=q99)

    write_stats(here, state=narrow)
    message = surprises(explain(RECIPE))["state"]
    names = tiny_arm.recipe.data.create(here, tiny_arm.MODEL).data_transforms.inputs[0].spec.state_names
    assert message.startswith("1 of 8 dimensions leave q01..q99")
    assert f"{names[2]} = " in message and "(q01..q99 5..6" in message


def test_degenerate_statistics_are_named(here, explain):
    def freeze(stats):
        mean, std = stats.mean.copy(), stats.std.copy()
        q01, q99 = stats.q01.copy(), stats.q99.copy()
        std[3], q01[3], q99[3] = 0, mean[3], mean[3]
        return dataclasses.replace(stats, std=std, q01=q01, q99=q99)

    write_stats(here, actions=freeze)
    document = explain(RECIPE)
    assert any("degenerate statistics" in m and "actions/" in m for k, m, s in findings(document) if s)


def test_missing_statistics_are_a_finding_and_the_rest_is_still_shown(tmp_path, monkeypatch, explain):
    monkeypatch.chdir(tmp_path)
    document = explain(RECIPE)
    assert "openpi stats" in surprises(document)["state"]
    assert stage(document, "Observation")["leaves"]


def test_a_chunk_past_the_end_of_the_episode_is_reported_with_its_share(here, explain):
    assert "60% of the chunk" in surprises(explain(RECIPE, "--index", "21"))["actions"]
    remarks = [message for _, message, is_surprise in findings(explain(RECIPE, "--index", "19")) if not is_surprise]
    assert "20% of the chunk" in remarks[0]


def test_chunks_longer_than_the_episode_are_reported(here, explain):
    document = explain(f"{tiny_arm.__file__}:long_chunks")
    assert any("the episode has 23 frames, the model's chunks 40" in m for _, m, s in findings(document) if s)


def test_a_cut_prompt_is_reported_with_its_true_length(here, explain):
    message = surprises(explain(f"{tiny_arm.__file__}:short_prompts"))["tokenized_prompt"]
    assert "is cut to 12" in message
    assert int(message.split()[1]) > 12


def test_a_model_too_narrow_for_the_robot_is_reported(here, explain):
    document = explain(f"{tiny_arm.__file__}:narrow_model")
    assert "has 8 dimensions, the model only 6" in surprises(document)["state"]


def test_black_and_flat_cameras_are_reported(here, explain):
    image = np.full((32, 48, 3), 90, np.uint8)
    changes = {"observation/image": image, "observation/wrist_image": np.zeros_like(image)}
    found = surprises(explain(RECIPE, "--observation", save_observation(here / "obs.npz", **changes)))
    assert "one colour" in found["observation/image"]
    assert "all black" in found["observation/wrist_image"]


def test_nan_is_reported_where_it_first_appears_and_written_into_no_prompt(here, explain):
    state = np.full(8, 0.1)
    state[5] = np.nan
    path = save_observation(here / "obs.npz", **{"observation/state": state})
    document = explain(RECIPE, "--observation", path, code=1)
    assert "the state has NaN or infinity in dimension 5" in document["error"]
    reported = [(s["title"], f["key"]) for s in document["stages"] for f in s["findings"] if "NaN" in f["message"]]
    assert reported[0] == ("observation", "observation/state")
    assert len({title for title, _ in reported}) <= 2  # under the client's name, and under the model's


def test_an_image_far_from_uint8_stops_the_walk_with_the_reason_after_the_stages_before(here, explain):
    path = save_observation(here / "obs.npz", **{"observation/image": np.full((32, 48, 3), 90.0)})
    document = explain(RECIPE, "--observation", path, code=1)
    assert "observation/image" in document["error"] and "[0, 1]" in document["error"]
    assert titles(document, "input")[0] == "observation"
    assert "expected uint8" in surprises(document)["observation/image"]


# --- serving ------------------------------------------------------------------------------------------------------


def test_an_observation_goes_through_the_stages_of_serving(tmp_path, explain):
    write_checkpoint(tmp_path / "run" / "7")
    document = explain(tmp_path / "run", "--observation", save_observation(tmp_path / "obs.npz"))
    assert document["checkpoint"] == str(tmp_path / "run" / "7")
    inputs = titles(document, "input")
    assert inputs[:2] == ["observation", "contract: ContractGuard"]
    assert inputs.index("contract: RangeGuard") == inputs.index("statistics: Normalize") - 1
    assert titles(document, "output") == []  # nothing to send back
    assert surprises(document) == {}


def test_a_given_chunk_goes_the_way_back(tmp_path, explain):
    write_checkpoint(tmp_path / "7")
    np.save(tmp_path / "chunk.npy", np.zeros((5, 10), np.float32))
    observation = save_observation(tmp_path / "obs.npz")
    document = explain(tmp_path / "7", "--observation", observation, "--actions", tmp_path / "chunk.npy")
    shapes = [next(le["shape"] for le in s["leaves"] if le["key"] == "actions") for s in document["stages"][-4:]]
    assert shapes == [[5, 10], [5, 10], [5, 10], [5, 7]]


def test_a_chunk_in_the_robot_s_dimensions_is_refused_where_the_model_s_are_due(tmp_path, explain):
    write_checkpoint(tmp_path / "7")
    np.save(tmp_path / "chunk.npy", np.zeros((5, 7), np.float32))
    observation = save_observation(tmp_path / "obs.npz")
    document = explain(tmp_path / "7", "--observation", observation, "--actions", tmp_path / "chunk.npy", code=1)
    assert "(5, 7)" in document["error"] and "(5, 10)" in document["error"]


def test_swapped_colours_are_reported_against_the_contract(tmp_path, explain):
    rgb = np.random.default_rng(0).integers(40, size=(32, 48, 3), dtype=np.uint8) + np.array([180, 90, 10], np.uint8)
    means = {"observation/image": tuple(float(mean) for mean in rgb.mean(axis=(0, 1)))}
    write_checkpoint(tmp_path / "7", camera_means=means)
    right = explain(tmp_path / "7", "--observation", save_observation(tmp_path / "a.npz", **{"observation/image": rgb}))
    assert surprises(right) == {}
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    wrong = explain(tmp_path / "7", "--observation", save_observation(tmp_path / "b.npz", **{"observation/image": bgr}))
    assert "red and blue swapped" in surprises(wrong)["observation/image"]


# --- the command --------------------------------------------------------------------------------------------------


def test_a_pipe_gets_plain_text(tmp_path):
    write_checkpoint(tmp_path / "7")
    observation = save_observation(tmp_path / "obs.npz", **{"observation/image": np.zeros((32, 48, 3), np.uint8)})
    command = [sys.executable, "-m", "openpi.cli.main", "explain", tmp_path / "7", "--observation", observation]
    process = forked.run(command, capture_output=True, text=True, check=True)
    assert "\x1b" not in process.stdout
    assert "!! observation/image: is all black" in process.stdout
    assert process.stdout.splitlines()[-1].startswith("2 surprises")


def test_a_terminal_gets_a_table_with_surprises_in_red(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    view = TextView(out, {"recipe": "r"})
    sample = {"state": np.arange(3.0)}
    view.stage(StageReport("input", "robot: Arm", leaves(sample), [], [Finding("state", "looks odd")]))
    view.close(None)
    assert "\x1b[1;31m  !! state: looks odd" in out.getvalue()
    assert "───" in out.getvalue()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["pi05_libera"], "pi05_libero"),
        (["./nowhere/7"], "nowhere"),
        ([RECIPE, "--config", "pi05_libero"], "--config"),
        ([RECIPE, "--index", "90"], "frame 90 of a dataset of 90 frames"),
        ([RECIPE, "--dataset", "./nothing"], "nothing"),
        ([RECIPE, "--observation", "absent.npz"], "absent.npz"),
    ],
)
def test_bad_input_is_one_line_that_names_it(here, capsys, argv, told):
    assert run("explain", *argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and told in err and len(err.strip().splitlines()) == 1
