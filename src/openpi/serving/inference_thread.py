"""One thread that does the slow work of a server: load the policy, warm it up, infer."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple


class _Call(NamedTuple):
    function: Callable[..., Any]
    args: tuple
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future


class InferenceThread:
    """Runs calls one at a time, in the order they came, while the event loop stays free.

    One thread, because a model runs one inference at a time, and because CUDA contexts and MuJoCo renderers
    belong to the thread that made them. It is a daemon: a process that has to stop does not wait for a
    compile.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="openpi-inference", daemon=True)
        self._thread.start()

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Waits for `function(*args)`. A call that is cancelled before its turn is never made."""
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        self._calls.put(_Call(function, args, loop, answer))
        result, error = await answer
        if error is not None:
            raise error
        return result

    def finish(self, timeout_s: float) -> bool:
        """Ends the thread after the calls that are waiting; false when that takes longer than `timeout_s`."""
        self._calls.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if not call.answer.cancelled():
                _hand_over(call, *_outcome(call))
            del call  # Or the thread would hold on to an observation while it is idle.


def _outcome(call: _Call) -> tuple[Any, BaseException | None]:
    try:
        return call.function(*call.args), None
    except BaseException as error:  # Whatever a policy raises is for the caller; the thread must go on.
        return None, error


def _hand_over(call: _Call, *outcome: Any) -> None:
    try:
        call.loop.call_soon_threadsafe(_resolve, call.answer, outcome)
    except RuntimeError:
        assert call.loop.is_closed()  # The server is gone, and so is whoever asked.


def _resolve(answer: asyncio.Future, outcome: tuple) -> None:
    if not answer.cancelled():
        answer.set_result(outcome)
