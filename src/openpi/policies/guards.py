"""Identity transforms that hold observations against a contract while a policy runs."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterable, Iterator

from openpi.policies.contract import Contract

logger = logging.getLogger("openpi")

_collected: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("collected", default=None)


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """The warnings that guards raise within the block, each time they apply; the log says each once."""
    warnings: list[str] = []
    token = _collected.set(warnings)
    try:
        yield warnings
    finally:
        _collected.reset(token)


class ObservationError(ValueError):
    """An observation that does not fit the policy: the client's to correct, and no fault of the policy's."""


class ContractGuard:
    """An identity transform that raises `ObservationError` for what does not fit: it checks observations against a
    contract, and warns of what is only suspicious."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self._warn = _Warnings()

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
        self._warn = _Warnings()

    def __call__(self, data: dict) -> dict:
        if "state" in data:
            self._warn(self.contract.range_warnings(data["state"]))
        return data


class _Warnings:
    """Hands warnings to `collected_warnings`, and logs each subject (the text before the first colon) once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, warnings: Iterable[str]) -> None:
        collected = _collected.get()
        for warning in warnings:
            if collected is not None:
                collected.append(warning)
            subject = warning.split(":")[0]
            if subject not in self._said:
                self._said.add(subject)
                logger.warning("%s", warning)
