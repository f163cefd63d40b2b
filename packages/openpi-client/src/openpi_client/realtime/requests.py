"""Questions to a policy that nobody waits for: `submit` and `poll` return at once."""

import threading
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import numpy as np
from typing_extensions import Literal, Protocol

from openpi_client import base_policy, msgpack_numpy
from openpi_client.base_policy import Metadata, Observation
from openpi_client.realtime.clock import Clock
from openpi_client.websocket_client_policy import OtherPolicyError

# The policy refused (another observation may do), the way to it failed (another time may do), or nothing will.
Failure = Literal["", "refused", "unreachable", "fatal"]


class Answer(NamedTuple):
    """
    Attributes:
        number: of the question.
        result: what the policy returned; None if it failed.
        failure: '' if it did not.
        error: why, in words.
        is_first: whether it is the first on its connection, when a server may have compiled.
        timing_ms: how long the parts took.
    """

    number: int
    result: Optional[Dict[str, Any]] = None
    failure: Failure = ""
    error: str = ""
    is_first: bool = False
    timing_ms: Mapping[str, float] = {}


class Requester(Protocol):
    """One question at a time."""

    @property
    def metadata(self) -> Metadata:
        """What the server says about its policy."""
        ...

    @property
    def is_busy(self) -> bool:
        """Whether a question is on its way."""
        ...

    def submit(self, number: int, observation: Observation) -> None:
        """Sends a copy of the observation on its way. Never blocks."""
        ...

    def poll(self) -> Optional[Answer]:
        """The answer, when it is there. Never blocks."""
        ...

    def close(self) -> None: ...


def ask(policy: base_policy.BasePolicy, number: int, observation: Observation) -> Answer:
    """One question, waited for; failures become answers."""
    try:
        return Answer(number, policy.infer(observation))
    except OtherPolicyError as error:
        return Answer(number, None, "fatal", str(error))
    except (ConnectionError, TimeoutError) as error:
        return Answer(number, None, "unreachable", f"{type(error).__name__}: {error}")
    except Exception as error:  # whatever a policy raises: the robot holds, and the log says why
        return Answer(number, None, "refused", f"{type(error).__name__}: {error}")


class ThreadRequester:
    """Any policy, in a thread of this process.

    What it computes in Python holds the interpreter: for a policy behind a socket, `ProcessRequester` takes packing and
    resizing out of the way of the ticks.
    """

    def __init__(self, policy: base_policy.BasePolicy, metadata: Optional[Mapping[str, object]] = None) -> None:
        """
        Args:
            metadata: of the policy; None asks it, if it has `get_server_metadata`.
        """
        self._policy = policy
        self._told = _metadata_of(policy)
        self._metadata = self._told if metadata is None else metadata
        self._question: Optional[tuple] = None
        self._answer: Optional[Answer] = None
        self._wake = threading.Semaphore(0)
        self._is_busy = self._is_closed = False
        threading.Thread(target=self._run, name="openpi-requests", daemon=True).start()

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    @property
    def is_busy(self) -> bool:
        return self._is_busy

    def submit(self, number: int, observation: Observation) -> None:
        self._is_busy = True
        self._question = (number, copied(observation))
        self._wake.release()

    def poll(self) -> Optional[Answer]:
        answer = self._answer
        if answer is not None:  # Only then: the thread may set it at any moment.
            self._answer, self._is_busy = None, False
        return answer

    def close(self) -> None:
        self._is_closed = True
        self._wake.release()

    def _run(self) -> None:
        is_first = True
        while True:
            self._wake.acquire()
            if self._is_closed or self._question is None:
                return
            number, observation = self._question
            answer = ask(self._policy, number, observation)
            if answer.result is not None and is_other_server(self._told, _metadata_of(self._policy)):
                answer = Answer(number, None, "fatal", OTHER_SERVER)
            self._answer = answer._replace(is_first=is_first)
            is_first = False


class SimulatedLatency:
    """A policy that answers after a given time, for loops under a virtual clock."""

    def __init__(
        self,
        policy: base_policy.BasePolicy,
        clock: Clock,
        delays_s: List[float],
        metadata: Optional[Mapping[str, object]] = None,
    ) -> None:
        """
        Args:
            delays_s: of the answers, one after the other; the last one for all that follow.
        """
        self._policy, self._clock, self._delays_s = policy, clock, list(delays_s)
        self._metadata = _metadata_of(policy) if metadata is None else metadata
        self._answer: Optional[Answer] = None
        self._ready_s = 0.0
        self._has_answered = False

    @property
    def metadata(self) -> Metadata:
        return self._metadata

    @property
    def is_busy(self) -> bool:
        return self._answer is not None

    def submit(self, number: int, observation: Observation) -> None:
        delay_s = self._delays_s.pop(0) if len(self._delays_s) > 1 else self._delays_s[0]
        self._answer = ask(self._policy, number, copied(observation))._replace(is_first=not self._has_answered)
        self._ready_s = self._clock.now_s() + delay_s
        self._has_answered = True

    def poll(self) -> Optional[Answer]:
        # Deadlines of ticks are sums of fractions.
        if self._answer is None or self._clock.now_s() < self._ready_s - 1e-9:
            return None
        answer, self._answer = self._answer, None
        return answer

    def close(self) -> None:
        pass


OTHER_SERVER = "the server has another policy now (was it restarted with another checkpoint?); start the loop anew"


def is_other_server(before: Mapping[str, object], now: Mapping[str, object]) -> bool:
    """Whether a server's metadata are not those that a loop was made for; without a contract, all of them count."""
    if before is now:  # of the same connection, as with nearly every answer
        return False
    if "contract" not in before and "contract" not in now:
        return msgpack_numpy.packb(dict(before)) != msgpack_numpy.packb(dict(now))
    keys = ("contract", "rtc", "checkpoint")
    return any(msgpack_numpy.packb(before.get(key)) != msgpack_numpy.packb(now.get(key)) for key in keys)


def copied(tree: object) -> Any:
    """Dicts and lists with their arrays copied: a camera thread may write to its buffer meanwhile."""
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)) and any(isinstance(item, (np.ndarray, Mapping)) for item in tree):
        return [copied(item) for item in tree]
    return tree.copy() if isinstance(tree, np.ndarray) else tree


def _metadata_of(policy: base_policy.BasePolicy) -> Mapping[str, object]:
    get = getattr(policy, "get_server_metadata", None)
    return {} if get is None else get()
