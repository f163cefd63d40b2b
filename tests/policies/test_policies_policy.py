"""A policy from a recorded checkpoint, end to end, and its recorder."""

import dataclasses
import errno
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden_kits import SMALL, small_model, write_small
from openpi import transforms
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.models.gemma_config import GemmaConfig
from openpi.models.model import Observation, restore_params
from openpi.models.pi0_config import Pi0Config
from openpi.models.rtc_config import RtcConfig
from openpi.models.siglip_config import SiglipConfig
from openpi.policies import policy_config, sampler_jax
from openpi.policies.contract import Contract
from openpi.policies.droid_policy import DroidInputs, DroidOutputs, make_droid_example
from openpi.policies.guards import InputsGuard, ObservationError
from openpi.policies.policy import ActionsError, Policy, PolicyRecorder
from openpi.policies.policy_config import create_trained_policy, load_pipeline
from openpi.policies.sampler_jax import JaxSampler
from openpi.shared import download, normalize
from openpi.training.config import AssetsConfig, SimpleDataConfig, TrainConfig, get_config

F32 = 1e-4


def droid_transforms(model_config):
    return transforms.Group(inputs=(DroidInputs(model_config.model_type),), outputs=(DroidOutputs(),))


@pytest.fixture(scope="module")
def checkpoint(golden: Path, tmp_path_factory) -> Path:
    return write_small(golden / "pi05" / "checkpoint", tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def recipe(recorded: TrainConfig) -> TrainConfig:
    """The recipe that fits it."""
    return dataclasses.replace(recorded, model=small_model(recorded.model))


@pytest.fixture(scope="module")
def recorded(golden: Path) -> TrainConfig:
    """The recipe that fits the recorded pi0.5 checkpoint."""
    meta = json.loads((golden / "pi05" / "meta.json").read_text())
    model = Pi0Config(
        pi05=True,
        dtype="float32",
        action_dim=meta["config"]["action_dim"],
        action_horizon=meta["config"]["action_horizon"],
        max_token_len=meta["config"]["max_token_len"],
        image_encoder_variant=SiglipConfig(**meta["siglip"]),
        paligemma_variant=GemmaConfig(**meta["paligemma"]),
        action_expert_variant=GemmaConfig(**meta["action_expert"]),
        tokenizer_path=str(golden / "tokenizers" / "tiny_paligemma_tokenizer.model"),
    )
    data = SimpleDataConfig(assets=AssetsConfig(asset_id="golden"), data_transforms=droid_transforms)
    return TrainConfig(name="golden_droid", model=model, data=data, policy_metadata={"reset_pose": [0.0]})


@pytest.fixture(scope="module")
def policy(recipe: TrainConfig, checkpoint: Path) -> Policy:
    return create_trained_policy(recipe, checkpoint, sample_kwargs={"num_steps": 1})


def noise() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(10, 8)).astype(np.float32)


def test_a_checkpoint_answers_with_the_chunk_that_its_parts_compute_one_by_one(recorded, golden):
    policy = create_trained_policy(recorded, golden / "pi05" / "checkpoint", sample_kwargs={"num_steps": 1})
    observation = make_droid_example()
    result = policy.infer(observation, noise=noise())

    data_config = recorded.data.create(recorded.assets_dirs, recorded.model)
    stats = normalize.load(golden / "pi05" / "checkpoint" / "assets" / "golden")
    inputs = DroidInputs(recorded.model.model_type)(observation)
    low, high = stats["state"].q01, stats["state"].q99
    inputs["state"] = (inputs["state"] - low) / (high - low + 1e-6) * 2 - 1
    inputs = transforms.compose(data_config.model_transforms.inputs)(inputs)
    batch = {
        key: {k: np.asarray(v)[None] for k, v in value.items()} if isinstance(value, dict) else value[None]
        for key, value in inputs.items()
    }
    model = recorded.model.load(restore_params(golden / "pi05" / "checkpoint" / "params"))
    actions = JaxSampler(model).sample(batch, noise()[None], num_steps=1)[0]
    low, high = stats["actions"].q01, stats["actions"].q99
    np.testing.assert_allclose(result["actions"], (actions + 1) / 2 * (high - low + 1e-6) + low, atol=F32, rtol=F32)


def test_a_result_holds_actions_and_timing_and_nothing_else(policy):
    result = policy.infer(make_droid_example())
    assert set(result) == {"actions", "policy_timing"}
    assert result["actions"].shape == (10, 8)
    assert set(result["policy_timing"]) == {"infer_ms"}
    assert result["policy_timing"]["infer_ms"] > 0
    assert policy.metadata == {"reset_pose": [0.0]}


def test_equal_noise_gives_equal_actions_with_or_without_a_batch_axis_and_drawn_noise_differs(policy):
    observation = make_droid_example()
    flat = policy.infer(observation, noise=noise())["actions"]
    np.testing.assert_array_equal(flat, policy.infer(observation, noise=noise()[None])["actions"])
    assert not np.array_equal(policy.infer(observation)["actions"], policy.infer(observation)["actions"])


def test_actions_that_are_no_numbers_never_reach_a_robot(policy):
    broken = noise()
    broken[3, 2] = np.nan
    with pytest.raises(
        ActionsError, match=r"are not finite \(first at \[step, dimension\] \[\d, \d\]\).*earlier checkpoint"
    ):
        policy.infer(make_droid_example(), noise=broken)


@pytest.mark.parametrize("form", [lambda actions: {"actions": {"left": actions}}, lambda actions: {"arm": actions}])
def test_nor_do_those_of_other_names_or_in_a_map(form):
    nothing = np.full((1, 2, 3), np.nan, np.float32)
    sampler = SimpleNamespace(
        takes_noise=True, action_horizon=2, action_dim=3, sample=lambda batch, noise: nothing[: len(batch["state"])]
    )
    policy = Policy(sampler, output_transforms=[lambda data: form(data["actions"])])
    with pytest.raises(ActionsError, match=r"not finite \(first at \[step, dimension\] \[0, 0\]\)"):
        policy.infer({"state": np.zeros(3)})


def test_a_policy_of_ones_own_says_its_own_metadata():
    class Own(Policy):
        @property
        def metadata(self) -> dict:
            return {"own": True}

    assert Own(SimpleNamespace(takes_noise=True), metadata={"reset_pose": [0.0]}).metadata == {"own": True}


def test_inference_leaves_the_observation_alone(policy):
    observation = make_droid_example()
    before = {key: np.array(value) for key, value in observation.items()}
    for value in observation.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    policy.infer(observation)
    assert observation.keys() == before.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(observation[key], value)


def test_a_transform_that_edits_its_dict_does_not_reach_the_callers_observation(recipe, checkpoint):
    def impolite(data):
        data["observation"].pop("extra")
        return data

    policy = create_trained_policy(
        recipe,
        checkpoint,
        repack_transforms=transforms.Group(inputs=(impolite,)),
        sample_kwargs={"num_steps": 1},
    )
    observation = {**transforms.unflatten_dict(make_droid_example())}
    observation["observation"]["extra"] = 1
    policy.infer(observation)
    assert observation["observation"]["extra"] == 1


def test_noise_of_another_shape_is_refused(policy):
    with pytest.raises(ValueError, match=r"noise has shape \(5, 8\); expected \(10, 8\)"):
        policy.infer(make_droid_example(), noise=np.zeros((5, 8)))


def test_a_default_prompt_is_used_only_where_the_observation_has_none(recipe, checkpoint):
    policy = create_trained_policy(
        recipe,
        checkpoint,
        default_prompt="pick up the cup",
        sample_kwargs={"num_steps": 1},
    )
    example = make_droid_example()
    example.pop("prompt")
    by_default = policy.infer(example, noise=noise())["actions"]
    np.testing.assert_array_equal(
        by_default, policy.infer({**example, "prompt": "pick up the cup"}, noise=noise())["actions"]
    )
    np.testing.assert_array_equal(by_default, policy.infer({**example, "prompt": None}, noise=noise())["actions"])
    other = policy.infer({**example, "prompt": "open drawer"}, noise=noise())["actions"]
    assert not np.array_equal(by_default, other)


def test_without_any_prompt_the_error_says_what_to_do(policy):
    example = make_droid_example()
    example.pop("prompt")
    with pytest.raises(ValueError, match=r"Prompt is required.*--default-prompt"):
        policy.infer(example)


def test_repack_transforms_adapt_a_clients_keys_on_the_way_in_and_out(recipe, checkpoint, policy):
    example = make_droid_example()
    names = {key: key.rsplit("/", 1)[-1] for key in example}
    group = transforms.Group(
        inputs=(transforms.RepackTransform(names),),
        outputs=(transforms.RepackTransform({"command": "actions"}),),
    )
    repacked = create_trained_policy(recipe, checkpoint, repack_transforms=group, sample_kwargs={"num_steps": 1})
    result = repacked.infer({short: example[key] for key, short in names.items()}, noise=noise())
    np.testing.assert_array_equal(result["command"], policy.infer(example, noise=noise())["actions"])


def test_chunks_with_rows_left_out_do_not_go_on_from_others(recipe, checkpoint):
    """A robot's rows are every fifth of the model's: what it sends back is no part of a chunk."""
    group = transforms.Group(outputs=(transforms.SubsampleActions(5),))
    assert create_trained_policy(recipe, checkpoint, rtc=RtcConfig()).rtc_metadata
    assert create_trained_policy(recipe, checkpoint, repack_transforms=group, rtc=RtcConfig()).rtc_metadata is None
    with pytest.raises(ValueError, match="SubsampleActions"):
        create_trained_policy(recipe, checkpoint, repack_transforms=group, rtc=RtcConfig(mode="guided"))


def copy_of(checkpoint: Path, target: Path) -> Path:
    """A checkpoint folder of its own around the same parameters."""
    shutil.copytree(checkpoint / "assets", target / "assets")
    (target / "params").symlink_to(checkpoint / "params")
    return target


def test_statistics_come_from_the_checkpoint_and_can_be_given(recipe, checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "step")
    stats = normalize.load(folder / "assets" / "golden")
    shutil.rmtree(folder / "assets")
    with pytest.raises(FileNotFoundError, match=r"norm_stats\.json; a checkpoint is served with .* copy that folder"):
        create_trained_policy(recipe, folder)
    normalize.save(folder / "assets" / "foreign", stats)
    with pytest.raises(FileNotFoundError, match=r"beside it: those of 'foreign'\).* correct asset_id") as refused:
        create_trained_policy(recipe, folder)
    assert "openpi stats" not in str(refused.value)
    policy = create_trained_policy(recipe, folder, norm_stats=stats, sample_kwargs={"num_steps": 1})
    assert policy.infer(make_droid_example())["actions"].shape == (10, 8)


def test_a_recipe_without_asset_id_is_refused(recipe, checkpoint):
    nameless = dataclasses.replace(recipe, data=SimpleDataConfig(data_transforms=droid_transforms))
    with pytest.raises(ValueError, match=r"asset id"):
        create_trained_policy(nameless, checkpoint)


def test_a_damaged_pytorch_checkpoint_is_refused(recipe, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off"):
        create_trained_policy(recipe, tmp_path)


def test_a_model_whose_actions_nobody_can_decode_is_refused_before_its_weights_are_looked_for():
    with pytest.raises(ValueError, match="FSQTokenizer cannot decode actions"):
        create_trained_policy(get_config("paligemma_vq_droid"), "gs://no/such/bucket")


def test_a_folder_that_is_no_checkpoint_is_named_with_what_it_holds(recipe, tmp_path):
    (tmp_path / "29999").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has neither params/ nor model\.safetensors.*There is: 29999"):
        create_trained_policy(recipe, tmp_path)


def test_the_checkpoints_own_tokenizer_is_used(recipe, checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path / "step")
    shutil.copy(recipe.model.tokenizer_path, folder / "assets" / "tokenizer.model")
    elsewhere = dataclasses.replace(recipe.model, tokenizer_path="/not/on/this/machine")
    policy = create_trained_policy(dataclasses.replace(recipe, model=elsewhere), folder, sample_kwargs={"num_steps": 1})
    assert policy.infer(make_droid_example())["actions"].shape == (10, 8)


def test_a_tokenizer_that_is_not_there_is_missed_before_weights_are_read(recipe, checkpoint, monkeypatch):
    monkeypatch.setattr(policy_config, "_load_sampler", lambda *_: pytest.fail("read"))
    elsewhere = dataclasses.replace(recipe.model, tokenizer_path="/not/on/this/machine")
    with pytest.raises(FileNotFoundError, match=r"/not/on/this/machine does not exist"):
        create_trained_policy(dataclasses.replace(recipe, model=elsewhere), checkpoint)


def test_a_processor_widens_the_weights_of_one_layer_at_a_time():
    def layers(x, stacked):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stacked)[0]

    stacked = jax.ShapeDtypeStruct((64, 128, 128), jnp.bfloat16)
    program = jax.jit(layers, compiler_options=sampler_jax._compiler_options())
    needed = program.lower(jax.ShapeDtypeStruct((4, 128), jnp.bfloat16), stacked).compile().memory_analysis()
    assert needed.temp_size_in_bytes < stacked.size  # a wide copy of all layers has four times as many


@pytest.fixture
def with_contract(recipe, checkpoint, tmp_path) -> Path:
    folder = copy_of(checkpoint, tmp_path / "step")
    data_config = recipe.data.create(recipe.assets_dirs, recipe.model)
    stats = normalize.load(folder / "assets" / "golden")
    Contract.build(dataclasses.replace(data_config, norm_stats=stats), recipe.model, control_hz=15).save(folder)
    return folder


def test_an_observation_that_breaks_the_contract_is_refused_before_the_model_runs(recipe, with_contract, caplog):
    policy = create_trained_policy(recipe, with_contract, sample_kwargs={"num_steps": 1})
    assert policy.contract is not None
    assert policy.contract.control_hz == 15
    example = make_droid_example()
    assert policy.infer(example)["actions"].shape == (10, 8)
    example["observation/joint_position"] = np.full(7, np.nan)
    with pytest.raises(ValueError, match=r"'observation/joint_position' has NaN.*joint_1"):
        policy.infer(example)
    assert "differs from the one" not in caplog.text


def test_a_state_far_outside_the_training_data_is_logged_once(recipe, with_contract, caplog):
    policy = create_trained_policy(recipe, with_contract, sample_kwargs={"num_steps": 1})
    example = make_droid_example()
    example["observation/joint_position"] = np.array([0, 0, 900.0, 0, 0, 0, 0])
    for _ in range(2):
        policy.infer(example)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING and "joint_3" in r.message]
    assert len(warnings) == 1
    assert "900" in warnings[0]


def test_serving_with_another_recipe_says_where_it_differs(recipe, with_contract, caplog):
    other = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, use_quantile_norm=False))
    create_trained_policy(other, with_contract)
    assert "normalization: quantile -> zscore" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("state", np.zeros((1, 8)), r"shape \(1, 8\).* without a batch axis"),
        ("state", np.array([*np.zeros(7), np.nan]), "NaN or infinity in dimension 7"),
        ("prompt", ["go", "on"], "'prompt' is of type list; expected text"),
    ],
)
def test_without_a_contract_too_state_and_prompt_are_what_models_take(recipe, checkpoint, key, value, message):
    pipeline = load_pipeline(recipe, Checkpoint(checkpoint))
    start = pipeline.inputs.index(next(step for step in pipeline.inputs if isinstance(step, InputsGuard)))
    sample = {**transforms.compose(pipeline.inputs[:start])(make_droid_example()), key: value}
    with pytest.raises(ObservationError, match=message):
        transforms.compose(pipeline.inputs[start:])(sample)


def test_without_a_contract_a_state_that_lacks_a_joint_is_told_with_the_answer(recipe, checkpoint):
    def forgetful(data):
        return {**data, "state": data["state"][:7]}

    of_a_droid = recipe.data.data_transforms(recipe.model)
    data = dataclasses.replace(recipe.data, data_transforms=lambda model: of_a_droid.push(inputs=[forgetful]))
    policy = create_trained_policy(dataclasses.replace(recipe, data=data), checkpoint, sample_kwargs={"num_steps": 1})
    [warning] = policy.infer(make_droid_example())["warnings"]
    assert warning.startswith("[range] the state has 7 dimensions") and "statistics are of 8" in warning


def test_a_checkpoint_as_published_tells_what_its_recipe_promises_and_refuses_nothing_by_it(recipe, checkpoint):
    policy = create_trained_policy(recipe, checkpoint, sample_kwargs={"num_steps": 1}, default_prompt="fold")
    assert policy.contract is not None
    told = policy.contract.as_metadata()
    assert told["actions"]["width"] == 8 and told["default_prompt"] == "fold"
    example = make_droid_example()
    floats = {key: np.float32(value) / 255 if "image" in key else value for key, value in example.items()}
    assert "actions" in policy.infer({**floats, "observation/another_camera": np.zeros((4, 4, 3), np.uint8)})
    far = policy.infer({**example, "observation/joint_position": np.full(7, 1e3), "prompt": " "})["warnings"]
    assert far[0].startswith("[prompt] prompt: it has no words")
    assert far[1].startswith("[range] state 'joint_1': 1000 is far outside the training range")


@pytest.mark.parametrize("key", ["state", "actions"])
def test_a_checkpoint_as_published_with_statistics_of_a_smaller_robot_is_not_served(recipe, checkpoint, key):
    stats = normalize.load(checkpoint / "assets" / "golden")
    narrow = normalize.NormStats(*(values[:7] for values in (stats[key].mean, stats[key].std, np.zeros(8), np.ones(8))))
    with pytest.raises(ValueError, match=f"'{key}'.* have 7 dimensions; robot 'droid' of the recipe has 8: joint_1"):
        load_pipeline(recipe, Checkpoint(checkpoint), norm_stats={**stats, key: narrow})


def test_statistics_of_another_robot_are_refused_at_start(recipe, with_contract):
    wider = normalize.NormStats(*(np.arange(14.0) + i for i in range(4)))
    with pytest.raises(ValueError, match=r"'state' have 14 dimensions.*with 8: joint_1"):
        create_trained_policy(recipe, with_contract, norm_stats={"state": wider, "actions": wider})


def test_the_contract_is_checked_after_the_repack_transforms(recipe, with_contract):
    names = {key: key.rsplit("/", 1)[-1] for key in make_droid_example()}
    group = transforms.Group(inputs=(transforms.RepackTransform(names),))
    policy = create_trained_policy(recipe, with_contract, repack_transforms=group, sample_kwargs={"num_steps": 1})
    example = {short: make_droid_example()[key] for key, short in names.items()}
    assert policy.infer(example)["actions"].shape == (10, 8)
    with pytest.raises(ValueError, match="observation/joint_position"):
        policy.infer({**example, "joint_position": np.zeros(6)})


def test_the_recorder_writes_every_call_under_flat_keys_and_never_overwrites(policy, tmp_path):
    observation = make_droid_example()
    recorder = PolicyRecorder(policy, tmp_path / "records")
    results = [recorder.infer(observation), recorder.infer(observation)]
    for step, result in enumerate(results):
        record = np.load(tmp_path / "records" / f"step_{step}.npy", allow_pickle=True).item()
        np.testing.assert_array_equal(record["outputs/actions"], result["actions"])
        assert record["outputs/policy_timing/infer_ms"] == result["policy_timing"]["infer_ms"]
        np.testing.assert_array_equal(
            record["inputs/observation/joint_position"], observation["observation/joint_position"]
        )
        assert record["inputs/prompt"] == "do something"
    PolicyRecorder(policy, tmp_path / "records").infer(observation)
    assert sorted(p.name for p in (tmp_path / "records").iterdir()) == [f"step_{i}.npy" for i in range(3)]
    assert recorder.metadata == policy.metadata
    # Another process records into the same folder.
    before = {path: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    second = PolicyRecorder(policy, tmp_path / "records")
    (tmp_path / "records" / ".step_4.npy.partial").touch()  # which it is writing
    for each in (recorder, second, recorder, second):
        each.infer(observation)
    after = {path: path.read_bytes() for path in (tmp_path / "records").glob("step_*.npy")}
    assert sorted(path.name for path in after) == [f"step_{i}.npy" for i in (0, 1, 2, 3, 5, 6, 7)]
    assert {path: after[path] for path in before} == before


def test_a_full_disk_of_records_does_not_stop_a_robot(policy, tmp_path, monkeypatch, caplog):
    def full(*_: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    recorder = PolicyRecorder(policy, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("openpi.policies.recorder.write_record", full)
        assert all("actions" in recorder.infer(make_droid_example()) for _ in range(3))
    assert caplog.text.count("Requests are not recorded any more: [Errno 28] No space left on device") == 1
    recorder.infer(make_droid_example())
    assert [path.name for path in tmp_path.iterdir()] == ["step_0.npy"]


def test_serving_never_reaches_for_statistics_outside_the_checkpoint(checkpoint, tmp_path, monkeypatch):
    """The recipe names a bucket; a robot's network may not reach it."""
    asked = []
    monkeypatch.setattr(download, "maybe_download", lambda url, **_: asked.append(str(url)) or Path(str(url)))
    arm = normalize.NormStats(*(np.arange(14.0) + i for i in range(4)))
    stats = {"state": arm, "actions": arm}
    normalize.save(tmp_path / "assets" / "trossen", stats)
    recipe = get_config("pi05_aloha_pen_uncap")
    assert recipe.data.assets.assets_dir.startswith("gs://")
    pipeline = load_pipeline(recipe, Checkpoint(tmp_path))
    np.testing.assert_array_equal(pipeline.data_config.norm_stats["state"].mean, stats["state"].mean)
    assert not [url for url in asked if "://" in url]


def test_a_batch_gives_each_observation_what_it_gets_alone(recipe, checkpoint):
    policy = create_trained_policy(recipe, checkpoint, sample_kwargs={"num_steps": 1})
    observations = [make_droid_example() for _ in range(3)]
    noises = np.random.default_rng(2).normal(size=(3, 10, 8)).astype(np.float32)
    one_by_one = policy.infer_batch(observations, noise=noises)  # nothing else is compiled yet
    assert policy.batch_sizes == (1,)
    policy.warm_up(make_droid_example(), batch_size=4)
    assert policy.batch_sizes == (1, 4)
    together = policy.infer_batch(observations, noise=noises)
    for single, batched, observation, noise_ in zip(one_by_one, together, observations, noises, strict=True):
        alone = policy.infer(observation, noise=noise_)["actions"]
        np.testing.assert_array_equal(single["actions"], alone)
        np.testing.assert_allclose(batched["actions"], alone, atol=F32, rtol=F32)


def test_after_warming_up_nothing_is_compiled(recipe, checkpoint, caplog):
    policy = create_trained_policy(recipe, checkpoint, sample_kwargs={"num_steps": 1})
    jax.clear_caches()
    policy.warm_up(make_droid_example())
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        policy.infer(make_droid_example())
    assert [record.message for record in caplog.records if "ompil" in record.message] == []


def test_an_observation_of_a_batch_that_does_not_fit_leaves_the_others_alone(policy):
    good = make_droid_example()
    bad = {key: value for key, value in good.items() if key != "observation/exterior_image_1_left"}
    first, failed, last = policy.infer_batch([good, bad, good])
    assert first["actions"].shape == last["actions"].shape == (10, 8)
    assert isinstance(failed, KeyError) and "observation/exterior_image_1_left" in str(failed)


def test_pictures_in_bytes_and_in_floats_are_seen_as_they_are_and_one_that_no_model_takes_fails_alone():
    class Brightness:
        """Answers with the mean of what a model would see."""

        takes_noise, action_horizon, action_dim = False, 1, 1

        def sample(self, inputs, noise, **kwargs):
            images = np.asarray(Observation.from_dict(inputs).images["base"], np.float32)
            return images.mean(axis=(1, 2, 3))[:, None, None]

    def observation(picture):
        return {"image": {"base": picture}, "image_mask": {"base": np.True_}, "state": np.zeros(1, np.float32)}

    policy = Policy(Brightness(), output_transforms=[lambda outputs: {"actions": outputs["actions"]}])
    white = np.full((4, 4, 3), 255, np.uint8)
    pictures = [white, np.full((4, 4, 3), 0.5, np.float32), np.full((4, 4, 3), "x"), white]
    first, second, failed, last = policy.infer_batch([observation(picture) for picture in pictures])
    assert [answer["actions"].item() for answer in (first, second, last)] == [1, 0.5, 1]
    assert isinstance(failed, Exception)


def test_the_view_of_an_observation_is_what_the_model_gets_before_normalisation(policy):
    observation = make_droid_example()
    seen = policy.view(observation)
    assert {image.shape for image in seen["image"].values()} == {(*SMALL, 3)}
    joints = [observation["observation/joint_position"], observation["observation/gripper_position"]]
    np.testing.assert_allclose(seen["state"], np.concatenate(joints))
