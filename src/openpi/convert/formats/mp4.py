"""Videos of recordings, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from av.error import FFmpegError
from PIL import Image

from openpi.convert.source import Camera
from openpi.data.lerobot.video import camera_stream, open_video
from openpi.shared.file_kinds import found_instead


def count_frames(path: Path) -> int:
    """Without decoding any.

    Raises:
        ValueError: no such video, or damaged.
    """
    try:
        with open_video(path) as container:
            return sum(packet.size > 0 for packet in container.demux(camera_stream(container, path)))
    except FFmpegError as error:
        raise _unreadable(path, error) from error


def video(path: Path, length: int, size_hw: tuple[int, int], origin: str) -> Camera:
    """The first frames, resized (bicubic) where they have another size."""
    return Camera(length, size_hw, _frames(path, length, size_hw), origin)


def _frames(path: Path, length: int, size_hw: tuple[int, int]) -> Iterator[np.ndarray]:
    height, width = size_hw
    try:
        with open_video(path) as container:
            stream = camera_stream(container, path)
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                if number == length:
                    return
                if frame.is_corrupt:
                    raise ValueError(
                        f"{path} is damaged: the decoder has to make up (parts of) frame {number}. Bring the file here "
                        "again, or leave its episode out"
                    )
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                resized = (
                    image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
                )
                yield np.asarray(resized)
    except FFmpegError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be decoded: {found_instead(path, 'MP4') or error}")
