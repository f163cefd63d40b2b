"""Cameras of which a control loop never waits for a picture: the newest one is there, with its age."""

import logging
import threading
import time
from typing import Any, Callable, Generic, Mapping, Optional, TypeVar

import numpy as np

from openpi_client.robots import pictures
from openpi_client.robots.libraries import need

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A camera of 30 Hz that has missed 15 pictures is gone.
MAX_AGE_S = 0.5
_RETRY_S = 0.1
# Stamps that are older by this clock are another clock's; so many late ones in a row are no hiccup.
_OTHER_CLOCK_S, _LATE_IN_A_ROW = 60.0, 5


class Latest(Generic[T]):
    """The newest value of a sensor; one thread puts it, any other takes it."""

    def __init__(self, name: str, max_age_s: float = MAX_AGE_S) -> None:
        self.name, self.max_age_s = name, max_age_s
        self.error: Optional[BaseException] = None
        self._entry: Optional[tuple] = None
        self._came = threading.Event()
        self._is_missing = False
        self._stamp: Optional[float] = None
        self._num_late = 0  # in a row

    def put(self, value: T, stamp: Optional[float] = None) -> None:
        """
        Args:
            stamp: when the source says that it measured it, in seconds, by any clock; the same again is the same value,
                which is as old as it was. By the time of day (ROS) it also tells what comes late. None = it does not
                say.
        """
        if stamp is not None:
            if stamp == self._stamp:
                return
            self._tell_if_late(time.time() - stamp)
        self._stamp = stamp
        self._entry = (value, time.monotonic())
        self._came.set()

    def get(self) -> Optional[T]:
        """None when there is none, or only an old one: logged once, when that begins and when it ends."""
        entry = self._entry
        age_s = float("inf") if entry is None else time.monotonic() - entry[1]
        is_missing = age_s > self.max_age_s
        if is_missing != self._is_missing:
            self._is_missing = is_missing
            if is_missing:
                logger.warning("%s", self._why_missing(age_s))
            else:
                logger.warning("'%s' is back", self.name)
        return None if entry is None or is_missing else entry[0]

    def wait(self, timeout_s: float = 5.0) -> T:
        """The first value.

        Raises:
            TimeoutError: none came.
        """
        if not self._came.wait(timeout_s) or self._entry is None:
            raise TimeoutError(
                f"nothing came from '{self.name}' in {timeout_s:g} s: {self.error or 'is it connected?'}"
            )
        return self._entry[0]

    def _tell_if_late(self, lag_s: float) -> None:
        """Once. It may be the clock of another computer, so what comes late is used all the same."""
        if self._num_late < _LATE_IN_A_ROW:
            self._num_late = self._num_late + 1 if self.max_age_s < lag_s < _OTHER_CLOCK_S else 0
            if self._num_late == _LATE_IN_A_ROW:
                logger.warning(
                    "what comes from '%s' is stamped %.1f s before this machine's time: either it comes late (a slow "
                    "line, a queue), and the policy sees the past, or its computer has another time (chrony)",
                    *(self.name, lag_s),
                )

    def _why_missing(self, age_s: float) -> str:
        why = f"it failed: {self.error}" if self.error is not None else "its stream has stopped, or repeats itself"
        return f"the newest from '{self.name}' is {age_s:.1f} s old ({why}); the policy is not asked until it is back"


class Camera:
    """A camera with a thread that reads it."""

    def __init__(
        self,
        name: str,
        read: Callable[[], np.ndarray],
        close: Callable[[], None] = lambda: None,
        *,
        max_age_s: float = MAX_AGE_S,
    ) -> None:
        """
        Args:
            read: waits for the next picture and returns it, uint8[h, w, 3], RGB, an array of its own. What it raises is
                logged, and it is called again: one frame that is lost must not be the last.
        """
        self._read, self._close = read, close
        self._latest: Latest[np.ndarray] = Latest(name, max_age_s)
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"camera-{name}", daemon=True)
        self._thread.start()

    def picture(self) -> Optional[np.ndarray]:
        """The newest one, uint8[h, w, 3], RGB; None if the camera is gone: then an observation is not sent."""
        return self._latest.get()

    def wait(self, timeout_s: float = 5.0) -> np.ndarray:
        """The first picture.

        Raises:
            TimeoutError: none came, and why.
        """
        return self._latest.wait(timeout_s)

    def close(self) -> None:
        self._is_closed = True
        self._thread.join(2 * MAX_AGE_S)
        self._close()

    def _run(self) -> None:
        latest = self._latest
        while not self._is_closed:
            try:
                latest.put(self._read())
                latest.error = None
            except Exception as error:  # of whatever library: the robot holds, and the log says why
                if self._is_closed:
                    return
                if latest.error is None:
                    logger.warning("the camera '%s' has failed: %s: %s", latest.name, type(error).__name__, error)
                latest.error = error
                time.sleep(_RETRY_S)


def open_camera(name: str, place: str, *, width: int = 640, height: int = 480, fps: int = 30) -> Camera:
    """A camera by its address.

    Args:
        name: for messages.
        place: `realsense:SERIAL`, `opencv:INDEX` or `opencv:PATH`.
    Raises:
        ValueError: it is no such address.
        ImportError: its library is not there.
        ConnectionError: there is no such camera.
    """
    kind, _, address = place.partition(":")
    openers: Mapping[str, Callable[..., Camera]] = {"realsense": _realsense, "opencv": _opencv}
    if kind not in openers or not address:
        raise ValueError(f"the camera '{name}' is at {place!r}; expected realsense:SERIAL, opencv:INDEX or opencv:PATH")
    return openers[kind](name, address, width, height, fps)


def _realsense(name: str, serial: str, width: int, height: int, fps: int) -> Camera:
    rs = need("pyrealsense2", "pip install pyrealsense2")
    pipeline, config = rs.pipeline(), rs.config()
    config.enable_device(serial)
    config.enable_stream(rs.stream.color, width, height, rs.format.rgb8, fps)
    try:
        pipeline.start(config)
    except RuntimeError as error:
        raise ConnectionError(f"the camera '{name}' (RealSense {serial}) does not start: {error}") from error

    def read() -> np.ndarray:
        return np.array(pipeline.wait_for_frames(int(1e3 * MAX_AGE_S)).get_color_frame().get_data())

    return Camera(name, read, pipeline.stop)


def _opencv(name: str, address: str, width: int, height: int, fps: int) -> Camera:
    cv2 = need("cv2", "pip install opencv-python-headless")
    capture: Any = cv2.VideoCapture(int(address) if address.isdigit() else address)
    if not capture.isOpened():
        raise ConnectionError(f"the camera '{name}' (OpenCV {address}) does not open")
    for setting, value in (
        (cv2.CAP_PROP_FRAME_WIDTH, width),
        (cv2.CAP_PROP_FRAME_HEIGHT, height),
        (cv2.CAP_PROP_FPS, fps),
    ):
        capture.set(setting, value)
    given = [int(capture.get(setting)) for setting in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
    if given != [width, height]:  # it takes the next one that the camera has, without a word
        told = (
            "the camera '%s' gives pictures of %dx%d, not of %dx%d; a policy trained on the latter sees another scene"
        )
        logger.warning(told, name, *given, width, height)

    def read() -> np.ndarray:
        is_read, frame = capture.read()
        if not is_read:
            raise ConnectionError(f"OpenCV reads no more pictures of {address}")
        return pictures.bgr_to_rgb(frame)

    return Camera(name, read, capture.release)
