"""Every registered recipe: its model at full size, as shapes, and its pipeline on its robot's data and observations."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import rlds_datasets
from openpi.models.model_config import ModelType
from openpi.models.tokenizer import FASTTokenizer
from openpi.policies import policy_config
from openpi.policies.aloha_policy import make_aloha_example
from openpi.policies.calvin_policy import make_calvin_example
from openpi.policies.droid_policy import make_droid_example
from openpi.policies.libero_policy import make_libero_example
from openpi.policies.robot_spec import find_spec
from openpi.policies.tabletop_policy import make_tabletop_example
from openpi.policies.ur5_policy import make_ur5_example
from openpi.shared.normalize import NormStats
from openpi.shared.tree import flatten
from openpi.training import data_loader
from openpi.training.config import TrainConfig, config_names, get_config
from openpi.training.data import norm_stats, recipe_data
from openpi_positronic.policy import make_positronic_example
from paths import GOLDEN
from robot_datasets import FORMATS, TASKS, write_dataset

RLDS = [name for name in config_names() if hasattr(get_config(name).data, "rlds_data_dir")]
ON_LEROBOT = [n for n in config_names() if n not in RLDS and get_config(n).data.repo_id not in (None, "fake")]
ON_FAKE = [name for name in config_names() if get_config(name).data.repo_id == "fake"]

EXAMPLES = {
    "aloha": make_aloha_example,
    "calvin": make_calvin_example,
    "droid": make_droid_example,
    "libero": make_libero_example,
    "positronic": make_positronic_example,
    "tabletop": make_tabletop_example,
    "ur5": make_ur5_example,
}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, Path]:
    """By the repo id that the recipes name."""
    home = tmp_path_factory.mktemp("datasets")
    return {name: write_dataset(home / name.replace("/", "_"), robot) for name, robot in FORMATS.items()}


@pytest.fixture(scope="module")
def rlds_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rlds")


def with_local_files(config: TrainConfig, **data_changes) -> TrainConfig:
    """The recipe with the tokenizers of the recordings and no statistics from far away; nothing else is changed."""
    changes = {"tokenizer_path": str(GOLDEN / "tokenizers" / "tiny_paligemma_tokenizer.model")}
    if config.model.model_type is ModelType.PI0_FAST and config.model.fast_model_tokenizer in (None, FASTTokenizer):
        changes |= {
            "action_tokenizer_path": str(GOLDEN / "tokenizers" / "fast"),
            "fast_model_tokenizer_kwargs": None,
        }
    assets = dataclasses.replace(config.data.assets, assets_dir=None)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **changes),
        data=dataclasses.replace(config.data, assets=assets, **data_changes),
    )


def shapes_of_inputs(config: TrainConfig, batch_size: int) -> dict[str, tuple]:
    """What the model takes; pi0-FAST takes any cameras, the state as text, and writes actions of its own width."""
    observation, actions = config.model.inputs_spec(batch_size=batch_size)
    shapes = {key: tuple(leaf.shape) for key, leaf in flatten({**observation.to_dict(), "actions": actions}).items()}
    if config.model.model_type is ModelType.PI0_FAST:
        return {key: shape for key, shape in shapes.items() if "image" not in key and key != "state"}
    return shapes


def assert_fits(config: TrainConfig, made: dict, *, without: tuple[str, ...] = ()) -> None:
    """Every input of the model is there, in its shape; `made` is one sample, or a batch of two."""
    batch = {key: np.asarray(value) for key, value in flatten(made).items()}
    expected = {key: s for key, s in shapes_of_inputs(config, len(batch["state"])).items() if key not in without}
    assert {key: batch[key].shape if key in batch else None for key in expected} == expected
    images = [value for key, value in batch.items() if key.startswith("image/")]
    assert {image.shape[-3:] for image in images} == {(*config.model.image_resolution, 3)}


@pytest.mark.parametrize("name", config_names())
def test_the_model_builds_in_its_full_size_and_something_in_it_trains(name):
    config = get_config(name)
    paths = flatten(config.model.abstract_params())
    frozen = [path for path in paths if config.freeze_filter(path)]
    assert len(frozen) < len(paths)
    assert bool(frozen) == (config.freeze_filter is not get_config("pi0_libero").freeze_filter)
    assert not [path for path in frozen if "lora" in path]


@pytest.mark.parametrize("name", ON_LEROBOT)
def test_a_dataset_of_the_robot_becomes_batches_for_the_model(name, datasets, tmp_path):
    published = get_config(name)
    folder = str(datasets[published.data.repo_id])
    config = dataclasses.replace(
        with_local_files(published, repo_id=folder), batch_size=2, num_workers=0, assets_base_dir=str(tmp_path)
    )
    stats = norm_stats.compute(config).stats
    widths = FORMATS[published.data.repo_id].vectors
    assert stats["actions"].width == widths.get("action", widths.get("actions"))
    loader = data_loader.create_batch_loader(config, split="all", num_batches=1)
    batch = next(iter(loader))
    assert_fits(config, batch)
    assert np.isfinite(batch["actions"]).all()
    # The cameras were really read: random images are grey on average, a camera that is not there is black.
    masks, images = batch["image_mask"], batch["image"]
    seen = [slot for slot in images if masks[slot].all()]
    assert seen
    assert all(images[slot].mean() > 40 for slot in seen if images[slot].any())


@pytest.mark.parametrize("name", ON_LEROBOT)
def test_the_prompt_is_the_task_or_the_fixed_one_of_the_recipe(name, datasets):
    config = with_local_files(get_config(name), repo_id=str(datasets[get_config(name).data.repo_id]))
    data = config.data.create(config.assets_dirs, config.model)
    dataset = recipe_data.create_dataset(data, config.model)
    chain = data_loader.input_transforms(data, dataset, skip_norm_stats=True)
    sample = dataset[0]
    for step in chain:
        if hasattr(step, "tokenizer"):
            break
        sample = step(sample)
    assert str(sample["prompt"]) == (TASKS[0] if data.prompt_from_task else config.data.default_prompt)


@pytest.mark.parametrize("name", ON_FAKE)
def test_random_samples_have_the_shapes_of_the_model(name):
    config = get_config(name)
    loader = data_loader.create_batch_loader(config, num_batches=1, num_workers=0)
    assert_fits(config, next(iter(loader)))


@pytest.mark.parametrize("name", RLDS)
def test_droid_in_rlds_form_becomes_batches_for_the_model(name, rlds_folder, tmp_path):
    published = get_config(name)
    local = with_local_files(published)
    config = dataclasses.replace(
        local, data=rlds_datasets.of_recipe(local.data, rlds_folder), batch_size=2, assets_base_dir=str(tmp_path)
    )
    computed = norm_stats.compute(config)
    datasets = len(config.data.datasets)
    assert computed.num_frames == 3 * 10 * datasets  # three successes, the first two frames of each left out
    assert computed.stats["actions"].width == 8
    loader = data_loader.create_batch_loader(config, num_batches=2)
    for batch in loader:
        assert_fits(config, batch)
        assert np.isfinite(batch["actions"]).all()
        assert (np.abs(batch["state"][..., :8]) < 3).all()
    cameras = {slot: image.mean() for slot, image in batch["image"].items() if image.any()}
    assert len(cameras) == 2
    assert all(mean > 20 for mean in cameras.values())


@pytest.mark.parametrize("name", [n for n in config_names() if n not in ON_FAKE])
def test_an_observation_of_the_robot_becomes_model_inputs_and_its_chunk_comes_back_in_the_robots_width(name):
    config = with_local_files(get_config(name))
    data = config.data.create(config.assets_dirs, config.model)
    spec = find_spec(data.data_transforms.inputs)
    observation = EXAMPLES[spec.robot]()
    widths = {"state": sum(vector.width for vector in spec.state), "actions": spec.actions.width}
    stats = {key: NormStats(np.zeros(w), np.ones(w), -np.ones(w), np.ones(w)) for key, w in widths.items()}
    pipeline = policy_config.make_pipeline(dataclasses.replace(data, norm_stats=stats))
    inputs = observation
    for step in pipeline.inputs:
        inputs = step(inputs)
    assert_fits(config, {key: _with_batch_axis(value) for key, value in inputs.items()}, without=("actions",))

    horizon, dim = config.model.action_horizon, config.model.action_dim
    outputs = {"state": inputs["state"], "actions": np.zeros((horizon, dim))}
    for step in pipeline.outputs:
        if not hasattr(step, "tokenizer"):  # what tokens become is tested with the tokenizers
            outputs = step(outputs)
    assert outputs["actions"].shape == (horizon, spec.actions.width)


def test_a_recipe_of_the_first_release_may_forbid_to_ask_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    published = get_config("pi0_libero")
    offline = dataclasses.replace(published.data.base_config, local_files_only=True)
    config = with_local_files(published, repo_id="me/mine", base_config=offline)
    data = config.data.create(config.assets_dirs, config.model)
    with pytest.raises(FileNotFoundError, match=r"'me/mine' is not in .* the recipe says local_files_only"):
        recipe_data.open_metadata(data)
    write_dataset(tmp_path / "me" / "mine", FORMATS["physical-intelligence/libero"])
    assert recipe_data.open_metadata(data).fps == 10


def test_every_recipe_says_what_it_is_for():
    notes = {name: get_config(name).note for name in config_names()}
    assert [name for name, note in notes.items() if not note.endswith(".")] == []
    assert len(set(notes.values())) == len(notes)


def _with_batch_axis(value):
    if isinstance(value, dict):
        return {key: _with_batch_axis(leaf) for key, leaf in value.items()}
    return np.asarray(value)[None]
