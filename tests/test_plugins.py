"""What is not core is found by what is installed, and is told by its package where it is not."""

import dataclasses
from importlib import metadata

import pytest

from openpi.shared import plugins
from openpi.training import data_loader
from openpi.training.config import get_config


@pytest.fixture
def core_alone(monkeypatch):
    """As where none of the packages is installed."""
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints(()))


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
