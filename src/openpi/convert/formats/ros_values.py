"""From a message of ROS to numbers with names, a time, or a picture. Only fields of messages are looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from openpi.convert.formats.ros_bag_file import Message
from openpi.convert.formats.ros_mapping import Part
from openpi.convert.sampling import NS_PER_S
from openpi.data.images import decode_image
from openpi.shared.errors import listed

_MAX_NUMBERS = 10_000  # of one message; more is no vector but a picture or a cloud
# Channels of a picture, in the order of red, green and blue.
_ENCODINGS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
}


def numbers(message: Message, part: Part, joints: Sequence[str], where: str) -> dict[str, float]:
    """The numbers of a part by name; empty for a message about other joints than those that the part names.

    Args:
        joints: what a JointState calls its values; empty for other messages.
    Raises:
        ValueError: no such field, or no numbers there.
    """
    found = list(_flat(_at(message, part.field, where), part.field))
    if not 0 < len(found) <= _MAX_NUMBERS:
        raise ValueError(f"{where}: {len(found)} numbers in '{part.field}'; expected 1 to {_MAX_NUMBERS}")
    if len(joints) == len(found):
        found = [(name, number) for name, (_, number) in zip(joints, found, strict=True)]
    told = dict(found)
    if len(told) != len(found):
        raise ValueError(f"{where}: two values have one name: {listed(name for name, _ in found)}")
    if not part.names or not any(name in told for name in part.names):
        return {} if part.names else told
    if absent := [name for name in part.names if name not in told]:
        raise ValueError(f"{where}: no joint {listed(absent)}; it has {listed(told)}")
    return {name: told[name] for name in part.names}


def _at(message: Message, path: str, where: str) -> object:
    value = message
    for step in (step for step in path.split(".") if step):
        if isinstance(value, list | np.ndarray) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        elif step in _fields(value):
            value = getattr(value, step)
        else:
            raise ValueError(f"{where}: no '{step}' of the field '{path}'; there is {listed(_fields(value))}")
    return value


def _flat(value: object, path: str) -> Iterator[tuple[str, float]]:
    """All numbers of a value with their paths; headers and texts are none."""
    if isinstance(value, bool | int | float | np.generic):
        yield path, float(value)
    elif isinstance(value, np.ndarray):
        yield from ((f"{path}.{i}" if len(value) > 1 else path, float(number)) for i, number in enumerate(value))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _flat(item, f"{path}.{number}")
    else:
        for name in _fields(value):
            if name != "header":
                yield from _flat(getattr(value, name), f"{path}.{name}" if path else name)


def _fields(value: object) -> list[str]:
    """Of a message; the only attributes that a mapping may name."""
    return [name for name in getattr(type(value), "__dataclass_fields__", {}) if not name.startswith("_")]


def stamp_ns(message: Message, where: str) -> int:
    """Of its header."""
    header = getattr(message, "header", None)
    if header is None:
        raise ValueError(f"{where}: messages of this kind have no header; use the clock 'bag' in the mapping")
    return int(header.stamp.sec) * NS_PER_S + int(header.stamp.nanosec)


def picture(message: Message, kind: str, where: str) -> np.ndarray:
    """uint8[h w 3], RGB."""
    if kind.endswith("CompressedImage"):
        if "compresseddepth" in str(message.format).lower():
            raise ValueError(f"{where}: a depth map ({message.format}), which is no camera")
        return decode_image(bytes(message.data), where)
    if message.encoding not in _ENCODINGS:
        raise ValueError(f"{where}: pixels are {message.encoding!r}; expected one of {listed(_ENCODINGS)}")
    channels, order = _ENCODINGS[message.encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    if not 0 < width * channels <= step or height * step != len(message.data):
        raise ValueError(f"{where}: {len(message.data)} bytes for {height} rows of {step}, {width} pixels wide")
    rows = np.frombuffer(message.data, np.uint8).reshape(height, step)[:, : width * channels]
    return np.ascontiguousarray(rows.reshape(height, width, channels)[:, :, order])
