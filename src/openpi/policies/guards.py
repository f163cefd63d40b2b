"""Identity transforms that hold observations against a contract, or what there is without one, while a policy runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from openpi.policies.contract import Contract
from openpi.policies.observation_checks import check_prompt, is_finite
from openpi.policies.state_range import StateRange
from openpi.shared.collected_warnings import Warnings
from openpi.shared.normalize import NormStats

logger = logging.getLogger(__name__)

_MOST_UNREAD = 20  # keys that the log names: they are a client's
# What warnings begin with: of `policies.watch`, `drift` and `pace`, and of the guards below.
CODES = frozenset(
    {"blank", "prompt", "polarity", "frozen", "swapped", "turned", "view", "units", "order"}
    | {"drift", "rate", "colors", "range"}
)


def code_of(warning: str) -> str:
    """The code of a warning; `other` for one of somebody's own transforms."""
    code = warning.partition("]")[0].removeprefix("[")
    return code if code in CODES else "other"


class ObservationError(ValueError):
    """An observation that does not fit the policy: the client's to correct, and no fault of the policy's."""


def suspicious(contract: Contract, observation: Mapping[str, object]) -> list[str]:
    """What `ContractGuard` warns of, each with its code."""
    return [f"[colors] {warning}" for warning in contract.warnings(observation)]


def far_outside(contract: Contract, state: np.ndarray) -> list[str]:
    """What `RangeGuard` warns of, each with its code."""
    return [f"[range] {warning}" for warning in contract.range_warnings(state)]


class ContractGuard:
    """An identity transform that raises `ObservationError` for what does not fit: it checks observations against a
    contract, and warns of what is only suspicious."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self._warn = Warnings()
        self._unread: set[str] = set()

    def __call__(self, data: dict) -> dict:
        try:
            unread = self.contract.check(data)
        except ValueError as error:
            raise ObservationError(str(error)) from error
        for key in unread:
            if key not in self._unread and len(self._unread) < _MOST_UNREAD:
                self._unread.add(key)
                logger.warning("'%s', which robots send, is not looked at: the policy was not trained with it", key)
        self._warn(suspicious(self.contract, data))
        return data


class RangeGuard:
    """An identity transform before normalisation; warns of state dimensions far outside their training data."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self._warn = Warnings()

    def __call__(self, data: dict) -> dict:
        if "state" in data:
            self._warn(far_outside(self.contract, data["state"]))
        return data


class InputsGuard:
    """An identity transform before normalisation, for checkpoints without a contract: raises `ObservationError` unless
    `state` is one vector of finite numbers and `prompt` one text. It warns of a state that lacks dimensions or is far
    outside the statistics, and of a prompt without words.

    Only warns, because a recipe may use the statistics of a larger robot.
    """

    def __init__(self, stats: NormStats | None, names: Sequence[str] = ()) -> None:
        """
        Args:
            stats: of the state.
            names: of the robot's state dimensions, where its transforms say them.
        """
        self._range = StateRange(*((None, None) if stats is None else (stats.q01, stats.q99)), names)
        moved = np.zeros(0) if stats is None else np.flatnonzero(np.atleast_1d(stats.std))
        self._width = int(moved[-1]) + 1 if len(moved) else 0  # statistics of padding have no spread
        self._warn = Warnings()

    def __call__(self, data: dict) -> dict:
        if data.get("prompt") is not None:
            try:
                check_prompt(data["prompt"])
            except ValueError as error:
                raise ObservationError(str(error)) from error
            if not np.asarray(data["prompt"]).item().strip():
                # No default prompt takes its place, as in the published system.
                self._warn(["[prompt] prompt: it has no words; send the task, or no prompt at all for the default one"])
        if "state" in data:
            self._check_state(np.asarray(data["state"]))
        return data

    def _check_state(self, state: np.ndarray) -> None:
        if state.ndim != 1 or state.dtype.kind not in "fiub":
            raise ObservationError(
                f"the state has shape {state.shape} and dtype {state.dtype}; expected one vector of numbers, without a "
                "batch axis. Send each of its parts as values.reshape(-1)"
            )
        if not (finite := is_finite(state)).all():
            raise ObservationError(
                f"the state has NaN or infinity in dimension {int(np.argmin(finite))}; expected finite numbers"
            )
        if len(state) < self._width:
            self._warn(
                [
                    f"[range] the state has {len(state)} dimensions, and this checkpoint's statistics are of "
                    f"{self._width}. Is this another robot?"
                ]
            )
        self._warn([f"[range] {warning}" for warning in self._range.warnings(state)])


GUARDS = (ContractGuard, RangeGuard, InputsGuard)
