"""`openpi train --plan`: what a recipe needs of each device's memory, and what its alternatives would.

Parameters, gradients, optimizer state and average are exact, from shapes alone. Activations are what the compiler of a
GPU or TPU of this machine allocates for the train step, for batches in which every camera and every prompt token is
used; without such a device they are left out, and the sum is "at least". No weights and no data are read. Decision:
`docs/decisions/0028`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from openpi.models.gemma_config import VARIANTS
from openpi.shared.errors import first_line
from openpi.training import sharding
from openpi.training.backends.jax import step as step_jax
from openpi.training.config import TrainConfig
from openpi.training.optimizer import AdamW

GIB = 2**30
CARDS_GIB = (24, 32, 48, 80, 141)
# Of a card, what is left for arrays: the driver, the compiler's scratch space and fragmentation take the rest.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device at the fullest moment of a train step.

    Attributes:
        parameters: trainable ones in f32, frozen ones in bf16.
        activations: everything else that the step holds at its peak, and its batch; None = not known.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int | None = None

    @property
    def total(self) -> int:
        """At least, where the activations are not known."""
        return self.parameters + self.gradients + self.optimizer + self.average + (self.activations or 0)

    @property
    def fits(self) -> list[int]:
        """The cards, by their size in GiB, that hold it."""
        return [card for card in CARDS_GIB if self.total <= USABLE * card * GIB]


def count_state(config: TrainConfig, num_devices: int = 1) -> Memory:
    """What is known from shapes, of a recipe whose batch is spread over `num_devices`, of which `fsdp_devices` share
    the parameters.

    Raises:
        ValueError: the numbers of devices do not divide the batch, or one another.
    """
    state, _ = _shapes(_on_one_device(config, num_devices))
    size = _size_under_fsdp(state.params, config.fsdp_devices)
    trainable, _ = step_jax.split_params(state.params, config.freeze_filter)
    return Memory(
        parameters=_total(state.params, size),
        gradients=_total(trainable, size),
        optimizer=_total(state.opt_state, size),
        average=_total(state.ema_params, size),
    )


def ask_compiler(config: TrainConfig) -> Memory:
    """The same with activations: the step is compiled for JAX's default device, and not run. Takes minutes.

    Args:
        config: for one device.
    Raises:
        ValueError: as of `count_state`.
        jax.errors.JaxRuntimeError: the device has no room to compile.
    """
    known = count_state(config)
    state, batch = _shapes(config)
    step = jax.jit(functools.partial(step_jax.train_step, config), donate_argnums=1)
    found = step.lower(jax.eval_shape(jax.random.key, 0), state, batch).compile().memory_analysis()
    assert found is not None
    # What comes out lies where the state was, but for the metrics.
    peak = found.argument_size_in_bytes + found.temp_size_in_bytes
    peak += found.output_size_in_bytes - found.alias_size_in_bytes
    return dataclasses.replace(known, activations=max(peak - known.total, 0))


def alternatives(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Recipes that differ in one thing that changes memory, with the flags or fields that make them."""
    chosen = getattr(config.model, "remat", None)
    for remat in ("full", "dots", "none"):
        if chosen not in (None, remat):
            yield f"--model.remat={remat}", _with_model(config, remat=remat)
    for parts in (2, 4, 8):
        if parts > config.gradient_accumulation_steps and config.batch_size % parts == 0:
            flag = f"--gradient-accumulation-steps={parts}"
            yield flag, dataclasses.replace(config, gradient_accumulation_steps=parts)
    optimizer = config.optimizer
    if isinstance(optimizer, AdamW) and optimizer.state_bits == 32:
        small = dataclasses.replace(optimizer, state_bits=8)
        yield "--optimizer.state-bits=8", dataclasses.replace(config, optimizer=small)
    if config.ema_decay is not None:
        yield "--ema-decay=None", dataclasses.replace(config, ema_decay=None)
    adapted = _with_adapters(config)
    if adapted is not None:
        yield "LoRA variants, freeze_filter, no EMA", adapted
    for count in (2, 4, 8):
        if count > config.fsdp_devices and config.batch_size % count == 0:
            yield f"--fsdp-devices={count}", dataclasses.replace(config, fsdp_devices=count)


def report(config: TrainConfig, num_devices: int) -> Iterator[str]:
    """The plan as a table, in GiB per device, line by line: with a device, each takes a while.

    Raises:
        ValueError: as of `count_state`.
    """
    num_devices = max(num_devices, config.fsdp_devices)
    as_it_is = count_state(config, num_devices)
    device = jax.devices()[0]
    is_known = device.platform != "cpu"
    asked = f"compiled for {device.device_kind}" if is_known else "at least: no GPU here to compile for"
    yield f"{config.name}: batch {config.batch_size} on {num_devices} device(s), GiB on each; {asked}\n"
    yield _columns("", *(field.name for field in dataclasses.fields(Memory)), "peak", "fits cards of (GB)")
    yield _row("as it is", _asked(config, as_it_is, num_devices) if is_known else as_it_is)
    for label, option in alternatives(config):
        count = max(num_devices, option.fsdp_devices)
        try:
            memory = count_state(option, count)
            if is_known or memory.total < as_it_is.total:  # without a device, others look alike
                yield _row(label, _asked(option, memory, count) if is_known else memory)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            yield f"{label:<40} {first_line(error)}"
    yield f"\n{_NOTES[is_known]}"


def _asked(config: TrainConfig, known: Memory, num_devices: int) -> Memory:
    return ask_compiler(config) if num_devices == 1 else known


_NOTES = {
    True: "A card fits if nine tenths of it hold the peak, for all cameras and longest prompts; '>': compiled for one "
    "device only.\nJAX takes three quarters of a card unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 or so is set. "
    "PyTorch's activations are others, and what --pytorch-* options save is not counted.",
    False: "Activations come on top, and on a machine with a GPU the compiler tells them: a card that is missing here "
    "does not fit, one that is listed may not.\nThey shrink with --gradient-accumulation-steps, --model.remat=full and "
    "the batch.",
}


def _row(label: str, memory: Memory) -> str:
    parts = [getattr(memory, field.name) for field in dataclasses.fields(Memory)]
    columns = ["?" if part is None else f"{part / GIB:.1f}" for part in (*parts, memory.total)]
    columns[-1] = f">{columns[-1]}" if memory.activations is None else columns[-1]
    return _columns(label, *columns, " ".join(map(str, memory.fits)) or "none of these")


def _columns(label: str, *columns: str) -> str:
    *numbers, cards = columns
    return f"{label:<40}" + "".join(f"{number:>12}" for number in numbers) + f"   {cards}"


def _shapes(config: TrainConfig) -> tuple[step_jax.TrainState, dict[str, object]]:
    """State and batch as `jax.ShapeDtypeStruct`s."""
    state = jax.eval_shape(functools.partial(step_jax.init_state, config), jax.eval_shape(jax.random.key, 0))
    observation, actions = config.model.inputs_spec(batch_size=config.batch_size)
    return state, {**observation.to_dict(), "actions": actions}


def _on_one_device(config: TrainConfig, num_devices: int) -> TrainConfig:
    """The recipe with one device's share of the batch."""
    if num_devices % config.fsdp_devices:
        raise ValueError(f"fsdp_devices={config.fsdp_devices} does not divide {num_devices} devices")
    share, rest = divmod(config.batch_size, num_devices)
    if rest or share % config.gradient_accumulation_steps:
        raise ValueError(
            f"batch_size={config.batch_size} does not split into {num_devices} devices times "
            f"{config.gradient_accumulation_steps} accumulation steps"
        )
    return dataclasses.replace(config, batch_size=share)


def _size_under_fsdp(params: object, num_fsdp_devices: int) -> Callable[[object], int]:
    """Bytes on one device. Whatever has the shape of a parameter (gradients, moments) is split as the parameter is."""
    shapes = {tuple(leaf.shape) for leaf in jax.tree.leaves(params)}

    def size(aval: Any) -> int:
        shape = tuple(aval.shape)
        whole = math.prod(shape) * aval.dtype.itemsize
        if num_fsdp_devices == 1 or shape not in shapes:
            return whole
        is_split = sharding.FSDP_AXIS in tuple(sharding.fsdp_spec(shape, aval.dtype, num_fsdp_devices))
        return whole // num_fsdp_devices if is_split else whole

    return size


def _with_adapters(config: TrainConfig) -> TrainConfig | None:
    """The recipe with LoRA in every expert that has a registered variant for it; None = none has, or all do."""
    changes = {}
    for field in ("paligemma_variant", "action_expert_variant"):
        variant = getattr(config.model, field, None)
        if isinstance(variant, str) and f"{variant}_lora" in VARIANTS:
            changes[field] = f"{variant}_lora"
    if not changes:
        return None
    adapted = _with_model(config, **changes)
    return dataclasses.replace(adapted, freeze_filter=adapted.model.get_freeze_filter(), ema_decay=None)


def _with_model(config: TrainConfig, **changes: object) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def _total(tree: object, size: Callable[[object], int]) -> int:
    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
