"""RoboArena baselines on DROID: the recipes of `openpi.training.recipes.roboarena`, for a list of one's own."""

from openpi.training.config import TrainConfig
from openpi.training.recipes import roboarena


def get_roboarena_configs() -> list[TrainConfig]:
    """As registered."""
    return list(roboarena.RECIPES)
