import threading


class SingleThreadedExecutor:
    def __init__(self) -> None:
        self._ended = threading.Event()

    def add_node(self, node: object) -> bool:
        return True

    def spin(self) -> None:
        self._ended.wait()

    def shutdown(self) -> None:
        self._ended.set()
