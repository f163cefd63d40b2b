"""`openpi demo record` and `openpi demo evaluate`: real files, a real server, the real client."""

import json

import numpy as np
import pytest
from openpi.demo.closed_loop import EvaluateOptions, evaluate_server
from openpi.evaluation.rollout import swapped

from openpi.cli import demo
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.demo.recording import RecordOptions, record_dataset
from openpi.envs.tabletop import PLACE, PROMPTS, TabletopEnv, expert, tasks
from openpi_client.base_policy import BasePolicy
from serving_live import server_thread

SEED = 1_000_000
CHUNK = 12
EXECUTED = EvaluateOptions.execute_horizon


class Expert(BasePolicy):
    """Does what it is told, knowing the scene of one seed: a policy as good as can be behind the wire."""

    def __init__(self, seed: int):
        self.metadata: dict = {}
        env = TabletopEnv(PLACE, num_blocks=3)
        env.reset(seed=seed, options={"prompt": PROMPTS[PLACE][0]})
        self._scene = env.world.scene
        self._step = 0

    def infer(self, obs: dict) -> dict:
        assert obs["observation/image"].shape == obs["observation/wrist_image"].shape == (64, 64, 3)
        actions = expert.actions(expert.plan(self._scene, tasks.parse_prompt(obs["prompt"])))
        rows = np.minimum(np.arange(self._step, self._step + CHUNK), len(actions) - 1)
        self._step += EXECUTED
        return {"actions": actions[rows].astype(np.float32)}


def evaluated(tmp_path, **options):
    """The report, and the JSON file, of one episode."""
    with server_thread(lambda: Expert(SEED)) as (_, port):
        output = tmp_path / "result" / "one.json"
        report = evaluate_server(
            EvaluateOptions(output=output, port=port, episodes=1, seed=SEED, **options), lambda count, episode: None
        )
    return report, json.loads(output.read_text())


def test_a_perfect_policy_succeeds_over_the_wire_and_is_filmed(tmp_path):
    report, result = evaluated(tmp_path, videos=1)
    assert report.total.successes == 1
    assert result["total"]["rate"] == result["told"]["rate"] == 1.0
    (video,) = result["videos"]
    assert (tmp_path / "result" / video["path"]).read_bytes()[4:8] == b"ftyp"
    assert 0 < result["round_trip_ms"]["p50"] <= result["round_trip_ms"]["p95"]


def test_with_swapped_prompts_a_listening_policy_fails_and_yet_does_what_it_was_told(tmp_path):
    _, result = evaluated(tmp_path, swap_prompts=True)
    (episode,) = result["episodes"]
    assert episode["told_prompt"] == swapped(PROMPTS[PLACE])[episode["prompt"]]
    assert result["total"]["successes"] == 0
    assert result["told"]["successes"] == 1


def test_an_evaluation_needs_exactly_one_way_to_the_server(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["evaluate", "--output", str(tmp_path / "x.json")])
    assert stopped.value.code == 2
    assert "Give either --port" in capsys.readouterr().err


def test_a_port_file_that_is_not_there_is_named(tmp_path, capsys):
    code = demo.main(["evaluate", "--output", str(tmp_path / "x.json"), "--port-file", str(tmp_path / "no.port")])
    assert code == 1
    assert "no.port" in capsys.readouterr().err


def test_a_recorded_dataset_reads_back_with_its_prompts_and_progress_is_told(tmp_path, capsys):
    code = demo.main(["record", f"--output={tmp_path / 'data'}", "--episodes=4", "--num-workers=0"])
    assert code == 0
    out = capsys.readouterr().out
    assert [line[:5] for line in out.splitlines()[:4]] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    dataset = LeRobotDataset(tmp_path / "data")
    assert len(dataset.episode_bounds) == 4
    assert set(dataset.metadata.tasks.values()) <= set(PROMPTS[PLACE])
    sample = dataset[0]
    assert sample["image"].shape == (64, 64, 3)
    assert sample["actions"].shape == (6,)
    assert dataset.metadata.fps == 10


def test_a_recording_does_not_depend_on_the_number_of_processes(tmp_path):
    for workers in (0, 2):
        options = RecordOptions(tmp_path / str(workers), episodes=3, num_workers=workers)
        record_dataset(options, lambda count, prompt: None)
    alone, together = (LeRobotDataset(tmp_path / str(workers)) for workers in (0, 2))
    np.testing.assert_array_equal(alone.column("actions"), together.column("actions"))
    np.testing.assert_array_equal(alone[5]["wrist_image"], together[5]["wrist_image"])


SENSELESS = [{"episodes": 0}, {"prompts_per_scene": 7}, {"num_blocks": 1, "prompts_per_scene": 3}]


@pytest.mark.parametrize("options", SENSELESS)
def test_sizes_that_make_no_sense_are_refused_before_anything_is_written(tmp_path, options):
    with pytest.raises(ValueError, match=r"expected at least 1|has 1 to"):
        RecordOptions(tmp_path / "data", **options)
