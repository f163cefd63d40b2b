"""Pictures as robots have them, to uint8[h, w, 3], RGB."""

from typing import Any

import numpy as np
from PIL import Image

# Channels, and which of them are red, green and blue.
_ENCODINGS = {"rgb8": (3, (0, 1, 2)), "bgr8": (3, (2, 1, 0)), "rgba8": (4, (0, 1, 2)), "bgra8": (4, (2, 1, 0))}


def bgr_to_rgb(picture: np.ndarray) -> np.ndarray:
    """uint8[h, w, 3 or 4], blue first (as OpenCV and ZED give it), -> uint8[h, w, 3], red first; a new array."""
    return np.ascontiguousarray(picture[..., 2::-1])


def of_ros(message: Any) -> np.ndarray:
    """A `sensor_msgs/Image`, or the first picture of an `aloha/RGBGrayscaleImage` (the second is depth).

    Raises:
        ValueError: its encoding is not known.
    """
    message = message.images[0] if hasattr(message, "images") else message
    if message.encoding not in _ENCODINGS:
        raise ValueError(f"a picture has the encoding {message.encoding!r}; expected {', '.join(_ENCODINGS)}")
    channels, order = _ENCODINGS[message.encoding]
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    return rows[:, : message.width * channels].reshape(message.height, message.width, channels)[..., list(order)]


def stretched(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resized without keeping its aspect."""
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))


def chw(picture: np.ndarray) -> np.ndarray:
    """[h, w, 3] -> [3, h, w], a new array."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1))
