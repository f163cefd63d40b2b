"""PyTorch weights on disk: released and LeRobot layouts, conversions, certificates, either backend on any layout."""

import dataclasses
import json
import runpy
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import paths
from golden_kits import load_kit

torch = pytest.importorskip("torch", reason="PyTorch is not installed: uv run --extra torch pytest")

from openpi.checkpoints.find import find_step  # noqa: E402
from openpi.cli.checkpoints import convert_checkpoint, verify  # noqa: E402
from openpi.cli.debugging import infer  # noqa: E402
from openpi.cli.serving import server  # noqa: E402
from openpi.models.model import restore_params  # noqa: E402
from openpi.models_pytorch import loading  # noqa: E402
from openpi.policies import parity  # noqa: E402
from openpi.policies.droid_policy import make_droid_example  # noqa: E402
from openpi.policies.policy_config import create_trained_policy  # noqa: E402
from openpi.shared import normalize  # noqa: E402
from openpi.shared.tree import flatten, unflatten  # noqa: E402
from openpi.training import recipe_io  # noqa: E402
from openpi.training.config import AssetsConfig, LeRobotDROIDDataConfig, TrainConfig  # noqa: E402
from openpi.training.weight_loaders import CheckpointWeightLoader  # noqa: E402
from openpi.weights import layout, names, opening, orbax_io, orbax_parts, published_tree, safetensors_io  # noqa: E402
from openpi.weights.adapter_base import AdapterBase  # noqa: E402

FAMILIES = ("pi0", "pi05", "pi0_fast", "pi0_lora")
FLOW = ("pi0", "pi05")
TABLE = "paligemma_with_expert.paligemma.lm_head.weight"
SECOND_NAME = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


EXAMPLE = make_droid_example()


def recipe_of(family: str, golden: Path) -> TrainConfig:
    """That of the recorded checkpoint, except the token table, of which a part is enough here."""
    model = load_kit(golden / family).config
    tokenizers = golden / "tokenizers"
    files: dict[str, Any] = {"tokenizer_path": str(tokenizers / "tiny_paligemma_tokenizer.model")}
    if family == "pi0_fast":
        files["action_tokenizer_path"] = str(tokenizers / "fast")
    data = LeRobotDROIDDataConfig(assets=AssetsConfig(asset_id="golden"))
    return TrainConfig(name="golden_droid", model=dataclasses.replace(model, **files), data=data)


@dataclasses.dataclass(frozen=True)
class Source:
    """A JAX checkpoint with its recipe, which has a token table of 2048 rows."""

    folder: Path
    recipe: TrainConfig
    params: dict[str, Any]


@pytest.fixture(scope="module")
def sources(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    found = {}
    for family in FAMILIES:
        recipe, kit = recipe_of(family, golden), load_kit(golden / family)
        config: Any = recipe.model
        config = dataclasses.replace(config, paligemma_variant=dataclasses.replace(config.experts[0], vocab_size=2048))
        params = flatten(kit.params)
        table = "PaliGemma/llm/embedder/input_embedding"
        params[table] = params[table][:2048]
        folder = tmp_path_factory.mktemp(family) / "step"
        orbax_io.write_params(folder / "params", unflatten(params))
        shutil.copytree(golden / "pi0" / "checkpoint" / "assets", folder / "assets")
        recipe = dataclasses.replace(recipe, model=config)
        recipe_io.save_recipe(folder, recipe)
        found[family] = Source(folder, recipe, unflatten(params))
    return found


@pytest.fixture(scope="module")
def converted(sources: dict[str, Source], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PyTorch layout; with adapters, merged."""
    found = {family: tmp_path_factory.mktemp(f"{family}_pytorch") / "out" for family in FAMILIES}
    for family, output in found.items():
        convert_checkpoint.convert(
            str(sources[family].folder), convert_checkpoint.Target(output, certify=family != "pi0")
        )
    return found


def assert_same_trees(found: dict[str, Any], expected: dict[str, Any]) -> None:
    a, b = flatten(found), flatten(expected)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path].view(np.uint8), b[path].view(np.uint8), err_msg=path)


# --- the file format ----------------------------------------------------------------------------------------------

_DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int8, np.uint8, np.bool_]
_TENSORS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(_DTYPES), st.lists(st.integers(0, 4), max_size=3)),
    max_size=6,
)


@settings(max_examples=40)
@given(_TENSORS, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_files_written_here_are_those_of_the_safetensors_library_and_the_other_way(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, Any], metadata: dict[str, str]
) -> None:
    safetensors = pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("st")
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 2, shape).astype(dtype) for name, (dtype, shape) in drawn.items()}
    safetensors_io.save(folder / "ours.safetensors", arrays, metadata=metadata)
    theirs = load_file(folder / "ours.safetensors")
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(loading.as_array(theirs[name]), array)
    with safetensors.safe_open(folder / "ours.safetensors", "pt") as file:
        assert (file.metadata() or {}) == metadata
    save_file({name: tensor.clone() for name, tensor in theirs.items()}, folder / "theirs.safetensors")
    for name, array in safetensors_io.open_tensors(folder / "theirs.safetensors").items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])


def test_damaged_files_are_refused_with_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors_io.save(file, {"a": np.arange(6.0), "b": np.ones((2, 2), np.float32)})
    whole = file.read_bytes()
    for data, message in (
        (whole[:-4], r"is cut off: it has \d+ bytes, and its header says"),
        (whole + b"x", "has bytes that no tensor owns"),
        (whole[:5], "is cut off or no safetensors file"),
        (b"PK\x03\x04" * 50, "is cut off or no safetensors file"),
        (whole.replace(b'"F64"', b'"F63"'), r"dtype 'F63' is not known here"),
        (whole.replace(b'"shape":[6]', b'"shape":[5]'), r"a lies at bytes 0 to 48; expected 40 bytes"),
        (whole.replace(b'{"a"', b'["a"'), "damaged header"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            safetensors_io.open_tensors(tmp_path)


def test_a_file_is_there_only_when_every_tensor_is(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    specs = {name: safetensors_io.Spec((4, 2), np.dtype(np.float32)) for name in "ab"}
    with (
        pytest.raises(ValueError, match="1 announced tensors were not written, such as b"),
        safetensors_io.Writer(file, specs) as writer,
    ):
        writer.write("a", np.ones((4, 2), np.float32))
    with (
        pytest.raises(ValueError, match=r"a: float64\(4, 2\) is written; announced"),
        safetensors_io.Writer(file, specs) as writer,
    ):
        writer.write("a", np.ones((4, 2)))
    assert list(tmp_path.iterdir()) == []
    with safetensors_io.Writer(file, specs) as writer:
        writer.write("b", np.full((3, 2), 2, np.float32))
        writer.write_zeros("a")
        writer.write("b", np.full((1, 2), 3, np.float32))
    tensors = safetensors_io.open_tensors(file)
    np.testing.assert_array_equal(tensors["b"][:, 0], [2, 2, 2, 3])
    assert not tensors["a"].any()


# --- Orbax, row by row --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_bytes", [0, 1 << 28])
def test_rows_of_an_orbax_folder_are_those_that_orbax_reads(
    golden: Path, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    monkeypatch.setattr(orbax_parts, "_WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(orbax_parts, "_BLOCK_BYTES", 5000)
    for family in ("pi05", "pi0_lora"):  # both flavours of leaf names
        folder = golden / family / "checkpoint" / "params"
        arrays = orbax_parts.open_arrays(folder)
        expected = flatten(orbax_io.read_params(folder))
        assert arrays.keys() == expected.keys()
        for path, array in arrays.items():
            if array.nbytes < 1 << 20:  # the token table is of 66 MB
                found = np.concatenate([rows for _, rows in array.rows()])
                np.testing.assert_array_equal(found, expected[path], err_msg=path)
    assert arrays["PaliGemma/llm/embedder/input_embedding"].is_stream


@pytest.mark.parametrize("compressor", [{"id": "zstd", "level": 1}, None, {"id": "gzip", "level": 1}])
def test_chunks_side_by_side_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compressor: dict[str, Any] | None
) -> None:
    """As arrays are that were sharded over devices; only zstd and plain bytes can be read as streams."""
    import tensorstore

    monkeypatch.setattr(orbax_parts, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(orbax_parts, "_BLOCK_BYTES", 250)
    values = np.random.default_rng(0).normal(size=(11, 6, 10)).astype(ml_dtypes.bfloat16)
    store = tensorstore.open(
        {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": f"file://{tmp_path}/",
                "config": {"max_inline_value_bytes": 0, "max_decoded_node_bytes": 300},  # an index of several levels
                "path": "params.w.kernel/",
            },
            "metadata": {"shape": [11, 6, 10], "chunks": [4, 6, 3], "dtype": "bfloat16", "compressor": compressor},
            "create": True,
        }
    ).result()
    store[...] = values
    keys = [{"key": key, "key_type": 2} for key in ("params", "w", "kernel")]
    document = {"tree_metadata": {"x": {"key_metadata": keys, "value_metadata": {}}}}
    (tmp_path / "_METADATA").write_text(json.dumps(document))
    array = orbax_parts.open_arrays(tmp_path)["w/kernel"]
    assert array.is_stream == (compressor is None or compressor["id"] == "zstd")
    blocks = list(array.rows())
    assert len(blocks) > 5
    assert [start for start, _ in blocks] == np.cumsum([0, *(len(rows) for _, rows in blocks)])[:-1].tolist()
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), values)


# --- the released layout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FLOW)
def test_the_converted_golden_checkpoint_matches_the_recording_key_for_key(
    family: str, golden: Path, tmp_path: Path
) -> None:
    recipe_io.save_recipe(tmp_path / "step", recipe_of(family, golden))
    (tmp_path / "step" / "params").symlink_to(golden / family / "checkpoint" / "params")
    convert_checkpoint.convert(str(tmp_path / "step"), convert_checkpoint.Target(tmp_path / "out", certify=False))
    recorded = json.loads((golden / family / "torch" / "layout.json").read_text())
    tensors = safetensors_io.open_tensors(tmp_path / "out")
    assert tensors.metadata == recorded["metadata"]
    spelled = {np.dtype(np.float32): "F32"}
    found = {name: {"shape": list(spec.shape), "dtype": spelled[spec.dtype]} for name, spec in tensors.specs.items()}
    assert found == recorded["tensors"]


def test_a_file_with_the_recorded_names_loads_also_without_the_unused_table(
    golden: Path, tmp_path: Path, converted: dict[str, Path], sources: dict[str, Source]
) -> None:
    recorded = json.loads((golden / "pi05" / "torch" / "layout.json").read_text())["tensors"]
    tensors = safetensors_io.open_tensors(converted["pi05"])
    used = [name for name in recorded if "gemma_expert.lm_head" not in name]
    safetensors_io.save(tmp_path / "model.safetensors", {name: tensors[name] for name in used})
    assert_same_trees(
        published_tree.tree_of(opening.open_weights(sources["pi05"].recipe.model, tmp_path)), sources["pi05"].params
    )


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_gives_the_same_bits(
    family: str, dtype: str | None, sources: dict[str, Source], tmp_path: Path
) -> None:
    source = sources[family]
    if family == "pi0_lora":  # `convert` merges adapters: written as our PyTorch trainer would
        from openpi.weights import released

        weights = opening.open_weights(source.recipe.model, source.folder)
        (tmp_path / "there").mkdir()
        wanted = np.dtype(np.float32 if dtype is None else ml_dtypes.bfloat16)
        file = tmp_path / "there" / "model.safetensors"
        released.write_tensors(file, source.recipe.model, released.cast(weights, wanted), lambda row: wanted)
        recipe_io.save_recipe(tmp_path / "there", source.recipe)
    else:
        convert_checkpoint.convert(
            str(source.folder), convert_checkpoint.Target(tmp_path / "there", dtype=dtype, certify=False)
        )
    convert_checkpoint.convert(
        str(tmp_path / "there"), convert_checkpoint.Target(tmp_path / "back", to="jax", certify=False)
    )
    expected = flatten(source.params)
    if dtype == "bfloat16":
        expected = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in expected.items()}
    assert_same_trees(orbax_io.read_params(tmp_path / "back" / "params"), unflatten(expected))
    assert recipe_io.load_recipe(tmp_path / "back") == source.recipe


def test_shards_are_read_as_one_file(converted: dict[str, Path], sources: dict[str, Source], tmp_path: Path) -> None:
    tensors = safetensors_io.open_tensors(converted["pi0"])
    parts = [list(tensors)[::2], list(tensors)[1::2]]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        safetensors_io.save(tmp_path / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_trees(
        published_tree.tree_of(opening.open_weights(sources["pi0"].recipe.model, tmp_path)), sources["pi0"].params
    )
    assert find_step(str(tmp_path)) == tmp_path
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors is missing"):
        opening.open_weights(sources["pi0"].recipe.model, tmp_path)


def test_dims_can_be_told_from_the_tree_alone(sources: dict[str, Source]) -> None:
    for source in sources.values():
        shapes = {path: leaf.shape for path, leaf in flatten(source.params).items()}
        found = [(r.torch, r.tree, r.index, r.axes, r.shape) for r in names.rows(names.dims_of(shapes))]
        assert found == [(r.torch, r.tree, r.index, r.axes, r.shape) for r in names.rows(source.recipe.model)]
    with pytest.raises(ValueError, match="the tree of none of the models"):
        names.dims_of({"w": (2, 3)})


def test_what_does_not_fit_is_said_in_one_error(converted: dict[str, Path], sources: dict[str, Source]) -> None:
    config: Any = sources["pi0"].recipe.model
    with pytest.raises(ValueError, match=r"out holds pi0.5, and the recipe's model is pi0; name another recipe"):
        opening.open_weights(config, converted["pi05"])
    wider = dataclasses.replace(config, action_dim=32)
    with pytest.raises(
        ValueError, match=r"4 of 124 arrays differ(.|\n)*action_in_proj.weight: shape \(64, 8\), the mod"
    ):
        opening.open_weights(wider, converted["pi0"])
    with pytest.raises(ValueError, match=r"adapters that the model has not(.|\n)*openpi export --merge"):
        opening.open_weights(config, sources["pi0_lora"].folder)
    with pytest.raises(ValueError, match=r"112 of 236 arrays differ(.|\n)*lora.a: missing"):
        opening.open_weights(sources["pi0_lora"].recipe.model, converted["pi0"])


def test_weights_of_pytorch_start_training_in_jax(converted: dict[str, Path], sources: dict[str, Source]) -> None:
    """Adapters that they lack keep their initial values."""
    for family in ("pi0", "pi0_lora", "pi0_fast"):
        config = sources[family].recipe.model
        shapes = flatten(config.abstract_params())
        reference = unflatten({path: np.full(leaf.shape, 7, leaf.dtype) for path, leaf in shapes.items()})
        plain = "pi0" if family == "pi0_lora" else family
        loader = CheckpointWeightLoader(str(converted[plain]))
        report = loader.check(reference)
        assert len(report.kept) == (20 if family == "pi0_lora" else 0)
        loaded, expected = flatten(loader.load(reference)), flatten(sources[plain].params)
        for path, leaf in flatten(reference).items():
            np.testing.assert_array_equal(loaded[path], expected.get(path, leaf), err_msg=path)


# --- LeRobot ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table_names", [[TABLE], [SECOND_NAME], [TABLE, SECOND_NAME]])
def test_lerobot_files_load_under_either_name_of_the_tied_table(
    table_names: list[str], converted: dict[str, Path], sources: dict[str, Source], tmp_path: Path
) -> None:
    tensors = dict(safetensors_io.open_tensors(converted["pi05"]))
    table = tensors.pop(TABLE)
    del tensors["paligemma_with_expert.gemma_expert.lm_head.weight"]
    tensors |= dict.fromkeys(table_names, table)
    safetensors_io.save(tmp_path / "model.safetensors", {f"model.{name}": value for name, value in tensors.items()})
    assert layout.find_layout(tmp_path) is layout.Layout.LEROBOT
    assert_same_trees(
        published_tree.tree_of(opening.open_weights(sources["pi05"].recipe.model, tmp_path)), sources["pi05"].params
    )


@pytest.mark.parametrize("family", FLOW)
def test_a_lerobot_folder_is_served_with_its_own_statistics(
    family: str, sources: dict[str, Source], converted: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[family]
    convert_checkpoint.convert(
        str(source.folder), convert_checkpoint.Target(tmp_path / "lerobot", to="lerobot", certify=False, any_model=True)
    )
    config = json.loads((tmp_path / "lerobot" / "config.json").read_text())
    assert (config["type"], config["chunk_size"], config["max_action_dim"]) == (family, 10, 8)
    shutil.rmtree(tmp_path / "lerobot" / "assets")
    options: dict[str, Any] = {"sample_kwargs": {"num_steps": 1}, "pytorch_device": "cpu"}
    policy = create_trained_policy(source.recipe, tmp_path / "lerobot", **options)
    same = create_trained_policy(source.recipe, converted[family], **options)
    found, expected = (p.infer(EXAMPLE, noise=noise())["actions"] for p in (policy, same))
    np.testing.assert_allclose(found, expected, atol=1e-4)

    other_kind = {"pi0": "QUANTILES", "pi05": "MEAN_STD"}[family]
    config["normalization_mapping"]["ACTION"] = other_kind
    (tmp_path / "lerobot" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"normalises ACTION by {other_kind}"):
        create_trained_policy(source.recipe, tmp_path / "lerobot", **options)
    for processor in ("policy_preprocessor.json", "policy_postprocessor.json"):
        (tmp_path / "lerobot" / processor).unlink()
    config["normalization_mapping"] = {}
    (tmp_path / "lerobot" / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"no normalisation statistics of observation\.state and action"):
        create_trained_policy(source.recipe, tmp_path / "lerobot", **options)


# --- serving ------------------------------------------------------------------------------------------------------


def noise() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(10, 8)).astype(np.float32)


def test_requests_run_together_in_pytorch(converted: dict[str, Path]) -> None:
    """As the server does: another size is warmed up when it is wanted, which takes nothing of the noise."""
    args = server.parse([str(converted["pi05"]), "--num-steps=1", "--pytorch-device=cpu"])
    models = server.find_models(args)
    policy, untouched = (models.load(models.resolve(None)) for _ in range(2))
    policy.warm_up(EXAMPLE, batch_size=2)
    assert policy.batch_sizes is None  # nothing is compiled on a CPU
    np.testing.assert_array_equal(policy.infer(EXAMPLE)["actions"], untouched.infer(EXAMPLE)["actions"])
    observations = [EXAMPLE, {**EXAMPLE, "prompt": "fold the towel"}, {"prompt": "no state"}]
    given = np.stack([noise(), -noise(), noise()])
    *found, refused = policy.infer_batch(observations, noise=given)
    assert isinstance(refused, Exception)
    for obs, start, answer in zip(observations, given, found, strict=False):
        np.testing.assert_allclose(answer["actions"], policy.infer(obs, noise=start)["actions"], atol=2e-2)


@pytest.mark.parametrize("family", ["pi05", "pi0_lora"])
def test_either_backend_serves_either_layout_with_the_same_actions(
    family: str, sources: dict[str, Source], converted: dict[str, Path], tmp_path: Path
) -> None:
    """Adapters, too; the PyTorch folder of those is merged, and has the recipe of the merged model."""
    source, found = sources[family], {}
    for folder in (source.folder, converted[family]):
        recipe = recipe_io.load_recipe(folder)
        for backend in ("jax", "pytorch"):
            policy = create_trained_policy(recipe, folder, backend=backend, sample_kwargs={"num_steps": 3})
            assert type(policy._sampler).__name__ == {"jax": "JaxSampler", "pytorch": "PytorchSampler"}[backend]
            found[folder, backend] = policy.infer(EXAMPLE, noise=noise())["actions"]
    reference = found[source.folder, "jax"]
    assert np.abs(reference).max() > 0.1
    for actions in found.values():
        np.testing.assert_allclose(actions, reference, atol=1e-4)


def test_the_layout_chooses_the_backend_and_a_device_means_pytorch(
    sources: dict[str, Source], converted: dict[str, Path]
) -> None:
    kinds = {}
    for folder, device in ((sources["pi0"].folder, None), (sources["pi0"].folder, "cpu"), (converted["pi0"], None)):
        policy = create_trained_policy(sources["pi0"].recipe, folder, pytorch_device=device)
        kinds[folder == converted["pi0"], device] = type(policy._sampler).__name__
    assert kinds == {(False, None): "JaxSampler", (False, "cpu"): "PytorchSampler", (True, None): "PytorchSampler"}
    with pytest.raises(ValueError, match=r"device 'cuda:71' does not exist here; there is: cpu"):
        create_trained_policy(sources["pi0"].recipe, "gs://no/such/bucket", pytorch_device="cuda:71")
    with pytest.raises(ValueError, match=r"goes with backend=pytorch; backend is jax"):
        create_trained_policy(sources["pi0"].recipe, "gs://no/such/bucket", pytorch_device="cpu", backend="jax")


def test_the_framework_that_is_missing_is_named_before_weights_are_fetched(
    sources: dict[str, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"backend=pytorch needs PyTorch; in the checkout: `uv sync --extra torch "):
        create_trained_policy(sources["pi0"].recipe, "gs://no/such/bucket", backend="pytorch")
    with pytest.raises(ImportError, match=r"a policy needs JAX or PyTorch, and neither is installed"):
        create_trained_policy(sources["pi0"].recipe, "gs://no/such/bucket")


def test_another_horizon_than_the_file_s_is_warned_of(
    converted: dict[str, Path], sources: dict[str, Source], caplog: pytest.LogCaptureFixture
) -> None:
    config: Any = sources["pi0"].recipe.model
    recipe = dataclasses.replace(sources["pi0"].recipe, model=dataclasses.replace(config, action_horizon=5))
    create_trained_policy(recipe, converted["pi0"])
    assert "action_horizon is 5" in caplog.text and "says 10" in caplog.text


def test_adapters_alone_are_served_by_pytorch_with_their_base(sources: dict[str, Source], tmp_path: Path) -> None:
    source = sources["pi0_lora"]
    flat = flatten(source.params)
    is_frozen = source.recipe.model.get_freeze_filter()
    frozen = opening.frozen_arrays(
        opening.open_weights(source.recipe.model, source.folder), {path for path in flat if is_frozen(path)}
    )
    trained = {path: leaf for path, leaf in flat.items() if path not in frozen}
    orbax_io.write_params(tmp_path / "alone" / "params", unflatten(trained))
    AdapterBase.of(str(source.folder / "params"), frozen).save(tmp_path / "alone")
    found = published_tree.tree_of(opening.open_weights(source.recipe.model, tmp_path / "alone"))
    assert_same_trees(found, restore_params(tmp_path / "alone" / "params"))
    changed = {path: leaf + 1 if "q_einsum/w" in path else leaf for path, leaf in flat.items()}
    shutil.rmtree(source.folder / "params")
    orbax_io.write_params(source.folder / "params", unflatten(changed))
    try:
        with pytest.raises(ValueError, match="are others than before"):
            published_tree.tree_of(opening.open_weights(source.recipe.model, tmp_path / "alone"))
    finally:
        shutil.rmtree(source.folder / "params")
        orbax_io.write_params(source.folder / "params", source.params)


def test_bfloat16_keeps_in_float32_what_is_computed_in_it(sources: dict[str, Source]) -> None:
    source = sources["pi05"]
    model = loading.load_checkpoint(
        source.recipe.model, opening.open_weights(source.recipe.model, source.folder), dtype="bfloat16"
    )
    wide = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert {"action_in_proj.weight", "time_mlp_in.bias", "vision.position_embedding", "language.norms.0.weight"} <= wide
    assert {parameter.dtype for name, parameter in model.named_parameters() if name not in wide} == {torch.bfloat16}
    assert not any(".dense." in name or ("_proj.weight" in name and "." in name[:9]) for name in wide)


# --- certificates -------------------------------------------------------------------------------------------------


def test_a_conversion_is_certified_and_can_be_verified(
    converted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for family in ("pi05", "pi0_fast", "pi0_lora"):
        folder = converted[family]
        document = json.loads((folder / "parity.json").read_text())
        assert document["backends"].keys() == {"jax", "pytorch"}
        assert max(backend["max_error"] for backend in document["backends"].values()) < 2e-5
    folder = shutil.copytree(converted["pi05"], tmp_path / "copy")
    assert verify.main([str(folder)]) == 0
    assert "OK" in capsys.readouterr().out

    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert verify.main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert "model.safetensors is not what was written" in error and "--accept" in error
    assert verify.main([str(folder), "--accept"]) == 0  # the certificate is of tensors
    assert verify.main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert "1 of 131 tensors" in error and "expected float32 with checksum" in error


def test_outputs_that_differ_are_named_by_their_first(
    converted: dict[str, Path], sources: dict[str, Source], tmp_path: Path
) -> None:
    folder = shutil.copytree(converted["pi05"], tmp_path / "copy")
    with np.load(folder / "parity.npz") as archive:
        arrays = dict(archive)
    arrays["outputs"][0, 3, 2] += 0.5
    np.savez(folder / "parity.npz", **arrays)
    with pytest.raises(ValueError, match=r"pytorch computes something else: 1 of 80 .*outputs\[0, 3, 2\] = .*recorded"):
        parity.verify(folder, recipe_io.load_recipe(folder).model, backends=["pytorch"])
    (folder / "parity.npz").unlink()
    with pytest.raises(FileNotFoundError, match="openpi verify --write"):
        parity.verify(folder, recipe_io.load_recipe(folder).model)


def test_a_conversion_that_would_write_other_weights_leaves_nothing(
    sources: dict[str, Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = safetensors_io.Writer.write

    def turned(writer: safetensors_io.Writer, name: str, tensor: np.ndarray) -> None:
        write(writer, name, tensor[::-1] if name == "action_out_proj.weight" else tensor)

    monkeypatch.setattr(safetensors_io.Writer, "write", turned)
    assert convert_checkpoint.main([str(sources["pi0"].folder), str(tmp_path / "out")]) == 1
    assert "1 of 124 tensors" in (error := capsys.readouterr().err) and "action_out_proj.weight" in error
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_converted_is_refused(
    sources: dict[str, Source], converted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(sources["pi0"].folder)
    for argv, message in (
        ([source, source], "exists; choose another folder"),
        ([source, str(tmp_path / "out"), "--to=jax"], "is in the layout 'jax' already"),
        ([str(tmp_path / "none"), str(tmp_path / "out")], "none"),
        ([source, str(tmp_path / "out"), "--config=pi05_libero"], "holds pi0, and the recipe's model is pi0.5"),
    ):
        assert convert_checkpoint.main(argv) == 1
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- programs -----------------------------------------------------------------------------------------------------


def test_the_published_script_and_infer_take_their_flags(
    sources: dict[str, Source], converted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources["pi0"]
    script = runpy.run_path(str(paths.ROOT / "examples" / "convert_jax_model_to_pytorch.py"))
    assert script["main"]([f"--checkpoint_dir={source.folder}", "--inspect_only"]) == 0
    assert "action_in_proj.weight\n" in capsys.readouterr().out
    assert script["main"]([f"--checkpoint_dir={source.folder}", "--output_path", str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["precision"] == "bfloat16" and config["paligemma_variant"]["width"] == 64
    assert {spec.dtype.name for spec in safetensors_io.open_tensors(tmp_path / "out").specs.values()} == {"bfloat16"}
    stats = tmp_path / "out" / "assets" / "golden"
    assert normalize.load(stats) == normalize.load(source.folder / "assets" / "golden")

    from openpi.cli.debugging._observation_file import save_arrays

    save_arrays(tmp_path / "obs.npz", EXAMPLE)
    actions = []
    for folder, options in ((source.folder, ["--backend=pytorch"]), (converted["pi0"], ["--backend=jax"])):
        argv = [str(folder), f"--observation={tmp_path / 'obs.npz'}", f"--output={tmp_path / 'a.npz'}", "--num-steps=2"]
        assert infer.main([*argv, *options]) == 0
        with np.load(tmp_path / "a.npz") as archive:
            actions.append(archive["actions"])
    np.testing.assert_allclose(actions[0], actions[1], atol=1e-4)
