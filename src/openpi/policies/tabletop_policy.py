"""The table-top robot: its client keys, and the way from them to the model and back.

Two cameras only: the third image slot of larger models is not filled, so use it with a model whose
`image_keys` are `base_0_rgb` and `left_wrist_0_rgb`.
"""

from dataclasses import dataclass

import numpy as np

ACTION_DIM = 6


def make_tabletop_example() -> dict:
    """A random observation, as a robot client sends it."""
    rng = np.random.default_rng(0)
    return {
        "observation/image": rng.integers(256, size=(64, 64, 3), dtype=np.uint8),
        "observation/wrist_image": rng.integers(256, size=(64, 64, 3), dtype=np.uint8),
        "observation/state": rng.random(ACTION_DIM, dtype=np.float32),
        "prompt": "pick up the red block",
    }


@dataclass(frozen=True)
class TabletopInputs:
    """Client keys, or a dataset repacked to them, to the model's inputs; `actions` and `prompt` pass through.

    Takes images uint8 HWC or float CHW in [0, 1], state float[6].
    """

    def __call__(self, data: dict) -> dict:
        inputs = {
            "state": np.asarray(data["observation/state"]),
            "image": {
                "base_0_rgb": _parse_image(data["observation/image"]),
                "left_wrist_0_rgb": _parse_image(data["observation/wrist_image"]),
            },
            "image_mask": {"base_0_rgb": np.True_, "left_wrist_0_rgb": np.True_},
        }
        return inputs | {key: data[key] for key in ("actions", "prompt") if key in data}


@dataclass(frozen=True)
class TabletopOutputs:
    """Cuts the model's padded actions to float[..., 6]: joint targets in radians, gripper 0 to 1."""

    def __call__(self, data: dict) -> dict:
        return {"actions": np.asarray(data["actions"])[..., :ACTION_DIM]}


def _parse_image(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if np.issubdtype(image.dtype, np.floating):
        image = (255 * image).astype(np.uint8)
    return np.moveaxis(image, 0, -1) if image.shape[0] == 3 else image
