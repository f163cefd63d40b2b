"""Frames of a video file by time, with PyAV.

Random access = seek to the key frame at or before the time, then decode forward. Three things make it fast
(256x256 AV1, GOP 2, one core: about 0.5 ms a frame): files stay open, the next frames are decoded without
seeking again, and one colour converter serves a whole file. Opening a file costs about as much as a frame.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

MAX_OPEN_VIDEOS = 16  # per thread: each takes a file handle, of which a process has 1024, and a few MB


class VideoFile:
    """One open video. Not safe to share between threads.

    Args:
        fps: None = what the container says.
        gop_frames: how far key frames are known to be apart; more is learnt on the way.
    """

    def __init__(self, path: Path, fps: float | None = None, *, gop_frames: int = 2):
        if not path.is_file():
            raise FileNotFoundError(f"dataset file {path} is missing; copy or download the dataset again")
        try:
            self._container = av.open(str(path))
        except FFmpegError as error:
            raise ValueError(f"{path} is not a readable video ({error})") from error
        if not self._container.streams.video:
            raise ValueError(f"{path} has no video stream")
        self._path = path
        self._stream = self._container.streams.video[0]
        self.fps = float(self._stream.average_rate or 1) if fps is None else fps
        # Frame threads would hold back as many frames as there are threads: bad for reading two.
        self._stream.codec_context.thread_count = 1
        self._to_rgb = VideoReformatter()
        self._ticks_per_s = 1 / float(self._stream.time_base or 1 / self.fps)
        self._first_pts = self._stream.start_time or 0
        self._frames: Iterator[VideoFrame] | None = None
        self._last: VideoFrame | None = None
        self._gop_frames = gop_frames

    @property
    def size_hw(self) -> tuple[int, int]:
        return self._stream.height, self._stream.width

    @property
    def num_frames(self) -> int:
        """As the container says, from its index or else its duration; nothing is decoded."""
        if self._stream.frames:
            return self._stream.frames
        if self._stream.duration:
            return round(self._stream.duration / self._ticks_per_s * self.fps)
        return round((self._container.duration or 0) / av.time_base * self.fps)

    def frame_at(self, time_s: float) -> np.ndarray:
        """The frame shown nearest to `time_s`, as uint8 RGB [h, w, 3].

        Raises:
            ValueError: no frame lies within half a frame period of `time_s`.
        """
        half_period = self._ticks_per_s / self.fps / 2
        target = self._first_pts + time_s * self._ticks_per_s
        try:
            frame = self._decode_to(target, half_period)
        except FFmpegError as error:
            raise ValueError(f"{self._path} cannot be decoded at {time_s:.4f} s ({error})") from error
        if frame is None:
            raise ValueError(
                f"{self._path} has no frame at {time_s:.4f} s (within half a frame at {self.fps} fps); "
                f"it holds {self.num_frames} frames. The video and the table come from different recordings"
            )
        return self._to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()

    def close(self) -> None:
        self._container.close()

    def _decode_to(self, target: float, half_period: float) -> VideoFrame | None:
        """Decodes up to the frame within half a period of `target`; None if there is none."""
        if self._last is not None and abs(_pts(self._last) - target) < half_period:
            return self._last
        if not self._is_ahead_within_gop(target, 2 * half_period):
            self._seek(target, half_period)
        for frame in self._frames or ():
            self._note_gop(frame, 2 * half_period)
            self._last = frame
            if _pts(frame) > target - half_period:
                return frame if _pts(frame) <= target + half_period else None
        self._frames = self._last = None
        return None

    def _is_ahead_within_gop(self, target: float, period: float) -> bool:
        if self._frames is None or self._last is None:
            return False
        ahead = (target - _pts(self._last)) / period
        return 0 < ahead <= self._gop_frames

    def _seek(self, target: float, half_period: float) -> None:
        """Positions the decoder on a key frame at or before `target`.

        Containers index by decoding time, which with B-frames is earlier than the time shown: the key frame
        found may be shown after the target. Then try from further back, at last from the start.
        """
        for back_s in (0.0, 1.0, 10.0, None):
            wanted = self._first_pts if back_s is None else target + half_period - back_s * self._ticks_per_s
            self._container.seek(max(int(wanted), self._first_pts), stream=self._stream)
            frames = self._container.decode(self._stream)
            first = next(frames, None)
            if back_s is None or (first is not None and _pts(first) <= target + half_period):
                break
        self._last = None
        self._frames = iter(()) if first is None else _chain(first, frames)
        self._since_key = 0

    def _note_gop(self, frame: VideoFrame, period: float) -> None:
        """Learns how far apart key frames are: up to that distance decoding on is no dearer than a seek."""
        if self._last is None:
            self._key_pts = _pts(frame)
            return
        if frame.key_frame:
            self._key_pts = _pts(frame)
        self._gop_frames = max(self._gop_frames, round((_pts(frame) - self._key_pts) / period) + 1)


class VideoCache:
    """Open videos of the current thread, the least recently used closed first. Pickles as empty."""

    def __init__(self, fps: float, max_open: int = MAX_OPEN_VIDEOS):
        self._fps = fps
        self._max_open = max_open
        self._local = threading.local()

    def frames_at(self, path: Path, times_s: Sequence[float]) -> list[np.ndarray]:
        """One frame for each time, see `VideoFile.frame_at`."""
        video = self._open(path)
        return [video.frame_at(time_s) for time_s in times_s]

    def num_frames(self, path: Path) -> int:
        return self._open(path).num_frames

    def _open(self, path: Path) -> VideoFile:
        videos = self._videos()
        if path in videos:
            videos.move_to_end(path)
            return videos[path]
        while len(videos) >= self._max_open:
            videos.popitem(last=False)[1].close()
        videos[path] = VideoFile(path, self._fps)
        return videos[path]

    def _videos(self) -> "OrderedDict[Path, VideoFile]":
        if not hasattr(self._local, "videos"):
            self._local.videos = OrderedDict()
        return self._local.videos

    def __getstate__(self) -> tuple[float, int]:
        return self._fps, self._max_open

    def __setstate__(self, state: tuple[float, int]) -> None:
        self.__init__(*state)


def _pts(frame: VideoFrame) -> int:
    if frame.pts is None:
        raise ValueError("the video has frames without a time stamp; encode it again as mp4")
    return frame.pts


def _chain(first: VideoFrame, rest: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    yield first
    yield from rest
