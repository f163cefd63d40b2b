"""`openpi demo record`: real files."""

import numpy as np
import pytest

from openpi.data.lerobot.reader import LeRobotDataset
from openpi_demo import command as demo
from openpi_demo.recording import RecordOptions, record_dataset
from openpi_demo.tabletop import PLACE, PROMPTS


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
