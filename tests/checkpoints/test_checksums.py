"""A checkpoint's checksums: what changed on its way is refused, what was changed on purpose can be accepted."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paths
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli.checkpoints import verify
from openpi.policies import policy_config
from openpi.training import recipe_io
from openpi.training.config import get_config
from openpi.weights import checksums, names, opening, orbax_io, released, safetensors_io
from openpi.weights.blocks import Block
from openpi.weights.checksums import CHECKSUMS_FILE

RECIPE = f"{paths.SUPPORT / 'tiny_recipe.py'}:arm"


@pytest.fixture(scope="module")
def recipe() -> Any:
    return get_config(RECIPE)


@pytest.fixture(scope="module", params=["jax", "pytorch"])
def original(request, recipe, tmp_path_factory) -> Path:
    """A checkpoint as it is written: weights of one layout, and the small files."""
    folder = tmp_path_factory.mktemp(request.param) / "step"
    rng = np.random.default_rng(0)
    blocks = (Block(row, 0, rng.normal(size=row.shape).astype(np.float32)) for row in names.rows(recipe.model))
    folder.mkdir()
    if request.param == "jax":
        released.write_params(folder / "params", recipe.model, blocks, lambda row: np.dtype(np.float32))
    else:
        released.write_tensors(folder / "model.safetensors", recipe.model, blocks, lambda row: np.dtype(np.float32))
    recipe_io.save_recipe(folder, recipe)
    (folder / "assets" / "arm").mkdir(parents=True)
    (folder / "assets" / "arm" / "norm_stats.json").write_text('{"norm_stats": {}}')
    (folder / "train_state").mkdir()
    (folder / "train_state" / "d").write_bytes(bytes(100))
    checksums.write(folder)
    return folder


@pytest.fixture
def step(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "copied" / "elsewhere")


def read(recipe: Any, step: Path) -> dict[str, bytes]:
    """What a policy reads."""
    recipe_io.load_recipe(step)
    found = {block.row.released: block.values.tobytes() for block in opening.open_weights(recipe.model, step).blocks()}
    return {**found, "statistics": (step / "assets" / "arm" / "norm_stats.json").read_bytes()}


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_a_checkpoint_that_is_whole_is_read_wherever_it_is(recipe, step, capsys):
    read(recipe, step)
    assert verify.main([str(step), f"--config={RECIPE}"]) == 0
    said = capsys.readouterr().out
    assert "as written" in said and "there is no certificate" in said and said.endswith("OK\n")


def test_every_flipped_bit_of_what_is_read_is_noticed(recipe, step):
    whole, rng, num_refused = read(recipe, step), np.random.default_rng(0), 0
    others = {"d", CHECKSUMS_FILE}  # the training state is read later, the checksums are below
    files = [file for file in step.rglob("*") if file.is_file() and file.name not in others]
    for number in range(30):
        file = files[number * max(1, len(files) // 30) % len(files)]
        bit = int(rng.integers(8 * file.stat().st_size))
        flip(file, bit)
        try:
            assert read(recipe, step) == whole  # as of a part of an Orbax folder that a later one has replaced
        except ValueError as error:
            num_refused += 1
            assert "is not what was written" in str(error) or "damaged" in str(error)
        flip(file, bit)
    assert num_refused >= 10
    assert read(recipe, step) == whole


def test_orbax_s_own_reader_notices_as_well(original, step):
    if not (step / "params").is_dir():
        pytest.skip("of the JAX layout")
    largest = max((step / "params").rglob("*"), key=lambda file: file.stat().st_size)
    flip(largest, 4 * largest.stat().st_size)
    with pytest.raises(ValueError, match=rf"{largest.name} is not what was written: bytes 0 to .* another checksum"):
        orbax_io.read_params(step / "params")


def test_a_file_that_was_edited_on_purpose_is_said_or_accepted(recipe, step, capsys, caplog):
    file = step / "assets" / "arm" / "norm_stats.json"
    file.write_text('{"norm_stats": {"state": {}}}')
    read(recipe, step)
    assert f"{file} was edited since its checkpoint was written; it is read as it is" in caplog.text
    file.write_text('{"norm_stats" :{}}')  # as long as before: a flipped bit looks no other
    with pytest.raises(ValueError, match=rf"norm_stats.json is not what was written: bytes .*verify {step} --accept"):
        policy_config.load_pipeline(recipe, Checkpoint(step))
    assert verify.main([str(step)]) == 1
    assert "norm_stats.json is not what was written" in capsys.readouterr().err
    assert verify.main([str(step), "--accept"]) == 0
    assert capsys.readouterr().out.startswith("assets/arm/norm_stats.json: changed\nwritten: ")
    read(recipe, step)


def test_weights_that_were_replaced_are_read_and_said(recipe, step, caplog, capsys):
    """As people do who rename tensors, merge or average weights in a copy of a checkpoint."""
    weights = opening.open_weights(recipe.model, step)
    blocks = [Block(block.row, block.start, block.values * 2) for block in weights.blocks()]
    if (step / "params").is_dir():
        shutil.rmtree(step / "params")
        released.write_params(step / "params", recipe.model, blocks, lambda row: np.dtype(np.float32))
    else:
        tensors = {f"module.{block.row.released}": block.values for block in blocks}
        safetensors_io.save(step / "model.safetensors", tensors)
    found = {block.row.released: block.values for block in opening.open_weights(recipe.model, step).blocks()}
    for block in blocks:
        np.testing.assert_array_equal(found[block.row.released], block.values)
    assert "was replaced since its checkpoint was written; it is read as it is" in caplog.text
    assert verify.main([str(step), f"--config={RECIPE}"]) == 1
    assert "--accept" in capsys.readouterr().err


def test_files_may_be_added_and_training_state_left_out(recipe, step, capsys):
    (step / "KEEP").touch()
    (step / "notes.txt").write_text("the good one")
    shutil.rmtree(step / "train_state")
    read(recipe, step)
    assert verify.main([str(step), f"--config={RECIPE}"]) == 0
    shutil.rmtree(step / "assets")
    assert verify.main([str(step), f"--config={RECIPE}"]) == 1
    assert "lacks 1 of the files that were written, such as assets/arm/norm_stats.json" in capsys.readouterr().err


def test_checkpoints_without_checksums_are_read_as_before(recipe, step, capsys):
    (step / CHECKSUMS_FILE).unlink()
    read(recipe, step)
    assert verify.main([str(step), f"--config={RECIPE}"]) == 1
    assert "there is nothing to compare with" in capsys.readouterr().err
    assert verify.main([str(step), "--accept"]) == 0
    read(recipe, step)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"version": 1, "algorithm": "crc32", "piece_bytes": 0, "files": {}}',
        '{"version": 2, "algorithm": "crc32", "piece_bytes": 8, "files": {}}',
        '{"version": 1, "algorithm": "crc32", "piece_bytes": 8, "files": {"a": {"bytes": 9, "pieces": ["00000000"]}}}',
        "[" * 100_000,
    ],
)
def test_damaged_checksums_say_what_to_do(recipe, step, text):
    (step / CHECKSUMS_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"checksums.json is damaged or of another version.*--accept"):
        read(recipe, step)
    assert verify.main([str(step), "--accept"]) == 0
    read(recipe, step)


def test_only_the_pieces_of_what_is_read_are_compared(tmp_path, monkeypatch):
    """Of a file larger than memory nothing is read ahead."""
    monkeypatch.setattr(checksums, "_PIECE_BYTES", 4096)
    arrays = {f"t{i}": np.full(1024, i, np.float32) for i in range(8)}
    safetensors_io.save(tmp_path / "model.safetensors", arrays)
    checksums.write(tmp_path)
    file = tmp_path / "model.safetensors"
    flip(file, 8 * (file.stat().st_size - 10))
    tensors = safetensors_io.open_tensors(tmp_path)
    np.testing.assert_array_equal(tensors["t0"], arrays["t0"])
    with pytest.raises(ValueError, match=r"bytes 28,672 to 32,768 have another|bytes 32,768 to .* have another"):
        np.array(tensors["t7"])
    document = json.loads((tmp_path / CHECKSUMS_FILE).read_text())
    assert len(document["files"]["model.safetensors"]["pieces"]) == 9
