"""Camera images as robots and datasets deliver them -> uint8 RGB, height x width x 3; and telling RGB from BGR.

No image proves its color order, but a camera's images have a cast that a swap breaks.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import numpy as np

from openpi.shared.image_tools import convert_to_uint8
from openpi.shared.tree import flatten

Layout = Literal["hwc", "chw"]

_SAME_ASPECT = 0.02
# Float images that went through a resize may overshoot a little; more means another range.
_RANGE_SLACK = 1e-3
# Grey levels by which the mean red and blue of the training images must differ for a swap to show.
_MIN_COLOR_CAST = 8.0
SIDE = 8  # of a picture, in cells
LONGEST_SIDE = 2**14  # in pixels; a strip of millions takes ten times its memory to resize
_FINE = 4 * SIDE  # pixels each way that cells are made of, about: they are asked for with every request


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
    hwc = image.transpose(1, 2, 0) if layout_of(image, key) == "chw" else image
    return _to_uint8(hwc, key)


def black_like(image: np.ndarray) -> np.ndarray:
    """A black image of the same shape and dtype, for a camera that is not there: a single zero, read-only, which costs
    nothing to make or to resize."""
    return np.broadcast_to(np.zeros((), image.dtype), image.shape)


def has_rgb_shape(array: np.ndarray) -> bool:
    """Whether its shape is that of an RGB image, in either layout."""
    return array.ndim == 3 and 0 not in array.shape and 3 in (array.shape[0], array.shape[-1])


def layout_of(image: np.ndarray, key: str) -> Layout:
    """Where the three channels are.

    Raises:
        ValueError: no RGB image, or a shape that could be either.
    """
    if has_rgb_shape(image) and max(image.shape) > LONGEST_SIDE:
        raise ValueError(f"image '{key}' has shape {image.shape}; expected sides of {LONGEST_SIDE} pixels at most")
    first, last = (image.shape[0] == 3, image.shape[-1] == 3) if has_rgb_shape(image) else (False, False)
    if first and last:
        raise ValueError(
            f"image '{key}' has shape {image.shape}, which could be [3, h, w] or [h, w, 3]; send images of another size"
        )
    if image.ndim == 0 and image.dtype.kind == "S":
        raise ValueError(
            f"image '{key}' is {image.dtype.itemsize} bytes; expected an array, [h, w, 3]. Decode it, or have "
            "WebsocketClientPolicy(jpeg_quality=90) send JPEG; other programs send {'__jpeg__': true, 'data': bytes}"
        )
    if not (first or last):
        raise ValueError(
            f"image '{key}' has shape {image.shape}; expected one RGB image, [h, w, 3] or [3, h, w]. "
            "Drop batch axes and alpha, and repeat a grey channel three times"
        )
    return "chw" if first else "hwc"


def _to_uint8(image: np.ndarray, key: str) -> np.ndarray:
    """Raises ValueError unless the image is uint8, or floats in [0, 1]."""
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(
            f"image '{key}' has dtype {image.dtype}; expected uint8, or floats in [0, 1]. Convert it with "
            ".astype(np.uint8) if its values are 0..255"
        )
    low, high = float(image.min()), float(image.max())
    if not is_unit_range(low, high):
        raise ValueError(
            f"float image '{key}' has values from {low:g} to {high:g}; expected [0, 1], or uint8. Send the "
            "camera's uint8 image as it is, or divide by 255"
        )
    return convert_to_uint8(image)


def is_unit_range(low: float, high: float) -> bool:
    """Whether floats of an image in [0, 1] may lie from `low` to `high`; false for NaN."""
    return low >= -_RANGE_SLACK and high <= 1 + _RANGE_SLACK


@contextlib.contextmanager
def looked_at_once() -> Iterator[None]:
    """Within the block no image changes, and several who ask for the `cells` of one have them made once."""
    token = _made.set({})
    try:
        yield
    finally:
        _made.reset(token)


_made: contextvars.ContextVar[dict[int, tuple[np.ndarray, np.ndarray]] | None] = contextvars.ContextVar(
    "made", default=None
)


def cells(image: np.ndarray) -> np.ndarray:
    """f32[3 SIDE SIDE], red, green and blue of an RGB image in either layout, 0..255; reads about a thousand pixels."""
    if (made := _made.get()) is None:
        return _cells(np.asarray(image))
    if id(image) not in made:
        made[id(image)] = (image, _cells(np.asarray(image)))  # the image, so that its id is no other's
    return made[id(image)][1]


def _cells(image: np.ndarray) -> np.ndarray:
    layout = layout_of(image, "image")
    if not image.flags.c_contiguous:  # pixels are picked by where they lie; only those that may be are put together
        hwc = image.transpose(1, 2, 0) if layout == "chw" else image
        image, layout = np.ascontiguousarray(hwc[:: _step(hwc.shape[0]), :: _step(hwc.shape[1])]), "hwc"
    picked = _to_uint8(image.reshape(-1).take(_pixels(image.shape, layout)), "image")
    return np.add.reduce(picked, axis=0, dtype=np.float32) / len(picked)


@functools.lru_cache(maxsize=32)
def _pixels(shape: tuple[int, int, int], layout: Layout) -> np.ndarray:
    """int[n 3 SIDE SIDE], where the n pixels of each cell lie in a flat image.

    One of fewer than SIDE rows or columns has no cells: its values are repeated.
    """
    height, width = shape[:2] if layout == "hwc" else shape[1:]
    rows, columns = np.arange(0, height, _step(height)), np.arange(0, width, _step(width))
    pixels, channels = rows[:, None, None] * width + columns[:, None], np.arange(3)
    places = 3 * pixels + channels if layout == "hwc" else pixels + channels * height * width
    height, width = len(rows) // SIDE, len(columns) // SIDE
    if not height or not width:
        return np.ascontiguousarray(np.resize(places, (1, SIDE, SIDE, 3)).transpose(0, 3, 1, 2))
    cut = places[: height * SIDE, : width * SIDE].reshape(SIDE, height, SIDE, width, 3)
    return np.ascontiguousarray(cut.transpose(1, 3, 4, 0, 2)).reshape(height * width, 3, SIDE, SIDE)


def _step(pixels: int) -> int:
    return max(1, pixels // _FINE)


def as_in_training(image: np.ndarray, aspect: float) -> np.ndarray:
    """An RGB image in either layout as training saw it, where one of the two was letterboxed, as models and clients do.

    Args:
        aspect: width over height of the images of training; 0 = unknown.
    Returns:
        of a square image that was made of one of that aspect, the part that is not padding; an image of another aspect
        padded, where those of training are squares; else the image.
    """
    layout = layout_of(image, "image")
    height, width = image.shape[:2] if layout == "hwc" else image.shape[1:]
    if not aspect or abs(width / height / aspect - 1) <= _SAME_ASPECT:
        return image
    hwc = image if layout == "hwc" else image.transpose(1, 2, 0)
    if height == width:
        rows, columns = (int(height / aspect), width) if aspect > 1 else (height, int(width * aspect))
        top, left = (height - rows) // 2, (width - columns) // 2
        return hwc[top : top + rows, left : left + columns]
    if abs(aspect - 1) > _SAME_ASPECT:
        return image
    step = _step(max(height, width))
    hwc = hwc[::step, ::step]
    rows, columns = hwc.shape[:2]
    tall, wide = max(0, columns - rows), max(0, rows - columns)
    return np.pad(hwc, ((tall // 2, tall - tall // 2), (wide // 2, wide - wide // 2), (0, 0)))


def aspect_of(image: np.ndarray) -> float:
    """Width over height of an RGB image in either layout."""
    height, width = image.shape[:2] if layout_of(image, "image") == "hwc" else image.shape[1:]
    return width / height


def channel_mean(image: np.ndarray) -> tuple[float, float, float]:
    """Mean of the three channels of an RGB image in either layout, 0..255."""
    red, green, blue = color(cells(image)).tolist()
    return red, green, blue


def color(colored: np.ndarray) -> np.ndarray:
    """f32[... 3], mean red, green and blue of cells."""
    return np.add.reduce(colored.reshape(*colored.shape[:-2], SIDE * SIDE), axis=-1) / SIDE**2


def channel_means(samples: Iterable[Mapping[str, object]]) -> dict[str, tuple[float, float, float]]:
    """Per camera key, the mean over samples of `channel_mean`; what `Contract.camera_means` stores."""
    sums: dict[str, list[tuple[float, float, float]]] = {}
    for sample in samples:
        for key, value in flatten(sample).items():
            if is_picture(value):
                sums.setdefault(key, []).append(channel_mean(value))
    return {key: tuple(np.mean(values, axis=0).tolist()) for key, values in sums.items()}


def is_picture(value: object) -> bool:
    """Whether a value of a dataset is an RGB picture; depth and touch, for example, have other forms."""
    array = np.asarray(value)
    return array.dtype == np.uint8 and has_rgb_shape(array)


def has_cast(training_mean: tuple[float, float, float]) -> bool:
    """Whether the training images of a camera have a cast of color that a swap of red and blue would break."""
    return abs(training_mean[0] - training_mean[2]) >= _MIN_COLOR_CAST


def looks_bgr(mean: tuple[float, float, float], training_mean: tuple[float, float, float]) -> bool:
    """Whether an image's channel means fit clearly better with red and blue swapped.

    Says no where the training images have no color cast: then the means cannot tell.
    """
    if not has_cast(training_mean):
        return False
    found, expected = _cast(mean), _cast(training_mean)
    return 2 * math.dist(found[::-1], expected) < math.dist(found, expected)


def _cast(mean: tuple[float, float, float]) -> list[float]:
    """Brightness taken out: a darker room is no reason for alarm."""
    grey = sum(mean) / 3
    return [value - grey for value in mean]
