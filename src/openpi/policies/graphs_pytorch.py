"""A function of tensors as one CUDA graph, between a transfer of its inputs and one of its output."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from openpi.models_pytorch import attention

_WARM_UP_RUNS = 3
_ALIGNMENT = 256  # bytes, of tensors in a buffer

# A capture begins with waiting for the whole device, as does a compiler that tries kernels before it; no thread may do
# that while a stream of the device is being captured. Threads that only replay graphs are not kept.
_one_capture_at_a_time = threading.Lock()


class Direct:
    """A function of device tensors, launched as it is written; in the steps of a `Graph`."""

    def __init__(self, run: Callable[[dict[str, Tensor]], Tensor], device: torch.device) -> None:
        self._run, self._device = run, device
        self._inputs: dict[str, Tensor] = {}
        self._output: Tensor | None = None

    def send(self, host: dict[str, Tensor]) -> None:
        self._inputs = {key: value.to(self._device) for key, value in host.items()}

    @torch.no_grad()
    def replay(self) -> None:
        self._output = self._run(self._inputs)

    def fetch(self) -> Tensor:
        assert self._output is not None
        return self._output.cpu()


class Graphs:
    """Captures functions on a GPU. Its graphs are replayed one at a time, in any order, all on one stream. So they
    share the memory for everything between their inputs and outputs: it is that of the largest, not of all.

    One may be captured while another thread replays others. So captures have a stream of their own, of the other
    priority: streams come from a pool, and nothing else may be launched into one that is captured. Nothing but captures
    uses it, as workspaces belong to a stream: one in a graph must not be used by anything beside the replays.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self._captures = torch.cuda.Stream(priority=-1)
            self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[dict[str, Tensor]], Tensor], example: dict[str, Tensor]) -> Graph:
        """A graph of `run`.

        Args:
            run: device tensors by name -> device tensor, with no other input; see `test_torch_sampler.py` for what a
                capture forbids.
            example: host tensors, as every call will have them.
        Raises:
            torch.OutOfMemoryError: what was taken is given back, and other graphs go on.
        """
        captured = torch.cuda.CUDAGraph()
        with _one_capture_at_a_time, torch.cuda.device(self.device):  # captures are of the current device
            try:
                return self._captured(captured, run, example)
            finally:
                torch.cuda.empty_cache()  # what warming up took, next to what the graph has

    def _captured(
        self, captured: torch.cuda.CUDAGraph, run: Callable[[dict[str, Tensor]], Tensor], example: dict[str, Tensor]
    ) -> Graph:
        transfers = _Inputs(example, self.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), attention.measuring():
            for _ in range(_WARM_UP_RUNS):  # compiles, tunes, and opens libraries, none of which can be captured
                run(transfers.on_device)
        # Of this thread only: others may go on to allocate memory meanwhile.
        how: Any = {"pool": self._pool, "stream": self._captures, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(captured, **how):
            output = run(transfers.on_device)
        return Graph(captured, transfers, output, self.stream)


class _Inputs:
    """Tensors at fixed places on the host and on the device, in one buffer each, so that one transfer moves them all;
    the host's is pinned, so that the device fetches it.
    """

    def __init__(self, example: dict[str, Tensor], device: torch.device) -> None:
        self._staging = torch.empty(num_bytes(example), dtype=torch.uint8, pin_memory=True)
        self._staged = within(self._staging, example)
        self._buffer = torch.empty(self._staging.shape, dtype=torch.uint8, device=device)
        self.on_device = within(self._buffer, example)
        self.send(example)

    def send(self, host: dict[str, Tensor]) -> None:
        """Starts the transfer in the current stream. The one before must have ended."""
        for key, value in host.items():
            self._staged[key].copy_(value)
        self._buffer.copy_(self._staging, non_blocking=True)


class Graph:
    """A captured function: replayed as one launch, with inputs and output at fixed places. Calls must not overlap, nor
    with those of other graphs of the same `Graphs`.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: _Inputs, output: Tensor, stream: torch.cuda.Stream) -> None:
        self._graph, self._inputs, self._output, self._stream = graph, inputs, output, stream
        self._fetched = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)

    def __call__(self, host: dict[str, Tensor]) -> Tensor:
        """The output on the host; nothing is under way any more when it returns."""
        self.send(host)
        self.replay()
        return self.fetch()

    def send(self, host: dict[str, Tensor]) -> None:
        """Starts the transfer of the inputs."""
        with torch.cuda.stream(self._stream):
            self._inputs.send(host)

    def replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()

    def fetch(self) -> Tensor:
        """Waits for the output."""
        with torch.cuda.stream(self._stream):
            self._fetched.copy_(self._output, non_blocking=True)
        self._stream.synchronize()
        return self._fetched.clone()  # the next call writes there


def within(buffer: Tensor, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors like those of the example, side by side in a buffer of bytes."""
    found, start = {}, 0
    for key, value in example.items():
        end = start + value.numel() * value.element_size()
        found[key] = buffer[start:end].view(value.dtype).view(value.shape)
        start = _aligned(end)
    return found


def num_bytes(example: Mapping[str, Tensor]) -> int:
    return sum(_aligned(value.numel() * value.element_size()) for value in example.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
