"""What is recorded at every step beside the robot's own signals: `--observers=.none`."""

from __future__ import annotations

from collections.abc import Sequence

import configuronic as cfn

from openpi_positronic.franka import stacking
from openpi_positronic.simulation.station import Observer


@cfn.config()
def stack_cubes() -> Sequence[Observer]:
    """Distance of the cubes, and how well they are stacked."""
    return (stacking.scores,)


@cfn.config()
def none() -> Sequence[Observer]:
    """Nothing."""
    return ()
