"""The table of recipes."""

import json

from openpi.cli import configs
from openpi.training.config import config_names


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


def test_a_text_chooses_rows_and_nothing_found_is_said(capsys, caplog):
    assert configs.main(["UR5"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["recipe", "pi0_ur5"]
    assert "cannot reach" not in caplog.text  # nothing was looked for on the network
    assert configs.main(["no such robot"]) == 1
    assert "no recipe with 'no such robot'" in capsys.readouterr().err
