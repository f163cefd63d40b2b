"""What every policy is, whether it runs here or behind a socket."""

import abc
from typing import Dict


class BasePolicy(abc.ABC):
    """Observation dict in, action dict out."""

    @abc.abstractmethod
    def infer(self, obs: Dict) -> Dict:
        """Returns the actions for one observation, a nested dict with the keys of the policy's contract."""

    def reset(self) -> None:  # noqa: B027  (most policies have nothing to forget)
        """Forgets everything about the current episode."""
