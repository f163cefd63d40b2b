"""What of rclpy a robot's program uses, as its documentation has it, with a station behind."""

import threading
from collections.abc import Callable
from typing import Any

import told
from ros_station import Station

from rclpy.signals import SignalHandlerOptions


class _Future:
    def add_done_callback(self, callback: Callable[["_Future"], None]) -> None:
        threading.Thread(target=callback, args=(self,), daemon=True).start()

    def result(self) -> None:
        return None


class _Client:
    def __init__(self, station: Station, name: str) -> None:
        self._station, self._name = station, name

    def wait_for_service(self, timeout_sec: float) -> bool:
        return not told.fault("no services")

    def call_async(self, request: Any) -> _Future:
        self._station.serve(self._name, vars(request))
        return _Future()


class _Publisher:
    def __init__(self, station: Station, kind: type, topic: str) -> None:
        self._station, self._kind, self._topic = station, kind, topic

    def publish(self, message: Any) -> None:
        assert isinstance(message, self._kind)
        self._station.take(self._topic, message)


class Node:
    def __init__(self) -> None:
        self._station = Station(
            ("follower_left", "follower_right"), "/{camera}/camera/color/image_rect_raw", is_ros2=True
        )

    def create_subscription(self, kind: type, topic: str, callback: Callable[[Any], None], qos: object) -> None:
        assert self._station.topics[topic].endswith(kind.__name__)
        self._station.listen(topic, callback)

    def create_publisher(self, kind: type, topic: str, qos: object) -> _Publisher:
        return _Publisher(self._station, kind, topic)

    def create_client(self, kind: type, name: str) -> _Client:
        return _Client(self._station, name)

    def destroy_client(self, client: _Client) -> None:
        pass

    def destroy_node(self) -> None:
        pass

    def get_topic_names_and_types(self) -> list[tuple[str, list[str]]]:
        return [(topic, [kind.replace("/", "/msg/")]) for topic, kind in self._station.topics.items()]


def init(signal_handler_options: SignalHandlerOptions) -> None:
    assert signal_handler_options is SignalHandlerOptions.NO


def create_node(name: str) -> Node:
    return Node()


def try_shutdown() -> None:
    told.write("shutdown")
