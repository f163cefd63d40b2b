"""What every policy is, whether it runs here or behind a socket."""

import abc
from typing import Any, Dict, Mapping

Observation = Dict[str, Any]
"""What a robot tells: a nested dict of NumPy arrays and text under the keys of the policy's contract; no batch axis."""

Reply = Dict[str, Any]
"""What a policy answers: `actions` float[horizon, dim], and what is told beside them; nested as an `Observation` is."""

Metadata = Mapping[str, Any]
"""What a policy says of itself when one connects: values of JSON, of which no key need be there."""


class BasePolicy(abc.ABC):
    """Observation dict in, action dict out."""

    @abc.abstractmethod
    def infer(self, obs: Observation) -> Reply:
        """Returns the actions for one observation, a nested dict with the keys of the policy's contract."""

    def reset(self) -> None:  # noqa: B027  (most policies have nothing to forget)
        """Forgets everything about the current episode."""
