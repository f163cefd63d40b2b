"""The registered recipes: one robot family a file, each recipe with a note on why its numbers are what they are."""

from collections.abc import Mapping

from openpi.training.config import TrainConfig
from openpi.training.recipes import (
    aloha,
    calvin,
    debug,
    droid,
    libero,
    polaris,
    positronic,
    roboarena,
    tabletop,
    trossen,
    ur5,
)

_FAMILIES = (aloha, droid, libero, ur5, calvin, tabletop, debug, roboarena, polaris, trossen, positronic)


def all_recipes() -> Mapping[str, TrainConfig]:
    """Every registered recipe by name."""
    recipes = [recipe for family in _FAMILIES for recipe in family.RECIPES]
    by_name = {recipe.name: recipe for recipe in recipes}
    assert len(by_name) == len(recipes), "two recipes share a name"
    return by_name
