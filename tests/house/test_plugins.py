"""What is not core is found by what is installed, and is told by its package where it is not."""

import dataclasses
import importlib.util
import json
import shutil
from importlib import metadata

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from openpi.cli import main
from openpi.envs import world
from openpi.serving import protocols
from openpi.shared import download, plugins
from openpi.training import config, data_loader
from openpi.training.config import TrainConfig, get_config
from openpi.training.recipe import table as recipe_table
from openpi.training.recipe_io import load_recipe, save_recipe
from serving_live import TestPolicy, server_thread


@pytest.fixture
def core_alone(monkeypatch):
    """As where none of the packages is installed."""
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints(()))
    known = (config._registered, recipe_table._table)
    for each in known:
        each.cache_clear()
    yield
    for each in known:
        each.cache_clear()


def test_a_recipe_whose_data_nobody_can_read_here_says_what_to_install(core_alone):
    recipe = get_config("pi05_full_droid_finetune")
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, rlds_data_dir="/somewhere"))
    with pytest.raises(ImportError, match=r"'droid_rlds' .* package openpi-rlds.*`pip install ./packages/openpi-rlds`"):
        data_loader.create_batch_loader(recipe, skip_norm_stats=True)


def test_two_packages_that_bring_the_same_name_are_not_chosen_between(monkeypatch):
    points = [metadata.EntryPoint("droid_rlds", f"{name}:Stream", "openpi.streams") for name in ("one", "other")]
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints(points))
    with pytest.raises(ValueError, match="both one:Stream and other:Stream; uninstall one"):
        plugins.load("openpi.streams", "droid_rlds")


def test_what_no_package_brings_is_not_promised():
    with pytest.raises(ImportError, match=r"'no_such_format' of openpi\.streams is not installed$"):
        plugins.load("openpi.streams", "no_such_format")


def test_a_command_of_a_package_is_one_of_openpi_or_says_what_to_install(core_alone, capsys):
    assert main.main(["demo"]) == 2
    assert "unknown command 'demo'; it is in the package openpi-demo" in capsys.readouterr().err


def test_a_command_of_a_package_that_is_broken_takes_no_other_with_it(monkeypatch, capsys):
    broken = metadata.EntryPoint("paint", "no_such_package.paint", "openpi.commands")
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints([broken]))
    assert main.main(["--help"]) == 0
    assert "paint              (cannot be loaded: ModuleNotFoundError: No module named" in capsys.readouterr().out


def test_a_world_of_a_package_that_is_missing_says_what_to_install(core_alone):
    with pytest.raises(ValueError, match=r"the world is 'aloha'; .*it is in the package openpi-sim"):
        world.find("aloha")


def test_old_names_of_modules_that_moved_are_the_modules_themselves():
    import openpi.envs.tabletop.world as old
    from openpi.envs.tabletop import PICK

    import openpi_demo.tabletop.world as new
    from openpi_demo import tabletop

    assert old is new
    assert new.__spec__.name == "openpi_demo.tabletop.world"
    assert PICK is tabletop.PICK
    with pytest.raises(ModuleNotFoundError, match=r"openpi_demo\.tabletop\.nothing"):
        importlib.import_module("openpi.envs.tabletop.nothing")


def test_old_names_of_modules_of_a_package_that_is_missing_say_what_to_install(core_alone):
    with pytest.raises(ModuleNotFoundError, match=r"named 'openpi\.demo'; it is in the package openpi-demo"):
        importlib.util.find_spec("openpi.demo.plan")


def test_resources_keep_the_names_that_checkpoints_say(monkeypatch):
    assert (download.maybe_download("package:openpi.demo/base") / "recipe.json").is_file()
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints(()))
    with pytest.raises(FileNotFoundError, match=r"'openpi\.demo', which is not installed; it is .* openpi-demo"):
        download.maybe_download("package:openpi.demo/base")


def test_a_checkpoint_that_names_what_is_missing_says_what_to_install(core_alone, tmp_path, golden):
    shutil.copy(golden / "recipes_v1" / "pi05_positronic_lowmem.json", tmp_path / "recipe.json")
    with pytest.raises(ValueError, match=r"LeRobotPositronicDataConfig', which is not installed; .* openpi-positronic"):
        load_recipe(tmp_path)
    file = save_recipe(tmp_path, TrainConfig(name="x"))
    document = json.loads(file.read_text())
    document["config"]["policy_metadata"] = {"codec": {"$type": "codec.Timing", "fps": 15.0}}
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"'codec\.Timing', which is not installed; .* openpi-positronic"):
        load_recipe(tmp_path)


def test_a_recipe_and_a_format_of_a_package_that_is_missing_say_what_to_install(core_alone, capsys):
    with pytest.raises(ValueError, match=r"'pi05_positronic_lowmem' not found.* in the package openpi-positronic"):
        get_config("pi05_positronic_lowmem")
    assert main.main(["convert", "positronic", "a", "b"]) == 2
    assert "'positronic' is not installed; it is in the package openpi-positronic" in capsys.readouterr().err


def test_a_protocol_that_is_missing_is_not_answered_in_another(core_alone):
    with server_thread(TestPolicy) as (_, port), pytest.raises(InvalidStatus, match="404"):
        connect(f"ws://127.0.0.1:{port}/api/v1/session")
    with pytest.raises(ValueError, match=r"--codec is ee, and no protocol .* openpi-positronic"):
        protocols.installed("ee")
