"""`Backend` in JAX: the recipe's mesh, keys and compiled programs around the functions of `step`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from openpi.models.compact import Extent, reads_masked
from openpi.shared.tree import Params, flatten
from openpi.training import sharding
from openpi.training.backends.jax import processes as processes_jax
from openpi.training.backends.jax import state_files
from openpi.training.backends.jax import step as step_jax
from openpi.training.backends.jax.step import Batch, Metrics, TrainState
from openpi.training.config import TrainConfig
from openpi.training.distributed import processes
from openpi.training.freeze import Filter
from openpi.weights.adapter_base import Digests
from openpi.weights.blocks import Weights

# Validations can be compared with each other, whatever the run's seed.
_EVAL_SEED = 0


class JaxBackend:
    """See `backend.Backend`. States are `step.TrainState`, placed batches dicts of global arrays."""

    name = "jax"

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._eval_extents: dict[int, Extent | None] = {}  # by the index of the batch

    @property
    def num_devices(self) -> int:
        return jax.device_count()

    @property
    def device_kind(self) -> str:
        return jax.devices()[0].device_kind

    @property
    def device_bytes(self) -> int | None:
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")

    def check(self) -> None:
        for field in ("pytorch_compile", "pytorch_free_gradients"):
            if getattr(self._config, field):
                raise ValueError(f"{field} is set, which backend=jax has not; add --backend=pytorch, or leave it out")
        if self._config.pytorch_training_precision == "pure_bfloat16":
            raise ValueError("pytorch_training_precision=pure_bfloat16 is of backend=pytorch; add it, or leave it out")
        if self._config.pytorch_frozen_bits != 16:
            raise ValueError("pytorch_frozen_bits=8 is of backend=pytorch; add it, or leave it out")
        if self._config.batch_size % self.num_devices:
            raise ValueError(
                f"batch_size={self._config.batch_size} is not a multiple of the {self.num_devices} devices (of "
                f"{processes.count()} processes); every device takes an equal share"
            )
        self._config.lr_schedule.create()
        self._mesh  # noqa: B018  # raises unless the devices fit

    def param_specs(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return self._param_specs

    def required_bytes(self, is_left_out: Filter) -> int:
        return state_files.required_bytes(self._spec, is_left_out=is_left_out)

    def create_state(self, weights: Weights | None = None) -> TrainState:
        init_key, _ = self._keys
        return step_jax.create_state(self._config, init_key, self._mesh, weights)

    def restore_state(self, directory: Path) -> TrainState:
        if not (directory / state_files.PARAMS).is_dir():
            raise ValueError(
                f"{directory} was not written by backend=jax; continue the run with --backend=pytorch, or start "
                "another from its weights (weight_loader)"
            )
        return state_files.restore_state(directory, self._spec)

    def begin_write(self, directory: Path, state: TrainState, is_left_out: Filter) -> Callable[[], None]:
        return state_files.begin_write(directory, state, is_left_out=is_left_out)

    def digests(self, state: TrainState, paths: Iterable[str]) -> dict[str, str]:
        params = flatten(state.params)
        digests = Digests({path: leaf.shape for path, leaf in params.items()})
        return {path: digests.add(path, sharding.sliceable(params[path])) or "" for path in paths}

    def place(self, batch: Batch, step: int) -> Batch:
        del step  # the devices draw their random numbers
        return step_jax.place_batch(step_jax.cut_batch(self._config, batch), self._mesh)

    def local_rows(self, placed: Batch) -> Params:
        return sharding.local_rows(placed)

    def train_step(self, state: TrainState, placed: Batch) -> tuple[TrainState, Metrics]:
        _, train_key = self._keys
        return self._train_step(train_key, state, placed)

    def wait(self, metrics: Mapping[str, object]) -> None:
        jax.block_until_ready(metrics)

    def evaluate(
        self, state: TrainState, batch: Batch, index: int, **sample_options: object
    ) -> tuple[float, np.ndarray]:
        key = jax.random.fold_in(jax.random.key(_EVAL_SEED), index)
        placed = step_jax.place_batch(batch, self._mesh)
        if index not in self._eval_extents:
            self._eval_extents[index] = self._extent(placed)
        extent, params = self._eval_extents[index], state.inference_params
        loss = float(self._eval_step(key, params, placed, extent=extent))
        return loss, sharding.local_rows(self._sample_step(key, params, placed, extent=extent, **sample_options))

    def vote(self, value: int) -> int:
        return self._vote(value)

    @functools.cached_property
    def _param_specs(self) -> dict[str, jax.ShapeDtypeStruct]:
        return flatten(self._config.model.abstract_params())

    @functools.cached_property
    def _mesh(self) -> Mesh:
        return sharding.make_mesh(self._config.fsdp_devices)

    @functools.cached_property
    def _keys(self) -> tuple[jax.Array, jax.Array]:
        """Of the initialisation, and of training."""
        init_key, train_key = jax.random.split(jax.random.key(self._config.seed))
        return init_key, train_key

    @functools.cached_property
    def _spec(self) -> TrainState:
        return step_jax.state_spec(self._config, self._mesh)

    @functools.cached_property
    def _train_step(self) -> Callable[[jax.Array, TrainState, Batch], tuple[TrainState, step_jax.Metrics]]:
        return step_jax.compile_train_step(self._config, self._mesh)

    @functools.cached_property
    def _eval_step(self) -> Callable[..., jax.Array]:
        return processes_jax.in_step("the validation loss", step_jax.compile_eval_step(self._config, self._mesh))

    @functools.cached_property
    def _sample_step(self) -> Callable[..., jax.Array]:
        return processes_jax.in_step("sampling", step_jax.compile_sample_step(self._config, self._mesh))

    @functools.cached_property
    def _vote(self) -> processes_jax.Vote:
        return processes_jax.Vote(self._mesh)

    def _extent(self, placed: Batch) -> Extent | None:
        """All that a validation batch uses, of loss and sampling."""
        model = self._config.model
        if not model.skip_unused:
            return None
        return step_jax.used_extent(placed, self._mesh, reads_masked=reads_masked(model))
