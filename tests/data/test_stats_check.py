"""Statistics that cannot be used are refused at every door, and by the same rules."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

import paths
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli.checkpoints import convert_checkpoint
from openpi.policies import policy_config
from openpi.shared import normalize, stats_check
from openpi.shared.normalize import NormStats
from openpi.training import recipe_io
from openpi.training.config import TrainConfig, get_config
from openpi.training.data import norm_stats, training_data
from openpi.training.data.recipe_data import open_recipe

RECIPE = f"{paths.SUPPORT / 'tiny_recipe.py'}:as_recorded"


def _stats(**changes) -> NormStats:
    values = {"mean": np.zeros(3), "std": np.ones(3), "q01": -np.ones(3), "q99": np.ones(3)}
    return NormStats(**(values | changes))


def _at(index: int, value: float, start: float) -> np.ndarray:
    values = np.full(3, start)
    values[index] = value
    return values


@dataclasses.dataclass(frozen=True)
class Doubled:
    """A robot that would be sent twice what was recorded."""

    def __call__(self, data):
        return {"actions": 2 * np.asarray(data["actions"])[..., :3]}


GOOD = {"state": _stats(), "actions": _stats()}
BAD = {
    "key of LeRobot": ({"state": _stats(), "action": _stats()}, "'action' is not normalised .* rename it to 'actions'"),
    "key that nobody reads": ({**GOOD, "torque": _stats()}, "'torque' is not normalised .*remove it"),
    "missing key": ({"actions": _stats()}, "'state' is missing"),
    "NaN": ({**GOOD, "state": _stats(q99=_at(1, np.nan, 1.0))}, r"q99 of state/joint_1 is nan; expected finite"),
    "infinity of float32": ({**GOOD, "state": _stats(q99=_at(1, 1e39, 1.0))}, r"q99 of state/joint_1 is 1e\+39"),
    "infinity": ({**GOOD, "actions": _stats(std=_at(2, np.inf, 1.0))}, r"std of actions/joint_2 is inf"),
    "upside down": ({**GOOD, "actions": _stats(q01=_at(0, 5.0, -1.0))}, r"q01 of actions/joint_0 is 5, above q99 = 1"),
    "negative width": ({**GOOD, "actions": _stats(std=_at(0, -2.0, 1.0))}, r"std of actions/joint_0 is -2"),
}


@pytest.fixture
def recipe(arm_dataset, tmp_path) -> TrainConfig:
    """A recipe with statistics in a file of its own."""
    config = get_config(RECIPE)
    config = dataclasses.replace(
        config,
        exp_name="x",
        assets_base_dir=str(tmp_path),
        data=dataclasses.replace(config.data, repo_id=str(arm_dataset), use_quantile_norm=True),
    )
    _write(config, GOOD)
    return config


def _write(config: TrainConfig, stats: dict[str, NormStats]) -> Path:
    folder = Path(str(config.data.stats_dir(config.assets_dirs)))
    normalize.save(folder, stats)
    return folder


def _prepared(recipe: TrainConfig) -> training_data.TrainingData:
    return training_data.prepare(recipe, open_recipe(recipe), num_devices=1)


@pytest.mark.parametrize(("stats", "message"), BAD.values(), ids=BAD)
def test_training_and_comparing_refuse_what_cannot_be_used(stats, message, recipe):
    folder = _write(recipe, stats)
    for ask in (lambda: _prepared(recipe), lambda: norm_stats.compare(recipe)):
        with pytest.raises(ValueError, match=message) as refusal:
            ask()
        assert str(folder) in str(refusal.value)
        assert "openpi stats" in str(refusal.value)


@pytest.mark.parametrize(("stats", "message"), BAD.values(), ids=BAD)
def test_a_checkpoint_with_statistics_that_cannot_be_used_is_not_served(stats, message, recipe, tmp_path):
    normalize.save(tmp_path / "step" / "assets" / str(recipe.data.asset_id), stats)
    with pytest.raises(ValueError, match=message):
        policy_config.load_pipeline(recipe, Checkpoint(tmp_path / "step"))


def test_a_checkpoint_with_statistics_that_cannot_be_used_is_not_converted(recipe, tmp_path):
    step = tmp_path / "step"
    (step / "params").mkdir(parents=True)
    (step / "params" / "_METADATA").touch()
    recipe_io.save_recipe(step, recipe)
    stats, message = BAD["key of LeRobot"]
    normalize.save(step / "assets" / str(recipe.data.asset_id), stats)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint.convert(str(step), convert_checkpoint.Target(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_what_is_odd_in_most_samples_is_said_when_training_starts(recipe, caplog):
    far = NormStats(np.full(3, 100.0), np.ones(3), np.full(3, 99.0), np.full(3, 101.0))
    _write(recipe, {**GOOD, "actions": far})
    with caplog.at_level(logging.WARNING, logger="openpi"):
        _prepared(recipe)
    assert "8 of 8 samples, at Normalize: actions 3 of 3 dimensions leave q01..q99: joint_" in caplog.text
    assert "openpi explain" in caplog.text


def test_outputs_that_do_not_undo_the_inputs_are_said_when_training_starts(recipe, caplog):
    with caplog.at_level(logging.WARNING, logger="openpi"):
        _prepared(recipe)
    assert "outputs do not undo inputs" not in caplog.text
    data = dataclasses.replace(recipe.data, outputs=Doubled())
    with caplog.at_level(logging.WARNING, logger="openpi"):
        _prepared(dataclasses.replace(recipe, data=data))
    assert "outputs do not undo inputs" in caplog.text


@pytest.mark.parametrize("width", [2, 5])
def test_statistics_of_another_width_than_the_robot_s_are_refused(width, recipe):
    _write(recipe, {**GOOD, "state": NormStats(*(np.arange(1.0, width + 1) + i for i in range(4)))})
    with pytest.raises(ValueError, match=f"'state' has {width} dimensions; expected 3"):
        _prepared(recipe)


def test_a_range_without_width_is_widened_for_training_as_when_it_is_computed(recipe, caplog):
    flat = {**GOOD, "actions": _stats(q01=_at(1, 0.5, -1.0), q99=_at(1, 0.5, 1.0), mean=_at(1, 0.5, 0.0))}
    _write(recipe, flat)
    used = _prepared(recipe).config.norm_stats
    assert used is not None and used["actions"].q01 is not None and used["actions"].q99 is not None
    assert used["actions"].q01[1] < 0.5 < used["actions"].q99[1]
    assert used["state"] == GOOD["state"]  # nothing else has changed
    assert "actions/joint_1" in caplog.text and "widened" in caplog.text


def test_what_a_model_was_trained_with_is_served_unchanged_and_warned_of(recipe, tmp_path, caplog):
    flat = {**GOOD, "state": _stats(q01=_at(1, 0.5, -1.0), q99=_at(1, 0.5, 1.0))}
    normalize.save(tmp_path / "step" / "assets" / str(recipe.data.asset_id), flat)
    with caplog.at_level(logging.WARNING, logger="openpi"):
        pipeline = policy_config.load_pipeline(recipe, Checkpoint(tmp_path / "step"))
    assert pipeline.data_config.norm_stats == flat
    assert "state/joint_1 have no width" in caplog.text


def test_the_padding_of_released_statistics_does_not_matter():
    padded = {key: NormStats(*(np.pad(v, (0, 4)) for v in (s.mean, s.std, s.q01, s.q99))) for key, s in GOOD.items()}
    for dims in (None, stats_check.Dims({"state": 3, "actions": 3})):
        assert stats_check.find_problems(padded, use_quantiles=True, dims=dims) == []
        assert stats_check.flat(padded, use_quantiles=True, dims=dims) == {}


def test_the_first_difference_of_two_files_is_named():
    other = {**GOOD, "actions": _stats(q99=_at(2, 1.5, 1.0))}
    assert stats_check.first_difference(GOOD, GOOD) is None
    assert stats_check.first_difference(GOOD, other) == "actions q99[2] is 1.0 and 1.5"
    assert stats_check.first_difference(GOOD, {"state": GOOD["state"]}) == "'actions' is only in one of them"
    without = {**GOOD, "state": NormStats(np.zeros(3), np.ones(3))}
    assert stats_check.first_difference(GOOD, without) == "state q01 is 3 numbers and not there"
