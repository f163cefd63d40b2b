"""`Backend` in PyTorch: the recipe's devices, parameters and random numbers around the functions of `step`."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from openpi.models import compact
from openpi.models.observation import model_side
from openpi.models_pytorch import compiling, loading
from openpi.models_pytorch.action_grammar import ActionGrammar
from openpi.models_pytorch.int8_rows import Int8Rows
from openpi.models_pytorch.model import fresh_parameters
from openpi.shared.tree import Params, unflatten
from openpi.training import weight_loaders
from openpi.training.backend import Batch
from openpi.training.backends.pytorch import adam_8bit as adam_8bit_pytorch
from openpi.training.backends.pytorch import optimizer as optimizer_pytorch
from openpi.training.backends.pytorch import parallel as parallel_pytorch
from openpi.training.backends.pytorch import processes as processes_pytorch
from openpi.training.backends.pytorch import state_files as state_files_pytorch
from openpi.training.backends.pytorch import step as step_pytorch
from openpi.training.backends.pytorch.step import Randomness, TrainState
from openpi.training.config import TrainConfig
from openpi.training.distributed import processes
from openpi.training.freeze import Filter
from openpi.training.optimizer import is_matrix
from openpi.weights import names, published_tree
from openpi.weights.blocks import Weights

logger = logging.getLogger(__name__)

# Indices, metadata, and the file system's own share.
_SIZE_MARGIN = 1.02
_NARROWER = {np.dtype(np.float64): np.float32}


@dataclasses.dataclass(frozen=True)
class _Spec:
    shape: tuple[int, ...]
    dtype: type = np.float32


class Placed(NamedTuple):
    """This process's rows of a batch on its device, with the random numbers of the step that takes them."""

    step: int
    rows: dict[str, Any]
    random: Randomness


class Metrics(Mapping[str, float]):
    """Numbers of a step on their way to the host. Reading one waits for that step, and for none begun since.

    Args:
        found: numbers, and tensors of one device.
    """

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._numbers = dict(found)
        tensors = {name: value.float() for name, value in found.items() if isinstance(value, Tensor)}
        values = torch.stack(list(tensors.values()))
        on_gpu = values.device.type == "cuda"
        self._coming = tuple(tensors)
        self._values = torch.empty(values.shape, pin_memory=on_gpu)
        self._values.copy_(values, non_blocking=on_gpu)
        self._sent = torch.cuda.Event(blocking=True) if on_gpu else None  # who waits leaves the core to the loader
        if self._sent is not None:
            self._sent.record()

    def wait(self) -> None:
        if self._sent is not None:
            self._sent.synchronize()
        # Pinned memory is given back; to get new would wait for the device.
        values, self._values = self._values.tolist(), torch.empty(0)
        self._numbers |= dict(zip(self._coming, values, strict=True))
        self._coming = ()

    def __getitem__(self, name: str) -> float:
        if self._coming:
            self.wait()
        return self._numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


class PyTorchBackend:
    """See `backend.Backend`. States are `step.TrainState`, placed batches `Placed`.

    Args:
        compile_backend: of `torch.compile`, where the recipe asks for it.
    """

    name = "pytorch"

    def __init__(self, config: TrainConfig, *, compile_backend: compiling.Backend = "inductor") -> None:
        self._config = config
        self._compile_backend: compiling.Backend = compile_backend
        has_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
        self._table = names.rows(config.model)
        self._vote = processes_pytorch.Vote()
        self._seen_extents: set[compact.Extent] = set()

    @property
    def num_devices(self) -> int:
        return processes.count()

    @property
    def device_kind(self) -> str:
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"

    @property
    def device_bytes(self) -> int | None:
        on_gpu = self._device.type == "cuda"
        return torch.cuda.get_device_properties(self._device).total_memory if on_gpu else None

    def check(self) -> None:
        config, count = self._config, processes.count()
        each = count * config.gradient_accumulation_steps
        if config.batch_size % each:
            raise ValueError(
                f"batch_size={config.batch_size} is not a multiple of {each}: {count} processes, each with "
                f"gradient_accumulation_steps={config.gradient_accumulation_steps} parts of equal size"
            )
        if config.fsdp_devices < 1 or count % config.fsdp_devices:
            raise ValueError(
                f"fsdp_devices={config.fsdp_devices} does not divide the {count} processes, one for each device; "
                f"choose one of {[n for n in range(1, count + 1) if count % n == 0]}, or start more with torchrun"
            )
        if config.cpu_devices != 1:
            raise ValueError(
                f"cpu_devices={config.cpu_devices} splits the processor for JAX; PyTorch uses all cores as it is. "
                "Set --cpu-devices=1"
            )
        if config.pytorch_free_gradients:
            _check_gradients_can_be_freed(config)
        if config.pytorch_frozen_bits == 8:
            _check_frozen_can_have_eight_bits(config, self._table)
        optimizer_pytorch.create(config.optimizer, {"": nn.Parameter(torch.zeros(1))}, lambda name: False)
        config.lr_schedule.create()

    def param_specs(self) -> Mapping[str, _Spec]:
        return {path: _Spec(shape) for path, shape in names.tree_shapes(self._config.model).items()}

    def required_bytes(self, is_left_out: Filter) -> int:
        total, bytes_of_weight = 0, 2 if self._config.pytorch_training_precision == "pure_bfloat16" else 4
        for row in self._table:
            if is_left_out(row.tree):
                continue
            size = math.prod(row.shape)
            if self._config.freeze_filter(row.tree):
                total += 2 * size
            else:
                has_average = self._config.ema_decay is not None
                is_coded = getattr(self._config.optimizer, "state_bits", 32) == 8
                moments = 2 * adam_8bit_pytorch.moment_bytes(row.shape) if is_coded else 8 * size
                total += bytes_of_weight * size + 4 * size * has_average + moments
        return int(total * _SIZE_MARGIN)

    def create_state(self, weights: Weights | None = None) -> TrainState:
        if weights is None:
            weights = weight_loaders.open_weights(self._config.start_weights, unflatten(dict(self.param_specs())))
        state = self.empty_state()
        params = state.params
        loaded = {row.released for rows in published_tree.loaded_rows(weights).values() for row in rows}
        for block in weights.blocks(loaded.__contains__):
            parallel_pytorch.assign(params[block.row.torch], loading.as_tensor(block.values), block.start)
        missing = {row.torch for row in self._table if row.released not in loaded}
        for name, tensor in fresh_parameters(loading.create(self._config.model), missing, self._config.seed):
            parallel_pytorch.assign(params[name], tensor)
        for name, average in (state.average or {}).items():
            average.copy_(params[name].detach())
        return state

    def empty_state(self) -> TrainState:
        """A state of the right shapes and dtypes, split over the devices, with any values."""
        config = self._config
        computes_in_f32 = config.pytorch_training_precision == "float32"
        model_config: Any = dataclasses.replace(config.model, **({"dtype": "float32"} if computes_in_f32 else {}))
        model = loading.create(model_config)
        is_frozen = {row.torch: config.freeze_filter(row.tree) for row in self._table}
        masters = torch.bfloat16 if config.pytorch_training_precision == "pure_bfloat16" else torch.float32
        for name, param in list(model.named_parameters()):
            if is_frozen[name] and config.pytorch_frozen_bits == 8 and param.ndim == 2:
                value = Int8Rows.empty(*param.shape, device=param.device)
            else:
                value = param.detach().to(torch.bfloat16 if is_frozen[name] else masters)
            loading.set_parameter(model, name, value, requires_grad=not is_frozen[name])
        parallel_pytorch.split(model, config.fsdp_devices, self._device)
        model.to_empty(device=self._device)
        if config.pytorch_compile:
            compiling.compile_blocks(model, backend=self._compile_backend)
        trees = {row.torch: row.tree for row in self._table}
        params = dict(model.named_parameters())
        trainable = {name: param for name, param in params.items() if param.requires_grad}

        def make(params: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
            return optimizer_pytorch.create(config.optimizer, params, lambda name: is_matrix(trees[name]))

        frees = config.pytorch_free_gradients
        optimizer = optimizer_pytorch.InBackward(trainable, make) if frees else make(trainable)
        optimizer_pytorch.allocate(optimizer)
        average = None
        if config.ema_decay is not None:
            # f32 also where the weights are not: a step of the average is smaller than bfloat16 can tell.
            average = {name: torch.empty_like(param, dtype=torch.float32) for name, param in trainable.items()}
        forward = parallel_pytorch.replicated(model, config.fsdp_devices, self._device)
        return TrainState(0, model, params, forward, optimizer, average)

    def restore_state(self, directory: Path) -> TrainState:
        state = self.empty_state()
        state_files_pytorch.restore(directory, self._config.model, state)
        return state

    def begin_write(self, directory: Path, state: TrainState, is_left_out: Filter) -> Callable[[], None]:
        return state_files_pytorch.begin_write(directory, self._table, state, is_left_out)

    def digests(self, state: TrainState, paths: Iterable[str]) -> dict[str, str]:
        return state_files_pytorch.digests(self._table, state.params, set(paths))

    def place(self, batch: Batch, step: int) -> Placed:
        cut = compact.cut(batch, self._extent(batch)) if self._config.model.skip_unused else batch
        count = len(batch["state"])
        random = step_pytorch.draw(self._config, step, count * processes.count())
        return Placed(step, self._rows(cut), self._of_rows(random, count))

    def local_rows(self, placed: Placed) -> Params:
        return step_pytorch.take_rows(placed.rows, lambda x: x.cpu().numpy())

    def train_step(self, state: TrainState, placed: Placed) -> tuple[TrainState, Metrics]:
        assert placed.step == state.step, f"the batch of step {placed.step} is given to step {state.step}"
        return state, Metrics(self._step(state, placed.rows, placed.random))

    def wait(self, metrics: Mapping[str, object]) -> None:
        assert isinstance(metrics, Metrics)
        metrics.wait()

    @torch.no_grad()
    def evaluate(
        self, state: TrainState, batch: Batch, index: int, **sample_options: object
    ) -> tuple[float, np.ndarray]:
        model, count = self._config.model, len(batch["state"])
        extent = compact.used_extent(batch, reads_masked=compact.reads_masked(model))
        cut = compact.cut(batch, extent) if model.skip_unused else batch
        rows = self._rows(cut)
        random = self._of_rows(step_pytorch.draw_for_validation(self._config, index, count * processes.count()), count)
        if sample_options.get("grammar") is not None:
            sample_options["grammar"] = ActionGrammar(sample_options["grammar"], self._device)
        with compiling.uncompiled(), step_pytorch.averaged(state) as averaged:
            averaged.eval()
            loss = step_pytorch.batch_loss(averaged, rows, random)
            parallel_pytorch.split_again(averaged)
            actions = step_pytorch.sample(state, rows, random, **sample_options)
        return float(processes_pytorch.mean_of_all(loss)), actions

    def vote(self, value: int) -> int:
        return self._vote(value)

    @functools.cached_property
    def _step(self) -> step_pytorch.Step:
        return step_pytorch.Step(self._config, self._table, self._device)

    def _extent(self, batch: Mapping[str, object]) -> compact.Extent:
        extent = compact.used_extent(batch)
        if extent not in self._seen_extents:
            self._seen_extents.add(extent)
            logger.info("batches of %s and prompts of %s tokens", ", ".join(extent.cameras), extent.prompt_len)
        return extent

    def _rows(self, batch: Mapping[str, object]) -> dict[str, object]:
        """What the model takes of this process's rows, on the device."""

        def moved(value: object) -> Tensor:
            array = np.ascontiguousarray(value)
            return self._moved(torch.from_numpy(array.astype(_NARROWER.get(array.dtype, array.dtype))))

        return step_pytorch.take_rows(model_side(batch), moved)

    def _of_rows(self, random: Randomness, count: int) -> Randomness:
        """Those of this process's rows, of the random numbers of the whole batch; on the device."""
        first = processes.index() * count
        return random.rows(lambda x: self._moved(x[first : first + count]))

    def _moved(self, tensor: Tensor) -> Tensor:
        """On the device. The host does not wait, and the copy comes before the steps that are launched later."""
        if self._device.type != "cuda":
            return tensor
        return tensor.contiguous().pin_memory().to(self._device, non_blocking=True)


def _check_gradients_can_be_freed(config: TrainConfig) -> None:
    wanted = {
        "optimizer.clip_gradient_norm": (optimizer_pytorch.clip_norm(config.optimizer), math.inf),
        "gradient_accumulation_steps": (config.gradient_accumulation_steps, 1),
        "processes": (processes.count(), 1),
    }
    for field, (found, expected) in wanted.items():
        if found != expected:
            raise ValueError(
                f"pytorch_free_gradients updates each weight before the other gradients are there, so {field} must be "
                f"{expected}; it is {found}. Change it, or leave pytorch_free_gradients out"
            )


def _check_frozen_can_have_eight_bits(config: TrainConfig, table: tuple[names.Row, ...]) -> None:
    if not any(config.freeze_filter(row.tree) for row in table):
        raise ValueError(
            "pytorch_frozen_bits=8 is for frozen weights, and this recipe freezes none; set its freeze_filter, as "
            "recipes with adapters do, or leave pytorch_frozen_bits out"
        )
    if config.fsdp_devices != 1:
        raise ValueError(
            f"pytorch_frozen_bits=8 keeps frozen weights whole on each device, and fsdp_devices={config.fsdp_devices} "
            "splits them; choose one of the two"
        )
    if not config.save_frozen_params:
        raise ValueError(
            "with pytorch_frozen_bits=8, adapters are trained beside rounded weights, which checkpoints have to hold; "
            "set save_frozen_params=True, or leave pytorch_frozen_bits out"
        )
