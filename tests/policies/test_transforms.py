"""Every transform: recorded values, no edits of its input, errors that name what is wrong."""

import json

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

import paths
from openpi import transforms
from openpi.shared.normalize import NormStats
from openpi.transforms import flatten_dict, unflatten_dict

ATOL = 1e-6


def frozen(tree):
    """A copy whose arrays cannot be written to."""
    if isinstance(tree, dict):
        return {key: frozen(value) for key, value in tree.items()}
    if isinstance(tree, (str, bytes)):
        return tree
    copy = np.array(tree)
    copy.flags.writeable = False
    return copy


def assert_same(found: dict, expected: dict) -> None:
    found, expected = flatten_dict(found), flatten_dict(expected)
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        np.testing.assert_array_equal(found[key], want, err_msg=key)


class OneTokenPerCharacter:
    """Tokenizes for real, in the simplest way: bytes, padded; actions to 0..100."""

    def __init__(self, length: int = 40) -> None:
        self.length = length

    def tokenize(self, prompt, state=None, *actions):
        text = prompt if state is None else f"{prompt} {np.round(state, 2).tolist()}"
        tokens = np.frombuffer(text.encode().ljust(self.length)[: self.length], np.uint8).astype(np.int64)
        mask = np.arange(self.length) < len(text)
        return (tokens, mask, mask.astype(np.int64), mask) if actions else (tokens, mask)

    def decode_actions(self, tokens, action_horizon, action_dim):
        assert tokens.dtype == np.int32
        return tokens[: action_horizon * action_dim].reshape(action_horizon, action_dim) / 50 - 1


WIDE = NormStats(mean=np.arange(4.0), std=np.ones(4), q01=-np.ones(4), q99=np.arange(1.0, 5))
STATS = {"state": WIDE, "actions": WIDE}

ALL_TRANSFORMS = {
    "RepackTransform": transforms.RepackTransform({"a": {"b": "image/base"}, "c": ["state", "actions"]}),
    "InjectDefaultPrompt": transforms.InjectDefaultPrompt("tidy up"),
    "Normalize": transforms.Normalize(STATS),
    "Normalize-quantile": transforms.Normalize(STATS, use_quantiles=True, strict=True),
    "Unnormalize": transforms.Unnormalize(STATS),
    "Unnormalize-quantile": transforms.Unnormalize(STATS, use_quantiles=True),
    "ChannelsFirst": transforms.ChannelsFirst(("picture", "front")),
    "ResizeImages": transforms.ResizeImages(4, 5),
    "SubsampleActions": transforms.SubsampleActions(2),
    "DeltaActions": transforms.DeltaActions((True, False, True)),
    "AbsoluteActions": transforms.AbsoluteActions((True, False, True)),
    "TokenizePrompt": transforms.TokenizePrompt(OneTokenPerCharacter()),
    "TokenizePrompt-state": transforms.TokenizePrompt(OneTokenPerCharacter(), discrete_state_input=True),
    "TokenizeFASTInputs": transforms.TokenizeFASTInputs(OneTokenPerCharacter()),
    "ExtractFASTActions": transforms.ExtractFASTActions(OneTokenPerCharacter(), 2, 3),
    "PromptFromLeRobotTask": transforms.PromptFromLeRobotTask({0: "zero", 3: "three"}),
    "PadStatesAndActions": transforms.PadStatesAndActions(7),
    "CompositeTransform": transforms.compose(
        [transforms.DeltaActions((True,)), transforms.Normalize(STATS), transforms.PadStatesAndActions(9)]
    ),
}

numbers = st.floats(-10, 10, width=32)
samples = st.fixed_dictionaries(
    {
        "image": st.fixed_dictionaries({"base": hnp.arrays(np.uint8, st.sampled_from([(4, 5, 3), (6, 3, 3)]))}),
        "front": hnp.arrays(np.uint8, (4, 6, 3)),
        "state": hnp.arrays(np.float32, (4,), elements=numbers),
        "actions": st.one_of(
            hnp.arrays(np.float32, (3, 4), elements=numbers),
            hnp.arrays(np.float64, (3, 4), elements=numbers),
            hnp.arrays(np.int64, (3, 4), elements=st.integers(-5, 100)),
        ),
        "prompt": st.one_of(st.text(max_size=9), st.text(max_size=9).map(np.asarray)),
        "task_index": st.sampled_from([np.int64(0), np.asarray(3)]),
    }
)


def test_every_public_transform_is_among_those_tested():
    names = {
        name
        for name, value in vars(transforms).items()
        if getattr(value, "__module__", "") == transforms.__name__ and "__call__" in vars(value)
    } - {"DataTransformFn"}  # what all of them are
    assert names == {key.partition("-")[0] for key in ALL_TRANSFORMS}


@pytest.mark.parametrize("name", ALL_TRANSFORMS)
@hypothesis.settings(max_examples=15)
@hypothesis.given(sample=samples)
def test_no_transform_edits_its_input(name, sample):
    if name == "ExtractFASTActions":
        sample = {**sample, "actions": np.abs(sample["actions"]).ravel()}
    given, before = frozen(sample), frozen(sample)
    result = ALL_TRANSFORMS[name](given)
    assert_same(given, before)
    assert isinstance(result, dict)


def test_images_are_resized_from_either_layout():
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    turned = transforms.ChannelsFirst(("base",))({"base": image, "pair": 0})
    assert turned["base"].shape == (3, 6, 8) and np.shares_memory(turned["base"], image)
    for size in ((4, 5), (6, 8)):
        resize = transforms.ResizeImages(*size)
        found, expected = (resize({"image": {"base": each}})["image"]["base"] for each in (turned["base"], image))
        np.testing.assert_array_equal(found, expected)


@hypothesis.given(sample=samples)
def test_absolute_actions_undo_delta_actions(sample):
    mask = transforms.make_bool_mask(3, -1)
    actions = sample["actions"].astype(np.float64)
    delta = transforms.DeltaActions(mask)({**sample, "actions": actions})
    np.testing.assert_allclose(transforms.AbsoluteActions(mask)(delta)["actions"], actions, atol=1e-12)


@pytest.mark.parametrize("use_quantiles", [False, True])
@hypothesis.given(
    stats=hnp.arrays(np.float64, (2, 4), elements=st.floats(-5, 5)),
    x=hnp.arrays(np.float64, (3, 4), elements=st.floats(-5, 5)),
)
def test_unnormalize_undoes_normalize(use_quantiles, stats, x):
    low, high = stats.min(axis=0), stats.max(axis=0) + 0.1
    entry = {"x": NormStats(mean=low, std=high - low, q01=low, q99=high)}
    scaled = transforms.Normalize(entry, use_quantiles=use_quantiles)({"x": x})
    np.testing.assert_allclose(transforms.Unnormalize(entry, use_quantiles=use_quantiles)(scaled)["x"], x, atol=1e-9)


# --- recorded values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["same", "stats_longer_than_data", "stats_shorter_than_data"])
@pytest.mark.parametrize("kind", ["zscore", "quantile"])
@pytest.mark.parametrize("direction", ["normalize", "unnormalize"])
def test_normalisation_agrees_with_the_recording(golden, case, kind, direction):
    arrays = dict(np.load(golden / "data" / f"normalize_{case}.npz"))
    stats = {
        key: NormStats(*(arrays[f"stats/{key}/{name}"] for name in ("mean", "std", "q01", "q99")))
        for key in ("state", "actions")
    }
    sample = {key: arrays[f"in/{key}"] for key in ("state", "actions", "other")}
    transform_class = {"normalize": transforms.Normalize, "unnormalize": transforms.Unnormalize}[direction]
    transform = transform_class(stats, use_quantiles=kind == "quantile")
    prefix = f"{direction}/{kind}/"
    if prefix + "error" in arrays:
        assert str(arrays[prefix + "error"]) == "ValueError"
        with pytest.raises(ValueError, match="openpi stats"):
            transform(sample)
        return
    result = transform(frozen(sample))
    for key in sample:
        want = arrays[prefix + key]
        assert result[key].dtype == want.dtype
        np.testing.assert_allclose(result[key], want, rtol=1e-12, atol=ATOL, err_msg=key)


@pytest.mark.parametrize("case", ["aloha14", "droid8_padded32", "leading_false", "libero7_state8", "none"])
def test_relative_and_absolute_actions_agree_with_the_recording(golden, case):
    arrays = dict(np.load(golden / "data" / f"delta_absolute_{case}.npz"))
    mask = None if arrays["mask_is_none"] else arrays["mask"].tolist()
    sample = frozen({"state": arrays["in/state"], "actions": arrays["in/actions"]})
    for prefix, transform in (("delta", transforms.DeltaActions(mask)), ("absolute", transforms.AbsoluteActions(mask))):
        np.testing.assert_allclose(transform(sample)["actions"], arrays[f"{prefix}/actions"], rtol=0, atol=ATOL)


def test_padding_agrees_with_the_recording(golden):
    arrays = dict(np.load(golden / "data" / "pad_to_dim.npz"))
    x = arrays["x"]
    for target in (8, 5, 3):
        np.testing.assert_array_equal(transforms.pad_to_dim(x, target), arrays[f"pad{target}"])
    np.testing.assert_array_equal(transforms.pad_to_dim(x, 6, axis=0), arrays["pad_axis0"])
    width = arrays["pad_value"].shape[-1]
    value = float(arrays["pad_value"][0, -1])
    np.testing.assert_array_equal(transforms.pad_to_dim(x, width, value=value), arrays["pad_value"])
    padded = transforms.PadStatesAndActions(32)({"state": x[0], "actions": x})
    np.testing.assert_array_equal(padded["state"], arrays["ps_state"])
    np.testing.assert_array_equal(padded["actions"], arrays["ps_actions"])


def test_subsampling_agrees_with_the_recording(golden):
    arrays = dict(np.load(golden / "data" / "subsample_actions.npz"))
    for stride in (2, 3):
        result = transforms.SubsampleActions(stride)({"actions": arrays["actions"]})
        np.testing.assert_array_equal(result["actions"], arrays[f"stride{stride}"])


def structure_cases(kind):
    path = paths.GOLDEN / "data" / "structure_transforms.json"
    return json.loads(path.read_text())[kind]


ERRORS = {"ValueError": ValueError, "KeyError": KeyError}


@pytest.mark.parametrize("case", structure_cases("transform_dict"))
def test_transform_dict_agrees_with_the_recording(case):
    if "error" in case:
        with pytest.raises(ERRORS[case["error"]], match="change the patterns"):
            transforms.transform_dict(case["patterns"], case["input"])
    else:
        assert transforms.transform_dict(case["patterns"], case["input"]) == case["output"]


@pytest.mark.parametrize("case", structure_cases("repack"))
def test_repacking_agrees_with_the_recording(case):
    transform = transforms.RepackTransform(case["structure"])
    if "error" in case:
        with pytest.raises(ERRORS[case["error"]], match="found"):
            transform(case["input"])
    else:
        assert transform(case["input"]) == case["output"]


@pytest.mark.parametrize("case", structure_cases("make_bool_mask"))
def test_bool_masks_agree_with_the_recording(case):
    assert list(transforms.make_bool_mask(*case["args"])) == case["out"]


@pytest.mark.parametrize("case", structure_cases("flatten_dict"))
def test_flattening_agrees_with_the_recording(case):
    assert flatten_dict(case["input"]) == case["flat"]
    assert flatten_dict(unflatten_dict(case["flat"])) == case["flat"]


keys = st.text("abc", min_size=1, max_size=3)
trees = st.recursive(st.integers(), lambda children: st.dictionaries(keys, children, min_size=1, max_size=3))


@hypothesis.settings(max_examples=30)
@hypothesis.given(tree=st.dictionaries(keys, trees))
def test_unflattening_undoes_flattening(tree):
    assert unflatten_dict(flatten_dict(tree)) == tree


# --- what they promise beyond the recordings ------------------------------------------------------------------------


def test_groups_grow_towards_the_model():
    group = transforms.Group(inputs=["a"], outputs=["z"]).push(inputs=["b"], outputs=["y"])
    assert (group.inputs, group.outputs) == (("a", "b"), ("y", "z"))


def test_integer_actions_become_relative_without_losing_fractions():
    sample = {"state": np.array([0.5, 0.5]), "actions": np.array([[1, 2], [3, 4]])}
    np.testing.assert_array_equal(transforms.DeltaActions((True, False))(sample)["actions"], [[0.5, 2.0], [2.5, 4.0]])


def test_float32_actions_stay_float32():
    sample = {"state": np.zeros(2), "actions": np.zeros((3, 2), np.float32)}
    assert transforms.DeltaActions((True, True))(sample)["actions"].dtype == np.float32


def test_a_single_action_becomes_relative_too():
    sample = {"state": np.ones(2), "actions": np.full(2, 3.0)}
    np.testing.assert_array_equal(transforms.DeltaActions((True, False))(sample)["actions"], [2.0, 3.0])


@pytest.mark.parametrize("transform", [transforms.DeltaActions, transforms.AbsoluteActions])
def test_a_mask_longer_than_the_action_is_refused_with_both_sizes(transform):
    sample = {"state": np.zeros(8), "actions": np.zeros((5, 7))}
    with pytest.raises(ValueError, match=r"mask .* has 8 entries and 'actions' has shape \(5, 7\)"):
        transform([True] * 8)(sample)
    with pytest.raises(ValueError, match=r"'state' has shape \(3,\)"):
        transform([True] * 7)({**sample, "state": np.zeros(3)})


def test_samples_without_actions_pass_the_delta_transforms_as_the_same_dict():
    sample = {"state": np.zeros(3)}
    assert transforms.DeltaActions((True,))(sample) is sample
    assert transforms.AbsoluteActions((True,))(sample) is sample


@pytest.mark.parametrize("use_quantiles", [False, True])
def test_statistics_of_another_width_are_refused_with_key_widths_and_fix(use_quantiles):
    narrow = {"state": NormStats(*np.ones((4, 3)))}
    with pytest.raises(ValueError, match=r"'state' have 3 dimensions and the data has 8.*openpi stats"):
        transforms.Normalize(narrow, use_quantiles=use_quantiles)({"state": np.zeros(8)})
    with pytest.raises(ValueError, match=r"'state' have 3 dimensions and the data has 2.*openpi stats"):
        transforms.Unnormalize(narrow, use_quantiles=use_quantiles)({"state": np.zeros(2)})


def test_quantiles_that_are_not_there_are_noticed_when_the_transform_is_made():
    stats = {"state": NormStats(mean=np.zeros(2), std=np.ones(2))}
    for transform in (transforms.Normalize, transforms.Unnormalize):
        with pytest.raises(ValueError, match=r"q01 and q99.*state"):
            transform(stats, use_quantiles=True)


def test_a_key_with_statistics_that_is_missing_is_named_where_it_must_be_there():
    sample = {"state": np.zeros(4)}
    with pytest.raises(ValueError, match=r"statistics for actions.*found: state"):
        transforms.Normalize(STATS, strict=True)(sample)
    with pytest.raises(ValueError, match=r"statistics for actions.*found: state"):
        transforms.Unnormalize(STATS)(sample)
    assert set(transforms.Normalize(STATS)(sample)) == {"state"}


def test_without_statistics_samples_pass_unchanged():
    sample = {"state": np.zeros(4)}
    assert transforms.Normalize(None)(sample) is sample
    assert transforms.Unnormalize(None)(sample) is sample


def test_a_default_prompt_never_replaces_one():
    inject = transforms.InjectDefaultPrompt("default")
    assert inject({})["prompt"].item() == "default"
    assert inject({})["prompt"].shape == ()
    assert inject({"prompt": "own"})["prompt"] == "own"
    assert "prompt" not in transforms.InjectDefaultPrompt(None)({})


def test_a_repack_that_forgets_the_prompt_is_explained_when_the_prompt_is_needed():
    repacked = transforms.RepackTransform({"state": "observation.state"})({"observation.state": 1, "prompt": "x"})
    with pytest.raises(ValueError, match=r"Prompt is required.*found: state.*keep 'prompt' in the repack"):
        transforms.TokenizePrompt(OneTokenPerCharacter())(repacked)
    with pytest.raises(ValueError, match="Prompt is required"):
        transforms.TokenizeFASTInputs(OneTokenPerCharacter())(repacked)


def test_a_prompt_with_state_needs_the_state():
    with pytest.raises(ValueError, match="'state' is missing; found: prompt"):
        transforms.TokenizePrompt(OneTokenPerCharacter(), discrete_state_input=True)({"prompt": "x"})


@pytest.mark.parametrize("prompt", ["tidy", np.asarray("tidy"), np.str_("tidy"), b"tidy", np.asarray(b"tidy")])
def test_prompts_may_be_text_bytes_or_scalar_arrays(prompt):
    tokens, _ = OneTokenPerCharacter().tokenize("tidy")
    result = transforms.TokenizePrompt(OneTokenPerCharacter())({"prompt": prompt})
    np.testing.assert_array_equal(result["tokenized_prompt"], tokens)
    assert "prompt" not in result


def test_the_task_text_becomes_the_prompt():
    transform = transforms.PromptFromLeRobotTask({2: "stack"})
    assert transform({"task_index": np.asarray(2)})["prompt"] == "stack"
    with pytest.raises(ValueError, match=r"task_index=5 is not in .*\[2\]"):
        transform({"task_index": np.asarray(5)})
    with pytest.raises(ValueError, match="'task_index' is missing; found: state"):
        transform({"state": 0})


@pytest.mark.parametrize(
    ("transform", "key"),
    [
        (transforms.ResizeImages(4, 4), "image"),
        (transforms.SubsampleActions(2), "actions"),
        (transforms.PadStatesAndActions(4), "state"),
        (transforms.RepackTransform({"x": "observation.stat"}), "observation.stat"),
    ],
)
def test_a_missing_key_is_named_with_those_that_are_there(transform, key):
    with pytest.raises(KeyError) as error:
        transform({"observation.state": 1, "other": 2})
    assert f"'{key}', found: 'observation.state', 'other'" in str(error.value)
    assert not str(error.value).startswith('"')


def test_a_similar_key_is_suggested():
    with pytest.raises(KeyError, match=r"Did you mean 'observation.state'"):
        transforms.RepackTransform({"x": "observation.stat"})({"observation.state": 1, "other": 2})


def test_apply_tree_touches_selected_leaves_only():
    tree = {"a": {"b": 1, "c": 2}, "d": 3}
    assert transforms.apply_tree(tree, {"a/b": 10, "x": 0}, lambda x, y: x + y) == {"a": {"b": 11, "c": 2}, "d": 3}
    with pytest.raises(ValueError, match="x not found; there is a/b, a/c, d"):
        transforms.apply_tree(tree, {"x": 0}, lambda x, y: x, strict=True)
