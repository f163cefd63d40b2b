"""What is suspicious about the observations of one session, told to its robot and to the log."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from openpi.policies.guards import ObservationError
from openpi.policies.watch import Watch
from openpi.serving.client_log import ClientLog

logger = logging.getLogger(__name__)


class Watching:
    """Of a session with a policy whose contract knows what training saw; else nothing is suspicious."""

    def __init__(self, policy: Any, client_log: ClientLog, address: str, *, is_strict: bool) -> None:
        seen = getattr(getattr(policy, "contract", None), "seen", None)
        self._watch = None if seen is None else Watch(seen)
        self._log, self._address, self._is_strict = client_log, address, is_strict
        self._said: set[str] = set()

    def look(self, observations: Sequence[dict[str, Any]]) -> list[str]:
        """Warnings for the observation of a message; lists come from several robots, which are not told apart.

        Raises:
            ObservationError: there are some, and the server is strict.
        """
        if self._watch is None or len(observations) != 1:
            return []
        try:
            found = self._watch.look(observations[0])
        except Exception:
            logger.exception("The observations of %s are not watched any more", self._address)
            self._watch = None
            return []
        if found and self._is_strict:
            raise ObservationError(f"this server is strict: {'; '.join(found)}")
        for warning in found:
            subject = warning.partition(":")[0]
            if subject not in self._said:
                self._said.add(subject)
                self._log.write(logging.WARNING, self._address, f"{self._address}: {warning}")
        return found
