"""Identity transforms that hold observations against a contract while a policy runs."""

from __future__ import annotations

from openpi.policies.contract import Contract
from openpi.shared.collected_warnings import Warnings


class ObservationError(ValueError):
    """An observation that does not fit the policy: the client's to correct, and no fault of the policy's."""


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
        self._warn(self.contract.warnings(data))
        return data


class RangeGuard:
    """An identity transform before normalisation; warns of state dimensions far outside their training data."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self._warn = Warnings()

    def __call__(self, data: dict) -> dict:
        if "state" in data:
            self._warn(self.contract.range_warnings(data["state"]))
        return data
