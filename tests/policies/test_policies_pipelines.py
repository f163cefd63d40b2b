"""Whole chains of the registered recipes, dataset sample or observation to model and back, against recordings."""

import dataclasses
import json

import numpy as np
import pytest

from openpi import transforms
from openpi.models.tokenizer import FASTTokenizer, PaligemmaTokenizer
from openpi.policies.robot_spec import find_spec
from openpi.shared.normalize import NormStats
from openpi.training.config import AssetsConfig, get_config
from openpi.transforms import flatten_dict, unflatten_dict

RECIPES = [
    "pi05_aloha_pen_uncap",
    "pi05_droid",
    "pi05_droid_finetune",
    "pi05_full_droid_finetune",
    "pi05_libero",
    "pi0_aloha_pen_uncap",
    "pi0_aloha_sim",
    "pi0_droid",
    "pi0_fast_droid",
    "pi0_fast_libero",
    "pi0_libero",
    "pi0_trossen_transfer_block",
]
ATOL = 1e-6
# Relative, for values that were divided by a small scale.
RTOL = 1e-6


class CharacterModel:
    """The text model of the recordings: one token per character. Everything around it is the real logic."""

    def encode(self, text, *, add_bos=False, add_eos=False):
        return [2] * add_bos + [ord(character) + 10 for character in text] + [1] * add_eos

    def decode(self, ids):
        return "".join(chr(i - 10) for i in ids if i >= 10)

    def vocab_size(self):
        return 257152


class HundredthCodec:
    """The action codec of the recordings: each value becomes one of 101 tokens."""

    def encode(self, actions):
        return np.clip(np.round(50 * (np.asarray(actions).ravel() + 1)), 0, 100).astype(int).tolist()

    def decode(self, ids, num_steps, dim):
        return np.array(ids).reshape(num_steps, dim) / 50 - 1


def use_recorded_tokenizers(steps) -> None:
    for step in steps:
        tokenizer = getattr(step, "tokenizer", None)
        if tokenizer is None:
            continue
        text = getattr(tokenizer, "_text", tokenizer)
        text.__dict__["_model"] = CharacterModel()
        if text is not tokenizer:
            tokenizer.__dict__["codec"] = HundredthCodec()


class Chains:
    """A recipe's transforms with the recorded statistics, and the recording."""

    def __init__(self, golden, name):
        self.arrays = dict(np.load(golden / "data" / f"pipeline_{name}.npz"))
        config = get_config(name)
        changes = {"assets": AssetsConfig(asset_id="recorded")}
        if hasattr(config.data, "rlds_data_dir"):
            changes["rlds_data_dir"] = "not/read/here"
        self.data = dataclasses.replace(config.data, **changes).create(config.assets_dirs, config.model)
        use_recorded_tokenizers([*self.data.model_transforms.inputs, *self.data.model_transforms.outputs])
        self.stats = {
            key: NormStats(*(self.arrays[f"stats/{key}/{q}"] for q in ("mean", "std", "q01", "q99")))
            for key in ("state", "actions")
        }

    def recorded(self, prefix):
        return {
            key.removeprefix(f"{prefix}/"): value for key, value in self.arrays.items() if key.startswith(f"{prefix}/")
        }

    def sample(self, prefix):
        tree = unflatten_dict({key.replace("|", "/"): value for key, value in self.recorded(prefix).items()})
        for value in flatten_dict(tree).values():
            value.flags.writeable = False
        return tree

    def normalize(self):
        return transforms.Normalize(self.stats, use_quantiles=self.data.use_quantile_norm)

    def unnormalize(self):
        return transforms.Unnormalize(self.stats, use_quantiles=self.data.use_quantile_norm)


@pytest.fixture(params=RECIPES)
def chains(request, golden):
    return Chains(golden, request.param)


def assert_recorded(found: dict, recorded: dict) -> None:
    flat = flatten_dict(found)
    assert set(flat) == {key.removesuffix("@stride8") for key in recorded}
    for key, want in recorded.items():
        value = np.asarray(flat[key.removesuffix("@stride8")])
        value = value[::8, ::8] if key.endswith("@stride8") else value
        if np.issubdtype(want.dtype, np.floating):
            np.testing.assert_allclose(value, want, atol=ATOL, rtol=RTOL, err_msg=key)
        else:
            assert value.dtype == want.dtype, key
            np.testing.assert_array_equal(value, want, err_msg=key)


def test_a_training_sample_becomes_the_recorded_model_input(chains):
    data = chains.data
    robot = transforms.compose([*data.repack_transforms.inputs, *data.data_transforms.inputs])(
        chains.sample("train_in")
    )
    for key, want in chains.recorded("pre_norm").items():
        np.testing.assert_allclose(robot[key], want, atol=ATOL, err_msg=key)
    model_input = transforms.compose([chains.normalize(), *data.model_transforms.inputs])(robot)
    assert_recorded(model_input, chains.recorded("train_out"))


def test_an_observation_becomes_the_recorded_model_input(chains):
    data = chains.data
    steps = [*data.data_transforms.inputs, chains.normalize(), *data.model_transforms.inputs]
    assert_recorded(transforms.compose(steps)(chains.sample("infer_in")), chains.recorded("infer_out"))


def test_model_output_becomes_the_recorded_actions(chains):
    data = chains.data
    steps = [*data.model_transforms.outputs, chains.unnormalize(), *data.data_transforms.outputs]
    result = transforms.compose(steps)(chains.sample("model"))
    assert_recorded(result, chains.recorded("final"))


def test_the_robot_of_a_recipe_tells_its_client_keys(chains):
    spec = find_spec(chains.data.data_transforms.inputs)
    assert spec is not None
    sent = set(flatten_dict(chains.sample("infer_in")))
    assert {camera.key for camera in spec.cameras if camera.required} <= sent
    assert {vector.key for vector in spec.state} <= sent


def recorded_tokens(golden, kind):
    return json.loads((golden / "data" / "tokenize_transforms.json").read_text())[kind]


def test_prompts_are_tokenized_as_recorded(golden):
    for case in recorded_tokens(golden, "tokenize_prompt"):
        step = transforms.TokenizePrompt(PaligemmaTokenizer(case["max_len"]), case["discrete_state_input"])
        use_recorded_tokenizers([step])
        state = None if case["state"] is None else np.array(case["state"])
        result = step({"prompt": case["prompt"], "state": state})
        assert_tokens(result, "tokenized_prompt", case["tokens"], case["token_dtype"])
        assert_tokens(result, "tokenized_prompt_mask", case["mask"], case["mask_dtype"])


def test_prompts_with_actions_are_tokenized_as_recorded(golden):
    for case in recorded_tokens(golden, "tokenize_fast"):
        step = transforms.TokenizeFASTInputs(FASTTokenizer(case["max_len"]))
        use_recorded_tokenizers([step])
        sample = {"prompt": case["prompt"], "state": np.array(case["state"])}
        if case["actions"] is not None:
            sample["actions"] = np.array(case["actions"])
        result = step(sample)
        for key, dtype in case["dtypes"].items():
            assert_tokens(result, key, case[key], dtype)


def assert_tokens(result, key, values, dtype):
    assert result[key].tolist() == values
    assert str(result[key].dtype) == dtype
