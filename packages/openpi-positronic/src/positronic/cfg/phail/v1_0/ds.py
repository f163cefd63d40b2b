"""Its recordings."""

from __future__ import annotations

import configuronic as cfn

from positronic.cfg.ds import Recordings
from positronic.cfg.ds.phail import PUBLIC


@cfn.config(name="teleoperation")
def teleop(name: str) -> Recordings:
    """Demonstrations of people who steer the robot."""
    return Recordings(f"s3://positronic-public/phail/v1.0/dataset/{name}/", PUBLIC)


rollouts = teleop.override(name="rollouts")
human = teleop.override(name="human")
