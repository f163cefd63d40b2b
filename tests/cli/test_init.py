"""`openpi init`: a recipe from a dataset's names, marked lines where they do not decide, and nothing else from it."""

import ast
import dataclasses
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny_arm
from arm_files import run
from openpi.cli.recipes import _init_choices, _init_source, init
from openpi.cli.recipes._init_choices import Decision, Features, Question
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.policies import policy_config
from openpi.policies.robot_spec import find_spec
from openpi.training import loop
from openpi.training.config import get_config
from openpi.training.recipe_io import load_recipe
from openpi.training.recipes.tabletop import TINY_PI05
from openpi.training.weight_loaders import NoOpWeightLoader
from paths import GOLDEN

DATASETS = sorted(info.parents[1] for info in GOLDEN.glob("lerobot_v*/*/meta/info.json"))
ANSWERS = {"TRAIN_RELATIVE": True, "GRIPPERS": ()}
JOINTS = ["shoulder_pan.pos", "elbow_flex.pos", "gripper.pos"]
SO_100 = tuple(
    f"{motor}.pos" for motor in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
)


def drafted(dataset: Path, file: Path, *more: str) -> dict[str, ast.expr]:
    """Runs the command; the constants of the file, by name."""
    assert run("init", f"--dataset={dataset}", f"--output={file}", "--yes", *more) == 0
    return constants(file)


def constants(file: Path) -> dict[str, ast.expr]:
    statements = ast.parse(file.read_text()).body
    return {s.targets[0].id: s.value for s in statements if isinstance(s, ast.Assign)}  # type: ignore[attr-defined]


def marked(values: dict[str, ast.expr]) -> set[str]:
    return {name for name, value in values.items() if isinstance(value, ast.Call) and value.func.id == "FILL_IN"}  # type: ignore[attr-defined]


def fill_in(file: Path, answers: dict[str, object]) -> None:
    """Replaces the marked lines, as a person with an editor does."""
    lines = file.read_text().splitlines()
    for name, call in reversed(constants(file).items()):
        if name in answers:
            assert call.end_lineno is not None
            lines[call.lineno - 1 : call.end_lineno] = [f"{name} = {answers[name]!r}"]
    file.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("length", range(70, 100, 3))
def test_a_long_path_is_written_as_ruff_would(length, tmp_path):
    file = tmp_path / "long.py"
    file.write_text(_init_source._assignment("DATASET", "x" * length, "A reason."))
    assert is_formatted(file)


def is_formatted(file: Path) -> bool:
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--check", str(file)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda folder: f"{folder.parent.name}_{folder.name}")
def test_a_recorded_dataset_becomes_a_recipe_that_trains_once_the_marked_lines_are_filled_in(dataset, tmp_path):
    name = f"drafted_{dataset.parent.name}_{dataset.name}"
    file = tmp_path / f"{name}.py"
    values = drafted(dataset, file)
    # Names tell the cameras, the state and the actions apart; what the numbers of the actions mean they do not tell.
    assert marked(values) == {"TRAIN_RELATIVE", "GRIPPERS"}
    cameras = [ast.literal_eval(values[f"{slot}_CAMERA"]) for slot in ("SCENE", "LEFT_WRIST", "RIGHT_WRIST")]
    prefix = "observation.images.cam_"
    assert cameras in (["image", "wrist_image", None], [f"{prefix}high", f"{prefix}wrist", None])
    assert is_formatted(file)
    line = next(i for i, text in enumerate(file.read_text().splitlines(), start=1) if "TRAIN_RELATIVE = F" in text)
    with pytest.raises(
        ValueError, match=rf"{name}\.py, line {line}: ValueError: TRAIN_RELATIVE is .*by True or False.*GRIPPERS \(line"
    ):
        get_config(f"{file}:config")

    fill_in(file, {"TRAIN_RELATIVE": True})
    with pytest.raises(
        ValueError, match=r"GRIPPERS is to be filled in: .* by a tuple of some of 'a.*0', 'a.*1'.*, or \(\)"
    ):
        get_config(f"{file}:config")
    fill_in(file, {"GRIPPERS": ()})
    drawn = get_config(f"{file}:config")
    model = dataclasses.replace(tiny_arm.MODEL, action_horizon=drawn.model.action_horizon, augmentation=False)
    config = dataclasses.replace(
        drawn,
        model=model,
        weight_loader=NoOpWeightLoader(),
        freeze_filter=model.get_freeze_filter(),
        assets_base_dir=str(tmp_path / "assets"),
        checkpoint_base_dir=str(tmp_path / "checkpoints"),
        exp_name="first",
        batch_size=2,
        num_workers=0,
        num_train_steps=3,
        holdout_episodes=0,
    )
    checkpoint = loop.train(config).checkpoint

    policy = policy_config.create_trained_policy(load_recipe(checkpoint), checkpoint)
    frame = LeRobotDataset(dataset)[0]
    sent = {key: frame[key] for key in (*filter(None, cameras), *ast.literal_eval(values["STATE"]))}
    actions = policy.infer({**sent, "prompt": "pick up the red cube"})["actions"]
    assert actions.shape == (10, 7) and np.isfinite(actions).all()
    assert policy.contract is not None and policy.contract.trained_relative == (True,) * 7


@pytest.fixture(scope="module")
def telling_dataset(tmp_path_factory) -> Path:
    """Every name in it says what it is."""
    folder = tmp_path_factory.mktemp("telling") / "dataset"
    camera = {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]}
    vector = {"dtype": "float32", "shape": (3,), "names": JOINTS}
    features = {
        "observation.images.top": camera,
        "observation.images.wrist_right": camera,
        "observation.images.wrist_left": camera,
        "observation.state": vector,
        "observation.effort": vector,
        "action": vector,
        "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
    }
    rng = np.random.default_rng(0)
    with LeRobotWriter(folder, fps=30, features=features, robot_type="so 101/left") as writer:
        images = rng.integers(256, size=(6, 32, 32, 3), dtype=np.uint8)
        frames = {key: images for key in features if "images" in key}
        joints = rng.normal(size=(6, 3)).astype(np.float32)
        frames |= dict.fromkeys(["observation.state", "observation.effort", "action"], joints)
        writer.add_episode({**frames, "next.reward": np.zeros(6, np.float32)}, "stack the blocks")
    return folder


def test_where_names_decide_everything_nothing_is_marked_and_the_small_recipe_trains(telling_dataset, tmp_path, capsys):
    file = tmp_path / "drafted_telling.py"
    values = drafted(telling_dataset, file)
    assert marked(values) == set() and "FILL_IN" not in file.read_text()
    assert "fill them in" not in capsys.readouterr().out
    # So the policy server, validation and the robot's loop know how this robot stands still.
    spec = find_spec(get_config(f"{file}:config").data.data_transforms(TINY_PI05).inputs)
    assert spec is not None and spec.follows_state == (True,) * spec.actions.width
    names = ("SCENE_CAMERA", "LEFT_WRIST_CAMERA", "RIGHT_WRIST_CAMERA", "STATE", "ACTION", "TRAIN_RELATIVE", "GRIPPERS")
    assert [ast.literal_eval(values[name]) for name in names] == [
        "observation.images.top",
        "observation.images.wrist_left",
        "observation.images.wrist_right",
        ("observation.state",),
        "action",
        True,
        ("gripper.pos",),
    ]
    # A second would be 30 steps, but the episode has six frames.
    assert ast.literal_eval(values["ACTION_HORIZON"]) == 6
    assert is_formatted(file)
    flags = {
        "exp-name": "try",
        "num-train-steps": 2,
        "batch-size": 2,
        "holdout-episodes": 0,
        **{f"model.{stack}-variant.depth": 1 for stack in ("paligemma", "action-expert", "image-encoder")},
        "model.remat": "none",
        "assets-base-dir": tmp_path / "assets",
        "checkpoint-base-dir": tmp_path / "checkpoints",
    }
    assert (
        run("train", f"{file}:tiny", "--model.no-augmentation", *(f"--{flag}={value}" for flag, value in flags.items()))
        == 0
    )
    checkpoint = tmp_path / "checkpoints" / "drafted_telling_tiny" / "try" / "1"
    contract = json.loads((checkpoint / "contract.json").read_text())
    assert contract["trained_relative"] == [True, True, False]
    assert (contract["robot"], contract["state"][0]["names"]) == ("so_101_left", JOINTS)
    assert (checkpoint / "recipe_source.py").read_text() == file.read_text()


@pytest.mark.parametrize(
    ("cameras", "scene", "left", "right"),
    [
        (["top", "left", "right"], "top", {"left", "right", None}, {"left", "right", None}),
        (["cam_high", "cam_low", "cam_left_wrist"], {"cam_high", "cam_low"}, "cam_left_wrist", None),
        (["camera_1", "camera_2"], {"camera_1", "camera_2", None}, {"camera_1", "camera_2", None}, ...),
        (["image"], {"image", None}, {"image", None}, None),
        (["rgb_static", "rgb_gripper"], "rgb_static", "rgb_gripper", None),
        (["exterior_image_1_left", "wrist_image_left"], "exterior_image_1_left", "wrist_image_left", None),
        (["front", "wrist_1", "wrist_2"], "front", {"wrist_1", "wrist_2", None}, {"wrist_1", "wrist_2", None}),
        (["wrist_view_of_table_side", "phone"], {"wrist_view_of_table_side", "phone", None}, ..., ...),
        (["eye", "hand"], "eye", "hand", None),
        (["front", "phone"], "front", {"phone", None}, None),
        (["wristcam"], None, "wristcam", None),
        (["front", "right_wrist"], "front", {"right_wrist", None}, {"right_wrist", None}),
    ],
)
def test_cameras_are_told_apart_by_their_names_or_asked_for(cameras, scene, left, right):
    """A set stands for a question with these choices."""
    vectors = {"state": ("a",), "action": ("a",)}
    choices = {choice.name: choice for choice in _init_choices.choose(Features(tuple(cameras), vectors, frozenset()))}
    for name, expected in (("SCENE", scene), ("LEFT_WRIST", left), ("RIGHT_WRIST", right)):
        choice = choices[f"{name}_CAMERA"]
        found = set(choice.choices) if isinstance(choice, Question) else choice.value
        assert found == (set(cameras) | {None} if expected is ... else expected), name
    # The order in which a dataset lists its cameras says nothing.
    turned = _init_choices.choose(Features(tuple(reversed(cameras)), vectors, frozenset()))
    for choice in turned:
        other = choices[choice.name]
        assert getattr(choice, "value", None) == getattr(other, "value", None)
        assert set(getattr(choice, "choices", ())) == set(getattr(other, "choices", ()))


def test_state_and_actions_are_asked_for_where_several_vectors_could_be_them():
    vectors = {"joint_position": ("j",), "gripper_position": ("g",), "action.joints": ("a",), "action.pose": ("x",)}
    choices = {c.name: c for c in _init_choices.choose(Features(("front",), vectors, frozenset()))}
    assert choices["ACTION"].choices == ("action.joints", "action.pose")
    assert choices["STATE"].choices == ("joint_position", "gripper_position") and choices["STATE"].is_list
    assert choices["GRIPPERS"].choices == ("a", "x")


@pytest.mark.parametrize(
    ("action", "state_names", "action_names", "expected"),
    [
        ("action", ("a.pos", "b.pos"), ("a.pos", "b.pos"), True),
        ("action", ("b.pos", "a.pos"), ("a.pos", "b.pos"), None),  # not at the same places
        ("action", ("x", "y"), ("x", "y"), None),  # poses, or changes of them
        ("action", ("x", "y"), ("delta_x", "delta_y"), False),
        ("action.delta", ("a.pos", "b.pos"), ("a.pos", "b.pos"), False),
        ("action", ("a.pos", "b.pos"), ("a.vel", "b.vel"), False),
        ("action", ("a.pos",), ("a.pos", "b.pos"), None),
        ("action", SO_100, SO_100, True),
        ("action", ("wrist_x.pos", "wrist_roll.pos"), ("wrist_x.pos", "wrist_roll.pos"), None),  # an angle of a pose
        ("action", ("a.pos", "roll.pos"), ("a.pos", "roll.pos"), None),
    ],
)
def test_whether_actions_are_relative_is_known_only_where_names_say_it(action, state_names, action_names, expected):
    features = Features(("front",), {"state": state_names, action: action_names}, frozenset({"state", action}))
    choice = {c.name: c for c in _init_choices.choose(features)}["TRAIN_RELATIVE"]
    assert (choice.value if isinstance(choice, Decision) else None) is expected


def test_a_file_is_never_replaced_unless_asked(telling_dataset, tmp_path, capsys):
    file = tmp_path / "precious_recipe.py"
    file.write_text("mine\n")
    assert run("init", f"--dataset={telling_dataset}", f"--output={file}") == 1
    assert "exists; name another file with --output, or replace it with --force" in capsys.readouterr().err
    assert file.read_text() == "mine\n"
    drafted(telling_dataset, file, "--force")
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("json.py", "the name of another Python module"),
        ("my-robot.py", "no name of a Python module"),
        ("class.py", "no name of a Python module"),
        ("my_robot.txt", "no name of a Python module"),
    ],
)
def test_a_name_that_could_not_be_imported_is_refused(output, told, telling_dataset, tmp_path, capsys):
    assert run("init", f"--dataset={telling_dataset}", f"--output={tmp_path / output}") == 1
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_dataset_for_a_policy_is_refused(telling_dataset, tmp_path, capsys):
    assert run("init", "--dataset=./nowhere", f"--output={tmp_path / 'drafted_a.py'}") == 1
    assert "nowhere does not exist" in capsys.readouterr().err
    blind = changed(telling_dataset, tmp_path / "blind", lambda features: {"action": features["action"]})
    assert run("init", f"--dataset={blind}", f"--output={tmp_path / 'drafted_b.py'}") == 1
    assert "needs at least a camera, a state and an action" in capsys.readouterr().err


def changed(dataset: Path, folder: Path, change, **info) -> Path:
    """A copy of the dataset whose description has other features."""
    shutil.copytree(dataset, folder)
    file = folder / "meta" / "info.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "features": change(document["features"]), **info}))
    return folder


def test_names_of_a_dataset_never_become_code(telling_dataset, tmp_path):
    trap = tmp_path / "sprung"
    evil = f'top"""\'); __import__("pathlib").Path({str(trap)!r}).touch() #\u2028{{0}}$name\\'

    def rename(features: dict) -> dict:
        camera, vector = features["observation.images.top"], features["action"]
        return {evil: camera, f"state {evil}": {**vector, "names": [evil, "b", "c"]}, "action": vector}

    dataset = changed(telling_dataset, tmp_path / 'data"set', rename, robot_type=f"../{evil}")
    file = tmp_path / "drafted_evil.py"
    values = drafted(dataset, file)
    fill_in(file, ANSWERS)
    config = get_config(f"{file}:config")
    assert not trap.exists()
    assert ast.literal_eval(values["SCENE_CAMERA"]) == evil
    assert ast.literal_eval(values["NAMES"])[f"state {evil}"] == (evil, "b", "c")
    assert ast.literal_eval(values["DATASET"]) == str(dataset) == config.data.repo_id
    assert "/" not in config.data.assets.asset_id and "." not in config.data.assets.asset_id


def test_without_task_texts_the_prompt_is_asked_for_and_becomes_the_recipe_s(telling_dataset, tmp_path):
    folder = tmp_path / "dataset"
    features = json.loads((telling_dataset / "meta" / "info.json").read_text())["features"]
    wanted = ("observation.images.top", "observation.state", "action")
    with LeRobotWriter(folder, fps=30, features={key: features[key] for key in wanted}) as writer:
        frames = {key: np.zeros((3, *features[key]["shape"]), features[key]["dtype"]) for key in wanted[1:]}
        writer.add_episode({wanted[0]: np.zeros((3, 32, 32, 3), np.uint8), **frames}, "")
    file = tmp_path / "drafted_mute.py"
    assert marked(drafted(folder, file)) == {"PROMPT"}
    assert is_formatted(file)
    with pytest.raises(ValueError, match=r"PROMPT is to be filled in: what is the robot told to do.*by the value"):
        get_config(f"{file}:config")
    fill_in(file, {"PROMPT": "wave"})
    config = get_config(f"{file}:config")
    data = config.data.create(config.assets_dirs, config.model)
    assert data.model_transforms.inputs[0].prompt == "wave" and not data.prompt_from_task


def test_at_a_terminal_it_asks_and_a_question_can_be_left_for_later(tmp_path):
    """In a terminal of its own: TRAIN_RELATIVE is misunderstood and then answered, GRIPPERS left open."""
    file = tmp_path / "drafted_at_terminal.py"
    dataset = GOLDEN / "lerobot_v30" / "image"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "openpi.cli.main", "init", f"--dataset={dataset}", f"--output={file}"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, b"7\n1\n\n")
        shown = _read_all(ours)
    os.close(ours)
    assert process.returncode == 0, shown
    assert "'7' is not understood; expected numbers from 1 to 2" in shown
    values = constants(file)
    assert ast.literal_eval(values["TRAIN_RELATIVE"]) is True and marked(values) == {"GRIPPERS"}
    assert "# Your answer." in file.read_text()
    assert f"line {values['GRIPPERS'].lineno}: GRIPPERS" in shown


def _read_all(terminal: int) -> str:
    """Until the other side has closed it."""
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # Linux reports the hang-up so
            return shown.decode()
        if not chunk:
            return shown.decode()
        shown += chunk


def test_answers_are_numbers_or_words():
    question = Question("STATE", "which?", choices=("a", "b", "c"), is_list=True)
    assert init._parsed(question, "3, 1") == ("c", "a")
    assert init._parsed(question, "c,a") == ("c", "a")
    assert init._parsed(question, "-") == ()
    relative = Question("TRAIN_RELATIVE", "are they?", choices=(True, False))
    assert [init._parsed(relative, answer) for answer in ("1", "y", "True", "no", "2")] == [True] * 3 + [False] * 2
    assert init._parsed(Question("PROMPT", "what?"), "fold it") == "fold it"
    with pytest.raises(ValueError, match="expected numbers from 1 to 3"):
        init._parsed(question, "d")
