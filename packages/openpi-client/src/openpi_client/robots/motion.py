"""Going somewhere by commands, without a policy: what a program does before an episode."""

from typing import Optional, Sequence, Tuple

import numpy as np

from openpi_client.realtime import MonotonicClock, Robot
from openpi_client.realtime.clock import Clock, Pacer
from openpi_client.realtime.start import BlendedStart

# As `Safety.stop_after_s`.
_LONGEST_STILL_S = 1.0


def check_rate(rate_hz: float) -> None:
    """Raises ValueError unless it is a number of ticks per second."""
    if not 0 < rate_hz < 1e4:
        raise ValueError(f"the rate is {rate_hz} Hz; expected more than 0")


def follow(
    robot: Robot,
    pose: np.ndarray,
    targets: Sequence[Tuple[np.ndarray, float]],
    *,
    rate_hz: float,
    max_speed: Optional[np.ndarray] = None,
    clock: Optional[Clock] = None,
) -> None:
    """Goes through poses, from one to the next along a cubic; holds when it is interrupted.

    Args:
        pose: float64[width], where the robot is, as a command.
        targets: float64[width] each, and the seconds to get there: more, if `max_speed` demands it.
        max_speed: per second; None = no bound.
    Raises:
        ValueError: a pose is not finite; nothing was commanded.
        RuntimeError: the program or the machine stood still meanwhile, so where the robot is now is not known.
    """
    for where in (pose, *(target for target, _ in targets)):
        if not np.isfinite(where).all():
            raise ValueError(f"a pose is {where}; expected finite numbers. Nothing is commanded")
    clock = clock or MonotonicClock()
    max_step = np.full(len(pose), np.inf) if max_speed is None else np.asarray(max_speed, np.float64) / rate_hz
    pacer = Pacer(clock, rate_hz)
    try:
        for target, seconds in targets:
            blend = BlendedStart(pose, target, round(seconds * rate_hz), max_step)
            while not blend.is_over:
                still_s = pacer.wait().skipped / rate_hz
                if still_s > _LONGEST_STILL_S:
                    raise RuntimeError(f"the program stood still for {still_s:.2f} s while the robot moved; start anew")
                robot.apply(blend.next())
            pose = target
    except BaseException:
        robot.hold()
        raise
