"""What the names of features and of their dimensions say."""

import re

_GRIPPER_WORDS = frozenset({"gripper", "grip", "finger", "fingers", "claw", "jaw"})
# Angles of an orientation: they jump by a turn, and their difference is no rotation.
ORIENTATION_WORDS = frozenset({"euler", "orientation", "pitch", "quat", "roll", "rot", "rotation", "rpy", "yaw"})


def words(name: str) -> list[str]:
    """The words of a name such as `observation.images.camHigh_2`: letters only, in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def is_gripper(dimension: str) -> bool:
    return bool(_GRIPPER_WORDS & set(words(dimension)))
