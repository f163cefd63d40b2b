"""Published names that programs import, each used as its users do, and behaving as published."""

import dataclasses
import logging
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import openpi.models.gemma as _gemma
import openpi.models.pi0 as _pi0
import openpi.shared.array_typing as at
import openpi.shared.image_tools as image_tools
import openpi.shared.nnx_utils as nnx_utils
import openpi.training.config as _config
import openpi.training.data_loader as _data_loader
import openpi.training.sharding as sharding
import openpi.training.utils as training_utils
import openpi.training.weight_loaders as _weight_loaders
import openpi.transforms as transforms
import tiny_recipe
from openpi.cli.data import stats
from openpi.models.model import BaseModelConfig, Observation
from openpi.models.pi0_config import Pi0Config
from openpi.policies import aloha_policy, droid_policy, libero_policy, ur5_policy
from openpi.training import freeze
from openpi.training.backend import open_backend
from openpi.training.run import preflight
from openpi_client import image_tools as client_image_tools

# --- shared.array_typing --------------------------------------------------------------------------------------


@at.typecheck
def attend(
    rng: at.KeyArrayLike, q: at.Float[at.Array, "b t d"], mask: at.Bool[at.Array, "b t"] | None = None
) -> at.Real[at.Array, "b t"]:
    return q.sum(-1)


@at.typecheck
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sample:
    image: at.UInt8[at.Array, "h w 3"]
    state: at.Float[at.ArrayLike, " s"]


def test_annotated_functions_check_shapes_and_dtypes_unless_that_is_switched_off():
    key = jax.random.key(0)
    assert attend(key, jnp.ones((1, 2, 3))).shape == (1, 2)
    for wrong in (
        {"q": jnp.ones((2, 3))},
        {"q": jnp.ones((1, 2, 3), jnp.int32)},
        {"q": np.ones((1, 2, 3), np.float32)},
    ):
        with pytest.raises(TypeError, match="q"):
            attend(key, **wrong)
    with pytest.raises(TypeError, match="mask"):
        attend(key, jnp.ones((1, 2, 3)), jnp.ones((1, 4), bool))
    with at.disable_typechecking():
        assert attend(key, jnp.ones((2, 3))).shape == (2,)
    with pytest.raises(TypeError):
        attend(key, jnp.ones((2, 3)))


def test_annotated_functions_take_tensors_of_pytorch_as_well():
    torch = pytest.importorskip("torch")
    assert attend(0, torch.ones(1, 2, 3)).shape == (1, 2)


def test_annotated_dataclasses_are_checked_when_made_and_not_when_jax_rebuilds_them():
    sample = Sample(jnp.zeros((4, 4, 3), jnp.uint8), jnp.zeros(2))
    assert jax.tree.map(lambda leaf: leaf.ndim, sample) == jax.tree.map(jnp.ndim, sample)
    assert jax.jit(lambda s: dataclasses.replace(s, state=s.state + 1))(sample).state.tolist() == [1, 1]
    for make in (lambda: Sample(jnp.zeros((4, 4, 3)), jnp.zeros(2)), lambda: dataclasses.replace(sample, state="x")):
        with pytest.raises(TypeError):
            make()


def test_trees_that_differ_are_described_leaf_by_leaf():
    expected = {"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(1)}}
    at.check_pytree_equality(expected=expected, got={"a": 1, "b": {"c": 2}})
    at.check_pytree_equality(expected=expected, got=jax.eval_shape(lambda: expected), check_shapes=True)
    with pytest.raises(ValueError, match=r"\['b'\]\['c'\]: missing"):
        at.check_pytree_equality(expected=expected, got={"a": expected["a"], "b": {}})
    with pytest.raises(ValueError, match=r"\['a'\]: shape \(3, 2\), expected \(2, 3\)"):
        at.check_pytree_equality(expected=expected, got=expected | {"a": jnp.zeros((3, 2))}, check_shapes=True)
    with pytest.raises(ValueError, match=r"\['a'\]: dtype int32, expected float32"):
        at.check_pytree_equality(expected=expected, got=expected | {"a": jnp.zeros((2, 3), int)}, check_dtypes=True)
    with pytest.raises(ValueError, match="containers"):
        at.check_pytree_equality(expected=[1, 2], got=(1, 2))


# --- shared.nnx_utils, filters ---------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    weight: jax.Array

    def sample_actions(self, rng, x, *, num_steps=1):
        return self.weight * x * num_steps


def test_a_method_of_a_model_is_jitted_with_its_parameters():
    model = Scale(jnp.asarray(3.0))
    sample = nnx_utils.module_jit(model.sample_actions, static_argnames="num_steps")
    assert float(sample(jax.random.key(0), jnp.asarray(2.0), num_steps=5)) == 30
    with pytest.raises(ValueError, match=r"method of a model.*sample_actions"):
        nnx_utils.module_jit(Scale.sample_actions)


def test_paths_match_whole_as_text_and_as_flax_passes_them():
    regex = nnx_utils.PathRegex(re.compile(".*llm.*"))
    assert regex("PaliGemma/llm/w") and regex(("PaliGemma", "llm", "w"), object()) and not regex(("img", 0))
    assert nnx_utils.PathRegex(r"a\.b", sep=".")(("a", "b")) and regex == freeze.PathRegex(".*llm.*")
    with pytest.raises(ValueError, match="IGNORECASE"):
        nnx_utils.PathRegex(re.compile("llm", re.IGNORECASE))


def test_a_part_of_a_parameter_tree_is_mapped():
    params = {"llm": {"w": np.ones(2, np.float32)}, "img": {"w": np.ones(2, np.float32)}}
    cast = nnx_utils.state_map(params, nnx_utils.PathRegex("llm/.*"), lambda leaf: leaf.astype(np.float16))
    assert cast["llm"]["w"].dtype == np.float16 and cast["img"]["w"].dtype == np.float32
    with pytest.raises(TypeError, match=r"nnx\.State or nested dicts"):
        nnx_utils.state_map([1], nnx_utils.PathRegex(".*"), abs)


def of_path_and_value(path, value):
    return path[-1] == "bias"


def test_whatever_flax_takes_as_a_filter_freezes_by_path():
    """Filters of flax itself: `test_published_programs.py`, where flax is installed."""
    text = nnx_utils.PathRegex(".*img.*")
    cases = {None: (), ...: ("img/w", "img/bias", "llm/w"), True: ("img/w", "img/bias", "llm/w"), False: ()}
    cases |= {(text, of_path_and_value): ("img/w", "img/bias", "llm/bias"), of_path_and_value: ("img/bias", "llm/bias")}
    for given, frozen in cases.items():
        config = dataclasses.replace(tiny_recipe.tiny, freeze_filter=given)
        for path in ("img/w", "img/bias", "llm/w", "llm/bias"):
            assert config.freeze_filter(path) is (path in frozen or given in (..., True)), (given, path)
            assert config.trainable_filter(tuple(path.split("/")), object()) is not config.freeze_filter(path)
    for no_filter in (3, "a tag", np.ndarray):
        with pytest.raises(ValueError, match="freeze_filter"):
            dataclasses.replace(tiny_recipe.tiny, freeze_filter=no_filter)


# --- images ----------------------------------------------------------------------------------------------------


def test_images_are_resized_as_recorded_as_integers_and_floats_alone_and_in_batches(golden):
    recorded = np.load(golden / "components" / "components.npz")
    for case in sorted({key.split("/")[1] for key in recorded.files if key.startswith("resize/")}):
        size = tuple(int(side) for side in recorded[f"resize/{case}/size"][2:])
        image, expected = recorded[f"resize/{case}/in_u8"], recorded[f"resize/{case}/jax_f32"]
        unit = image.astype(np.float32) / 255 * 2 - 1
        found = image_tools.resize_with_pad(unit, *size)
        assert isinstance(found, np.ndarray) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(image_tools.resize_with_pad(np.stack([unit] * 2)[None], *size)[0, 1], found)
        assert image_tools.resize_with_pad(found, *size) is found
        # The robot's side has floats in [0, 1], and padding that is black there.
        np.testing.assert_allclose(client_image_tools.resize_with_pad((unit + 1) / 2, *size) * 2 - 1, found, atol=1e-5)


def test_images_on_a_device_are_resized_there_and_on_the_robot_become_numpy_s():
    """Their numbers: `test_models_components.py`."""
    image = jnp.zeros((2, 4, 8, 3), jnp.uint8)
    resized = jax.jit(image_tools.resize_with_pad, static_argnums=(1, 2))(image + 7, 4, 4)
    assert isinstance(resized, jax.Array) and resized.dtype == jnp.uint8
    assert np.unique(resized[:, 1:3]).tolist() == [7] and not resized[:, (0, 3)].any()
    assert isinstance(client_image_tools.resize_with_pad(image, 4, 4), np.ndarray)


def test_floats_of_unknown_range_are_neither_resized_on_the_robot_nor_before_a_model():
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got values from -1"):
        client_image_tools.resize_with_pad(np.full((4, 4, 3), -1.0), 2, 2)
    with pytest.raises(ValueError, match="float64; expected uint8"):
        image_tools.resize_with_pad(np.ones((4, 4, 3)), 2, 2)
    with pytest.raises(ValueError, match="image 'base_0_rgb' is to be resized"):
        transforms.ResizeImages(2, 2)({"image": {"base_0_rgb": np.zeros((4, 4, 3), np.float32)}})


# --- transforms ------------------------------------------------------------------------------------------------


class Doubled(transforms.DataTransformFn):
    def __call__(self, data):
        return {key: 2 * value for key, value in data.items()}


def test_transforms_are_known_as_such():
    for step in (Doubled(), transforms.DeltaActions(None), transforms.compose([Doubled()]), lambda data: data):
        assert isinstance(step, transforms.DataTransformFn)
    assert not isinstance(3, transforms.DataTransformFn)
    assert transforms.compose([Doubled(), Doubled()])({"a": 1}) == {"a": 4}


def test_an_observation_that_lacks_a_part_says_which():
    with pytest.raises(KeyError, match=r"Observation\.from_dict needs the key 'image_mask', found: 'image', 'state'"):
        Observation.from_dict({"image": {}, "state": np.zeros(1)})


def test_an_observation_is_replaced_in_part_and_named_with_its_arrays():
    observation = Observation({}, {}, np.zeros((1, 2)))
    assert observation.replace(state=np.ones((1, 2))).state.sum() == 2
    assert Observation[at.Array].__origin__ is Observation


@dataclasses.dataclass(frozen=True)
class WithValues(Pi0Config):
    """A value head on top, as programs add one: in `create`."""

    def create(self, rng):
        head = {"kernel": jax.random.normal(rng, (16, 1)), "bias": jnp.zeros(1)}
        return ValueModel(self, super().create(rng).params | {"value_head": head})


class ValueModel(_pi0.Pi0):
    def value(self):
        return self.params["value_head"]["bias"]

    def mask(self, tokens):
        return _pi0.make_attn_mask(tokens > 0, jnp.array([0, 1, 0]))


def test_what_a_model_of_ones_own_is_made_with_is_loaded_too():
    """`load` took the head for a stranger's, so that each program had to write three methods."""
    config = WithValues(**{f.name: getattr(tiny_recipe.MODEL, f.name) for f in dataclasses.fields(tiny_recipe.MODEL)})
    params = tiny_recipe.drawn_params(config.abstract_params())
    model = config.load(params, remove_extra_params=False)
    assert isinstance(model, ValueModel) and model.value() == params["value_head"]["bias"]
    assert isinstance(jax.tree.map(jnp.negative, model), ValueModel)
    assert model.mask(jnp.array([[1, 1, 0]])).tolist() == [[[True, False, False], [True, True, False], [False] * 3]]
    with pytest.raises(ValueError, match="value_head/bias: missing"):
        config.load({key: value for key, value in params.items() if key != "value_head"})


@dataclasses.dataclass(frozen=True)
class OfOnesOwn(BaseModelConfig):
    """With what is published, and no more."""

    action_dim: int = 4
    action_horizon: int = 2
    max_token_len: int = 8

    @property
    def model_type(self):
        return _config.ModelType.PI0

    def create(self, rng):
        raise NotImplementedError


def test_the_transforms_of_a_model_of_ones_own_are_made():
    steps = _config.ModelTransformFactory()(OfOnesOwn()).inputs
    assert [type(step).__name__ for step in steps][2:] == ["TokenizePrompt", "PadStatesAndActions"]


@dataclasses.dataclass(frozen=True)
class OfTheFirstRelease(_config.DataConfigFactory):
    def create(self, assets_dirs, model_config):
        return self.create_base_config(assets_dirs)


def test_a_recipe_that_leaves_the_model_out_says_how_values_are_normalized(tmp_path):
    assert OfTheFirstRelease("me/set", use_quantile_norm=False).create(tmp_path, None).repo_id == "me/set"
    with pytest.raises(
        ValueError, match=r"OfTheFirstRelease calls create_base_config\(assets_dirs\) without the model"
    ):
        OfTheFirstRelease("me/set").create(tmp_path, tiny_recipe.MODEL)


def test_errors_of_renaming_name_the_keys_that_the_user_wrote():
    tree = {"a": 1, "b": 2, "c": {"d": 3}}
    cases = {
        ("a", "b"): "'a' becomes 'b' and 'b' stays",
        ("b", "a"): "'a' stays and 'b' becomes 'a'",
        ("a", "c"): "'a' becomes 'c', a leaf, and 'c/d' stays",
        ("c/d", "b/x"): "'b' stays, a leaf, and 'c/d' becomes 'b/x'",
        ("(", "x"): r"the pattern '\('",
        ("a", r"\2"): r"pattern 'a' with the replacement '\\\\2'",
    }
    for (pattern, replacement), message in cases.items():
        with pytest.raises(ValueError, match=message):
            transforms.transform_dict({pattern: replacement}, tree)
    with pytest.raises(KeyError, match="for 'images/front', needs the key 'camra'"):
        transforms.RepackTransform({"images": {"front": "camra"}})({"camera": 1})


def test_inputs_take_the_width_that_older_recipes_give_them_and_are_the_same():
    kind = _config.get_config("pi0_libero").model.model_type
    for inputs in (libero_policy.LiberoInputs, droid_policy.DroidInputs, ur5_policy.UR5Inputs):
        older = inputs(action_dim=32, model_type=kind)
        assert older == dataclasses.replace(older) == inputs(model_type=kind)
    assert aloha_policy.AlohaInputs(action_dim=14, adapt_to_pi=False) == aloha_policy.AlohaInputs(adapt_to_pi=False)


# --- weights ---------------------------------------------------------------------------------------------------


def test_a_loader_of_ones_own_merges_what_it_has_read():
    """Of another action width: what does not fit is left out, and may be missing."""
    reference = jax.eval_shape(
        lambda: {"llm": {"w": jnp.zeros(2), "lora_a": jnp.zeros(1)}, "head": {"w": jnp.zeros(3)}}
    )
    loaded = {"llm": {"w": np.ones(2, np.float16)}, "old": {"w": np.ones(1)}}
    merged = _weight_loaders._merge_params(loaded, reference, missing_regex=".*lora.*|head/.*")
    at.check_pytree_equality(expected=reference, got=merged, check_shapes=True, check_dtypes=True)
    assert merged["llm"]["w"].tolist() == [1, 1] and merged["head"]["w"] is reference["head"]["w"]
    partly = _weight_loaders._merge_params(loaded, reference, missing_regex="lora.*")  # which matches no whole path
    assert partly.keys() == {"llm"} and partly["llm"].keys() == {"w"}


# --- models, recipes, sharding -----------------------------------------------------------------------------------


def test_dims_of_variants_are_found_from_the_model_s_module():
    config: _gemma.Config = _gemma.get_config("gemma_300m")
    assert (config.width, config.depth, config.mlp_dim, config.num_heads) == (1024, 18, 4096, 8)


def test_rows_are_split_over_the_devices_of_the_mesh_in_use():
    mesh = sharding.make_mesh(1)
    rows = jnp.zeros((len(jax.devices()), 2))
    assert sharding.activation_sharding_constraint({"x": rows})["x"] is rows
    with sharding.set_mesh(mesh):
        split = jax.jit(sharding.activation_sharding_constraint)(rows)
    expected = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.DATA_AXIS))
    assert split.sharding.is_equivalent_to(expected, 2)
    spec = jax.eval_shape(lambda: {"w": jnp.zeros((512, 4096))})
    assert sharding.fsdp_sharding(spec, mesh, min_size_mbytes=1, log=True)["w"].is_fully_replicated


@dataclasses.dataclass(frozen=True)
class TheirOwnDataConfig(_config.SimpleDataConfig):
    extra_delta_transform: bool = False


def test_relative_actions_are_not_made_relative_again_unasked(caplog):
    plain = _config.get_config("pi0_fast_libero_no_delta_transform")
    twice = _config.get_config("pi0_fast_libero")
    assert dataclasses.replace(plain, name=twice.name, note=twice.note, data=twice.data) == twice
    kinds = [type(step).__name__ for step in plain.data.create(plain.assets_dirs, plain.model).data_transforms.inputs]
    assert kinds == ["LiberoInputs"] if False else "DeltaActions" not in kinds
    for recipe in ("pi0_libero", "pi0_fast_libero"):
        assert (
            "no-extra-delta-transform" in _config.get_config(recipe).note
            or "no_delta" in _config.get_config(recipe).note
        )
    # Published recipes are copied, and the field with them, for robots whose actions are absolute targets.
    absolute = TheirOwnDataConfig(repo_id="mine", extra_delta_transform=True)
    for data, is_told in ((twice.data, True), (plain.data, False), (absolute, False)):
        caplog.clear()
        config = dataclasses.replace(tiny_recipe.tiny, exp_name="x", data=data)
        with caplog.at_level(logging.WARNING, "openpi"):
            preflight.check_recipe(config, open_backend(config))
        assert ("subtracts the state from actions that are relative already" in caplog.text) is is_told


# --- training.data_loader ----------------------------------------------------------------------------------------


def states(loader):
    return [np.asarray(observation.state) for observation, _ in loader]


def test_batches_come_as_observations_and_actions_and_begin_anew_unless_shuffled():
    loader = _data_loader.create_data_loader(tiny_recipe.tiny, num_batches=2)
    for observation, actions in loader:
        assert isinstance(actions, jax.Array) and actions.shape == (4, 3, 4) and actions.dtype == jnp.float32
        assert isinstance(observation.images["base_0_rgb"], jax.Array)
    assert loader.data_config().repo_id == "fake"
    np.testing.assert_array_equal(states(loader), states(loader))
    shuffled = _data_loader.create_data_loader(tiny_recipe.tiny, num_batches=2, shuffle=True)
    assert not np.array_equal(states(shuffled), states(shuffled))
    assert "[1]: (4, 3, 4)@float32" in training_utils.array_tree_to_info(next(iter(loader))).splitlines()


def test_batches_lie_where_they_are_asked_to():
    device = jax.devices()[-1]
    place = jax.sharding.SingleDeviceSharding(device)
    observation, _ = next(iter(_data_loader.create_data_loader(tiny_recipe.tiny, sharding=place)))
    assert observation.state.sharding == place
    with pytest.raises(ValueError, match="sharding places arrays of JAX"):
        _data_loader.create_data_loader(tiny_recipe.tiny, sharding=place, framework="pytorch")
    with pytest.raises(ValueError, match="framework='tf'"):
        _data_loader.create_data_loader(tiny_recipe.tiny, framework="tf")


def test_a_dataset_of_ones_own_is_loaded_in_a_sampler_s_order():
    class Own(_data_loader.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, index):
            return {"x": np.float64(index), "name": f"sample {index}"}

    def without_texts(sample):
        return {"x": sample["x"]}

    dataset = _data_loader.TransformedDataset(Own(), [without_texts])
    loader = _data_loader.TorchDataLoader(dataset, local_batch_size=3, sampler=[9, 8, 7, 6, 5, 4, 3], num_batches=3)
    batches = [batch["x"] for batch in loader]
    assert [x.tolist() for x in batches] == [[9, 8, 7], [6, 5, 4], [9, 8, 7]] and batches[0].dtype == jnp.float32
    with pytest.raises(ValueError, match="'name' of a batch holds <U8, which is no number"):
        next(iter(_data_loader.TorchDataLoader(Own(), 2)))


def test_iterable_datasets_are_transformed_sample_by_sample_or_batch_by_batch():
    batches = [{"x": np.arange(2), "of": {"y": np.zeros((2, 3))}}]
    rows = _data_loader.IterableTransformedDataset(
        batches, [lambda s: {"x": s["x"] + s["of"]["y"][0]}], is_batched=True
    )
    assert [batch["x"].tolist() for batch in rows] == [[0, 1]] and len(rows) == 1
    loader = _data_loader.RLDSDataLoader(rows, num_batches=1)
    assert [type(batch["x"]) for batch in loader] == [type(jnp.zeros(2))]


# --- commands and files ----------------------------------------------------------------------------------------


def test_statistics_of_a_recipe_that_reads_some_from_a_bucket_are_written_to_its_own_assets(
    arm_dataset, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["compute_norm_stats.py"])
    arguments = ["--config-name", f"{tiny_recipe.__file__}:arm", "--max-frames", "20", f"--data.repo-id={arm_dataset}"]
    bucket = "--data.assets.assets-dir=gs://openpi-assets/checkpoints/pi0_base/assets"
    place = [f"--assets-base-dir={tmp_path}", "--data.assets.asset-id=trossen"]
    assert stats.main([*arguments, bucket, *place]) == 0
    written = tmp_path / "arm" / "trossen" / "norm_stats.json"
    text = capsys.readouterr().out
    assert written.is_file() and f"20 frames; written to {written}" in text
    assert f"--data.assets.assets-dir={tmp_path / 'arm'}" in text


def test_a_recipe_file_that_needs_what_is_not_installed_says_how_to_get_it(tmp_path):
    for name in ("needs_a_library.py", "no_such_library_yet.py"):  # of which the other's name is a part
        (tmp_path / name).write_text("import no_such_library.nnx as nnx")
        with pytest.raises(ValueError, match=r"line 1: .*Put 'no_such_library' beside the file, or install it"):
            _config.get_config(f"{tmp_path / name}:recipe")
    with pytest.raises(ModuleNotFoundError, match=r"no_such_library.*neither installed.*path/to/file.py:NAME"):
        _config.get_config("no_such_library.recipes:recipe")
