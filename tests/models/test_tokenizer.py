"""Prompts and actions as tokens: recorded ids exactly, and what users are told."""

import json
import logging
import pickle
import shutil

import numpy as np
import pytest

import paths
from openpi.models import tokenizer
from openpi.models.pi0_fast_config import Pi0FASTConfig
from openpi.models.tokenizer import BinningTokenizer, FASTTokenizer, FSQTokenizer, PaligemmaTokenizer
from openpi.shared.collected_warnings import collected_warnings

FOLDER = paths.GOLDEN / "tokenizers"
MODEL = FOLDER / "tiny_paligemma_tokenizer.model"
CASES = json.loads((FOLDER / "cases.json").read_text())
ACTIONS = 1e-6


def test_prompts_have_the_recorded_tokens():
    for case in CASES["paligemma_cases"]:
        state = None if case.get("state") is None else np.array(case["state"])
        tokens, mask = PaligemmaTokenizer(case["max_len"], MODEL).tokenize(case["prompt"], state)
        assert tokens.tolist() == case["tokens"], case["prompt"]
        assert mask.tolist() == [True] * case["n"] + [False] * (case["max_len"] - case["n"])
        assert [str(tokens.dtype), str(mask.dtype)] == case["dtype"]


def test_the_sentencepiece_model_is_read_as_recorded():
    model = tokenizer.load_sentencepiece(MODEL)
    assert model.vocab_size() == CASES["vocab_size"]
    for case in CASES["raw_sentencepiece"]:
        assert model.encode(case["text"]) == case["ids"]
        assert model.encode(case["text"], add_bos=True) == case["ids_bos"]
        assert model.encode(case["text"], add_eos=True) == case["ids_eos"]
        assert model.decode(case["ids"]) == case["decoded"]


def test_states_fall_into_the_recorded_bins():
    values = [-1.01, -1.0, -0.9999, 0.0, 0.9999, 1.0, 5.0]
    assert tokenizer.state_as_text(np.array(values)) == "-1 0 0 128 255 255 255"


def test_a_cut_prompt_is_told_each_time_and_logged_once(caplog):
    short = PaligemmaTokenizer(8, MODEL)
    with collected_warnings() as told:
        short.tokenize("pick up the cup" + 50 * " and the next", np.zeros(4))
        short.tokenize("open drawer", np.zeros(4))
    logged = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert logged == told[:1] and len(told) == 2
    assert "is cut to 8 (max_token_len)" in told[0]
    assert "'pick up the cup and the" in told[0]
    assert "\n" not in told[0] and len(told[0]) < 240


@pytest.mark.parametrize("make", [PaligemmaTokenizer, BinningTokenizer])
def test_it_is_told_how_much_of_the_state_a_cut_takes_along(make):
    def told(max_len: int) -> list[str]:
        with collected_warnings() as warnings:
            arguments = (None,) if make is BinningTokenizer else ()
            make(max_len, model_path=MODEL).tokenize("pick up the cup", np.linspace(-1, 1, 8), *arguments)
        return warnings

    needed = next(n for n in range(10, 200) if not told(n))
    parts = ("nor the state behind it", "the end of the state", "what follows the state")
    found = [next(part for part in parts if part in warning) for n in range(4, needed) for warning in told(n)]
    assert len(found) == needed - 4
    assert list(dict.fromkeys(found)) == list(parts)
    assert found == sorted(found, key=parts.index)


def test_actions_that_are_cut_from_a_training_sample_are_told(chunks):
    fast = FASTTokenizer(30, FOLDER / "fast", MODEL)
    with collected_warnings() as told:
        fast.tokenize("lift", np.zeros(2), chunks[0])
        fast.tokenize(40 * "lift ", np.zeros(2), chunks[0])
    assert [warning.partition(":")[0] for warning in told] == ["actions", "prompt", "actions"]
    assert "is cut to 30 (max_token_len)" in told[0]


def test_a_cut_prompt_without_a_state_loses_its_end_alone():
    with collected_warnings() as told:
        PaligemmaTokenizer(8, MODEL).tokenize("pick up the cup, State: full, and put it down")
    assert "does not see its end. Shorten" in told[0]


def test_making_a_tokenizer_opens_nothing_and_a_missing_file_is_named_on_use(tmp_path):
    missing = PaligemmaTokenizer(8, tmp_path / "gone.model")
    with pytest.raises(FileNotFoundError, match=r"gone\.model does not exist.*tokenizer_path"):
        missing.tokenize("x")


def test_a_tokenizer_may_lie_inside_a_python_package(tmp_path, monkeypatch):
    package = tmp_path / "robot_with_words"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(MODEL, package / "words.model")
    monkeypatch.syspath_prepend(tmp_path)
    packaged = PaligemmaTokenizer(16, "package:robot_with_words/words.model").tokenize("pick up the cup")
    np.testing.assert_array_equal(packaged, PaligemmaTokenizer(16, MODEL).tokenize("pick up the cup"))
    with pytest.raises(FileNotFoundError, match=r"package:robot_with_words/other.model does not exist"):
        PaligemmaTokenizer(16, "package:robot_with_words/other.model").tokenize("x")


def test_without_a_network_the_error_says_where_to_put_paligemmas_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    # No route leads out of a test: whichever step of the download fails, the place must be named.
    monkeypatch.setattr(tokenizer, "PALIGEMMA_TOKENIZER_URL", "http://127.0.0.1:9/big_vision/paligemma_tokenizer.model")
    with pytest.raises(ConnectionError, match=r"put it at .*big_vision/paligemma_tokenizer\.model by hand"):
        PaligemmaTokenizer().tokenize("x")


def test_paligemmas_tokenizer_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    (tmp_path / "big_vision").mkdir()
    shutil.copy(MODEL, tmp_path / "big_vision" / "paligemma_tokenizer.model")
    np.testing.assert_array_equal(
        PaligemmaTokenizer(16).tokenize("pick up the cup"),
        PaligemmaTokenizer(16, MODEL).tokenize("pick up the cup"),
    )


def test_tokenizers_travel_to_worker_processes_before_and_after_use():
    expected = PaligemmaTokenizer(16, MODEL).tokenize("pick up the cup")
    used = PaligemmaTokenizer(16, MODEL)
    used.tokenize("open drawer")
    for original in (PaligemmaTokenizer(16, MODEL), used):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(original)).tokenize("pick up the cup"), expected)


@pytest.fixture(scope="module")
def chunks():
    return np.load(FOLDER / "fast_actions.npz")["actions"]


@pytest.mark.parametrize("case", CASES["fast_cases"], ids=lambda case: f"{case['actions_index']}-{case['max_len']}")
def test_actions_have_the_recorded_fast_tokens_and_come_back(case, chunks):
    fast = FASTTokenizer(case["max_len"], FOLDER / "fast", MODEL)
    state, actions = np.array(case["state"]), chunks[case["actions_index"]]
    tokens, mask, ar_mask, loss_mask = fast.tokenize(case["prompt"], state, actions)
    assert tokens.tolist() == case["tokens"]
    assert mask.sum() == case["mask_n"]
    assert ar_mask.tolist() == case["ar_mask"]
    assert loss_mask.tolist() == case["loss_mask"]
    assert [str(array.dtype) for array in (tokens, mask, ar_mask, loss_mask)] == ["int64", "bool", "int64", "bool"]
    for given, expected in (("tokens", "extracted"), ("generated", "extracted_from_generated")):
        extracted = fast.extract_actions(np.array(case[given], np.int32), 10, 6)
        np.testing.assert_allclose(extracted, case[expected], atol=ACTIONS)
    wrong = fast.extract_actions(tokens, 11, 6)
    np.testing.assert_array_equal(wrong, np.zeros((11, 6)))
    tokens, mask, _, loss_mask = fast.tokenize(case["prompt"], state, None)
    assert tokens.tolist() == case["prompt_only_tokens"]
    assert mask.sum() == case["prompt_only_n"]
    assert loss_mask.sum() == case["prompt_only_loss_mask_sum"]


def test_tokens_without_actions_give_zeros():
    fast = FASTTokenizer(64, FOLDER / "fast", MODEL)
    actions = fast.extract_actions(np.array([2, 5, 6], np.int32), 10, 6)
    assert actions.dtype == CASES["no_marker_result"]["dtype"]
    np.testing.assert_array_equal(actions, np.zeros((10, 6)))


def test_binned_actions_come_back_as_recorded():
    for case in CASES["binning_cases"]:
        shape = np.shape(case["actions"])
        binning = BinningTokenizer(model_path=MODEL)
        np.testing.assert_allclose(binning.extract_actions(np.array(case["tokens"]), *shape), case["actions"])
        np.testing.assert_array_equal(binning.extract_actions(np.array(case["tokens"]), 50, 9), np.zeros((50, 9)))


@pytest.mark.parametrize("baseline", [BinningTokenizer, FSQTokenizer])
def test_baselines_make_the_prompt_of_pi0_fast_and_refuse_to_train(baseline):
    prompt, state = "Pick_up the cup", np.array([0.0, 0.5])
    made = baseline(64, model_path=MODEL).tokenize(prompt, state, None)
    for found, expected in zip(made, FASTTokenizer(64, model_path=MODEL).tokenize(prompt, state, None), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(NotImplementedError, match="FASTTokenizer"):
        baseline(64, model_path=MODEL).tokenize(prompt, state, np.zeros((2, 2)))


@pytest.mark.parametrize("baseline", [BinningTokenizer, FSQTokenizer])
def test_an_action_tokenizer_of_another_class_is_refused_by_the_model_that_would_be_made_with_it(baseline):
    with pytest.raises(ValueError, match=rf"{baseline.__name__} does not take .*'fast_tokenizer_path'.*Only FAST"):
        Pi0FASTConfig(fast_model_tokenizer=baseline, action_tokenizer_path="mine")
    with pytest.raises(ValueError, match=r"does not take its arguments .*'bins'"):
        Pi0FASTConfig(fast_model_tokenizer=baseline, fast_model_tokenizer_kwargs={"bins": 3})
    assert Pi0FASTConfig(fast_model_tokenizer=FASTTokenizer, action_tokenizer_path="mine").tokenizer_arguments() == {
        "fast_tokenizer_path": "mine"
    }
