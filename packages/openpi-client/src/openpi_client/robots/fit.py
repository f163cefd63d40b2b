"""Whether a robot and a policy fit, found out before anything moves."""

import logging
from typing import Iterable, List, Mapping, Optional

import numpy as np

from openpi_client.base_policy import Metadata
from openpi_client.realtime import Robot
from openpi_client.realtime.actions import contract_of
from openpi_client.realtime.watch import flat

logger = logging.getLogger(__name__)


def check_fit(robot: Robot, metadata: Mapping[str, object], *, rows: Optional[int] = None) -> None:
    """Compares what a robot sends and takes with a server's contract; a server without one is believed.

    Args:
        rows: of each chunk that are to be played.
    Raises:
        ValueError: they do not fit; one line for each reason. (`ControlLoop` compares names and rates.)
    """
    contract = contract_of(metadata)
    if not contract:
        return
    leaves = dict(flat(robot.observe()))
    found = [*_actions(robot, contract, rows), *_cameras(leaves, contract), *_state(leaves, contract)]
    if leaves.get("prompt") in (None, "") and contract.get("default_prompt") is None:
        found.append(
            "the robot sends no 'prompt', and the policy has no default: give the program a prompt, or start the "
            "server with --default-prompt TEXT"
        )
    if found:
        raise ValueError(
            f"the policy of this server ('{contract.get('robot', 'unknown')}') does not fit the robot:\n  "
            + "\n  ".join(found)
        )


def _actions(robot: Robot, contract: Metadata, rows: Optional[int]) -> List[str]:
    actions, found = contract.get("actions", {}), []
    names, horizon = list(actions.get("names", ())), actions.get("horizon")
    if robot.action_names and names and len(robot.action_names) != len(names):
        found.append(
            f"an action has {len(names)} dimensions ({', '.join(names)}); the robot takes {len(robot.action_names)} "
            f"({', '.join(robot.action_names)})"
        )
    if rows is not None and horizon is not None and rows > horizon:
        found.append(f"chunks have {horizon} rows; {rows} are to be played of each. Lower that flag to {horizon}")
    return found


def _cameras(leaves: Mapping[str, object], contract: Metadata) -> List[str]:
    cameras = contract.get("cameras", ())
    sent = {key for key, value in leaves.items() if isinstance(value, np.ndarray) and value.ndim >= 3}
    known = {camera["key"] for camera in cameras}
    missing = [camera["key"] for camera in cameras if camera.get("required", True) and camera["key"] not in sent]
    lines = [f"it needs the camera '{key}'; the robot sends {_listed(sent)}" for key in missing]
    for key in sorted(sent - known):
        logger.warning("The policy of this server does not look at the camera '%s'; it takes %s", key, _listed(known))
    return lines


def _state(leaves: Metadata, contract: Metadata) -> List[str]:
    lines = []
    for vector in contract.get("state", ()):
        key, names = vector["key"], ", ".join(vector.get("names", ()))
        width = vector.get("width", len(vector.get("names", ())))
        if key not in leaves:
            lines.append(f"it needs '{key}' ({width} values: {names}); the robot sends {_listed(leaves)}")
        elif np.size(leaves[key]) != width:
            lines.append(f"'{key}' has {width} values ({names}); the robot sends {np.size(leaves[key])}")
    return lines


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(f"'{key}'" for key in sorted(keys)) or "none"
