"""A robot's policy file, as users add one beside `aloha_policy.py`: an example, and what goes in and comes out."""

import dataclasses

import einops
import numpy as np

from openpi import transforms
from openpi.models import model as _model


def make_arm_example() -> dict:
    """What the robot's client sends."""
    return {
        "arm/camera": np.random.randint(256, size=(32, 32, 3), dtype=np.uint8),
        "arm/joints": np.random.rand(3),
        "prompt": "pick up the cube",
    }


def _parse_image(image) -> np.ndarray:
    image = np.asarray(image)
    if np.issubdtype(image.dtype, np.floating):
        image = (255 * image).astype(np.uint8)
    return einops.rearrange(image, "c h w -> h w c") if image.shape[0] == 3 else image


@dataclasses.dataclass(frozen=True)
class ArmInputs(transforms.DataTransformFn):
    model_type: _model.ModelType = _model.ModelType.PI0

    def __call__(self, data: dict) -> dict:
        inputs = {
            "image": {"base_0_rgb": _parse_image(data["arm/camera"])},
            "image_mask": {"base_0_rgb": np.True_},
            "state": np.asarray(data["arm/joints"], np.float32),
        }
        for key in ("actions", "prompt"):
            if key in data:
                inputs[key] = data[key]
        return inputs


@dataclasses.dataclass(frozen=True)
class ArmOutputs(transforms.DataTransformFn):
    def __call__(self, data: dict) -> dict:
        return {"actions": np.asarray(data["actions"][:, :3])}
