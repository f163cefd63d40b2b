"""Positronic's raw recordings as a format of `openpi convert`: a codec says which signals become which columns.

Every column is sampled at start, start + 1/fps, ...: the newest sample of each signal so far. An episode starts when
every signal of its columns has a value. Source: the serving specification, section 6.6.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openpi.convert.sampling import instants, silent_before, stillness
from openpi.convert.source import Camera, EpisodeRef, Numbers, RawColumn, RawEpisode, relative
from openpi.data.lerobot.episode_check import size_hw
from openpi.data.lerobot.features import CAMERA_DTYPES, Feature
from openpi.shared.errors import listed
from openpi_positronic.codecs.catalog import get_codec
from openpi_positronic.codecs.codec import Codec, Column
from openpi_positronic.raw_episodes import Episode, RawDataset
from openpi_positronic.raw_episodes.signals import Signal

logger = logging.getLogger(__name__)

ROBOT_TYPE = "positronic"


@dataclass(frozen=True)
class PositronicRecordings:
    """Positronic's raw recordings, by a codec.

    Attributes:
        root: a raw dataset, or a folder of several.
        codec: its name, path/to/file.py:attribute or package.module:attribute; or itself.
        fps: frames per second; default: those of the codec.
    Raises:
        ValueError: no such codec, or it is for inference only; or there is no rate.
    """

    root: Path
    codec: str | Codec = "ee"
    fps: float | None = None

    def __post_init__(self) -> None:
        codec = get_codec(self.codec) if isinstance(self.codec, str) else self.codec
        columns, features = codec.training_columns(), codec.training_meta["lerobot_features"]
        if slashed := [key for key in features if "/" in key]:
            raise ValueError(
                f"this codec calls columns {slashed}, and LeRobot datasets allow no '/' in names; convert with 'ee' or "
                "'eepose_absolute', which have the same values under 'observation.state' and so on"
            )
        if columns.keys() != features.keys():
            raise ValueError(f"this codec describes {listed(features)}, and has {listed(columns)}; expected the same")
        fps = codec.training_meta.get("action_fps") if self.fps is None else self.fps
        if fps is None:
            raise ValueError("this codec has no rate of its own; name one with fps (--fps), such as 15")
        # The horizon counts when commands are sent; episodes may be appended by a codec with another.
        codec = codec.with_parameters({"horizon_sec": None})
        for name, value in {"root": Path(self.root).expanduser(), "codec": codec, "fps": fps}.items():
            object.__setattr__(self, name, value)

    def episodes(self) -> Sequence[EpisodeRef]:
        dataset = RawDataset(self.root)
        for path in dataset.unfinished:
            logger.warning("left out: %s is not finished", path)
        return [self._ref(episode) for episode in dataset]

    def read(self, ref: EpisodeRef) -> RawEpisode:
        assert isinstance(self.codec, Codec) and self.fps is not None
        episode, columns = Episode(ref.files[0]), self.codec.training_columns()
        features: Mapping[str, Feature] = self.codec.training_meta["lerobot_features"]
        times = frame_times(episode, columns, self.fps)
        signals = {name: _signal(episode, name) for name in _signal_names(columns)}
        still = [stillness(s.name, s.timestamps, times, is_camera=s.kind == "image") for s in signals.values()]
        remarks = [remark for remark in still if remark]
        try:
            task = self.codec.training_task(episode.static) or ""
        except ValueError as error:  # of which nothing is made; whoever is asked for a task is told
            task, remarks = None, [*remarks, str(error)]
        return RawEpisode(
            {key: _column(columns[key], signals, times, feature) for key, feature in features.items()},
            self.fps,
            task,
            ROBOT_TYPE,
            tuple(sorted(episode.signals.keys() - {signal.name for signal in signals.values()})),
            tuple(remarks),
            features,
        )

    def _ref(self, episode: Episode) -> EpisodeRef:
        assert isinstance(self.codec, Codec)
        name, names = relative(episode.path, self.root), _signal_names(self.codec.training_columns())
        try:
            there, created = episode.signals, episode.meta.get("created_ts_ns")
        except ValueError as error:
            return EpisodeRef(name, (episode.path,), flaw=str(error))
        missing = [name for name in names if name not in there and _newer_name(name) not in there]
        identity = f"{episode.path.name}-{created}" if created else ""  # the number alone is no sign
        flaw = f"it lacks {', '.join(missing)}" if missing else ""
        return EpisodeRef(name, (episode.path,), identity=identity, flaw=flaw)


def frame_times(episode: Episode, columns: Mapping[str, Column], fps: float) -> np.ndarray:
    """int64[n] nanoseconds: from when all columns have a value until one of them changes for the last time.

    Raises:
        ValueError: there are none, or a signal is of another clock.
    """
    stamps = {name: _signal(episode, name).timestamps for name in _signal_names(columns)}
    times = instants(stamps.values(), fps)
    if late := silent_before(stamps, times):
        raise ValueError(f"{late}. If its times are of another clock, record it by that of the others")
    return times


def _column(column: Column, signals: Mapping[str, Signal], times: np.ndarray, feature: Feature) -> RawColumn:
    """At ascending times; no frame of a camera is decoded twice."""
    origin = ", ".join(column.signals)
    if feature["dtype"] in CAMERA_DTYPES:
        (name,) = column.signals
        frames = _images(column, name, signals[name], signals[name].rows_at(times))
        return Camera(len(times), size_hw(feature), frames, origin)
    values = {name: signals[name].values(signals[name].rows_at(times)) for name in column.signals}
    return Numbers(column.derive(values), origin)


def _images(column: Column, name: str, signal: Signal, rows: np.ndarray) -> Iterator[np.ndarray]:
    wanted, counts = np.unique(rows, return_counts=True)
    repeats = iter(counts.tolist())
    for chunk in signal.chunks(wanted):
        for image in column.derive({name: chunk}):
            for _ in range(next(repeats)):
                yield image


def _signal(episode: Episode, name: str) -> Signal:
    newer = _newer_name(name)
    return episode.signal(newer if name not in episode.signals and newer in episode.signals else name)


def _newer_name(name: str) -> str:
    """What Positronic calls a signal since it records one command at a time."""
    return name.replace("robot_commands.", "robot_command.", 1)


def _signal_names(columns: Mapping[str, Column]) -> list[str]:
    return list(dict.fromkeys(name for column in columns.values() for name in column.signals))
