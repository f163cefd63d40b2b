"""Checkpoints are complete or absent: round trips, the published layout, what is kept, and sudden deaths."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forked
import paths
import weight_layouts
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.models.gemma_config import GemmaConfig
from openpi.models.pi0_config import Pi0Config
from openpi.models.siglip_config import SiglipConfig
from openpi.shared.tree import flatten
from openpi.training import sharding
from openpi.training.backends.jax import state_files
from openpi.training.backends.jax import step as step_jax
from openpi.training.backends.jax.state_files import restore_state
from openpi.training.checkpoints import Checkpoints, best_step, complete_steps
from openpi.training.config import TrainConfig, get_config
from openpi.training.freeze import PathRegex
from openpi.weights import orbax_io
from openpi.weights.adapter_base import AdapterBase

RECIPE = f"{paths.SUPPORT / 'tiny_recipe.py'}:tiny"

# Shared by the child processes below: a checkpoint directory around a state of three small arrays.
CHILD = """
    import os, shutil, signal, sys
    from pathlib import Path
    import jax.numpy as jnp
    import numpy as np
    from openpi.training import checkpoints
    from openpi.training.backends.jax import state_files
    from openpi.training.backends.jax.step import TrainState
    from openpi.weights import orbax_io

    def state(value, size=2000):
        params = {"w": jnp.full(size, value)}
        return TrainState(jnp.asarray(int(value), jnp.int32), params, {"mu": {"w": jnp.full(size, -value)}}, None)

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    run = checkpoints.Checkpoints(sys.argv[1])
    def save(step, value=None, write_extras=lambda folder: None):
        value = state(float(step)) if value is None else value
        begin_write = lambda folder: state_files.begin_write(folder, value)
        run.save(step, begin_write, required_bytes=state_files.required_bytes(value), write_extras=write_extras)

    save(1)
    run.wait()
"""


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return get_config(RECIPE)


@pytest.fixture(scope="module")
def state(config) -> step_jax.TrainState:
    return _state(config)


def _state(config: TrainConfig) -> step_jax.TrainState:
    """Random numbers in the shapes of the recipe, so that no two trees of it are equal."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 9, leaf.dtype), _spec(config))


def _spec(config: TrainConfig) -> step_jax.TrainState:
    return step_jax.state_spec(config, sharding.make_mesh(1))


def _nothing(folder: Path) -> None:
    del folder


def _save(directory: Path, step: int, state: step_jax.TrainState, **kwargs) -> None:
    with Checkpoints(directory, **kwargs) as run:
        _save_in(run, step, state)


def _save_in(run: Checkpoints, step: int, state: step_jax.TrainState, write_extras=_nothing, **kwargs) -> None:
    begin_write = functools.partial(state_files.begin_write, state=state)
    needed = state_files.required_bytes(state)
    run.save(step, begin_write, required_bytes=needed, write_extras=write_extras, **kwargs)


def _assert_equal(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype, path
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))


@pytest.mark.parametrize("ema_decay", [0.99, None])
def test_a_state_survives(config, ema_decay, tmp_path):
    config = dataclasses.replace(config, ema_decay=ema_decay)
    state = _state(config)
    _save(tmp_path, 7, state)
    with Checkpoints(tmp_path) as run:
        assert run.steps() == [7]
        _assert_equal(restore_state(run.path(7), _spec(config)), state)


def test_a_folder_that_cannot_be_made_is_named_with_the_way_out(tmp_path):
    (tmp_path / "disk").touch()
    with pytest.raises(NotADirectoryError, match=r"a run cannot be written here; .*--checkpoint-base-dir.*disk/run"):
        Checkpoints(tmp_path / "disk" / "run")


def test_frozen_leaves_survive_in_bfloat16_without_optimiser_state(config, tmp_path):
    config = dataclasses.replace(config, freeze_filter=PathRegex(".*llm.*"))
    state = _state(config)
    _save(tmp_path, 0, state)
    restored = restore_state(tmp_path / "0", _spec(config))
    _assert_equal(restored, state)
    assert restored.params["PaliGemma"]["llm"]["embedder"]["input_embedding"].dtype == jnp.bfloat16
    assert "llm" not in restored.opt_state[1][0].mu["PaliGemma"]


def test_inference_reads_the_averaged_weights(state, tmp_path):
    _save(tmp_path, 3, state)
    served = flatten(orbax_io.read_params(tmp_path / "3" / "params"))
    average, raw = flatten(state.ema_params), flatten(state.params)
    path = "action_in_proj/kernel"
    np.testing.assert_array_equal(served[path], np.asarray(average[path]))
    assert not np.array_equal(served[path], np.asarray(raw[path]))


def test_without_an_average_the_weights_are_stored_once(config, tmp_path):
    _save(tmp_path, 3, _state(dataclasses.replace(config, ema_decay=None)))
    stored = weight_layouts.read_orbax(tmp_path / "3" / "train_state")
    assert not stored["params"]
    assert {"step", "opt_state"} <= stored.keys()


def test_an_average_switched_on_later_starts_from_the_weights(config, tmp_path):
    state = _state(dataclasses.replace(config, ema_decay=None))
    _save(tmp_path, 3, state)
    restored = restore_state(tmp_path / "3", _spec(config))
    _assert_equal(restored.ema_params, state.params)


def _restored_from_the_reference(golden, tmp_path, config):
    meta = json.loads((golden / "pi0" / "meta.json").read_text())
    model = Pi0Config(
        **{key: meta["config"][key] for key in ("action_dim", "action_horizon", "max_token_len", "dtype")},
        paligemma_variant=GemmaConfig(**meta["paligemma"]),
        action_expert_variant=GemmaConfig(**meta["action_expert"]),
        image_encoder_variant=SiglipConfig(**meta["siglip"]),
    )
    (tmp_path / "train_state").symlink_to(golden / "pi0" / "train_state")
    (tmp_path / "params").symlink_to(golden / "pi0" / "checkpoint" / "params")
    return restore_state(tmp_path, _spec(dataclasses.replace(config, model=model)))


def test_a_training_checkpoint_of_the_reference_restores(golden, tmp_path, config):
    restored = _restored_from_the_reference(golden, tmp_path, config)
    meta = json.loads((golden / "pi0" / "meta.json").read_text())
    assert flatten(restored.params).keys() == meta["parameters"].keys()
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(restored.opt_state[1][0].mu))
    average = flatten(restored.ema_params)
    served = flatten(orbax_io.read_params(golden / "pi0" / "checkpoint" / "params"))
    np.testing.assert_array_equal(average["state_proj/kernel"], served["state_proj/kernel"])


def test_what_is_written_has_the_tree_that_the_reference_restores(golden, tmp_path, config):
    """It asks Orbax for its own tree, `value` levels and empty places (True here) included."""
    state = _restored_from_the_reference(golden, tmp_path, config)
    _save(tmp_path / "again", 0, state)
    for item, recorded in (("params", golden / "pi0/checkpoint/params"), ("train_state", golden / "pi0/train_state")):
        expected, written = (
            {path: entry["value_metadata"]["value_type"] == "None" for path, entry in _stored_tree(folder).items()}
            for folder in (recorded, tmp_path / "again" / "0" / item)
        )
        if item == "train_state":  # the recorded schedule is a constant, which counts no steps
            assert expected.pop("('opt_state', '1', '2')")
            assert not written.pop("('opt_state', '1', '2', 'count')")
        assert written == expected


def _stored_tree(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "_METADATA").read_text())["tree_metadata"]


def test_another_model_is_refused_with_the_differing_leaves(config, state, tmp_path):
    _save(tmp_path, 0, state)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, action_dim=5))
    with pytest.raises(ValueError, match=r"does not fit the recipe[\s\S]*action_in_proj/kernel: shape \(4, 16\)"):
        restore_state(tmp_path / "0", _spec(wider))


@pytest.mark.parametrize(("keep_period", "expected"), [(None, [5]), (2, [0, 2, 4, 5]), (3, [0, 3, 5]), (100, [0, 5])])
def test_the_latest_and_every_multiple_of_the_period_stay(state, keep_period, expected, tmp_path):
    with Checkpoints(tmp_path, keep_period=keep_period) as run:
        for step in range(6):
            _save_in(run, step, state)
    assert complete_steps(tmp_path) == expected
    assert {entry.name for entry in tmp_path.iterdir()} == {str(step) for step in expected} | {".lock"}


def test_a_step_that_adapters_read_stays(state, tmp_path):
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    with Checkpoints(tmp_path / "run") as run:
        _save_in(run, 0, state)
        run.wait()
        AdapterBase.of(str(run.path(0) / "params"), {}).save(adapters)
        for step in (1, 2):
            _save_in(run, step, state)
    assert complete_steps(tmp_path / "run") == [0, 2]


def test_the_best_stays(state, tmp_path):
    losses = [0.5, 0.2, 0.4, 0.9]
    with Checkpoints(tmp_path, keep_best=True) as run:
        for step, loss in enumerate(losses):
            _save_in(run, step, state, metrics={"validation_loss": loss})
    assert complete_steps(tmp_path) == [1, 3]
    assert best_step(tmp_path) == 1


def test_nothing_is_deleted_while_it_is_not_known_which_is_best(state, tmp_path, caplog):
    with Checkpoints(tmp_path, keep_best=True) as run:
        _save_in(run, 0, state, metrics={"validation_loss": 0.5})
        run.wait()
        (tmp_path / "0" / "eval_metrics.json").write_text('{"validation_lo')
        _save_in(run, 1, state, metrics={"validation_loss": 0.7})
    assert complete_steps(tmp_path) == [0, 1]
    assert f"{tmp_path}/0/eval_metrics.json is damaged" in caplog.text


def test_small_files_are_written_before_the_arrays_are_done(state, tmp_path):
    with Checkpoints(tmp_path) as run:
        _save_in(run, 0, state, write_extras=lambda folder: (folder / "loader_state.json").write_text("{}") and None)
    assert (tmp_path / "0" / "loader_state.json").read_text() == "{}"


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    with Checkpoints(tmp_path), pytest.raises(RuntimeError, match="another process is training"):
        Checkpoints(tmp_path)


DEATHS = {
    "before anything is written": "save(2, write_extras=die)",
    "between the two items": "orbax_io.write_tree = die; save(2)",
    "before the rename": "Path.rename = die; save(2)",
    "while the old one goes": "shutil.rmtree = lambda *a, **k: a[0].exists() and die(); save(2)",
}


@pytest.mark.parametrize("code", DEATHS.values(), ids=DEATHS)
def test_sudden_death_leaves_whole_checkpoints(code, tmp_path):
    done = _child(f"{code}\nrun.wait()", tmp_path)
    assert done.returncode == -signal.SIGKILL
    steps = complete_steps(tmp_path)
    assert steps in ([1], [2], [1, 2])
    for step in steps:
        _assert_whole(tmp_path, step)
    with Checkpoints(tmp_path):
        assert {entry.name for entry in tmp_path.iterdir()} == {str(step) for step in steps} | {".lock"}


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path):
    """The limit is on file size: the kernel refuses writes exactly as a full disk does."""
    done = _child(
        """
import resource, traceback
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
big = np.random.default_rng(0).normal(size=1_000_000)  # random, or it would be compressed away
try:
    save(2, TrainState(jnp.asarray(2), {"w": jnp.asarray(big)}, {"mu": {"w": jnp.asarray(big)}}, None))
    run.wait()
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
save(3)
run.wait()
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "the checkpoint of step 2 could not be written" in done.stdout
    assert "step 1 are intact" in done.stdout
    assert "--resume" in done.stdout
    assert complete_steps(tmp_path) == [3]
    _assert_whole(tmp_path, 3)
    assert {entry.name for entry in tmp_path.iterdir()} == {"3", ".lock"}


def test_a_save_that_failed_does_not_cost_the_next_one(state, tmp_path, caplog):
    def fails(folder: Path) -> Callable[[], None]:
        def write() -> None:
            raise OSError(28, "No space left on device")

        return write

    options = {"required_bytes": 1, "write_extras": _nothing}
    with Checkpoints(tmp_path) as run:
        run.save(1, fails, **options)
        with contextlib.suppress(OSError):
            run._pending.result()
        assert [record.levelname for record in caplog.records] == ["ERROR"]  # at once, not when the next one is due
        _save_in(run, 2, state)
        assert complete_steps(tmp_path) == [2]
        assert "the checkpoint of step 1 could not be written" in caplog.text and "step 2 is written" in caplog.text
        run.save(3, fails, **options)
        with pytest.raises(OSError, match="the checkpoint of step 4 could not be written"):
            run.save(4, fails, **options)
    assert complete_steps(tmp_path) == [2]


def test_no_room_is_noticed_before_writing(state, tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as run:
        _save_in(run, 1, state)
        run.wait()
        monkeypatch.setattr(state_files, "_SIZE_MARGIN", 1e18)
        with pytest.raises(
            OSError, match=r"step 2 could not be written .* no space left: it takes .*step 1 are intact"
        ):
            _save_in(run, 2, state)
        assert run.steps() == [1]


def _assert_whole(directory: Path, step: int) -> None:
    params = orbax_io.read_params(directory / str(step) / "params")
    rest = weight_layouts.read_orbax(directory / str(step) / "train_state")
    assert np.all(params["w"] == step)
    assert np.all(rest["opt_state"]["mu"]["w"]["value"] == -step)
    assert rest["step"] == step


def _child(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(CHILD) + code
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return forked.run(
        [sys.executable, "-c", program, directory], capture_output=True, text=True, env=environment, check=False
    )


def test_one_as_published_is_told_from_another_that_took_its_place(golden, tmp_path):
    shutil.copytree(golden / "pi05" / "checkpoint", tmp_path / "run" / "latest")
    checkpoint = Checkpoint(tmp_path / "run" / "latest")
    before = checkpoint.identity
    (checkpoint.folder / "README.md").write_text("copied here by hand")
    assert checkpoint.identity == before and before["name"] == "run/latest"
    largest = max(checkpoint.folder.glob("params/**/d/*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    assert checkpoint.identity != before
