"""The registered recipes: one robot family a file, each recipe with a note on why its numbers are what they are.

Packages add families by the entry point `openpi.recipes`: family -> a list of `TrainConfig`.
"""

from collections.abc import Iterator, Mapping

from openpi.shared import plugins
from openpi.training.config import TrainConfig
from openpi.training.recipes import (
    aloha,
    calvin,
    debug,
    droid,
    libero,
    polaris,
    roboarena,
    tabletop,
    trossen,
    ur5,
)

_FAMILIES = (aloha, droid, libero, ur5, calvin, tabletop, debug, roboarena, polaris, trossen)


ENTRY_POINTS = "openpi.recipes"


def all_recipes() -> Mapping[str, TrainConfig]:
    """Every registered recipe by name.

    Raises:
        ValueError: two share one.
    """
    by_name: dict[str, TrainConfig] = {}
    for recipe in (*(recipe for family in _FAMILIES for recipe in family.RECIPES), *_installed()):
        if by_name.setdefault(recipe.name, recipe) is not recipe:
            raise ValueError(f"two recipes are called '{recipe.name}'; uninstall the package that brings one of them")
    return by_name


def _installed() -> Iterator[TrainConfig]:
    for family in plugins.names(ENTRY_POINTS):
        yield from plugins.load(ENTRY_POINTS, family)
