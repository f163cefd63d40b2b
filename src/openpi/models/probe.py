"""A short run of a JAX model on stored inputs, for comparing it with another backend; see `openpi.weights.probe`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi.models.model import Observation
from openpi.models.model_config import BaseModelConfig, ModelType
from openpi.weights.probe import nested


def run(config: BaseModelConfig, params: Mapping[str, object], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Actions after two Euler steps, f32[1 ah ad]; of pi0-FAST, the loss of the text, f32[1]."""
    model: Any = config.load(params)
    observation = jax.tree.map(jnp.asarray, Observation.from_dict(nested(inputs)))
    with jax.default_matmul_precision("highest"):
        # The model is an argument: parameters that a program closes over are copied into it.
        found = jax.jit(_run)(model, observation, jnp.asarray(inputs["noise"]))
    return np.asarray(found, np.float32)


def _run(model: Any, observation: Observation, noise: jax.Array) -> jax.Array:
    if model.config.model_type is ModelType.PI0_FAST:
        return model.compute_loss(jax.random.key(0), observation, jnp.zeros_like(noise))
    return model.sample_actions(jax.random.key(0), observation, noise=noise, num_steps=2)
