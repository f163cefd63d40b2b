"""A script with a module of its own: jitted by `module_jit`, its state mapped, saved and restored as the published
training script does.
"""

import dataclasses
import tempfile

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

import openpi.shared.array_typing as at
import openpi.shared.nnx_utils as nnx_utils
import openpi.training.checkpoints as _checkpoints
import openpi.training.data_loader as _data_loader
import openpi.training.utils as training_utils
import their_config


class Head(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.out = nnx.Linear(4, 3, rngs=rngs)

    @at.typecheck
    def __call__(self, x: at.Float[at.Array, "b d"]) -> at.Float[at.Array, "b h"]:
        return self.out(x)


@at.typecheck
@struct.dataclass
class Batch:
    x: at.Float[at.Array, "b d"]


head = Head(nnx.Rngs(0))
batch = Batch(x=jnp.ones((2, 4)))
forward = nnx_utils.module_jit(head.__call__)
np.testing.assert_allclose(forward(batch.x), head(batch.x), rtol=1e-6)
assert jax.tree.map(jnp.shape, batch).x == (2, 4)  # rebuilt with what is no array

graph, params = nnx.split(head)
half = nnx_utils.state_map(
    params, nnx.All(nnx.Param, nnx_utils.PathRegex(".*kernel")), lambda p: p.replace(p[...].astype(jnp.bfloat16))
)
assert [str(leaf.dtype) for leaf in jax.tree.leaves(half)] == ["float32", "bfloat16"]

tx = optax.adam(1e-3)
state = training_utils.TrainState(
    step=7, params=params, model_def=graph, tx=tx, opt_state=tx.init(params), ema_decay=None, ema_params=None
)
print(training_utils.array_tree_to_info(state.params))
loader = _data_loader.create_data_loader(their_config.get_config("pi0_arm"))
with tempfile.TemporaryDirectory() as folder:
    manager, resuming = _checkpoints.initialize_checkpoint_dir(folder, keep_period=None, overwrite=True, resume=False)
    _checkpoints.save_state(manager, state, loader, 7)
    manager.wait_until_finished()
    empty = dataclasses.replace(state, step=0, params=jax.tree.map(jnp.zeros_like, params))
    restored = _checkpoints.restore_state(manager, empty, loader)
at.check_pytree_equality(expected=state.params, got=restored.params, check_shapes=True, check_dtypes=True)
np.testing.assert_array_equal(nnx.merge(restored.model_def, restored.params)(batch.x), head(batch.x))
assert int(restored.step) == 7
print("modules: ok")
