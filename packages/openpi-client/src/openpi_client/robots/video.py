"""Videos of episodes, encoded in a thread of their own while the episode runs."""

import logging
import queue
import threading
from pathlib import Path
from typing import Any, Callable, Mapping, Optional

import numpy as np

from openpi_client.robots.libraries import need

logger = logging.getLogger(__name__)

# Pictures that wait for the encoder; more would fill the memory of a robot's computer.
_MOST_WAITING = 60


class VideoWriter:
    """Writes an H.264 video; a file of the given name is there when it is complete."""

    def __init__(self, path: Path, fps: int, *, drops: bool = False) -> None:
        """
        Args:
            drops: pictures that the encoder has no time for are left out, so that a control loop never waits for it.
        Raises:
            ImportError: no PyAV.
        """
        self._av = need("av", "pip install av")
        self._path, self._fps, self._drops = path, fps, drops
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        self._waiting: "queue.Queue[Optional[np.ndarray]]" = queue.Queue(_MOST_WAITING)
        self._error: Optional[BaseException] = None
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="video", daemon=True)
        self._thread.start()

    def add(self, picture: np.ndarray) -> None:
        """The next picture, uint8[h, w, 3], RGB; all of one size, of which an odd row or column is cut."""
        if not self._drops:
            self._waiting.put(picture)
            return
        try:
            self._waiting.put_nowait(picture)
        except queue.Full:
            self.num_dropped += 1

    def close(self) -> Optional[Path]:
        """Completes the file.

        Returns:
            its path; None when there was no picture, or the video could not be written: that is logged, since the
            episode is worth more than its video.
        """
        self._waiting.put(None)
        self._thread.join()
        if self.num_dropped:
            logger.warning("%s lacks %d pictures, for which there was no time", self._path, self.num_dropped)
        if self._error is not None:
            logger.warning("%s was not written: %s", self._path, self._error)
        if self._error is not None or not self._partial.exists():
            self._partial.unlink(missing_ok=True)
            return None
        self._partial.replace(self._path)
        return self._path

    def _run(self) -> None:
        try:
            self._encode()
        except Exception as error:  # of the encoder: told at the end
            self._error = error
            while self._waiting.get() is not None:  # so that nobody waits for a place in the queue
                pass

    def _encode(self) -> None:
        picture = self._waiting.get()
        if picture is None:
            return
        container = self._av.open(f"file:{self._partial}", "w")
        try:
            stream: Any = container.add_stream("libx264", rate=self._fps)
            stream.height, stream.width = (2 * (size // 2) for size in picture.shape[:2])
            stream.pix_fmt = "yuv420p"
            while picture is not None:
                even = np.ascontiguousarray(picture[: stream.height, : stream.width])
                container.mux(stream.encode(self._av.VideoFrame.from_ndarray(even, format="rgb24")))
                picture = self._waiting.get()
            container.mux(stream.encode(None))
        finally:
            container.close()


class Recorder:
    """Videos of one episode after the other, of what a world's policy sees."""

    def __init__(self, fps: int, picture: Callable[[Mapping[str, Any]], np.ndarray]) -> None:
        """
        Args:
            picture: an observation -> uint8[h, w, 3], RGB.
        """
        self._fps, self._picture = fps, picture
        self._film: Optional[VideoWriter] = None

    def begin(self, path: Path) -> None:
        """The next observations go to this file, which is there after `end`."""
        self._film = VideoWriter(path, self._fps)

    def seen(self, observation: Mapping[str, Any]) -> None:
        if self._film is not None:
            self._film.add(self._picture(observation))

    def end(self, suffix: str = "") -> Optional[Path]:
        """Completes the file, with something added to its name; None = there is none."""
        path = None if self._film is None else self._film.close()
        self._film = None
        return path if path is None or not suffix else path.replace(path.with_name(f"{path.stem}{suffix}{path.suffix}"))
