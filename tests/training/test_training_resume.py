"""`--resume`: the recipe of the run, whole checkpoints only, and a way on where the data have changed."""

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

import paths
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli.training import train as train_command
from openpi.data.batch_loader import BatchLoader, SourceLoader
from openpi.training import recipe_io
from openpi.training.checkpoints import best_step
from openpi.training.config import TrainConfig, cli, get_config
from openpi.training.data.training_data import TrainingData
from openpi.training.data_config import RLDSDroidDataConfig
from openpi.training.droid_rlds_dataset import DroidActionSpace
from openpi.training.run import resume, run_directory
from openpi.training.weight_loaders import CheckpointWeightLoader

RECIPE = f"{paths.SUPPORT / 'tiny_recipe.py'}:arm"


class Numbers:
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /):
        return {"x": index}


def of_run(folder: Path, *flags: str) -> TrainConfig:
    return cli([RECIPE, "--exp-name=first", f"--checkpoint-base-dir={folder}", *flags])


def leave_step(config: TrainConfig, step: int, *, without: str | None = None) -> Path:
    """What a checkpoint is recognised by, and its recipe."""
    folder = config.checkpoint_dir / str(step)
    for name in ("params/_METADATA", "train_state/_METADATA"):
        if name != without:
            (folder / name).parent.mkdir(parents=True)
            (folder / name).touch()
    recipe_io.save_recipe(folder, config)
    return folder


# --- the run's own recipe -----------------------------------------------------------------------------------------


def test_flags_of_the_start_need_not_be_given_again(tmp_path, caplog):
    caplog.set_level("INFO", logger="openpi")
    started = of_run(tmp_path, "--batch-size=8", "--model.max-token-len=9", "--data.repo-id=./mine", "--seed=3")
    leave_step(started, 2)
    argv = [RECIPE, "--exp-name=first", f"--checkpoint-base-dir={tmp_path}", "--resume", "--seed=4"]
    resumed = train_command._as_started(cli(argv), argv)
    assert (resumed.batch_size, resumed.model.max_token_len, resumed.data.repo_id) == (8, 9, "./mine")
    assert resumed.seed == 4  # a flag wins
    told = [record.getMessage() for record in caplog.records if "as the run was started" in record.getMessage()]
    assert "--batch-size=8" in "".join(told)
    assert "--seed" not in "".join(told)  # what does not hold is not told
    assert resumed.resume and not resumed.overwrite
    assert (
        resumed.data.create(tmp_path, resumed.model).data_transforms
        == get_config(RECIPE).data.create(tmp_path, resumed.model).data_transforms
    )


def test_a_choice_is_taken_from_the_run_as_numbers_are():
    """A run on joint positions of DROID went on with what the recipe said."""
    recipe = dataclasses.replace(get_config(RECIPE), data=RLDSDroidDataConfig(repo_id="droid"))
    begun = dataclasses.replace(recipe.data, action_space=DroidActionSpace.JOINT_POSITION, shuffle_buffer_size=77)
    own = resume._merged(recipe, dataclasses.replace(recipe, data=begun), recipe, "")
    assert (own.data.action_space, own.data.shuffle_buffer_size) == (DroidActionSpace.JOINT_POSITION, 77)


def test_a_run_that_is_not_there_starts_with_the_recipe_as_it_is_named(tmp_path):
    config = of_run(tmp_path, "--resume")
    assert resume.with_own_values(get_config(RECIPE), config) == get_config(RECIPE)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_checkpoint_without_a_readable_recipe_takes_flags_as_they_are_given(text, tmp_path):
    config = of_run(tmp_path, "--resume", "--batch-size=8")
    file = leave_step(config, 2) / recipe_io.RECIPE_FILE
    file.unlink() if text is None else file.write_text(text)
    assert resume.with_own_values(get_config(RECIPE), config) == get_config(RECIPE)


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("without", ["params/_METADATA", "train_state/_METADATA"])
def test_a_damaged_step_is_never_trained_over(without, tmp_path):
    config = of_run(tmp_path, "--resume")
    leave_step(config, 2)
    damaged = leave_step(config, 4, without=without)
    with pytest.raises(ValueError, match=r"step 4 in .* is damaged: .*step 2: to continue from there, .*\(mv"):
        run_directory.open_run(config)
    damaged.rename(f"{damaged}.damaged")
    checkpoints, last_step = run_directory.open_run(config)
    checkpoints.close()
    assert last_step == 2


def test_a_run_whose_only_step_is_damaged_does_not_start_anew(tmp_path):
    config = of_run(tmp_path, "--resume")
    folder = leave_step(config, 4, without="train_state/_METADATA")
    with pytest.raises(ValueError, match="There is no whole one before it"):
        run_directory.open_run(config)
    assert folder.exists()


def test_a_run_of_the_published_pytorch_trainer_is_not_called_damaged(tmp_path):
    config = of_run(tmp_path, "--resume")
    folder = config.checkpoint_dir / "4"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "metadata.pt"):
        (folder / name).touch()
    with pytest.raises(ValueError, match=rf"published PyTorch trainer.*--pytorch-weight-path={folder}, without"):
        run_directory.open_run(config)


class Backend:
    """Restores nothing, or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def restore_state(self, directory: Path) -> str:
        if self.error is not None:
            raise self.error
        return "the state"


def continued(config: TrainConfig, folder: Path, backend: Backend, loader: BatchLoader):
    data = TrainingData(config.data.create(config.assets_dirs, config.model), loader, None, None)
    window = type("Window", (), {"restore": lambda self, values: None})()
    return resume.continue_run(config, backend, Checkpoint(folder), data, window)  # type: ignore[arg-type]


def test_arrays_that_cannot_be_read_name_the_step_and_the_one_before(tmp_path):
    config = of_run(tmp_path)
    leave_step(config, 2)
    checkpoint = leave_step(config, 4)
    with pytest.raises(ValueError, match=r"step 4 .* is damaged: the zstd frame is cut.*step 2"):
        continued(config, checkpoint, Backend(OSError("the zstd frame is cut")), loader(4))


@pytest.mark.parametrize("text", ["{", '{"loader": 3}', "[]"])
def test_a_data_order_that_cannot_be_read_is_damage(text, tmp_path):
    config = of_run(tmp_path)
    checkpoint = leave_step(config, 4)
    (checkpoint / resume.LOOP_STATE_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"step 4 .* is damaged: .*loader_state.json is damaged"):
        continued(config, checkpoint, Backend(), loader(4))


def test_another_model_names_the_flag_and_the_way_to_keep_the_weights(tmp_path):
    checkpoint = leave_step(of_run(tmp_path), 4)
    now = of_run(tmp_path, "--model.action-dim=8")
    with pytest.raises(ValueError, match=r"--model.action-dim was 4, is 8.*--exp-name=NEW --pytorch-weight-path=.*/4"):
        continued(now, checkpoint, Backend(ValueError("2 leaves differ")), loader(4))


def test_the_flag_that_starts_from_weights_is_one_that_the_recipe_has(tmp_path):
    config = of_run(tmp_path)
    assert resume.weights_flag(config, Checkpoint(tmp_path / "4")) == f"--pytorch-weight-path={tmp_path}/4"
    pytorch = dataclasses.replace(config, backend="pytorch")
    assert resume.weights_flag(pytorch, Checkpoint(tmp_path / "4")) == f"--pytorch-weight-path={tmp_path}/4"
    based = dataclasses.replace(config, weight_loader=CheckpointWeightLoader("x"))
    assert resume.weights_flag(based, Checkpoint(tmp_path / "4")) == f"--weight-loader.params-path={tmp_path}/4"


# --- other data ---------------------------------------------------------------------------------------------------


def loader(batch_size: int, length: int = 12) -> BatchLoader:
    return BatchLoader(Numbers(length), batch_size=batch_size, seed=0)


def checkpoint_after(config: TrainConfig, num_batches: int, data: BatchLoader) -> Path:
    checkpoint = leave_step(config, 4)
    batches = iter(data)
    for _ in range(num_batches):
        next(batches)
    state = {"loader": data.state(), "window": []}
    (checkpoint / resume.LOOP_STATE_FILE).write_text(json.dumps(state))
    return checkpoint


@pytest.mark.parametrize(
    ("flag", "data", "told"),
    [
        ("--batch-size=2", loader(2), "batch_size was 4, is 2"),
        ("--data.repo-id=more", loader(4, 20), "num_samples was 12, is 20"),
        ("--data.repo-id=fewer", loader(4, 8), "num_samples was 12, is 8"),
        ("--holdout-episodes=1", loader(4, 8), "num_samples was 12, is 8"),
    ],
)
def test_other_data_begin_a_new_order_which_is_said(flag, data, told, tmp_path, caplog):
    checkpoint = checkpoint_after(of_run(tmp_path), 4, loader(4))
    assert continued(of_run(tmp_path, flag), checkpoint, Backend(), data) == "the state"
    assert told in caplog.text
    assert "a new order begins" in caplog.text
    assert "--exp-name=NEW --pytorch-weight-path=" in caplog.text
    # At an epoch of its own: two have begun, and this would be the third.
    assert data.state()["next_batch"] == 2 * data.batches_per_epoch


def test_another_batch_size_never_shuffles_as_an_epoch_that_was_begun(tmp_path):
    """Epochs end where a batch is not filled: of nine batches of 8 of 10 samples, each was an epoch."""
    checkpoint = checkpoint_after(of_run(tmp_path), 9, loader(8, 10))
    data = loader(3, 10)
    continued(of_run(tmp_path, "--batch-size=3"), checkpoint, Backend(), data)
    assert data.state()["next_batch"] == 9 * data.batches_per_epoch


class EndlessSource:
    """A stream, of which no one knows how many samples it has."""

    identity: ClassVar = {"datasets": ["droid"]}

    def start(self) -> dict:
        return {"next_batch": 0}

    def start_after(self, state: object) -> dict:
        del state
        return {"next_batch": 0}


def test_a_run_goes_on_with_a_stream(tmp_path, caplog):
    checkpoint = checkpoint_after(of_run(tmp_path), 4, loader(4))
    stream: Any = SourceLoader(EndlessSource(), Numbers(1).__getitem__)  # type: ignore[arg-type]
    continued(of_run(tmp_path, "--data.repo-id=more"), checkpoint, Backend(), stream)
    assert "num_samples was 12, is None" in caplog.text


def test_a_dataset_that_has_lost_episodes_is_refused_with_the_way_on(tmp_path):
    config = of_run(tmp_path)
    checkpoint = checkpoint_after(config, 1, loader(4))
    with pytest.raises(
        ValueError, match=r"fewer samples .*num_samples was 12, is 8.*Bring the missing.*--exp-name=NEW"
    ):
        continued(config, checkpoint, Backend(), loader(4, 8))


def test_the_same_data_go_on_where_they_were(tmp_path):
    config = of_run(tmp_path)
    checkpoint = checkpoint_after(config, 2, loader(4))
    data = loader(4)
    continued(config, checkpoint, Backend(), data)
    assert data.state()["next_batch"] == 2


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    for step, loss in enumerate((float("nan"), 0.5, float("nan"), float("inf"))):
        folder = tmp_path / str(step)
        (folder / "params").mkdir(parents=True)
        (folder / "params" / "_METADATA").touch()
        (folder / "eval_metrics.json").write_text(json.dumps({"validation_loss": loss}))
    assert best_step(tmp_path) == 1
    (tmp_path / "1" / "eval_metrics.json").unlink()
    assert best_step(tmp_path) is None
