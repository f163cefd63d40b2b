"""The command line of a recipe: every field is a flag, and wrong ones are explained."""

import enum

import pytest

from openpi.training import config as _config
from openpi.training.config import cli, get_config
from openpi.training.weight_loaders import CheckpointWeightLoader, NoOpWeightLoader


def test_flags_override_nested_fields():
    config = cli(
        [
            "pi05_libero",
            "--exp-name=run",
            "--model.action-horizon",
            "7",
            "--data.repo-id=me/mine",
            "--lr-schedule.peak-lr=1e-3",
            "--optimizer.clip-gradient-norm",
            "0.5",
            "--data.assets.asset-id=mine",
            "--keep-period=None",
            "--overwrite",
        ]
    )
    assert config.exp_name == "run"
    assert config.model.action_horizon == 7
    assert config.data.repo_id == "me/mine"
    assert config.data.assets.asset_id == "mine"
    assert config.lr_schedule.peak_lr == 1e-3
    assert config.optimizer.clip_gradient_norm == 0.5
    assert config.keep_period is None
    assert config.overwrite


def test_what_is_not_given_keeps_the_recipe():
    expected = get_config("pi0_aloha_pen_uncap")
    assert cli(["pi0_aloha_pen_uncap"]) == expected


def test_underscores_and_hyphens_are_equal():
    assert cli(["debug", "--exp_name=a", "--num_train_steps=3"]) == cli(
        ["debug", "--exp-name=a", "--num-train-steps=3"]
    )


@pytest.mark.parametrize("flag", ["--no-wandb-enabled", "--no-overwrite", "--resume", "--data.extra-delta-transform"])
def test_booleans_are_pairs_of_flags(flag):
    config = cli(["pi0_libero", "--no-overwrite", flag])
    assert config.wandb_enabled is False
    assert config.resume == (flag == "--resume")


def test_a_flag_accepts_an_enumeration_by_name():
    space = cli(["pi05_full_droid_finetune", "--data.action-space=JOINT_VELOCITY"]).data.action_space
    assert isinstance(space, enum.Enum)
    assert space.name == "JOINT_VELOCITY"


@pytest.mark.parametrize("hidden", ["name", "freeze-filter", "data.repack-transforms", "data.base-config"])
def test_structures_are_not_flags(hidden, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli(["pi0_aloha_sim", f"--{hidden}=x"])
    assert exit_.value.code == 2
    assert hidden in capsys.readouterr().err


def test_help_lists_recipes_first_and_then_the_flags_of_one(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli(["--help"])
    assert exit_.value.code == 0
    listed = capsys.readouterr().out
    assert [name for name in _config.config_names() if name not in listed] == []
    with pytest.raises(SystemExit):
        cli(["pi0_libero", "--help"])
    text = capsys.readouterr().out
    assert "--model.action-horizon" in text
    assert "50" in text


@pytest.mark.parametrize("backend", ["jax", "pytorch"])
def test_weights_that_are_named_are_not_passed_over_by_either_backend(backend):
    config = get_config("debug")
    given = cli(["debug", f"--backend={backend}", "--pytorch-weight-path=there"])
    assert isinstance(config.start_weights, NoOpWeightLoader)
    assert given.start_weights == CheckpointWeightLoader("there")


def test_a_misspelt_recipe_is_answered_with_the_closest_name(capsys):
    with pytest.raises(ValueError, match="did you mean 'pi0_aloha_sim'"):
        get_config("pi0_aloha_simm")
    with pytest.raises(SystemExit) as exit_:
        cli(["pi0_aloha_simm"])
    assert exit_.value.code == 2
    assert "did you mean 'pi0_aloha_sim' or" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--overwrite", "--resume"], "resume and overwrite are both set"),
        (["--batch-size=3", "--gradient-accumulation-steps=2"], "batch_size=3 is not a multiple"),
        (["--model.dtype=float8"], "dtype='float8'; expected one of 'bfloat16', 'float32'"),
    ],
)
def test_values_that_do_not_go_together_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli(["pi0_libero", *flags])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_missing_attribute_is_answered_with_the_recipes_of_the_file(tmp_path):
    file = tmp_path / "some_recipes_of_mine.py"
    file.write_text("from openpi.training.config import TrainConfig\nfold = TrainConfig(name='fold')\nx = 3\n")
    assert get_config(f"{file}:fold").name == "fold"
    with pytest.raises(ValueError, match=r"no 'flod'; name one of its recipes: .*:fold"):
        get_config(f"{file}:flod")
    with pytest.raises(ValueError, match="is a int; expected a TrainConfig"):
        get_config(f"{file}:x")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        get_config(f"{tmp_path}/nothing.py:fold")


def test_a_recipe_file_in_the_way_of_a_module_is_refused(tmp_path):
    file = tmp_path / "json.py"
    file.write_text("x = 1\n")
    with pytest.raises(ValueError, match="Rename the file"):
        get_config(f"{file}:x")


def test_a_recipe_is_found_by_module(tmp_path, monkeypatch):
    (tmp_path / "recipes_in_a_package").mkdir()
    (tmp_path / "recipes_in_a_package" / "arm.py").write_text(
        "from openpi.training.config import TrainConfig\ndef reach():\n    return TrainConfig(name='reach')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert get_config("recipes_in_a_package.arm:reach").name == "reach"
