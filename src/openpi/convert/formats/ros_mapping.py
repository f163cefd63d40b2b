"""Which topics of a bag become which columns: a JSON file, drafted from the bag, changed by its owner.

    {"fps": 30, "clock": "bag", "task": "...", "robot_type": null,
     "columns": {"observation.images.front": [{"topic": "/camera/image_raw"}],
                 "observation.state": [{"topic": "/joint_states", "field": "position", "names": ["waist", ...]}],
                 "action": [{"topic": "/command", "field": "data"}]}}

A column of numbers is joined from its parts, in order. `field` is a path inside the message; a message there counts
with all of its numbers. `names` picks the entries of a JointState and their order. `clock`: `bag` (when a message
arrived) or `header` (its stamp). `topics` in a draft says what the bag has, and is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpi.shared import strict_json
from openpi.shared.errors import listed

_MAX_BYTES = 1 << 20
CLOCKS = ("bag", "header")
IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
JOINT_STATE = "sensor_msgs/msg/JointState"
# What a draft takes of messages that it knows; "" is all of the message.
_FIELDS = {
    JOINT_STATE: "position",
    "std_msgs/msg/Float32MultiArray": "data",
    "std_msgs/msg/Float64MultiArray": "data",
    "std_msgs/msg/Float32": "data",
    "std_msgs/msg/Float64": "data",
    "geometry_msgs/msg/PoseStamped": "pose",
    "geometry_msgs/msg/Pose": "",
    "geometry_msgs/msg/TwistStamped": "twist",
    "geometry_msgs/msg/Twist": "",
}
_COMMANDS = ("command", "cmd", "target", "desired", "action", "goal", "leader", "master")


@dataclass(frozen=True)
class Part:
    """A part of a column: a topic, what of its messages, and which names of a JointState."""

    topic: str
    field: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mapped:
    """A mapping file."""

    fps: float
    columns: Mapping[str, tuple[Part, ...]]
    clock: str = "bag"
    task: str | None = None
    robot_type: str | None = None

    @classmethod
    def load(cls, file: Path) -> Mapped:
        """
        Raises:
            ValueError, OSError: no such file; what is wrong in it is named.
        """
        if (size := file.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"{file} is no mapping: it has {size:,} bytes")
        return parse(file.read_text(encoding="utf-8"), str(file))

    @property
    def topics(self) -> set[str]:
        return {part.topic for parts in self.columns.values() for part in parts}


@dataclass(frozen=True)
class Topic:
    """What a bag has under a name; `joints`: of a JointState, a tuple for each set that comes together."""

    kind: str
    num_messages: int
    rate_hz: float
    joints: tuple[tuple[str, ...], ...] = ()


def parse(text: str, where: str) -> Mapped:
    """
    Raises:
        ValueError: no such file; what is wrong in it is named.
    """
    try:
        told = strict_json.parse(text)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from error
    if not isinstance(told, dict) or not isinstance(told.get("columns"), dict) or not told["columns"]:
        raise ValueError(f"{where}: expected an object with 'columns', an object of lists of topics")
    fps, clock = told.get("fps"), told.get("clock", CLOCKS[0])
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps <= 1000:
        raise ValueError(f"{where}: 'fps' is {fps!r}; expected frames per second, such as 30")
    if clock not in CLOCKS:
        raise ValueError(f"{where}: 'clock' is {clock!r}; expected one of {listed(CLOCKS)}")
    columns = {key: _parts(value, f"{where}: columns['{key}']") for key, value in told["columns"].items()}
    return Mapped(fps, columns, clock, _text(told, "task", where), _text(told, "robot_type", where))


def _text(told: Mapping[str, object], key: str, where: str) -> str | None:
    value = told.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: '{key}' is {value!r}; expected a text or null")
    return value


def _parts(value: object, where: str) -> tuple[Part, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is {str(value)[:80]}; expected a list such as [{{'topic': '/joint_states'}}]")
    return tuple(_part(entry, where) for entry in value)


def _part(entry: object, where: str) -> Part:
    if not isinstance(entry, dict) or not isinstance(entry.get("topic"), str):
        raise ValueError(f"{where} has {str(entry)[:80]}; expected an object with a 'topic'")
    if unknown := entry.keys() - {"topic", "field", "names"}:
        raise ValueError(f"{where} has {listed(sorted(unknown))}; known are 'topic', 'field' and 'names'")
    field, names = entry.get("field", ""), entry.get("names", [])
    if not isinstance(field, str) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: 'field' is a text and 'names' a list of texts; found {field!r} and {names!r}")
    return Part(entry["topic"], field, tuple(names))


def draft(topics: Mapping[str, Topic]) -> dict[str, object]:
    """A mapping from what a bag has: cameras by their topics, commands as actions, other numbers as state.

    Its rate is that of the slowest camera, else of the slowest signal.
    """
    columns: dict[str, list[dict[str, Any]]] = {}
    for name, topic in topics.items():
        if topic.kind in IMAGES and "depth" not in name.lower():
            columns[f"observation.images.{_camera_name(name)}"] = [{"topic": name}]
    for name, topic in topics.items():
        if topic.kind in _FIELDS:
            is_command = any(word in name.lower() for word in _COMMANDS)
            part: dict[str, Any] = {"topic": name, "field": _FIELDS[topic.kind]}
            parts = [{**part, "names": list(names)} for names in topic.joints] or [part]
            columns.setdefault("action" if is_command else "observation.state", []).extend(parts)
    used = {part["topic"]: topics[part["topic"]] for parts in columns.values() for part in parts}
    moving = [topic for topic in used.values() if topic.rate_hz]
    rates = [topic.rate_hz for topic in moving if topic.kind in IMAGES] or [topic.rate_hz for topic in moving]
    shown = {
        name: {"type": topic.kind, "messages": topic.num_messages, "hz": round(topic.rate_hz, 2)}
        for name, topic in topics.items()
    }
    fps = max(1, round(min(rates))) if rates else None
    return {"fps": fps, "clock": "bag", "task": None, "robot_type": None, "columns": columns, "topics": shown}


def _camera_name(topic: str) -> str:
    """`/camera/front/image_raw/compressed` -> `camera_front`."""
    said = [word for word in topic.split("/") if word]
    useful = [word for word in said if word not in ("image_raw", "image", "color", "compressed", "rgb", "image_rect")]
    return "_".join(useful or said)
