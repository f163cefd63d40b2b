"""A Franka arm that stacks cubes: MuJoCo physics from primitive shapes, cameras, scores and a scripted expert.

Importing it registers the gymnasium environment `openpi/FrankaStack-v0`.
"""

import gymnasium

from openpi.envs.franka.env import CONTROLS, FrankaStackEnv, franka_observation

__all__ = ["CONTROLS", "FrankaStackEnv", "franka_observation"]

_ID = "openpi/FrankaStack-v0"
if _ID not in gymnasium.registry:
    gymnasium.register(_ID, entry_point="openpi.envs.franka.env:FrankaStackEnv")
