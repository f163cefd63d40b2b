"""Encoding camera frames, and joining encoded episodes into one file without encoding again.

Training reads frames at random, so every second frame is a key frame; there are no B-frames, so frames are
shown in the order in which they are stored.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream

from openpi.data.lerobot.table_writer import FILES_PER_CHUNK
from openpi.data.lerobot.video import address, open_video

VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
GOP_FRAMES = 2
PIXEL_FORMAT = "yuv420p"
_ENCODERS = {
    # encoder: (name of the format, options)
    "libsvtav1": ("av1", {"g": str(GOP_FRAMES), "crf": "30"}),
    "libx264": ("h264", {"g": str(GOP_FRAMES), "crf": "23", "bf": "0"}),
    "h264": ("h264", {"g": str(GOP_FRAMES), "bf": "0"}),
    # Only behind videos that are HEVC already. A container says `hvc1` where players shall take it.
    "libx265": ("hevc", {"g": str(GOP_FRAMES), "crf": "23", "x265-params": "bframes=0:log-level=none", "tag": "hvc1"}),
}
_ODD_SIZES = ("libsvtav1",)  # the others halve the colors of whole pairs of pixels only


def choose_encoder(codec: str | None = None) -> str:
    """AV1 if this FFmpeg can write it, else H.264; or the given one, `hevc` included.

    Raises:
        ValueError: there is no encoder for it here.
    """
    wanted = [encoder for encoder, (name, _) in _ENCODERS.items() if codec in (None, name)]
    for encoder in wanted:
        if encoder in av.codecs_available:
            return encoder
    known = sorted({name for name, _ in _ENCODERS.values()})
    if not wanted:
        raise ValueError(f"the videos are {codec}, which is not written here; known are {', '.join(known)}")
    raise ValueError(f"this build of PyAV has none of the encoders {wanted} for {codec or 'video'}")


def codec_name(encoder: str) -> str:
    """`av1`, `h264` or `hevc`."""
    return _ENCODERS[encoder][0]


def check_size(key: str, size_hw: tuple[int, int], encoder: str) -> None:
    """Raises ValueError for a height or width that the encoder cannot write."""
    if encoder not in _ODD_SIZES and any(side % 2 for side in size_hw):
        raise ValueError(
            f"feature '{key}' is {size_hw} pixels; {codec_name(encoder)} video needs an even height and width (store "
            "it with dtype 'image', or resize it)"
        )


def encode_video(path: Path, frames_hwc: Iterable[np.ndarray], fps: float, encoder: str, threads: int = 0) -> None:
    """Writes an mp4 of uint8 RGB [h, w, 3] frames; `check_size` says which sizes.

    Args:
        threads: of the encoder; 0 = as many as it likes.
    """
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder prints its settings otherwise
    with av.open(address(path), "w", format="mp4") as container:
        stream: VideoStream | None = None
        for frame in frames_hwc:
            if stream is None:
                stream = _add_stream(container, frame.shape[:2], fps, encoder, threads)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())


class JoinedVideo:
    """An mp4 to which encoded episodes are appended packet by packet. Close it, or the file is not
    readable."""

    def __init__(self, path: Path, fps: float):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.num_frames = 0
        self.num_bytes = 0
        self._fps = frame_rate(fps)
        self._container = av.open(address(path), "w", format="mp4")
        self._stream: VideoStream | None = None
        self._kind: tuple[object, ...] | None = None

    @property
    def duration_s(self) -> float:
        return self.num_frames / float(self._fps)

    def fits(self, path: Path) -> bool:
        """Whether the frames of `path` were encoded like those that are here: one file has one description of it."""
        return self._kind is None or self._kind == _encoding(path)

    def append(self, path: Path) -> None:
        """Adds the frames of `path`, which `fits`."""
        if self._kind is None:
            self._kind = _encoding(path)
        with open_video(path) as source:
            stream = source.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(stream, opaque=True)
            assert stream.time_base is not None
            shift = round(self.num_frames / self._fps / stream.time_base)
            for packet in source.demux(stream):
                if packet.dts is None or packet.pts is None:  # the empty packet at the end
                    continue
                packet.pts += shift
                packet.dts += shift
                packet.stream = self._stream
                self._container.mux(packet)
            self.num_frames += stream.frames
        self.num_bytes += path.stat().st_size

    def close(self) -> None:
        self._container.close()


def _encoding(path: Path) -> tuple[object, ...]:
    """What a decoder is told before the first frame."""
    with open_video(path) as container:
        context = container.streams.video[0].codec_context
        return context.name, context.width, context.height, context.extradata


class VideoFiles:
    """Video files of one camera, rolled over by size."""

    def __init__(self, root: Path, key: str, fps: float, max_bytes: float, first_file: int = 0):
        self._root = root
        self._key = key
        self._fps = fps
        self._max_bytes = max_bytes
        self._joined: JoinedVideo | None = None
        self._number = first_file - 1

    def append(self, encoded: Path) -> dict[str, int | float]:
        """Adds an encoded episode; says in which file and at what time it lies."""
        if self._joined is None or not self._has_room(self._joined, encoded):
            self._joined = self._next_file()
        begin_s = self._joined.duration_s
        self._joined.append(encoded)
        chunk, file = divmod(self._number, FILES_PER_CHUNK)
        place = {
            "chunk_index": chunk,
            "file_index": file,
            "from_timestamp": begin_s,
            "to_timestamp": self._joined.duration_s,
        }
        return {f"videos/{self._key}/{name}": value for name, value in place.items()}

    def _has_room(self, joined: JoinedVideo, encoded: Path) -> bool:
        return joined.num_bytes + encoded.stat().st_size <= self._max_bytes and joined.fits(encoded)

    def close(self) -> None:
        if self._joined is not None:
            joined, self._joined = self._joined, None
            joined.close()

    def _next_file(self) -> JoinedVideo:
        self.close()
        self._number += 1
        chunk, file = divmod(self._number, FILES_PER_CHUNK)
        path = VIDEO_PATH.format(video_key=self._key, chunk_index=chunk, file_index=file)
        return JoinedVideo(self._root / path, self._fps)


def _add_stream(
    container: OutputContainer, size_hw: tuple[int, ...], fps: float, encoder: str, threads: int
) -> VideoStream:
    options = dict(_ENCODERS[encoder][1])
    if encoder == "libsvtav1" and threads:  # the only one that does not go by the count below
        options["svtav1-params"] = f"lp={threads}"
    stream = container.add_stream(encoder, rate=frame_rate(fps), options=options)
    assert isinstance(stream, VideoStream)
    stream.codec_context.thread_count = threads
    stream.height, stream.width = size_hw
    stream.pix_fmt = PIXEL_FORMAT
    with _own_priorities():
        stream.codec_context.open()
    return stream


@contextlib.contextmanager
def _own_priorities() -> Iterator[None]:
    """Takes back what SVT-AV1 does where it may, as root in a container: the thread that opens it and those that it
    starts get the highest real-time priority, and nothing else, a robot's control loop least of all, gets its turn."""
    if not hasattr(os, "sched_getscheduler"):  # not Linux
        yield
        return
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    before = set(_threads())
    yield
    for thread in (0, *(set(_threads()) - before)):
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setscheduler(thread, policy, param)


def _threads() -> list[int]:
    folder = Path("/proc/self/task")
    return [int(entry.name) for entry in folder.iterdir()] if folder.is_dir() else []


def frame_rate(fps: float) -> Fraction:
    """As containers have it: 30000/1001 for 29.97."""
    return Fraction(fps).limit_denominator(1001)
