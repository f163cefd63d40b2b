"""`openpi evaluate DATASET`: chunks beside recorded ones, on a real dataset; and policies whose faults are known."""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_arm
from arm_files import arm_stats, run, write_checkpoint
from openpi.evaluation import open_loop
from openpi.evaluation.open_loop import Plan
from openpi.training.data.moments import Moments, chosen, others
from openpi.training.data.recipe_data import with_dataset

STRIDE = 5


@pytest.fixture(scope="module")
def recordings() -> Moments:
    return Moments(tiny_arm.recipe, _data_config(), [0, 1])


def _data_config() -> Any:
    config = tiny_arm.recipe
    return dataclasses.replace(config.data.create(config.assets_dirs, config.model), norm_stats=arm_stats())


@pytest.fixture(scope="module")
def moments(recordings: Moments) -> list[Any]:
    return [recordings.at(*where) for where in open_loop.steps_of(recordings.lengths, STRIDE, 100)]


class Knows:
    """Answers what was recorded, and what is asked of it beside."""

    def __init__(self, moments: Sequence[Any], *, shakes: float = 0.0, looks: float = 0.0, noise: float = 0.0):
        self._known = {self._key(m.observation): m.recorded for m in moments}
        self._shakes, self._looks, self._noise = shakes, looks, noise

    @staticmethod
    def _key(observation: Mapping[str, Any]) -> bytes:
        return np.asarray(observation["observation/state"]).tobytes()

    def __call__(self, observations: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[np.ndarray | None]:
        return [self._chunk(obs, seed) for obs, seed in zip(observations, seeds, strict=True)]

    def _chunk(self, observation: Mapping[str, Any], seed: int) -> np.ndarray:
        chunk = self._known[self._key(observation)].copy()
        chunk[::2] += self._shakes
        chunk += self._looks * np.asarray(observation["observation/image"]).mean() / 255
        return chunk + self._noise * np.random.default_rng(seed).normal(size=chunk.shape)


def test_a_moment_is_what_the_robot_would_send_and_what_the_dataset_recorded(recordings, moments):
    moment = moments[1]
    assert (moment.episode, moment.step) == (0, STRIDE)
    assert set(moment.observation) == {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
    column = recordings._dataset.column("actions")
    np.testing.assert_allclose(moment.recorded, column[STRIDE : STRIDE + 5], atol=1e-5)
    last = recordings.at(0, recordings.lengths[0] - 1)
    assert last.num_recorded == 1


def test_who_knows_the_recording_has_no_error_and_no_seam_beyond_it(moments):
    played = open_loop.play(Knows(moments), moments, Plan(STRIDE))
    error = open_loop.errors(played.chunks, moments)
    assert open_loop.summary(error)["mean"] == 0
    ends = [moment.num_recorded for moment in moments]
    assert np.isnan(error).any(axis=(1, 2)).tolist() == [end < 5 for end in ends] and min(ends) < 5
    smooth = open_loop.smoothness(played, STRIDE)
    np.testing.assert_allclose(smooth["seam"], smooth["recorded step at a seam"])


def test_a_policy_that_shakes_is_seen_in_its_steps(moments):
    smooth = open_loop.smoothness(open_loop.play(Knows(moments, shakes=3.0), moments, Plan(STRIDE)), STRIDE)
    assert min(smooth["step"]) > 2.0 > max(smooth["recorded step"])


def test_what_a_policy_looks_at_and_its_noise_are_measured(moments):
    asked, plan = Knows(moments, looks=4.0, noise=0.01), Plan(STRIDE, samples=6)
    deviation, plain = open_loop.spread(asked, moments[:8], plan)
    assert 0.005 < deviation.mean() < 0.015
    seeds = [plan.seed_of(moment) for moment in moments[:8]]
    found = {
        name: np.abs(np.stack(asked(observations, seeds)) - plain).mean()
        for name, observations in open_loop.changed_inputs(moments[:8], ())
        if "state" not in name
    }
    assert found["camera observation/wrist_image, grey"] == found["another prompt"] == 0
    assert found["camera observation/image, grey"] > 10 * deviation.mean()


def test_a_model_that_often_writes_no_chunk_is_measured_where_it_does(moments):
    class Mute(Knows):
        def __call__(self, observations, seeds):
            answers = super().__call__(observations, seeds)
            is_spoilt = [np.ptp(obs["observation/image"]) == 0 for obs in observations]
            written = [not spoilt and seed not in never for spoilt, seed in zip(is_spoilt, seeds, strict=True)]
            return [answer if there else None for answer, there in zip(answers, written, strict=True)]

    asked, plan, probes = Mute(moments, noise=0.01), Plan(STRIDE, samples=2), moments[:10]
    never = [plan.seed_of(moment, 1) for moment in probes[:8]]  # a whole message of questions
    deviation, plain = open_loop.spread(asked, probes, plan)
    assert np.isnan(deviation[:8]).all() and np.isfinite(deviation[8:]).all()
    found = open_loop.sensitivity(asked, probes, plan, (), plain)
    assert np.isnan(found["camera observation/image, grey"]) and found["another prompt"] == 0
    never = [plan.seed_of(moment) for moment in moments]
    with pytest.raises(ValueError, match="no action chunk for any"):
        open_loop.play(asked, moments, plan)


def test_of_too_many_frames_no_part_of_an_episode_is_left_out():
    lengths = {3: 400, 4: 400, 7: 400, 9: 400}
    few = open_loop.steps_of(lengths, 10, 80)
    assert len(few) == 80 and list(dict.fromkeys(number for number, _ in few)) == [3, 4, 7, 9]
    for part in range(4):
        assert any(100 * part <= step < 100 * (part + 1) for _, step in few), f"quarter {part}"
    fewest = open_loop.steps_of(lengths, 10, 5)
    assert len(fewest) == 4 and fewest[0][0] < 7 <= fewest[-1][0]
    assert all(b[1] - a[1] == 10 for a, b in zip(fewest[::2], fewest[1::2], strict=True))  # seams can be seen
    assert open_loop.steps_of({0: 25, 1: 5}, 10, 100) == [(0, 0), (0, 10), (0, 20), (1, 0)]


def test_the_better_of_two_is_better_on_the_same_frames_and_the_interval_says_so(moments):
    a, b = (
        open_loop.errors(open_loop.play(Knows(moments, noise=noise), moments, Plan(STRIDE)).chunks, moments)
        for noise in (0.5, 0.1)
    )
    found = open_loop.paired(a, b, moments)
    low, high = found["interval_95"]
    assert low <= found["difference"] <= high < 0
    assert open_loop.paired(a, a, moments)["interval_95"] == [0, 0]


def test_baselines_come_from_other_episodes_only(moments):
    states, actions = others(tiny_arm.recipe, _data_config(), [0, 1], 50)
    found = open_loop.baselines(moments, states, actions)
    assert len(found) >= 3 and all(chunks.shape[1:] == (5, 7) for chunks in found.values())
    own = open_loop.baselines(moments, np.stack([m.state for m in moments]), np.stack([m.recorded for m in moments]))
    nearest = open_loop.errors(own["the chunk of the nearest state of other episodes"], moments)
    assert open_loop.summary(nearest)["mean"] == 0


def test_episodes_are_those_held_out_and_unknown_ones_are_refused():
    held = dataclasses.replace(tiny_arm.recipe, holdout_episodes=1)
    numbers, unseen = chosen(held, _data_config(), None, 8)
    assert len(numbers) == 1 and unseen
    assert chosen(tiny_arm.recipe, _data_config(), None, 2)[1] is False
    with pytest.raises(ValueError, match=r"episodes \[99\] are not in .* which has"):
        chosen(tiny_arm.recipe, _data_config(), [0, 99], 8)


def test_the_command_writes_a_report_for_two_checkpoints(tmp_path, capsys):
    dataset, out = tiny_arm.recipe.data.repo_id, tmp_path / "found"
    first, second = write_checkpoint(tmp_path / "run" / "1"), write_checkpoint(tmp_path / "run" / "2")
    words = ["evaluate", dataset, "--checkpoint", first, "--against", second, "--output", out, "--frames", 8]
    assert run(*words, "--probes", 2, "--samples", 2, "--num-steps", 2, "--episodes", 0, 1) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["policies"]) == ["1", "2"]
    assert results["policies"]["1"] == results["policies"]["2"]  # the same weights, frames and noise
    assert results["paired"]["interval_95"] == [0, 0]
    assert any("grey" in name for name in results["policies"]["1"]["sensitivity"])
    page = (out / "report.html").read_text()
    assert "which training has seen" in page and "if this is what training read" not in page
    assert "no difference is shown" in page and page.count("<svg") >= 8 and "data:image/jpeg" in page
    # A hundredth of the noise is no zero.
    assert '<td class="number">0.0</td>' not in page
    assert "standing still" in capsys.readouterr().out
    elsewhere, copied = tmp_path / "copied", tmp_path / "found elsewhere"
    shutil.copytree(dataset, elsewhere)
    assert run("evaluate", elsewhere, "--checkpoint", first, "--output", copied, "--frames", 2, "--probes", 0) == 0
    assert f"if this is what training read as {dataset}" in (copied / "report.html").read_text()
    before = (out / "results.json").read_bytes()
    assert run("evaluate", dataset, "--checkpoint", first, "--output", out, "--frames", 2) == 1
    assert "choose another --output" in capsys.readouterr().err
    assert run("evaluate", "tabletop", "--policy", "expert", "--output", out, "--resume") == 1
    assert "choose another --output" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before


def test_episodes_that_a_recipe_leaves_out_are_those_of_its_own_dataset(monkeypatch):
    folder = Path(tiny_arm.recipe.data.repo_id)
    data = dataclasses.replace(tiny_arm.recipe.data, exclude_episodes=(1,), exclude_where="length < 2")
    recipe = dataclasses.replace(tiny_arm.recipe, data=data)
    monkeypatch.chdir(folder.parent)
    assert with_dataset(recipe, folder.name).data.exclude_episodes == (1,)  # the same folder
    other = with_dataset(recipe, "another").data
    assert other.exclude_episodes == () and other.exclude_where == "length < 2"


def test_what_cannot_be_evaluated_is_one_sentence(tmp_path: Path, capsys):
    dataset = tiny_arm.recipe.data.repo_id
    assert run("evaluate", dataset) == 1
    assert "which policy? Give --checkpoint" in capsys.readouterr().err
    checkpoint = write_checkpoint(tmp_path / "1")
    assert run("evaluate", dataset, "--checkpoint", checkpoint, "--stride", 9) == 1
    assert "--stride is 9, and a chunk has 5 rows" in capsys.readouterr().err
    assert run("evaluate", "nobody/nothing", "--checkpoint", checkpoint) == 1
    assert "nobody/nothing" in capsys.readouterr().err
