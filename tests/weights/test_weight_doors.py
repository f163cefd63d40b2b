"""What is taken from a folder of weights is what was meant, said in a line, or refused: nothing is guessed."""

import dataclasses
import json
import logging
import math
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from openpi.training.config import get_config
from openpi.weights import integrity, layout, names, opening, orbax_io, orbax_parts, released, safetensors_io, spelling
from openpi.weights.blocks import Block
from tiny_recipe import MODEL, fast

PI0: Any = MODEL
PI05 = dataclasses.replace(MODEL, pi05=True)
FAST: Any = fast.model
HEAD, EMBED = spelling.TABLE, spelling.TABLE_ALIAS


def tensors_of(config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {row.released: rng.normal(size=row.shape).astype(np.float32) for row in names.rows(config)}


TENSORS = {name: tensors_of(config) for name, config in (("pi0", PI0), ("pi05", PI05), ("fast", FAST))}


def written(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors_io.save(folder / "model.safetensors", tensors)
    return folder


def read(config: Any, folder: Path, **options: Any) -> dict[str, np.ndarray]:
    weights = opening.open_weights(config, folder, **options)
    found: dict[str, np.ndarray] = {}
    for block in weights.blocks():
        assert block.is_whole
        found[block.row.released] = np.array(block.values)
    return found


def assert_read(config: Any, folder: Path, tensors: dict[str, np.ndarray], **options: Any) -> None:
    found = read(config, folder, **options)
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda name: f"_orig_mod.{name}", "'_orig_mod.' in them (torch.compile)"),
        (lambda name: f"module.{name}", "'module.' in them (DataParallel)"),
        (lambda name: f"module._orig_mod.module.{name}", "'_orig_mod.'"),
        (lambda name: f"model._orig_mod.{name}", "'_orig_mod.'"),
        (lambda name: f"_orig_mod.model.{name}", "'_orig_mod.'"),
        (lambda name: f"model.model.{name}", "'model.' in them (a module around the model)"),
        (lambda name: f"policy.model.{name}", "'policy.'"),
        (lambda name: name.replace("layers.0", "layers.0._checkpoint_wrapped_module"), "activation checkpointing"),
        (lambda name: name.replace("paligemma.", "_fsdp_wrapped_module.paligemma.", 1), "FSDP"),
        (lambda name: f"model.{name}", None),
    ],
)
def test_wrappers_around_names_are_taken_off_and_said(tmp_path, caplog, rename, said):
    written(tmp_path, {rename(name): values for name, values in TENSORS["pi05"].items()})
    with caplog.at_level(logging.INFO, "openpi"):
        assert_read(PI05, tmp_path, TENSORS["pi05"])
        read(PI05, tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if said and said in line]) == (said is not None)
    assert said is not None or not lines


def before_4_52(name: str) -> str:
    moved = name.replace("paligemma.model.language_model.", "paligemma.language_model.model.")
    moved = moved.replace("paligemma.lm_head.", "paligemma.language_model.lm_head.")
    return moved.replace("paligemma.model.", "paligemma.")


@pytest.mark.parametrize(
    ("rename", "library"),
    [
        (before_4_52, "transformers before 4.52"),
        (lambda name: f"module.model.{before_4_52(name)}", "transformers before 4.52"),
        (lambda name: name.replace("vision_tower.vision_model.", "vision_tower."), "transformers 5.8 and later"),
    ],
)
@pytest.mark.parametrize("family", ["pi0", "fast"])
def test_names_of_other_versions_of_transformers_are_read(tmp_path, caplog, family, rename, library):
    config = {"pi0": PI0, "fast": FAST}[family]
    written(tmp_path, {rename(name): values for name, values in TENSORS[family].items()})
    with caplog.at_level(logging.INFO, "openpi"):
        assert_read(config, tmp_path, TENSORS[family])
    assert library in caplog.text


def test_names_of_our_modules_are_read(tmp_path):
    module_names = {row.released: row.torch for row in names.rows(PI05)}
    written(tmp_path, {module_names[name]: values for name, values in TENSORS["pi05"].items()})
    assert_read(PI05, tmp_path, TENSORS["pi05"])


def test_the_family_is_told_from_names_that_are_there(tmp_path):
    for missing in ("action_in_proj.weight", "state_proj.weight", "action_time_mlp_in.weight"):
        left = {name: values for name, values in TENSORS["pi0"].items() if name != missing}
        with pytest.raises(ValueError, match=rf"1 of \d+ arrays differ(.|\n)*{missing}: missing"):
            opening.open_weights(PI0, written(tmp_path, left))
        with pytest.raises(ValueError, match=r"holds pi0, and the recipe's model is pi0-FAST"):
            opening.open_weights(FAST, tmp_path)
        with pytest.raises(ValueError, match=r"holds pi0, and the recipe's model is pi0\.5; name another"):
            opening.open_weights(PI05, tmp_path)
    both = TENSORS["pi05"] | {name: values for name, values in TENSORS["pi0"].items() if "state_proj" in name}
    assert_read(PI05, written(tmp_path, both), TENSORS["pi05"])  # LeRobot leaves them in
    alone = {name: values for name, values in TENSORS["pi0"].items() if "paligemma." in name}
    with pytest.raises(ValueError, match=r"holds pi0-FAST \(or PaliGemma alone: no name of an action expert\)"):
        opening.open_weights(PI0, written(tmp_path, alone))


def test_the_family_of_a_params_folder_is_told_as_well(tmp_path):
    write_params(tmp_path / "params", PI0, TENSORS["pi0"])
    assert_read(PI0, tmp_path, TENSORS["pi0"])
    with pytest.raises(ValueError, match=r"holds pi0, and the recipe's model is pi0\.5"):
        opening.open_weights(PI05, tmp_path)


def write_params(folder: Path, config: Any, tensors: dict[str, np.ndarray]) -> None:
    blocks = (Block(row, 0, tensors[row.released]) for row in names.rows(config))
    released.write_params(folder, config, blocks, lambda row: np.dtype(np.float32))


def test_weights_of_something_else_are_named(tmp_path):
    other = {f"encoder.blocks.{i}.attn.qkv.weight": np.ones((2, 2), np.float32) for i in range(5)}
    expected = r"holds no weights of these models: it has encoder.blocks.0.attn.qkv.weight, encoder.*blocks.2.*expected"
    for config in (PI0, PI05, FAST):
        with pytest.raises(ValueError, match=expected):
            opening.open_weights(config, written(tmp_path, other))
    adapters = {f"base_model.model.{HEAD.removesuffix('weight')}lora_A.default.weight": np.ones((2, 2), np.float32)}
    with pytest.raises(ValueError, match=r"adapters of the library peft.*merge_and_unload"):
        opening.open_weights(PI0, written(tmp_path, adapters))


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"action_out_proj.SCB": np.ones(4, np.float32)}, "has 'action_out_proj.SCB' beside what the model reads"),
        ({"action_out_proj.weight.absmax": np.ones(4, np.float32)}, "'action_out_proj.weight.absmax' beside"),
        ({f"{HEAD.removesuffix('weight')}bias": np.ones(4, np.float32)}, "lm_head.bias' beside"),
        ({"action_out_proj.weight": np.ones((4, 16), np.int8)}, "has 'action_out_proj.weight' as int8.*quantised"),
    ],
)
def test_quantised_weights_and_parts_that_the_model_would_leave_out_are_refused(tmp_path, extra, said):
    extra = {name: np.resize(values, TENSORS["pi0"].get(name, values).shape) for name, values in extra.items()}
    with pytest.raises(ValueError, match=said):
        opening.open_weights(PI0, written(tmp_path, {**TENSORS["pi0"], **extra}))


# --- two names of one tensor ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_two_names_of_the_token_table_have_to_agree(tmp_path, prefix):
    table = TENSORS["pi0"][HEAD]
    spelled = {prefix + name: values for name, values in TENSORS["pi0"].items()}
    assert_read(PI0, written(tmp_path, {**spelled, prefix + EMBED: table}), TENSORS["pi0"])
    changed = table.copy()
    changed[3, :2] += [0.5, -2.0]
    with pytest.raises(ValueError) as refused:
        opening.open_weights(PI0, written(tmp_path, {**spelled, prefix + EMBED: changed}))
    said = str(refused.value)
    assert prefix + HEAD in said and prefix + EMBED in said and f"2 of {table.size:,} entries, by up to 2" in said
    assert_read(PI0, tmp_path, TENSORS["pi0"], without=[prefix + EMBED])
    assert_read(PI0, tmp_path, {**TENSORS["pi0"], HEAD: changed}, without=[prefix + HEAD])
    with pytest.raises(ValueError, match="there is no tensor nonsense"):
        opening.open_weights(PI0, tmp_path, without=["nonsense"])


def test_any_tensor_under_two_names_is_compared(tmp_path):
    name = "action_out_proj.bias"
    again = {**TENSORS["pi05"], f"_orig_mod.{name}": TENSORS["pi05"][name] + 1}
    with pytest.raises(ValueError, match=rf"under two names, (_orig_mod\.)?{name} and (_orig_mod\.)?{name}.*4 of 4"):
        opening.open_weights(PI05, written(tmp_path, again))
    with pytest.raises(ValueError, match=r"differ: shapes \(\d+,\) and \(\d+,\)"):
        opening.open_weights(PI05, written(tmp_path, {**again, f"_orig_mod.{name}": np.ones(7, np.float32)}))
    with pytest.raises(ValueError, match="by up to nan"):
        opening.open_weights(PI05, written(tmp_path, {**again, f"_orig_mod.{name}": np.full(4, np.nan, np.float32)}))


def test_the_more_exact_of_two_roundings_is_read(tmp_path):
    table = TENSORS["pi0"][HEAD]
    for rounded, exact in ((HEAD, EMBED), (EMBED, HEAD)):
        both = {**TENSORS["pi0"], exact: table, rounded: table.astype(ml_dtypes.bfloat16)}
        assert_read(PI0, written(tmp_path, both), TENSORS["pi0"])


# --- which files ---------------------------------------------------------------------------------------------------


def sharded(folder: Path, *shards: dict[str, np.ndarray], listed: dict[str, int] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        safetensors_io.save(folder / file, shard)
    places = {name: i for i, shard in enumerate(shards) for name in shard} if listed is None else listed
    index = {"weight_map": {name: files[i] for name, i in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


A, B = {"a": np.arange(4.0)}, {"b": np.ones(3)}


def test_a_single_file_beside_shards_is_refused(tmp_path):
    written(sharded(tmp_path, A, B), A | B)
    with pytest.raises(ValueError, match=r"weights twice, model.safetensors and the shards of .*index.json.*move"):
        safetensors_io.open_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(A | B, "model.safetensors")})
    )
    assert safetensors_io.open_tensors(tmp_path).keys() == {"a", "b"}


def test_an_index_that_is_not_that_of_its_shards_is_refused(tmp_path, caplog):
    for shards, listed, said in (
        ((A, B), {"a": 0, "b": 0}, r"00001-of-00002.safetensors has no b \(1 missing\)"),
        ((A, B | {"c": np.ones(1)}), {"a": 0, "b": 1}, r"has c, which .*index.json does not list"),
        ((A, B | {"a": np.zeros(4)}), {"a": 0, "b": 1}, r"a is in two shards, .*00001.* and .*00002.*differ"),
    ):
        with pytest.raises(ValueError, match=said):
            safetensors_io.open_tensors(sharded(tmp_path, *shards, listed=listed))
    assert safetensors_io.open_tensors(sharded(tmp_path, A, B | A, listed={"a": 0, "b": 1})).keys() == {"a", "b"}
    safetensors_io.save(tmp_path / "model-00003-of-00003.safetensors", B)
    safetensors_io.open_tensors(tmp_path)
    assert "does not name model-00003-of-00003.safetensors, which is not read" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "it has the key 'a' twice"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"names the file '../x.safetensors'; shards are beside it"),
        ('{"weight_map": ["a"]}', "is damaged"),
        ('{"weight_map": {"a": 3}}', "is damaged"),
        ('{"weight_map": ' + "[" * 100_000, "is damaged"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, text, said):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        safetensors_io.open_tensors(tmp_path)


def test_two_layouts_in_a_folder_are_refused(tmp_path):
    write_params(tmp_path / "params", PI0, TENSORS["pi0"])
    written(tmp_path, TENSORS["pi0"])
    with pytest.raises(ValueError, match=r"weights twice, params/ \(JAX\) and model.safetensors \(PyTorch\).*move"):
        opening.open_weights(PI0, tmp_path)


def test_weights_in_a_form_that_is_not_read_are_told(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"There is: pytorch_model\.bin\. Pickled weights are not read"):
        layout.find_layout(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"These shards lack their model\.safetensors\.index\.json"):
        layout.find_layout(tmp_path)


# --- budgets -------------------------------------------------------------------------------------------------------


def header(**changes: Any) -> bytes:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return json.dumps({"a": entry, "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}).encode()


@pytest.mark.parametrize(
    ("text", "length"),
    [
        (header(), 1 << 63),
        (header(), 99_999_999),
        (header(shape=[-2]), None),
        (header(shape=[-2, -1]), None),
        (header(shape=[True, 2]), None),
        (header(shape=[1 << 62, 1 << 62]), None),
        (header(shape="22"), None),
        (header(data_offsets=[8, 16]), None),
        (header(data_offsets=[0, 16]), None),
        (header(data_offsets=[0.0, 8.5]), None),
        (header(data_offsets=[0, 8, 16]), None),
        (header(data_offsets=[-8, 0]), None),
        (header(dtype=["F32"]), None),
        (header().replace(b"[2]", b"[NaN]"), None),
        (header().replace(b"[2]", b"[Infinity]"), None),
        (header().replace(b'"b"', b'"a"'), None),
        (b'{"a": 3}', None),
        (b"[1, 2]", None),
        (b"[" * 100_000, None),
        (b'{"a": {}, "\xff": {}}', None),
    ],
)
def test_headers_that_cannot_be_are_refused_with_file_and_fix(tmp_path, text, length):
    size = len(text) if length is None else length
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", size) + text + bytes(16))
    with pytest.raises(ValueError, match=r"model\.safetensors.*[Bb]ring it here again"):
        safetensors_io.open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"a": [1 << 62, 0]}, r"shape is \[4611686018427387904, 0\]; expected sizes"),  # NumPy has no such array
        ({"a": [0] * 40}, r"shape is \[0, 0, .*; expected sizes"),
        ({str(i): [0] for i in range(2**16 + 1)}, "it has 65537 tensors; expected 65536 at most"),
    ],
)
def test_nothing_is_a_tensor_only_in_reasonable_numbers_and_shapes(tmp_path, entries, why):
    text = json.dumps({k: {"dtype": "F32", "shape": v, "data_offsets": [0, 0]} for k, v in entries.items()}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match=rf"model\.safetensors has a damaged header \({why}"):
        safetensors_io.open_tensors(tmp_path)


def leaf(*keys: str) -> dict[str, Any]:
    return {"key_metadata": [{"key": key, "key_type": 2} for key in keys], "value_metadata": {}}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ("[" * 100_000, "_METADATA is cut off or no JSON"),
        ('{"tree_metadata": {"a": {"key_metadata": ', "_METADATA is cut off or no JSON"),
        ("[]", "_METADATA is damaged"),
        ({}, "_METADATA is damaged"),
        ({"tree_metadata": {"a": {}}}, "_METADATA is damaged"),
        ({"tree_metadata": {"a": leaf()}}, "_METADATA is damaged"),
        ({"tree_metadata": {"a": leaf("params", "..", "..", "etc")}}, "an array has the key '..'"),
        ({"tree_metadata": {"a": leaf("params", "/etc/passwd")}}, "an array has the key '/etc/passwd'"),
        ({"tree_metadata": {"a": leaf("params", "w"), "b": leaf("params", "w")}}, "it has w twice"),
        ({"tree_metadata": {"a": leaf("weights", "w")}}, r"top keys \['weights'\]; expected 'params'"),
        ({"tree_metadata": {"a": leaf("params", "other")}}, "its array params.other cannot be opened"),
    ],
)
def test_descriptions_of_arrays_that_cannot_be_are_refused(tmp_path, document, said):
    stored_array(tmp_path, {"shape": [4], "chunks": [4]})
    text = document if isinstance(document, str) else json.dumps(document)
    (tmp_path / "_METADATA").write_text(text)
    with pytest.raises(ValueError, match=said):
        orbax_parts.open_arrays(tmp_path)


def test_a_description_that_orbax_makes_nothing_of_is_refused(tmp_path):
    stored_array(tmp_path, {"shape": [4], "chunks": [4]})
    document = {"tree_metadata": {"a": {**leaf("params", "w"), "value_metadata": None}}}
    (tmp_path / "_METADATA").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="_METADATA is damaged: it describes no tree of arrays"):
        orbax_io.read_params(tmp_path)


def stored_array(folder: Path, description: dict[str, Any]) -> None:
    """An array `w` in the form of old checkpoints, a folder each."""
    (folder / "params.w").mkdir(parents=True)
    plain = {"zarr_format": 2, "dtype": "<f4", "order": "C", "compressor": None, "filters": None, "fill_value": None}
    (folder / "params.w" / ".zarray").write_text(json.dumps({**plain, **description}))
    (folder / "params.w" / "0").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": {"a": leaf("params", "w")}}))


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ({"shape": [4], "chunks": [10**10]}, r"has the shape \(4,\) and chunks of \(10000000000,\)"),
        ({"shape": [-4], "chunks": [4]}, "cannot be opened"),
        ({"shape": [4], "chunks": [0]}, "cannot be opened"),
        ({"shape": [4], "chunks": [4], "dtype": "|O"}, "cannot be opened"),
    ],
)
def test_arrays_that_cannot_be_are_refused(tmp_path, description, said):
    stored_array(tmp_path / "whole", {"shape": [4], "chunks": [4]})
    np.testing.assert_array_equal(orbax_parts.open_arrays(tmp_path / "whole")["w"].read(), np.arange(4))
    stored_array(tmp_path / "spoilt", description)
    with pytest.raises(ValueError, match=rf"spoilt is damaged.*{said}.*again"):
        orbax_parts.open_arrays(tmp_path / "spoilt")


def test_an_index_that_leads_out_of_its_folder_or_in_circles_is_refused(tmp_path, monkeypatch):
    """As `tensorstore` reports a crafted manifest; writing one takes its file format."""
    write_params(tmp_path / "params", PI0, TENSORS["pi0"])
    for location, said in (
        ("btreenode::..%2F..%2Fetc%2Fpasswd:0:10", "points to ../../etc/passwd, out of the folder"),
        ("btreenode:%2Fetc%2F:passwd:0:10", "points to /etc/passwd, out of the folder"),
    ):
        monkeypatch.setattr(integrity.tensorstore.ocdbt, "dump", lambda base, *place, at=location: _Done(circle(at)))
        with pytest.raises(ValueError, match=said):
            integrity.check_complete(tmp_path / "params")
    here = "btreenode::manifest.ocdbt:0:10"
    monkeypatch.setattr(integrity.tensorstore.ocdbt, "dump", lambda base, *place: _Done(circle(here)))
    with pytest.raises(ValueError, match=f"its node {here} is in it twice"):
        integrity.check_complete(tmp_path / "params")


def circle(location: str) -> dict[str, Any]:
    """A manifest and a node in one, whose only entry is a node at this location."""
    entry = {"key": b"", "location": location}
    return {"versions": [{"root": entry}], "entries": [entry]}


class _Done:
    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value


def test_a_checkpoint_of_full_size_opens_and_its_last_tensor_is_read(tmp_path):
    """14 GB that take no place on the disk: no other test has an offset beyond 32 bits."""
    config = get_config("pi05_droid").model
    header, end = {}, 0
    for row in names.rows(config):
        begin, end = end, end + 4 * math.prod(row.shape)
        header[row.released] = {"dtype": "F32", "shape": list(row.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    weights = opening.open_weights(config, tmp_path)
    assert end > 2**33 and len(weights.report.loaded) == len(header)
    [block] = weights.blocks(lambda name: name == list(header)[-1])
    assert not block.values.any()
