"""A training script: a loop of one's own over the published functions, with a mesh, averages and checkpoints."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import optax

import openpi.shared.array_typing as at
import openpi.training.checkpoints as _checkpoints
import openpi.training.data_loader as _data_loader
import openpi.training.optimizer as _optimizer
import openpi.training.sharding as sharding
import openpi.training.utils as training_utils
import their_config


@at.typecheck
def train_step(
    config, tx, rng: at.KeyArrayLike, state: training_utils.TrainState, batch
) -> tuple[training_utils.TrainState, dict[str, at.Array]]:
    observation, actions = batch
    observation = sharding.activation_sharding_constraint(observation)

    def loss_fn(params: at.Params) -> at.Float[at.Array, ""]:
        model = config.model.load(params)
        return jnp.mean(model.compute_loss(jax.random.fold_in(rng, state.step), observation, actions, train=True))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), {"loss": loss}


def main(checkpoint_dir: str, resume: bool) -> None:
    config = their_config.get_config("pi0_arm")
    mesh = sharding.make_mesh(config.fsdp_devices)
    data_sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.DATA_AXIS))
    replicated_sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    manager, resuming = _checkpoints.initialize_checkpoint_dir(
        checkpoint_dir, keep_period=None, overwrite=False, resume=resume
    )
    loader = _data_loader.create_data_loader(config, sharding=data_sharding, shuffle=True)
    batches = iter(loader)
    batch = next(batches)
    print(f"Initialized data loader:\n{training_utils.array_tree_to_info(batch)}")

    params_shape = jax.eval_shape(config.model.create, jax.random.key(config.seed)).params
    params = config.weight_loader.load(params_shape)
    at.check_pytree_equality(expected=params_shape, got=params, check_shapes=True, check_dtypes=True)
    tx = _optimizer.create_optimizer(config.optimizer, config.lr_schedule, weight_decay_mask=None)
    state = training_utils.TrainState(
        step=0, params=params, tx=tx, opt_state=tx.init(params), ema_decay=config.ema_decay, ema_params=None
    )
    state = jax.device_put(state, sharding.fsdp_sharding(jax.eval_shape(lambda: state), mesh))
    if resuming:
        state = _checkpoints.restore_state(manager, state, loader)

    step = jax.jit(
        functools.partial(train_step, config, tx),
        in_shardings=(replicated_sharding, None, data_sharding),
        donate_argnums=(1,),
    )
    for _ in range(config.num_train_steps):
        with sharding.set_mesh(mesh):
            state, info = step(jax.random.key(0), state, batch)
        print(f"Step {int(state.step)}: loss={float(info['loss']):.4f}")
        batch = next(batches)
    _checkpoints.save_state(manager, state, loader, int(state.step))
    manager.wait_until_finished()
    manager.close()


if __name__ == "__main__":
    main(sys.argv[1], resume="--resume" in sys.argv)
