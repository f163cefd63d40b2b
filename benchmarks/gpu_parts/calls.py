"""The whole policy call around a model: a recipe's transforms, and an observation for them."""

import dataclasses
from typing import Any

import numpy as np

from gpu_parts.sizes import TOKENIZER, Shape
from openpi import transforms
from openpi.policies.policy import Policy
from openpi.policies.policy_config import Pipeline, make_pipeline
from openpi.shared.normalize import NormStats
from openpi.training.config import get_config


def pipeline_of(shape: Shape) -> Pipeline:
    """The recipe's, with statistics of a unit range."""
    recipe = get_config(shape.recipe)
    model = dataclasses.replace(shape.model, tokenizer_path=str(TOKENIZER))
    data = recipe.data.create(recipe.assets_dirs, model)
    widths = {"state": shape.state_dim, "actions": shape.action_dim}
    return make_pipeline(dataclasses.replace(data, norm_stats={key: _unit(width) for key, width in widths.items()}))


def _unit(width: int) -> NormStats:
    return NormStats(mean=np.zeros(width), std=np.ones(width), q01=np.full(width, -2.0), q99=np.full(width, 2.0))


def observation_for(shape: Shape, pipeline: Pipeline) -> dict:
    """What the robot sends; with a prompt just short of being cut, where the shape says so."""
    observation = {**shape.example(), "prompt": "stack the cups"}
    if not shape.fills_prompt:
        return observation
    to_model = transforms.compose(pipeline.inputs)
    while to_model({**observation})["tokenized_prompt_mask"].sum() <= shape.model.max_token_len - 8:
        observation["prompt"] += " up"
    return observation


def policy_of(sampler: Any, pipeline: Pipeline) -> Policy:
    return Policy(sampler, transforms=pipeline.inputs, output_transforms=pipeline.outputs)


def batch_of(pipeline: Pipeline, observation: dict) -> dict[str, Any]:
    """The observation as the sampler gets it."""
    inputs = transforms.compose(pipeline.inputs)(observation)
    return {
        key: {name: np.asarray(item)[None] for name, item in value.items()}
        if isinstance(value, dict)
        else np.asarray(value)[None]
        for key, value in inputs.items()
    }
