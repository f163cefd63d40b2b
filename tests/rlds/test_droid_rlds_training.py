"""A recipe on DROID in RLDS form: statistics, checks before training, commands, and what goes wrong."""

import dataclasses
import itertools
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import rlds_datasets
import training_processes
from openpi import transforms
from openpi.cli import main as cli
from openpi.shared import normalize
from openpi.training import data_loader, loop, recipe_io
from openpi.training.config import TrainConfig, get_config
from openpi.training.data import first_look, frame_blocks, norm_stats, recipe_data, stats_in_use, tabular_frames
from openpi.training.data_config import DROID_FRAME_RANGES, RLDSDroidDataConfig
from openpi.training.droid_rlds_dataset import DroidActionSpace, RLDSDataset
from paths import GOLDEN

SMALL = {"tokenizer_path": str(GOLDEN / "tokenizers" / "tiny_paligemma_tokenizer.model")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two datasets, of 30 and of 6 frames that are kept."""
    folder = tmp_path_factory.mktemp("rlds")
    table = {}
    for name, lengths in (("droid", (14, 9, 13)), ("simulated", (6,))):
        episodes = [rlds_datasets.episode(name, i, n, is_success=i != 1) for i, n in enumerate(lengths)]
        rlds_datasets.write(folder, name, "1.0.0", episodes, num_shards=min(2, len(lengths)))
        table |= {e.key: [[i, len(e) - 1]] for i, e in enumerate(episodes)}
    (folder / "ranges.json").write_text(json.dumps(table))
    return folder


def recipe(folder: Path, tmp_path: Path, *, weight: float = 1.0, **changes) -> TrainConfig:
    ranges = str(folder / "ranges.json")
    datasets = [RLDSDataset("droid", "1.0.0", weight, ranges), RLDSDataset("simulated", "1.0.0", 1 - weight, ranges)]
    data = RLDSDroidDataConfig(
        rlds_data_dir=str(folder),
        action_space=DroidActionSpace.JOINT_POSITION,
        datasets=datasets if weight < 1 else datasets[:1],
        assets=dataclasses.replace(get_config("pi05_droid_jointpos_polaris").data.assets, assets_dir=None),
        shuffle_buffer_size=50,
    )
    model = dataclasses.replace(get_config("pi05_full_droid_finetune").model, **SMALL)
    config = TrainConfig(name="mine", model=model, data=data, batch_size=4, num_workers=0, exp_name="one")
    return dataclasses.replace(config, assets_base_dir=str(tmp_path), **changes)


def raw_samples(config: TrainConfig, part: int) -> list[dict]:
    """The slow way: every kept frame of a dataset with its images, through the transforms before normalisation."""
    data = dataclasses.replace(config.data, datasets=[dataclasses.replace(config.data.datasets[part], weight=1.0)])
    data_config = data.create(config.assets_dirs, config.model)
    frames = recipe_data.create_dataset(data_config, config.model)
    chain = data_loader.input_transforms(data_config, frames, skip_norm_stats=True)
    chain = chain[: [isinstance(step, transforms.Normalize) for step in chain].index(True)]
    samples = []
    for index in itertools.count():
        try:
            samples.append(transforms.compose(chain)(frames[index]))
        except IndexError:
            return samples


@pytest.mark.parametrize("block", [4, 4096])
def test_statistics_are_those_of_the_frames_that_training_sees(folder, tmp_path, monkeypatch, block):
    monkeypatch.setattr(frame_blocks, "BLOCK_FRAMES", block)
    config = recipe(folder, tmp_path)
    found = norm_stats.compute(config)
    samples = raw_samples(config, 0)
    assert found.num_frames == len(samples) == 13 + 10
    for key, stats in found.stats.items():
        running = normalize.RunningStats()
        for sample in samples:
            running.update(sample[key])
        expected, _ = normalize.floor_degenerate(running.get_statistics(), are_commands=key == "actions")
        for name in ("mean", "std", "q01", "q99"):
            np.testing.assert_allclose(getattr(stats, name), getattr(expected, name), rtol=1e-6, atol=1e-9)


def test_datasets_count_by_their_weights_in_statistics_however_long_they_are(folder, tmp_path):
    config = recipe(folder, tmp_path, weight=0.75)
    found = norm_stats.compute(config).stats["state"]
    states = [np.stack([sample["state"] for sample in raw_samples(config, part)]) for part in (0, 1)]
    assert len(states[0]) > 4 * len(states[1])
    mean = 0.75 * states[0].mean(axis=0) + 0.25 * states[1].mean(axis=0)
    np.testing.assert_allclose(found.mean, mean, atol=0.005)
    square = 0.75 * np.square(states[0]).mean(axis=0) + 0.25 * np.square(states[1]).mean(axis=0)
    np.testing.assert_allclose(found.std, np.sqrt(square - mean**2), atol=0.005)


def test_statistics_of_some_frames_look_at_so_many(folder, tmp_path):
    assert norm_stats.compute(recipe(folder, tmp_path), max_frames=9).num_frames == 9
    with pytest.raises(ValueError, match="max_frames is 0"):
        norm_stats.compute(recipe(folder, tmp_path), max_frames=0)


def test_statistics_and_chunks_are_found_sample_by_sample_where_a_transform_needs_it(folder, tmp_path, monkeypatch):
    config = recipe(folder, tmp_path)
    data_config = config.data.create(config.assets_dirs, config.model)
    frames = tabular_frames.open_frames(data_config, config.model)
    together = norm_stats.compute_norm_stats(frames)["actions"]
    chunks, episodes = norm_stats.action_chunks(frames)
    whole = type(frames).evaluate

    def only_one(self, sample):
        if np.ndim(sample["actions"]) != 2:
            raise ValueError("one at a time")
        return whole(self, sample)

    monkeypatch.setattr(type(frames), "evaluate", only_one)
    np.testing.assert_allclose(norm_stats.compute_norm_stats(frames)["actions"].mean, together.mean)
    alone, of = norm_stats.action_chunks(frames)
    np.testing.assert_array_equal(alone, chunks)
    np.testing.assert_array_equal(of, episodes)
    assert np.bincount(of).tolist() == [13, 0, 10]


def test_the_loader_continues_with_the_very_batch_that_was_next_in_threads_and_in_workers(folder, tmp_path):
    config = recipe(folder, tmp_path, weight=0.75)
    norm_stats.compute(config)
    whole = data_loader.create_batch_loader(config, keep_padding_flags=True)
    running = iter(whole)
    for _ in range(4):
        next(running)
    state = json.loads(json.dumps(whole.state()))
    expected = [next(running) for _ in range(3)]
    running.close()
    for num_workers in (0, 2):
        loader = data_loader.create_batch_loader(config, keep_padding_flags=True, num_workers=num_workers)
        loader.restore(state)
        for batch, wanted in zip(loader, expected, strict=False):
            for key in ("actions", "state", "actions_is_pad", "tokenized_prompt"):
                np.testing.assert_array_equal(batch[key], wanted[key])
            np.testing.assert_array_equal(batch["image"]["base_0_rgb"], wanted["image"]["base_0_rgb"])
        loader.close()
    assert whole.batches_per_epoch is None


def test_a_script_of_ones_own_reads_the_frames_in_batches_transforms_them_and_gets_observations(folder, tmp_path):
    config = recipe(folder, tmp_path)
    norm_stats.compute(config)
    data_config = config.data.create(config.assets_dirs, config.model)
    dataset = data_loader.create_rlds_dataset(data_config, config.model.action_horizon, 4)
    raw = next(iter(dataset))
    assert raw["actions"].shape == (4, config.model.action_horizon, 8) and len(dataset) == 20_000_000
    robot_side = [*data_config.repack_transforms.inputs, *data_config.data_transforms.inputs]
    kept = [*robot_side, lambda sample: {"state": sample["state"]}]
    batches = data_loader.IterableTransformedDataset(dataset, kept, is_batched=True)
    rows = [batch["state"] for batch in data_loader.RLDSDataLoader(batches, num_batches=2)]
    assert [row.shape for row in rows] == [(4, 8)] * 2
    np.testing.assert_allclose(rows[0][:, :7], raw["observation"]["joint_position"], atol=1e-6)
    loader = data_loader.create_rlds_data_loader(data_config, config.model.action_horizon, 4, num_batches=1)
    (observation, actions) = next(iter(loader))
    assert observation.images["base_0_rgb"].shape[0] == actions.shape[0] == 4
    with pytest.raises(ValueError, match="use create_rlds_dataset"):
        data_loader.create_torch_dataset(data_config, config.model.action_horizon, config.model)


def test_episodes_cannot_be_held_out_of_a_stream(folder, tmp_path):
    config = recipe(folder, tmp_path, holdout_episodes=2, exp_name="x", checkpoint_base_dir=str(tmp_path / "runs"))
    for refuse in (loop.train, data_loader.create_batch_loader):
        with pytest.raises(ValueError, match=r"holdout_episodes=2, but data in RLDS form are a stream"):
            refuse(config)


def test_samples_from_every_dataset_are_tried_before_training(folder, tmp_path):
    config = recipe(folder, tmp_path, weight=0.75)
    data = stats_in_use.read(config, recipe_data.open_recipe(config))
    contract = first_look.check_samples(config, stats_in_use.with_usable(config, data))
    assert contract.control_hz == 15
    assert contract.robot == "droid"
    (frames,) = data.datasets
    names = [name for name, _ in first_look.samples_of(frames, 4)]
    assert {re.search("droid|simulated", name)[0] for name in names} == {"droid", "simulated"}


def test_episodes_that_nobody_gave_an_instruction_are_told(tmp_path, caplog):
    whole = rlds_datasets.episode("droid", 0, 9)
    told = {name: [b""] * 9 for name in whole.features if "language_instruction" in name}
    untold = rlds_datasets.RecordedEpisode({**whole.features, **told}, {})
    rlds_datasets.write(tmp_path, "droid", "1.0.0", [untold], num_shards=1)
    (tmp_path / "ranges.json").write_text(json.dumps({whole.key: [[0, 9]]}))
    config = recipe(tmp_path, tmp_path)
    data = stats_in_use.read(config, recipe_data.open_recipe(config))
    first_look.check_samples(config, stats_in_use.with_usable(config, data))
    assert "prompt has no words, so nothing says what to do" in caplog.text


def test_the_recipe_of_a_checkpoint_names_the_same_mixture(folder, tmp_path):
    config = recipe(folder, tmp_path, weight=0.75)
    recipe_io.save_recipe(tmp_path / "saved", config)
    assert recipe_io.load_recipe(tmp_path / "saved").data == config.data


def test_commands_take_a_recipe_on_rlds_data(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ranges, dataset = folder / "ranges.json", folder / "droid" / "1.0.0"
    (tmp_path / "mine.py").write_text(
        "import dataclasses\n"
        "from openpi.training.config import get_config\n"
        "from openpi.training.droid_rlds_dataset import RLDSDataset\n"
        "published = get_config('pi0_fast_full_droid_finetune')\n"
        f"data = dataclasses.replace(published.data, rlds_data_dir={str(folder)!r}, datasets=(\n"
        f"    RLDSDataset('droid', '1.0.0', 1.0, {str(ranges)!r}),))\n"
        f"model = dataclasses.replace(published.model, action_tokenizer_path={str(GOLDEN / 'tokenizers' / 'fast')!r},\n"
        f"    tokenizer_path={SMALL['tokenizer_path']!r})\n"
        "recipe = dataclasses.replace(published, name='mine', data=data, model=model)\n"
        "flow = get_config('pi05_full_droid_finetune').model\n"
        f"flow = dataclasses.replace(flow, tokenizer_path={SMALL['tokenizer_path']!r})\n"
        "by_flow = dataclasses.replace(recipe, model=flow)\n"
    )
    name = "mine.py:recipe"
    assert cli.main(["stats", name]) == 0
    assert "23 frames; written to" in capsys.readouterr().out
    assert cli.main(["explain", "mine.py:by_flow", "--index", "12"]) == 0
    shown = capsys.readouterr()
    assert f"frame 12 of {dataset}" in shown.out, shown
    assert cli.main(["explain", "mine.py:by_flow", "--index", "23"]) == 1
    assert "a mixture with 23 frames" in capsys.readouterr().err
    assert cli.main(["tokenizer", "fit", name, "--output", str(tmp_path / "fitted"), "--vocab-size", "300"]) == 0
    assert cli.main(["fetch", name, "--list"]) in (0, 1)
    assert "bring droid/1.0.0 to data.rlds_data_dir yourself" in capsys.readouterr().out


def test_fetching_a_mixture_brings_its_ranges_and_not_its_data():
    from openpi.training.recipe.requirements import requirements

    found = requirements(get_config("pi05_droid_jointpos_polaris"))
    ranges = [each.url for each in found if each.kind == "frame ranges"]
    assert len(ranges) == 2
    assert ranges[0] == DROID_FRAME_RANGES
    assert not [each for each in found if each.kind == "dataset"]


READ = """
    import json, os, sys
    from pathlib import Path
    from openpi.training import data_loader, loop
    from openpi.training.distributed import launch
    from openpi.training.distributed import processes
    from openpi.training.config import get_config

    processes.start(launch.find_launch({}, os.environ), "jax")
    here = processes.index(), processes.count()
    loader = data_loader.create_batch_loader(get_config(sys.argv[1]), part=here)
    rows = [batch["state"].tolist() for batch, _ in zip(loader, range(3))]
    state = loop.loader_state(loader.state())
    Path(f"{sys.argv[2]}.{here[0]}").write_text(json.dumps({"rows": rows, "state": state}))
    processes.end(0)
"""


def test_two_processes_read_the_batches_of_one_and_a_checkpoint_knows_where_both_are(folder, tmp_path):
    (tmp_path / "read_by_two.py").write_text(
        "import dataclasses\n"
        "from openpi.training.config import get_config\n"
        "from openpi.training.droid_rlds_dataset import RLDSDataset\n"
        "published = get_config('pi0_fast_full_droid_finetune')\n"
        f"data = dataclasses.replace(published.data, rlds_data_dir={str(folder)!r}, shuffle_buffer_size=60,\n"
        f"    datasets=(RLDSDataset('droid', '1.0.0', 1.0, {str(folder / 'ranges.json')!r}),))\n"
        f"model = dataclasses.replace(published.model, action_tokenizer_path={str(GOLDEN / 'tokenizers' / 'fast')!r},\n"
        f"    tokenizer_path={SMALL['tokenizer_path']!r})\n"
        "recipe = dataclasses.replace(published, data=data, model=model, batch_size=4,\n"
        f"    assets_base_dir={str(tmp_path)!r})\n"
    )
    recipe = f"{tmp_path / 'read_by_two.py'}:recipe"
    norm_stats.compute(get_config(recipe))
    command = [sys.executable, "-c", textwrap.dedent(READ), recipe, str(tmp_path / "read")]
    training_processes.run(command, 2, training_processes.environment(), tmp_path / "logs")
    first, second = (json.loads((tmp_path / f"read.{i}").read_text()) for i in range(2))
    loader = data_loader.create_batch_loader(get_config(recipe))
    expected = [batch["state"].tolist() for batch, _ in zip(loader, range(3), strict=False)]
    assert [one + other for one, other in zip(first["rows"], second["rows"], strict=True)] == expected
    assert first["state"] == second["state"] == json.loads(json.dumps(loader.state()))
    assert len(first["state"]["streams"]) == 4
