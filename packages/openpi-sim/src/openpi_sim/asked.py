"""What an expert is asked with: the observation's privileged part, and memory for the episodes that are asked about."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import numpy as np

from openpi.envs.world import PRIVILEGED
from openpi.shared.errors import missing_key
from openpi_client.base_policy import Metadata

T = TypeVar("T")
_MAX_EPISODES = 64  # of worlds that are played at once


class Asked:
    """What a world that was opened with `privileged=True` sends beside the keys of the policy.

    Raises:
        KeyError: it was not.
    """

    def __init__(self, observation: Metadata):
        if PRIVILEGED not in observation:
            fix = "Only a world that is opened with privileged=True can be solved by an expert."
            raise missing_key(PRIVILEGED, observation, wanted_by="the expert", fix=fix)
        self._values: Mapping[str, Any] = observation[PRIVILEGED]

    @property
    def episode(self) -> str:
        return self.text("episode")

    def text(self, name: str) -> str:
        return str(self.value(name))

    def number(self, name: str) -> int:
        return int(self.value(name))

    def vector(self, name: str, width: int | None = None) -> np.ndarray:
        """float64[width].

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        value = np.asarray(self.value(name), np.float64)
        if value.ndim != 1 or (width is not None and len(value) != width) or not np.isfinite(value).all():
            raise ValueError(f"'{PRIVILEGED}/{name}' is {value}; expected {width or 'some'} finite values")
        return value

    def value(self, name: str) -> Any:
        """As it was sent."""
        if name not in self._values:
            raise missing_key(f"{PRIVILEGED}/{name}", self._values, wanted_by="the expert")
        return self._values[name]


class Episodes(Generic[T]):
    """What is remembered of each episode; of the newest ones only."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, T] = OrderedDict()

    def get(self, episode: str) -> T | None:
        if episode in self._kept:
            self._kept.move_to_end(episode)
        return self._kept.get(episode)

    def put(self, episode: str, value: T) -> None:
        self._kept[episode] = value
        self._kept.move_to_end(episode)
        while len(self._kept) > _MAX_EPISODES:
            self._kept.popitem(last=False)
