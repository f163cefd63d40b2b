"""A `recipe.json` is data, whoever wrote it: crafted files do nothing, and say what is wrong with them."""

import dataclasses
import json
import os
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest

from arm_files import run
from openpi.models.tokenizer import load_sentencepiece
from openpi.shared.download import maybe_download
from openpi.shared.downloaded import is_downloaded
from openpi.training.config import TrainConfig, config_names, get_config
from openpi.training.recipe import table as recipe_table
from openpi.training.recipe_io import changes_since, load_recipe, recipe_name, save_recipe
from paths import GOLDEN

OLD = sorted((GOLDEN / "recipes_v1").glob("*.json"))


@pytest.fixture
def document(tmp_path: Path) -> dict:
    """A file of today, to be changed."""
    return json.loads(save_recipe(tmp_path, TrainConfig(name="x")).read_text())


def load(folder: Path, document: object) -> TrainConfig:
    (folder / "recipe.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return load_recipe(folder)


# Version 1


@pytest.mark.parametrize("file", OLD, ids=[file.stem for file in OLD])
def test_recipes_of_version_1_mean_what_they_did(file, tmp_path):
    shutil.copy(file, tmp_path / "recipe.json")
    old = load_recipe(tmp_path)
    assert changes_since(tmp_path, old) == []
    if file.stem in config_names():
        today = get_config(file.stem)
        # A recipe that did not say held out nothing, and its file still means that; today's leaves it to the run.
        assert old.holdout_episodes == (today.holdout_episodes or 0)
        assert dataclasses.replace(old, note=today.note, holdout_episodes=today.holdout_episodes) == today
    save_recipe(tmp_path / "again", old)
    assert load_recipe(tmp_path / "again") == old


def test_own_code_of_version_1_is_found():
    recipe = load_recipe(GOLDEN / "recipes_v1" / "own_source")
    assert recipe.policy_metadata["gripper"].axis == 3
    assert type(recipe.data.data_transforms(recipe.model).inputs[0]) is recipe.policy_metadata["class"]


def test_names_in_files_never_change():
    """Whatever moves: add to the list, take nothing away."""
    known = set((GOLDEN / "recipes_v1" / "names.txt").read_text().split())
    assert known <= set(recipe_table.names()), "checkpoints that name these can no longer be read"
    assert set(recipe_table.names()) <= known, "add the new names to the list"


def test_registered_recipes_bring_no_code(tmp_path):
    for name in config_names():
        document = json.loads(save_recipe(tmp_path, get_config(name)).read_text())
        assert document["sources"] == {}, name


# Crafted

COMMAND = "openpi.training.recipe_io:shutil.os.system"
STORED = "openpi.models.tokenizer:FASTTokenizer.tokenize.__globals__"


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "value",
    [
        {"$ref": COMMAND},
        {"$ref": "openpi.shared.references:resolve"},
        {"$ref": "openpi.training.config:get_config"},
        {"$ref": "os:system"},
        {"$ref": "openpi:transforms.np.load"},
        {"$ref": "openpi.training.weight_loaders:zipfile.os.execv"},
        {"$ref": "data.no_transforms.__globals__"},
        {"$ref": "data.no_transforms.__class__"},
        {"$ref": "my_recipe.py:attack"},
        {"$ref": "../recipe.py:attack"},
        {"$ref": "weights.CheckpointWeightLoader"},
        {"$ref": STORED},
        {"$ref": ["data.no_transforms"]},
        {"$ref": None},
        {"$type": COMMAND, "command": "false"},
        {"$type": "openpi.training.recipe_io:TrainConfig", "name": "x"},
        {"$type": "openpi.training.data_config:DataConfigFactory"},
        {"$type": "data.no_transforms"},
        {"$type": "model.ModelType", "value": "pi0"},
        {"$type": "freeze.PathRegex", "pattern": ["x"]},
        {"$type": "freeze.PathRegex", "pattern": "(", "__class__": "x"},
        {"$type": "freeze.PathRegex"},
        {"$type": "transform.Group", "inputs": [{"$ref": "model.ModelType"}]},
        {"$type": "transform.Group", "inputs": "text"},
        {"$type": "robot.VectorSpec", "key": "a", "names": {"a": 1}, "units": []},
        {"$type": "data.NormStats", "mean": [0.0], "std": {"$array": [1.0], "dtype": "object"}},
        {"$type": {"$type": "recipe.TrainConfig"}},
        {"$type": "model.GemmaConfig", "$ref": COMMAND},
        {"$enum": "model.ModelType", "name": "__class__"},
        {"$enum": "model.ModelType", "name": "mro"},
        {"$enum": "signal:Signals", "name": "SIGINT"},
        {"$enum": "data.NormStats", "name": "mean"},
        {"$enum": "model.ModelType"},
        {"$array": [1.0], "dtype": "O"},
        {"$array": [1.0], "dtype": "V99999999"},
        {"$array": ["a" * 10], "dtype": "<U2000000000"},
        {"$array": [[1.0], [1.0, 2.0]], "dtype": "float32"},
        {"$array": [10**400], "dtype": "int64"},
        {"$scalar": [1], "dtype": "float32"},
        {"$scalar": 1, "dtype": "M8[s]"},
        {"$dict": [[[1], 2]]},
        {"$dict": [[1, 2, 3]]},
        {"$dict": [["a", 1], ["a", 2]]},
        {"$dict": {"a": 1}},
        {"$tuple": {"a": 1}},
        {"$path": 7},
        {"$odd": 1},
    ],
    ids=str,
)
def test_what_recipes_do_not_hold_is_refused_by_its_field(value, version, document, tmp_path):
    document["version"] = version
    if version == 1:
        document["config"] = json.loads(OLD[0].read_text())["config"]
    document["config"]["policy_metadata"] = {"a": value}
    with pytest.raises(ValueError, match=r"recipe\.json: .*policy_metadata") as refusal:
        load(tmp_path, document)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("batch_size", "32", r"config\.batch_size is '32' \(str\); expected int"),
        ("batch_size", True, "expected int"),
        ("batch_size", 1.5, "expected int"),
        ("batch_size", {"$path": "x"}, "expected int"),
        ("name", 7, r"config\.name is 7 \(int\); expected str"),
        ("ema_decay", "0.9", r"expected .*float"),
        ("backend", "os", "expected Literal"),
        ("resume", 1, "expected bool"),
        ("weight_loader", {"$ref": "freeze.freeze_nothing"}, "expected WeightLoader"),
        ("weight_loader", "gs://somewhere", "expected WeightLoader"),
        ("freeze_filter", {"$ref": "tokenizer.FASTTokenizer"}, "expected a function"),
        ("freeze_filter", "eval", "expected a function"),
        ("data", {"$type": "data.DataConfig"}, "expected DataConfigFactory"),
        ("model", {"$type": "recipe.TrainConfig", "name": "x"}, "expected BaseModelConfig"),
        ("policy_metadata", [1], "expected "),
        ("gradient_accumulation_steps", 0, "expected a whole number of at least 1"),
    ],
)
def test_values_are_of_the_types_that_fields_declare(field, value, expected, document, tmp_path):
    document["config"][field] = value
    with pytest.raises(ValueError, match=expected):
        load(tmp_path, document)


def test_the_command_of_version_1_does_not_run(tmp_path):
    """`ModelTransformFactory` called this tokenizer with these arguments when the checkpoint was loaded."""
    document = json.loads((GOLDEN / "recipes_v1" / "paligemma_binning_droid.json").read_text())
    document["config"]["model"] |= {
        "fast_model_tokenizer": {"$ref": "openpi.training.recipe_io:shutil.os.spawnvp"},
        "fast_model_tokenizer_kwargs": {"file": "touch", "args": ["touch", str(tmp_path / "ran")]},
    }
    with pytest.raises(ValueError, match=r"config\.model\.fast_model_tokenizer refers to .*spawnvp"):
        config = load(tmp_path, document)
        config.data.create(tmp_path, config.model)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("tokenizer", "kwargs", "expected"),
    [
        ({"$ref": "openpi.models.tokenizer:FASTTokenizer"}, None, "refers to 'openpi.models"),
        ({"$ref": "data.droid_transforms"}, None, "which is none"),
        ({"$ref": "tokenizer.FASTTokenizer"}, {"nothing": 1}, "does not take its arguments"),
        ({"$ref": "tokenizer.FASTTokenizer"}, {"model_path": {"$type": "freeze.PathRegex", "pattern": "x"}}, "text or"),
        ({"$ref": "tokenizer.FASTTokenizer"}, {"model_path": [1]}, "expected text or a number"),
    ],
)
def test_a_tokenizer_is_one_of_ours_and_its_arguments_are_data(tokenizer, kwargs, expected, tmp_path):
    document = json.loads(save_recipe(tmp_path, get_config("pi0_fast_droid")).read_text())
    document["config"]["model"] |= {"fast_model_tokenizer": tokenizer, "fast_model_tokenizer_kwargs": kwargs}
    with pytest.raises(ValueError, match=expected):
        load(tmp_path, document)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"version": 2}',
        '{"version": 3, "sources": {}, "config": {}}',
        '{"version": [2], "sources": {}, "config": {}}',
        '{"version": 2, "sources": [], "config": {}}',
        '{"version": 2, "sources": {}, "config": "recipe.TrainConfig"}',
        '{"version": 2, "sources": {}, "config": {}}',
        '{"version": 2, "sources": {}, "config": {"$type": "freeze.PathRegex", "pattern": "x"}}',
        '{"version": 2, "sources": {}, "config": {"$type": "recipe.TrainConfig", "name": "a", "name": "b"}}',
        '{"version": 2, "sources": {}, "config": {"$type": "recipe.TrainConfig", "name": "a", "ema_decay": NaN}}',
        '{"version": 2, "sources": {}, "config": {"$type": "recipe.TrainConfig", "name": "a", "seed": %s}}'
        % ("9" * 5000),
        '{"version": 1, "sources": {}, "config": ' + '{"a":' * 50_000 + "1" + "}" * 50_001,
        '{"version": 2, "sources": {}, "config": {"$tuple": [' + "[" * 900 + "]" * 900 + "]}}",
        "\udcff".encode("utf-8", "surrogateescape").decode("latin1"),
        " " * (2**24 + 1),
    ],
    ids=range(17),
)
def test_a_damaged_file_is_one_line_that_names_it(text, tmp_path):
    with pytest.raises(ValueError, match=r"recipe\.json") as refusal:
        load(tmp_path, text)
    assert "\n" not in str(refusal.value)


def test_fields_from_before_and_after(document, tmp_path, caplog):
    caplog.set_level("INFO", "openpi")
    del document["config"]["backend"]
    assert load(tmp_path, document) == TrainConfig(name="x")
    assert "lacks backend: the defaults hold" in caplog.text
    del document["config"]["name"]
    with pytest.raises(ValueError, match=r"config lacks the fields \['name'\]"):
        load(tmp_path, document)


def test_a_field_that_is_gone_is_left_out_and_said(document, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(recipe_table, "GONE_FIELDS", {"optimizer.AdamW": {"amsgrad": "it never did anything"}})
    document["config"]["optimizer"]["amsgrad"] = True
    assert load(tmp_path, document) == TrainConfig(name="x")
    assert "config.optimizer.amsgrad is read no more: it never did anything" in caplog.text


def test_a_wrong_type_is_refused_before_training_rather_than_after(tmp_path):
    with pytest.raises(ValueError, match="seed='8'; expected a whole number"):
        save_recipe(tmp_path, TrainConfig(name="x", seed="8"))  # type: ignore[arg-type]  # that is the point
    as_meant = TrainConfig(name="x", checkpoint_base_dir=tmp_path)  # type: ignore[arg-type]
    save_recipe(tmp_path, as_meant)
    loaded = load_recipe(tmp_path)
    assert loaded.checkpoint_base_dir == str(tmp_path)


# Code beside a checkpoint

OWN_CODE = """
import dataclasses, pathlib
from openpi.training.data_config import no_transforms as alias
pathlib.Path(__file__).with_name("ran").touch()

def own_transforms(model_config):
    return alias(model_config)
"""


def with_own_code(folder: Path, *, version: int = 2, name: str = "recipe_source.py", module: str = "theirs") -> Path:
    folder.mkdir(parents=True)
    document = json.loads(save_recipe(folder, get_config("pi0_droid")).read_text())
    if version == 1:
        document = json.loads((GOLDEN / "recipes_v1" / "pi0_droid.json").read_text())
    document["sources"] = {module: name}
    document["config"]["data"]["data_transforms"] = {"$ref": f"{module}:own_transforms"}
    (folder / "recipe.json").write_text(json.dumps(document))
    file = folder / name
    if file.parent == folder:
        file.write_text(textwrap.dedent(OWN_CODE) + f"# {folder}\n")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENPI_TRUST_CODE", raising=False)
    return tmp_path / "cache"


def test_own_code_runs_from_a_folder_of_this_machine(tmp_path, cache):
    folder = with_own_code(tmp_path / "run" / "9")
    assert load_recipe(folder).data.data_transforms(None).inputs == ()
    assert (folder / "ran").exists()


@pytest.mark.parametrize("version", [1, 2])
def test_own_code_of_a_download_runs_only_when_it_is_trusted(version, cache, monkeypatch):
    folder = with_own_code(cache / "lab" / "9", version=version)
    with pytest.raises(
        ValueError, match=r"was downloaded and brings code of its own \(recipe_source\.py\).*--trust-code"
    ):
        load_recipe(folder)
    assert recipe_name(folder) == "pi0_droid"
    assert changes_since(folder, get_config("pi0_droid"))[0][0] == "data.data_transforms"
    assert not (folder / "ran").exists()
    monkeypatch.setenv("OPENPI_TRUST_CODE", "1")
    load_recipe(folder)
    assert (folder / "ran").exists()


@pytest.mark.parametrize("command", ["verify", "explain", "infer", "serve", "export", "convert-checkpoint"])
def test_every_command_asks_before_it_runs_code_of_a_download(command, cache, tmp_path, capsys):
    folder = with_own_code(cache / "lab" / command / "9")
    (folder / "params").mkdir()
    further = {
        "infer": ["--observation", tmp_path / "o.npz", "--output", tmp_path / "a.npz"],
        "serve": ["--port", "0"],
        "export": ["--merge", "--output", tmp_path / "merged"],
        "convert-checkpoint": [tmp_path / "converted"],
    }
    np.savez(tmp_path / "o.npz", x=1)
    assert run(command, folder, *further.get(command, [])) == 1
    assert "--trust-code" in capsys.readouterr().err
    assert not (folder / "ran").exists()
    run(command, folder, *further.get(command, []), "--trust-code")
    assert (folder / "ran").exists()
    assert "OPENPI_TRUST_CODE" not in os.environ


def test_downloads_are_known_wherever_they_were_put(tmp_path, cache, monkeypatch):
    hub = tmp_path / "elsewhere" / "hub"
    snapshot = hub / "models--lab--arm" / "snapshots" / "1234"
    by_tool = tmp_path / "by_tool" / "9"
    old_cache = tmp_path / "old_cache" / "bucket" / "9"
    mirror = tmp_path / "mirror" / "9"
    for folder in (hub / ".locks", snapshot, by_tool / ".cache/huggingface/download", tmp_path / "old_cache/.locks"):
        folder.mkdir(parents=True)
    old_cache.mkdir(parents=True)
    mirror.mkdir(parents=True)
    link = tmp_path / "checkpoints" / "9"
    link.parent.mkdir()
    link.symlink_to(snapshot)
    monkeypatch.setenv("OPENPI_MIRROR", f"gs://lab={tmp_path / 'mirror'}")
    assert all(map(is_downloaded, (snapshot, by_tool, old_cache, mirror, link, cache / "lab" / "9")))
    assert not is_downloaded(tmp_path / "checkpoints" / "10")


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("../recipe_source.py", "theirs", "expected recipe_source.py"),
        ("/etc/recipe_source.py", "theirs", "expected recipe_source.py"),
        ("conftest.py", "theirs", "expected recipe_source.py"),
        ("recipe_source.py\n", "theirs", "expected recipe_source.py"),
        ("recipe_source_0.py", "theirs", "expected recipe_source.py"),
        ("recipe_source_2.py", "..theirs", "expected a dotted name"),
        ("recipe_source_2.py", "their module", "expected a dotted name"),
    ],
)
def test_sources_are_the_files_that_the_writer_makes(name, module, message, tmp_path, cache):
    folder = with_own_code(tmp_path / "run" / "9", name=name, module=module)
    with pytest.raises(ValueError, match=message):
        load_recipe(folder)


def test_a_source_does_not_lead_out_of_the_folder(tmp_path, cache):
    folder = with_own_code(tmp_path / "run" / "9")
    (folder / "recipe_source.py").rename(tmp_path / "elsewhere.py")
    with pytest.raises(ValueError, match=r"recipe_source\.py is missing from the checkpoint"):
        load_recipe(folder)
    (folder / "recipe_source.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere\.py, out of the checkpoint's folder"):
        load_recipe(folder)


def test_a_trusted_download_of_the_hub_is_made_of_links(tmp_path, cache, monkeypatch):
    repository = tmp_path / "hub" / "models--lab--arm"
    folder = with_own_code(repository / "snapshots" / "1234")
    (tmp_path / "hub" / ".locks").mkdir()
    (repository / "blobs").mkdir()
    (folder / "recipe_source.py").rename(repository / "blobs" / "abcd")
    (folder / "recipe_source.py").symlink_to("../../blobs/abcd")
    monkeypatch.setenv("OPENPI_TRUST_CODE", "1")
    assert load_recipe(folder).name == "pi0_droid"


@pytest.mark.parametrize(
    "name",
    [
        "lambda: alias",
        "lambda m: __import__('os').abort()",
        "alias",
        "dataclasses",
        "pathlib.Path",
        "own_transforms.__globals__",
        "nothing",
        "__loader__",
    ],
)
def test_own_names_are_what_the_own_file_defines(name, tmp_path, cache):
    folder = with_own_code(tmp_path / "run" / "9")
    document = json.loads((folder / "recipe.json").read_text())
    document["config"]["data"]["data_transforms"] = {"$ref": f"theirs:{name}"}
    with pytest.raises(ValueError, match=r"defines no class or function|has no 'lambda"):
        load(folder, document)


def test_own_code_that_fails_is_one_line(tmp_path, cache):
    folder = with_own_code(tmp_path / "run" / "9")
    (folder / "recipe_source.py").write_text("import no_such_package\n")
    with pytest.raises(ValueError, match=r"recipe_source\.py \(was theirs\) cannot be run: ModuleNotFoundError"):
        load_recipe(folder)


# What files name besides


def test_a_package_is_not_imported_to_find_a_file_in_it(tmp_path, monkeypatch):
    package = tmp_path / "a_package_that_runs"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "inner" / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "inner" / "file").write_text("data")
    monkeypatch.syspath_prepend(tmp_path)
    assert maybe_download("package:a_package_that_runs.inner/file").read_text() == "data"
    for url in ("../../secret", "inner/../../secret", "/etc/hostname"):
        with pytest.raises(FileNotFoundError, match="leads out of the package"):
            maybe_download(f"package:a_package_that_runs/{url}")
    for name in ("antigravity", "a_package_that_runs.nothing", "a-b", "..", "a_package_that_runs.__init__"):
        with pytest.raises(FileNotFoundError):
            load_sentencepiece(f"package:{name}/file")


@pytest.mark.parametrize("repo_id", ["a/../../../etc", "..", "../..", "a/.."])
def test_statistics_stay_below_the_assets_folder(repo_id):
    data = get_config("pi0_libero").data
    asset_id = type(data)(repo_id=repo_id).asset_id
    assert ".." not in Path(asset_id).parts
