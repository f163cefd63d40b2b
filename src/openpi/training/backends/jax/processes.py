"""Several processes in JAX: the start, programs that all begin together, and a vote that waits for nobody.

`processes` holds what needs no JAX.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from openpi.training import sharding
from openpi.training.backend import STEPS_IN_FLIGHT
from openpi.training.distributed import processes
from openpi.training.distributed.launch import Launch

# Longer than anything takes. A process that dies is noticed by JAX's heartbeat, which ends those that wait for it.
_FOREVER_MS = 7 * 24 * 3600 * 1000


class JaxPeers:
    """`processes.Peers` over the store that JAX's coordinator, process 0, keeps.

    JAX's heartbeat (100 s) ends processes that wait for one that has died.
    """

    def __init__(self) -> None:
        from jax._src import distributed  # no public name gives the client

        self._client: Any = distributed.global_state.client
        self.index = jax.process_index()
        self.count = jax.process_count()

    def set(self, key: str, value: str) -> None:
        self._client.key_value_set(key, value)

    def get(self, key: str) -> str:
        return self._client.blocking_key_value_get(key, _FOREVER_MS)

    def delete(self, key: str) -> None:
        self._client.key_value_delete(key)

    def leave(self) -> None:
        jax.distributed.shutdown()


def join(launch: Launch) -> JaxPeers:
    """Makes the devices of all processes one.

    Raises:
        RuntimeError: they do not come within the time limit.
    """
    # Without it, processes on CPUs cannot exchange arrays; accelerators have their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if launch.coordinator_address is None:
        jax.distributed.initialize(
            local_device_ids=launch.local_device_ids,
            cluster_detection_method="slurm",
            initialization_timeout=launch.timeout_s,
        )
    else:
        jax.distributed.initialize(
            launch.coordinator_address,
            launch.num_processes,
            launch.process_id,
            local_device_ids=launch.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=launch.timeout_s,
        )
    return JaxPeers()


def in_step(what: str, function: jax.stages.Wrapped) -> Callable[..., Any]:
    """A jitted function that no process runs before all have compiled it for arguments of such shapes.

    Keyword arguments are the static ones.

    Compiling may take one process much longer than another, and between CPUs a collective waits for 30 s only.
    """
    if processes.count() == 1:
        return function
    compiled = set()

    def call(*args: object, **static: object) -> Any:
        kind = (*((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args)), *static.items())
        if kind not in compiled:
            function.lower(*args, **static).compile()  # the call below finds it compiled
            processes.exchange(f"compiling {what}", None)
            compiled.add(kind)
        return function(*args, **static)

    return call


class Vote:
    """What any process says becomes what all say, at the same step, without waiting for the device.

    A maximum over the devices is started at every step, and read when the device is done with it anyway.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._place = sharding.data_sharding(mesh)
        self._max = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
        self._cast: deque[jax.Array] = deque()

    def __call__(self, value: int) -> int:
        """The largest value given by any process `STEPS_IN_FLIGHT` calls ago; with one process, `value`."""
        if processes.count() == 1:
            return value
        ballot = np.full(jax.local_device_count(), value, np.int32)
        self._cast.append(self._max(jax.make_array_from_process_local_data(self._place, ballot)))
        return int(self._cast.popleft()) if len(self._cast) > STEPS_IN_FLIGHT else 0
