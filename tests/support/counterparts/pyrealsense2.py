"""RealSense cameras of no matter: red is the last digit of the serial number, blue changes."""

import enum
import time
from typing import Any

import numpy as np
import told


class stream(enum.Enum):
    color = 1


class format(enum.Enum):
    rgb8 = 1


class config:
    def enable_device(self, serial: str) -> None:
        self.serial = serial

    def enable_stream(self, kind: stream, width: int, height: int, form: format, framerate: int) -> None:
        assert kind is stream.color and form is format.rgb8
        self.shape, self.period_s = (height, width, 3), 1 / framerate


class pipeline:
    def start(self, settings: config) -> None:
        if told.fault("no camera"):
            raise RuntimeError("No device connected")
        self._settings, self._count, self._start_s = settings, 0, time.monotonic()

    def wait_for_frames(self, timeout_ms: int) -> "pipeline":
        if told.fault("camera dies") and time.monotonic() - self._start_s > 1:
            raise RuntimeError(f"Frame didn't arrive within {timeout_ms}")
        time.sleep(self._settings.period_s)
        self._count += 1
        return self

    def get_color_frame(self) -> "pipeline":
        return self

    def get_data(self) -> Any:
        frame = np.zeros(self._settings.shape, np.uint8)
        frame[..., 0], frame[..., 2] = 25 * int(self._settings.serial[-1]), self._count % 256
        return frame

    def stop(self) -> None:
        told.write("camera stopped", serial=self._settings.serial)
