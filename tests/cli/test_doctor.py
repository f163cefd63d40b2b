"""`openpi doctor`: differences between training and serving, planted in a real server; and in recordings."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import planted_mistakes
import tiny_arm
from arm_files import arm_observation, run, write_checkpoint
from openpi import transforms
from openpi.cli.debugging import _environment as environment
from openpi.evaluation import contract_differences, image_causes, model_differences
from openpi.policies.guards import ObservationError
from openpi.policies.policy import Policy
from openpi.policies.policy_config import create_trained_policy
from openpi.serving.recorded import Exchange, SessionInfo
from openpi.serving.recording_mcap import Writer
from openpi.shared import normalize
from openpi_client.base_policy import BasePolicy
from planted_mistakes import Frames
from serving_live import server_thread


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "1")


@pytest.fixture(scope="module")
def policy(checkpoint) -> Policy:
    return create_trained_policy(tiny_arm.recipe, checkpoint, sample_kwargs={"num_steps": 1})


Steps = list[Any]
Change = Callable[[Steps], Steps]


def changed(clean: Policy, inputs: Change, outputs: Change, **contract: Any) -> Policy:
    """Another policy around the one compiled model."""
    assert clean.contract is not None
    return Policy(
        clean._sampler,
        transforms=inputs(list(clean.transforms)),
        output_transforms=outputs(list(clean._to_robot.transforms)),
        sample_kwargs={"num_steps": 1},
        contract=dataclasses.replace(clean.contract, **contract),
    )


def diagnose(capsys, checkpoint: Path, served: BasePolicy, *words: str) -> dict[str, Any]:
    with server_thread(lambda: served) as (_, port):
        code = run("doctor", checkpoint, "--port", str(port), "--frames", "4", "--json", *words)
    told = capsys.readouterr()
    assert told.out, told.err
    document = json.loads(told.out)
    assert code == (1 if document["differences"] else 0)
    return document


def before(kind: type, step: Any) -> Change:
    """Inserts a step before the first transform of a kind."""

    def inserted(steps: Steps) -> Steps:
        at = next(i for i, each in enumerate(steps) if isinstance(each, kind))
        return [*steps[:at], step, *steps[at:]]

    return inserted


def instead(kind: type, change: Callable[[Any], Any]) -> Change:
    return lambda steps: [change(step) if isinstance(step, kind) else step for step in steps]


def same(steps: Steps) -> Steps:
    return steps


def on_images(change: Callable[[dict], dict]) -> Callable[[dict], dict]:
    return lambda data: {**data, "image": change(data["image"])}


def on_state(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict], dict]:
    return lambda data: {**data, "state": change(np.asarray(data["state"]))}


def swapped(images: dict) -> dict:
    first, second = "base_0_rgb", "left_wrist_0_rgb"
    return {**images, first: images[second], second: images[first]}


def coarse(images: dict) -> dict:
    return {key: np.asarray(Image.fromarray(image).resize((28, 28), NEAREST)) for key, image in images.items()}


def padded_before(data: dict) -> dict:
    mask = np.asarray(data["tokenized_prompt_mask"])
    by = mask.size - int(mask.sum())
    return {**data, **{key: np.roll(data[key], by) for key in ("tokenized_prompt", "tokenized_prompt_mask")}}


def other_stats(step: transforms.Normalize) -> transforms.Normalize:
    assert step.norm_stats is not None
    moved = {
        key: normalize.NormStats(s.mean + 0.5, s.std * 2, s.q01 - 1, s.q99 * 1.5) for key, s in step.norm_stats.items()
    }
    return dataclasses.replace(step, norm_stats=moved)


class OtherTokenizer:
    """The ids of another vocabulary: those of the arm's, the other way round."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, prompt: str, state: Any = None) -> Any:
        tokens, mask = self._tokenizer.tokenize(prompt, state)
        return np.where(mask, 1100 - tokens, 0), mask


NEAREST = Image.Resampling.NEAREST
NORMALIZE, RESIZE, TOKENIZE = transforms.Normalize, transforms.ResizeImages, transforms.TokenizePrompt
PLANTED: dict[str, tuple[str, str, Change, Change]] = {
    "BGR": ("images", "BGR", before(NORMALIZE, on_images(lambda i: {k: v[..., ::-1] for k, v in i.items()})), same),
    "cameras": ("images", "'left_wrist_0_rgb'", before(NORMALIZE, on_images(swapped)), same),
    "order": ("state", "order", before(NORMALIZE, on_state(lambda s: np.roll(s, 1))), same),
    "units": ("state", "degrees instead of radians", before(NORMALIZE, on_state(np.rad2deg)), same),
    "statistics": ("normalized", "statistics", instead(NORMALIZE, other_stats), same),
    "template": (
        "tokens",
        "template",
        instead(TOKENIZE, lambda t: dataclasses.replace(t, discrete_state_input=False)),
        same,
    ),
    "tokenizer": (
        "tokens",
        "another tokenizer",
        instead(TOKENIZE, lambda t: dataclasses.replace(t, tokenizer=OtherTokenizer(t.tokenizer))),
        same,
    ),
    "delta mask": (
        "chunk",
        "mask of relative actions",
        same,
        instead(transforms.AbsoluteActions, lambda t: dataclasses.replace(t, mask=(False, *t.mask[1:]))),
    ),
    "resize": ("images", "the method nearest", before(RESIZE, on_images(coarse)), same),
    "padding": ("tokens", "other side", lambda steps: [*steps, padded_before], same),
    "dtype": ("state", "float16", before(NORMALIZE, on_state(lambda s: s.astype(np.float16))), same),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_difference_is_found_at_its_stage_and_at_no_other(name, policy, checkpoint, capsys):
    stage, words, inputs, outputs = PLANTED[name]
    found = diagnose(capsys, checkpoint, changed(policy, inputs, outputs))
    assert found["first"]["stage"] == stage
    assert words in json.dumps(found["first"])
    assert {key for key, verdict in found["stages"].items() if verdict != "same"} == {stage}


def test_another_rate_is_found_at_the_chunk(policy, checkpoint, capsys):
    found = diagnose(capsys, checkpoint, changed(policy, same, same, control_hz=7.0))
    [told] = found["differences"]
    assert (told["stage"], told["subject"]) == ("chunk", "control_hz") and "7 Hz" in told["found"]


def test_a_clean_pair_has_no_difference_and_the_same_model(policy, checkpoint, capsys):
    found = diagnose(capsys, checkpoint, policy, "--model", "--num-steps", "1")
    assert found["differences"] == [] and set(found["stages"].values()) == {"same"} and not found["not_compared"]


def test_stages_are_told_to_whoever_asks_and_to_nobody_else(policy):
    observation = arm_observation()
    told = policy.infer({**observation, "trace": True})["trace"]
    assert set(told) == {"raw", "normalized", "inputs", "actions"} and told["raw"]["prompt"] == "pick up the cube"
    assert "trace" not in policy.infer({**observation, "trace": False})
    with pytest.raises(ObservationError, match="'trace' is 'yes'; expected true or false"):
        policy.infer({**observation, "trace": "yes"})


class OtherWeights:
    """A sampler whose model is another one."""

    takes_noise, action_horizon, action_dim, compiles = True, 5, 10, False

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def sample(self, inputs: Mapping[str, Any], noise: Any, **options: Any) -> np.ndarray:
        return np.asarray(self._sampler.sample(inputs, noise, **options)) * 1.2


def test_other_weights_are_told_where_everything_else_is_the_same(policy, checkpoint, capsys):
    served = changed(policy, same, same)
    served._sampler = OtherWeights(served._sampler)
    found = diagnose(capsys, checkpoint, served, "--model", "--num-steps", "1")
    [told] = found["differences"]
    assert (told["stage"], told["subject"]) == ("chunk", "model") and "other weights" in told["cause"]


class Foreign(BasePolicy):
    """Some other policy, which tells nothing of its way."""

    metadata: Mapping[str, Any] = {}

    def __init__(self, policy: Policy, change: Callable[[np.ndarray], np.ndarray] = lambda a: a) -> None:
        self._policy, self._change = policy, change

    def infer(self, obs: dict) -> dict:
        known = {key: value for key, value in obs.items() if key != "trace"}
        return {"actions": self._change(np.asarray(self._policy.infer(known)["actions"]))}


def test_of_a_server_that_tells_no_stages_keys_and_chunks_are_compared_and_that_is_said(policy, checkpoint, capsys):
    found = diagnose(capsys, checkpoint, Foreign(policy))
    assert found["differences"] == [] and found["stages"]["tokens"] == "not compared"
    assert "--model compares" in found["not_compared"]["chunk"]
    found = diagnose(capsys, checkpoint, Foreign(policy, lambda a: a[:, :6]))
    assert found["first"]["stage"] == "chunk" and found["first"]["found"] == "6 dimensions; recorded were 7"
    found = diagnose(capsys, checkpoint, Foreign(policy), "--model", "--num-steps", "1")
    assert found["differences"] == [] and found["stages"]["chunk"] == "same"
    found = diagnose(capsys, checkpoint, Foreign(policy, lambda a: a * 2 + 40), "--model", "--num-steps", "1")
    assert found["first"]["stage"] == "chunk" and "standard errors" in found["first"]["found"]


def test_what_a_server_refuses_is_told_in_its_words(policy, checkpoint, capsys):
    def refuse(data: dict) -> dict:
        raise ValueError("the gripper is missing")

    found = diagnose(capsys, checkpoint, changed(policy, before(NORMALIZE, refuse), same))
    assert found["first"]["stage"] == "keys" and "the gripper is missing" in found["first"]["found"]


def test_models_of_other_noise_are_told_apart_by_their_samples():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0, 1, (2, 8, 4, 5, 3))
    assert list(model_differences.other_noise(ours, theirs)) == []
    theirs[..., 1] += 6
    [told] = model_differences.other_noise(ours, theirs)
    assert told.found.startswith("dimensions [1] are")


def test_how_a_picture_was_resized_is_told():
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (12, 16, 3), np.uint8)
    raw = [np.asarray(Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC))]
    wide = [np.asarray(Image.fromarray(raw[0]).resize((56, 56), Image.Resampling.BILINEAR))]
    middle = [np.asarray(Image.fromarray(raw[0][:, 20:140]).resize((56, 56), Image.Resampling.BILINEAR))]
    assert image_causes.explain_resize(raw, wide).startswith("stretched")
    assert image_causes.explain_resize(raw, middle).startswith("the middle is cropped")


# --- what a robot sent ----------------------------------------------------------------------------------------


IMAGE, WRIST, STATE = "observation/image", "observation/wrist_image", "observation/state"
KEYS = {"observation.images.top": "image", "observation.images.wrist": "wrist_image"}
FPS, APART = 20, 3


def as_libero(frames: Frames) -> Frames:
    """Six values and the two fingers that the gripper moves; the recipe's actions have no fingers but one."""
    state, action = frames["observation.state"], frames["action"]
    fingers = 0.04 * state[:, 5:] * np.array([[1, -1]], np.float32)
    return {
        **{new: frames[old] for old, new in KEYS.items()},
        "state": np.concatenate([state, fingers], axis=1),
        "actions": np.concatenate([action, 0.04 * action[:, 5:]], axis=1),
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """The arm's, as the recipe names its columns."""
    made = planted_mistakes.arm(10, fps=FPS)
    pictures = {new: made.features[old] for old, new in KEYS.items()}
    vectors = {key: {"dtype": "float32", "shape": (n,), "names": None} for key, n in (("state", 8), ("actions", 7))}
    episodes = [as_libero(frames) for frames in made.episodes]
    recorded = dataclasses.replace(made, features={**pictures, **vectors}, episodes=episodes)
    return recorded.write(tmp_path_factory.mktemp("data") / "arm")


@pytest.fixture(scope="module")
def sent() -> list[dict[str, Any]]:
    """What the robot sent in an episode that is not in the dataset, a request each few ticks."""
    frames = as_libero(planted_mistakes.arm(1, fps=FPS, seed=5).episodes[0])
    found = []
    for step in range(0, len(frames["state"]) - 5, APART):
        observation = {IMAGE: frames["image"][step], WRIST: frames["wrist_image"][step], STATE: frames["state"][step]}
        observation["prompt"] = "stack the cups"
        found.append({"inputs": observation, "actions": frames["actions"][step : step + 5]})
    return found


def record(folder: Path, sent: Sequence[dict[str, Any]], interval_s: float) -> Path:
    writer = Writer(folder / "session", SessionInfo("arm", "openpi", "127.0.0.1:5", 1.7e9, {}))
    for step, each in enumerate(sent):
        at = 1_700_000_000_000_000_000 + int(step * interval_s * 1e9)
        writer.write(Exchange(step, each["inputs"], {"actions": each["actions"]}, at, at + 10_000_000))
    writer.finish()
    return writer.place


ROBOTS: dict[str, tuple[str, str, Callable[[dict], dict]]] = {
    "clean": ("", "", lambda o: {}),
    "BGR": ("images", "BGR", lambda o: {IMAGE: o[IMAGE][..., ::-1]}),
    "cameras": ("images", "exchange", lambda o: {IMAGE: o[WRIST], WRIST: o[IMAGE]}),
    "order": ("state", "order", lambda o: {STATE: np.roll(o[STATE], 3)}),
    "units": ("state", "units", lambda o: {STATE: np.rad2deg(o[STATE])}),
    "prompt": ("tokens", "never saw", lambda o: {"prompt": "fold the towel"}),
    "dtype": ("keys", "float32 instead of uint8", lambda o: {IMAGE: (o[IMAGE] / 255).astype(np.float32)}),
    "a key": ("keys", "does not send it", lambda o: {STATE: None, "observation/joints": o[STATE]}),
}


@pytest.mark.parametrize("name", ROBOTS)
def test_what_a_robot_sent_is_held_against_the_dataset(name, sent, dataset, checkpoint, tmp_path, capsys):
    stage, words, change = ROBOTS[name]
    spoilt = []
    for each in sent:
        inputs = {**each["inputs"], **change(each["inputs"])}
        spoilt.append({**each, "inputs": {key: value for key, value in inputs.items() if value is not None}})
    place = record(tmp_path, spoilt, APART / FPS)
    code = run("doctor", checkpoint, "--dataset", dataset, "--robot", place, "--json")
    document = json.loads(capsys.readouterr().out)
    assert code == bool(stage)
    assert document["differences"] == [] if not stage else document["first"]["stage"] == stage
    assert words in json.dumps(document)


def test_a_robot_whose_loop_runs_too_fast_is_seen_in_its_motion(sent, dataset, checkpoint, tmp_path, capsys):
    place = record(tmp_path, sent, APART / FPS / 2.5)
    assert run("doctor", checkpoint, "--dataset", dataset, "--robot", place, "--json") == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["first"]["stage"], document["first"]["subject"]) == ("chunk", "control_hz")


# --- the machine ----------------------------------------------------------------------------------------------


def facts(**changes: Any) -> environment.Facts:
    packages = {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2", "torch": "2.9.0+cu128"}
    sound = environment.Facts({}, ("A card, 81559 MiB",), "550.54.15", "12.4", None, packages, {}, {})
    return dataclasses.replace(sound, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"driver": "470.82.01"}, "jax-cuda12-plugin needs CUDA 12, and so a driver of at least 525.60"),
        ({"packages": {"jax": "0.10.2", "jaxlib": "0.10.2"}}, "JAX has no CUDA plugin"),
        ({"packages": {"jax": "0.10.2", "jaxlib": "0.9.0", "jax-cuda12-plugin": "0.9.0"}}, "jax is 0.10.2 and jaxlib"),
        ({"packages": {"torch": "2.9.0+cpu"}}, "PyTorch is 2.9.0+cpu, built without CUDA"),
        ({"packages": {"torch": "2.9.0+cu130"}}, "torch 2.9.0+cu130 needs CUDA 13"),
        ({"devices": {"JAX": "cpu (cpu)"}, "variables": {"JAX_PLATFORMS": "cpu"}}, "$JAX_PLATFORMS is 'cpu'"),
        ({"driver_error": "Failed to initialize NVML: Driver/library version mismatch"}, "restart the machine"),
    ],
)
def test_what_of_a_machine_does_not_fit_is_told_with_the_fix(changes, words):
    assert words in " ".join(facts(**changes).problems)


def test_a_machine_that_fits_is_a_table_for_an_issue(capsys):
    assert facts().problems == []
    code = run("doctor", "--env")
    told = capsys.readouterr().out
    assert "| jax |" in told and "| Python |" in told
    assert code == (0 if "Nothing was found that does not fit." in told else 1)


def test_what_the_server_takes_all_the_same_is_no_difference():
    """Further cameras and floats in [0, 1] are none; a camera of another name in the place of one is."""
    cameras = [{"key": "top", "required": True}, {"key": "wrist", "required": False}]
    served, picture = {"cameras": cameras}, np.zeros((8, 9, 3), np.uint8)
    sent = {"top": picture / np.float32(255), "wrist": picture, "side": picture}
    assert [*contract_differences.observation(served, sent)] == []
    [difference] = contract_differences.observation(served, {"top": picture, "hand": picture})
    assert difference.subject == "hand" and "no such camera" in difference.cause
    [difference] = contract_differences.observation(served, {"top": picture + np.float32(2), "wrist": picture})
    assert difference.subject == "top" and "another dtype" in difference.cause
