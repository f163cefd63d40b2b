"""Several datasets in one run: exact weights, an order that resumes, transforms and statistics of their own."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_recipe
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.data.batch_loader import SourceLoader
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.data.lerobot.writer import LeRobotWriter
from openpi.data.mixture_order import MixedIn, MixtureSource, shares
from openpi.policies import policy_config
from openpi.shared import normalize
from openpi.training import data_loader, loop
from openpi.training.config import MixtureDataConfig, MixturePart, TrainConfig
from openpi.training.data import norm_stats, recipe_data, training_data
from openpi.training.recipe import requirements
from openpi.training.recipe_io import load_recipe
from openpi.training.run import resume

WEIGHTS = (3.0, 1.0)
KEYS = ("front", "joints", "actions")


# --- the order ------------------------------------------------------------------------------------------------


def source(weights, sizes, batch_size=4, **options) -> MixtureSource:
    mixed = [
        MixedIn(f"set {i}", size, share) for i, (size, share) in enumerate(zip(sizes, shares(weights), strict=True))
    ]
    return MixtureSource(mixed, batch_size=batch_size, **{"seed": 0, "shuffle": True, **options})


def taken(order: MixtureSource, num_batches: int, state=None) -> list[list[int]]:
    return [list(items) for items, _ in itertools.islice(order.batches(state or order.start()), num_batches)]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.data())
@settings(max_examples=40, deadline=None)
def test_after_any_number_of_samples_each_dataset_has_given_its_share_to_within_one(weights, data):
    sizes = [data.draw(st.integers(1, 50)) for _ in weights]
    items = np.concatenate(taken(source(weights, sizes, batch_size=5), 60))
    owner = np.searchsorted(np.cumsum(sizes), items, side="right")
    counts = np.cumsum(owner[:, None] == np.arange(len(sizes)), axis=0)
    expected = np.arange(1, len(items) + 1)[:, None] * shares(weights)
    assert np.abs(counts - expected).max() < 1


def test_every_pass_over_a_dataset_has_each_sample_once_and_another_order():
    items = np.concatenate(taken(source((1, 1), (6, 10)), 30))
    small, large = items[items < 6], items[items >= 6]
    passes = small.reshape(-1, 6)
    assert all(sorted(each) == list(range(6)) for each in passes)
    assert len({tuple(each) for each in passes}) > 5
    assert sorted(large[:10]) == list(range(6, 16))
    in_order = np.concatenate(taken(source((1, 1), (6, 10), shuffle=False), 5))
    assert in_order[in_order < 6].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]


def test_the_order_goes_on_where_it_was_and_parts_make_up_the_batches_of_one_process():
    order = source((5, 2, 1), (7, 30, 4))
    whole = taken(order, 40)
    states = [state for _, state in itertools.islice(order.batches(order.start()), 17)]
    state = json.loads(json.dumps(states[-1]))  # as it lies on disk
    assert taken(source((5, 2, 1), (7, 30, 4)), 23, state) == whole[17:]
    parts = [taken(source((5, 2, 1), (7, 30, 4), part=(i, 2)), 40) for i in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole


def test_an_order_that_begins_anew_is_another():
    order = source((1, 1), (50, 50))
    again = order.start_after({"next_batch": 9, "taken": [18, 18], "order": 0})
    assert again["next_batch"] == 0 and again["taken"] == [0, 0]
    assert taken(order, 5, again) != taken(order, 5)
    assert order.describe(52) == "sample 2 of set 1"


def test_other_weights_are_another_order_for_who_resumes():
    loader = SourceLoader(source((1, 1), (6, 10)), lambda item: {"item": np.array(item)})
    state = json.loads(json.dumps(loader.state()))
    other = SourceLoader(source((2, 1), (6, 10)), lambda item: {"item": np.array(item)})
    assert list(other.changes_since(state)) == ["mixture"]
    assert not SourceLoader(source((1, 1), (6, 10)), lambda item: {"item": np.array(item)}).changes_since(state)


# --- recipes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second(arm_dataset, tmp_path_factory) -> Path:
    """Recordings of another kind of the same arm: other numbers, and a few frames only."""
    return write_second(arm_dataset, tmp_path_factory.mktemp("second") / "set")


def write_second(arm_dataset: Path, root: Path, *, fps: int = 10, times: int = 1) -> Path:
    first = LeRobotDataset(arm_dataset)
    features = {
        key: feature for key, feature in first.metadata.features.items() if key in ("front", "joints", "actions")
    }
    samples = [first[i] for i in range(12)]
    frames = {key: np.stack([sample[key] for sample in samples]) for key in features}
    frames |= {key: frames[key] * 3 + 1 for key in ("joints", "actions")}
    with LeRobotWriter(root, fps=fps, features=features) as writer:
        for _ in range(times):
            writer.add_episode(frames, "push")
            writer.add_episode({key: values[:8] for key, values in frames.items()}, "pull")
    return root


@pytest.fixture
def config(arm_dataset, second, tmp_path) -> TrainConfig:
    first = dataclasses.replace(tiny_recipe.arm.data, repo_id=str(arm_dataset))
    parts = tuple(map(MixturePart, (first, dataclasses.replace(first, repo_id=str(second))), WEIGHTS))
    return dataclasses.replace(
        tiny_recipe.arm,
        data=MixtureDataConfig(parts=parts),
        assets_base_dir=str(tmp_path / "assets"),
        checkpoint_base_dir=str(tmp_path / "runs"),
        exp_name="run",
        num_workers=0,
    )


def test_a_part_that_was_recorded_at_another_rate_is_told(config, arm_dataset, tmp_path, caplog):
    root = write_second(arm_dataset, tmp_path / "faster", fps=50)
    parts = config.data.parts
    faster = dataclasses.replace(parts[1], data=dataclasses.replace(parts[1].data, repo_id=str(root)))
    for mixture, is_told in (((parts[0], parts[1]), False), ((parts[0], faster), True)):
        caplog.clear()
        mixed = dataclasses.replace(config, data=MixtureDataConfig(parts=mixture))
        training_data.prepare(mixed, recipe_data.open_recipe(mixed), num_devices=1)
        assert ("at 50 Hz, and a checkpoint of the mixture serves at the 10 Hz" in caplog.text) == is_told


def test_what_a_grown_part_is_validated_on_and_was_trained_on_is_told(config, arm_dataset, tmp_path, caplog):
    parts = config.data.parts

    def opened(num_episodes: int) -> training_data.TrainingData:
        root = tmp_path / str(num_episodes)
        if not root.exists():
            write_second(arm_dataset, root, times=num_episodes // 2)
        grown = dataclasses.replace(parts[1], data=dataclasses.replace(parts[1].data, repo_id=str(root)))
        mixed = dataclasses.replace(
            config, data=MixtureDataConfig(parts=(parts[0], grown)), holdout_episodes=0.25, seed=0
        )
        return training_data.prepare(mixed, recipe_data.open_recipe(mixed), num_devices=1)

    before = json.loads(json.dumps(opened(20).held))
    assert [(total, len(held)) for total, held in before] == [(4, 1), (20, 5)]
    resume._compare_held(opened(20), before)
    assert "which the run has trained on" not in caplog.text
    resume._compare_held(opened(30), before)
    assert f"of {tmp_path / '30'}, held out are now also episodes [1]," in caplog.text
    caplog.clear()
    resume._compare_held(opened(20), [(4, []), (20, [])])  # the run trained on all of them
    assert caplog.text.count("which the run has trained on") == 2


def raw_actions(root: Path, horizon: int) -> np.ndarray:
    """[n, d]: all actions of all chunks, the last of an episode repeated."""
    dataset = LeRobotDataset(root)
    actions = dataset.column("actions")
    ends = np.repeat(dataset.episode_bounds[:, 1] - 1, np.diff(dataset.episode_bounds, axis=1)[:, 0])
    rows = np.minimum(np.arange(len(actions))[:, None] + np.arange(horizon), ends[:, None])
    return actions[rows].reshape(-1, actions.shape[-1])


def test_shared_statistics_count_the_datasets_by_weight_whatever_their_sizes(config, arm_dataset, second):
    computed = norm_stats.compute(config)
    parts = [raw_actions(root, config.model.action_horizon) for root in (arm_dataset, second)]
    means = [part.mean(axis=0) for part in parts]
    mean = sum(share * each for share, each in zip(shares(WEIGHTS), means, strict=True))
    square = sum(share * np.square(part).mean(axis=0) for share, part in zip(shares(WEIGHTS), parts, strict=True))
    np.testing.assert_allclose(computed.stats["actions"].mean, mean, rtol=0.01)
    np.testing.assert_allclose(computed.stats["actions"].std, np.sqrt(square - mean**2), rtol=0.01)
    data_config = recipe_data.expanded(config)
    assert data_config.asset_id.startswith("0.75_")
    assert all(member.norm_stats == data_config.norm_stats != {} for member in data_config.members)
    heavier = dataclasses.replace(config.data, parts=(MixturePart(config.data.parts[0].data, 9), config.data.parts[1]))
    other = recipe_data.expanded(dataclasses.replace(config, data=heavier))
    assert other.norm_stats is None, "statistics of other weights are not taken for these"


def test_own_statistics_are_those_of_each_dataset_alone(config):
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, statistics="own"))
    alone = []
    for data in own.data.with_own_statistics:
        alone.append(norm_stats.compute(dataclasses.replace(own, data=data)).stats)
    members = recipe_data.expanded(own).members
    assert len({member.asset_id for member in members}) == 2
    for member, stats in zip(members, alone, strict=True):
        np.testing.assert_array_equal(member.norm_stats["actions"].mean, stats["actions"].mean)


def test_batches_hold_the_samples_of_each_recipe_alone_in_the_shares_asked_for(config):
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, statistics="own"), batch_size=4)
    for data in config.data.members:
        norm_stats.compute(dataclasses.replace(config, data=data))
    loaders = [
        data_loader.create_batch_loader(dataclasses.replace(config, data=data, batch_size=1), shuffle=False)
        for data in config.data.members
    ]
    mixed = data_loader.create_batch_loader(config, shuffle=False, num_batches=3)
    streams = [iter(loader) for loader in loaders]
    for batch in mixed:
        rows = [0, 0]
        for row in range(4):
            # Which of the two it is follows from what it holds: all samples come in order.
            for number, stream in enumerate(streams):
                ahead = next(stream)
                if np.array_equal(batch["actions"][row], ahead["actions"][0]):
                    np.testing.assert_array_equal(batch["image"]["base_0_rgb"][row], ahead["image"]["base_0_rgb"][0])
                    rows[number] += 1
                    break
                streams[number] = itertools.chain([ahead], stream)
        assert rows == [3, 1]


def test_parts_without_a_place_kind_or_number_of_their_own_are_refused(config, arm_dataset):
    first = config.data.parts[0].data
    with pytest.raises(ValueError, match="exclude_episodes is set on a mixture"):
        dataclasses.replace(config.data, exclude_episodes=(1,))
    with pytest.raises(ValueError, match="expected at least one MixturePart"):
        MixtureDataConfig()
    with pytest.raises(ValueError, match="expected datasets in LeRobot form"):
        MixtureDataConfig(parts=(MixturePart(config.data),))
    with pytest.raises(ValueError, match="weight=0"):
        dataclasses.replace(config, data=MixtureDataConfig(parts=(MixturePart(first, 0.0),)))
    twice = MixtureDataConfig(parts=(MixturePart(first), MixturePart(first)), statistics="own")
    with pytest.raises(ValueError, match="one asset id for statistics of their own"):
        recipe_data.expanded(dataclasses.replace(config, data=twice))


def test_datasets_of_other_widths_share_no_statistics(config, second, tmp_path):
    features = {
        key: dict(f)
        for key, f in LeRobotDataset(second).metadata.features.items()
        if key in ("front", "joints", "actions")
    }
    features["actions"] |= {"shape": [2], "names": None}
    with LeRobotWriter(tmp_path / "narrow", fps=10, features=features) as writer:
        shape = LeRobotDataset(second)[0]["front"].shape
        frames = {"front": np.zeros((4, *shape), np.uint8), "joints": np.ones((4, 3), np.float32)}
        writer.add_episode(frames | {"actions": np.ones((4, 2), np.float32)}, "push")
    narrow = dataclasses.replace(config.data.parts[0].data, repo_id=str(tmp_path / "narrow"))
    mixture = MixtureDataConfig(parts=(config.data.parts[0], MixturePart(narrow)))
    with pytest.raises(ValueError, match=r"'actions' has 3 dimensions .* and 2 in another.*statistics='own'"):
        norm_stats.compute(dataclasses.replace(config, data=mixture))


def test_hub_datasets_of_all_parts_are_fetched(config):
    first = config.data.parts[0].data
    parts = tuple(MixturePart(dataclasses.replace(first, repo_id=name)) for name in ("my/towels", "my/cups"))
    urls = [
        each.url for each in requirements.requirements(dataclasses.replace(config, data=MixtureDataConfig(parts=parts)))
    ]
    assert {"hf://datasets/my/towels", "hf://datasets/my/cups"} <= set(urls)


def test_a_run_over_a_mixture_resumes_with_the_next_sample_and_keeps_all_statistics(config):
    first, other = config.data.parts
    parts = (first, dataclasses.replace(other, data=dataclasses.replace(other.data, validation_episodes=(1,))))
    data = dataclasses.replace(config.data, parts=parts, statistics="own")
    config = dataclasses.replace(config, data=data, num_train_steps=4, save_interval=2, keep_period=1, log_interval=1)
    loop.train(config)
    again = dataclasses.replace(config, exp_name="again", num_train_steps=2)
    loop.train(again)
    loop.train(dataclasses.replace(again, num_train_steps=4, resume=True))
    runs = [config.checkpoint_dir, again.checkpoint_dir]
    losses = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [row["loss"] for row in losses[0] if "loss" in row] == [row["loss"] for row in losses[1] if "loss" in row]
    assert any("validation_loss" in row for row in losses[0])
    step = max(runs[0].glob("[0-9]*"), key=lambda folder: int(folder.name))
    for member in recipe_data.expanded(config).members:
        np.testing.assert_array_equal(
            normalize.load(step / "assets" / member.asset_id)["actions"].mean, member.norm_stats["actions"].mean
        )
    assert load_recipe(step).data == config.data
    served = policy_config.load_pipeline(load_recipe(step), Checkpoint(step)).data_config
    first_alone = recipe_data.expanded(config).members[0]
    np.testing.assert_array_equal(served.norm_stats["state"].mean, first_alone.norm_stats["state"].mean)
