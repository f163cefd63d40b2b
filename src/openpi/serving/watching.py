"""What is suspicious about the observations of one session, told to its robot and to the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from openpi.policies.drift import Moved
from openpi.policies.guards import ObservationError
from openpi.policies.pace import Pace
from openpi.policies.watch import Watch
from openpi.serving.client_log import ClientLog
from openpi.shared.tree import flatten
from openpi_client.realtime.watch import ObservationWatch

# Whoever asks once a chunk has asked several times by then.
_FROZEN_AFTER_S = 3.0


class Watching:
    """Of a session with a policy. What its contract does not tell is not compared; without what training saw, a camera
    of a robot that is frozen is found all the same.
    """

    def __init__(
        self, policy: object, client_log: ClientLog, address: str, *, is_strict: bool, keeps_time: bool = True
    ) -> None:
        """
        Args:
            keeps_time: the robot moves while the clock runs, which simulated worlds need not.
        """
        contract = getattr(policy, "contract", None)
        seen = getattr(contract, "seen", None)
        self._watch = None if seen is None else Watch(seen)
        moving = None if contract is None else [vector.key for vector in contract.state]
        # A simulated camera has no noise, and need not see what moves.
        self._cameras = ObservationWatch(_FROZEN_AFTER_S, moving) if seen is None and keeps_time else None
        self._pace = None if contract is None or not keeps_time else Pace(contract)
        self._log, self._address, self._is_strict = client_log, address, is_strict
        self._said: set[str] = set()

    def look(self, observations: Sequence[Mapping[str, object]], now_s: float) -> list[str]:
        """Warnings for the observation of a message; lists come from several robots, which are not told apart.

        Args:
            now_s: when the message came.
        Raises:
            ObservationError: there are some, and the server is strict.
        """
        if len(observations) != 1:
            return []
        try:
            leaves = flatten(observations[0])
            found = [] if self._watch is None else self._watch.look(leaves)
            if self._cameras is not None:
                found += map(_frozen, self._cameras.frozen(leaves, now_s))
            if self._pace is not None:
                found += self._pace.asked(leaves, now_s)
        except Exception as error:
            text = f"The observations of {self._address} are not watched any more"
            self._log.write(logging.ERROR, self._address, text, error=error)
            self._watch = self._cameras = self._pace = None
            return []
        if found and self._is_strict:
            raise ObservationError(f"this server is strict: {'; '.join(found)}")
        for warning in found:
            subject = warning.partition(":")[0]
            if subject not in self._said:
                self._said.add(subject)
                self._log.write(logging.WARNING, self._address, f"{self._address}: {warning}")
        return found

    def answered(self, result: object, now_s: float) -> None:
        """What the robot gets for the last message, from now on."""
        if (pace := self._pace) is not None:
            pace.answered(result.get("actions") if isinstance(result, dict) else None, now_s)

    def averages(self) -> list[Moved]:
        """Of what the robot sent, beside those of training; for people. Any thread."""
        watch = self._watch
        return [] if watch is None else list(watch.drift.averages())


def _frozen(found: tuple[str, float]) -> str:
    key, for_s = found
    return f"[frozen] {key}: the same picture for {for_s:.1f} s while the robot moved; look at its thread and its cable"
