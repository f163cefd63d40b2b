"""The models that a server has in memory: loaded on first use, a bounded number, the least recently used goes.

    empty --first session--> loading --> ready --idle, and another model is wanted--> gone
                                `--> failed: told to whoever waits; the next session tries again

A slot belongs to one model for its whole life, and a session to one slot, so that no checkpoint answers for another.
Everything here runs on the event loop; the slow work is in each slot's `ModelThread`.
"""

import asyncio
import contextlib
import dataclasses
import gc
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from openpi.serving.batching import Batching, ModelThread
from openpi.serving.catalog import Catalog
from openpi.serving.metrics import Metrics
from openpi_client.base_policy import BasePolicy

logger = logging.getLogger("openpi")

# Clients of Positronic's protocol give up after 30 s without a word.
_REPORT_INTERVAL_S = 5.0

Report = Callable[[str, str], Awaitable[None]]


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
    loaded: "asyncio.Future[BasePolicy]"
    num_sessions: int = 0
    last_use: int = 0

    @property
    def policy(self) -> BasePolicy | None:
        """None while there is none."""
        settled = self.loaded.done() and not self.loaded.cancelled() and self.loaded.exception() is None
        return self.loaded.result() if settled else None


class ModelPool:
    """The slots of a server."""

    def __init__(self, catalog: Catalog, batching: Batching, metrics: Metrics, *, max_models: int = 1) -> None:
        self.catalog = catalog
        self._batching = batching
        self._metrics = metrics
        self._max_models = max_models
        self._slots: dict[str, ModelSlot] = {}
        self._changed = asyncio.Event()
        self._uses = itertools.count(1)
        self._tasks: set[asyncio.Task] = set()
        self._threads: set[ModelThread] = set()
        self._num_closing = 0  # their memory is not free yet

    def slots(self) -> list[ModelSlot]:
        return list(self._slots.values())

    def default_slot(self) -> ModelSlot | None:
        return self._slots.get(self.catalog.resolve(None))

    def preload(self) -> "asyncio.Future[BasePolicy]":
        """Begins to load the default model."""
        return self._open(self.catalog.resolve(None)).loaded

    @contextlib.asynccontextmanager
    async def lease(self, model_id: str, report: Report) -> AsyncIterator[ModelSlot]:
        """A slot whose policy is loaded, kept for as long as the block runs.

        Args:
            report: told `loading` or `waiting` and a text, at once and then every few seconds, while it takes.
        Raises:
            Exception: whatever loading raised.
        """
        slot = await self._place(model_id, report)
        slot.num_sessions += 1
        slot.last_use = next(self._uses)
        try:
            await self._until_loaded(slot, report)
            yield slot
        finally:
            slot.num_sessions -= 1
            slot.last_use = next(self._uses)
            self._wake()

    def finish(self, timeout_s: float) -> bool:
        """Ends all threads; false when one is still busy (a compile, say) after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        finished = [thread.finish(max(0.0, deadline_s - time.monotonic())) for thread in self._threads]
        return all(finished)

    async def _place(self, model_id: str, report: Report) -> ModelSlot:
        """The model's slot, as soon as there is room for one."""
        start_s = time.monotonic()
        while True:
            if slot := self._slots.get(model_id):
                return slot
            if len(self._slots) + self._num_closing < self._max_models:
                return self._open(model_id)
            if (victim := self._least_recently_used()) is not None:
                await self._close(victim)
                continue
            busy = sum(slot.num_sessions for slot in self._slots.values())
            text = f"Waiting for {busy} active session(s) to finish... ({time.monotonic() - start_s:.0f}s elapsed)"
            await report("waiting", text)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _REPORT_INTERVAL_S)

    def _least_recently_used(self) -> ModelSlot | None:
        """Of the slots that nobody uses; one that is being loaded stays."""
        idle = [slot for slot in self._slots.values() if slot.num_sessions == 0 and slot.loaded.done()]
        return min(idle, key=lambda slot: slot.last_use, default=None)

    def _open(self, model_id: str) -> ModelSlot:
        if model_id in self._slots:
            return self._slots[model_id]
        thread = ModelThread(
            self._batching, on_batch=lambda size, infer_s: self._metrics.batch_ran(model_id, size, infer_s)
        )
        self._threads.add(thread)
        loaded = asyncio.get_running_loop().create_future()
        loaded.add_done_callback(_retrieve)
        slot = self._slots[model_id] = ModelSlot(model_id, thread, loaded)
        self._metrics.watch_queue(model_id, thread.num_waiting)
        self._start(self._load(slot))
        return slot

    async def _load(self, slot: ModelSlot) -> None:
        start_s = time.monotonic()
        try:
            policy = await slot.thread.load(lambda: self.catalog.load(slot.model_id))
        except Exception as error:
            self._forget(slot)
            self._threads.discard(slot.thread)
            slot.thread.finish(timeout_s=0)
            slot.loaded.set_exception(error)
        else:
            logger.info("Model '%s' is ready after %.1f s", slot.model_id, time.monotonic() - start_s)
            self._metrics.model_loaded(slot.model_id, time.monotonic() - start_s)
            slot.loaded.set_result(policy)
        self._wake()

    async def _until_loaded(self, slot: ModelSlot, report: Report) -> None:
        start_s = time.monotonic()
        while not slot.loaded.done():
            elapsed_s = time.monotonic() - start_s
            await report("loading", f"Loading checkpoint {slot.model_id}... ({elapsed_s:.0f}s elapsed)")
            await asyncio.wait([slot.loaded], timeout=_REPORT_INTERVAL_S)
        await slot.loaded

    async def _close(self, slot: ModelSlot) -> None:
        """Frees the model's memory before anything takes its place."""
        logger.info("Model '%s' makes room", slot.model_id)
        self._forget(slot)
        slot.loaded = asyncio.get_running_loop().create_future()  # the old one holds the policy
        slot.loaded.cancel()
        self._num_closing += 1
        try:
            await asyncio.to_thread(slot.thread.finish, None)
            gc.collect()
        finally:
            self._num_closing -= 1
            self._threads.discard(slot.thread)
            self._wake()

    def _forget(self, slot: ModelSlot) -> None:
        del self._slots[slot.model_id]
        self._metrics.model_gone(slot.model_id)

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)  # The loop itself keeps no reference.
        task.add_done_callback(self._tasks.discard)

    def _wake(self) -> None:
        self._changed.set()


def _retrieve(loaded: asyncio.Future) -> None:
    """Keeps asyncio from logging a failure that nobody waited for as never retrieved."""
    if not loaded.cancelled():
        loaded.exception()
