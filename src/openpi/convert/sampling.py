"""Signals with times of their own as frames of one rate: at each instant the newest value so far.

The first instant is when every signal has a value, and the last one lies before the last change of any.
Source: the serving specification, section 6.6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import numpy as np

NS_PER_S = 1_000_000_000
_MAX_HZ = 1000
_STILL_S = 1.0  # slower cameras are no use to a policy
_UNUSUAL = 20  # times as long as numbers of a signal are usually apart: it was cut off; commands may well pause
_MAX_S = 24 * 3600  # of an episode


def instants(times_ns: Iterable[np.ndarray], fps: float) -> np.ndarray:
    """int64[n]: start, start + period, ... before the end; the period is cut to whole nanoseconds.

    Args:
        times_ns: ascending, of each signal.
    Raises:
        ValueError: a signal has no value, they have no time in common or are days apart, or the rate is none.
    """
    signals = list(times_ns)
    if not signals or any(not len(signal) for signal in signals):
        raise ValueError("a signal has no value")
    if not 0 < fps <= _MAX_HZ:
        raise ValueError(f"fps is {fps}; expected frames per second, above 0")
    start, end = max(int(signal[0]) for signal in signals), max(int(signal[-1]) for signal in signals)
    exact = NS_PER_S / Fraction(fps)  # of a double; epoch-sized times are beyond its precision
    count = math.ceil((end - start) / exact)
    if count < 1:
        raise ValueError("its signals have no time in common")
    if end - start > _MAX_S * NS_PER_S:
        raise ValueError(
            f"it would last {(end - start) / NS_PER_S / 3600:,.0f} hours: a clock was set while it was recorded, or "
            "not yet when it began"
        )
    return start + np.arange(count, dtype=np.int64) * math.floor(exact)


def silent_before(times_ns: Mapping[str, np.ndarray], at_ns: np.ndarray) -> str | None:
    """For people, where a signal fell silent before the first instant: its last value would be in all frames.

    What was said once, such as a command that holds, is no such signal.
    """
    for name, times in times_ns.items():
        if len(times) > 1 and times[-1] < at_ns[0]:
            return (
                f"the values of '{name}' are of {times[0] / NS_PER_S:.3f} to {times[-1] / NS_PER_S:.3f} s, and another "
                f"signal begins at {at_ns[0] / NS_PER_S:.3f} s, so that none of its changes would be in the episode"
            )
    return None


def longest_wait(times_ns: np.ndarray, at_ns: np.ndarray) -> tuple[float, float]:
    """The longest time in which nothing came, so that instants repeat a value: begin, from the first instant on, and
    length, in seconds.
    """
    within = np.unique(np.clip(times_ns, at_ns[0], at_ns[-1]))
    begins = np.append(within, at_ns[-1])
    row = int(np.argmax(np.diff(begins)))
    return float(begins[row] - at_ns[0]) / NS_PER_S, float(begins[row + 1] - begins[row]) / NS_PER_S


def stillness(signal: str, times_ns: np.ndarray, at_ns: np.ndarray, *, is_camera: bool) -> str | None:
    """For people, where a signal sent nothing for so long that its repeated value is worth a word."""
    begin_s, wait_s = longest_wait(times_ns, at_ns)
    if not is_camera and len(times_ns) < 2:  # said once for all
        return None
    usual_s = 0.0 if is_camera else float(np.median(np.diff(times_ns))) / NS_PER_S
    what = "picture" if is_camera else "value"
    is_long = wait_s > max(_STILL_S, _UNUSUAL * usual_s)
    return f"'{signal}' has no new {what} for {wait_s:.1f} s from {begin_s:.1f} s on" if is_long else None


def newest(times_ns: np.ndarray, at_ns: np.ndarray) -> np.ndarray:
    """int64[n], the row that was the newest at each instant."""
    return np.searchsorted(times_ns, at_ns, side="right") - 1
