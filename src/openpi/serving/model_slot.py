"""The models that a server has in memory: loaded on first use, a bounded number, the least recently used goes.

    empty --first session--> loading --> ready --idle, and another model is wanted--> gone
                                `--> failed: told to whoever waits; the next session tries again

A slot belongs to one model for its whole life, and a session to one slot, so that no checkpoint answers for another.
Called from the threads of the sessions; the slow work is in each slot's `ModelThread`.
"""

import concurrent.futures
import contextlib
import dataclasses
import gc
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator

from openpi.serving.catalog import Catalog
from openpi.serving.metrics import Metrics
from openpi.serving.model_thread import Batching, ModelThread
from openpi_client.base_policy import BasePolicy

logger = logging.getLogger(__name__)

# Clients of Positronic's protocol give up after 30 s without a word.
_REPORT_INTERVAL_S = 5.0

Report = Callable[[str, str], None]


class StoppingError(Exception):
    """The server stops while a session waits for its model."""


@dataclasses.dataclass(eq=False)
class ModelSlot:
    """One model in memory, or on its way there.

    Attributes:
        loaded: its policy, or why there is none.
        num_sessions: that use it or wait for it.
        last_use: counts up over all slots.
    """

    model_id: str
    thread: ModelThread
    loaded: "concurrent.futures.Future[BasePolicy]"
    num_sessions: int = 0
    last_use: int = 0

    @property
    def policy(self) -> BasePolicy | None:
        """None while there is none."""
        return self.loaded.result() if self.loaded.done() and self.loaded.exception() is None else None


class ModelPool:
    """The slots of a server."""

    def __init__(self, catalog: Catalog, batching: Batching, metrics: Metrics, *, max_models: int = 1) -> None:
        self.catalog = catalog
        self._batching = batching
        self._metrics = metrics
        self._max_models = max_models
        self._slots: dict[str, ModelSlot] = {}
        self._changed = threading.Condition()  # guards everything below and the slots
        self._uses = itertools.count(1)
        self._threads: set[ModelThread] = set()
        self._num_closing = 0  # their memory is not free yet
        self._num_waiting = 0  # sessions, for room
        self._stopping = False

    def slots(self) -> list[ModelSlot]:
        with self._changed:
            return list(self._slots.values())

    def preload(self) -> "concurrent.futures.Future[BasePolicy]":
        """Begins to load the default model."""
        model_id = self.catalog.resolve(None)
        with self._changed:
            return (self._slots.get(model_id) or self._open(model_id)).loaded

    @contextlib.contextmanager
    def lease(self, model_id: str, report: Report) -> Iterator[ModelSlot]:
        """A slot whose policy is loaded, kept for as long as the block runs.

        Args:
            report: told `loading` or `waiting` and a text, at once and then every few seconds, while it takes.
        Raises:
            StoppingError: `stop_waiting` was called meanwhile.
            Exception: whatever loading raised.
        """
        slot = self._place(model_id, report)
        try:
            self._until_loaded(slot, report)
            yield slot
        finally:
            with self._changed:
                slot.num_sessions -= 1
                slot.last_use = next(self._uses)
                self._changed.notify_all()

    def stop_waiting(self) -> None:
        """Ends the waiting of sessions that have no model yet."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def finish(self, timeout_s: float) -> bool:
        """Ends all threads; false when one is still busy (a compile, say) after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        finished = [thread.finish(max(0.0, deadline_s - time.monotonic())) for thread in list(self._threads)]
        return all(finished)

    def _place(self, model_id: str, report: Report) -> ModelSlot:
        """The model's slot, as soon as there is room for one; it counts a session more."""
        start_s = time.monotonic()
        while True:
            with self._changed:
                slot = self._slots.get(model_id)
                if slot is None and len(self._slots) + self._num_closing < self._max_models:
                    slot = self._open(model_id)
                if slot is not None:
                    slot.num_sessions += 1
                    slot.last_use = next(self._uses)
                    return slot
                victim = self._least_recently_used()
                if victim is not None:
                    self._forget(victim)
                    self._num_closing += 1
                busy = sum(slot.num_sessions for slot in self._slots.values())
            if victim is not None:
                self._close(victim)
                continue
            elapsed_s = time.monotonic() - start_s
            report("waiting", f"Waiting for {busy} active session(s) to finish... ({elapsed_s:.0f}s elapsed)")
            with self._awaited():
                self._wait(lambda: model_id in self._slots or self._has_room())

    @property
    def num_waiting(self) -> int:
        """Sessions that wait for those of another model to end."""
        with self._changed:
            return self._num_waiting

    @contextlib.contextmanager
    def _awaited(self) -> Iterator[None]:
        with self._changed:
            self._num_waiting += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_waiting -= 1

    def _has_room(self) -> bool:
        return len(self._slots) + self._num_closing < self._max_models or self._least_recently_used() is not None

    def _least_recently_used(self) -> ModelSlot | None:
        """Of the slots that nobody uses; one that is being loaded stays."""
        idle = [slot for slot in self._slots.values() if slot.num_sessions == 0 and slot.loaded.done()]
        return min(idle, key=lambda slot: slot.last_use, default=None)

    def _open(self, model_id: str) -> ModelSlot:
        thread = ModelThread(
            self._batching, on_batch=lambda size, infer_s: self._metrics.batch_ran(model_id, size, infer_s)
        )
        self._threads.add(thread)
        start_s = time.monotonic()
        slot = ModelSlot(model_id, thread, thread.load(lambda: self.catalog.load(model_id)))
        self._slots[model_id] = slot
        self._metrics.watch_queue(model_id, thread.num_waiting)
        slot.loaded.add_done_callback(lambda loaded: self._settled(slot, time.monotonic() - start_s))
        return slot

    def _settled(self, slot: ModelSlot, load_s: float) -> None:
        """Called in the slot's thread."""
        with self._changed:
            if slot.loaded.exception() is None:
                logger.info("Model '%s' is ready after %.1f s", slot.model_id, load_s)
                self._metrics.model_loaded(slot.model_id, load_s)
            else:  # The next session tries again.
                self._forget(slot)
                self._threads.discard(slot.thread)
                slot.thread.end()
            self._changed.notify_all()

    def _until_loaded(self, slot: ModelSlot, report: Report) -> None:
        start_s = time.monotonic()
        while not slot.loaded.done():
            elapsed_s = time.monotonic() - start_s
            report("loading", f"Loading checkpoint {slot.model_id}... ({elapsed_s:.0f}s elapsed)")
            self._wait(slot.loaded.done)
        if (error := slot.loaded.exception()) is not None:
            raise error

    def _wait(self, is_enough: Callable[[], bool]) -> None:
        """Until something has changed for good, or it is time for a report."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or is_enough(), _REPORT_INTERVAL_S)
            if self._stopping and not is_enough():
                raise StoppingError

    def _close(self, slot: ModelSlot) -> None:
        """Frees the memory of a model that is forgotten, before anything takes its place."""
        logger.info("Model '%s' makes room", slot.model_id)
        try:
            slot.thread.finish(None)
            slot.loaded = concurrent.futures.Future()  # the old one holds the policy
            gc.collect()
        finally:
            with self._changed:
                self._num_closing -= 1
                self._threads.discard(slot.thread)
                self._changed.notify_all()

    def _forget(self, slot: ModelSlot) -> None:
        if self._slots.get(slot.model_id) is slot:
            del self._slots[slot.model_id]
        self._metrics.model_gone(slot.model_id)
