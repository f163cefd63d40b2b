"""A Franka arm that stacks cubes: MuJoCo physics from primitive shapes, cameras, scores and a scripted expert.

Importing it registers the gymnasium environment `openpi/FrankaStack-v0`.
"""

import importlib.util

if _missing := [name for name in ("mujoco", "gymnasium", "openpi_sim") if importlib.util.find_spec(name) is None]:
    raise ImportError(
        f"the simulated Franka needs {', '.join(_missing)}, not installed here: in the checkout "
        "`pip install ./packages/openpi-sim './packages/openpi-positronic[sim]'`"
    )

import gymnasium

from openpi_positronic.franka.env import CONTROLS, FrankaStackEnv, franka_observation

__all__ = ["CONTROLS", "FrankaStackEnv", "franka_observation"]

_ID = "openpi/FrankaStack-v0"
if _ID not in gymnasium.registry:
    gymnasium.register(_ID, entry_point="openpi_positronic.franka.env:FrankaStackEnv")
