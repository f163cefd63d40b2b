"""`openpi infer`: an observation file in, an action file out, the same numbers as the policy itself."""

import dataclasses
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import paths
import tiny_arm
from arm_files import arm_observation, run, write_checkpoint
from openpi.cli.debugging._observation_file import load_array, load_observation, save_arrays
from openpi.policies.policy_config import create_trained_policy
from openpi.shared.tree import flatten
from openpi.training.weight_loaders import CheckpointWeightLoader

HORIZON, DIM = 5, 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "12")


@pytest.fixture
def observation(tmp_path: Path) -> Path:
    np.savez(tmp_path / "obs.npz", **arm_observation())
    return tmp_path / "obs.npz"


def infer(source, observation: Path, *argv) -> dict[str, np.ndarray]:
    output = observation.with_name("actions.npz")
    assert run("infer", source, "--observation", observation, "--output", output, "--num-steps", 2, *argv) == 0
    with np.load(output) as archive:
        return dict(archive)


def test_actions_are_those_of_the_policy_for_the_same_noise(checkpoint, observation, tmp_path):
    noise = np.random.default_rng(5).normal(size=(HORIZON, DIM)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    result = infer(checkpoint, observation, "--noise", tmp_path / "noise.npy")
    policy = create_trained_policy(tiny_arm.recipe, checkpoint, sample_kwargs={"num_steps": 2})
    expected = policy.infer(arm_observation(), noise=noise)["actions"]
    assert result["actions"].dtype == np.float32 and result["actions"].shape == (HORIZON, 7)
    np.testing.assert_array_equal(result["actions"], expected.astype(np.float32))
    np.testing.assert_array_equal(result["noise"], noise)
    assert result["policy_timing/infer_ms"] > 0


def test_a_checkpoint_written_by_version_1_loads_and_answers(observation):
    frozen = paths.GOLDEN / "checkpoint_v1" / "1"
    result = infer(frozen, observation)
    assert result["actions"].shape == (HORIZON, 7)
    assert np.isfinite(result["actions"]).all()


def test_an_observation_file_that_unpacks_to_gigabytes_is_refused(checkpoint, observation, capsys):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**31,)})
    with zipfile.ZipFile(observation, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("camera.npy", "w") as member:
        member.write(header.getvalue() + bytes(2**20))
    assert observation.stat().st_size < 100_000
    assert run("infer", checkpoint, "--observation", observation, "--output", observation.with_name("a.npz")) == 1
    assert "'camera' of shape (2147483648,) and dtype uint8 would take 2,147,483,648 bytes" in capsys.readouterr().err


def test_a_run_directory_means_its_latest_step(checkpoint, observation):
    np.testing.assert_array_equal(
        infer(checkpoint.parent, observation)["actions"], infer(checkpoint, observation)["actions"]
    )


def test_the_seed_decides_the_noise_and_the_noise_decides_the_actions(checkpoint, observation):
    first = infer(checkpoint, observation, "--seed", 1)
    again = infer(checkpoint, observation, "--seed", 1)
    np.testing.assert_array_equal(first["actions"], again["actions"])
    other = infer(checkpoint, observation, "--seed", 2)
    assert np.abs(first["actions"] - other["actions"]).max() > 1e-3
    replayed = observation.with_name("first.npz")
    save_arrays(replayed, first)
    np.testing.assert_array_equal(infer(checkpoint, observation, "--noise", replayed)["actions"], first["actions"])


def test_the_default_prompt_stands_in_for_a_missing_one(checkpoint, observation, tmp_path):
    with_prompt = infer(checkpoint, observation)
    silent = tmp_path / "silent.npz"
    np.savez(silent, **{key: value for key, value in arm_observation().items() if key != "prompt"})
    assert run("infer", checkpoint, "--observation", silent, "--output", tmp_path / "no.npz") == 1
    filled = infer(checkpoint, silent, "--default-prompt", "pick up the cube")
    np.testing.assert_array_equal(filled["actions"], with_prompt["actions"])


def write_recipe(folder: Path, checkpoint: Path, loader: str, code: str = "") -> str:
    """A recipe file with the statistics of a checkpoint, and starting weights of its own."""
    name = f"arm_recipe_{folder.name}"
    (folder / f"{name}.py").write_text(
        "import dataclasses\n"
        "import tiny_arm\n"
        "from openpi.training.config import AssetsConfig\n"
        "from openpi.training.weight_loaders import CheckpointWeightLoader\n"
        f"{code}\n"
        f"assets = AssetsConfig(assets_dir={str(checkpoint / 'assets')!r}, asset_id='arm')\n"
        "data = dataclasses.replace(tiny_arm.recipe.data, assets=assets)\n"
        f"recipe = dataclasses.replace(tiny_arm.recipe, data=data, weight_loader={loader})\n"
    )
    return f"{folder / name}.py:recipe"


def test_a_recipe_runs_on_the_weights_it_would_start_from_and_says_so(checkpoint, observation, tmp_path, capsys):
    loader = repr(CheckpointWeightLoader(str(checkpoint / "params")))
    started = infer(write_recipe(tmp_path, checkpoint, loader), observation)
    assert "a recipe, not a checkpoint" in (err := capsys.readouterr().err)
    assert "none is random" in err
    np.testing.assert_allclose(started["actions"], infer(checkpoint, observation)["actions"], atol=1e-6)


PARTIAL_LOADER = """
import dataclasses
from openpi.shared.tree import flatten, unflatten

@dataclasses.dataclass(frozen=True)
class AllButOutput:
    path: str

    def load(self, params):
        loaded = flatten(CheckpointWeightLoader(self.path).load(params))
        return unflatten({**loaded, "action_out_proj/kernel": flatten(params)["action_out_proj/kernel"]})
"""


def test_parameters_without_weights_are_drawn_and_named_as_random(checkpoint, observation, tmp_path, capsys):
    recipe = write_recipe(tmp_path, checkpoint, f"AllButOutput({str(checkpoint / 'params')!r})", PARTIAL_LOADER)
    partly = infer(recipe, observation)
    err = capsys.readouterr().err
    assert "RANDOM" in err
    count = len(flatten(tiny_arm.MODEL.abstract_params()))
    assert f"{count - 1} of {count} parameters" in err
    assert np.isfinite(partly["actions"]).all()
    assert np.abs(partly["actions"] - infer(checkpoint, observation)["actions"]).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "argv", "told"),
    [
        ({"observation/state": np.zeros(7)}, [], "observation/state"),
        ({"observation/image": np.zeros((4, 4), np.uint8)}, [], "observation/image"),
        ({}, ["--noise", "noise.npy"], "noise has shape (3, 3)"),
        ({}, ["--noise", "absent.npy"], "absent.npy does not exist"),
        ({}, ["--config", "pi05_libera"], "pi05_libero"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    checkpoint, tmp_path, monkeypatch, capsys, changes, argv, told
):
    monkeypatch.chdir(tmp_path)
    np.savez("obs.npz", **arm_observation(**changes))
    np.save("noise.npy", np.zeros((3, 3)))
    before = sorted(tmp_path.iterdir())
    assert run("infer", checkpoint, "--observation", "obs.npz", "--output", "out.npz", *argv) == 1
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_is_no_observation_is_refused(checkpoint, tmp_path, capsys):
    single = tmp_path / "single.npy"
    np.save(single, np.zeros(3))
    text = tmp_path / "text.npz"
    text.write_text("hello")
    for path in (single, text):
        assert run("infer", checkpoint, "--observation", path, "--output", tmp_path / "out.npz") == 1
        assert f"{path} is no observation file" in capsys.readouterr().err
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, state=np.array([{}], dtype=object))
    assert run("infer", checkpoint, "--observation", pickled, "--output", tmp_path / "out.npz") == 1
    assert "pickled.npz" in capsys.readouterr().err


def test_weights_of_another_model_are_refused(tmp_path, checkpoint, observation, capsys):
    wide = dataclasses.replace(tiny_arm.MODEL, action_dim=12)
    name = f"arm_wide_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "import dataclasses\nimport tiny_arm\n"
        f"recipe = dataclasses.replace(tiny_arm.recipe, model=dataclasses.replace(tiny_arm.MODEL, "
        f"action_dim={wide.action_dim}))\n"
    )
    argv = ["--config", f"{tmp_path / name}.py:recipe", "--observation", observation, "--output", tmp_path / "o.npz"]
    assert run("infer", checkpoint, *argv) == 1
    assert "action_in_proj/kernel" in capsys.readouterr().err


# --- files --------------------------------------------------------------------------------------------------------

names = st.text("abcxyz_01", min_size=1, max_size=4)
values = st.one_of(
    hnp.arrays(st.sampled_from([np.float32, np.float64, np.uint8, np.int64, np.bool_]), hnp.array_shapes(max_dims=3)),
    st.text("hello wörld", max_size=8).filter(lambda text: not text.endswith("\0")),
)
observations = st.recursive(
    st.dictionaries(names, values, min_size=1, max_size=3),
    lambda inner: st.dictionaries(names, st.one_of(inner, values), min_size=1, max_size=3),
    max_leaves=6,
)


@given(tree=observations)
def test_observations_survive_a_file_and_are_found_nested_and_flat(tmp_path_factory, tree):
    loaded = load_observation(save_arrays(tmp_path_factory.getbasetemp() / "tree.npz", tree))
    flat = flatten(tree)
    assert flatten(loaded).keys() == flat.keys()
    for key, value in flat.items():
        node = loaded
        for part in key.split("/"):
            node = node[part]
        for found in (node, loaded[key]):
            assert type(found) is type(value)
            np.testing.assert_array_equal(found, value)


def test_an_array_is_found_by_its_key_or_the_keys_are_listed(tmp_path):
    save_arrays(tmp_path / "a.npz", {"noise": np.ones(2)})
    np.testing.assert_array_equal(load_array(tmp_path / "a.npz", key="noise"), np.ones(2))
    with pytest.raises(ValueError, match=r"no array 'actions'; found: noise"):
        load_array(tmp_path / "a.npz", key="actions")
