"""What training saw of its robot, small enough to travel in the contract: views of each camera, prompts, states."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from openpi.policies.images import layout_of, to_uint8_hwc
from openpi.shared.tree import flatten

SIDE = 8  # of a view, in cells
_FINE = 4 * SIDE  # pixels each way that a view is made of
MAX_VIEWS, MAX_PROMPTS = 256, 500
FLAT = 3.0  # grey levels by which the cells of a picture that shows something differ


def view(image: np.ndarray) -> np.ndarray:
    """f32[SIDE SIDE], grey levels of an RGB image in either layout; reads about a thousand of its pixels."""
    image = np.asarray(image)
    hwc = np.moveaxis(image, 0, -1) if layout_of(image, "image") == "chw" else image
    rows, columns = (max(1, side // _FINE) for side in hwc.shape[:2])
    sparse = to_uint8_hwc(hwc[::rows, ::columns], "image") if hwc.dtype != np.uint8 else hwc[::rows, ::columns]
    height, width = (size // SIDE for size in sparse.shape[:2])
    if not height or not width:
        return np.resize(sparse.mean(axis=-1, dtype=np.float32), (SIDE, SIDE))
    cells = sparse[: height * SIDE, : width * SIDE].reshape(SIDE, height, SIDE, width, 3)
    return cells.mean(axis=(1, 3, 4), dtype=np.float32)


def direction(views: np.ndarray) -> np.ndarray:
    """f32[... SIDE*SIDE] of length 1: brightness and contrast taken out, so that a lamp is no reason for alarm."""
    flat = views.reshape(*views.shape[:-2], SIDE * SIDE).astype(np.float32)
    flat = flat - flat.mean(axis=-1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-6)


@dataclasses.dataclass(frozen=True)
class Camera:
    """Views of a camera.

    Attributes:
        views: base64 of uint8[n SIDE SIDE].
        usual: how far 99 % of them are from the nearest one of another episode: one less their correlation.
        contrast: deviation of the cells of the flattest 1 %, grey levels.
    """

    views: str
    usual: float
    contrast: float

    @classmethod
    def of(cls, views: np.ndarray, episodes: np.ndarray) -> Camera:
        """
        Args:
            views: f32[n SIDE SIDE], n at least 2.
            episodes: int[n], that each is of.
        """
        directions = direction(views)
        distances = 1 - directions @ directions.T
        same = episodes[:, None] == episodes[None, :]
        if same.all():
            same = np.eye(len(views), dtype=bool)
        nearest = np.where(same, np.inf, distances).min(axis=1)
        nearest = nearest[np.isfinite(nearest)]
        return cls(
            base64.b64encode(views.round().astype(np.uint8).tobytes()).decode(),
            float(np.quantile(nearest, 0.99)),
            float(np.quantile(views.std(axis=(1, 2)), 0.01)),
        )

    def directions(self) -> np.ndarray:
        """f32[n SIDE*SIDE] as `direction` gives them.

        Raises:
            ValueError: no views.
        """
        found = np.frombuffer(base64.b64decode(self.views, validate=True), np.uint8)
        if len(found) % SIDE**2 or not 0 < len(found) <= MAX_VIEWS * SIDE**2:
            raise ValueError(
                f"contract.seen.cameras.views has {len(found)} bytes; expected up to {MAX_VIEWS} of {SIDE**2}"
            )
        return direction(found.reshape(-1, SIDE, SIDE))


@dataclasses.dataclass(frozen=True)
class Vector:
    """Range of a vector of the state, as the robot sends it, and of its first values in episodes."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    start_low: tuple[float, ...]
    start_high: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Seen:
    """Attributes:
    cameras: by key of the observation.
    state: by key of the observation.
    prompts: all of the dataset; empty = too many, or unknown.
    """

    cameras: Mapping[str, Camera]
    state: Mapping[str, Vector]
    prompts: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        samples: Sequence[tuple[int, bool, Mapping[str, Any]]],
        prompts: Iterable[str],
        ranges: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> Seen:
        """
        Args:
            samples: number of the episode, whether it is its first frame, and what the robot would have sent.
            ranges: lowest and highest values by key, where they are known of all frames.
        """
        ranges = ranges or {}
        episodes = np.array([episode for episode, _, _ in samples])
        is_first = np.array([first for _, first, _ in samples])
        flat = [flatten(sample) for _, _, sample in samples]
        cameras, state = {}, {}
        for key, value in flat[0].items():
            if np.ndim(value) == 3 and len(flat) > 1:
                cameras[key] = Camera.of(np.stack([view(each[key]) for each in flat]), episodes)
            elif np.ndim(value) == 1 and np.asarray(value).dtype.kind == "f" and key != "actions":
                values = np.stack([np.asarray(each[key], np.float64) for each in flat])
                state[key] = _vector(values, is_first, ranges.get(key, (values, values)))
        every = tuple(dict.fromkeys(prompts))
        return cls(cameras, state, every if len(every) <= MAX_PROMPTS else ())

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Seen:
        """Raises ValueError, KeyError, TypeError for what was not written by `dataclasses.asdict`."""
        cameras = {
            str(key): Camera(str(entry["views"]), float(entry["usual"]), float(entry["contrast"]))
            for key, entry in document["cameras"].items()
        }
        for camera in cameras.values():
            camera.directions()
        names = [field.name for field in dataclasses.fields(Vector)]
        state = {
            str(key): Vector(*(tuple(float(value) for value in entry[name]) for name in names))
            for key, entry in document["state"].items()
        }
        if any(len({len(getattr(vector, name)) for name in names}) > 1 for vector in state.values()):
            raise ValueError("contract.seen.state has bounds of different widths")
        return cls(cameras, state, tuple(str(prompt) for prompt in document["prompts"]))


def _vector(values: np.ndarray, is_first: np.ndarray, known: tuple[np.ndarray, np.ndarray]) -> Vector:
    starts = values[is_first] if is_first.any() else values
    low, high = np.minimum(values, known[0]).min(0), np.maximum(values, known[1]).max(0)
    bounds = (low, high, starts.min(0), starts.max(0))
    return Vector(*(tuple(bound.tolist()) for bound in bounds))
