"""One training step in JAX: state, loss, gradients, update, averaging. Pure functions of (config, state, batch, key).

Parameters are split by path: gradients and optimiser state exist for trainable leaves only; frozen leaves are kept in
bfloat16. The average (EMA) runs over all of them. Source: the training specification, section 10.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from openpi.models import compact
from openpi.models.activations import split_by_rows
from openpi.models.compact import Extent
from openpi.models.model import BaseModel, Observation
from openpi.models.observation import model_side
from openpi.shared.tree import flatten, unflatten
from openpi.training import sharding, weight_loaders
from openpi.training.backends.jax import processes as processes_jax
from openpi.training.backends.jax.step_config import StepConfig, once_per_recipe
from openpi.training.config import TrainConfig
from openpi.training.freeze import Filter, freeze_nothing
from openpi.training.optimizer import create_optimizer, is_kernel
from openpi.weights import on_device
from openpi.weights.blocks import Weights

logger = logging.getLogger(__name__)

Params = dict[str, Any]
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
Recipe = TrainConfig | StepConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
        step: int32 scalar, optimiser steps done.
        params: the published parameter tree; trainable leaves f32, frozen ones bf16.
        opt_state: of optax, over the trainable leaves.
        ema_params: running average of `params`, or None.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema_params: Params | None

    @property
    def inference_params(self) -> Params:
        """What is evaluated and served: the average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def split_params(params: Params, is_frozen: Filter) -> tuple[Params, Params]:
    """The trainable and the frozen part, as two trees."""
    flat = flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if not is_frozen(path)}
    frozen = {path: leaf for path, leaf in flat.items() if is_frozen(path)}
    return unflatten(trainable), unflatten(frozen)


def join_params(trainable: Params, frozen: Params) -> Params:
    """Inverse of `split_params`."""
    return unflatten(flatten(trainable) | flatten(frozen))


def init_state(config: Recipe, key: jax.Array, partial_params: Params | None = None) -> TrainState:
    """A fresh state; leaves of `partial_params` replace the random ones. Meant to run inside `jit`."""
    params = config.model.create(key).params
    if partial_params:
        loaded = {path: jnp.copy(leaf) for path, leaf in flatten(partial_params).items()}
        params = unflatten(flatten(params) | loaded)
    trainable, frozen = split_params(params, config.freeze_filter)
    params = join_params(trainable, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=_optimizer(config).init(trainable),
        # A copy: both trees are donated to the first step, and a buffer can be given away only once.
        ema_params=None if config.ema_decay is None else jax.tree.map(jnp.copy, params),
    )


@once_per_recipe
def state_spec(config: StepConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is computed."""
    spec = jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))
    shardings = sharding.fsdp_sharding(spec, mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), spec, shardings
    )


def create_state(config: TrainConfig, key: jax.Array, mesh: Mesh, weights: Weights | None = None) -> TrainState:
    """A fresh state on the devices; weights and errors as of `Backend.create_state`."""
    spec = state_spec(config, mesh)
    if weights is None:
        weights = weight_loaders.open_weights(config.start_weights, config.model.abstract_params())
    placed = on_device.read_like(weights, flatten(spec.params))
    init = processes_jax.in_step("the initialisation", _compiled_init(config, mesh))
    return init(key, unflatten(placed))


@once_per_recipe
def _compiled_init(config: StepConfig, mesh: Mesh) -> jax.stages.Wrapped:
    placement = _shardings(state_spec(config, mesh))
    return jax.jit(functools.partial(init_state, config), out_shardings=placement, donate_argnums=1)


def train_step(
    config: Recipe, key: jax.Array, state: TrainState, batch: Batch, *, extent: Extent | None = None
) -> tuple[TrainState, Metrics]:
    """One optimiser step.

    Args:
        key: of the run; the step's own is folded in.
        batch: model-side arrays with a leading batch axis, and `actions`.
        extent: what batches use as a rule: only that is computed, unless this one uses more. None = all of it.
    Returns:
        the next state, and f32 scalars: `loss`, `grad_norm` before clipping, `param_norm` of the kernels,
        `learning_rate`.
    """
    trainable, frozen = split_params(state.params, config.freeze_filter)
    step_key = jax.random.fold_in(key, state.step)
    if extent is None:
        loss, grads = loss_and_grads(config, step_key, trainable, frozen, batch)
    else:
        found = functools.partial(loss_and_grads, config, step_key, trainable, frozen)
        part = compact.cut(batch, extent)
        loss, grads = jax.lax.cond(_is_within(batch, extent), lambda: found(part), lambda: found(batch))
    updates, opt_state = _optimizer(config).update(grads, state.opt_state, trainable)
    trainable = cast(Params, optax.apply_updates(trainable, updates))
    params = join_params(trainable, frozen)
    metrics = {
        "loss": loss,
        "grad_norm": norm(grads),
        "param_norm": norm(_kernels(params)),
        "learning_rate": jnp.asarray(config.lr_schedule.create()(state.step), jnp.float32),
    }
    return TrainState(
        state.step + 1, params, opt_state, average(config.ema_decay, state.ema_params, params, config.freeze_filter)
    ), metrics


def eval_step(
    config: Recipe, key: jax.Array, params: Params, batch: Batch, *, extent: Extent | None = None
) -> jax.Array:
    """Mean loss of a batch without augmentation; noise and time come from `key`, so equal keys compare models.

    Args:
        extent: all that the batch uses (`used_extent`); None = not known.
    """
    observation, actions = _inputs(batch if extent is None else compact.cut(batch, extent))
    return jnp.mean(_model(config, params).compute_loss(key, observation, actions, train=False))


def sample_step(
    config: Recipe,
    key: jax.Array,
    params: Params,
    batch: Batch,
    *,
    extent: Extent | None = None,
    **sample_kwargs: object,
) -> jax.Array:
    """Action chunks f32[b ah ad] in the model's normalised space; of pi0-FAST, tokens f32[b m].

    Args:
        extent: as of `eval_step`.
    """
    observation, _ = _inputs(batch if extent is None else compact.cut(batch, extent))
    return _model(config, params).sample_actions(key, _without_answer(observation), **sample_kwargs)


def _without_answer(observation: Observation) -> Observation:
    """The prompt without the action tokens that training adds to it (pi0-FAST)."""
    if observation.token_loss_mask is None:
        return observation
    is_prompt = observation.tokenized_prompt_mask & ~observation.token_loss_mask
    ar_mask = jnp.zeros_like(observation.token_ar_mask)
    return dataclasses.replace(observation, tokenized_prompt_mask=is_prompt, token_ar_mask=ar_mask)


def compile_train_step(
    config: TrainConfig, mesh: Mesh
) -> Callable[[jax.Array, TrainState, Batch], tuple[TrainState, Metrics]]:
    """`train_step` jitted over the mesh; the given state's buffers are reused for the next one.

    Recipes that agree in `StepConfig` get the same function, with what it has compiled.

    Of many processes each sees its own samples only, but all have to run the same program. So what the first batch
    uses, over all of them, becomes the `extent`, and the program holds the whole computation too.
    """

    def compiled(extent: Extent | None) -> Callable[[jax.Array, TrainState, Batch], tuple[TrainState, Metrics]]:
        return processes_jax.in_step("the training step", _compiled_step(config, mesh, extent))

    if jax.process_count() == 1 or not config.model.skip_unused:
        return compiled(None)
    first: list[Any] = []

    def step(key: jax.Array, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if not first:
            extent = used_extent(batch, mesh)
            first.append(compiled(None if extent == compact.whole_extent(batch) else extent))
        return first[0](key, state, batch)

    return step


@once_per_recipe
def _compiled_step(config: StepConfig, mesh: Mesh, extent: Extent | None) -> jax.stages.Wrapped:
    placement = _shardings(state_spec(config, mesh))
    everywhere, by_rows = sharding.replicated(mesh), sharding.data_sharding(mesh)

    def step(key: jax.Array, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with split_by_rows(by_rows):
            return train_step(config, key, state, batch, extent=extent)

    return jax.jit(
        step,
        in_shardings=(everywhere, placement, by_rows),
        out_shardings=(placement, everywhere),
        donate_argnums=1,
    )


@once_per_recipe
def compile_eval_step(config: StepConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """`eval_step` jitted over the mesh."""
    function = functools.partial(eval_step, config)
    return jax.jit(function, static_argnames="extent", out_shardings=sharding.replicated(mesh))


@once_per_recipe
def compile_sample_step(config: StepConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """`sample_step` jitted over the mesh."""
    function = functools.partial(sample_step, config)
    return jax.jit(function, static_argnames=("extent", "grammar"), out_shardings=sharding.data_sharding(mesh))


def cut_batch(config: TrainConfig, batch: Batch) -> Batch:
    """What the model needs of a loader's batch, on the host; everything if there are other processes."""
    if jax.process_count() > 1 or not config.model.skip_unused:
        return batch
    extent = compact.used_extent(batch)
    if extent not in _seen_extents:
        _seen_extents.add(extent)
        cameras, tokens = ", ".join(extent.cameras), extent.prompt_len
        logger.info("a step for %s and prompts of %s tokens is compiled: batches use no more", cameras, tokens)
    return compact.cut(batch, extent)


_seen_extents: set[Extent] = set()  # for the log; JAX keeps the programs


def used_extent(batch: Batch, mesh: Mesh, *, reads_masked: bool = False) -> Extent:
    """`compact.used_extent` of a placed batch, the same on every process."""
    # Of one function JAX keeps what it has compiled, however often it is wrapped.
    summary = jax.jit(_mask_summary, static_argnames="reads_masked", out_shardings=sharding.replicated(mesh))
    summary = processes_jax.in_step("the extent", summary)
    found = jax.device_get(summary(batch, reads_masked=reads_masked))
    return compact.used_extent({**batch, **found}, reads_masked=reads_masked)


def _mask_summary(batch: Batch, *, reads_masked: bool) -> dict[str, object]:
    """All samples' masks as one."""
    found = {"image_mask": jax.tree.map(jnp.all if reads_masked else jnp.any, batch["image_mask"])}
    if "tokenized_prompt_mask" in batch:
        found["tokenized_prompt_mask"] = jnp.any(batch["tokenized_prompt_mask"], axis=0)
    return found


def _is_within(batch: Batch, extent: Extent) -> jax.Array:
    """Whether a batch uses nothing outside the extent."""
    outside = [jnp.any(mask) for key, mask in batch["image_mask"].items() if key not in extent.cameras]
    if extent.prompt_len is not None:
        outside.append(jnp.any(batch["tokenized_prompt_mask"][:, extent.prompt_len :]))
    return ~jnp.any(jnp.stack(outside)) if outside else jnp.bool_(True)


def place_batch(batch: Batch, mesh: Mesh) -> Params:
    """A loader's batch on the devices, without what the model does not take (texts, for example).

    Doubles become f32 and int64 becomes int32 on the host, before the transfer. In a run of several processes `batch`
    holds the rows of this one, and the result is the whole batch.
    """
    return sharding.place_rows(jax.tree.map(_narrow, model_side(batch)), mesh)


def _narrow(array: np.ndarray) -> np.ndarray:
    narrower = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
    return array.astype(narrower.get(array.dtype, array.dtype), copy=False)


def _shardings(spec: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf.sharding, spec)


def _optimizer(config: Recipe) -> optax.GradientTransformation:
    return create_optimizer(config.optimizer, config.lr_schedule)


def _model(config: Recipe, params: Params) -> BaseModel:
    return config.model.load(params, remove_extra_params=False)


def _inputs(batch: Batch) -> tuple[Observation, jax.Array]:
    """Images travel as uint8 and become floats here, on the device."""
    observation = {key: value for key, value in batch.items() if key != "actions"}
    return Observation.from_dict(observation), batch["actions"]


def loss_and_grads(
    config: Recipe, key: jax.Array, trainable: Params, frozen: Params, batch: Batch
) -> tuple[jax.Array, Params]:
    def loss(trainable: Params, key: jax.Array, part: Batch) -> jax.Array:
        observation, actions = _inputs(part)
        model = _model(config, join_params(trainable, frozen))
        return jnp.mean(model.compute_loss(key, observation, actions, train=True))

    parts = config.gradient_accumulation_steps
    if parts == 1:
        return jax.value_and_grad(loss)(trainable, key, batch)

    def add(total: object, keyed_part: tuple[jax.Array, Batch]) -> tuple[object, None]:
        found = jax.value_and_grad(loss)(trainable, *keyed_part)
        return jax.tree.map(jnp.add, total, found), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
    # Every part takes samples from all over the batch, so that each device keeps the samples it has.
    split = jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0), dict(batch))
    total, _ = jax.lax.scan(add, zero, (jax.random.split(key, parts), split))
    return jax.tree.map(lambda leaf: leaf / parts, total)


def average(decay: float | None, old: Params | None, new: Params, is_frozen: Filter = freeze_nothing) -> Params | None:
    """The running average one step on; None without one.

    Frozen weights are their own average. To compute it would change them: in bfloat16 a decayed value and its rest do
    not add up to the value.
    """
    if decay is None or old is None:
        return None
    trainable, frozen = split_params(new, is_frozen)
    before, _ = split_params(old, is_frozen)
    return join_params(jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, before, trainable), frozen)


def _kernels(params: Params) -> list[jax.Array]:
    return [leaf for path, leaf in flatten(params).items() if is_kernel(path, leaf.ndim)]


def norm(tree: object) -> jax.Array:
    """Euclidean norm over all leaves, accumulated in f32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))
