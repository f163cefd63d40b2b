"""Features of a LeRobot dataset: what its columns and cameras are."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openpi.data.lerobot.dimension_words import words
from openpi.data.lerobot.meta_values import integer, one_line, shortened, wrong

Feature = dict[str, Any]
"""`{"dtype": "image" | "video" | "string" | "language" | numpy name, "shape": [...], "names": [...] | None, ...}`"""

INDEX_FEATURES: Mapping[str, str] = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""Scalar columns of every LeRobot table. `timestamp` is in seconds from the start of the episode."""

CAMERA_DTYPES = ("image", "video")

_MAX_SIDE_PX = 1 << 14
_MAX_SIZE = 1 << 20  # of one axis
_CHANNELS = 3
_IS_DEPTH = "is_depth_map"  # so since LeRobot 0.6; before with "video." in front
_PICTURE_WORDS = frozenset({"image", "images", "rgb", "depth", "camera", "cam", "pixels"})
# Formats of FFmpeg with a byte order have more than one byte per value; those of 4 to 6 bits each are the exception.
_DEEP_PIXELS = re.compile(r"(?!rgb[45]|bgr[45]).*(le|be)")


def read_features(value: object, where: str) -> dict[str, Feature]:
    """The `features` of meta/info.json, with shapes as lists of integers.

    Raises:
        ValueError: an entry is not what the format says.
    """
    if not isinstance(value, Mapping) or not value:
        raise wrong(where, value, "an object with an entry per feature")
    return {one_line(key, where): _read_feature(feature, f"{where}['{key}']") for key, feature in value.items()}


def _read_feature(value: object, where: str) -> Feature:
    if not isinstance(value, Mapping) or not isinstance(value.get("dtype"), str):
        raise wrong(where, value, "an object with a 'dtype', a text")
    is_camera = value["dtype"] in CAMERA_DTYPES
    shape = value.get("shape")
    if shape is None and not is_camera:  # of scalars by hand, and of newer writers' dtypes, which nobody reads here
        shape = [1]
    if not isinstance(shape, list | tuple):
        raise wrong(f"{where}['shape']", shape, "a list of sizes, such as [7]")
    # A vector of nothing is no column: whoever recorded it had a robot without that part.
    low, high = (1, _MAX_SIDE_PX) if is_camera else (0, _MAX_SIZE)
    sizes = [integer(size, f"{where}['shape']", low, high) for size in shape] or [1]
    feature = {**value, "shape": sizes}
    if (info := value.get("info") or value.get("video_info")) and not isinstance(info, Mapping):
        raise wrong(f"{where}['info']", info, "an object")
    if is_camera:
        feature["shape"] = _of_rgb(sizes, _info(feature))
    for name in listed_names(feature):
        one_line(name, f"{where}['names']")
    return feature


def _of_rgb(shape: list[int], info: Mapping[str, object]) -> list[int]:
    """What is decoded: simulators store RGBA, whose alpha is dropped, and LeRobot's tool for cropping wrote height and
    width alone."""
    if len(shape) == 2 and info.get("video.channels") == _CHANNELS:
        return [*shape, _CHANNELS]
    if len(shape) == 3 and _CHANNELS + 1 in (shape[0], shape[2]):
        return [*shape[:2], _CHANNELS] if shape[2] == _CHANNELS + 1 else [_CHANNELS, *shape[1:]]
    return shape


def dimension_names(feature: Feature) -> tuple[str, ...]:
    """One per dimension of a vector; or its own alone; or a few, of its parts, as Positronic names the signals that one
    is joined from. Empty where the dataset gives none, or more than there are dimensions."""
    names, shape = listed_names(feature), feature.get("shape", ())
    is_vector = len(shape) == 1 and feature.get("dtype") not in CAMERA_DTYPES
    return () if is_vector and len(names) > max(1, shape[0]) else names


def listed_names(feature: Feature) -> tuple[str, ...]:
    """All names of a feature as the dataset lists them.

    They come as a list, as a list in a list, as `{"delta_x": 0, ...}`, or as lists by kind: `{"motors": [...]}`. Of
    several kinds, such as components beside motors, the one that has a name for each dimension counts.
    """
    names = feature.get("names") or ()
    if isinstance(names, Mapping):
        groups = [group for group in names.values() if isinstance(group, list)]
        fitting = [group for group in groups if [len(group)] == feature.get("shape")]
        if not groups and all(type(place) is int for place in names.values()):
            groups = [sorted(names, key=lambda name: names[name])]
        names = fitting[0] if fitting else [name for group in groups for name in group]
    if isinstance(names, str) or not isinstance(names, Sequence):
        return ()
    if len(names) == 1 and isinstance(names[0], list):
        names = names[0]
    return () if None in names else tuple(map(str, names))


def named_alike(feature: Feature) -> tuple[str, ...]:
    """What has to be equal of two features' names: of cameras nothing, whose axes writers call `channel`, `channels`
    or `rgb`, since the layout follows from the shape."""
    return () if feature.get("dtype") in CAMERA_DTYPES else listed_names(feature)


def is_numeric(feature: Feature) -> bool:
    """True for columns of numbers and booleans, which have statistics."""
    return is_tabular(feature) and feature["dtype"] != "string"


def is_tabular(feature: Feature) -> bool:
    """True for features that tables hold and samples carry: numbers, booleans and plain strings."""
    dtype = feature["dtype"]
    return dtype not in CAMERA_DTYPES and _is_known(dtype) and 0 not in feature["shape"]


def _is_known(dtype: str) -> bool:
    if dtype in (*CAMERA_DTYPES, "string"):
        return True
    try:
        return np.dtype(dtype).kind in "fiub"
    except TypeError:  # structured columns of newer writers, such as language annotations
        return False


def unreadable_picture(key: str, feature: Feature) -> str | None:
    """Why a camera, or what looks like one, is not read as 8-bit RGB; None for cameras that are, and for all else."""
    shape = feature["shape"]
    if feature["dtype"] not in CAMERA_DTYPES:
        return _numbers_of_a_picture(key, feature)
    if _is_flagged(feature):
        return "is a depth map, which no policy here reads"
    info = _info(feature)
    pixels = str(info.get("video.pix_fmt") or info.get("pix_fmt") or "")
    if _DEEP_PIXELS.fullmatch(pixels):
        return f"has pixels of more than 8 bits ({pixels}); encode it as 8-bit RGB or yuv420p"
    if len(shape) != 3 or _CHANNELS not in (shape[0], shape[2]):
        return f"has the shape {shape}; expected [height, width, 3] of an RGB camera, not depth or grey"
    if is_depth(key, feature):
        return (
            "is called depth, which is no RGB; if it is a camera of RGB all the same, set 'is_depth_map' to false in "
            "its 'info' in meta/info.json"
        )
    return None


def _numbers_of_a_picture(key: str, feature: Feature) -> str | None:
    """A picture as nested lists of numbers: a hundred times the size, and tables of them do not fit into memory."""
    shape, dtype = feature["shape"], feature["dtype"]
    if not is_tabular(feature) or dtype == "string" or len(shape) not in (2, 3) or min(sorted(shape)[-2:]) < 8:
        return None
    named = {name.lower() for name in dimension_names(feature)}
    is_named = bool({"height", "width"} & named or _PICTURE_WORDS & set(re.split(r"[^a-z]+", key.lower())))
    has_channels = len(shape) == 3 and bool({1, 3, 4} & {shape[0], shape[2]})
    if not is_named and not (has_channels and dtype in ("uint8", "uint16")):
        return None
    if dtype != "uint8" or not has_channels:
        return f"is a picture as numbers of {dtype} {shape}: depth, or of more than 8 bits; cameras are uint8 RGB"
    return (
        f"is a camera stored as nested lists of {dtype} {shape}, which is far too slow to train from; write the "
        "dataset again with dtype 'image' or 'video' (LeRobotWriter takes such arrays)"
    )


def is_depth(key: str, feature: Feature) -> bool:
    """True for cameras of depth: flagged so, or called so where nobody says that they are none.

    Writers before LeRobot 0.6 say of every camera, under `video.is_depth_map`, that it is none.
    """
    return _is_flagged(feature) or ("depth" in words(key) and _info(feature).get(_IS_DEPTH) is not False)


def _is_flagged(feature: Feature) -> bool:
    info = _info(feature)
    return bool(info.get(f"video.{_IS_DEPTH}") or info.get(_IS_DEPTH))


def _info(feature: Feature) -> Feature:
    return feature.get("info") or feature.get("video_info") or {}


def described(feature: Feature) -> str:
    """For messages."""
    return f"{feature['dtype']} {shortened(list(feature['shape']))}"
