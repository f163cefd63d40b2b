"""Bags of ROS 1 (`.bag`) and ROS 2 (a folder, or an `.mcap`), an episode each, by a mapping file (`ros_mapping`).

Topics have rates of their own; frames are sampled at one, as `sampling` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpi.convert.formats.ros_bag_file import BagFile, Message
from openpi.convert.formats.ros_mapping import IMAGES, JOINT_STATE, Mapped, Part, draft
from openpi.convert.formats.ros_values import numbers, picture, stamp_ns
from openpi.convert.sampling import NS_PER_S, instants, newest, silent_before, stillness
from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode, in_order, relative
from openpi.shared.errors import listed

_MOST_OVERTAKEN_S = 1.0


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
            every = [part for parts in mapped.columns.values() for part in parts]
            signals = {part: _signal(bag, part, kinds[part.topic], mapped.clock) for part in every}
            fps = mapped.fps if self.fps is None else self.fps
            at = instants([signal.times_ns for signal in signals.values()], fps)
            if late := silent_before({part.topic: signal.times_ns for part, signal in signals.items()}, at):
                raise ValueError(
                    f"{path}: {late}. If its stamps are of another clock or not set, use the clock 'bag' in the "
                    "mapping; else leave the topic or the bag out"
                )
            columns: dict[str, RawColumn] = {
                key: self._column(path, parts, signals, at) for key, parts in mapped.columns.items()
            }
        left_out = tuple(sorted(kinds.keys() - mapped.topics))
        told = (
            stillness(part.topic, signal.times_ns, at, is_camera=signal.size_hw is not None)
            for part, signal in signals.items()
        )
        remarks = tuple(dict.fromkeys(filter(None, told)))
        return RawEpisode(columns, fps, mapped.task, mapped.robot_type, left_out, remarks)

    def draft(self) -> dict[str, object]:
        """A mapping of the first bag's topics, to be looked through by its owner."""
        path = self._bags()[0]
        with BagFile(path, self.distro) as bag:
            return draft(bag.topics())

    def _bags(self) -> list[Path]:
        if not self.root.exists():
            raise FileNotFoundError(f"{self.root} does not exist; expected a bag, or a folder of bags")
        if self.root.is_file() or (self.root / "metadata.yaml").is_file():
            return [self.root]
        ros2 = {path.parent for path in self.root.rglob("metadata.yaml")}
        loose = [path for path in self.root.rglob("*.mcap") if path.parent not in ros2]
        # Those of a recorder that was killed are found, too, and refused when they are read: nobody would miss them.
        ros2 |= {path.parent for path in self.root.rglob("*.db3")}
        bags = [*ros2, *loose, *self.root.rglob("*.bag"), *self.root.rglob("*.bag.active")]
        bags = in_order(path for path in bags if not path.name.startswith("."))
        if not bags:
            raise FileNotFoundError(f"{self.root} holds no *.bag, no *.mcap and no folder with metadata.yaml")
        return bags

    def _column(self, path: Path, parts: Sequence[Part], signals: Mapping[Part, _Signal], at: np.ndarray) -> RawColumn:
        origin = ", ".join(f"{part.topic} {part.field}".strip() for part in parts)
        first = signals[parts[0]]
        if first.size_hw is not None:
            if len(parts) > 1 or parts[0].field or parts[0].names:
                raise ValueError(f"{origin} is a camera; expected one topic without field and names")
            frames = _pictures(path, self.distro, parts[0].topic, first.messages[newest(first.times_ns, at)])
            return Camera(len(at), first.size_hw, frames, origin)
        if cameras := [part.topic for part in parts if signals[part].size_hw is not None]:
            raise ValueError(f"{listed(cameras)} is a camera, among numbers; give it a column of its own")
        values = [signals[part].values[newest(signals[part].times_ns, at)] for part in parts]
        return Numbers(np.concatenate(values, axis=1), origin, tuple(_dimensions(parts, signals)))


def _dimensions(parts: Sequence[Part], signals: Mapping[Part, _Signal]) -> Iterator[str]:
    """Names that say what a dimension is: `data` of std_msgs says nothing, and two poses have the same fields."""
    counts = Counter(name for part in parts for name in signals[part].names)
    for part in parts:
        topic = part.topic.strip("/").replace("/", "_")
        for name in signals[part].names:
            head, dot, rest = name.partition(".")
            if not part.names and head == "data":
                yield f"{topic}{dot}{rest}"
            else:
                yield f"{topic}.{name}" if counts[name] > 1 else name


@dataclass(frozen=True)
class _Signal:
    """What the messages of a topic say of a part, in the order of their times.

    Attributes:
        times_ns: int64[n], ascending.
        messages: the numbers of the messages in the bag, int64[n].
        values: float64[n d]; of a camera [n 0].
        names: of the dimensions.
        size_hw: of a camera's pictures; None = numbers.
    """

    times_ns: np.ndarray
    messages: np.ndarray
    values: np.ndarray
    names: tuple[str, ...]
    size_hw: tuple[int, int] | None


def _signal(bag: BagFile, part: Part, kind: str, clock: str) -> _Signal:
    times, kept, rows = [], [], []
    names: tuple[str, ...] = ()
    size_hw: tuple[int, int] | None = None
    for number, (time_ns, decode) in enumerate(bag.messages(part.topic)):
        where = f"{bag.path} {part.topic}, message {number}"
        is_known_camera = size_hw is not None and clock == "bag"  # then no message needs to be looked into
        message = None if is_known_camera else decode()
        if kind in IMAGES:
            size_hw = size_hw or picture(message, kind, where).shape[:2]
        else:
            told = numbers(message, part, _joints(message, kind), where)
            if not told:
                continue
            names = names or tuple(told)
            if tuple(told) != names:
                raise ValueError(
                    f"{where}: its values are called {listed(told)}, in the first message {listed(names)}; say which, "
                    "and in which order, with names in the mapping"
                )
            rows.append(list(told.values()))
        times.append(stamp_ns(message, where) if clock == "header" else time_ns)
        kept.append(number)
    if not times:
        wanted = f" about {listed(part.names)}" if part.names else ""
        raise ValueError(f"{bag.path}: topic '{part.topic}' has no messages{wanted}")
    _check_clock_goes_on(np.array(times, np.int64), f"{bag.path} {part.topic}")
    order = np.argsort(np.array(times, np.int64), kind="stable")
    values = np.array(rows, np.float64).reshape(len(times), -1)[order] if rows else np.zeros((len(times), 0))
    return _Signal(np.array(times, np.int64)[order], np.array(kept, np.int64)[order], values, names, size_hw)


def _check_clock_goes_on(times_ns: np.ndarray, where: str) -> None:
    """Messages overtake each other by a little; sorted by a clock that was set back, two stretches would be mixed."""
    back_ns = np.maximum.accumulate(times_ns) - times_ns
    if (most_ns := int(back_ns.max())) > _MOST_OVERTAKEN_S * NS_PER_S:
        raise ValueError(
            f"{where}, message {int(back_ns.argmax())}: its stamp is {most_ns / NS_PER_S:.1f} s before one that came "
            "earlier: the clock was set back, or two clocks are in one topic. Use the clock 'bag' in the mapping"
        )


def _joints(message: Message, kind: str) -> list[str]:
    return [str(name) for name in message.name] if kind == JOINT_STATE else []


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
                    held[read] = picture(raw(), kind, f"message {read}")
            yield held[number]
            if last[number] == position:
                del held[number]
