"""Images as the policies want them: uint8, and resized with their aspect kept.

The kernel is Pillow's, to the bit, in robot, server and loader alike. `use_kernel("torch")` takes PyTorch's for uint8
images of this process: about five times as fast, and one gray level off in 0.4 % of the values.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Dict, Mapping, Optional

import numpy as np
from PIL import Image

KERNELS = ("exact", "torch")

# Channel counts that PIL can resize as 8-bit images.
_RESIZABLE_CHANNELS = (1, 3, 4)
_RGB = 3
_ROUNDING = 1e-4


def convert_to_uint8(img: np.ndarray) -> np.ndarray:
    """Turns a floating image in [0, 1] into uint8 in [0, 255]; any other dtype is returned as it is.

    Values are truncated, not rounded, because that is what the released policies were trained on.

    Raises:
        ValueError: values outside [0, 1] by more than a rounding error, or NaN.
    """
    if not np.issubdtype(img.dtype, np.floating):
        return img
    scaled = 255 * img
    # What is truncated to 0..255; anything else would wrap around.
    if scaled.size and not (scaled.min() > -1 and scaled.max() < 256):
        raise ValueError(
            f"convert_to_uint8 wants floats in [0, 1], got values from {img.min():g} to {img.max():g}; "
            "images in 0..255 become uint8 by .astype(np.uint8)"
        )
    return scaled.astype(np.uint8)


_kernel = KERNELS[0]
_pool: Optional[ThreadPoolExecutor] = None


def use_kernel(name: str) -> None:
    """Chooses what resizes uint8 images, bilinearly, in this process from now on.

    Raises:
        ValueError: no such kernel.
        ImportError: PyTorch is not installed.
    """
    global _kernel
    if name not in KERNELS:
        raise ValueError("kernel is {!r}; expected one of {}".format(name, ", ".join(KERNELS)))
    if name == "torch":
        import torch  # noqa: F401  # whoever asks for it shall hear now that it is not there
    _kernel = name


def use_threads(count: int) -> None:
    """How many cameras `resize_each` resizes at once in this process from now on; 1 = none beside another."""
    global _pool
    _pool = ThreadPoolExecutor(count, thread_name_prefix="resize") if count > 1 else None


def resize_each(images: Mapping[str, np.ndarray], height: int, width: int) -> Dict[str, np.ndarray]:
    """`resize_with_pad` of several cameras."""
    others = sum(image.shape[-3:-1] != (height, width) and any(image.strides) for image in images.values())
    if _pool is None or others < 2:
        return {key: resize_with_pad(image, height, width) for key, image in images.items()}
    resized = _pool.map(lambda image: resize_with_pad(image, height, width), images.values())
    return dict(zip(images, resized))


def resize_with_pad(images: np.ndarray, height: int, width: int, method: int = Image.Resampling.BILINEAR) -> np.ndarray:
    """Resizes images to `height` x `width` without distortion, centred on black.

    Args:
        images: [..., h, w, c], any number of leading axes: uint8 with c of 1, 3 or 4, or floats in [0, 1] with any c;
            an array of NumPy, or anything that becomes one, such as one of JAX.
        method: a PIL resampling filter.
    Returns:
        [..., height, width, c] of NumPy, of the same dtype; the images themselves when the size already fits.
    Raises:
        ValueError: not channels-last images, another dtype, or floats outside [0, 1].
    """
    images = np.asarray(images)
    if images.ndim >= 3 and images.shape[-3:-1] == (height, width):
        return images
    _check_resizable(images)
    if (
        not any(images.strides) and not images.flat[0]
    ):  # black, without memory behind it: for cameras that are not there
        return np.zeros((*images.shape[:-3], height, width, images.shape[-1]), images.dtype)
    flat = images.reshape(-1, *images.shape[-3:])
    padded = np.zeros((len(flat), height, width, images.shape[-1]), images.dtype)
    for index in range(len(flat)):
        _resize_into(flat[index], padded[index], method)
    return padded.reshape(*images.shape[:-3], *padded.shape[-3:])


def _check_resizable(images: np.ndarray) -> None:
    is_float = np.issubdtype(images.dtype, np.floating)
    if not is_float and images.dtype != np.uint8:
        raise ValueError(
            f"resize_with_pad wants uint8 images, or floats in [0, 1], got {images.dtype}; images in 0..255 become "
            "uint8 by .astype(np.uint8)"
        )
    has_channels = images.ndim >= 3 and images.shape[-1] > 0 and 0 not in images.shape[-3:-1]
    if not has_channels or not (is_float or images.shape[-1] in _RESIZABLE_CHANNELS):
        raise ValueError(
            f"resize_with_pad wants images of shape [..., height, width, channels] with 1, 3 or 4 channels, "
            f"got shape {images.shape}; move the channels last, e.g. np.moveaxis(images, -3, -1)"
        )
    # What is no image in [0, 1] has another black than 0, with which it is filled up. NaN compares as false.
    if is_float and images.size and not (images.min() >= -_ROUNDING and images.max() <= 1 + _ROUNDING):
        raise ValueError(
            f"resize_with_pad wants floats in [0, 1], got values from {images.min():g} to {images.max():g}; images in "
            "[-1, 1] are brought there by (images + 1) / 2, and openpi.shared.image_tools.resize_with_pad takes them"
        )


def _resize_into(source: np.ndarray, target: np.ndarray, method: int) -> None:
    """Resizes `source` [h, w, c] into the centre of `target` [height, width, c], in place."""
    height, width, channels = target.shape
    ratio = max(source.shape[1] / width, source.shape[0] / height)
    # Truncated, as the released policies saw them; a very thin image keeps at least one pixel.
    new_width = max(1, int(source.shape[1] / ratio))
    new_height = max(1, int(source.shape[0] / ratio))
    size, top, left = (new_width, new_height), (height - new_height) // 2, (width - new_width) // 2
    inner = target[top : top + new_height, left : left + new_width]
    if source.dtype != np.uint8:
        for channel in range(channels):  # Pillow has one channel of floats at most
            plane = Image.fromarray(np.ascontiguousarray(source[..., channel], np.float32))
            inner[..., channel] = np.asarray(plane.resize(size, resample=method))
        return
    if _kernel == "torch" and channels == _RGB and method == Image.Resampling.BILINEAR:
        inner[:] = _resized_by_torch(source, new_height, new_width)
    elif channels != _RGB or not source.transpose(2, 0, 1).flags.c_contiguous:  # Pillow weights colors by alpha
        image = Image.fromarray(source[..., 0] if channels == 1 else source)
        inner[:] = np.asarray(image.resize(size, resample=method)).reshape(new_height, new_width, channels)
    else:  # [c, h, w] in memory: Pillow takes planes as they are, and of pixels it would make two copies
        for channel in range(channels):
            inner[..., channel] = np.asarray(_plane(source[..., channel]).resize(size, resample=method))


def _plane(values: np.ndarray) -> Image.Image:
    height, width = values.shape
    return Image.frombuffer("L", (width, height), values, "raw", "L", 0, 1)


def _resized_by_torch(source: np.ndarray, height: int, width: int) -> np.ndarray:
    torch = sys.modules["torch"]
    if min(source.strides) < 0:  # such as image[..., ::-1], which PyTorch has no word for
        source = np.ascontiguousarray(source)
    pixels = torch.from_numpy(np.asarray(_AsWritable(source))).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


class _AsWritable:
    """The same memory, said to be writable: PyTorch warns of any other, and it is only read."""

    def __init__(self, array: np.ndarray):
        interface = dict(array.__array_interface__)
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self._array = array  # which owns the memory
