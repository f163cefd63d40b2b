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
from openpi.models_pytorch import compiling, fp8
from openpi.models_pytorch.action_grammar import ActionGrammar
from openpi.models_pytorch.fp8_file import Calibration
from openpi.models_pytorch.model import Observation
from openpi.models_pytorch.rtc import Continued
from openpi.policies.graphs_pytorch import Direct, Graph, Graphs
from openpi.policies.program import Extents, Options, Program, check_finite
from openpi.shared.tree import Tree

logger = logging.getLogger(__name__)

# Modes of the configuration that bring CUDA graphs of their own; here the whole sampler is one graph.
_WITHOUT_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}
_MAX_PROGRAMS = 32  # kinds of inputs that a sampler keeps something for
_TEXTS = ("tokenized_prompt", "tokenized_prompt_mask", "token_ar_mask")


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
    sequence, on any device. Calls must not overlap: the caller (a server) runs one at a time; with graphs another
    thread may `warm_up` meanwhile, for another batch size. Samplers of one device may run side by side.

    Args:
        model: with its parameters; they are fused in place, which makes it one for inference only.
        device: see `resolve_device`.
        compile_mode: of `torch.compile`; None = not compiled.
        compile_backend: of `torch.compile`.
        uses_graphs: capture CUDA graphs; None = on a GPU.
        calibration: what is made in FP8; None = nothing.
    Attributes:
        compiles: each batch size anew.
        warms_up_beside: another batch size, while another thread samples.
    Raises:
        ValueError: there is no such device; it knows no FP8, or the calibration is that of other weights.
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
        calibration: Calibration | None = None,
    ) -> None:
        self._device = resolve_device(device)
        self.model: Any = model.to(self._device).eval().requires_grad_(False)
        _fuse(model)
        if calibration is not None:
            fp8.check_device(self._device)
            fp8.quantize(self.model, calibration.chosen())
        config = self.model.config
        self.takes_noise: bool = self.model.takes_noise
        if self.takes_noise and compile_mode is not None:
            self._compile(_WITHOUT_GRAPHS.get(compile_mode, compile_mode), compile_backend)
        on_gpu = self._device.type == "cuda"
        uses_graphs = (on_gpu if uses_graphs is None else uses_graphs) and self.takes_noise
        self._has_programs = self.takes_noise and (uses_graphs or compile_mode is not None)
        self.compiles = self._has_programs
        self.warms_up_beside = uses_graphs  # what is replayed meets neither the compiler nor the allocator
        self._generator = torch.Generator().manual_seed(seed)
        self._graphs = Graphs(self._device) if uses_graphs else None
        self._extents = Extents(config)
        self._programs = _Programs()
        self._one_call_at_a_time = threading.Lock()
        self.action_horizon: int = config.action_horizon
        self.action_dim: int = config.action_dim

    def _compile(self, mode: str, backend: compiling.Backend) -> None:
        """In place, part by part: all Euler steps are one program."""
        for name in self.model.sampled_by:
            part = compiling.compiled(getattr(self.model, name), mode=mode, backend=backend)
            setattr(self.model, name, part)

    def sample(self, inputs: Mapping[str, object], noise: np.ndarray | None, **sample_kwargs: object) -> np.ndarray:
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
        return self._call(self.program(inputs, noise, **sample_kwargs))

    def program(self, inputs: Mapping[str, object], noise: np.ndarray | None, **sample_kwargs: object) -> Program:
        """What `sample` does with these arguments, part by part."""
        options = tuple(sorted(sample_kwargs.items()))
        find = self._extents.choose if self._has_programs else self._extents.used
        return self._program(compact.cut(inputs, find(inputs, options)), noise, options, self._generator)

    def warm_up(self, inputs: Mapping[str, object], **sample_kwargs: object) -> None:
        """Compiles and captures `sample` for inputs like these (`Extents.make_ready`); the sequence of noise stays
        where it is.
        """
        options = tuple(sorted(sample_kwargs.items()))
        extents = self._extents.make_ready(inputs, options)
        if self._device.type == "cpu" and not self._has_programs:  # every size runs as it is: one shows that it does
            extents = extents[-1:]
        for extent in extents:
            program = self._program(compact.cut(inputs, extent), None, options, torch.Generator().manual_seed(0))
            check_finite(self._call(program))

    def _call(self, program: Program) -> np.ndarray:
        with self._one_call_at_a_time:
            return program()

    @torch.no_grad()
    def _program(self, inputs: Tree, noise: np.ndarray | None, options: Options, generator: torch.Generator) -> Program:
        host = host_tensors(inputs)
        if self.takes_noise:
            shape = (len(inputs["state"]), self.action_horizon, self.action_dim)
            drawn = torch.randn(shape, generator=generator) if noise is None else torch.as_tensor(noise)
            host["noise"] = drawn.float()
        elif dict(options).get("temperature"):
            host["seed"] = torch.randint(2**62, (1,), generator=generator)
        dropped = tuple(key for key, mask in inputs["image_mask"].items() if mask is None)
        signature = (options, dropped, *((key, tuple(value.shape), value.dtype) for key, value in host.items()))
        program = self._programs.find(signature) or self._programs.add(signature, self._made(host, dropped, options))
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
        flow_times = self.model.flow_times(num_steps)

        def run(tensors: dict[str, Tensor]) -> Tensor:
            observation = self.model.preprocess(observation_of(tensors, dropped))
            rows = _below(tensors, "continued/")
            continued = Continued(**rows, config=dict(options)["chunking"]) if rows else None
            return self.model.sample(observation, tensors["noise"], flow_times, continued)

        return run

    def _of_tokens(self, dropped: tuple[str, ...], options: Options) -> Callable[[dict[str, Tensor]], Tensor]:
        kwargs = dict(options)
        if kwargs.get("grammar") is not None:
            kwargs["grammar"] = ActionGrammar(kwargs["grammar"], self._device)
        if kwargs.get("temperature"):
            kwargs["generator"] = torch.Generator(self._device)
        write = functools.partial(self.model.sample_actions, **kwargs)

        def run(tensors: dict[str, Tensor]) -> Tensor:
            if "generator" in kwargs:
                kwargs["generator"].manual_seed(int(tensors["seed"]))
            return write(observation_of(tensors, dropped))

        return run


def _fuse(model: nn.Module) -> None:
    """In place, with the weights of one module in memory twice."""
    # Not a list of all modules: it would keep what each of them gives up, half of a model, until the last one is done.
    parts: list[Any] = [module for module in model.modules() if hasattr(module, "fuse")]
    for part in parts:
        part.fuse()


class _Programs:
    """What was made for the kinds of inputs that came last, at most `_MAX_PROGRAMS`; used by several threads."""

    def __init__(self) -> None:
        self._found: dict[Any, Direct | Graph] = {}  # the last one used comes last
        self._lock = threading.Lock()

    def find(self, signature: object) -> Direct | Graph | None:
        with self._lock:
            program = self._found.pop(signature, None)
            if program is not None:
                self._found[signature] = program
            return program

    def add(self, signature: object, program: Direct | Graph) -> Direct | Graph:
        with self._lock:
            if len(self._found) >= _MAX_PROGRAMS:
                logger.warning("inputs of more than %d kinds: that used longest ago is forgotten", _MAX_PROGRAMS)
                del self._found[next(iter(self._found))]
            self._found[signature] = program
            return program

    def signatures(self) -> list[object]:
        return list(self._found)


def host_tensors(inputs: Tree) -> dict[str, Tensor]:
    """The inputs as one flat dict; images stay uint8 for the transfer."""
    images = {f"image/{key}": image for key, image in inputs["image"].items()}
    masks = {f"image_mask/{key}": mask for key, mask in inputs["image_mask"].items() if mask is not None}
    texts = {key: inputs[key] for key in _TEXTS if inputs.get(key) is not None}
    continued = {f"continued/{key}": value for key, value in inputs.get("continued", {}).items()}
    arrays = {**images, **masks, "state": np.asarray(inputs["state"], np.float32), **texts, **continued}
    return {key: torch.as_tensor(np.require(value, requirements=["C", "W"])) for key, value in arrays.items()}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def observation_of(tensors: dict[str, Tensor], dropped: tuple[str, ...]) -> Observation:
    texts = {key: tensors[key] for key in _TEXTS if key in tensors}
    masks = {**_below(tensors, "image_mask/"), **dict.fromkeys(dropped)}
    return Observation.from_dict(
        {"image": _below(tensors, "image/"), "image_mask": masks, "state": tensors["state"], **texts}
    )
