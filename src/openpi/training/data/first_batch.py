"""A picture of what the model is fed: the first samples of the first batch, all cameras, with their names."""

import numpy as np

from openpi.shared.tree import Tree

_MARGIN = 4
_CAPTION = 14


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
