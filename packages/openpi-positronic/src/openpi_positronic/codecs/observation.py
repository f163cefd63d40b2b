"""The observation half of a codec: signals joined to vectors, cameras resized, the task as prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from openpi.policies.guards import ObservationError
from openpi.policies.images import LONGEST_SIDE
from openpi.policies.observation_checks import as_array
from openpi.shared import image_tools
from openpi.shared.errors import missing_key
from openpi.shared.strict_json import Json
from openpi_client.base_policy import Observation
from openpi_positronic.codecs.codec import Codec, Column, Decoded, Given, joined

TASK = "task"
WARM_UP_PROMPT = "warmup"


@dataclasses.dataclass(frozen=True)
class Vector:
    """Signals one after the other, float32.

    Attributes:
        key: in the policy's observation.
        signals: name -> width, in order.
        column: in a training dataset.
    """

    key: str
    signals: Mapping[str, int]
    column: str

    @property
    def width(self) -> int:
        return sum(self.signals.values())

    @property
    def feature(self) -> dict[str, object]:
        """As a LeRobot feature, whose names are those of the signals."""
        return {"dtype": "float32", "shape": [self.width], "names": list(self.signals)}

    def training(self, signals: Mapping[str, Column]) -> Column:
        return joined([signals[name] for name in self.signals])


@dataclasses.dataclass(frozen=True)
class Camera:
    """One camera: its raw signal, its key in the policy's observation, its column in a training dataset."""

    key: str
    signal: str
    column: str


@dataclasses.dataclass(frozen=True)
class ObservationCodec(Codec):
    """State vectors, cameras and prompt.

    Attributes:
        prompt_key: under which the raw `task` is passed on, if there is one.
        size_hw: of the images given to the policy; aspect kept, black around it.
    """

    vectors: tuple[Vector, ...]
    cameras: tuple[Camera, ...]
    prompt_key: str = "prompt"
    size_hw: tuple[int, int] = (224, 224)

    @property
    def served_meta(self) -> dict[str, object]:
        height, width = self.size_hw
        return {"image_sizes": [width, height]}

    @property
    def training_meta(self) -> Json:
        image = {"dtype": "video", "shape": [*self.size_hw, 3], "names": ["height", "width", "channel"]}
        features = {vector.column: vector.feature for vector in self.vectors}
        return {"lerobot_features": features | {camera.column: dict(image) for camera in self.cameras}}

    def encode(self, raw: Mapping[str, object]) -> Observation:
        encoded: dict[str, Any] = {vector.key: _encode_vector(vector, raw) for vector in self.vectors}
        for camera in self.cameras:
            encoded[camera.key] = self._resize(_image_of(raw, camera.signal), camera.signal)
        if raw.get(TASK) is not None:
            encoded[self.prompt_key] = raw[TASK]  # the policy refuses what is no text
        return encoded

    def decode(self, output: Given, context: Mapping[str, object] | None = None) -> Decoded:
        """Adds nothing to the action's steps."""
        is_one = isinstance(output, Mapping) or (isinstance(output, np.ndarray) and output.ndim == 1)
        return {} if is_one else [{} for _ in output]

    def training(self, signals: Mapping[str, Column]) -> Mapping[str, Column]:
        columns = {vector.column: vector.training(signals) for vector in self.vectors}
        for camera in self.cameras:
            columns[camera.column] = signals[camera.signal].map(lambda frames: self._resize(frames, "a camera"))
        return columns

    def training_task(self, static: Mapping[str, object]) -> str | None:
        task = static.get(TASK)
        if not isinstance(task, str | None):
            raise ValueError(f"its '{TASK}' is {str(task)[:80]!r}; expected a text. Say one with task (--task)")
        return task or ""

    def dummy_encoded(self) -> dict[str, object]:
        vectors = {vector.key: np.zeros(vector.width, np.float32) for vector in self.vectors}
        cameras = {camera.key: np.zeros((*self.size_hw, 3), np.uint8) for camera in self.cameras}
        return {**vectors, **cameras, self.prompt_key: WARM_UP_PROMPT}

    def _resize(self, images_hwc: np.ndarray, name: str) -> np.ndarray:
        images_hwc = np.asarray(images_hwc)
        if images_hwc.ndim < 3 or images_hwc.shape[-1] != 3 or images_hwc.dtype != np.uint8:
            raise ObservationError(_no_image(images_hwc, name))
        return image_tools.resize_with_pad(images_hwc, *self.size_hw)


@dataclasses.dataclass(frozen=True)
class Rename(Codec):
    """Gives keys of an observation other names, for a policy that calls them differently; others stay."""

    names: Mapping[str, str]

    def encode(self, raw: Mapping[str, object]) -> Observation:
        return {self.names.get(key, key): value for key, value in raw.items()}


def signal_of(raw: Mapping[str, object], name: str) -> Any:
    """A signal of a raw observation.

    Raises:
        KeyError: it is missing; those present are in the message.
    """
    if name not in raw:
        raise missing_key(name, raw, wanted_by="the codec", fix="Send it, or serve with a codec that does without.")
    return raw[name]


def array_of(raw: Mapping[str, object], name: str) -> np.ndarray:
    """A signal as an array. Raises as `signal_of`, and ObservationError for lists that are none."""
    try:
        return as_array(signal_of(raw, name), name)
    except ValueError as error:
        raise ObservationError(str(error)) from error


def numbers_of(raw: Mapping[str, object], name: str, width: int) -> np.ndarray:
    """So many numbers. Raises as `array_of`, and ObservationError for others."""
    numbers = array_of(raw, name).reshape(-1)
    if len(numbers) != width:
        raise ObservationError(f"'{name}' has {len(numbers)} values; expected {width}")
    if numbers.dtype.kind not in "fiub":
        raise ObservationError(f"'{name}' has dtype {numbers.dtype}; expected numbers")
    return numbers


def _image_of(raw: Mapping[str, object], name: str) -> np.ndarray:
    """One image: of thousands in one array, each of a few bytes, gigabytes would be made."""
    image = array_of(raw, name)
    if image.ndim != 3 or not 0 < min(image.shape) <= max(image.shape) <= LONGEST_SIDE:
        raise ObservationError(_no_image(image, name))
    return image


def _no_image(image: np.ndarray, name: str) -> str:
    return f"'{name}' is {image.dtype} of shape {image.shape}; expected uint8 RGB [height, width, 3]"


def _encode_vector(vector: Vector, raw: Mapping[str, object]) -> np.ndarray:
    return np.concatenate([numbers_of(raw, name, width).astype(np.float32) for name, width in vector.signals.items()])
