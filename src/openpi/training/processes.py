"""Several processes as one run: the start, what they tell each other, and the end.

All processes run the same program on the same global arrays, each holding its devices' parts; collectives inside
compiled steps keep them together. What is here is for the rest: files that one process writes, failures of one that
all must hear of, a signal that reached one. With one process everything is a plain call.
Source: the design, "working at the scale of one machine and past it".
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from openpi.training import roll_call, sharding
from openpi.training.launch import Launch

logger = logging.getLogger("openpi")

T = TypeVar("T")

# Longer than anything takes. A process that dies is noticed by JAX's heartbeat, which ends those that wait for it.
_FOREVER_MS = 7 * 24 * 3600 * 1000
# Steps that a process may be ahead of the device; see `progress.Window`.
_STEPS_IN_FLIGHT = 2

_exchanges: Counter[str] = Counter()
_all_know_of_the_failure = False


def start(launch: Launch | None) -> None:
    """Joins the other processes; to be called before anything asks JAX for its devices.

    Raises:
        RuntimeError: the processes do not find each other within the time limit, or contradict each other.
    """
    if launch is None:
        return
    # Without it, processes on CPUs cannot exchange arrays; accelerators have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if launch.coordinator_address is None:
        jax.distributed.initialize(
            local_device_ids=launch.local_device_ids,
            cluster_detection_method="slurm",
            initialization_timeout=launch.timeout_s,
        )
    else:
        roll_call.meet(
            launch.coordinator_address,
            num_processes=launch.num_processes,
            process_id=launch.process_id,
            timeout_s=launch.timeout_s,
        )
        jax.distributed.initialize(
            launch.coordinator_address,
            launch.num_processes,
            launch.process_id,
            local_device_ids=launch.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=launch.timeout_s,
        )
    logger.info("%d processes have met; this is process %d", count(), index())


def end(exit_code: int) -> None:
    """Leaves the run; returns in an orderly end.

    A process that fails alone leaves at once, by `os._exit`: the usual way out waits for the other processes, and they
    wait for this one in a collective. They end with an error of the collective, or of JAX's heartbeat (100 s).
    """
    if _client() is None:
        return
    if exit_code == 1 and not _all_know_of_the_failure:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    jax.distributed.shutdown()


def index() -> int:
    """Number of this process; 0 writes files and talks."""
    return jax.process_index()


def count() -> int:
    return jax.process_count()


def is_first() -> bool:
    return index() == 0


def exchange(what: str, value: Any) -> list[Any]:
    """The JSON values of all processes, by process.

    Args:
        what: the same in all processes; each may be in use in one thread at a time.
    """
    if count() == 1:
        return [value]
    client = _client()
    place = f"openpi/{what}/{_exchanges[what]}"  # a key can be set only once
    _exchanges[what] += 1
    client.key_value_set(f"{place}/{index()}", json.dumps(value))
    return [json.loads(client.blocking_key_value_get(f"{place}/{i}", _FOREVER_MS)) for i in range(count())]


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Ends when all processes have come to its end; an error in one is an error in all.

    Not to be nested, and nothing in it may wait for another process.

    Args:
        what: as in "failed while <what>"; as of `exchange`.
    Raises:
        the error of this process, or a RuntimeError that tells that of another.
    """
    global _all_know_of_the_failure
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    problems = exchange(what, None if error is None else str(error) or repr(error))
    _all_know_of_the_failure |= any(problems)
    if error is not None:
        raise error
    for process, problem in enumerate(problems):
        if problem is not None:
            raise RuntimeError(f"process {process} failed while {what}: {problem}")


def on_first(what: str, action: Callable[[], T]) -> T:
    """Runs `action` in process 0; all get its JSON value, or its error. The rules of `together` hold."""
    value = None
    with together(what):
        if is_first():
            value = action()
    return exchange(f"{what}, result", value)[0]


def check_same(what: str, values: dict[str, Any]) -> None:
    """Refuses to go on unless the JSON values are the same in all processes.

    Raises:
        ValueError: they are not; those of process 0 and of the first that differs are shown.
    """
    global _all_know_of_the_failure
    first, *others = exchange(what, values)
    for process, theirs in enumerate(others, start=1):
        different = [key for key in first if first[key] != theirs.get(key)]
        if different:
            _all_know_of_the_failure = True
            changes = "; ".join(f"{key} is {first[key]} in process 0, {theirs.get(key)}" for key in different)
            raise ValueError(
                f"{what}: {changes} in process {process}; start all processes with the same command, or with "
                "--num-processes=1 those that are runs of their own"
            )


def in_step(what: str, function: Any) -> Callable[..., Any]:
    """A jitted function that no process runs before all have compiled it for arguments of such shapes.

    Keyword arguments are the static ones.

    Compiling may take one process much longer than another, and between CPUs a collective waits for 30 s only.
    """
    if count() == 1:
        return function
    compiled = set()

    def call(*args: Any, **static: Any) -> Any:
        kind = (*((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args)), *static.items())
        if kind not in compiled:
            function.lower(*args, **static).compile()  # the call below finds it compiled
            exchange(f"compiling {what}", None)
            compiled.add(kind)
        return function(*args, **static)

    return call


def gather(rows: np.ndarray) -> np.ndarray:
    """Arrays of equal shape of all processes on a new leading axis, bit for bit. Only in the main thread."""
    if count() == 1:
        return rows[None]
    raw = np.ascontiguousarray(rows).view(np.uint8)  # JAX would make doubles single
    return np.asarray(multihost_utils.process_allgather(raw)).view(rows.dtype)


class Vote:
    """What any process says becomes what all say, at the same step, without waiting for the device.

    A maximum over the devices is started at every step, and read when the device is done with it anyway.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._place = sharding.data_sharding(mesh)
        self._max = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
        self._cast: deque[jax.Array] = deque()

    def __call__(self, value: int) -> int:
        """The largest value given by any process `_STEPS_IN_FLIGHT` calls ago; with one process, `value`."""
        if count() == 1:
            return value
        ballot = np.full(jax.local_device_count(), value, np.int32)
        self._cast.append(self._max(jax.make_array_from_process_local_data(self._place, ballot)))
        return int(self._cast.popleft()) if len(self._cast) > _STEPS_IN_FLIGHT else 0


def _client() -> Any:
    """JAX's store of keys and values; no public name gives it. None outside of a run of several processes."""
    from jax._src import distributed

    return distributed.global_state.client
