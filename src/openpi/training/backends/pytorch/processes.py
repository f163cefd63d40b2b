"""Several processes in PyTorch: the start, and a vote that waits for nobody.

`processes` holds what needs no framework.
"""

# `dist.TCPStore` is documented there, and not in its `__all__`.
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from openpi.shared.errors import first_line
from openpi.training.backend import STEPS_IN_FLIGHT
from openpi.training.distributed import processes
from openpi.training.distributed.launch import Launch

logger = logging.getLogger(__name__)

_BEATS, _LEFT, _PORT = "openpi/lives", "openpi/left", "openpi/port"
_BEAT_S, _GONE_S, _LAST_WORDS_S = 5, 100, 30
_PATIENCE = datetime.timedelta(seconds=5)
# Between processes that compute alike: one that is slower than this is gone.
_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


class TorchPeers:
    """`processes.Peers` over the store that process 0 keeps.

    Every thread has a connection of its own: one that waits would keep the others from asking. Each process says every
    few seconds that it lives, and process 0 looks whether all do, so that nobody waits for one that is gone, not even
    in a collective between GPUs, which would not hear of it.
    """

    def __init__(
        self, launch: Launch, keeper: distributed_c10d.Store, connect: Callable[[], distributed_c10d.Store]
    ) -> None:
        self._keeper = keeper  # of process 0 the store itself, which lives as long as this
        self.index = launch.process_id
        self.count = launch.num_processes
        self._connect = connect
        self._of_thread = threading.local()
        self._has_left = threading.Event()
        self._beats = {i: ("", time.monotonic()) for i in range(self.count)}
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> str:
        while True:
            try:
                self._store.wait([key], _PATIENCE)
                return self._store.get(key).decode()
            except dist.DistStoreError:  # not yet
                self._check_all_live()

    def delete(self, key: str) -> None:
        self._store.delete_key(key)

    def leave(self) -> None:
        # Process 0 keeps the store, so it goes last.
        self.set(f"{_LEFT}/{self.index}", "")
        if self.index == 0:
            for index in range(self.count):
                self.get(f"{_LEFT}/{index}")
        self._has_left.set()
        dist.destroy_process_group()

    @property
    def _store(self) -> distributed_c10d.Store:
        if not hasattr(self._of_thread, "store"):
            self._of_thread.store = self._connect()
        return self._of_thread.store

    def _beat(self) -> None:
        try:
            while not self._has_left.wait(_BEAT_S):
                self.set(f"{_BEATS}/{self.index}", str(time.time()))
                if self.index == 0:
                    self._check_all_live()
        except RuntimeError as error:  # of the others: the store is gone, and process 0 with it
            if not self._has_left.wait(_LAST_WORDS_S):  # of the main thread, unless it waits in a collective
                logger.error("%s; this process ends", first_line(error))
                os._exit(1)

    def _check_all_live(self) -> None:
        """Raises RuntimeError when a process has not been heard of for long."""
        now = time.monotonic()
        for index, (before, since) in self._beats.items():
            key = f"{_BEATS}/{index}"
            beat = self._store.get(key).decode() if self._store.check([key]) else ""
            if beat != before or self._store.check([f"{_LEFT}/{index}"]):
                self._beats[index] = (beat, now)
            elif now - since > _GONE_S:
                raise RuntimeError(
                    f"process {index} of {self.count} has not been heard of for {_GONE_S} s; see its log"
                )


def agreed(launch: Launch) -> Launch:
    """With a port that process 0 has found free, told to the others in the store of torchrun; without one, as it is.

    Raises:
        RuntimeError: process 0 has not come within the time limit.
    """
    if launch.agent_store is None:
        return launch
    host, _, port = launch.agent_store.rpartition(":")
    timeout = datetime.timedelta(seconds=launch.timeout_s)
    store = dist.TCPStore(host.strip("[]"), int(port), is_master=False, timeout=timeout)
    # The store outlives the processes, which torchrun starts again after a failure, and may be that of other runs.
    key = "/".join([_PORT, *(os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))])
    if launch.process_id == 0:
        with socket.create_server(("", 0)) as free:
            store.set(key, str(free.getsockname()[1]))
    return dataclasses.replace(launch, coordinator_address=f"{host}:{store.get(key).decode()}", agent_store=None)


def join(launch: Launch) -> TorchPeers:
    """Connects the processes for collectives: NCCL between GPUs, gloo between processors.

    Raises:
        RuntimeError: they do not come within the time limit, or the launcher does not say where process 0 is.
    """
    if launch.coordinator_address is None:
        raise RuntimeError(
            "the launcher does not say where process 0 is: start with torchrun, or give --coordinator-address, "
            "--num-processes and --process-id"
        )
    host, _, port = launch.coordinator_address.rpartition(":")

    def connect(is_master: bool = False) -> distributed_c10d.Store:
        return dist.TCPStore(
            host.strip("[]"),
            int(port),
            launch.num_processes if is_master else None,
            is_master=is_master,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=launch.timeout_s),
        )

    store = connect(is_master=launch.process_id == 0)
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        # Started by hand, processes of a node have consecutive numbers, one for each of its GPUs.
        own = launch.local_device_ids or (launch.process_id % torch.cuda.device_count(),)
        torch.cuda.set_device(own[0])
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=distributed_c10d.PrefixStore("collectives", store),
        rank=launch.process_id,
        world_size=launch.num_processes,
        timeout=_COLLECTIVE_TIMEOUT,
    )
    return TorchPeers(launch, store, connect)


def mean_of_all(value: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes, on each of them."""
    if processes.count() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / processes.count()


def all_agree(value: bool) -> bool:
    """Whether it is true in every process."""
    if processes.count() == 1:
        return value
    ballot = torch.tensor([int(value)])
    dist.all_reduce(ballot, dist.ReduceOp.MIN)
    return bool(ballot.item())


class Vote:
    """What any process says becomes what all say, at the same step, without waiting for the device.

    A maximum over the processes is started at every step, and read some steps later.
    """

    def __init__(self) -> None:
        self._cast: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def __call__(self, value: int) -> int:
        """The largest value given by any process `STEPS_IN_FLIGHT` calls ago; with one process, `value`."""
        if processes.count() == 1:
            return value
        ballot = torch.tensor([value])  # on the processor: it must not wait for a GPU
        work = dist.all_reduce(ballot, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._cast.append((work, ballot))
        if len(self._cast) <= STEPS_IN_FLIGHT:
            return 0
        work, ballot = self._cast.popleft()
        work.wait()
        return int(ballot.item())
