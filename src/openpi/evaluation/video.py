"""Frames to video files: H.264 in MP4, or an animated GIF or WebP where no player is at hand."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from openpi.data.lerobot.video import address
from openpi.shared import whole_file

_ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}


def write_video(path: Path | str, frames: Sequence[np.ndarray] | np.ndarray, *, fps: float) -> Path:
    """Writes frames to `path`; its suffix decides the format: `.mp4`, `.gif` or `.webp`.

    Args:
        frames: uint8[t, h, w, 3], RGB, t >= 1. H.264 needs even sides: an odd one loses its last line.
    Returns:
        The path. The file appears under its name only once it is complete.
    Raises:
        ValueError: no frames, frames of another shape or type, or an unknown suffix.
    """
    path = Path(path)
    frames = _checked(frames)
    suffix = path.suffix.lower()
    if suffix != ".mp4" and suffix not in _ANIMATIONS:
        raise ValueError(f"video path {str(path)!r} ends in {suffix!r}; expected .mp4, {', '.join(_ANIMATIONS)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file.replacing(path) as partial:
        if suffix == ".mp4":
            _write_mp4(partial, frames, fps)
        else:
            _write_animation(partial, frames, fps, _ANIMATIONS[suffix])
    return path


def tile(clips: Sequence[np.ndarray], *, columns: int | None = None) -> np.ndarray:
    """Plays clips beside each other: uint8[t_i, h, w, 3] each -> uint8[max t, rows * h, columns * w, 3].

    Shorter clips rest on their last frame; empty places of the last row are black. All have one frame size.
    """
    if not clips:
        raise ValueError("no clips to tile; expected at least one.")
    columns = columns or len(clips)
    rows = -(-len(clips) // columns)
    length = max(len(clip) for clip in clips)
    _, height, width, _ = clips[0].shape
    canvas = np.zeros((length, rows * height, columns * width, 3), np.uint8)
    for i, clip in enumerate(clips):
        y, x = divmod(i, columns)
        held = clip[np.minimum(np.arange(length), len(clip) - 1)]
        canvas[:, y * height : (y + 1) * height, x * width : (x + 1) * width] = held
    return canvas


def _checked(frames: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[0] < 1 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(
            f"frames are {frames.dtype}{list(frames.shape)}; expected uint8[t, h, w, 3] with t >= 1 (RGB)."
        )
    return frames


def _write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    height, width = (side - side % 2 for side in frames.shape[1:3])
    with av.open(address(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "20"}
        for frame in frames:
            picture = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_animation(path: Path, frames: np.ndarray, fps: float, form: str) -> None:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(path, form, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
