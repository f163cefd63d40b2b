"""Fine-tuning with adapters: what changes, what is saved, and checkpoints without the frozen weights."""

import dataclasses
import gc
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_recipe
import weight_layouts
from openpi.cli.checkpoints import export
from openpi.models.gemma_config import LoRAConfig
from openpi.models.model import restore_params
from openpi.policies.policy_config import create_trained_policy
from openpi.shared.tree import flatten
from openpi.training import loop
from openpi.training.backend import open_backend
from openpi.training.config import TrainConfig
from openpi.training.recipe_io import load_recipe
from openpi.training.run import preflight
from openpi.training.weight_loaders import CheckpointWeightLoader, NoOpWeightLoader
from openpi.weights import on_device, opening, orbax_io
from openpi.weights.adapter_base import ADAPTERS_FILE

OBSERVATION = {"camera": np.zeros((32, 32, 3), np.uint8), "joints": np.zeros(3, np.float32), "prompt": "put it down"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Weights to start from, of the same model without adapters."""
    folder = tmp_path_factory.mktemp("base") / "params"
    orbax_io.write_params(folder, tiny_recipe.MODEL.create(jax.random.key(7)).params)
    return folder


@pytest.fixture(scope="module")
def recipe(base, arm_dataset, tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("runs")
    return dataclasses.replace(
        tiny_recipe.lora,
        weight_loader=CheckpointWeightLoader(str(base)),
        data=dataclasses.replace(tiny_recipe.lora.data, repo_id=str(arm_dataset)),
        assets_base_dir=str(folder / "assets"),
        checkpoint_base_dir=str(folder / "checkpoints"),
        save_interval=2,
        keep_period=2,
    )


def run(recipe: TrainConfig, name: str, **changes) -> Path:
    return loop.train(dataclasses.replace(recipe, exp_name=name, **changes)).checkpoint


@pytest.fixture(scope="module")
def whole(recipe) -> Path:
    """A checkpoint as published ones are: with everything."""
    return run(recipe, "whole")


@pytest.fixture(scope="module")
def light(recipe) -> Path:
    """The same training, interrupted once, with checkpoints that leave the frozen weights out."""
    run(recipe, "light", save_frozen_params=False, num_train_steps=3)
    return run(recipe, "light", save_frozen_params=False, resume=True)


def params_of(checkpoint: Path) -> dict[str, np.ndarray]:
    return flatten(restore_params(checkpoint / "params"))


def assert_equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], err_msg=path)


def test_only_what_is_not_frozen_changes(recipe, whole, base):
    start, end = flatten(restore_params(base, dtype="bfloat16")), params_of(whole)
    frozen = {path for path in end if recipe.freeze_filter(path)}
    assert any("llm" in path for path in frozen) and not any("lora" in path for path in frozen)
    for path, leaf in end.items():
        if "lora" in path:
            assert leaf.dtype == np.float32
        else:
            assert (leaf.astype(start[path].dtype) == start[path]).all() == (path in frozen), path


def test_a_checkpoint_without_frozen_weights_is_the_same_after_an_interruption_and_smaller(recipe, whole, light):
    stored = {path.removeprefix("params/") for path in orbax_io.leaf_metadata(light / "params")}
    assert stored == {path for path in params_of(whole) if not recipe.freeze_filter(path)}
    assert opening.stored_shapes(light / "params").keys() == params_of(whole).keys()
    assert_equal(params_of(light), params_of(whole))


def test_averaging_leaves_frozen_weights_alone(recipe, base):
    averaged = run(recipe, "averaged", ema_decay=0.9, save_frozen_params=False, num_train_steps=3)
    start, end = flatten(restore_params(base, dtype="bfloat16")), params_of(averaged)
    for path, leaf in end.items():
        if recipe.freeze_filter(path):
            np.testing.assert_array_equal(leaf.astype(start[path].dtype), start[path], err_msg=path)


def test_adapters_on_adapters_continue(recipe, light):
    """A second fine-tune that freezes what the first has trained: its base has a base of its own."""
    start = CheckpointWeightLoader(str(light / "params"))
    changes = {
        "weight_loader": start,
        "freeze_filter": tiny_recipe.everything_but_adapters,
        "save_frozen_params": False,
    }
    run(recipe, "second", **changes, num_train_steps=3)
    second = run(recipe, "second", **changes, resume=True)
    first, end = params_of(light), params_of(second)
    for path, leaf in end.items():
        if "lora" not in path:
            np.testing.assert_array_equal(leaf, first[path].astype(jnp.bfloat16), err_msg=path)
    # Of the action expert: nobody reads what the only layer makes of the prefix.
    assert all((end[path] != first[path]).any() for path in end if "_1" in path and "lora" in path)


def test_adapters_of_another_scale_are_not_gone_on_from(recipe, whole):
    """The same rank with four times the alpha is four times the adapter: another policy, without a word."""
    adapted = dataclasses.replace(tiny_recipe._ADAPTED, attn_lora=LoRAConfig(rank=2, alpha=8.0))
    model = dataclasses.replace(recipe.model, paligemma_variant=adapted, action_expert_variant=adapted)
    start = {"weight_loader": CheckpointWeightLoader(str(whole / "params")), "num_train_steps": 1}
    with pytest.raises(ValueError, match=r"attn_lora.alpha is 8.*were trained with 2"):
        run(recipe, "other_scale", model=model, **start)
    run(recipe, "same_scale", **start)


def test_a_run_goes_on_with_the_base_that_it_began_with(recipe, light, whole, base, tmp_path):
    run_folder = Path(recipe.checkpoint_base_dir) / "lora" / "other_loader"
    shutil.copytree(light.with_name("2"), run_folder / "2")
    orbax_io.write_params(tmp_path / "other", tiny_recipe.MODEL.create(jax.random.key(8)).params)
    other = CheckpointWeightLoader(str(tmp_path / "other"))
    end = run(recipe, "other_loader", save_frozen_params=False, resume=True, weight_loader=other)
    assert json.loads((end / ADAPTERS_FILE).read_text())["base"] == str(base)
    assert_equal(params_of(end), params_of(whole))

    shutil.copytree(whole.with_name("2"), run_folder.with_name("was_whole") / "2")
    with pytest.raises(ValueError, match="are others than before"):
        run(recipe, "was_whole", save_frozen_params=False, resume=True, weight_loader=other)


def test_a_base_in_another_layout_trains_and_continues_alike(recipe, base, whole, tmp_path):
    place = weight_layouts.write(base, tiny_recipe.MODEL, tmp_path / "lerobot", "lerobot")
    changes = {"weight_loader": CheckpointWeightLoader(place), "save_frozen_params": False}
    run(recipe, "lerobot", **changes, num_train_steps=3)
    end = run(recipe, "lerobot", **changes, resume=True)
    assert json.loads((end / ADAPTERS_FILE).read_text())["base"] == place
    assert_equal(params_of(end), params_of(whole))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("pytorch", "float32"), ("lerobot", "float32"), ("jax", "bfloat16"), ("pytorch", "bfloat16")],
)
def test_adapters_go_with_the_same_base_in_another_layout_or_rounded_as_training_does(
    kind, dtype, base, light, tmp_path
):
    place = weight_layouts.write(base, tiny_recipe.MODEL, tmp_path / "base", kind, np.dtype(dtype))
    assert_equal(params_of(moved(light, tmp_path / "light", place)), params_of(light))


def test_a_base_that_was_rounded_to_less_is_another(base, light, tmp_path):
    place = weight_layouts.write(base, tiny_recipe.MODEL, tmp_path / "half", "pytorch", np.float16)
    with pytest.raises(ValueError, match=r"half are others than before: PaliGemma/llm/.* differs.*such as float16"):
        params_of(moved(light, tmp_path / "light", place))


def test_both_are_served_alike(whole, light):
    noise = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    chunks = []
    for checkpoint in (whole, light):
        policy = create_trained_policy(load_recipe(checkpoint), checkpoint, sample_kwargs={"num_steps": 2})
        chunks.append(policy.infer(OBSERVATION, noise=noise)["actions"])
    np.testing.assert_array_equal(*chunks)


def test_each_form_is_made_from_the_other(whole, light, tmp_path):
    assert export.main([str(whole), "--adapters", f"--output={tmp_path / 'light'}"]) == 0
    assert (tmp_path / "light" / ADAPTERS_FILE).read_text() == (light / ADAPTERS_FILE).read_text()
    assert_equal(params_of(tmp_path / "light"), params_of(whole))
    assert export.main([str(light), "--full", f"--output={tmp_path / 'whole'}"]) == 0
    assert not (tmp_path / "whole" / ADAPTERS_FILE).exists()
    assert_equal(params_of(tmp_path / "whole"), params_of(whole))
    assert export.main([str(light), "--merge", f"--output={tmp_path / 'merged'}"]) == 0
    assert not any("lora" in path for path in params_of(tmp_path / "merged"))


def moved(light: Path, folder: Path, base: Path | str) -> Path:
    """The checkpoint with another base named in it."""
    shutil.copytree(light, folder)
    document = json.loads((folder / ADAPTERS_FILE).read_text())
    (folder / ADAPTERS_FILE).write_text(json.dumps({**document, "base": str(base)}))
    return folder


def test_another_base_or_none_is_refused(recipe, light, tmp_path, capsys):
    orbax_io.write_params(tmp_path / "other", tiny_recipe.MODEL.create(jax.random.key(8)).params)
    other = moved(light, tmp_path / "light", tmp_path / "other")
    with pytest.raises(ValueError, match=r"the weights in .*other are others than before.*Correct 'base'"):
        restore_params(other / "params")
    gone = moved(light, tmp_path / "gone", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"adapters only, and its base is not there: .*nowhere.*export --full"):
        restore_params(gone / "params")
    itself = moved(light, tmp_path / "itself", tmp_path / "itself")
    with pytest.raises(ValueError, match=r"itself holds adapters whose base is, in the end, that folder itself"):
        restore_params(itself / "params")
    document = json.loads((gone / ADAPTERS_FILE).read_text())
    for text, why in (
        ("{}", "'version'"),
        (json.dumps({**document, "base": 3}), "expected a place as 'base', and shapes"),
    ):
        (gone / ADAPTERS_FILE).write_text(text)
        with pytest.raises(ValueError, match=rf"adapters\.json is damaged or of another version: {why}"):
            restore_params(gone / "params")

    run_folder = Path(recipe.checkpoint_base_dir) / "lora" / "other_base"
    shutil.copytree(other, run_folder / "2")
    with pytest.raises(ValueError, match=r"the weights in .*other are others than before"):
        run(recipe, "other_base", save_frozen_params=False, resume=True)
    assert export.main([str(light), "--adapters", f"--base={tmp_path / 'other'}", f"--output={tmp_path / 'x'}"]) == 1
    assert "are others than before" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_loader": NoOpWeightLoader()}, r"needs frozen weights that lie in a checkpoint; .* NoOpWeightLoader"),
        ({"freeze_filter": tiny_recipe.arm.freeze_filter}, r"freeze_filter freezes nothing"),
        ({"freeze_filter": tiny_recipe.everything_but_the_head}, r"are not in .* and start at random, such as .*lora"),
    ],
)
def test_frozen_weights_that_could_not_be_read_again_are_not_left_out(recipe, changes, message):
    config = dataclasses.replace(recipe, exp_name="x", save_frozen_params=False, **changes)
    with pytest.raises(ValueError, match=message):
        preflight.check_recipe(config, open_backend(config))
        preflight.open_weights(config, open_backend(config))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint_before(recipe, whole):
    run_folder = Path(recipe.checkpoint_base_dir) / "lora" / "too_fast"
    shutil.copytree(whole.with_name("2"), run_folder / "2")
    fast = dataclasses.replace(tiny_recipe.lora.lr_schedule, peak_lr=1e38, decay_lr=1e38)
    with pytest.raises(
        RuntimeError, match=r"the \w+ of step \d+ is (nan|inf); the checkpoint of step 2 is from before"
    ):
        run(recipe, "too_fast", resume=True, lr_schedule=fast, num_train_steps=8)
    assert [entry.name for entry in run_folder.iterdir() if entry.name.isdigit()] == ["2"]


def test_adapters_over_one_base_share_it_in_memory_and_it_goes_with_the_last_of_them(base, light, tmp_path):
    place = weight_layouts.write(base, tiny_recipe.MODEL, tmp_path / "base", "pytorch")
    folders = [moved(light, tmp_path / name, place) for name in ("one", "other")]
    policies = [create_trained_policy(load_recipe(folder), folder) for folder in folders]
    first, second = (flatten(policy._sampler._model.params) for policy in policies)
    frozen = json.loads((light / ADAPTERS_FILE).read_text())["frozen"]
    assert frozen and all(first[path] is second[path] for path in frozen)
    assert [path for path in first if path not in frozen and first[path] is second[path]] == []
    noise = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_array_equal(*(policy.infer(OBSERVATION, noise=noise)["actions"] for policy in policies))
    del policies, first, second
    gc.collect()
    assert not list(on_device._shared)
