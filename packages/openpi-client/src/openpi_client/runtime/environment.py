"""What a robot or simulator has to offer to the control loop."""

import abc
from typing import Dict


class Environment(abc.ABC):
    """A robot or simulator, with its sensors and actuators."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Brings the world to the start of an episode. Called before each episode and once at the end."""

    @abc.abstractmethod
    def is_episode_complete(self) -> bool:
        """True when the episode is over. Asked after every step."""

    @abc.abstractmethod
    def get_observation(self) -> Dict:
        """Returns what the sensors see now."""

    @abc.abstractmethod
    def apply_action(self, action: Dict) -> None:
        """Sends an action to the actuators."""
