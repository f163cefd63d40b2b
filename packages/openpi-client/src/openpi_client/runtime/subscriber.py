"""What wants to know how an episode goes: recorders, displays, loggers."""

import abc
from typing import Dict


class Subscriber(abc.ABC):
    """Called by the control loop, in its thread."""

    @abc.abstractmethod
    def on_episode_start(self) -> None:
        """An episode begins; environment and agent are reset."""

    @abc.abstractmethod
    def on_step(self, observation: Dict, action: Dict) -> None:
        """`action`, decided from `observation`, has been applied."""

    @abc.abstractmethod
    def on_episode_end(self) -> None:
        """The episode is over."""
