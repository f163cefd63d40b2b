"""The process that asks the policy server: it resizes, packs, sends and waits, so that the ticks need not.

Started by `ProcessRequester`; ends with the connection to it.
"""

import signal
import struct
import sys
import time
from multiprocessing.connection import Connection
from typing import Any, Dict, Mapping, Optional, Tuple

import numpy as np

from openpi_client import image_tools, msgpack_numpy
from openpi_client.base_policy import Metadata
from openpi_client.realtime import requests
from openpi_client.realtime.actions import contract_of
from openpi_client.realtime.arena import Arena, packed
from openpi_client.websocket_client_policy import WebsocketClientPolicy

# number of the question, time.monotonic_ns at which it was asked, start and length of its message
QUESTION = struct.Struct("<qqqq")

# What of an answer the loop reads.
_KEYS = ("actions", "warnings", "server_timing", "held")


def main(socket_fd: int, memory_fd: int) -> None:
    """Answers questions until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the loop, which then closes the connection.
    line, arena = Connection(socket_fd), Arena(memory_fd)
    try:
        options = msgpack_numpy.unpackb(line.recv_bytes())
        size, layout = options.pop("image_size"), options.pop("image_layout")
        with _connected(line, options) as policy:
            worker = Worker(policy, size, layout)
            while True:
                line.send_bytes(packed(worker.answer(arena, *QUESTION.unpack(line.recv_bytes()))))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _connected(line: Connection, options: Mapping[str, Any]) -> WebsocketClientPolicy:
    """The policy, of which the other end hears; or the end, of which it hears, too."""
    try:
        policy = WebsocketClientPolicy(**options)
    except Exception as error:  # whatever it is, the program that waits shall say it
        line.send_bytes(packed({"error": f"{type(error).__name__}: {error}"}))
        raise SystemExit(1) from None
    line.send_bytes(packed({"metadata": policy.get_server_metadata()}))
    return policy


class Worker:
    """Questions to one server."""

    def __init__(
        self, policy: WebsocketClientPolicy, image_size: Optional[Tuple[int, int]], image_layout: str = "hwc"
    ) -> None:
        """
        Args:
            image_size: [height, width] of images whose camera has no size in the contract; None = as they are.
            image_layout: "hwc" or "chw", in which they are sent.
        """
        self._policy = policy
        self._told = self._connection = policy.get_server_metadata()
        self._is_first = True
        self._sizes = camera_sizes(self._told)
        self._image_size = image_size
        self._is_chw = image_layout == "chw"

    def answer(self, arena: Arena, number: int, asked_ns: int, start: int, length: int) -> Dict[str, object]:
        """The answer to a question, as a message."""
        begin_s = resized_s = time.monotonic()
        try:
            observation = self._resized(arena.read(start, length))
            resized_s = time.monotonic()
            answer = requests.ask(self._policy, number, observation)
        except Exception as error:  # a picture of no size, say: another one may be better
            answer = requests.Answer(number, None, "refused", f"{type(error).__name__}: {error}")
        done_s = time.monotonic()
        timing = {
            "handover_ms": 1e3 * (begin_s - 1e-9 * asked_ns),
            "resize_ms": 1e3 * (resized_s - begin_s),
            "round_trip_ms": 1e3 * (done_s - resized_s),
        }
        if answer.result is not None:
            answer = self._checked(answer)
        message = answer._replace(timing_ms={**timing, **_server_ms(answer.result)})._asdict()
        message["done_ns"] = int(1e9 * done_s)
        return message

    def _checked(self, answer: requests.Answer) -> requests.Answer:
        """What the loop reads of an answer, if it comes from the same policy as all before."""
        metadata = self._policy.get_server_metadata()
        self._is_first, is_first = False, self._is_first or metadata is not self._connection
        self._connection = metadata
        if requests.is_other_server(self._told, metadata):
            return requests.Answer(answer.number, None, "fatal", requests.OTHER_SERVER)
        assert answer.result is not None
        result = {key: answer.result[key] for key in _KEYS if key in answer.result}
        return answer._replace(result=result, is_first=is_first)

    def _resized(self, tree: Metadata, prefix: str = "") -> Dict[str, object]:
        result = {}
        for key, value in tree.items():
            path = f"{prefix}{key}"
            if isinstance(value, Mapping):
                result[key] = self._resized(value, f"{path}/")
            else:
                result[key] = self._sent(path, value) if _is_image(value) else value
        return result

    def _sent(self, path: str, image: np.ndarray) -> np.ndarray:
        size = self._sizes.get(path) or self._image_size
        image = image_tools.resize_with_pad(image, *size) if size else image
        return np.ascontiguousarray(image.transpose(2, 0, 1)) if self._is_chw else image


def camera_sizes(metadata: Mapping[str, object]) -> Dict[str, Tuple[int, int]]:
    """[height, width] of the cameras that must have a certain one, by key."""
    sizes = {}
    for camera in contract_of(metadata).get("cameras", ()):
        key, shape = camera.get("key"), camera.get("shape")
        if isinstance(key, str) and isinstance(shape, (list, tuple)) and len(shape) >= 2 and min(shape[:2]) > 0:
            sizes[key] = (int(shape[0]), int(shape[1]))
    return sizes


def _is_image(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] in (1, 3) and value.dtype == np.uint8


def _server_ms(result: Optional[Mapping[str, object]]) -> Dict[str, float]:
    """What the server says that its model took."""
    timing = {} if result is None else result.get("server_timing", {})
    infer_ms = timing.get("infer_ms") if isinstance(timing, Mapping) else None
    return {"server_ms": float(infer_ms)} if isinstance(infer_ms, (int, float)) else {}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
