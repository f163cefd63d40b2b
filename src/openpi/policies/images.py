"""Camera images as robots and datasets deliver them -> uint8 RGB, height x width x 3; and telling RGB from BGR.

No image proves its color order, but a camera's images have a cast that a swap breaks.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from openpi.shared.image_tools import convert_to_uint8
from openpi.shared.tree import flatten

Layout = Literal["hwc", "chw"]

# Float images that went through a resize may overshoot a little; more means another range.
_RANGE_SLACK = 1e-3
# Grey levels by which the mean red and blue of the training images must differ for a swap to show.
_MIN_COLOR_CAST = 8.0
# A mean needs no more than every eighth pixel each way, and is asked for with every request.
_STRIDE = 8


def to_uint8_hwc(image: np.ndarray, key: str) -> np.ndarray:
    """One RGB image in the form that the transforms work on.

    Args:
        image: uint8, or floats in [0, 1]; [h, w, 3] or [3, h, w].
        key: its name, for messages.
    Returns:
        uint8[h, w, 3]; floats are scaled by 255 and truncated, as the released policies were trained.
    Raises:
        ValueError: another shape, dtype or range, or a shape that could be either layout.
    """
    image = np.asarray(image)
    layout = layout_of(image, key)
    _check_values(image, key)
    hwc = image.transpose(1, 2, 0) if layout == "chw" else image
    return hwc if hwc.dtype == np.uint8 else convert_to_uint8(hwc)


def black_like(image: np.ndarray) -> np.ndarray:
    """A black image of the same shape and dtype, for a camera that is not there: a single zero, read-only, which costs
    nothing to make or to resize."""
    return np.broadcast_to(np.zeros((), image.dtype), image.shape)


def layout_of(image: np.ndarray, key: str) -> Layout:
    """Where the three channels are.

    Raises:
        ValueError: no RGB image, or a shape that could be either.
    """
    is_image = image.ndim == 3 and 0 not in image.shape
    first, last = (image.shape[0] == 3, image.shape[-1] == 3) if is_image else (False, False)
    if first and last:
        raise ValueError(
            f"image '{key}' has shape {image.shape}, which could be [3, h, w] or [h, w, 3]; send images of another size"
        )
    if not (first or last):
        raise ValueError(
            f"image '{key}' has shape {image.shape}; expected one RGB image, [h, w, 3] or [3, h, w]. "
            "Drop batch axes and alpha, and repeat a grey channel three times"
        )
    return "chw" if first else "hwc"


def _check_values(image: np.ndarray, key: str) -> None:
    """Raises ValueError unless the image is uint8, or floats in [0, 1]."""
    if image.dtype == np.uint8:
        return
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(
            f"image '{key}' has dtype {image.dtype}; expected uint8, or floats in [0, 1]. Convert it with "
            ".astype(np.uint8) if its values are 0..255"
        )
    low, high = float(image.min()), float(image.max())
    if not (low >= -_RANGE_SLACK and high <= 1 + _RANGE_SLACK):
        raise ValueError(
            f"float image '{key}' has values from {low:g} to {high:g}; expected [0, 1], or uint8. Send the "
            "camera's uint8 image as it is, or divide by 255"
        )


def channel_mean(image: np.ndarray) -> tuple[float, float, float]:
    """Mean of the three channels of an RGB image in either layout, 0..255."""
    sparse = to_uint8_hwc(image, "image")[::_STRIDE, ::_STRIDE]
    # Whatever the layout; `mean` copies what does not lie together.
    sums = np.einsum("hwc->c", sparse, dtype=np.int64)
    red, green, blue = (sums / (sparse.shape[0] * sparse.shape[1])).tolist()
    return red, green, blue


def channel_means(samples: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Per camera key, the mean over samples of `channel_mean`; what `Contract.camera_means` stores."""
    sums: dict[str, list[tuple[float, float, float]]] = {}
    for sample in samples:
        for key, value in flatten(sample).items():
            if np.ndim(value) == 3:
                sums.setdefault(key, []).append(channel_mean(value))
    return {key: tuple(np.mean(values, axis=0).tolist()) for key, values in sums.items()}


def looks_bgr(mean: tuple[float, float, float], training_mean: tuple[float, float, float]) -> bool:
    """Whether an image's channel means fit clearly better with red and blue swapped.

    Says no where the training images have no color cast: then the means cannot tell.
    """
    found, expected = np.array(mean), np.array(training_mean)
    if abs(expected[0] - expected[2]) < _MIN_COLOR_CAST:
        return False
    # Brightness is taken out: a darker room is no reason for alarm.
    found, expected = found - found.mean(), expected - expected.mean()
    return bool(2 * np.linalg.norm(found[::-1] - expected) < np.linalg.norm(found - expected))
