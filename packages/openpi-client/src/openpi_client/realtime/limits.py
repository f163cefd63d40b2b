"""How far and how fast a command may go."""

import dataclasses
import math
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from typing_extensions import Literal

from openpi_client.realtime.actions import ABOUT_A_TURN, ActionSpec, contract_of

Bound = Union[float, Sequence[float], np.ndarray, None]

# How much further than what was recorded a command may go, and how much faster.
_RANGE_SLACK = 0.05
_STEP_SLACK = 1.5

# Of policies, whose numbers are float32: a row at its bound is not beyond it. Commands are cut all the same.
_ROUNDING = 1e-6

_STEPS = ("max_step", "max_jump", "max_speed")


class LimitExceeded(Exception):
    """A command would have left its limits, and these say "stop"."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """
    Attributes:
        low, high: of a command, one number or one per dimension; None = no bound.
        max_step: largest change per row, as recorded, of dimensions that are positions.
        max_jump: the same for the first command of a new chunk; a larger jump is caught up with in steps of this size.
        on_violation: "clamp" plays what is allowed; "stop" ends the episode in hold.
        max_speed: largest change per second of dimensions that are positions, whatever the rates are: the hardware's.
    """

    low: Bound = None
    high: Bound = None
    max_step: Bound = None
    max_jump: Bound = None
    on_violation: Literal["clamp", "stop"] = "clamp"
    max_speed: Bound = None

    def __post_init__(self) -> None:
        if self.on_violation not in ("clamp", "stop"):
            raise ValueError(f"on_violation is {self.on_violation!r}; expected 'clamp' or 'stop'")
        for name in ("low", "high", *_STEPS):
            bound = getattr(self, name)
            if bound is not None and not _are_numbers(bound):
                raise ValueError(f"limits.{name} is {bound}; expected numbers")
        for name in _STEPS:
            bound = getattr(self, name)
            if bound is not None and not (np.asarray(bound, np.float64) > 0).all():
                raise ValueError(f"limits.{name} is {bound}; expected more than 0, or the robot never moves")
        if self.low is not None and self.high is not None and (np.asarray(self.low) > np.asarray(self.high)).any():
            raise ValueError(f"limits.low is {self.low}, above limits.high, {self.high}")

    @classmethod
    def from_recorded(
        cls,
        actions: np.ndarray,
        episode_ends: Sequence[int] = (),
        *,
        on_violation: Literal["clamp", "stop"] = "clamp",
    ) -> "Limits":
        """The range and the speed of recorded actions, and a little more.

        Args:
            actions: float[n, width], as the robot takes them, one row per tick of the contract's rate.
            episode_ends: the index behind each episode's last row; from there to the next row is no step.
        """
        actions = np.asarray(actions, np.float64)
        if actions.ndim != 2 or len(actions) < 2 or not np.isfinite(actions).all():
            raise ValueError(f"recorded actions of shape {actions.shape}; expected finite numbers, [n >= 2, width]")
        low, high = actions.min(0), actions.max(0)
        slack = _RANGE_SLACK * (high - low)
        ends = np.asarray(list(episode_ends), np.int64)
        steps = np.delete(np.abs(np.diff(actions, axis=0)), ends[(ends > 0) & (ends < len(actions))] - 1, axis=0)
        # Not a quantile: grippers move in a few of thousands of steps.
        step = _STEP_SLACK * steps.max(0) if len(steps) else np.full(low.shape, np.inf)
        # What never moved in the recordings may go where it was.
        step = np.where(step > 0, step, np.inf)
        return cls(low - slack, high + slack, step, step, on_violation)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, object], *, on_violation: Literal["clamp", "stop"] = "clamp"
    ) -> "Limits":
        """What a server's contract says: `low`, `high` and `max_step` of `actions`; no bounds where it says nothing."""
        actions = contract_of(metadata).get("actions", {})
        step = actions.get("max_step")
        return cls(actions.get("low"), actions.get("high"), step, step, on_violation)

    def narrowed(self, other: Optional["Limits"]) -> "Limits":
        """What both allow. Bounds have one number, or as many as an action has.

        Raises:
            ValueError: they have no range in common.
        """
        if other is None:
            return self
        narrowest = {
            name: _narrower(getattr(self, name), getattr(other, name), np.minimum) for name in ("high", *_STEPS)
        }
        stops = "stop" in (self.on_violation, other.on_violation)
        return Limits(
            low=_narrower(self.low, other.low, np.maximum), on_violation="stop" if stops else "clamp", **narrowest
        )

    def listed(self) -> Dict[str, object]:
        """As JSON has it; None = no bound."""
        listed = {name: _listed(getattr(self, name)) for name in ("low", "high", *_STEPS)}
        return {**listed, "on_violation": self.on_violation}

    @property
    def is_empty(self) -> bool:
        return self.low is None and self.high is None and all(getattr(self, name) is None for name in _STEPS)


class Limiter:
    """Applies limits to one command after the other."""

    def __init__(
        self, limits: Limits, spec: ActionSpec, *, rows_per_tick: float = 1.0, rate_hz: Optional[float] = None
    ) -> None:
        """
        Args:
            rows_per_tick: limits of steps are per row, as recorded.
            rate_hz: of the ticks; limits of speed are per second, and None is for limits that have none.
        Raises:
            ValueError: a limit has as many numbers as no action.
        """
        self._spec = spec
        self._clamps = limits.on_violation == "clamp"
        self._low = _bound("low", limits.low, -np.inf, spec)
        self._high = _bound("high", limits.high, np.inf, spec)
        step = np.where(spec.stays, _bound("max_step", limits.max_step, np.inf, spec), np.inf)
        jump = np.where(spec.stays, _bound("max_jump", limits.max_jump, np.inf, spec), np.inf)
        self.goes_round = np.isfinite(step) & (step > (1 - ABOUT_A_TURN) * spec.turns)
        self._max_step = step * rows_per_tick
        # A seam is as wide as ever where ticks are parts of rows: clamping spreads it over them, stopping lets it pass.
        self._max_jump = np.minimum(step, jump) * (min(1.0, rows_per_tick) if self._clamps else 1.0)
        if limits.max_speed is not None:
            assert rate_hz is not None
            fastest = np.where(spec.stays, _bound("max_speed", limits.max_speed, np.inf, spec), np.inf) / rate_hz
            self._max_step = np.minimum(self._max_step, fastest)
            self._max_jump = np.minimum(self._max_jump, fastest)
        self._is_catching_up = False

    @property
    def max_step(self) -> np.ndarray:
        """float64[width], per tick; infinity where there is no bound."""
        return self._max_step

    def within(self, command: np.ndarray, last: Optional[np.ndarray], *, is_seam: bool) -> Tuple[np.ndarray, str]:
        """The command that is allowed, and what was wrong with the one that was wanted; '' = nothing.

        Args:
            last: the command before; None = there was none.
            is_seam: whether it is the first of a new chunk.
        Raises:
            LimitExceeded: with limits that say "stop"; whatever they say, for what is no finite number.
        """
        if not np.isfinite(command).all():
            worst = int(np.argmin(np.isfinite(command)))
            raise LimitExceeded(f"'{self._spec.names[worst]}' is {command[worst]}; expected a finite number")
        allowed = np.clip(command, self._low, self._high)
        problem = self._named("outside its range", command, allowed)
        if last is not None:
            step = self._max_jump if is_seam else self._max_step
            if self._is_catching_up:
                step = np.minimum(self._max_step, self._max_jump)
            # An angle that went round in the recordings, too, moves by little then: the way between is no way.
            is_free = ~np.isfinite(step) | (self.goes_round & self._spec.are_a_turn_apart(allowed, last))
            reached = np.where(is_free, allowed, np.clip(allowed, last - step, last + step))
            self._is_catching_up = bool((reached != allowed).any())
            problem = problem or self._named("too far from the last one" if is_seam else "too fast", allowed, reached)
            allowed = reached
        if problem and not self._clamps:
            raise LimitExceeded(problem)
        return allowed, problem

    def outside(self, pose: np.ndarray, *, ranges: float = 0.0) -> str:
        """Why the robot cannot be there: beyond the bounds, by more than so many times their width; '' = it can.

        The width is that of the widest dimension of its unit: a joint that hardly moved in the recordings may still be
        parked elsewhere. Dimensions without bounds, and those that are no positions, are not asked.
        """
        with np.errstate(invalid="ignore"):
            wide = np.where(np.isfinite(self._high - self._low), self._high - self._low, 0.0)
        units = np.array(self._spec.units or ("",) * self._spec.width)
        slack = ranges * np.array([wide[units == unit].max() for unit in units])
        allowed = np.clip(pose, self._low - slack, self._high + slack)
        is_asked = self._spec.stays & ((slack > 0) | (ranges == 0))
        return self._named("outside its range", pose, np.where(is_asked, allowed, pose))

    def _named(self, what: str, wanted: np.ndarray, allowed: np.ndarray) -> str:
        changed = np.flatnonzero(np.abs(wanted - allowed) > _ROUNDING * np.maximum(1, np.abs(allowed)))
        if len(changed) == 0:
            return ""
        worst = changed[np.argmax(np.abs(wanted - allowed)[changed])]
        digits = 4 if abs(wanted[worst] - allowed[worst]) > 1e-3 * abs(allowed[worst]) else 8
        shown, most = (f"{value:.{digits}g}" for value in (wanted[worst], allowed[worst]))
        return f"'{self._spec.names[worst]}' of {shown} is {what}; {most} is allowed"


def _listed(bound: Bound) -> Optional[List[Optional[float]]]:
    if bound is None:
        return None
    return [value if math.isfinite(value) else None for value in np.ravel(np.asarray(bound, np.float64)).tolist()]


def _are_numbers(bound: object) -> bool:
    try:
        return not np.isnan(np.asarray(bound, np.float64)).any()
    except (TypeError, ValueError):
        return False


def _narrower(mine: Bound, other: Bound, choose: Callable[..., np.ndarray]) -> Bound:
    if mine is None or other is None:
        return other if mine is None else mine
    return choose(np.asarray(mine, np.float64), np.asarray(other, np.float64))


def _bound(name: str, bound: Bound, default: float, spec: ActionSpec) -> np.ndarray:
    values = np.asarray(default if bound is None else bound, np.float64)
    if values.ndim > 0 and values.shape != (spec.width,):
        raise ValueError(
            f"limits.{name} has shape {values.shape}; expected one number, or {spec.width}: {', '.join(spec.names)}"
        )
    return np.broadcast_to(values, (spec.width,))
