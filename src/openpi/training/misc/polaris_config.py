"""PolaRiS: the recipes of `openpi.training.recipes.polaris`, for a list of one's own."""

from openpi.training.config import TrainConfig
from openpi.training.recipes import polaris


def get_polaris_configs() -> list[TrainConfig]:
    """As registered."""
    return list(polaris.RECIPES)
