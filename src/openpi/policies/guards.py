"""Identity transforms that hold observations against a contract while a policy runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from openpi.policies.contract import Contract
from openpi.shared.collected_warnings import Warnings

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


def suspicious(contract: Contract, observation: Mapping[str, Any]) -> list[str]:
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

    def __call__(self, data: dict) -> dict:
        try:
            self.contract.check(data)
        except ValueError as error:
            raise ObservationError(str(error)) from error
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
