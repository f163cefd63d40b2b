"""The comparison: the demo's recipe, weights drawn at random instead of the base's. A recipe outside the registry."""

import dataclasses

from openpi.training.config import get_config
from openpi.training.weight_loaders import NoOpWeightLoader

tabletop_place_scratch = dataclasses.replace(
    get_config("tabletop_place"), name="tabletop_place_scratch", weight_loader=NoOpWeightLoader()
)
