"""A user's recipe file with the filters of flax, as in the published `training/config.py`, trained for a step."""

import dataclasses
import tempfile
from typing import TypeAlias

import flax.nnx as nnx
import numpy as np
from scripts import train

import openpi.shared.nnx_utils as nnx_utils
import their_config
from openpi.training import freeze, recipe_io

Filter: TypeAlias = nnx.filterlib.Filter


def only_the_head(path: tuple, value: object) -> bool:
    return path[0] == "action_out_proj"


LANGUAGE = nnx.All(nnx_utils.PathRegex(".*llm.*"), nnx.Not(nnx_utils.PathRegex(".*lora.*")))
FROZEN: dict[str, Filter] = {
    "regex": LANGUAGE,
    "any": nnx.Any(nnx.PathContains("img"), nnx_utils.PathRegex("action_in_proj/.*")),
    "nothing": nnx.Nothing(),
    "types": nnx.All(nnx.Param, nnx.Not(nnx_utils.PathRegex(".*proj.*"))),
    "function": nnx.Not(only_the_head),
}

if __name__ == "__main__":
    base = their_config.get_config("pi0_arm")
    paths = ["PaliGemma/llm/layers/mlp/linear", "PaliGemma/img/embedding/kernel", "action_in_proj/kernel"]
    paths += ["action_out_proj/kernel", "PaliGemma/llm/layers/attn/q_einsum/lora_a"]
    for name, published in FROZEN.items():
        config = dataclasses.replace(base, freeze_filter=published)
        accepts = nnx.filterlib.to_predicate(published)
        for path in paths:
            parts = tuple(path.split("/"))
            assert config.freeze_filter(path) == accepts(parts, nnx.Param(np.zeros(1))), (name, path)
            # And the other way round: ours inside theirs.
            ours = nnx.All(nnx.Param, nnx.Not(config.freeze_filter))
            assert ours(parts, nnx.Param(np.zeros(1))) != config.freeze_filter(path), (name, path)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            base, freeze_filter=LANGUAGE, exp_name="flax", checkpoint_base_dir=folder, num_train_steps=1
        )
        result = train.main(config)
        saved = recipe_io.load_recipe(result.checkpoint).freeze_filter
    assert saved == freeze.All(freeze.PathRegex(".*llm.*"), freeze.Not(freeze.PathRegex(".*lora.*")))
    print("recipes: ok")
