"""Batches brought to the device while the one before is being used."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol


class Loader(Protocol):
    """An endless source of batches that knows where it is."""

    def __iter__(self) -> Iterator[Mapping[str, object]]: ...

    def state(self) -> object:
        """Continue from here with `restore`: JSON data."""
        ...


_LOOK_EVERY_S = 0.2


class Prefetcher:
    """Iterates over a loader some batches ahead, in a thread that also moves them to the device.

    Args:
        place: given a batch of the loader and its number.
        first: number of the first batch.
        depth: batches that wait, besides one in the hands of the thread.
    Attributes:
        state: the loader's state after the batch returned last, which is not where the thread is.
        waited_s: seconds that batches have been waited for in all.
    """

    def __init__(
        self,
        loader: Loader,
        place: Callable[[Mapping[str, object], int], object],
        *,
        first: int = 0,
        depth: int = 2,
    ) -> None:
        self.state: Any = loader.state()
        self.waited_s = 0.0
        self._depth = depth
        self._ready: deque[tuple[Any, Any]] = deque()
        self._error: BaseException | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._fill, args=(loader, place, first), name="prefetch", daemon=True)
        self._thread.start()

    def wait_for(self, num_batches: int, *, may_give_up: Callable[[], bool] = lambda: False) -> bool:
        """Whether the next batches are there: waits until they are, until one of them cannot be made, or is let go."""
        start = time.perf_counter()
        with self._changed:
            while not (are_there := len(self._ready) >= num_batches) and self._error is None and not may_give_up():
                self._changed.wait(_LOOK_EVERY_S)
        self.waited_s += time.perf_counter() - start
        return are_there

    def __next__(self) -> object:
        if not self.wait_for(1):
            self.raise_error()
        with self._changed:
            batch, self.state = self._ready.popleft()
            self._changed.notify_all()
        return batch

    def raise_error(self) -> None:
        """Raises what ended the thread, if anything did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stops the thread; it may be in the middle of a batch."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _fill(self, loader: Loader, place: Callable[[Mapping[str, object], int], object], first: int) -> None:
        try:
            for number, batch in enumerate(loader, first):
                placed = place(batch, number), loader.state()
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed or len(self._ready) < self._depth)
                    if self._is_closed:
                        return
                    self._ready.append(placed)
                    self._changed.notify_all()
            raise RuntimeError("the data loader ran out of batches; it is expected to repeat for ever")
        except BaseException as error:  # re-raised where the batch was to be used
            with self._changed:
                self._error = error
                self._changed.notify_all()
