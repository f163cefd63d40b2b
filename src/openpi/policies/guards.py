"""Identity transforms that hold observations against a contract while a policy runs."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from openpi.policies.contract import Contract

logger = logging.getLogger("openpi")


class ObservationError(ValueError):
    """An observation that does not fit the policy: the client's to correct, and no fault of the policy's."""


class ContractGuard:
    """An identity transform that raises `ObservationError` for what does not fit: it checks observations against a
    contract, and logs each kind of warning once."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self._log = _LogOnce()

    def __call__(self, data: dict) -> dict:
        try:
            self.contract.check(data)
        except ValueError as error:
            raise ObservationError(str(error)) from error
        self._log(self.contract.warnings(data))
        return data


class RangeGuard:
    """An identity transform before normalisation; logs a state dimension far outside its training data once."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self._log = _LogOnce()

    def __call__(self, data: dict) -> dict:
        if "state" in data:
            self._log(self.contract.range_warnings(data["state"]))
        return data


class _LogOnce:
    """Logs warnings, each subject (the text before the first colon) once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            subject = warning.split(":")[0]
            if subject not in self._said:
                self._said.add(subject)
                logger.warning("%s", warning)
