"""Taking an episode out of a video file packet by packet, without decoding it.

That can be done where its packets lie together and begin with a key frame, as in files that were joined from episodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet

from openpi.data.lerobot.video import address, open_video
from openpi.data.lerobot.video_writer import frame_rate


@dataclass(frozen=True)
class VideoPackets:
    """The packets of a file in the order in which they are stored.

    Attributes:
        shown, decoded: int64[n], when; in ticks.
        is_key: bool[n].
    """

    path: Path
    shown: np.ndarray
    decoded: np.ndarray
    is_key: np.ndarray

    @classmethod
    def read(cls, path: Path) -> VideoPackets:
        """Decodes nothing.

        Raises:
            ValueError: packets without a time.
        """
        with open_video(path) as container:
            rows = [(packet.pts, packet.dts, packet.is_keyframe) for packet in _packets(container)]
        if any(shown is None or decoded is None for shown, decoded, _ in rows):
            raise ValueError(f"{path} has packets without a time; encode it again as mp4")
        columns = list(zip(*rows, strict=True)) or [(), (), ()]
        return cls(path, np.array(columns[0], np.int64), np.array(columns[1], np.int64), np.array(columns[2], bool))

    @cached_property
    def _rank(self) -> np.ndarray:
        """int64[n]: the number of the frame of each, as they are shown."""
        return np.argsort(np.argsort(self.shown, kind="stable"), kind="stable")

    def place(self, first: int, length: int) -> slice | None:
        """Where the packets of some frames are; None where they cannot be had without others.

        Args:
            first: number of the first frame, as they are shown.
        """
        rank = self._rank
        rows = np.flatnonzero((rank >= first) & (rank < first + length))
        is_together = len(rows) == length and rows[-1] - rows[0] == length - 1
        # What follows an open group of pictures may need the one before: then some frame is shown before the first.
        if not is_together or not self.is_key[rows[0]] or rank[rows[0]] != first:
            return None
        return slice(int(rows[0]), int(rows[-1]) + 1)

    def cut(self, place: slice, target: Path, fps: float) -> None:
        """Writes them as an mp4 that begins with time 0 and shows its frames evenly, whatever their clock was.

        A recorder's clock would let the episodes of a file run into each other, and LeRobot takes no frame that is off
        by a tenth of a millisecond.
        """
        period = 1 / frame_rate(fps)
        numbers = np.argsort(np.argsort(self.shown[place], kind="stable"), kind="stable")
        delay = int((np.arange(len(numbers)) - numbers).max())  # no frame is decoded after it is shown
        with open_video(self.path) as source, av.open(address(target), "w", format="mp4") as container:
            stream = source.streams.video[0]
            copy = container.add_stream_from_template(stream, opaque=True)
            copy.time_base = period
            begin = int(self.decoded[place.start])
            waiting = iter(enumerate(numbers.tolist()))
            source.seek(begin, stream=stream)
            if (first := next(_packets(source), None)) is None or first.dts is None or first.dts > begin:
                source.seek(int(self.decoded[0]), stream=stream)
            else:
                source.seek(begin, stream=stream)
            for packet in _packets(source):
                assert packet.dts is not None
                if packet.dts < begin:
                    continue
                if (due := next(waiting, None)) is None:
                    break
                packet.time_base, packet.duration = period, 1
                packet.dts, packet.pts = due[0] - delay, due[1]
                packet.stream = copy
                container.mux(packet)


def _packets(container: InputContainer) -> Iterator[Packet]:
    """Of the first video, but for the empty one at the end."""
    return (packet for packet in container.demux(container.streams.video[0]) if packet.size)
