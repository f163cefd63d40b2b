"""One bag of ROS 1 or ROS 2, through the library `rosbags`.

A bag brings the definitions of its messages, and the library makes Python code of them. So nothing of a definition gets
there but names and numbers: constants are dropped, and every word is looked at first.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from openpi.convert.formats.ros_mapping import JOINT_STATE, Topic
from openpi.convert.sampling import NS_PER_S
from openpi.shared.errors import first_line, install_hint, listed
from openpi.shared.file_kinds import found_instead

if TYPE_CHECKING:
    from rosbags.typesys.store import Typestore

Message: TypeAlias = Any
"""What the library makes of a message: a dataclass with the fields of its definition."""

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*(/[A-Za-z][A-Za-z0-9_]*)*|")
_LOOKED_AT = 100  # messages, for who speaks on a topic
_MAX_DEFINITION = 1 << 20


class BagFile:
    """An open bag; a context manager.

    Raises, from all methods:
        ValueError: damaged, or of a kind that is not read. What a damaged file leads to in the library is of many
            types: its own, those of SQLite, YAML and Zstandard, and assertions.
        ImportError: `rosbags` is missing.
    """

    def __init__(self, path: Path, distro: str):
        self.path = path
        self._library = _Rosbags()
        is_ros1 = path.suffix == ".bag"
        if path.suffix == ".active" or (path.is_dir() and not (path / "metadata.yaml").is_file()):
            repair = f"rosbag reindex {path.name}" if path.suffix == ".active" else f"ros2 bag reindex {path.name}"
            raise ValueError(f"{path} was not finished, so its recorder was killed; repair it with `{repair}`")
        try:
            reader = self._library.rosbag1.Reader if is_ros1 else self._library.rosbag2.Reader
            self._reader: Any = reader(path)
            self._reader.open()
        except Exception as error:  # see above
            instead = found_instead(path) if path.is_file() else None
            is_mcap = path.suffix == ".mcap" or (path.is_dir() and any(path.glob("*.mcap")))
            repair = "; `mcap recover` brings back what was written" if is_mcap and not instead else ""
            raise ValueError(f"{path} is no readable bag: {instead or error}{repair}") from error
        try:
            types = self._types(distro)
        except BaseException:
            self._reader.close()
            raise
        self._decode: Callable[[Any, str], Message] = types.deserialize_ros1 if is_ros1 else types.deserialize_cdr

    def __enter__(self) -> BagFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def kinds(self) -> dict[str, str]:
        """Topic -> the type of its messages."""
        return {name: str(info.msgtype) for name, info in sorted(self._reader.topics.items())}

    def topics(self) -> dict[str, Topic]:
        """What each topic has; walks through the whole bag for the rates."""
        topics = {}
        for name, kind in self.kinds().items():
            times = [time_ns for time_ns, _ in self.messages(name)]
            seconds = (max(times) - min(times)) / NS_PER_S if times else 0
            rate_hz = (len(times) - 1) / seconds if seconds else 0.0
            topics[name] = Topic(kind, len(times), rate_hz, self._joints(name, kind))
        return topics

    def messages(self, topic: str) -> Iterator[tuple[int, Callable[[], Message]]]:
        """Time of arrival, and what decodes the message, in the order of the bag."""
        connections = [connection for connection in self._reader.connections if connection.topic == topic]
        try:
            for number, (connection, time_ns, raw) in enumerate(self._reader.messages(connections=connections)):
                yield time_ns, lambda c=connection, r=raw, n=number: self._message(r, c.msgtype, topic, n)
        except Exception as error:  # see above
            raise ValueError(f"{self.path} {topic}: the bag is damaged ({error})") from error

    def _message(self, raw: object, kind: str, topic: str, number: int) -> Message:
        try:
            return self._decode(raw, kind)
        except Exception as error:  # see above
            raise ValueError(f"{self.path} {topic}, message {number} of {kind} cannot be decoded: {error}") from error

    def _joints(self, topic: str, kind: str) -> tuple[tuple[str, ...], ...]:
        """Which joints messages are about; several nodes may share a topic."""
        if kind != JOINT_STATE:
            return ()
        first = itertools.islice(self.messages(topic), _LOOKED_AT)
        return tuple(dict.fromkeys(tuple(map(str, decode().name)) for _, decode in first))

    def _types(self, distro: str) -> Typestore:
        """The bag's own definitions, else those of the distribution."""
        typesys, definitions = self._library.typesys, {}
        for connection in self._reader.connections:
            text = connection.msgdef.data
            if text and connection.msgdef.format.name != "MSG":
                raise ValueError(
                    f"{self.path} defines {connection.msgtype} in {connection.msgdef.format.name}; expected msg"
                )
            if len(text) > _MAX_DEFINITION:
                raise ValueError(
                    f"{self.path}: the definition of {connection.msgtype[:80]} has {len(text):,} characters"
                )
            try:
                definitions |= typesys.get_types_from_msg(text, connection.msgtype) if text else {}
            except Exception as error:  # see above
                raise ValueError(
                    f"{self.path}: the definition of {connection.msgtype[:80]} is damaged: {first_line(error)}"
                ) from error
        if not definitions:
            known = {store.name.removeprefix("ROS2_").lower(): store for store in typesys.Stores}
            if distro not in known:
                raise ValueError(f"no distribution of ROS 2 is called '{distro}'; known are {listed(sorted(known))}")
            return typesys.get_typestore(known[distro])
        plain = {name: ([], fields) for name, (_, fields) in definitions.items()}
        _check_words(plain, str(self.path))
        store = typesys.get_typestore(typesys.Stores.EMPTY)
        try:
            store.register(plain)
        except Exception as error:  # see above
            raise ValueError(
                f"{self.path}: the definitions of its messages are damaged: {first_line(error)}"
            ) from error
        return store


def _check_words(value: object, where: str) -> None:
    """Raises ValueError for a text that is no name of a type or a field."""
    if isinstance(value, str):
        if not _WORD.fullmatch(value):
            raise ValueError(
                f"{where} defines messages with the name {value[:80]!r}; expected letters, digits, _ and /"
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_words(key, where)
            _check_words(item, where)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_words(item, where)


class _Rosbags:
    """What of `rosbags` is used, imported when it is."""

    def __init__(self) -> None:
        try:
            from rosbags import rosbag1, rosbag2, typesys
        except ImportError as error:
            raise ImportError(f"ROS bags need another package ({error}); {install_hint('convert')}") from error
        self.rosbag1, self.rosbag2, self.typesys = rosbag1, rosbag2, typesys
