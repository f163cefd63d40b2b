"""One recorded episode: constants, and signals by time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openpi.data.lerobot.files import read_json
from openpi.shared.errors import missing_key
from openpi_positronic.raw_episodes import layout
from openpi_positronic.raw_episodes.signals import Signal, as_times, is_time, open_signals, stepped_times


class Episode(Mapping[str, Any]):
    """A mapping of names to signals and constants. Pickles as its path.

    Attributes:
        path: its folder.
    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is still being recorded, or the recording was cut; or a name is used twice.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"episode folder {self.path} does not exist")
        if not layout.is_finished(self.path):
            raise ValueError(f"{self.path} is not finished: it is being recorded, or the recording was cut")

    @functools.cached_property
    def signals(self) -> dict[str, Signal]:
        signals = open_signals(self.path)
        if twice := sorted(signals.keys() & self.static.keys()):
            raise ValueError(f"{self.path} has {twice} both as signals and in {layout.STATIC_FILE}")
        return signals

    @functools.cached_property
    def static(self) -> dict[str, object]:
        """Constants of the episode, such as `task`."""
        return _read_json(self.path / layout.STATIC_FILE)

    @functools.cached_property
    def meta(self) -> dict[str, object]:
        """About the recording; no items of the episode."""
        return _read_json(self.path / layout.META_FILE)

    @property
    def start_ts(self) -> int:
        """The first moment at which all signals have a value."""
        return max(signal.start_ts for signal in self.signals.values())

    @property
    def last_ts(self) -> int:
        """The last sample of any signal."""
        return max(signal.last_ts for signal in self.signals.values())

    @property
    def duration_ns(self) -> int:
        return self.last_ts - self.start_ts

    def signal(self, name: str) -> Signal:
        """A signal.

        Raises:
            KeyError: there is none of that name; those that there are, are in the message.
        """
        if name not in self.signals:
            raise missing_key(name, self.signals, wanted_by=f"reading {self.path}")
        return self.signals[name]

    @property
    def time(self) -> EpisodeTime:
        """By time: `[t]`, `[[t, ...]]` or `[a:b:step]`, constants and signals together."""
        return EpisodeTime(self)

    def __getitem__(self, name: str) -> Any:
        return self.signals[name] if name in self.signals else self.static[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.signals, *self.static])

    def __len__(self) -> int:
        return len(self.signals) + len(self.static)

    def __reduce__(self) -> tuple[object, ...]:
        return Episode, (self.path,)


class EpisodeTime:
    """See `Episode.time`."""

    def __init__(self, episode: Episode):
        self._episode = episode

    def __getitem__(self, key: object) -> dict[str, Any]:
        if isinstance(key, slice):
            if key.step is None:
                raise KeyError(f"[{key.start}:{key.stop}] of an episode needs a step: signals have rates of their own")
            key = stepped_times(key, self._episode.last_ts)
        elif not is_time(key):
            key = as_times(key)
        return {**self._episode.static, **{name: signal.time[key] for name, signal in self._episode.signals.items()}}


def _read_json(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}
