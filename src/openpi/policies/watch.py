"""Whether a robot sees what training saw: its observations, one after another, against the contract's `seen`.

Warnings begin with their code and subject, `[frozen] observation/image: ...`, and end with what to do. Each of the
checks takes out what may well differ (lamps, a moved table) and speaks after several observations only, so that a
clean robot is not bothered.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from openpi.policies.drift import Drift
from openpi.policies.images import SIDE, as_in_training, cells, color
from openpi.policies.seen import FLAT, Camera, Seen, Vector, direction, grey, hue, likeness
from openpi.shared.tree import flatten
from openpi_client.realtime.watch import digest

_LOOKS = 5  # observations that a check of pictures looks at
_CLEARLY = 0.5  # another explanation is nearer by this factor
_LEAST_FAR = 0.08  # one less correlation: nearer is the same picture to anyone
_SLACK = 0.5  # of a range, beyond which a value is outside: the range is that of some frames only
_NARROW = 0.25  # of a range: episodes begin alike
_EXCHANGED = -0.5  # likeness of hues, below which red and blue are
_MOVED = 0.01  # of a range: the robot moved
_MAX_SWAPPED_CAMERAS = 4
_PROMPT = 1000  # characters that are read
_SCALES = {"degrees where training had radians": np.pi / 180, "radians where training had degrees": 180 / np.pi,
           "millimetres where training had metres": 1e-3, "metres where training had millimetres": 1e3}  # fmt: skip
_TURNS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "turned by 180 degrees": lambda v: v[..., ::-1, ::-1],
    "upside down": lambda v: v[..., ::-1, :],
    "mirrored": lambda v: v[..., ::-1],
}


def once(seen: Seen, observation: Mapping[str, object]) -> list[str]:
    """What would be said of a robot that keeps sending this observation."""
    watch = Watch(seen)
    return list(dict.fromkeys(warning for _ in range(_LOOKS) for warning in watch.look(observation)))


class _Looked:
    """The pictures of one observation.

    Attributes:
        keys: n cameras that training saw.
        views: f32[n SIDE SIDE].
        bytes: of each view, which are compared sooner than arrays.
        wholes: digests of the pictures whose views are those of the look before; else b"".
        contrasts: of each, grey levels.
        are_near: each is near a view of its camera.
        known: as of `Watch`.
    """

    def __init__(
        self,
        known: Mapping[str, _Known],
        keys: tuple[str, ...],
        colored: np.ndarray,
        pictures: Sequence[np.ndarray],
        before: _Looked | None,
    ) -> None:
        self.keys, self.views, self._known = keys, (views := grey(colored)), [known[key] for key in keys]
        self._colored = colored
        self.bytes = [view.tobytes() for view in views]
        seen = before.bytes if before is not None and before.keys == keys else [b""] * len(keys)
        # What is small may move between the pixels of a view: where those are the same, all are looked at.
        self.wholes = [
            digest(picture) if mine == theirs else b""
            for picture, mine, theirs in zip(pictures, self.bytes, seen, strict=True)
        ]
        self._directions, contrasts = direction(views)
        self.contrasts: list[float] = contrasts.tolist()
        self.are_near = all(map(_Known.is_near, self._known, self._directions))

    @functools.cached_property
    def distances(self) -> np.ndarray:
        """f32[n n], of each to the nearest view of each camera."""
        return np.stack([each.distances(self._directions) for each in self._known], axis=1)

    @functools.cached_property
    def hues(self) -> np.ndarray:
        """f32[n], likeness to those of training; 0 where these tell nothing."""
        return likeness(hue(self._colored), np.stack([each.hue for each in self._known]))

    @property
    def own(self) -> np.ndarray:
        """f32[n], of each to the nearest view of its camera."""
        return self.distances.diagonal()

    @functools.cached_property
    def turned(self) -> np.ndarray:
        """f32[n t], of each when turned to the nearest of its own; infinite where it fits as it is."""
        turned = np.full((len(self.keys), len(_TURNS)), np.inf, np.float32)
        for i, (known, distance) in enumerate(zip(self._known, self.own, strict=True)):
            if distance > known.far:
                square = self._directions[i].reshape(SIDE, SIDE)
                turned[i] = known.distances(np.stack([turn(square).reshape(-1) for turn in _TURNS.values()]))
        return turned


class _Known:
    """A camera of training.

    Attributes:
        far: a distance that is no picture's of this camera.
        shows: none of its pictures is all of one color.
        hue: f32[SIDE*SIDE], as of `seen.hue`; zeros where it tells nothing.
    """

    def __init__(self, camera: Camera) -> None:
        self._directions = camera.directions()
        self._near = self._directions[0]
        self.far = max(2 * camera.usual, _LEAST_FAR)
        self.shows = camera.contrast > 2 * FLAT
        self.hue = np.array(camera.hue or [0.0] * SIDE**2, np.float32)

    def is_near(self, direction: np.ndarray) -> bool:
        """Whether f32[SIDE*SIDE] is within `far` of a view; that which was near lately is asked first."""
        if 1 - float(self._near @ direction) > self.far:
            self._near = self._directions[int((self._directions @ direction).argmax())]
            return 1 - float(self._near @ direction) <= self.far
        return True

    def distances(self, directions: np.ndarray) -> np.ndarray:
        """f32[n], of f32[n SIDE*SIDE] to the nearest view."""
        return 1 - np.maximum.reduce(directions @ self._directions.T, axis=1)


class Watch:
    """Looks at the observations of one robot, in order. Not for several threads at once.

    Each request passes here: of a robot about which nothing is to be said only as much is computed as tells that.

    Attributes:
        drift: averages of what was looked at.
    """

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self.drift = Drift(seen)
        self._known = {key: _Known(camera) for key, camera in seen.cameras.items()}
        self._wide: dict[str, tuple[list[float], list[float]]] = {}
        for key, vector in seen.state.items():
            low, high = _widened(vector.low, vector.high)
            self._wide[key] = (low.tolist(), high.tolist())
        self._prompts = {_plain(prompt[:_PROMPT]): prompt for prompt in seen.prompts}
        self._prompt: tuple[str | None, list[str]] = (None, [])  # the last one, and what there was to say of it
        self._looked: deque[_Looked] = deque(maxlen=_LOOKS)
        self._states: deque[dict[str, np.ndarray]] = deque(maxlen=_LOOKS)
        self._strange = 0  # so many states in a row
        self._is_first = True

    def look(self, observation: Mapping[str, object]) -> list[str]:
        """What is suspicious about this observation and those before."""
        leaves = flatten(observation)
        # Copies: what is kept would keep all of the message, pictures included.
        state = {key: np.array(leaves[key], np.float64).reshape(-1) for key in self._wide if key in leaves}
        state = {key: value for key, value in state.items() if len(value) == len(self._seen.state[key].low)}
        self._states.append(state)
        self._strange = self._strange + 1 if (strange := [*self._vectors(state)]) else 0
        found = strange if self._strange >= _LOOKS else []
        keys, colors = tuple(key for key in self._known if key in leaves), {}
        if keys:
            pictures = [as_in_training(np.asarray(leaves[key]), self._seen.cameras[key].aspect) for key in keys]
            colored = np.array([cells(picture) for picture in pictures])
            before = self._looked[-1] if self._looked else None
            self._looked.append(_Looked(self._known, keys, colored, pictures, before))
            found += self._same(pictures)
            found += self._cameras()
            colors = dict(zip(keys, color(colored).tolist(), strict=True))
        self.drift.add({key: value.tolist() for key, value in state.items()}, colors)
        found += self.drift.warnings()
        if self._is_first:
            found += _starts(self._seen.state, state)
        self._is_first = False
        if leaves.get("prompt") is not None and self._prompts:
            found += self._said_of_prompt(leaves["prompt"])
        return found

    def _vectors(self, state: Mapping[str, np.ndarray]) -> Iterator[str]:
        """Of values outside the range of training, those that another unit or order would bring inside."""
        for key, values in state.items():
            row, (low, high) = values.tolist(), self._wide[key]  # of a dozen numbers arrays take longer
            if any(map(operator.lt, row, low)) or any(map(operator.gt, row, high)):
                yield from _of_outside(key, self._seen.state[key], values)

    def _same(self, pictures: Sequence[np.ndarray]) -> Iterator[str]:
        """Of one picture under two names, which no two cameras give: noise alone differs."""
        last = self._looked[-1]
        for i, j in itertools.combinations(range(len(pictures)), 2):
            if (
                last.bytes[i] == last.bytes[j]
                and last.contrasts[i] >= FLAT
                and np.array_equal(pictures[i], pictures[j])
            ):
                one, other = last.keys[i], last.keys[j]
                if self._seen.cameras[one].views != self._seen.cameras[other].views:
                    yield (
                        f"[swapped] {other}: is the very picture of '{one}', in training they differed; give each name "
                        "its own camera in the robot's program"
                    )

    def _cameras(self) -> Iterator[str]:
        last = self._looked[-1]
        known = [self._known[key] for key in last.keys]
        flat = [i for i, contrast in enumerate(last.contrasts) if contrast < FLAT and known[i].shows]
        yield from (_blank(last.keys[i], float(last.views[i].mean())) for i in flat)
        if len(self._looked) < _LOOKS or any(each.keys != last.keys for each in self._looked):
            return
        rows = [i for i in range(len(last.keys)) if i not in flat]
        frozen = [i for i in rows if self._is_frozen(i)]
        if frozen and self._has_moved():
            yield from (_frozen(last.keys[i]) for i in frozen)
        if all(each.are_near for each in self._looked):  # and so is their mean
            if any(each.hue.any() for each in known) and last.hues.min() < 0:
                hues = np.mean([each.hues for each in self._looked], axis=0)
                yield from (_exchanged(last.keys[i]) for i in np.flatnonzero(hues < _EXCHANGED))
            return
        distances = np.mean([each.distances for each in self._looked], axis=0)
        own = distances.diagonal()
        far = [i for i in rows if own[i] > known[i].far]
        if not far:
            return
        swapped = _swapped([(last.keys[i], distances[i, rows]) for i in rows])
        for key, other in swapped.items():
            yield (
                f"[swapped] {key}: shows what '{other}' showed in training; exchange the two in the robot's program, "
                "or their cables"
            )
        turned = np.mean([each.turned for each in self._looked], axis=0)
        for i in far:
            if last.keys[i] in swapped:
                continue
            nearest = int(distances[i].argmin())
            if distances[i, nearest] <= known[nearest].far and distances[i, nearest] < _CLEARLY * own[i]:
                yield (
                    f"[swapped] {last.keys[i]}: shows what '{last.keys[nearest]}' showed in training; look at which "
                    "camera the robot's program gives this name"
                )
            else:
                yield self._unlike(last.keys[i], float(own[i]), turned[i])

    def _is_frozen(self, row: int) -> bool:
        last = self._looked[-1].wholes[row]
        return bool(last) and all(each.wholes[row] == last for each in itertools.islice(self._looked, 1, None))

    def _has_moved(self) -> bool:
        if any(len(state) < len(self._wide) for state in self._states):
            return False
        for key, vector in self._seen.state.items():
            values = np.stack([state[key] for state in self._states])
            if (np.abs(values - values[0]) > _MOVED * np.subtract(vector.high, vector.low) + 1e-6).any():
                return True
        return False

    def _unlike(self, key: str, distance: float, turned: np.ndarray) -> str:
        if turned.min() < _CLEARLY * distance:
            name = list(_TURNS)[int(turned.argmin())]
            return f"[turned] {key}: fits the pictures of training when it is {name}; turn it in the robot's program"
        return (
            f"[view] {key}: unlike all pictures of training (distance {distance:.2f}, usual up to "
            f"{self._seen.cameras[key].usual:.2f}); is the camera moved, cropped or another one, or the scene new?"
        )

    def _said_of_prompt(self, prompt: object) -> list[str]:
        text = prompt if isinstance(prompt, (bytes, str)) else np.asarray(prompt).item()
        text = text[:_PROMPT].decode(errors="replace") if isinstance(text, bytes) else str(text)[:_PROMPT]
        if text != self._prompt[0]:
            self._prompt = (text, [*self._unknown(text)])
        return self._prompt[1]

    def _unknown(self, text: str) -> Iterator[str]:
        if (plain := _plain(text)) not in self._prompts:
            words = set(plain.split())  # a measure of texts would keep the others waiting
            near = self._prompts[max(self._prompts, key=lambda known: len(words & set(known.split())))]
            count = len(self._prompts)
            yield f"[prompt] prompt: {text[:100]!r} is none of the {count} of training; the nearest is {near[:100]!r}"


def _swapped(cameras: list[tuple[str, np.ndarray]]) -> dict[str, str]:
    """Which camera each one looks like, where another order fits clearly better.

    Args:
        cameras: names, and distances to the views of each of them.
    """
    if not 1 < len(cameras) <= _MAX_SWAPPED_CAMERAS:
        return {}
    orders = list(itertools.permutations(range(len(cameras))))
    cost = [sum(distances[j] for (_, distances), j in zip(cameras, order, strict=True)) for order in orders]
    if min(cost) > _CLEARLY * cost[0]:
        return {}
    best = orders[int(np.argmin(cost))]
    return {key: cameras[j][0] for i, ((key, _), j) in enumerate(zip(cameras, best, strict=True)) if i != j}


def _blank(key: str, level: float) -> str:
    shade = "black" if level < 16 else "white" if level > 239 else "one colour"
    return f"[blank] {key}: the picture is {shade}, those of training show something; look at the camera"


def _exchanged(key: str) -> str:
    return (
        f"[colors] {key}: what was reddish in training is bluish now, and the other way round, in a picture that fits "
        "otherwise; expected RGB. Convert with image[..., ::-1] if the camera gives BGR"
    )


def _frozen(key: str) -> str:
    return f"[frozen] {key}: the same picture {_LOOKS} times while the robot moved; look at its thread and its cable"


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("_", " ").split()).rstrip(".")


def _of_outside(key: str, known: Vector, values: np.ndarray) -> Iterator[str]:
    low, high = _widened(known.low, known.high)
    outside = (values < low) | (values > high)
    for name, scale in _SCALES.items():
        scaled = np.where(outside, values * scale, values)
        # Made small enough, anything fits a range around zero: what half of the way brings there just went far.
        halfway = values * np.sqrt(scale)
        is_far = outside & ((halfway < known.low) | (halfway > known.high))
        if _is_inside(scaled, low, high) and is_far.any() and outside.sum() > 1:
            yield f"[units] {key}: fits training when it is taken as {name}; convert it in the robot's program"
            return
    # One value that strays finds room in the range of some other.
    is_far = outside & ((values < 2 * low - high) | (values > 2 * high - low))
    if (outside.sum() > 1 or is_far.any()) and (order := _better_order(values, low, high)) is not None:
        yield f"[order] {key}: fits training when {order}; put the values in the order of the contract"


def _better_order(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> str | None:
    n = len(values)
    candidates = [
        ("the last value comes first", np.roll(values, 1)),
        ("the first value comes last", np.roll(values, -1)),
    ]
    candidates += [("its halves are exchanged", np.roll(values, n // 2)), ("it is reversed", values[::-1])]
    for i, j in itertools.combinations(range(n), 2):
        swapped = values.copy()
        swapped[[i, j]] = swapped[[j, i]]
        candidates.append((f"values {i} and {j} are exchanged", swapped))
    fitting = [words for words, found in candidates if _is_inside(found, low, high)]
    return fitting[0] if fitting else None


def _starts(known: Mapping[str, Vector], state: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Of the first observation, values that start where training's would when turned over: a gripper's polarity."""
    for key, values in state.items():
        vector = known[key]
        low, high = np.array(vector.low), np.array(vector.high)
        if not _is_inside(values, *_widened(np.minimum(low, 0), np.maximum(high, 1))):
            continue  # of another unit or order
        start_low, start_high = np.array(vector.start_low), np.array(vector.start_high)
        span = high - low
        slack = _NARROW * span
        is_narrow = (start_high - start_low < _NARROW * span) & (span > 0)
        is_off = (values < start_low - 2 * slack) | (values > start_high + 2 * slack)
        others = np.stack([low + high - values, 1 - values, -values])
        would_fit = ((others >= start_low - slack) & (others <= start_high + slack)).any(axis=0)
        for i in np.flatnonzero(is_narrow & is_off & would_fit):
            yield (
                f"[polarity] {key}[{i}]: starts at {values[i]:.3g}, in training at {start_low[i]:.3g} to "
                f"{start_high[i]:.3g}; is open and closed, or the sign, the other way round?"
            )


def _widened(low: object, high: object) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    slack = _SLACK * (high - low) + 1e-3
    return low - slack, high + slack


def _is_inside(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
    return bool(((values >= low) & (values <= high)).all())
