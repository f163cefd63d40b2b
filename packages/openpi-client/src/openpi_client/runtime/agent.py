"""What decides the actions of the control loop."""

import abc
from typing import Dict


class Agent(abc.ABC):
    """Observation in, action out, once per step."""

    @abc.abstractmethod
    def get_action(self, observation: Dict) -> Dict:
        """Returns the action for this step."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forgets the previous episode."""
