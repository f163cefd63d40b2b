"""The table of recipes."""

import dataclasses
import json

import pytest

import paths
from openpi.cli.recipes import configs
from openpi.training.config import RLDSDroidDataConfig, config_names, get_config


def test_every_recipe_has_a_row_that_says_what_it_needs(capsys):
    assert configs.main(["--json"]) == 0
    rows = {row["recipe"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == config_names()
    assert rows["pi0_libero_low_mem_finetune"] == {
        "recipe": "pi0_libero_low_mem_finetune",
        "robot": "libero",
        "model": "pi0",
        "tunes": "LoRA",
        "memory": "23 GB",
        "dataset": "physical-intelligence/libero",
        "weights": "pi0_base",
    }
    assert rows["pi0_fast_droid"]["tunes"] == "-" and rows["tabletop_place"]["memory"] == "any"


def test_a_row_tells_what_a_run_changes_in_the_weights_and_what_a_mixture_is_made_of():
    rows = {row["recipe"]: row for row in configs.table()}
    assert rows["pi05_trossen_transfer_block"]["tunes"] == "part"  # language models frozen, without adapters
    assert rows["pi05_trossen_transfer_block_lora"]["tunes"] == "LoRA"
    mixture = rows["pi05_droid_jointpos_polaris"]
    assert mixture["dataset"] == "RLDS: 0.9 droid + 0.1 polaris_droid_cotrain_dataset"
    assert (mixture["robot"], mixture["tunes"]) == ("droid", "full")


def test_a_text_chooses_rows_and_nothing_found_is_said(capsys, caplog):
    assert configs.main(["UR5"]) == 0
    table, footnote = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in table.splitlines()] == ["recipe", "pi0_ur5"]
    assert "published with the models, not measured here" in footnote
    assert "cannot reach" not in caplog.text  # nothing was looked for on the network
    assert configs.main(["no such robot"]) == 1
    assert "no recipe with 'no such robot'" in capsys.readouterr().err


def test_one_recipe_is_shown_with_what_it_reads_what_the_robot_sends_and_its_note(capsys):
    assert configs.main(["pi0_ur5"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "reads image, wrist_image, joints, gripper, actions, task texts" in shown
    assert "robot sends base_rgb, wrist_rgb, joints [6], gripper [1], prompt" in shown
    assert "steps 30,000 of 32 samples, averaged at 0.99" in shown
    assert get_config("pi0_ur5").note in shown


def test_a_recipe_of_ones_own_is_shown_too_and_a_wrong_reference_is_explained(capsys):
    file = paths.SUPPORT / "tiny_recipe.py"
    assert configs.main([f"{file}:arm"]) == 0
    assert "reads front, joints, actions, task texts" in " ".join(capsys.readouterr().out.split())
    assert configs.main([f"{file}:leg"]) == 1
    told = capsys.readouterr().err
    assert "has no 'leg'; name one of its recipes: " in told and "tiny_recipe.py:fast" in told


def test_a_recipe_whose_data_cannot_be_expanded_is_not_passed_off_as_droid():
    broken = dataclasses.replace(
        get_config("pi05_full_droid_finetune"), data=RLDSDroidDataConfig(repo_id="droid", rlds_data_dir=None)
    )
    with pytest.raises(ValueError, match=r"data\.rlds_data_dir is not set"):
        configs.details(broken)
