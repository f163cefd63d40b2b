"""What a robot or simulator has to offer to the control loop."""

import abc
import re
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from openpi_client.base_policy import Metadata, Observation
from openpi_client.realtime.actions import Hold, are_other_units, contract_of, units_of
from openpi_client.realtime.limits import Limits
from openpi_client.realtime.watch import flat


class Robot(abc.ABC):
    """Sensors and actuators. All calls come from the loop's thread, and each takes time from the tick."""

    # Names of the dimensions, where the robot knows them: compared with the contract, so that joints in another order
    # are found out before anything moves.
    action_names: Sequence[str] = ()
    state_names: Mapping[str, Sequence[str]] = {}
    # Ticks per second that its controller is made for; None = as many as the policy was trained with.
    rate_hz: Optional[float] = None
    # How it stands still, where the server's contract does not say it.
    holds: Optional[Hold] = None
    # What its hardware allows, on top of the limits of the contract.
    limits: Optional[Limits] = None

    @abc.abstractmethod
    def observe(self) -> Observation:
        """The newest observation, under the keys of the policy. Must not wait for a camera: keep its last picture.

        Pictures at full size are fine: `ProcessRequester` resizes them.

        Raises:
            ConnectionError, TimeoutError: it did not work this time; it is asked again, `Safety.max_failures` times.
            Exception: it will not work any more: ends the episode, in hold.
        """

    @abc.abstractmethod
    def apply(self, action: np.ndarray) -> None:
        """Sends a command, float64[width], to the actuators. Must not wait until it is carried out."""

    def pose(self) -> Optional[np.ndarray]:
        """Where the robot is, float64[width], as a command that would keep it there. None = take it from the
        observation, by the names of the contract."""
        return None

    def hold(self) -> None:
        """Stands still, now. Called at the end of an episode, after a last command that says the same; for robots that
        need more than that, such as one that servoes on for as long as its program runs."""
        return

    def reset(self) -> None:
        """Goes to where an episode begins, and returns when it is there. For programs: the loop does not call it."""
        return

    def close(self) -> None:
        """Lets go of the hardware, which stands still from then on. A program that waits for a minute for that ends."""
        return


def measured_pose(robot: Robot, metadata: Mapping[str, object], width: int) -> Optional[np.ndarray]:
    """Where the robot is, as a command, float64[width]; None if that is not known.

    Raises:
        ValueError: it is no finite command.
    """
    pose = robot.pose()
    if pose is None:
        pose = _pose_in_state(robot.observe(), contract_of(metadata))
    return None if pose is None else checked_place("the robot's pose", pose, width)


def checked_place(what: str, place: object, width: int) -> np.ndarray:
    """Where a robot is or shall be, float64[width].

    Raises:
        ValueError: it has another shape, or is not finite.
    """
    try:
        values = np.array(place, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is {place!r}; expected {width} numbers, as commands") from None
    if values.shape != (width,):
        raise ValueError(f"{what} has shape {values.shape}; expected ({width},), as commands")
    if not np.isfinite(values).all():
        raise ValueError(f"{what} is {values}; expected finite numbers. Nothing is commanded before")
    return values


def check_names(robot: Robot, metadata: Mapping[str, object]) -> List[str]:
    """Compares the robot's dimensions with those of the contract.

    Returns:
        what may be wrong: names that are other words for those of the contract, as far as one can tell (`panda_joint1`
        for `joint_1`). Those of published checkpoints are their recipe's, and no robot's.
    Raises:
        ValueError: they are others, or in another order.
    """
    contract, doubts = contract_of(metadata), []
    told = {"actions": contract.get("actions", {}).get("names", ())}
    told.update({vector["key"]: vector.get("names", ()) for vector in contract.get("state", ())})
    known = {**robot.state_names, **({"actions": robot.action_names} if robot.action_names else {})}
    for key, names in known.items():
        expected = list(told.get(key, ()))
        if not expected or list(names) == expected:
            continue
        found = f"'{key}' of the robot is {', '.join(names)}"
        if not _are_alike(names, expected):
            raise ValueError(
                f"{found}; the policy was trained with {', '.join(expected)}, in this order. Put the robot's values "
                "into that order; if they are the same values under other names, give the robot the policy's names"
            )
        doubts.append(
            f"{found}; the policy calls them {', '.join(expected)}. They are taken for each other by their place; if "
            "that is right, give the robot the policy's names"
        )
    return doubts


def _are_alike(names: Sequence[str], expected: Sequence[str]) -> bool:
    """Whether names are other words for those that are expected, one by one: one begins or ends with the other, and
    their numbers are as far from each other everywhere. False for the same names in another order."""
    if len(names) != len(expected) or set(names) == set(expected):
        return False
    pairs = [(_word_and_number(name), _word_and_number(other)) for name, other in zip(names, expected)]
    shifts = {number - other for (_, number), (_, other) in pairs if number is not None and other is not None}
    words = [(word, other) for (word, _), (other, _) in pairs]
    return len(shifts) <= 1 and all(
        min(pair) and any(one.startswith(other) or one.endswith(other) for one, other in (pair, pair[::-1]))
        for pair in words
    )


def _word_and_number(name: str) -> Tuple[str, Optional[int]]:
    """Its letters, and the last number in it."""
    numbers = re.findall("[0-9]+", name)
    return re.sub("[^a-z]", "", name.lower()), int(numbers[-1]) if numbers else None


def _pose_in_state(observation: Mapping[str, object], contract: Metadata) -> Optional[np.ndarray]:
    """The values of the state that have the names of the action's dimensions, if all are there."""
    leaves = dict(flat(observation))
    values: Dict[str, float] = {}
    units: Dict[str, str] = {}
    for vector in contract.get("state", ()):
        measured = np.asarray(leaves.get(vector["key"], ())).reshape(-1)
        named = vector.get("names", ())
        if len(measured) == len(named):
            values.update(zip(named, measured))
            units.update(zip(named, units_of(vector, len(measured))))
    actions = contract.get("actions", {})
    names = actions.get("names", ())
    if not names or len(set(names)) < len(names) or not set(names) <= set(values):
        return None
    if any(are_other_units(unit, units[name]) for name, unit in zip(names, units_of(actions, len(names)))):
        return None  # measured in other units than commanded
    return np.array([values[name] for name in names], np.float64)
