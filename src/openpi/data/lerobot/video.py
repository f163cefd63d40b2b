"""Frames of a video file by time, with PyAV.

Random access = seek to the key frame at or before the time, then decode forward. Three things make it fast
(256x256 AV1, GOP 2, one core: about 0.5 ms a frame): files stay open, the next frames are decoded without
seeking again, and one colour converter serves a whole file. Opening a file costs about as much as a frame.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.index import IndexEntries
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from openpi.data.lerobot.files import require_file
from openpi.shared.budgets import MAX_IMAGE_PIXELS, Budget
from openpi.shared.errors import first_line
from openpi.shared.file_kinds import found_instead

_EXACT_PERIODS = 1 / 16
MAX_OPEN_VIDEOS = 16  # per thread: each takes a file handle, of which a process has 1024, and a few MB

# FFmpeg goes by what is in a file, and would take a playlist, which names others.
_CONTAINERS = {"format_whitelist": "mov,matroska,avi"}


def open_video(path: Path) -> InputContainer:
    """For reading. Raises FFmpegError."""
    return av.open(address(path), options=_CONTAINERS)


def address(path: Path) -> str:
    """For FFmpeg, which takes what stands before a colon in a path for the name of a protocol."""
    return f"file:{path}"


def camera_stream(container: InputContainer, path: Path) -> VideoStream:
    """The one video of a file; a cover, as films have, is none.

    Raises:
        ValueError: there is none, or several, of which nothing says which is the camera; or its frames are too large.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    # PyAV has no context, against its types, where no decoder is known.
    if any(stream.codec_context is None for stream in streams):  # pyright: ignore[reportUnnecessaryComparison]
        raise ValueError(f"{path} is encoded in a way that is not known here, or damaged. Bring it here again as H.264")
    if len(streams) == 1:
        stream = streams[0]
        Budget(MAX_IMAGE_PIXELS, "pixels").spend(stream.width * stream.height, f"a frame of {path}")
        stream.codec_context.options = {"max_pixels": str(MAX_IMAGE_PIXELS)}  # of later frames
        return stream
    if not streams:
        raise ValueError(f"{path} has no video stream")
    kinds = ", ".join(f"{s.height} x {s.width} {s.codec_context.pix_fmt}" for s in streams)
    raise ValueError(
        f"{path} has {len(streams)} video streams ({kinds}); expected one, for nothing says which is the camera. Write "
        "each into a file of its own"
    )


class VideoFile:
    """One open video. Not safe to share between threads.

    Args:
        fps: None = what the container says.
        gop_frames: how far key frames are known to be apart; more is learnt on the way.
    """

    def __init__(self, path: Path, fps: float | None = None, *, gop_frames: int = 2):
        require_file(path)
        try:
            self._container = open_video(path)
        except (FFmpegError, OSError) as error:
            raise ValueError(f"{path} is not a readable video: {_why_no_video(path, error)}") from error
        self.path = path
        self._stream = camera_stream(self._container, path)
        self.size_hw = self._stream.height, self._stream.width
        self.fps = float(self._stream.average_rate or 1) if fps is None else fps
        # Frame threads would hold back as many frames as there are threads: bad for reading two.
        self._stream.codec_context.thread_count = 1
        self._to_rgb = VideoReformatter()
        self._ticks_per_s = 1 / float(self._stream.time_base or 1 / self.fps)
        self._first_pts = self._stream.start_time or 0
        self._frames: Iterator[VideoFrame] | None = None
        self._last: VideoFrame | None = None
        self._is_damaged = False
        self._gop_frames = gop_frames

    @property
    def num_frames(self) -> int:
        """As the container says, from its index or else its duration; nothing is decoded."""
        if self._stream.frames:
            return self._stream.frames
        if self._stream.duration:
            return round(self._stream.duration / self._ticks_per_s * self.fps)
        return round((self._container.duration or 0) / av.time_base * self.fps)

    @property
    def is_counted(self) -> bool:
        """Whether `num_frames` is exact."""
        return bool(self._stream.frames)

    @property
    def rate(self) -> float | None:
        """Frames per second, as the container says."""
        return None if self._stream.average_rate is None else float(self._stream.average_rate)

    @property
    def pixel_format(self) -> str:
        """Name in FFmpeg, such as `yuv420p`."""
        return self._stream.codec_context.pix_fmt or "unknown"

    @property
    def bits(self) -> int:
        """Of a value of a pixel."""
        kind = self._stream.codec_context.format
        return max((component.bits for component in kind.components), default=8) if kind is not None else 8

    @property
    def _index(self) -> IndexEntries | None:
        """An entry per frame; None where the container lists key frames only, and more as they are met (Matroska)."""
        entries = self._stream.index_entries
        return entries if 0 < len(entries) == self._stream.frames else None

    def time_of(self, number: int) -> float:
        """When the container shows a frame, in seconds after its first; by its index if it has one, else by the rate.

        Nothing more of the file is read; of uneven frames neither may be right, see `frame`.
        """
        index = self._index
        if index is None or number >= len(index):
            return number / self.fps
        return (index[number].timestamp - index[0].timestamp) / self._ticks_per_s

    @cached_property
    def key_frames(self) -> np.ndarray:
        """int64[k]: numbers of the frames that decode alone, by the container's index; empty without one."""
        index = self._index or ()
        return np.array([number for number in range(len(index)) if index[number].is_keyframe], np.int64)

    def frame(self, number: int) -> np.ndarray:
        """A frame by its number in the file, as uint8 RGB [h, w, 3].

        Raises:
            ValueError: there is none, or it cannot be decoded.
        """
        shown = None if self._is_index_enough else _shown_ticks(self.path, self.path.stat().st_mtime_ns)
        if shown is not None and number < len(shown):
            return self._shown(float(shown[number]), _EXACT_PERIODS)
        is_exact = self._index is not None and not self._stream.codec_context.has_b_frames
        return self._shown(self._ticks_at(self.time_of(number)), _EXACT_PERIODS if is_exact else 0.5)

    @cached_property
    def _is_index_enough(self) -> bool:
        """Whether an index tells when frames are shown.

        It has the times of decoding, which with B-frames are others where frames are unevenly spaced. Without, they are
        the same, and frames may lie as close together as they like.
        """
        index = self._index
        if index is None or not self._stream.codec_context.has_b_frames:
            return index is not None
        steps = np.diff([index[number].timestamp for number in range(len(index))])
        return bool(not len(steps) or np.ptp(steps) <= _EXACT_PERIODS * self._ticks_per_s / self.fps)

    def frame_at(self, time_s: float) -> np.ndarray:
        """The frame shown nearest to `time_s`, as uint8 RGB [h, w, 3].

        Raises:
            ValueError: no frame lies within half a frame period of `time_s`.
        """
        return self._shown(self._ticks_at(time_s), 0.5)

    def _ticks_at(self, time_s: float) -> float:
        return self._first_pts + time_s * self._ticks_per_s

    def _shown(self, target: float, tolerance_periods: float) -> np.ndarray:
        period = self._ticks_per_s / self.fps
        time_s = (target - self._first_pts) / self._ticks_per_s
        try:
            frame = self._decode_to(target, tolerance_periods * period, period)
        except FFmpegError as error:
            self._frames = self._last = None  # the next one is looked for from its key frame
            raise ValueError(f"{self.path} cannot be decoded at {time_s:.4f} s ({error})") from error
        if frame is None:
            raise ValueError(
                f"{self.path} has no frame at {time_s:.4f} s (within {tolerance_periods:g} of a frame at "
                f"{self.fps:g} fps); it holds {self.num_frames} frames. The video and the table come from different "
                "recordings"
            )
        if self._is_damaged:
            raise ValueError(
                f"{self.path} is damaged: at {time_s:.4f} s its decoder has to make up (parts of) the picture. Bring "
                "the file here again, or leave its episodes out"
            )
        if (frame.height, frame.width) != self.size_hw:
            height, width = self.size_hw
            raise ValueError(
                f"{self.path} changes its size: at {time_s:.4f} s to {frame.height} x {frame.width} (height x width); "
                f"expected {height} x {width}, as at its beginning. Encode it again, or leave its episodes out"
            )
        if frame.rotation:
            raise ValueError(
                f"{self.path} is to be shown turned by {-frame.rotation} degrees (its display matrix), as of phones: "
                "players turn it, and its pixels are not. Encode it again, turned as the robot's camera sees; or "
                "leave its episodes out"
            )
        return self._to_rgb.reformat(frame, format="rgb24", threads=1).to_ndarray()

    def close(self) -> None:
        self._container.close()

    def _decode_to(self, target: float, tolerance: float, period: float) -> VideoFrame | None:
        """Decodes up to the frame within `tolerance` of `target`; None if there is none."""
        if self._last is not None and abs(_pts(self._last) - target) < tolerance:
            return self._last
        if not self._is_ahead_within_gop(target, period):
            self._seek(target, tolerance)
        for frame in self._frames or ():
            self._note_gop(frame, period)
            self._last = frame
            # Decoders make up what a damaged packet does not tell, and go on from that up to the next key frame.
            self._is_damaged = frame.is_corrupt or (self._is_damaged and not frame.key_frame)
            if _pts(frame) > target - tolerance:
                return frame if _pts(frame) <= target + tolerance else None
        self._frames = self._last = None
        return None

    def _is_ahead_within_gop(self, target: float, period: float) -> bool:
        if self._frames is None or self._last is None:
            return False
        ahead = (target - _pts(self._last)) / period
        return 0 < ahead <= self._gop_frames

    def _seek(self, target: float, tolerance: float) -> None:
        """Positions the decoder on a key frame at or before `target`.

        Containers index by decoding time, which with B-frames is earlier than the time shown: the key frame
        found may be shown after the target. Then try from further back, at last from the start.
        """
        for back_s in (0.0, 1.0, 10.0, None):
            wanted = self._first_pts if back_s is None else target + tolerance - back_s * self._ticks_per_s
            self._container.seek(max(int(wanted), self._first_pts), stream=self._stream)
            frames = self._container.decode(self._stream)
            first = next(frames, None)
            if back_s is None or (first is not None and _pts(first) <= target + tolerance):
                break
        self._last, self._is_damaged = None, False
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
    """Open videos of the current thread, the least recently used closed first. Pickles as empty.

    Args:
        check: of each file that is opened; raises.
    """

    def __init__(self, fps: float, check: Callable[[VideoFile], object]):
        self._fps = fps
        self._check = check
        self._local = threading.local()

    def frames(self, path: Path, numbers: Sequence[int]) -> list[np.ndarray]:
        """One frame for each number, see `VideoFile.frame`."""
        video = self._open(path)
        return [video.frame(number) for number in numbers]

    def key_frames(self, path: Path) -> np.ndarray:
        """See `VideoFile.key_frames`."""
        return self._open(path).key_frames

    def _open(self, path: Path) -> VideoFile:
        videos = self._videos()
        if path in videos:
            videos.move_to_end(path)
            return videos[path]
        while len(videos) >= MAX_OPEN_VIDEOS:
            videos.popitem(last=False)[1].close()
        video = VideoFile(path, self._fps)
        self._check(video)
        videos[path] = video
        return video

    def _videos(self) -> "OrderedDict[Path, VideoFile]":
        if not hasattr(self._local, "videos"):
            self._local.videos = OrderedDict()
        return self._local.videos

    def __reduce__(self) -> tuple[object, ...]:
        return VideoCache, (self._fps, self._check)


@lru_cache(maxsize=256)  # files are opened again and again, and this reads all of one
def _shown_ticks(path: Path, modified_ns: int) -> np.ndarray:
    """int64[n], when each frame of a file is shown, in that order: of its packets, none of which is decoded.

    Raises:
        ValueError: they do not say.
    """
    del modified_ns  # another file may get the name
    try:
        with open_video(path) as container:
            shown = [packet.pts for packet in container.demux(camera_stream(container, path)) if packet.size]
    except FFmpegError as error:
        raise ValueError(f"{path} cannot be read to its end ({error}). Bring it here again") from error
    if any(ticks is None for ticks in shown):
        raise ValueError(f"{path} has frames without a time stamp; encode it again as mp4")
    return np.sort(np.array(shown, np.int64))


def _why_no_video(path: Path, error: BaseException) -> str:
    if other := found_instead(path, "MP4"):
        return other
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and not _has_index(path):
        return (
            f"it begins as MP4 and lacks its index (moov): a copy was cut, or its writer was never closed "
            f"({path.stat().st_size} bytes). Copy it again, or leave out its episodes"
        )
    return (
        f"{getattr(error, 'strerror', None) or first_line(error)}; expected MP4, Matroska or AVI. Bring it here again"
    )


def _has_index(path: Path) -> bool:
    """Whether one of the boxes of an MP4 file is its index."""
    size, offset = path.stat().st_size, 0
    with path.open("rb") as file:
        while offset + 8 <= size:
            file.seek(offset)
            header = file.read(16)
            length = int.from_bytes(header[:4], "big")
            if header[4:8] == b"moov":
                return offset + length <= size
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            if length < 8:
                return False
            offset += length
    return False


def _pts(frame: VideoFrame) -> int:
    if frame.pts is None:
        raise ValueError("the video has frames without a time stamp; encode it again as mp4")
    return frame.pts


def _chain(first: VideoFrame, rest: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    yield first
    yield from rest
