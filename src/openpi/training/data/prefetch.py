"""Batches brought to the device while the one before is being used."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol


class Loader(Protocol):
    """An endless source of batches that knows where it is."""

    def __iter__(self) -> Iterator[Mapping[str, object]]: ...

    def state(self) -> object:
        """Continue from here with `restore`: JSON data."""
        ...


_LOOK_EVERY_S = 0.2


class GaveUpError(Exception):
    """`may_give_up` said so while a batch was being waited for."""


class Prefetcher:
    """Iterates over a loader one batch ahead, in a thread that also moves the batch to the device.

    Args:
        place: given a batch of the loader and its number.
        first: number of the first batch.
        may_give_up: asked while `next` waits, with the seconds that it has; true ends that with a `GaveUpError`.
    Attributes:
        state: the loader's state after the batch returned last, which is not where the thread is.
        waited_s: seconds that `next` has been waiting for data in all.
    """

    def __init__(
        self,
        loader: Loader,
        place: Callable[[Mapping[str, object], int], object],
        *,
        first: int = 0,
        depth: int = 2,
        may_give_up: Callable[[float], bool] = lambda waited_s: False,
    ) -> None:
        self._may_give_up = may_give_up
        self.state: Any = loader.state()
        self.waited_s = 0.0
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(loader, place, first), name="prefetch", daemon=True)
        self._thread.start()

    def __next__(self) -> object:
        start = time.perf_counter()
        batch, self.state = self._take()
        self.waited_s += time.perf_counter() - start
        return batch

    def close(self) -> None:
        """Stops the thread; it may be in the middle of a batch."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _take(self) -> tuple[object, object]:
        start = time.perf_counter()
        while True:
            with contextlib.suppress(queue.Empty):
                item = self._queue.get(timeout=_LOOK_EVERY_S)
                break
            if self._may_give_up(time.perf_counter() - start):
                raise GaveUpError("no batch has come")
        if isinstance(item, BaseException):
            raise item
        return item

    def _fill(self, loader: Loader, place: Callable[[object, int], object], first: int) -> None:
        try:
            for number, batch in enumerate(loader, first):
                self._put((place(batch, number), loader.state()))
                if self._stop.is_set():
                    return
            self._put(RuntimeError("the data loader ran out of batches; it is expected to repeat for ever"))
        except BaseException as error:  # re-raised where the batch was to be used
            self._put(error)

    def _put(self, item: object) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
