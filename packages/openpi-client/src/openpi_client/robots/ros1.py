"""`aloha.Topics` under ROS 1 (rospy, Python 3.8 of Noetic, or RoboStack)."""

import concurrent.futures
import os
import threading
import time
from typing import Any, Callable, Dict, Sequence

from openpi_client.robots.libraries import need

_INSTALL = "install ROS Noetic, or RoboStack's ros-noetic-rospy, and source its setup.bash"
_TIMEOUT_S = 5.0
# Motors that are rebooted take seconds.
_ANSWER_S = 20.0


class Ros1Topics:
    """A node of its own."""

    def __init__(self, name: str = "openpi") -> None:
        """
        Raises:
            ImportError: no ROS 1 here.
            ConnectionError: no master.
        """
        self._rospy = need("rospy", _INSTALL)
        # Without one, `init_node` would wait for ever.
        if not need("rosgraph", _INSTALL).is_master_online():
            place = os.environ.get("ROS_MASTER_URI", "not set")
            raise ConnectionError(f"no ROS master answers (ROS_MASTER_URI is {place}); start roscore, and the drivers")
        # Ctrl-C is for the loop, which then holds.
        self._rospy.init_node(name, anonymous=True, disable_signals=True)

    def subscribe(self, topic: str, kinds: Sequence[str], callback: Callable[..., None]) -> None:
        kind = self._kind_of(topic)
        if kind not in kinds:
            raise ValueError(f"the topic '{topic}' has the type {kind}; expected {' or '.join(kinds)}")
        self._rospy.Subscriber(topic, _class(kind, "msg"), callback, queue_size=1, buff_size=2**24)

    def publisher(self, topic: str, kind: str) -> Callable[..., None]:
        message = _class(kind, "msg")
        publisher = self._rospy.Publisher(topic, message, queue_size=1)
        return lambda **fields: publisher.publish(message(**fields))

    def call(self, service: str, kind: str, **fields: object) -> None:
        try:
            self._rospy.wait_for_service(service, timeout=_TIMEOUT_S)
            _within(_ANSWER_S, self._rospy.ServiceProxy(service, _class(kind, "srv")), **fields)
        except concurrent.futures.TimeoutError as error:
            raise TimeoutError(f"the service '{service}' has not answered for {_ANSWER_S:g} s") from error
        except self._rospy.ROSException as error:
            raise TimeoutError(f"the service '{service}' does not answer: {error}") from error
        except self._rospy.ServiceException as error:  # which is no ROSException
            raise RuntimeError(f"the service '{service}' failed: {error}") from error

    def close(self) -> None:
        self._rospy.signal_shutdown("the program ends")

    def _kind_of(self, topic: str) -> str:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while True:
            known: Dict[str, str] = dict(self._rospy.get_published_topics())
            if topic in known:
                return known[topic]
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"nobody publishes '{topic}'; there are {', '.join(sorted(known)) or 'no topics'}")
            time.sleep(0.1)


def _class(kind: str, part: str) -> Any:
    package, _, name = kind.partition("/")
    return getattr(need(f"{package}.{part}", f"build the ROS package {package} and source its workspace"), name)


def _within(timeout_s: float, call: Callable[..., object], **fields: object) -> None:
    """Calls what knows no end of waiting, as services of rospy do, in a thread that may be left behind."""
    done: "concurrent.futures.Future[object]" = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(call(**fields))
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, name="openpi-service", daemon=True).start()
    done.result(timeout_s)
