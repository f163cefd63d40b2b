"""Action tokenizers of one's own."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paths
import tiny_recipe
from openpi.cli.training import tokenizer as tokenizer_command
from openpi.models.fast_codec import UndecodableActionsError, fit_codec, load_codec
from openpi.models.tokenizer import FASTTokenizer
from openpi.shared import normalize
from openpi.training.config import get_config
from openpi.training.data import training_data
from openpi.training.data.action_tokenizer import _measure
from openpi.training.data.recipe_data import open_recipe

RECIPE = f"{paths.SUPPORT / 'tiny_recipe.py'}:fast"


def smooth_chunks(count: int, *, seed: int = 0, steps: int = 12, dim: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    phase, rate = rng.uniform(0, 6, (2, count, 1, dim))
    return np.sin(phase + rate * np.linspace(0, 1, steps)[:, None])


def test_a_codec_compresses_what_it_was_trained_on_and_gives_it_back(tmp_path):
    codec = fit_codec(smooth_chunks(500), vocab_size=512)
    codec.save(tmp_path / "fast")
    loaded = load_codec(tmp_path / "fast")
    lengths = []
    for chunk in smooth_chunks(50, seed=1):
        ids = loaded.encode(chunk)
        assert ids == codec.encode(chunk)
        restored = loaded.decode(ids, *chunk.shape)
        assert np.abs(restored - chunk).max() < 0.25  # rounding to 1/10 of a coefficient, summed over frequencies
        lengths.append(len(ids))
    assert np.mean(lengths) < 0.5 * 12 * 4


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("scale", "10", "scale is '10'"),
        ("scale", 0, "scale is 0 "),
        ("scale", -10, "-10"),
        ("min_token", 1e9, "1000000000"),
    ],
)
def test_a_codec_of_numbers_that_make_no_actions_is_refused(tmp_path, name, value, said):
    fit_codec(smooth_chunks(20)).save(tmp_path)
    config = tmp_path / "processor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=f"processor_config.json of a FAST processor cannot be read: .*{said}"):
        load_codec(tmp_path)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_rough_chunks_come_back_too(seed):
    codec = fit_codec(np.concatenate([smooth_chunks(100), [np.full((12, 4), 3.0), np.full((12, 4), -3.0)]]))
    chunk = np.random.default_rng(seed).uniform(-1, 1, (12, 4))
    assert np.abs(codec.decode(codec.encode(chunk), 12, 4) - chunk).max() < 0.25


def test_chunks_that_cannot_be_learnt_from_are_refused():
    with pytest.raises(ValueError, match=r"span \d+ values and the vocabulary has 300.*openpi stats"):
        fit_codec(np.concatenate([smooth_chunks(5), np.full((1, 12, 4), 1e3)]), vocab_size=300)
    with pytest.raises(ValueError, match="not finite"):
        fit_codec(np.full((2, 3, 4), np.nan))
    with pytest.raises(ValueError, match=r"shape \(0, 3, 4\)"):
        fit_codec(np.zeros((0, 3, 4)))


def test_the_command_trains_on_a_recipe_s_dataset(tmp_path, arm_dataset, capsys):
    output = tmp_path / "mine"
    flags = [f"--data.repo-id={arm_dataset}", f"--assets-base-dir={tmp_path / 'assets'}"]
    assert tokenizer_command.main(["fit", RECIPE, f"--output={output}", "--vocab-size=300", *flags]) == 0
    assert "a chunk of 9 numbers takes" in capsys.readouterr().out
    stats = normalize.load(tmp_path / "assets" / "fast" / arm_dataset.name)["actions"]
    codec = load_codec(output)
    chunk = np.zeros((3, stats.width))
    np.testing.assert_allclose(codec.decode(codec.encode(chunk), *chunk.shape), chunk, atol=0.1)
    assert tokenizer_command.main(["fit", RECIPE, f"--output={output}", *flags]) == 1
    assert "exists; choose another --output" in capsys.readouterr().err


def test_a_model_without_action_tokens_is_refused(tmp_path, arm_dataset, capsys):
    recipe = RECIPE.replace(":fast", ":arm")
    assert tokenizer_command.main(["fit", recipe, f"--output={tmp_path / 'x'}", f"--data.repo-id={arm_dataset}"]) == 1
    assert "is pi0, which takes no action tokenizer; name a recipe of pi0-FAST" in capsys.readouterr().err


def test_what_other_episodes_do_beyond_the_training_comes_back():
    """Below the smallest coefficient of training, everything became that one, and nobody was told."""
    chunks = smooth_chunks(200)
    codec = fit_codec(chunks, vocab_size=400)
    for chunk in (-1.5 * chunks[0], 2 * chunks[1]):
        ids = codec.encode(chunk)
        assert codec.error_beyond_rounding(chunk, ids) == 0
        np.testing.assert_allclose(codec.decode(ids, *chunk.shape), chunk, atol=0.25)


@pytest.mark.parametrize("factor", [-40, 40])
def test_what_a_codec_cannot_say_is_its_nearest_and_told_once(factor, tmp_path, caplog):
    chunks = smooth_chunks(200)
    codec = fit_codec(chunks, vocab_size=400)
    codec.save(tmp_path / "codec")
    tokenizer = FASTTokenizer(400, tmp_path / "codec", tiny_recipe.TOKENIZER)
    tokenizer.tokenize("stack", np.zeros(3), chunks[0])
    assert not caplog.records
    for _ in range(2):
        tokenizer.tokenize("stack", np.zeros(3), factor * chunks[0])
    assert caplog.text.count("action tokenizer: a chunk goes beyond its range") == 1
    codec.decode(codec.encode(factor * chunks[0]), *chunks[0].shape)  # a chunk, if another one
    report = _measure(
        codec, np.concatenate([chunks[:9], factor * chunks[:1]]), np.arange(10) > 7, tmp_path, num_chunks=8
    )
    assert report.share_beyond == 0.5


def test_tokens_that_ran_out_are_told_apart_from_those_that_are_no_chunk():
    tokenizer = FASTTokenizer(64, tiny_recipe.TOKENIZERS / "fast", tiny_recipe.TOKENIZER)
    tokens, _, _, is_target = tokenizer.tokenize("stack", np.zeros(3), np.zeros((5, 3)))
    written = tokens[is_target]
    with pytest.raises(UndecodableActionsError, match=r"coefficients; 6 x 3 actions have 18$"):
        tokenizer.decode_actions(written, 6, 3)
    with pytest.raises(UndecodableActionsError, match=r"'Action:': the model had not come to an end after 2 tokens"):
        tokenizer.decode_actions(written[:2], 6, 3)


def test_actions_that_are_no_numbers_or_far_too_large_are_refused():
    codec = fit_codec(smooth_chunks(50), vocab_size=256)
    chunk = smooth_chunks(1)[0]
    chunk[3, 2] = np.nan
    with pytest.raises(ValueError, match="not finite in dimension 2"):
        codec.encode(chunk)
    with pytest.raises(ValueError, match=r"expected normalised actions, about -1\.\.1"):
        codec.encode(1e6 * smooth_chunks(1)[0])


def test_a_text_tokenizer_that_is_too_small_is_noticed_before_training(tmp_path, arm_dataset):
    fit_codec(smooth_chunks(500), vocab_size=1000).save(tmp_path / "large")
    config = get_config(RECIPE)
    model = dataclasses.replace(config.model, action_tokenizer_path=str(tmp_path / "large"))
    data = dataclasses.replace(config.data, repo_id=str(arm_dataset))
    config = dataclasses.replace(config, model=model, data=data, assets_base_dir=str(tmp_path), exp_name="x")
    with pytest.raises(ValueError, match=r"has no token of its own for \d+ of the 1000 action ids .*--vocab-size"):
        training_data.prepare(config, open_recipe(config), num_devices=1)
    narrow = dataclasses.replace(config.model.expert, vocab_size=500)
    config = dataclasses.replace(config, model=dataclasses.replace(model, paligemma_variant=narrow))
    with pytest.raises(ValueError, match=r"the text tokenizer has 1105 tokens and the model 500"):
        training_data.prepare(config, open_recipe(config), num_devices=1)
