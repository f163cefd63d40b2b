"""Do these features fit the format, and does this episode fit its features? Asked before anything is
written."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from openpi.data.lerobot.annotations import is_annotation, to_language
from openpi.data.lerobot.features import CAMERA_DTYPES, INDEX_FEATURES, Feature


@dataclass(frozen=True)
class FrameStream:
    """The frames of a camera, one after the other, uint8 RGB [h, w, 3]; how many there are is known."""

    length: int
    frames: Iterable[np.ndarray]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.frames)


def complete_features(features: Mapping[str, Feature], use_videos: bool) -> dict[str, Feature]:
    complete: dict[str, Feature] = {}
    for key, feature in features.items():
        if key in INDEX_FEATURES:
            continue
        _check_feature(key, feature)
        dtype = "video" if use_videos and feature["dtype"] == "image" else feature["dtype"]
        complete[key] = {**feature, "dtype": dtype, "shape": list(feature["shape"])}
        complete[key].setdefault("names", None)
    return complete | {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in INDEX_FEATURES.items()}


def check_episode(
    frames: Mapping[str, np.ndarray | FrameStream], features: Mapping[str, Feature]
) -> tuple[dict[str, np.ndarray | FrameStream], int]:
    """Frames that fit the features, cameras [n, h, w, 3], and n. Frames of streams are checked as they come."""
    expected = features.keys() - INDEX_FEATURES.keys()
    given = frames.keys() - INDEX_FEATURES.keys()
    if expected != given:
        raise KeyError(
            f"an episode has the features {sorted(expected)}; missing are {sorted(expected - given)}, "
            f"unknown are {sorted(given - expected)}"
        )
    checked = {key: _check_values(key, frames[key], features[key]) for key in expected}
    lengths = {key: len(values) for key, values in checked.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"all features of an episode need the same number of frames, above 0; found {lengths}")
    return checked, next(iter(lengths.values()))


def size_hw(feature: Feature) -> tuple[int, int]:
    """Height and width of a camera; the layout follows from where the 3 channels are."""
    first, second, third = feature["shape"]
    return (first, second) if third == 3 else (second, third)


def _check_feature(key: str, feature: Feature) -> None:
    if "/" in key:
        raise ValueError(f"feature name '{key}' contains '/', which the format reserves; use '.' instead")
    if missing := {"dtype", "shape"} - feature.keys():
        raise ValueError(f"feature '{key}' lacks {sorted(missing)}; found {dict(feature)}")
    if feature["dtype"] in CAMERA_DTYPES:
        if len(feature["shape"]) != 3 or 3 not in (feature["shape"][0], feature["shape"][2]):
            raise ValueError(f"camera '{key}' has shape {tuple(feature['shape'])}, expected (h, w, 3) or (3, h, w)")
        return
    if is_annotation(feature):
        return
    try:
        np.dtype("U" if feature["dtype"] == "string" else feature["dtype"])
    except TypeError:
        raise ValueError(
            f"feature '{key}' has dtype '{feature['dtype']}'; possible are image, video, string, language and NumPy "
            "dtypes"
        ) from None


def _check_values(key: str, values: np.ndarray | FrameStream, feature: Feature) -> np.ndarray | FrameStream:
    if isinstance(values, FrameStream):
        if feature["dtype"] != "video":
            raise ValueError(f"feature '{key}' has dtype '{feature['dtype']}'; only video is taken as a stream")
        return FrameStream(len(values), (_check_camera(key, frame[None], feature)[0] for frame in values))
    if is_annotation(feature):
        told = np.empty(len(values), object)  # lists of one length would become an axis
        told[:] = list(values)
        to_language([rows for rows, _ in itertools.groupby(told)], key)
        return told
    values = np.asarray(values)
    if feature["dtype"] in CAMERA_DTYPES:
        return _check_camera(key, values, feature)
    if feature["dtype"] == "string":
        return values
    shape = tuple(feature["shape"])
    if values.shape[1:] != shape and not (shape == (1,) and values.ndim == 1):
        raise ValueError(f"feature '{key}' has frames of shape {values.shape[1:]}, expected {shape}")
    if not np.can_cast(values.dtype, feature["dtype"], "same_kind"):
        raise ValueError(f"feature '{key}' has dtype {values.dtype}, expected {feature['dtype']}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        frame, *where = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(
            f"feature '{key}' has {values[(frame, *where)]} in frame {frame}{f', dimension {where}' if where else ''}; "
            "expected finite numbers: no policy can learn from others. Repair the frame, or leave the episode out"
        )
    return values.astype(feature["dtype"], copy=False).reshape(len(values), *(() if shape == (1,) else shape))


def _check_camera(key: str, values: np.ndarray, feature: Feature) -> np.ndarray:
    height, width = size_hw(feature)
    if values.dtype != np.uint8:
        raise ValueError(f"camera '{key}' has dtype {values.dtype}, expected uint8 RGB in 0..255")
    if values.shape[1:] == (height, width, 3):
        return values
    if values.shape[1:] == (3, height, width):
        return np.moveaxis(values, 1, -1)
    raise ValueError(f"camera '{key}' has frames of shape {values.shape[1:]}, expected {(height, width, 3)}")
