"""A PyTorch model made fast on a device: fused weights, flow times tabulated, and on a GPU one CUDA graph per shape."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openpi.models import compact
from openpi.models_pytorch import compiling
from openpi.models_pytorch.action_grammar import ActionGrammar
from openpi.models_pytorch.model import Observation
from openpi.models_pytorch.rtc import Continued
from openpi.policies.program import Extents, Program

logger = logging.getLogger("openpi")

# Modes of the configuration that bring CUDA graphs of their own; here the whole sampler is one graph.
_WITHOUT_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}
_WARM_UP_RUNS = 3
_MAX_PROGRAMS = 32  # kinds of inputs that a sampler keeps something for
_ALIGNMENT = 256  # bytes, of tensors in a buffer
_TEXTS = ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask")

Options = tuple[tuple[str, Any], ...]

# A capture begins with waiting for the whole device, as does a compiler that tries kernels before it; no thread may do
# that while a stream of the device is being captured. Threads that only replay graphs are not kept.
_one_capture_at_a_time = threading.Lock()


def resolve_device(name: str | None) -> torch.device:
    """The device of a name such as `cuda:1`; None = a GPU if there is one, else the processor.

    Raises:
        ValueError: there is no such device; those that there are are listed.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if num_gpus else "cpu")
    present = ["cpu", *(f"cuda:{i}" for i in range(num_gpus))]
    if name not in (*present, *(["cuda"] if num_gpus else [])):
        raise ValueError(f"device '{name}' does not exist here; there is: {', '.join(present)}")
    return torch.device(name)


class PytorchSampler:
    """Runs `sample_actions` of a PyTorch model on batches of NumPy inputs.

    Without given noise, successive calls draw from a generator seeded with `seed`: a fresh process repeats the same
    sequence, on any device. Calls must not overlap, those of `warm_up` included: the caller (a server) runs one at a
    time. Samplers of one device may run side by side.

    Args:
        model: with its parameters; they are fused in place, which makes it one for inference only.
        device: see `resolve_device`.
        compile_mode: of `torch.compile`; None = not compiled.
        compile_backend: of `torch.compile`.
        uses_graphs: capture CUDA graphs; None = on a GPU.
    Raises:
        ValueError: there is no such device.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | None = None,
        seed: int = 0,
        compile_mode: str | None = None,
        compile_backend: compiling.Backend = "inductor",
        uses_graphs: bool | None = None,
    ) -> None:
        self._device = resolve_device(device)
        self._model: Any = model.to(self._device).eval().requires_grad_(False)
        for module in list(model.modules()):
            fuse: Any = getattr(module, "fuse", None)
            if fuse is not None:
                fuse()
        config = self._model.config
        self.takes_noise: bool = self._model.takes_noise
        if self.takes_noise and compile_mode is not None:
            self._compile(_WITHOUT_GRAPHS.get(compile_mode, compile_mode), compile_backend)
        on_gpu = self._device.type == "cuda"
        uses_graphs = (on_gpu if uses_graphs is None else uses_graphs) and self.takes_noise
        self._has_programs = self.takes_noise and (uses_graphs or compile_mode is not None)
        self.compiles = self._has_programs  # each batch size anew
        self._generator = torch.Generator().manual_seed(seed)
        self._graphs = Graphs(self._device) if uses_graphs else None
        self._extents = Extents(config)
        self._programs: dict[Any, Direct | Graph] = {}  # the last one used comes last
        self.action_horizon: int = config.action_horizon
        self.action_dim: int = config.action_dim

    def _compile(self, mode: str, backend: compiling.Backend) -> None:
        """In place, part by part: all Euler steps are one program."""
        for name in self._model.sampled_by:
            part = compiling.compiled(getattr(self._model, name), mode=mode, backend=backend)
            setattr(self._model, name, part)

    def sample(self, inputs: Mapping[str, Any], noise: np.ndarray | None, **sample_kwargs: Any) -> np.ndarray:
        """Action chunks (of pi0-FAST, tokens) for a batch; returns when they are there.

        Args:
            inputs: batched model-side dict (`image`, `image_mask`, `state`, `tokenized_prompt`, ...); with `continued`,
                the fields of `rtc.Continued`, and the option `chunking` chunks go on from others.
            noise: f32[b ah ad] to start from, or None to draw it.
            sample_kwargs: options of the model's `sample_actions`, such as `num_steps` or, for pi0-FAST, `temperature`
                and `grammar`.
        Returns:
            f32[b ah ad] actions; from pi0-FAST, which takes no noise, f32[b m] tokens.
        """
        return self.program(inputs, noise, **sample_kwargs)()

    def program(self, inputs: Mapping[str, Any], noise: np.ndarray | None, **sample_kwargs: Any) -> Program:
        """What `sample` does with these arguments, part by part."""
        options = tuple(sorted(sample_kwargs.items()))
        find = self._extents.choose if self._has_programs else self._extents.used
        return self._program(compact.cut(inputs, find(inputs, options)), noise, options, self._generator)

    def warm_up(self, inputs: Mapping[str, Any], **sample_kwargs: Any) -> None:
        """Compiles and captures `sample` for inputs like these (`Extents.make_ready`); the sequence of noise stays
        where it is.
        """
        options = tuple(sorted(sample_kwargs.items()))
        for extent in self._extents.make_ready(inputs, options):
            self._program(compact.cut(inputs, extent), None, options, torch.Generator().manual_seed(0))()

    @torch.no_grad()
    def _program(
        self, inputs: Mapping[str, Any], noise: np.ndarray | None, options: Options, generator: torch.Generator
    ) -> Program:
        host = host_tensors(inputs)
        if self.takes_noise:
            shape = (len(inputs["state"]), self.action_horizon, self.action_dim)
            drawn = torch.randn(shape, generator=generator) if noise is None else torch.as_tensor(noise)
            host["noise"] = drawn.float()
        elif dict(options).get("temperature"):
            host["seed"] = torch.randint(2**62, (1,), generator=generator)
        dropped = tuple(key for key, mask in inputs["image_mask"].items() if mask is None)
        signature = (options, dropped, *((key, tuple(value.shape), value.dtype) for key, value in host.items()))
        program = self._programs.pop(signature, None)
        if program is None:
            if len(self._programs) >= _MAX_PROGRAMS:
                logger.warning("inputs of more than %d kinds: that used longest ago is forgotten", _MAX_PROGRAMS)
                del self._programs[next(iter(self._programs))]
            program = self._made(host, dropped, options)
        self._programs[signature] = program
        return Program(
            send=lambda: program.send(host),
            run=program.replay,
            fetch=lambda: program.fetch().float().numpy(),
            wait=self._wait,
        )

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _made(self, host: dict[str, Tensor], dropped: tuple[str, ...], options: Options) -> Direct | Graph:
        """A function of host tensors of these shapes."""
        on_device = self._of_flow(dropped, options) if self.takes_noise else self._of_tokens(dropped, options)
        if self._graphs is not None:
            return self._graphs.capture(on_device, host)
        return Direct(on_device, self._device)

    def _of_flow(self, dropped: tuple[str, ...], options: Options) -> Callable[[dict[str, Tensor]], Tensor]:
        num_steps = dict(options).get("num_steps", 10)
        unknown = [key for key, _ in options if key not in ("num_steps", "chunking")]
        if unknown or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"sampling options are {dict(options)}; expected num_steps, at least 1")
        flow_times = self._model.flow_times(num_steps)

        def run(tensors: dict[str, Tensor]) -> Tensor:
            observation = self._model.preprocess(observation_of(tensors, dropped))
            rows = _below(tensors, "continued/")
            continued = Continued(**rows, config=dict(options)["chunking"]) if rows else None
            return self._model.sample(observation, tensors["noise"], flow_times, continued)

        return run

    def _of_tokens(self, dropped: tuple[str, ...], options: Options) -> Callable[[dict[str, Tensor]], Tensor]:
        kwargs = dict(options)
        if kwargs.get("grammar") is not None:
            kwargs["grammar"] = ActionGrammar(kwargs["grammar"], self._device)
        if kwargs.get("temperature"):
            kwargs["generator"] = torch.Generator(self._device)
        write = functools.partial(self._model.sample_actions, **kwargs)

        def run(tensors: dict[str, Tensor]) -> Tensor:
            if "generator" in kwargs:
                kwargs["generator"].manual_seed(int(tensors["seed"]))
            return write(observation_of(tensors, dropped))

        return run


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
    """Captures functions on a GPU. Its graphs are replayed one at a time, in any order. So they share a stream, with it
    the workspaces of libraries, and the memory for everything between their inputs and outputs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[dict[str, Tensor]], Tensor], example: dict[str, Tensor]) -> Graph:
        """A graph of `run`.

        Args:
            run: device tensors by name -> device tensor, with no other input; see `test_torch_sampler.py` for what a
                capture forbids.
            example: host tensors, as every call will have them.
        """
        captured = torch.cuda.CUDAGraph()
        with _one_capture_at_a_time, torch.cuda.device(self.device):  # captures are of the current device
            transfers = _Inputs(example, self.device)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for _ in range(_WARM_UP_RUNS):  # compiles, tunes, and opens libraries, none of which can be captured
                    run(transfers.on_device)
            # Of this thread only: others may go on to allocate memory meanwhile.
            how: Any = {"pool": self._pool, "stream": self.stream, "capture_error_mode": "thread_local"}
            with torch.cuda.graph(captured, **how):
                output = run(transfers.on_device)
        return Graph(captured, transfers, output, self.stream)


class _Inputs:
    """Tensors at fixed places on the host and on the device, in one buffer each, so that one transfer moves them all;
    the host's is pinned, so that the device fetches it.
    """

    def __init__(self, example: dict[str, Tensor], device: torch.device) -> None:
        self._staging = torch.empty(_num_bytes(example), dtype=torch.uint8, pin_memory=True)
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


def _num_bytes(example: Mapping[str, Tensor]) -> int:
    return sum(_aligned(value.numel() * value.element_size()) for value in example.values())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def host_tensors(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inputs as one flat dict; images stay uint8 for the transfer."""
    images = {f"image/{key}": image for key, image in inputs["image"].items()}
    masks = {f"image_mask/{key}": mask for key, mask in inputs["image_mask"].items() if mask is not None}
    texts = {key: inputs[key] for key in _TEXTS if inputs.get(key) is not None}
    continued = {f"continued/{key}": value for key, value in inputs.get("continued", {}).items()}
    arrays = {**images, **masks, "state": np.asarray(inputs["state"], np.float32), **texts, **continued}
    return {key: torch.as_tensor(np.require(value, requirements=["C", "W"])) for key, value in arrays.items()}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def observation_of(tensors: dict[str, Tensor], dropped: tuple[str, ...]) -> Observation:
    texts = {key: tensors[key] for key in _TEXTS if key in tensors}
    masks = _below(tensors, "image_mask/") | dict.fromkeys(dropped)
    return Observation.from_dict(
        {"image": _below(tensors, "image/"), "image_mask": masks, "state": tensors["state"], **texts}
    )
