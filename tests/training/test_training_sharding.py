"""One process with eight devices: any way to share batches and parameters gives the numbers of one device."""

import json
import sys
import textwrap

import numpy as np
import pytest

import forked
import paths
from training_processes import environment

RECIPE = f"{paths.SUPPORT / 'tiny_recipe.py'}:drawn"
WAYS = (1, 2, 8)
# f32 sums in another order.
TOLERANCE = 1e-4

# Trains on random data: on one of the devices, then for every number of devices that share the parameters.
PROGRAM = """
    import dataclasses, json, sys
    import jax
    import numpy as np
    from openpi.models.activations import keep_rows, split_by_rows
    from openpi.training import data_loader, sharding
    from openpi.training.backends.jax import step as step_jax
    from openpi.training.config import FakeDataConfig, get_config

    sharding.MIN_SHARDED_BYTES = 0
    config = dataclasses.replace(get_config(sys.argv[1]), data=FakeDataConfig(), batch_size=16)
    init_key, train_key = jax.random.split(jax.random.key(0))
    alone = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), sharding.DATA_AXIS)
    start = jax.device_get(step_jax.create_state(config, init_key, alone))
    meshes = {"alone": alone, **{ways: sharding.make_mesh(int(ways)) for ways in sys.argv[2:]}}
    found = {}
    for name, mesh in meshes.items():
        places = jax.tree.map(lambda leaf: leaf.sharding, step_jax.state_spec(config, mesh))
        state = jax.device_put(start, places)
        step = step_jax.compile_train_step(config, mesh)
        losses, norms = [], []
        for _, batch in zip(range(3), data_loader.create_batch_loader(config)):
            state, metrics = step(train_key, state, step_jax.place_batch(batch, mesh))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
        held = lambda tree: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
        whole = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        shares = {name: held(tree) / whole(tree) for name, tree in parts.items()}
        found[name] = {"loss": losses, "grad_norm": norms, "held": shares}
    with split_by_rows(sharding.data_sharding(meshes["8"])):
        kept = [jax.jit(keep_rows)(np.zeros((rows, 5))) for rows in (16, 12)]
    found["rows held"] = [array.addressable_shards[0].data.shape[0] for array in kept]
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict:
    done = forked.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), RECIPE, *map(str, WAYS)],
        env=environment(devices=8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("ways", WAYS)
def test_eight_devices_compute_what_one_does(found, ways):
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[str(ways)][name], found["alone"][name], rtol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("ways", WAYS)
def test_parameters_optimiser_and_average_are_shared_equally(found, ways):
    """But for vectors, which are not split."""
    held = found[str(ways)]["held"]
    for part in ("params", "opt_state", "ema_params"):
        assert 1 / ways <= held[part] < 1 / ways + 0.1, part
    assert held["step"] == 1


def test_activations_are_split_by_rows_where_the_devices_can_share_them_equally(found):
    assert found["rows held"] == [16 / 8, 12]
