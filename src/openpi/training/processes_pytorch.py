"""Several processes in PyTorch: the start, and a vote that waits for nobody.

`processes` holds what needs no framework.
"""

from __future__ import annotations

import datetime
from collections import deque

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from openpi.training import processes
from openpi.training.launch import Launch

# Longer than anything takes; a process that dies closes the store, or is missed by a collective, before that.
_FOREVER = datetime.timedelta(days=7)
# Between processes that compute alike: one that is slower than this is gone.
_COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
# Steps that a process may be ahead of the device; see `progress.Window`.
_STEPS_IN_FLIGHT = 2


class TorchPeers:
    """`processes.Peers` over the store that process 0 keeps."""

    def __init__(self, store: distributed_c10d.Store, launch: Launch) -> None:
        self._store = store
        self.index = launch.process_id
        self.count = launch.num_processes

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> str:
        self._store.wait([key], _FOREVER)
        return self._store.get(key).decode()

    def delete(self, key: str) -> None:
        self._store.delete_key(key)

    def leave(self) -> None:
        # Process 0 keeps the store, so it goes last.
        self.set(f"openpi/left/{self.index}", "")
        if self.index == 0:
            for index in range(self.count):
                self.get(f"openpi/left/{index}")
        dist.destroy_process_group()


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
    store = dist.TCPStore(  # type: ignore[reportPrivateImportUsage]
        host.strip("[]"),
        int(port),
        launch.num_processes,
        is_master=launch.process_id == 0,
        timeout=datetime.timedelta(seconds=launch.timeout_s),
    )
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device((launch.local_device_ids or (0,))[0])
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=distributed_c10d.PrefixStore("collectives", store),
        rank=launch.process_id,
        world_size=launch.num_processes,
        timeout=_COLLECTIVE_TIMEOUT,
    )
    return TorchPeers(store, launch)


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
        """The largest value given by any process `_STEPS_IN_FLIGHT` calls ago; with one process, `value`."""
        if processes.count() == 1:
            return value
        ballot = torch.tensor([value])  # on the processor: it must not wait for a GPU
        work = dist.all_reduce(ballot, dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._cast.append((work, ballot))
        if len(self._cast) <= _STEPS_IN_FLIGHT:
            return 0
        work, ballot = self._cast.popleft()
        work.wait()
        return int(ballot.item())
