"""A short run of a PyTorch model on stored inputs, to compare it with another backend; see `openpi.weights.probe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from openpi.models.model_config import BaseModelConfig, ModelType
from openpi.models_pytorch import loading
from openpi.models_pytorch.model import Observation
from openpi.weights.probe import nested


@torch.no_grad()
def run(config: BaseModelConfig, params: Mapping[str, object], inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Actions after two Euler steps, f32[1 ah ad]; of pi0-FAST, the loss of the text, f32[1]."""
    model: Any = loading.from_tree(config, params)
    observation = Observation.from_dict(nested(inputs))
    if config.model_type is ModelType.PI0_FAST:
        return model(observation).numpy()
    return model.sample_actions(observation, torch.as_tensor(inputs["noise"]), num_steps=2).numpy()
