"""Several clients at once: through the server and its sockets, and past them."""

import importlib.util
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from gpu_parts import models
from gpu_parts.calls import observation_for, pipeline_of, policy_of
from gpu_parts.records import Records, figure, times_ms
from gpu_parts.sizes import Size

_CLIENTS_PER_PROCESS = 4
_BATCHES = (1, 8)
_PATIENCE_S = 60.0


def clients(part: str, *, size: Size, records: Records) -> None:
    """PyTorch as CUDA graphs: one by one, and in batches of eight, which a server makes ready when they first come."""
    from openpi.serving.model_thread import Batching

    shape = size.shapes["published"]
    pipeline = pipeline_of(shape)
    observation = observation_for(shape, pipeline)
    compile_mode = "default" if size.compiles else None
    sampler = models.pytorch_sampler(shape.model, compile_mode=compile_mode, uses_graphs=True)
    policy = policy_of(sampler, pipeline)
    has_sockets = importlib.util.find_spec("websockets") is not None
    for count in _BATCHES:
        policy.warm_up(observation, batch_size=count)
        together = [observation] * count
        times = times_ms(lambda together=together: policy.infer_batch(together), seconds=size.seconds / 3)
        records.write(part, f"batch of {count}", figures={"call": figure(times, "ms")})
        ways = {"no sockets": _past_sockets} | ({"websockets": _through_sockets} if has_sockets else {})
        for way, measure in ways.items():
            seconds, waits = measure(policy, observation, size, Batching(max_batch=count))
            figures = {"chunks": figure(len(waits) / seconds, "1/s"), "wait": figure(waits, "ms")}
            records.write(part, f"{size.clients} clients, {way}, batches of {count}", figures=figures)
    if not has_sockets:
        raise ModuleNotFoundError("No module named 'websockets': measured without sockets", name="websockets")


def _past_sockets(policy: Any, observation: dict, size: Size, batching: Any) -> tuple[float, list[float]]:
    """What batching reaches, with clients that are threads of this process."""
    from openpi.serving.model_thread import Job, ModelThread

    thread = ModelThread(batching)
    thread.load(lambda: policy).result()

    def ask() -> None:
        answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        items: Any = thread.prepare([observation])
        thread.submit(Job(items), lambda value, error: answers.put((value, error)))
        value, error = answers.get(timeout=_PATIENCE_S)
        if error is not None or isinstance(value.results[0], Exception):
            raise RuntimeError(f"no answer: {error or value.results[0]}")

    try:
        return _at_once([ask] * size.clients, size.seconds)
    finally:
        thread.finish(timeout_s=10)


def _at_once(calls: Sequence[Callable[[], object]], seconds: float) -> tuple[float, list[float]]:
    """Each in a thread, again and again: the seconds that took, and the milliseconds of all calls."""
    waits: list[float] = []
    errors: list[Exception] = []

    def repeat(call: Callable[[], object]) -> None:
        try:
            waits.extend(times_ms(call, seconds=seconds, at_least=1, at_most=10**6))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - start, waits


def _through_sockets(policy: Any, observation: dict, size: Size, batching: Any) -> tuple[float, list[float]]:
    """As robots ask: other processes, four robots in each."""
    from openpi.serving.server import PolicyServer

    ports: queue.SimpleQueue[int] = queue.SimpleQueue()
    server = PolicyServer(lambda: policy, port=0, on_listening=ports.put, batching=batching)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        return _robots(ports.get(timeout=_PATIENCE_S), observation, size)
    finally:
        server.stop()
        thread.join(_PATIENCE_S)


def _robots(port: int, observation: dict, size: Size) -> tuple[float, list[float]]:
    context = multiprocessing.get_context("spawn")
    count = -(-size.clients // _CLIENTS_PER_PROCESS)
    each = min(size.clients, _CLIENTS_PER_PROCESS)
    barrier, results = context.Barrier(count), context.Queue()
    processes = [
        context.Process(target=_robots_of_a_process, args=(port, each, observation, size.seconds, barrier, results))
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    try:
        found = [results.get(timeout=_PATIENCE_S) for _ in processes]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    errors = [error for error, _, _ in found if error]
    if errors:
        raise RuntimeError(errors[0])
    return max(seconds for _, seconds, _ in found), [wait for _, _, waits in found for wait in waits]


def _robots_of_a_process(port: int, count: int, observation: dict, seconds: float, barrier: Any, results: Any) -> None:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    try:
        robots = [WebsocketClientPolicy("127.0.0.1", port) for _ in range(count)]
        barrier.wait(_PATIENCE_S)
        took, waits = _at_once([lambda robot=robot: robot.infer(observation) for robot in robots], seconds)
        for robot in robots:
            robot.close()
        results.put(("", took, waits))
    except Exception as error:
        results.put((f"{type(error).__name__}: {error}", 0.0, []))
