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
    shape = value.get("shape")
    if shape is None and not _is_known(value["dtype"]):  # of newer writers; nobody reads it here
        shape = [1]
    if not isinstance(shape, list | tuple):
        raise wrong(f"{where}['shape']", shape, "a list of sizes, such as [7]")
    largest = _MAX_SIDE_PX if value["dtype"] in CAMERA_DTYPES else _MAX_SIZE
    sizes = [integer(size, f"{where}['shape']", 1, largest) for size in shape] or [1]
    feature = {**value, "shape": sizes}
    if (info := value.get("info") or value.get("video_info")) and not isinstance(info, Mapping):
        raise wrong(f"{where}['info']", info, "an object")
    _check_names(feature, where)
    return feature


def _check_names(feature: Feature, where: str) -> None:
    """One name per dimension of a vector; a single one is the vector's own, and a few are of its parts: Positronic
    names the signals that a vector is joined from."""
    names, shape = dimension_names(feature), feature["shape"]
    for each in names:
        one_line(each, f"{where}['names']")
    if len(shape) == 1 and feature["dtype"] not in (*CAMERA_DTYPES, "string") and len(names) > max(1, shape[0]):
        raise wrong(
            f"{where}['names']",
            list(names),
            f"{shape[0]} of them at most, one per dimension of shape {shape}",
            "Correct the names, or set them to null",
        )


def dimension_names(feature: Mapping[str, object]) -> tuple[str, ...]:
    """As the dataset gives them, a list or a list per kind, as in `{"motors": [...]}`; empty where it gives none."""
    names = feature.get("names") or ()
    if isinstance(names, Mapping):
        names = [name for group in names.values() if isinstance(group, list) for name in group]
    return tuple(str(name) for name in names) if isinstance(names, Sequence) and not isinstance(names, str) else ()


def is_numeric(feature: Feature) -> bool:
    """True for columns of numbers and booleans, which have statistics."""
    return is_tabular(feature) and feature["dtype"] != "string"


def is_tabular(feature: Feature) -> bool:
    """True for features that tables hold and samples carry: numbers, booleans and plain strings."""
    dtype = feature["dtype"]
    return dtype not in CAMERA_DTYPES and _is_known(dtype)


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
