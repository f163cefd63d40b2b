"""A table-top world that needs nothing but the Python install.

MuJoCo physics, ray-cast cameras, three tasks told apart by their prompts, and a scripted expert.
Importing it registers the gymnasium environments `openpi/TabletopPick-v0`, `openpi/TabletopReach-v0` and
`openpi/TabletopPlace-v0`.
"""

import gymnasium

from openpi_demo.tabletop.env import TabletopEnv, tabletop_observation
from openpi_demo.tabletop.tasks import PICK, PLACE, PROMPTS, REACH

__all__ = ["PICK", "PLACE", "PROMPTS", "REACH", "TabletopEnv", "tabletop_observation"]

for _task in (PICK, REACH, PLACE):
    _id = f"openpi/Tabletop{_task.capitalize()}-v0"
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point="openpi_demo.tabletop.env:TabletopEnv", kwargs={"task": _task})
