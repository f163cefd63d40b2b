"""Pictures of a run: what the model is fed first, and what it says beside what was recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openpi.shared.tree import Tree

_MARGIN, _CAPTION = 4, 14  # of a contact sheet; what follows is of chunks
_WIDTH, _HEIGHT, _GAP, _LEFT, _TOP = 150, 74, 8, 96, 22
_MAX_DIMS, _MAX_FRAMES = 16, 5
_INK, _SOFT, _RECORDED, _PREDICTED = (40, 40, 40), (225, 225, 225), (90, 90, 90), (11, 122, 117)


def contact_sheet(batch: Tree, *, num_samples: int = 5) -> np.ndarray:
    """One row per sample, one column per camera; cameras that are masked out say so.

    Args:
        batch: model-side, with `image` per camera uint8[b h w 3] or f32 in [-1, 1], and `image_mask` bool[b].
    Returns:
        uint8[H W 3], RGB.
    """
    from PIL import Image, ImageDraw

    cameras = {name: _as_uint8(np.asarray(images[:num_samples])) for name, images in batch["image"].items()}
    count, height, width = next(iter(cameras.values())).shape[:3]
    dropped = [name for name, mask in batch["image_mask"].items() if mask is None]
    cameras |= dict.fromkeys(dropped, np.zeros((count, height, width, 3), np.uint8))
    cell_h, cell_w = height + _CAPTION + _MARGIN, max(width, 96) + _MARGIN
    sheet = Image.new("RGB", (cell_w * len(cameras) + _MARGIN, cell_h * count + _MARGIN), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for column, (name, images) in enumerate(cameras.items()):
        for row, image in enumerate(images):
            left, top = _MARGIN + column * cell_w, _MARGIN + row * cell_h
            is_used = name not in dropped and bool(np.asarray(batch["image_mask"][name])[row])
            draw.text((left, top), name if is_used else f"{name} (unused)", fill=(0, 0, 0))
            sheet.paste(Image.fromarray(image), (left, top + _CAPTION))
    return np.asarray(sheet)


def _as_uint8(images: np.ndarray) -> np.ndarray:
    if images.dtype == np.uint8:
        return images
    return np.clip((images + 1) / 2 * 255, 0, 255).round().astype(np.uint8)


def compared(recorded: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """One row per action dimension, one column per frame.

    Args:
        recorded, predicted: float[n ah d], chunks in the robot's units; those that are not finite are not drawn.
        names: of the dimensions.
    Returns:
        uint8[H W 3], RGB: what was recorded in grey, what is predicted in green; a row has one scale.
    """
    from PIL import Image, ImageDraw

    num_dims = recorded.shape[2]
    recorded, predicted = recorded[:_MAX_FRAMES, :, :_MAX_DIMS], predicted[:_MAX_FRAMES, :, :_MAX_DIMS]
    frames, _, dims = recorded.shape
    size = (_LEFT + frames * (_WIDTH + _GAP), _TOP + dims * (_HEIGHT + _GAP))
    sheet = Image.new("RGB", size, (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 4), "recorded", fill=_RECORDED)
    pen.text((_GAP + 70, 4), "predicted", fill=_PREDICTED)
    if num_dims > dims:
        pen.text((_GAP + 150, 4), f"the first {dims} of {num_dims} dimensions", fill=_RECORDED)
    for dim in range(dims):
        top = _TOP + dim * (_HEIGHT + _GAP)
        values = np.concatenate([recorded[..., dim].ravel(), predicted[..., dim].ravel()])
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        pen.text((_GAP, top + _HEIGHT // 2 - 14), _short(names[dim]), fill=_INK)
        pen.text((_GAP, top + _HEIGHT // 2), f"{low:.3g} .. {high:.3g}", fill=_RECORDED)
        for frame in range(frames):
            left = _LEFT + frame * (_WIDTH + _GAP)
            pen.rectangle((left, top, left + _WIDTH, top + _HEIGHT), outline=_SOFT)
            for chunk, color in ((recorded, _RECORDED), (predicted, _PREDICTED)):
                points = _points(chunk[frame, :, dim], (low, high), left, top)
                if len(points) > 1:
                    pen.line(points, fill=color, width=2)
    return np.asarray(sheet)


def _points(values: np.ndarray, scale: tuple[float, float], left: int, top: int) -> list[tuple[float, float]]:
    low, high = scale
    span = high - low if high > low else 1.0
    x = left + 4 + (_WIDTH - 8) * np.arange(len(values)) / max(1, len(values) - 1)
    y = top + _HEIGHT - 5 - (_HEIGHT - 10) * (values - low) / span
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True) if np.isfinite(b)]


def _short(name: str) -> str:
    """Both ends, where joints of one arm differ."""
    return name if len(name) <= 14 else f"{name[:5]}..{name[-7:]}"
