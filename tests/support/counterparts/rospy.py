"""What of rospy a robot's program uses, as its documentation has it, with a station behind."""

import threading
import time
from collections.abc import Callable
from typing import Any

import told
from ros_station import Station

_station: Station | None = None


class ROSException(Exception):
    pass


class ServiceException(Exception):
    pass


def init_node(name: str, anonymous: bool = False, disable_signals: bool = False) -> None:
    global _station
    assert disable_signals and threading.current_thread() is threading.main_thread()
    _station = Station(("puppet_left", "puppet_right"), "/{camera}", is_ros2=False)


def get_published_topics(namespace: str = "/") -> list[list[str]]:
    assert _station is not None
    return [[topic, kind] for topic, kind in _station.topics.items()]


class Subscriber:
    def __init__(
        self, name: str, data_class: type, callback: Callable[[Any], None], queue_size: int, buff_size: int
    ) -> None:
        assert _station is not None and _station.topics[name].endswith(data_class.__name__)
        _station.listen(name, callback)


class Publisher:
    def __init__(self, name: str, data_class: type, queue_size: int) -> None:
        self._name, self._class = name, data_class

    def publish(self, message: Any) -> None:
        assert _station is not None and isinstance(message, self._class)
        _station.take(self._name, message)


def wait_for_service(service: str, timeout: float) -> None:
    if told.fault("no services"):
        raise ROSException(f"timeout exceeded while waiting for service {service}")


class ServiceProxy:
    def __init__(self, name: str, service_class: Any) -> None:
        self._name, self._class = name, service_class

    def __call__(self, **fields: Any) -> None:
        assert _station is not None
        if told.fault("service is silent"):
            time.sleep(3600)
        if told.fault("service fails"):
            raise ServiceException("transport error completing service call")
        _station.serve(self._name, vars(self._class.Request(**fields)))


def signal_shutdown(reason: str) -> None:
    told.write("shutdown", reason=reason)
