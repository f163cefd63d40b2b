"""`aloha.Topics` under ROS 2 (rclpy of Humble or later)."""

import threading
import time
from typing import Any, Callable, Dict, Sequence

from openpi_client.robots.libraries import need

_INSTALL = "install ROS 2 (Humble or later) and source its setup.bash; its Python is the distribution's"
_TIMEOUT_S = 5.0


class Ros2Topics:
    """A node with an executor in a thread of its own."""

    def __init__(self, name: str = "openpi") -> None:
        """Raises ImportError: no ROS 2 here."""
        self._rclpy = need("rclpy", _INSTALL)
        self._qos = need("rclpy.qos", _INSTALL).qos_profile_sensor_data
        # Ctrl-C is for the loop, which then holds.
        self._rclpy.init(signal_handler_options=need("rclpy.signals", _INSTALL).SignalHandlerOptions.NO)
        self._node = self._rclpy.create_node(name)
        self._executor = need("rclpy.executors", _INSTALL).SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._thread = threading.Thread(target=self._executor.spin, name="ros", daemon=True)
        self._thread.start()

    def subscribe(self, topic: str, kinds: Sequence[str], callback: Callable[..., None]) -> None:
        found = self._kinds_of(topic)
        kind = next((kind for kind in kinds if kind in found), None)
        if kind is None:
            raise ValueError(f"the topic '{topic}' has the type {', '.join(found)}; expected {' or '.join(kinds)}")
        # Best effort: it receives from reliable publishers, too, and never from behind.
        self._node.create_subscription(_class(kind, "msg"), topic, callback, self._qos)

    def publisher(self, topic: str, kind: str) -> Callable[..., None]:
        message = _class(kind, "msg")
        publisher = self._node.create_publisher(message, topic, 1)
        return lambda **fields: publisher.publish(message(**fields))

    def call(self, service: str, kind: str, **fields: object) -> None:
        service_type = _class(kind, "srv")
        client = self._node.create_client(service_type, service)
        answered = threading.Event()
        try:
            if not client.wait_for_service(timeout_sec=_TIMEOUT_S):
                raise TimeoutError(f"nobody offers the service '{service}'")
            future = client.call_async(service_type.Request(**fields))
            future.add_done_callback(lambda _: answered.set())
            if not answered.wait(_TIMEOUT_S):
                raise TimeoutError(f"the service '{service}' does not answer")
            future.result()
        finally:
            self._node.destroy_client(client)

    def close(self) -> None:
        self._executor.shutdown()
        self._thread.join(_TIMEOUT_S)
        self._node.destroy_node()
        self._rclpy.try_shutdown()

    def _kinds_of(self, topic: str) -> Sequence[str]:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while True:
            known: Dict[str, Sequence[str]] = dict(self._node.get_topic_names_and_types())
            if topic in known:
                return [kind.replace("/msg/", "/") for kind in known[topic]]
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"nobody publishes '{topic}'; there are {', '.join(sorted(known)) or 'no topics'}")
            time.sleep(0.1)


def _class(kind: str, part: str) -> Any:
    package, _, name = kind.partition("/")
    return getattr(need(f"{package}.{part}", f"build the ROS package {package} and source its workspace"), name)
