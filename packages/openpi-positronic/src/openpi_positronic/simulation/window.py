"""Windows by Tk, which comes with Python: what the cameras see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import tkinter

_ENLARGED = 2


def open_window(title: str, wanted_by: str) -> tkinter.Tk:
    """An empty window.

    Args:
        wanted_by: the flag that asks for it.
    Raises:
        ValueError: no display, or a Python without Tk.
    """
    try:
        import tkinter
    except ImportError as error:
        raise ValueError(f"{wanted_by} needs Tk, which this Python lacks ({error}); leave it out") from error
    try:
        root = tkinter.Tk()
    except tkinter.TclError as error:
        raise ValueError(f"{wanted_by} needs a display ({error}); leave it out on this machine") from error
    root.title(title)
    return root


class CameraWindow:
    """Shows pictures beside each other; closing it stops the showing, nothing else.

    Raises:
        ValueError: see `open_window`.
    """

    def __init__(self, title: str = "openpi"):
        self._root = open_window(title, "--driver.show_gui=True")
        self._root.protocol("WM_DELETE_WINDOW", self.close)
        self._labels: dict[str, tkinter.Label] = {}
        self._images: dict[str, tkinter.PhotoImage] = {}
        self._is_open = True

    def show(self, frames: Mapping[str, np.ndarray]) -> None:
        """Replaces what is shown with frames uint8[h, w, 3], by name."""
        if not self._is_open:
            return
        for column, (name, frame) in enumerate(frames.items()):
            self._show_one(column, name, frame)
        self._root.update()

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._root.destroy()

    def _show_one(self, column: int, name: str, frame: np.ndarray) -> None:
        import tkinter

        height, width = frame.shape[:2]
        if name not in self._labels:
            tkinter.Label(self._root, text=name).grid(row=0, column=column)
            self._labels[name] = tkinter.Label(self._root)
            self._labels[name].grid(row=1, column=column)
        ppm = b"P6 %d %d 255 " % (width, height) + frame.tobytes()
        # Kept: Tk shows nothing of a picture that Python has dropped.
        self._images[name] = tkinter.PhotoImage(master=self._root, data=ppm, format="PPM").zoom(_ENLARGED)
        self._labels[name].configure(image=self._images[name])
