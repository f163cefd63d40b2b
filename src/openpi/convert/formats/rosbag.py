"""Bags of ROS 1 (`.bag`) and ROS 2 (a folder, or an `.mcap`), an episode each, by a mapping file (`ros_mapping`).

Topics have rates of their own; frames are sampled at one, as `sampling` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openpi.convert.formats.ros_bag_file import BagFile, Message
from openpi.convert.formats.ros_mapping import IMAGES, JOINT_STATE, Mapped, Part, draft
from openpi.convert.sampling import instants, newest
from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode, in_order, relative
from openpi.shared.budgets import decode_image
from openpi.shared.errors import listed

_NS_PER_S = 1_000_000_000
_MAX_NUMBERS = 10_000  # of one message; more is no vector but a picture or a cloud
# Channels of a picture, in the order of red, green and blue.
_ENCODINGS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
}


@dataclass(frozen=True)
class RosBags:
    """Bags of ROS 1 and ROS 2.

    Attributes:
        root: a bag, or a folder of bags.
        mapping: which topics become which columns: a file that --draft FILE writes.
        distro: of ROS 2, for bags without the definitions of their messages, such as humble or jazzy.
        fps: frames per second; default: what the mapping says.
    """

    root: Path
    mapping: Mapped | None = None
    distro: str = "humble"
    fps: float | None = None

    def episodes(self) -> Sequence[EpisodeRef]:
        if self.mapping is None:
            raise ValueError(
                "which topics become which columns? Draft a mapping (--draft FILE), and give it (--mapping)"
            )
        return [EpisodeRef(relative(bag, self.root), (bag,)) for bag in self._bags()]

    def read(self, ref: EpisodeRef) -> RawEpisode:
        path, mapped = ref.files[0], self.mapping
        assert mapped is not None
        with BagFile(path, self.distro) as bag:
            kinds = bag.kinds()
            if absent := sorted(mapped.topics - kinds.keys()):
                raise ValueError(
                    f"{path} has no topic {listed(absent)}, which the mapping names; it has {listed(kinds)}"
                )
            signals = _signals(bag, mapped, kinds)
            fps = self.fps or mapped.fps
            for topic, signal in signals.items():
                if not len(signal.times_ns):
                    raise ValueError(f"{path}: topic '{topic}' has no messages")
            at = instants([signal.times_ns for signal in signals.values()], fps)
            columns: dict[str, RawColumn] = {
                key: self._column(path, parts, signals, at) for key, parts in mapped.columns.items()
            }
        left_out = tuple(sorted(kinds.keys() - mapped.topics))
        return RawEpisode(columns, fps, mapped.task, mapped.robot_type, left_out)

    def draft(self) -> dict[str, Any]:
        """A mapping of the first bag's topics, to be looked through by its owner."""
        path = self._bags()[0]
        with BagFile(path, self.distro) as bag:
            return draft(bag.topics())

    def _bags(self) -> list[Path]:
        if not self.root.exists():
            raise FileNotFoundError(f"{self.root} does not exist; expected a bag, or a folder of bags")
        if self.root.is_file() or (self.root / "metadata.yaml").is_file():
            return [self.root]
        ros2 = [path.parent for path in self.root.rglob("metadata.yaml")]
        loose = [path for path in self.root.rglob("*.mcap") if path.parent not in ros2]
        bags = in_order([*ros2, *loose, *self.root.rglob("*.bag")])
        if not bags:
            raise FileNotFoundError(f"{self.root} holds no *.bag, no *.mcap and no folder with metadata.yaml")
        return bags

    def _column(self, path: Path, parts: Sequence[Part], signals: Mapping[str, _Signal], at: np.ndarray) -> RawColumn:
        origin = ", ".join(f"{part.topic} {part.field}".strip() for part in parts)
        first = signals[parts[0].topic]
        if first.size_hw is not None:
            if len(parts) > 1 or parts[0].field or parts[0].names:
                raise ValueError(f"{origin} is a camera; expected one topic without field and names")
            rows = newest(first.times_ns, at)
            frames = _pictures(path, self.distro, parts[0].topic, first.order[rows])
            return Camera(len(at), first.size_hw, frames, origin)
        values, names = [], []
        for part in parts:
            signal = signals[part.topic]
            if signal.size_hw is not None:
                raise ValueError(f"{part.topic} is a camera, among numbers; give it a column of its own")
            values.append(signal.values[part][newest(signal.times_ns, at)])
            names += signal.names[part]
        return Numbers(np.concatenate(values, axis=1), origin, tuple(names))


@dataclass(frozen=True)
class _Signal:
    """The messages of a topic, in the order of their times.

    Attributes:
        times_ns: int64[n], ascending.
        order: which message of the bag each is, int64[n].
        values: of parts, float64[n d].
        size_hw: of a camera's pictures; None = numbers.
    """

    times_ns: np.ndarray
    order: np.ndarray
    values: Mapping[Part, np.ndarray]
    names: Mapping[Part, list[str]]
    size_hw: tuple[int, int] | None


def _signals(bag: BagFile, mapped: Mapped, kinds: Mapping[str, str]) -> dict[str, _Signal]:
    parts = {topic: [p for ps in mapped.columns.values() for p in ps if p.topic == topic] for topic in mapped.topics}
    return {topic: _signal(bag, topic, parts[topic], kinds[topic], mapped.clock) for topic in sorted(mapped.topics)}


def _signal(bag: BagFile, topic: str, parts: Sequence[Part], kind: str, clock: str) -> _Signal:
    times: list[int] = []
    rows: dict[Part, list[list[float]]] = {part: [] for part in parts}
    names: dict[Part, list[str]] = {part: [] for part in parts}
    size_hw: tuple[int, int] | None = None
    for number, (time_ns, raw) in enumerate(bag.messages(topic)):
        where = f"{bag.path} {topic}, message {number}"
        is_camera = kind in IMAGES
        message = None if is_camera and clock == "bag" and size_hw is not None else raw()
        times.append(_stamp_ns(message, where) if clock == "header" else time_ns)
        if is_camera:
            size_hw = size_hw or _picture(message, kind, where).shape[:2]
            continue
        for part in parts:
            numbers, said = _numbers(message, part, kind, where)
            if rows[part] and len(numbers) != len(rows[part][0]):
                raise ValueError(
                    f"{where}: '{part.field}' has {len(numbers)} numbers, in the first {len(rows[part][0])}"
                )
            rows[part].append(numbers)
            names[part] = names[part] or said
    order = np.argsort(np.array(times, np.int64), kind="stable")
    values = {part: np.array(numbers, np.float64)[order] for part, numbers in rows.items() if size_hw is None}
    return _Signal(np.array(times, np.int64)[order], order, values, names, size_hw)


def _numbers(message: Message, part: Part, kind: str, where: str) -> tuple[list[float], list[str]]:
    """The numbers of a part, and their names."""
    value, path = message, part.field
    for step in (step for step in path.split(".") if step):
        if isinstance(value, Sequence | np.ndarray) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        elif step in _fields(value):
            value = getattr(value, step)
        else:
            raise ValueError(f"{where}: no '{step}' of the field '{path}'; there is {listed(_fields(value))}")
    found = list(_flat(value, path))
    numbers, names = [number for _, number in found], [name for name, _ in found]
    said = list(getattr(message, "name", ())) if kind == JOINT_STATE else []
    if part.names:
        if absent := [name for name in part.names if name not in said]:
            raise ValueError(f"{where}: no joint {listed(absent)}; it has {listed(said)}")
        if len(said) != len(numbers):
            raise ValueError(f"{where}: {len(said)} names for {len(numbers)} values of '{path}'")
        return [numbers[said.index(name)] for name in part.names], list(part.names)
    if not 0 < len(numbers) <= _MAX_NUMBERS:
        raise ValueError(f"{where}: {len(numbers)} numbers in '{path or 'the message'}'; expected 1 to {_MAX_NUMBERS}")
    return numbers, said if len(said) == len(numbers) else names


def _flat(value: Any, path: str) -> Iterator[tuple[str, float]]:
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


def _fields(value: Any) -> list[str]:
    """Of a message; the only attributes that a mapping may name."""
    return [name for name in getattr(type(value), "__dataclass_fields__", {}) if not name.startswith("_")]


def _stamp_ns(message: Message, where: str) -> int:
    header = getattr(message, "header", None)
    if header is None:
        raise ValueError(f"{where}: messages of this kind have no header; use the clock 'bag' in the mapping")
    return int(header.stamp.sec) * _NS_PER_S + int(header.stamp.nanosec)


def _pictures(path: Path, distro: str, topic: str, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """Messages by their number, nearly in the order of the bag; each is decoded once, and held while it is wanted."""
    last = {number: position for position, number in enumerate(wanted.tolist())}
    held: dict[int, np.ndarray] = {}
    with BagFile(path, distro) as bag:
        kind = bag.kinds()[topic]
        messages = enumerate(bag.messages(topic))
        for position, number in enumerate(wanted.tolist()):
            while number not in held:
                read, (_, raw) = next(messages)
                if read in last:
                    held[read] = _picture(raw(), kind, f"message {read}")
            yield held[number]
            if last[number] == position:
                del held[number]


def _picture(message: Message, kind: str, where: str) -> np.ndarray:
    """uint8[h w 3], RGB."""
    if kind.endswith("CompressedImage"):
        if "compresseddepth" in str(message.format).lower():
            raise ValueError(f"{where}: a depth map ({message.format}), which is no camera")
        return decode_image(bytes(message.data), formats=("JPEG", "PNG", "WEBP"), what=where)
    if message.encoding not in _ENCODINGS:
        raise ValueError(f"{where}: pixels are {message.encoding!r}; expected one of {listed(_ENCODINGS)}")
    channels, order = _ENCODINGS[message.encoding]
    height, width, step = int(message.height), int(message.width), int(message.step)
    if not 0 < width * channels <= step or height * step != len(message.data):
        raise ValueError(f"{where}: {len(message.data)} bytes for {height} rows of {step}, {width} pixels wide")
    rows = np.frombuffer(message.data, np.uint8).reshape(height, step)[:, : width * channels]
    return np.ascontiguousarray(rows.reshape(height, width, channels)[:, :, order])
