"""From action chunks to one action per control tick."""

import logging
from typing import Any, Dict, Optional

import numpy as np
from typing_extensions import override

from openpi_client import base_policy
from openpi_client.deadline import check_seconds
from openpi_client.freshness import control_hz, now_s
from openpi_client.rate_watch import RateWatch

logger = logging.getLogger(__name__)

# Who asks for no action for so long has paused, and is not slow.
_PAUSE_S = 1.0


class ActionChunkBroker(base_policy.BasePolicy):
    """Plays the chunks of a policy open loop, one row per call; asks for the next when one is used up.

        tick        0 1 2 3 4 5 6 7 ...
        policy asked x       x            action_horizon = 4
        row         0 1 2 3 0 1 2 3

    Observations between two queries are ignored. When the policy raises, the next call asks again: nothing of an older
    chunk is played. When the calls come at another rate than that of the server's contract, this is logged, once.
    """

    def __init__(
        self, policy: base_policy.BasePolicy, action_horizon: int, *, max_age_s: Optional[float] = None
    ) -> None:
        """
        Args:
            policy: returns chunks: every array in its result, however nested, has time as its first axis.
            action_horizon: rows to play of each chunk, at most the chunk's length.
            max_age_s: what is left of a chunk is dropped, and the next one asked for, when its observation has become
                older (the robot was paused, say). None = never.
        """
        if action_horizon < 1:
            raise ValueError(f"action_horizon is {action_horizon}; it must be at least 1")
        self._policy = policy
        self._action_horizon = action_horizon
        check_seconds("max_age_s", max_age_s)
        self._max_age_s = max_age_s
        self._chunk: Optional[Dict] = None
        self._observed_s = 0.0  # when the chunk's observation came
        self._step = 0
        self._rate = _rate_watch(policy)

    @override
    def infer(self, obs: Dict) -> Dict:
        """Returns the current row of every array in the chunk; everything else of the result as it is, but `obs_age_s`,
        where the policy tells it: that is the age of the chunk's observation by now.

        Raises:
            IndexError: an array of the policy's result has fewer rows than `action_horizon`.
        """
        self._check_rate()
        if self._max_age_s is not None and now_s() - self._observed_s > self._max_age_s:
            self._chunk = None
        if self._chunk is None:
            start_s = now_s()
            self._chunk = self._policy.infer(obs)
            self._observed_s = start_s
            self._step = 0
            if self._rate is not None:
                self._rate.rest()
        try:
            action = _row(self._chunk, self._step, name="result")
        except IndexError:
            self._chunk = None
            raise
        if isinstance(action, dict) and "obs_age_s" in action:
            action["obs_age_s"] = now_s() - self._observed_s
        self._step += 1
        if self._step >= self._action_horizon:
            self._chunk = None
        return action

    @override
    def reset(self) -> None:
        self._policy.reset()
        self._chunk = None
        self._step = 0
        if self._rate is not None:
            self._rate.restart()

    def _check_rate(self) -> None:
        held_hz = None if self._rate is None else self._rate.tick()
        if held_hz is not None:
            logger.warning(
                "Actions are played at %.1f Hz; the policy was trained at %g Hz (control_hz of its contract), so the "
                "robot moves at another speed. openpi_client.realtime keeps the rate",
                held_hz,
                control_hz(self._policy),
            )


def _rate_watch(policy: base_policy.BasePolicy) -> Optional[RateWatch]:
    """For policies whose server tells its rate."""
    rate_hz = control_hz(policy)
    return None if rate_hz is None else RateWatch(rate_hz, pause_s=_PAUSE_S)


def _row(tree: object, step: int, name: str) -> Any:
    """Row `step` of every array in nested dicts, lists and tuples; other leaves unchanged."""
    if isinstance(tree, np.ndarray):
        return _array_row(tree, step, name)
    if isinstance(tree, dict):
        return {key: _row(value, step, f"{name}/{key}") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_row(value, step, f"{name}/{index}") for index, value in enumerate(tree))
    return tree


def _array_row(array: np.ndarray, step: int, name: str) -> object:
    if array.ndim == 0 or step >= len(array):
        raise IndexError(
            f"'{name}' of the policy has shape {array.shape}, but the broker is at step {step} of the chunk; "
            "choose an action_horizon of at most the chunk's length"
        )
    return array[step, ...]
