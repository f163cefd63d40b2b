"""A table-top world that needs nothing but the Python install.

MuJoCo physics, ray-cast cameras, two tasks told apart by their prompts, and a scripted expert.
Importing it registers the gymnasium environments `openpi/TabletopPick-v0` and `openpi/TabletopPlace-v0`.
"""

import gymnasium

from openpi.envs.tabletop.env import TabletopEnv, tabletop_observation
from openpi.envs.tabletop.tasks import PICK, PLACE, PROMPTS

__all__ = ["PICK", "PLACE", "PROMPTS", "TabletopEnv", "tabletop_observation"]

for _id, _task in (("openpi/TabletopPick-v0", PICK), ("openpi/TabletopPlace-v0", PLACE)):
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point="openpi.envs.tabletop.env:TabletopEnv", kwargs={"task": _task})
