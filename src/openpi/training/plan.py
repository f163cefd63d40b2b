"""`openpi train --plan`: what a recipe needs of each device's memory, and what its alternatives would.

From shapes alone: the train step of the real model is traced, nothing is computed, no weights and no data are read.
Parameters, gradients, optimiser state and average are exact; activations are an estimate (`liveness`), for batches in
which every camera and every prompt token is used.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from openpi.models.gemma_config import VARIANTS
from openpi.shared.tree import flatten
from openpi.training import liveness, sharding, step_jax
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
        activations: everything else that the step holds at its peak, and its batch.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    @property
    def fits(self) -> list[int]:
        """The cards, by their size in GiB, that hold it."""
        return [card for card in CARDS_GIB if self.total <= USABLE * card * GIB]


def predict(config: TrainConfig, num_devices: int = 1) -> Memory:
    """Memory of a recipe whose batch is spread over `num_devices`, of which `fsdp_devices` share the parameters.

    Raises:
        ValueError: the numbers of devices do not divide the batch, or one another.
    """
    local = _on_one_device(config, num_devices)
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(functools.partial(step_jax.init_state, local), key)
    observation, actions = local.model.inputs_spec(batch_size=local.batch_size)
    batch = {**observation.to_dict(), "actions": actions}
    program = jax.make_jaxpr(functools.partial(step_jax.train_step, local))(key, state, batch)

    size = _size_under_fsdp(state.params, config.fsdp_devices)
    trainable, _ = step_jax.split_params(state.params, config.freeze_filter)
    gradients = _total(trainable, size)
    peak = liveness.peak_bytes(program, size) + _gathered(state.params, config.fsdp_devices)
    return Memory(
        parameters=_total(state.params, size),
        gradients=gradients,
        optimizer=_total(state.opt_state, size),
        average=_total(state.ema_params, size),
        activations=max(peak - gradients, 0) + _total(batch, liveness.plain_size),
    )


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


def report(config: TrainConfig, num_devices: int) -> str:
    """The plan as a table, in GiB per device.

    Raises:
        ValueError: as of `predict`.
    """
    num_devices = max(num_devices, config.fsdp_devices)
    lines = [
        f"{config.name}: batch {config.batch_size} on {num_devices} device(s), GiB on each; predicted from shapes",
        "",
        _row("", *(field.name for field in dataclasses.fields(Memory)), "peak", "fits cards of (GB)"),
    ]
    for label, option in [("as it is", config), *alternatives(config)]:
        count = max(num_devices, option.fsdp_devices)
        try:
            memory = predict(option, count)
        except ValueError as error:
            if label == "as it is":
                raise
            lines.append(f"{label:<40} {error}")
            continue
        numbers = (f"{n / GIB:.1f}" for n in (*dataclasses.astuple(memory), memory.total))
        lines.append(_row(label, *numbers, " ".join(map(str, memory.fits)) or "none of these"))
    return "\n".join([*lines, "", _NOTES[config.backend]])


_NOTE = (
    "A card fits if nine tenths of it hold the peak. Activations are estimated, for all cameras and longest prompts.\n"
)
_NOTES = {
    "jax": _NOTE + "JAX takes three quarters of a card unless XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 or so is set.",
    "pytorch": _NOTE
    + "They are those of the JAX step; PyTorch's were not compared. What --pytorch-* options save is not counted.",
}


def _row(label: str, *columns: str) -> str:
    *numbers, cards = columns
    return f"{label:<40}" + "".join(f"{number:>12}" for number in numbers) + f"   {cards}"


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


def _size_under_fsdp(params: Any, num_fsdp_devices: int) -> liveness.Size:
    """Bytes on one device. Whatever has the shape of a parameter (gradients, moments) is split as the parameter is."""
    shapes = {tuple(leaf.shape) for leaf in jax.tree.leaves(params)}

    def size(aval: Any) -> int:
        shape = tuple(getattr(aval, "shape", ()))
        whole = liveness.plain_size(aval)
        if num_fsdp_devices == 1 or shape not in shapes:
            return whole
        is_split = sharding.FSDP_AXIS in tuple(sharding.fsdp_spec(shape, aval.dtype, num_fsdp_devices))
        return whole // num_fsdp_devices if is_split else whole

    return size


def _gathered(params: Any, num_fsdp_devices: int) -> int:
    """What FSDP brings together to compute with: one layer of the largest stack, and the largest array of no stack."""
    if num_fsdp_devices == 1:
        return 0
    layers: dict[str, int] = {}
    single = 0
    for path, leaf in flatten(params).items():
        stack = next((name for name in ("llm/layers", "encoderblock") if name in path), None)
        if stack is None:
            single = max(single, liveness.plain_size(leaf))
        else:
            layers[stack] = layers.get(stack, 0) + liveness.plain_size(leaf) // leaf.shape[0]
    return max(layers.values(), default=0) + single


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


def _with_model(config: TrainConfig, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def _total(tree: Any, size: Callable[[Any], int]) -> int:
    return sum(size(leaf) for leaf in jax.tree.leaves(tree))
