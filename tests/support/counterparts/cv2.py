"""Cameras of no matter by OpenCV: blue first; 9 is not there, and 8 sends nothing."""

import time

import numpy as np

CAP_PROP_FRAME_WIDTH, CAP_PROP_FRAME_HEIGHT, CAP_PROP_FPS = 3, 4, 5


class VideoCapture:
    def __init__(self, index: int | str) -> None:
        self._index, self._count = index, 0

    def isOpened(self) -> bool:
        return self._index != 9

    def set(self, setting: int, value: float) -> bool:
        return True

    def get(self, setting: int) -> float:
        return {CAP_PROP_FRAME_WIDTH: 640.0, CAP_PROP_FRAME_HEIGHT: 480.0}[setting]

    def read(self) -> tuple[bool, np.ndarray]:
        time.sleep(1 / 30 if self._index != 8 else 3600)
        self._count += 1
        frame = np.zeros((480, 640, 3), np.uint8)
        frame[..., 2], frame[..., 0] = 100 + int(self._index), self._count % 256
        return True, frame

    def release(self) -> None:
        pass
