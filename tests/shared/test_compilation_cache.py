"""What is compiled outlives the process, whichever command has compiled it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_recipe
from openpi.checkpoints.checkpoint import Checkpoint
from openpi.cli.debugging import infer
from openpi.cli.serving import server
from openpi.cli.training import train
from openpi.shared.frameworks import COMPILED_IN
from openpi.training.config import get_config

RECIPE = f"{tiny_recipe.__file__}:tiny"


def refused_by_train(folder: Path) -> None:
    assert train.main([RECIPE, f"--checkpoint-base-dir={folder}"]) == 1  # it has no name


def refused_by_serve(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        server.load_policy(server.Args(str(folder / "nothing")))


def refused_by_infer(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        infer.load_policy(get_config(RECIPE), Checkpoint(folder / "nothing"), {}, None)


@pytest.mark.parametrize("command", [refused_by_train, refused_by_serve, refused_by_infer])
def test_commands_say_where_before_a_framework_looks(
    command: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/chosen")  # by the user
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    command(tmp_path)
    assert {name: os.environ.get(name) for name in COMPILED_IN} == {
        "JAX_COMPILATION_CACHE_DIR": "/chosen",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / ".cache/openpi/torch_inductor"),
    }


def test_pytorch_looks_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir_utils = pytest.importorskip("torch._inductor.runtime.cache_dir_utils")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "programs"))
    assert cache_dir_utils.cache_dir() == str(tmp_path / "programs")
