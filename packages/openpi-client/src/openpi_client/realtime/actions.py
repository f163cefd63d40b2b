"""What an action of a policy is: its dimensions, its rate, and how the robot stands still."""

import dataclasses
from functools import cached_property
from typing import List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from typing_extensions import Literal

from openpi_client.base_policy import Metadata

# Per dimension: keep the last target, or command zero.
Hold = Union[Literal["stay", "zero"], Sequence[Literal["stay", "zero"]]]

# Of a chunk; published ones have 8 to 50.
_MOST_ROWS = 10_000
_HIGHEST_HZ = 10_000

_MOVING_WORDS = ("veloc", "relative", "delta")

# By unit; a dimension of unknown unit that jumps by 2 pi from one row to the next is an angle.
_TURNS = {"rad": 2 * np.pi, "": 2 * np.pi, "deg": 360.0, "degrees": 360.0}
ABOUT_A_TURN = 0.1
_MEASURES = {"rad", "deg", "degrees", "m", "mm", "cm"}


@dataclasses.dataclass(frozen=True)
class ActionSpec:
    """
    Attributes:
        names: one per dimension.
        stays: bool[width]; how to hold: true where the last target stays (positions), false where zero is commanded
            (velocities, steps).
        horizon: rows of a chunk; None = unknown until the first one.
        rate_hz: at which the rows were recorded; None = unknown.
        units: one per dimension, '' = unknown; empty = all are.
    """

    names: Tuple[str, ...]
    stays: np.ndarray
    horizon: Optional[int] = None
    rate_hz: Optional[float] = None
    units: Tuple[str, ...] = ()

    @property
    def width(self) -> int:
        return len(self.names)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, object], *, width: Optional[int], hold: Optional[Hold]
    ) -> "ActionSpec":
        """From what a server says about its policy.

        Args:
            width: of an action, where the server does not tell.
            hold: how to stand still, where the server does not tell, or otherwise than it does.
        Raises:
            ValueError: something is neither told nor given, or both and different.
        """
        contract = contract_of(metadata)
        actions = contract.get("actions", {})
        names = _names(actions.get("names", ()))
        if not names and width is None:
            raise ValueError(
                "the server does not tell how wide an action is (no contract); give the robot its action_names, or the "
                "loop action_width=..."
            )
        if names and width not in (None, len(names)):
            raise ValueError(
                f"action_width is {width}; the contract of the server has {len(names)} dimensions: {', '.join(names)}"
            )
        names = names or tuple(f"actions {i}" for i in range(width or 0))
        told = actions.get("hold") if hold is None else hold
        stays = _stays(told, names) if told is not None else _stays_of_kind(str(actions.get("kind", "")), names)
        units = tuple(units_of(actions, len(names)))
        return cls(names, stays, _horizon(actions.get("horizon")), _rate(contract.get("control_hz")), units)

    def are_a_turn_apart(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """bool[... width]: where two values of an angle differ by about a whole turn. Between them is nowhere to be."""
        return np.abs(np.abs(one - other) / self.turns - 1) < ABOUT_A_TURN

    @cached_property
    def turns(self) -> np.ndarray:
        """float64[width]: a whole turn in the unit of each dimension; infinity for what is no angle."""
        return np.array([_TURNS.get(unit, np.inf) for unit in self.units or ("",) * self.width])

    def hold_row(self, last: np.ndarray) -> np.ndarray:
        """What to command to stand still after the command `last`, [width]."""
        return np.where(self.stays, last, 0.0)

    def problem(self, rows: object, horizon: Optional[int]) -> str:
        """Why the actions of an answer are of no use; '' = they are.

        Args:
            horizon: rows at most; None = any number.
        """
        if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "fiu":
            return f"'actions' of the answer are a {type(rows).__name__}; expected an array of numbers"
        if rows.ndim != 2 or rows.shape[1] != self.width or len(rows) == 0:
            return f"'actions' of the answer have shape {rows.shape}; expected [horizon, {self.width}]"
        if horizon is not None and len(rows) > horizon:
            return f"'actions' of the answer have {len(rows)} rows; expected at most {horizon}"
        with np.errstate(over="ignore"):  # robots read float32, in which more is infinite
            bad = np.argwhere(~np.isfinite(rows.astype(np.float32)))
        if len(bad):
            row, dim = (int(index) for index in bad[0])
            return f"'{self.names[dim]}' in row {row} of the answer is {rows[row, dim]}; expected finite numbers"
        return ""


def contract_of(metadata: Mapping[str, object]) -> Metadata:
    """The contract in a server's metadata; empty if there is none.

    Raises:
        ValueError: its parts are no maps.
    """
    contract = metadata.get("contract") if isinstance(metadata, Mapping) else None
    if not isinstance(contract, Mapping):
        return {}
    lists = [contract.get(key) or () for key in ("state", "cameras")]
    vectors = [part for found in lists if isinstance(found, (list, tuple)) for part in found]
    are_maps = all(isinstance(part, Mapping) for part in (contract.get("actions", {}), *vectors))
    if not are_maps or not all(isinstance(x, (list, tuple)) for x in lists) or not all("key" in v for v in vectors):
        raise ValueError(
            "the contract of the server is none: expected a map for 'actions', and lists of maps, each with its "
            "'key', for 'state' and 'cameras'. Serve the checkpoint with this version of openpi"
        )
    return dict(contract)


def are_other_units(one: str, other: str) -> bool:
    """Whether both are units of measure, and different ones; a gripper's may be described in other words."""
    return one != other and {one, other} <= _MEASURES


def units_of(vector: Mapping[str, object], width: int) -> List[str]:
    """The units in a vector's part of a contract; '' where it does not tell."""
    told = vector.get("units")
    known = [unit if isinstance(unit, str) else "" for unit in told] if isinstance(told, (list, tuple)) else []
    return known if len(known) == width else [""] * width


def _names(told: object) -> Tuple[str, ...]:
    if not isinstance(told, (list, tuple)) or not all(isinstance(name, str) for name in told):
        raise ValueError(f"the contract of the server has the names {told!r} of actions; expected a list of texts")
    return tuple(told)


def _horizon(told: object) -> Optional[int]:
    if told is None or (isinstance(told, int) and not isinstance(told, bool) and 1 <= told <= _MOST_ROWS):
        return told
    raise ValueError(f"the contract of the server has a horizon of {told!r}; expected 1 to {_MOST_ROWS} rows")


def _rate(told: object) -> Optional[float]:
    if told is None or (isinstance(told, (int, float)) and not isinstance(told, bool) and 0 < told <= _HIGHEST_HZ):
        return told
    raise ValueError(
        f"the contract of the server has a control_hz of {told!r}; expected more than 0, at most {_HIGHEST_HZ}"
    )


def _stays(hold: Hold, names: Sequence[str]) -> np.ndarray:
    words: List[str] = (
        [hold] * len(names) if isinstance(hold, str) else list(hold) if isinstance(hold, (list, tuple)) else []
    )
    if len(words) != len(names) or not all(word in ("stay", "zero") for word in words):
        raise ValueError(
            f"hold is {hold!r}; expected 'stay' (positions), 'zero' (velocities), or one of them for each of "
            f"{', '.join(names)}"
        )
    return np.array([word == "stay" for word in words])


def _stays_of_kind(kind: str, names: Sequence[str]) -> np.ndarray:
    """From the words of a contract: absolute positions stay; of velocities and steps all but grippers are zero."""
    is_absolute, is_moving = "absolute" in kind, any(word in kind for word in _MOVING_WORDS)
    if is_absolute == is_moving:
        said = f"its actions are '{kind}'" if kind else "nothing about it"
        raise ValueError(
            f"how does this robot hold? The server says {said}. Give ControlLoop(hold='stay') for positions, 'zero' "
            f"for velocities or steps, or a list of these words for {', '.join(names)}; or set follows_state in the "
            "RobotSpec of the recipe, and train with it"
        )
    return np.array([is_absolute or "grip" in name for name in names])
