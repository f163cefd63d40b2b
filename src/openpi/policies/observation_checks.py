"""Whether the values of one observation are what a spec says: an image, a vector, the prompt. What a robot sends is
refused here with what was found, what was expected, and the fix.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from openpi.policies.images import layout_of
from openpi.policies.robot_spec import CameraSpec, VectorSpec
from openpi.shared.errors import listed

_TOO_LARGE = np.float64(2.0**128 - 2.0**103)  # what float32 rounds to infinity, from here on
_LONGEST_PROMPT = 2**14  # characters: a tokenizer takes seconds for a million, whichever way they came
_LARGEST_ITEM_BYTES = 8  # models take no long doubles, and one would spoil the batch of others


def as_array(value: object, key: str) -> np.ndarray:
    """Raises ValueError for lists that are none."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"'{key}' has lists of different lengths; expected an array: np.asarray(...)") from error


def check_image(camera: CameraSpec, image: np.ndarray) -> None:
    """Raises ValueError unless it has the layout, the size and the dtype of the camera."""
    layout = layout_of(image, camera.key)
    if camera.layout not in ("any", layout):
        axes = {"hwc": "[h, w, 3]", "chw": "[3, h, w]"}
        raise ValueError(
            f"image '{camera.key}' has shape {image.shape}, layout {axes[layout]}; expected "
            f"{axes[camera.layout]}. Transpose it on the client"
        )
    size = image.shape[:2] if layout == "hwc" else image.shape[1:]
    if camera.shape is not None and size != tuple(camera.shape):
        raise ValueError(
            f"image '{camera.key}' is {size[0]} x {size[1]}; expected {camera.shape[0]} x {camera.shape[1]} "
            "(height x width). Resize it on the client with resize_with_pad"
        )
    if image.dtype != np.uint8:
        raise ValueError(_not_uint8(image, camera.key))


def _not_uint8(image: np.ndarray, key: str) -> str:
    """Why an image of another dtype is refused, floats in [0, 1] included: the transforms take those because datasets
    hold them, but from a robot they are four times the bytes, and a dark image in 0..255 passes for one in [0, 1].
    """
    if image.dtype.kind not in "fiub":
        return f"image '{key}' has dtype {image.dtype}; expected uint8 in 0..255. Send the camera's image as it is"
    low, high = float(image.min()), float(image.max())
    fix = "image_tools.convert_to_uint8(image)" if image.dtype.kind == "f" and high <= 1 else "image.astype(np.uint8)"
    return (
        f"image '{key}' has dtype {image.dtype} and values from {low:g} to {high:g}; expected uint8 in 0..255. Send "
        f"the camera's image as it is, or convert it with {fix}"
    )


def check_prompt(prompt: object) -> None:
    """Raises ValueError unless it is one text that a tokenizer can read, and that is not a book."""
    values = as_array(prompt, "prompt")
    if isinstance(prompt, (list, tuple)) or values.dtype.kind not in "USO":
        raise ValueError(f"'prompt' is of type {type(prompt).__name__}; expected text: the task in words")
    if values.size != 1:
        raise ValueError(f"'prompt' has {values.size} texts; expected one, for one observation")
    try:
        text = values.item()
        text = text.decode() if isinstance(text, bytes) else str(text)
        text.encode()
    except (UnicodeError, SystemError, ValueError) as error:  # NumPy makes text of any numbers
        raise ValueError("'prompt' holds characters that there are not; expected text in UTF-8") from error
    if len(text) > _LONGEST_PROMPT:
        raise ValueError(f"'prompt' has {len(text)} characters; expected {_LONGEST_PROMPT} at most: the task in words")


def check_vector(vector: VectorSpec, leaves: Mapping[str, object]) -> None:
    """Raises ValueError unless it is there, as wide as the spec says, of finite numbers."""
    if vector.key not in leaves:
        raise ValueError(
            f"observation is missing '{vector.key}' (found: {listed(leaves)}); expected {vector.width} "
            f"values: {', '.join(vector.names)}. Rename the key on the client; in a dataset, by the repack transform"
        )
    values = as_array(leaves[vector.key], vector.key)
    if values.dtype.kind not in "fiub" or values.dtype.itemsize > _LARGEST_ITEM_BYTES:
        raise ValueError(f"'{vector.key}' has dtype {values.dtype}; expected numbers, such as float32")
    if values.size == vector.width and values.ndim > 1:
        raise ValueError(
            f"'{vector.key}' has shape {values.shape}; expected ({vector.width},), one observation without a batch "
            "axis. Send it as values.reshape(-1)"
        )
    if values.size != vector.width:
        raise ValueError(
            f"'{vector.key}' has shape {values.shape}; expected ({vector.width},): "
            f"{', '.join(vector.names)}. Is this the checkpoint of another robot?"
        )
    finite = is_finite(values)
    if not finite.all():
        bad = [vector.names[i] for i in np.flatnonzero(~finite)]
        raise ValueError(
            f"'{vector.key}' has NaN or infinity in {', '.join(bad)}; expected numbers that are finite in float32"
        )


def is_finite(values: np.ndarray) -> np.ndarray:
    """bool, of the shape of `values`: finite as float32, which models compute with and most robots read."""
    return np.abs(values) < _TOO_LARGE


def first_not_finite(values: np.ndarray) -> list[int] | None:
    """Where the first value is that is not finite as float32; None = all are. A list of all such places would be many
    times as large as what was sent: 10 MB of NaN with 32 axes made one of 1.3 GB.
    """
    finite = is_finite(values)
    if finite.all():
        return None
    return [int(place) for place in np.unravel_index(np.argmin(finite), finite.shape)]
