"""What training saw of its robot, small enough to travel in the contract: views of each camera, prompts, states."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from openpi.policies.images import SIDE, aspect_of, cells, color, is_picture
from openpi.shared.tree import Tree, flatten

MAX_VIEWS, MAX_PROMPTS = 256, 500
FLAT = 3.0  # grey levels by which the cells of a picture that shows something differ
_DARK, _COLORED = 30.0, 0.02  # levels and share of red less blue, of which a color is as good as any stronger one
_FEWEST_COLORED, _RARELY = SIDE**2 / 4, 0.05


def view(image: np.ndarray) -> np.ndarray:
    """f32[SIDE SIDE], grey levels of an RGB image in either layout."""
    return grey(cells(image))


def grey(colored: np.ndarray) -> np.ndarray:
    """f32[... SIDE SIDE], the view of cells."""
    return np.add.reduce(colored, axis=-3) / 3


def direction(views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Brightness and contrast taken out, so that a lamp is no reason for alarm.

    Returns:
        f32[... SIDE*SIDE] of length 1, and the contrast: f32[...], deviation of the cells, grey levels.
    """
    flat = views.reshape(*views.shape[:-2], SIDE * SIDE).astype(np.float32)
    flat -= np.add.reduce(flat, axis=-1, keepdims=True) / SIDE**2
    length = np.sqrt(np.add.reduce(flat * flat, axis=-1))
    flat /= np.maximum(length, 1e-6)[..., None]
    return flat, length / SIDE


def hue(colored: np.ndarray) -> np.ndarray:
    """f32[... SIDE*SIDE] in [-1, 1], where cells of [... 3 SIDE SIDE] are redder or bluer than the picture as a whole.

    A lamp of another color changes the whole, a thing of another color its few cells, and red and blue exchanged all.
    """
    red, green, blue = (colored[..., i, :, :].reshape(*colored.shape[:-3], SIDE**2) for i in range(3))
    redder = (red - blue) / (red + green + blue + _DARK)
    return np.clip((redder - np.median(redder, axis=-1, keepdims=True)) / _COLORED, -1, 1)


def likeness(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """f[...], of the hues of pictures: 1 = the same, -1 = exchanged; 0 for a grey one."""
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return (one * other).sum(axis=-1) / np.maximum(lengths, 1e-6)


def usual_hue(colored: np.ndarray, episodes: np.ndarray) -> tuple[float, ...]:
    """The mean `hue` of the pictures of a camera, [n 3 SIDE SIDE]; empty where it does not tell red from blue: too few
    cells have a color, or those of other episodes have others."""
    hues = hue(colored)
    mean = hues.mean(axis=0)
    if len(np.unique(episodes)) < 2 or (mean**2).sum() ** 2 < _FEWEST_COLORED * (mean**4).sum() or not mean.any():
        return ()
    others = [hues[episodes != episode].mean(axis=0) for episode in episodes]
    is_told = np.quantile(likeness(hues, np.stack(others)), _RARELY) > 0
    return tuple(mean.round(3).tolist()) if is_told else ()


@dataclasses.dataclass(frozen=True)
class Camera:
    """Views of a camera.

    Attributes:
        views: base64 of uint8[n SIDE SIDE].
        usual: how far 99 % of them are from the nearest one of another episode: one less their correlation.
        contrast: deviation of the cells of the flattest 1 %, grey levels.
        color_low, color_high: least and largest mean red, green and blue of a picture; empty = unknown.
        aspect: width over height of the pictures; 0 = unknown, or of different ones.
        hue: as of `usual_hue`; empty also = unknown.
    """

    views: str
    usual: float
    contrast: float
    color_low: tuple[float, ...] = ()
    color_high: tuple[float, ...] = ()
    aspect: float = 0.0
    hue: tuple[float, ...] = ()

    @classmethod
    def of(cls, colored: np.ndarray, episodes: np.ndarray, aspect: float = 0.0) -> Camera:
        """
        Args:
            colored: f32[n 3 SIDE SIDE], cells of the pictures, n at least 2.
            episodes: int[n], that each is of.
            aspect: of the pictures.
        """
        views, colors = grey(colored), color(colored)
        directions, contrasts = direction(views)
        distances = 1 - directions @ directions.T
        same = episodes[:, None] == episodes[None, :]
        if same.all():
            same = np.eye(len(views), dtype=bool)
        nearest = np.where(same, np.inf, distances).min(axis=1)
        nearest = nearest[np.isfinite(nearest)]
        return cls(
            base64.b64encode(views.round().astype(np.uint8).tobytes()).decode(),
            float(np.quantile(nearest, 0.99)),
            float(np.quantile(contrasts, 0.01)),
            *(tuple(bound(axis=0).tolist()) for bound in (colors.min, colors.max)),
            aspect=aspect,
            hue=usual_hue(colored, episodes),
        )

    def directions(self) -> np.ndarray:
        """f32[n SIDE*SIDE], as of `direction`.

        Raises:
            ValueError: no views.
        """
        found = np.frombuffer(base64.b64decode(self.views, validate=True), np.uint8)
        if len(found) % SIDE**2 or not 0 < len(found) <= MAX_VIEWS * SIDE**2:
            raise ValueError(
                f"contract.seen.cameras.views has {len(found)} bytes; expected up to {MAX_VIEWS} of {SIDE**2}"
            )
        return direction(found.reshape(-1, SIDE, SIDE))[0]


@dataclasses.dataclass(frozen=True)
class Vector:
    """Range of a vector of the state, as the robot sends it, of its first values in episodes, and of its averages over
    an episode (empty = unknown).
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    start_low: tuple[float, ...]
    start_high: tuple[float, ...]
    mean_low: tuple[float, ...] = ()
    mean_high: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Column:
    """A vector of the state in all frames of a dataset, as the least and largest values, and averages of episodes.

    Attributes:
        low, high: float[w].
        means: float[n w], of each episode.
    """

    low: np.ndarray
    high: np.ndarray
    means: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Column:
        """Of a few frames, which say no more of averages than that these lie between them.

        Args:
            values: float[n w].
        """
        low, high = values.min(axis=0), values.max(axis=0)
        return cls(low, high, np.stack([low, high]))


@dataclasses.dataclass(frozen=True)
class Seen:
    """Attributes:
    cameras: by key of the observation.
    state: by key of the observation.
    prompts: all of the dataset; empty = too many, or unknown.
    episode_length: frames, on average; 0 = unknown.
    """

    cameras: Mapping[str, Camera]
    state: Mapping[str, Vector]
    prompts: tuple[str, ...] = ()
    episode_length: float = 0.0

    @classmethod
    def of(
        cls,
        samples: Sequence[tuple[int, bool, Mapping[str, object]]],
        prompts: Iterable[str],
        columns: Mapping[str, Column] | None = None,
        episode_length: float = 0.0,
    ) -> Seen:
        """
        Args:
            samples: number of the episode, whether it is its first frame, and what the robot would have sent.
            columns: by key, where all frames are known.
        """
        columns = columns or {}
        episodes = np.array([episode for episode, _, _ in samples])
        is_first = np.array([first for _, first, _ in samples])
        flat = [flatten(sample) for _, _, sample in samples]
        cameras, state = {}, {}
        for key, value in flat[0].items():
            if is_picture(value) and len(flat) > 1:
                colored = np.stack([cells(each[key]) for each in flat])
                aspects = {aspect_of(each[key]) for each in flat}
                aspect = aspects.pop() if len(aspects) == 1 else 0.0
                cameras[key] = Camera.of(colored, episodes, aspect)
            elif np.ndim(value) == 1 and np.asarray(value).dtype.kind == "f" and key != "actions":
                values = np.stack([np.asarray(each[key], np.float64) for each in flat])
                state[key] = _vector(values, is_first, columns.get(key) or Column.of(values))
        every = tuple(dict.fromkeys(prompts))
        return cls(cameras, state, every if len(every) <= MAX_PROMPTS else (), episode_length)

    @classmethod
    def from_json(cls, document: Tree) -> Seen:
        """Raises ValueError, KeyError, TypeError for what was not written by `dataclasses.asdict`."""
        cameras = {
            str(key): Camera(
                str(entry["views"]),
                float(entry["usual"]),
                float(entry["contrast"]),
                *(_bound(entry, name) for name in ("color_low", "color_high")),
                aspect=_aspect(entry.get("aspect", 0.0)),
                hue=_bound(entry, "hue"),
            )
            for key, entry in document["cameras"].items()
        }
        for camera in cameras.values():
            camera.directions()
            if {len(camera.color_low), len(camera.color_high)} not in ({0}, {3}):
                raise ValueError("contract.seen.cameras has colors that are not red, green and blue")
            if len(camera.hue) not in (0, SIDE**2):
                raise ValueError(f"contract.seen.cameras.hue has {len(camera.hue)} numbers; expected {SIDE**2}")
        names = [field.name for field in dataclasses.fields(Vector)]
        state = {str(key): Vector(*(_bound(entry, name) for name in names)) for key, entry in document["state"].items()}
        for vector in state.values():
            widths = [len(getattr(vector, name)) for name in names]
            if len({*widths[:4]}) > 1 or {*widths[4:]} not in ({0}, {widths[0]}):
                raise ValueError("contract.seen.state has bounds of different widths")
        length = float(document.get("episode_length", 0.0))
        if not 0 <= length < np.inf:
            raise ValueError(f"contract.seen.episode_length is {length}; expected a number of frames")
        return cls(cameras, state, tuple(str(prompt) for prompt in document["prompts"]), length)


def _aspect(told: float) -> float:
    aspect = float(told)
    if not 0 <= aspect < 1e4:
        raise ValueError(f"contract.seen.cameras has an aspect of {aspect}; expected width over height")
    return aspect


def _bound(entry: Tree, name: str) -> tuple[float, ...]:
    """Numbers of one bound; empty where an older file, which had no averages, lacks it."""
    is_new = name.startswith(("mean_", "color_", "hue"))
    return tuple(float(value) for value in (entry.get(name, ()) if is_new else entry[name]))


def _vector(values: np.ndarray, is_first: np.ndarray, column: Column) -> Vector:
    starts = values[is_first] if is_first.any() else values
    low, high = np.minimum(values.min(0), column.low), np.maximum(values.max(0), column.high)
    bounds = (low, high, starts.min(0), starts.max(0), column.means.min(0), column.means.max(0))
    return Vector(*(tuple(bound.tolist()) for bound in bounds))
