"""Exported models of the first releases, from a folder in their layout."""

import contextlib
import shutil
from pathlib import Path

import jax
import msgpack
import numpy as np
import pytest
from jax import export

import exported_models
from exported_models import SLOTS
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli.checkpoints import convert_checkpoint
from openpi.cli.serving import serve_policy
from openpi.models.exported import ExportedModel, Graph, load_norm_stats
from openpi.policies import exported_policy
from openpi.policies.aloha_policy import AlohaInputs, AlohaOutputs, make_aloha_example
from openpi.policies.droid_policy import make_droid_example
from openpi.policies.policy import Policy
from openpi.serving.warm_up import example_observation
from openpi.shared.tree import flatten, unflatten
from openpi.training import recipe_io
from openpi.transforms import make_bool_mask
from openpi.weights import orbax_io
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from serving_live import server_thread
from tiny_recipe import TOKENIZER

pytest.importorskip("flatbuffers")


@pytest.fixture(scope="module")
def example(golden: Path) -> dict[str, np.ndarray]:
    with np.load(golden / "data" / "exported_model" / "example.npz") as data:
        return dict(data)


@pytest.fixture(scope="module")
def model(golden: Path) -> ExportedModel:
    return ExportedModel.load(golden / "data" / "exported_model" / "model")


def inputs(example: dict[str, np.ndarray]) -> dict:
    return unflatten({key.removeprefix("in/"): leaf for key, leaf in example.items() if key.startswith("in/")})


def test_sampled_actions_equal_the_recording(model: ExportedModel, example: dict) -> None:
    actions = model.sample_actions(jax.random.key(0), inputs(example))
    np.testing.assert_allclose(actions, example["out/actions"], atol=1e-5)
    assert (model.action_horizon, model.action_dim) == example["out/actions"].shape
    assert model.max_token_len == example["in/prompt_tokens"].shape[0]


def test_a_sample_or_option_that_does_not_fit_is_named(model: ExportedModel, example: dict) -> None:
    with pytest.raises(ValueError, match=r"state: shape \(7,\), expected \(6,\)"):
        model.sample_actions(jax.random.key(0), inputs(example) | {"state": np.zeros(7)})
    with pytest.raises(ValueError, match=r"'temperature'.*this graph takes \['num_steps'\]"):
        model.sample_actions(jax.random.key(0), inputs(example), {"temperature": 1.0})


def test_both_forms_of_statistics_are_read(golden: Path) -> None:
    folder = golden / "data" / "exported_model" / "model"
    new, old = load_norm_stats(folder, "libero"), load_norm_stats(folder, "calvin")
    for stats in (new, old):
        np.testing.assert_allclose(stats["actions"].mean, np.arange(6))
        np.testing.assert_allclose(stats["state"].mean, np.arange(6) / 10, atol=1e-6)


def test_a_processor_must_be_named_where_there_are_several(golden: Path) -> None:
    with pytest.raises(ValueError, match="calvin, libero"):
        load_norm_stats(golden / "data" / "exported_model" / "model")


# --- served, and converted -----------------------------------------------------------------------------------------

DROID, ALOHA = "openx_droid", "trossen_biarm_single_base_cam_24dim"


@pytest.fixture(scope="module")
def droid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pi0_base`, as it was published for several robots."""
    return exported_models.write(tmp_path_factory.mktemp("exported") / "pi0_base", (DROID, ALOHA))


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the cache, where PaliGemma's would be."""
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "big_vision").mkdir(parents=True)
    shutil.copyfile(TOKENIZER, tmp_path / "cache" / "big_vision" / "paligemma_tokenizer.model")


def served(words: str) -> Policy:
    return serve_policy.loader(serve_policy.parse(words.split()))()


def test_an_exported_model_is_served_to_a_client(droid: Path, tokenizer: None) -> None:
    load = serve_policy.loader(serve_policy.parse(f"--env DROID policy:exported --policy.dir={droid}".split()))
    observation = {
        **make_droid_example(),
        "observation/exterior_image_1_left": np.full((180, 320, 3), 255, np.uint8),
        "observation/joint_position": np.arange(7) / 7,
        "observation/gripper_position": np.array([0.5]),
    }
    with server_thread(load) as (_, port), WebsocketClientPolicy("127.0.0.1", port) as client:
        actions = client.infer(observation)["actions"]
        with pytest.raises(RuntimeError, match="observation/wrist_image_left"):
            client.infer({key: value for key, value in observation.items() if "wrist" not in key})
    state, action = exported_models.stats(0), exported_models.stats(1)
    normal = (np.append(np.arange(7) / 7, 0.5) - state["mean"][:8]) / (state["std"][:8] + 1e-6)
    rows = normal + np.arange(0, exported_models.HORIZON, 5)[:, None] / 10
    np.testing.assert_allclose(actions, rows * (action["std"][:8] + 1e-6) + action["mean"][:8], atol=1e-5)


def test_aloha_s_conventions_are_around_the_graph_and_its_first_clients_are_understood(droid: Path, tokenizer) -> None:
    policy = served(f"--env ALOHA policy:exported --policy.dir={droid.parent}")
    example = make_aloha_example()
    result = policy.infer(example)
    state, action = exported_models.stats(2), exported_models.stats(3)
    pi = AlohaInputs()(example)["state"]
    normal = (pi - state["mean"][:14]) / (state["std"][:14] + 1e-6)
    rows = (normal + np.arange(10)[:, None] / 10) * (action["std"][:14] + 1e-6) + action["mean"][:14]
    expected = AlohaOutputs()({"actions": rows + np.where(make_bool_mask(6, -1, 6, -1), pi, 0)})["actions"]
    np.testing.assert_allclose(result["actions"], expected, atol=1e-5)
    cameras = np.stack(
        [example["images"][name] for name in ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")]
    )
    old = policy.infer({"qpos": example["state"], "image": cameras, "prompt": "do something"})
    np.testing.assert_array_equal(old["qpos"], result["actions"])
    with pytest.raises(ValueError, match=r"'image' has shape \(3, 3, 224, 224\); expected"):
        policy.infer({"qpos": example["state"], "image": cameras[:3], "prompt": "x"})


def test_the_graph_gets_images_masks_tokens_and_options(droid: Path, tokenizer: None) -> None:
    policy = served(f"--env DROID policy:exported --policy.dir={droid}")
    white = np.full((28, 28, 3), 255, np.uint8)
    observation = {**make_droid_example(), "observation/exterior_image_1_left": white}
    inputs = policy._to_model(observation)
    assert {slot: image.shape for slot, image in inputs["image"].items()} == dict.fromkeys(SLOTS, (28, 28, 3))
    batch = unflatten({path: np.asarray(leaf)[None] for path, leaf in flatten(inputs).items()})
    [rows] = policy._sampler.sample(batch, None, num_steps=7)
    assert rows[0, 20] == inputs["tokenized_prompt_mask"].sum() > 2
    assert rows[0, 21:].tolist() == [2.0, 1.0, 7.0]


@pytest.mark.parametrize("env", ["ALOHA", "ALOHA_SIM", "DROID", "CALVIN", "LIBERO"])
def test_every_robot_of_the_first_release_has_its_model_and_processor(
    env: str, droid: Path, tmp_path, tokenizer
) -> None:
    robot = exported_policy.ROBOTS[env.lower()]
    cache = tmp_path / "cache" / "openpi-assets" / "exported" / robot.model / "model"
    shutil.copytree(droid, cache)
    (cache / "processors" / ALOHA).rename(cache / "processors" / "other")
    (cache / "processors" / DROID).rename(cache / "processors" / robot.processor)
    policy = served(f"--env {env} policy:exported")  # its default model, from the cache
    sent = unflatten(example_observation(robot.spec.cameras, robot.spec.state))
    sent = sent if env.startswith("ALOHA") else flatten(sent)
    actions = policy.infer(sent)["actions"]
    expected = {"ALOHA": (10, 14), "ALOHA_SIM": (10, 14), "DROID": (2, 8), "CALVIN": (10, 15), "LIBERO": (10, 7)}
    assert actions.shape == expected[env] and np.isfinite(actions).all()


@pytest.mark.parametrize(
    "name", ["pi0_base", "pi0_aloha", "pi0_aloha_towel", "pi0_aloha_sim", "pi0_droid", "pi0_libero"]
)
def test_a_model_that_is_gone_is_refused_with_what_replaces_it(name: str, tokenizer: None) -> None:
    load = serve_policy.loader(
        serve_policy.parse(["policy:exported", f"--policy.dir=s3://openpi-assets/exported/{name}/model"])
    )
    with pytest.raises(
        ConnectionError, match=r"may be gone; use policy:checkpoint --policy.config=pi0\w* --policy.dir=gs"
    ):
        load()


def test_calvin_s_default_is_the_one_of_the_first_release(tokenizer: None) -> None:
    load = serve_policy.loader(serve_policy.parse(["--env", "calvin"]))
    with pytest.raises(
        ConnectionError, match=r"pi0_calvin/model(.|\n)*may be gone; there is no other.*recipe pi0_calvin"
    ):
        load()


def test_what_does_not_fit_is_refused_before_weights_are_read(
    droid: Path, tmp_path: Path, golden: Path, capsys
) -> None:
    toy = golden / "data" / "exported_model" / "model"
    for words, said in (
        (f"--env DROID policy:exported --policy.dir={droid} --policy.processor=nonsense", f"{DROID}, {ALOHA}"),
        (f"--env LIBERO policy:exported --policy.dir={droid}", f"no processor is named; .* has: {DROID}, {ALOHA}"),
        (f"--env LIBERO policy:exported --policy.dir={toy}", "6 state values and a model of 6, and libero sends 8"),
        (
            f"policy:exported --policy.dir={tmp_path}",
            r"is no exported model: it has no file 'graph' \(found: nothing\)",
        ),
        (f"--pytorch-device=cpu policy:exported --policy.dir={droid}", "leave out --backend and --pytorch-device"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            served(words)
    with pytest.raises(ValueError, match="no processor is named"):
        load_norm_stats(droid)
    assert serve_policy.main(["policy:exported", f"--policy.dir={tmp_path}"]) == 1
    assert "no file 'graph'" in capsys.readouterr().err


def test_nothing_but_a_graph_runs(tmp_path: Path) -> None:
    """A call out of the graph names a function of the process that runs it, as callbacks into Python do."""

    def calls(params, rng, example, options):
        found = exported_models.answer(params, rng, example, options)["actions"]
        return {
            "actions": jax.ffi.ffi_call("xla_python_cpu_callback", jax.ShapeDtypeStruct(found.shape, found.dtype))(
                found
            )
        }

    unchecked = export.DisabledSafetyCheck.custom_call("xla_python_cpu_callback")
    (tmp_path / "graph").write_bytes(exported_models.graph_of(calls, disabled_checks=[unchecked]))
    with pytest.raises(
        ValueError, match="graph calls xla_python_cpu_callback, which is no numerics that is known here"
    ):
        Graph.read(tmp_path)


@pytest.mark.parametrize("at", [0, 4, 40, 300, 1000, -300, -60])
def test_a_damaged_graph_is_refused_or_still_one(at: int, golden: Path, tmp_path: Path) -> None:
    data = bytearray((golden / "data" / "exported_model" / "model" / "graph").read_bytes())
    data[at] ^= 0xFF
    (tmp_path / "graph").write_bytes(data)
    with contextlib.suppress(ValueError):
        Graph.read(tmp_path)
    (tmp_path / "graph").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="graph is damaged, or of a version"):
        Graph.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        msgpack.packb({"mean": 1, "std": 2}),
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(msgpack.ExtType(1, msgpack.packb(([1], "object", bytes(8))))),
        msgpack.packb(msgpack.ExtType(1, msgpack.packb(([1 << 60], "float32", bytes(8))))),
        msgpack.packb(
            {"input_norms": {"state": {"mean": [float("nan")], "std": [1.0]}}, "output_norms": {"actions": {}}}
        ),
        bytes(2 << 20),
    ],
)
def test_damaged_statistics_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "processors" / "p" / "0" / "norm_stats.msgpack"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_norm_stats(tmp_path)


def test_an_exported_model_becomes_a_checkpoint(droid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(droid.parent), str(tmp_path / "out"), "--to=jax", "--no-certify"]
    assert convert_checkpoint.main(arguments) == 1  # no recipe
    module = tmp_path / "own.py"
    module.write_text(
        "import exported_models\nfrom openpi.training.config import get_config\nimport dataclasses\n"
        "config = dataclasses.replace(get_config('pi0_droid'), model=exported_models.CONFIG)\n"
    )
    for name in (DROID, ALOHA):
        shutil.copytree(droid / "processors" / name, tmp_path / "model" / "processors" / name)
    for path in droid.iterdir():
        if path.name != "processors":
            (tmp_path / "model" / path.name).symlink_to(path)
    shutil.rmtree(tmp_path / "model" / "processors" / ALOHA)
    arguments[0] = str(tmp_path / "model")
    assert convert_checkpoint.main([*arguments, f"--config={module}:config"]) == 0
    converted = recipe_io.load_recipe(tmp_path / "out")
    assert (converted.model.action_dim, converted.model.max_token_len, converted.data.assets.asset_id) == (
        24,
        48,
        DROID,
    )
    norm_stats = Checkpoint(tmp_path / "out").norm_stats(DROID)
    np.testing.assert_allclose(norm_stats["actions"].mean, exported_models.stats(1)["mean"])
    stored = flatten(orbax_io.read_params(droid)["decoder"])
    written = flatten(orbax_io.read_params(tmp_path / "out" / "params"))
    assert written.keys() == stored.keys()
    for path, values in stored.items():
        np.testing.assert_array_equal(written[path], values, err_msg=path)
