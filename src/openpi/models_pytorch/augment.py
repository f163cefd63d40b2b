"""Image augmentation while training, on the device. Source: the model specification, section 2.4.

The same distortions as `openpi.models.augment`, which has them from a library; here random numbers are arguments, so
that equal draws give equal images in both backends.

Legend: b batch, h w height and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

CROP_FRACTION = 0.95
MAX_ROTATION_DEG = 5
PROBABILITY = 0.5  # of a sample's colours being changed at all
BRIGHTNESS, CONTRAST, HUE = 0.3, 0.4, 0.1


class Jitter(NamedTuple):
    """Change of colours: `is_applied` bool[b]; brightness, contrast and hue f32[b]."""

    is_applied: Bool[Tensor, " b"]
    brightness: Float[Tensor, " b"]
    contrast: Float[Tensor, " b"]
    hue: Float[Tensor, " b"]

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int) -> Self:
        amounts = (rng.uniform(-top, top, count) for top in (BRIGHTNESS, CONTRAST, HUE))
        return cls(torch.as_tensor(rng.random(count) < PROBABILITY), *(_f32(amount) for amount in amounts))


class Draws(NamedTuple):
    """The random numbers of a batch. Cameras of one kind share them, as in the published models.

    Attributes:
        crop: f32[b 2], where the crop lies between the top-left (-1, -1) and the bottom-right (1, 1), as (y, x).
        angle: f32[b] in radians.
        scene, wrist: jitter of the cameras that are not on the wrist, and of those that are.
    """

    crop: Float[Tensor, "b 2"]
    angle: Float[Tensor, " b"]
    scene: Jitter
    wrist: Jitter

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int) -> Self:
        top = math.radians(MAX_ROTATION_DEG)
        crop, angle = rng.uniform(-1, 1, (count, 2)), rng.uniform(-top, top, count)
        return cls(_f32(crop), _f32(angle), Jitter.draw(rng, count), Jitter.draw(rng, count))

    def map(self, function: Callable[[Tensor], Tensor]) -> Draws:
        """`function` of every tensor."""
        scene, wrist = (Jitter(*map(function, part)) for part in (self.scene, self.wrist))
        return Draws(function(self.crop), function(self.angle), scene, wrist)


def augment_images(draws: Draws, images: dict[str, Float[Tensor, "b h w 3"]]) -> dict[str, Float[Tensor, "b h w 3"]]:
    """Augments each sample of each camera.

    Args:
        images: f32 in [-1, 1]. A wrist camera (its name says so) keeps its geometry.
    Returns:
        New images; colour jitter may leave [-1, 1] slightly.
    """
    out = {}
    for key, batch in images.items():
        x = batch / 2 + 0.5
        if "wrist" in key:
            x = change_colours(draws.wrist, x)
        else:
            x = change_colours(draws.scene, crop_and_rotate(x, draws.crop, draws.angle))
        out[key] = x * 2 - 1
    return out


def crop_and_rotate(
    images: Float[Tensor, "b h w 3"], crop: Float[Tensor, "b 2"], angle: Float[Tensor, " b"]
) -> Float[Tensor, "b h w 3"]:
    """A crop, enlarged to the whole again, and rotated: one bilinear look-up, black outside."""
    sizes = images.shape[1:3]
    rows, columns = (torch.arange(n, device=images.device) - (n / 2 - 0.5) for n in sizes)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    sin, cos = torch.sin(angle)[:, None, None], torch.cos(angle)[:, None, None]
    rotated = (y * cos + x * sin, x * cos - y * sin)  # of each pixel, where it comes from

    def looked_up(axis: int) -> Float[Tensor, "b h w"]:
        """In [-1, 1]. With numbers of Python: a tensor made of them would keep the host waiting for the device."""
        size = sizes[axis]
        cropped = int(CROP_FRACTION * size)
        offset = crop[:, axis, None, None] * (size - cropped) / 2
        source = rotated[axis] * (cropped / size) + offset + (size / 2 - 0.5)
        return source * 2 / (size - 1) - 1

    grid = torch.stack([looked_up(1), looked_up(0)], dim=-1)
    planes = images.movedim(-1, 1)
    return F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=True).movedim(1, -1)


def change_colours(jitter: Jitter, images: Float[Tensor, "b h w 3"]) -> Float[Tensor, "b h w 3"]:
    """Brightness, contrast and hue, in HSV, of the samples that it is applied to. Images are in [0, 1]."""
    is_applied, brightness, contrast, hue_shift = (part[:, None, None] for part in jitter)
    hue, saturation, value = to_hsv(images)
    value = torch.where(brightness < 0, value * (1 + brightness), value * (1 - brightness) + brightness)
    changed = to_rgb(hue + hue_shift, saturation, change_contrast(value, contrast))
    return torch.where(is_applied[..., None], changed, images)


def change_contrast(value: Tensor, amount: Tensor) -> Tensor:
    """A curve of three straight pieces: steep in the middle for positive amounts, flat for negative ones."""
    slope = torch.tan((amount + 1) * (math.pi / 4))
    knee = slope / (2 * (1 + slope))
    low, middle, high = value / slope, slope * (value - 0.5) + 0.5, value / slope + 1 - 1 / slope
    return torch.where(value < knee, low, torch.where(value > 1 - knee, high, middle))


def to_hsv(images: Float[Tensor, "*b 3"]) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in turns, saturation, value."""
    value, largest = images.max(dim=-1)
    spread = value - images.min(dim=-1).values
    following, last = (images.gather(-1, ((largest + i) % 3)[..., None])[..., 0] for i in (1, 2))
    safe = torch.where(spread == 0, 1, spread)
    hue = torch.where(spread == 0, 0, (2 * largest + (following - last) / safe) / 6)
    saturation = torch.where(value == 0, 0, spread / torch.where(value == 0, 1, value))
    return hue, saturation, value


def to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Float[Tensor, "*b 3"]:
    """Inverse of `to_hsv`."""
    k = torch.stack([first + hue * 6 for first in (5.0, 3.0, 1.0)], dim=-1) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * ramp)


def _f32(values: np.ndarray) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32)
