"""A short run of a JAX model on stored inputs, for comparing it with another backend; see `openpi.weights.probe`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi.models.model import Observation
from openpi.models.model_config import BaseModelConfig, ModelType
from openpi.weights.probe import nested


def run(config: BaseModelConfig, params: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Actions after two Euler steps, f32[1 ah ad]; of pi0-FAST, the loss of the text, f32[1]."""
    model: Any = config.load(params)
    observation = jax.tree.map(jnp.asarray, Observation.from_dict(nested(inputs)))
    with jax.default_matmul_precision("highest"):
        if config.model_type is ModelType.PI0_FAST:
            empty = jnp.zeros((1, config.action_horizon, config.action_dim))
            found = jax.jit(model.compute_loss)(jax.random.key(0), observation, empty)
        else:
            sample = jax.jit(model.sample_actions, static_argnames="num_steps")
            found = sample(jax.random.key(0), observation, noise=jnp.asarray(inputs["noise"]), num_steps=2)
    return np.asarray(found, np.float32)
