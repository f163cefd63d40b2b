"""Either framework is enough: what the other brings is neither imported nor asked for, and a missing one is named.

In environments that have only one, which takes a package index and some GB:

    OPENPI_UPSTREAM=1 pytest -m upstream tests/house/test_one_backend.py
"""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import one_backend
from openpi.cli.main import main
from openpi.policies.libero_policy import make_libero_example
from openpi.shared import frameworks
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from paths import GOLDEN, ROOT, SUPPORT
from serving_live import wait_for_line

PATIENCE_S = 300.0
EXTRAS = {"jax": "jax", "pytorch": "torch"}


def check_work(python: Path | str, backend: str, dataset: Path, folder: Path) -> None:
    """`one_backend` in a process that has imported nothing yet; its server answers."""
    command = [str(python), "-W", "error", str(SUPPORT / "one_backend.py"), backend, str(dataset), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for_line(process, "Policy server on ws://")
            port = int((folder / "port").read_text())
            with WebsocketClientPolicy("127.0.0.1", port, connect_timeout_s=PATIENCE_S) as client:
                actions = client.infer(make_libero_example())["actions"]
            assert actions.shape == (5, 7) and np.isfinite(actions).all()
            process.terminate()
            process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0
        finally:
            process.kill()


@pytest.mark.parametrize("backend", ["pytorch", "jax"])
def test_training_serving_and_conversion_import_no_other_framework(backend, arm_dataset, tmp_path):
    if backend == "pytorch":
        pytest.importorskip("torch")
    check_work(sys.executable, backend, arm_dataset, tmp_path)


@pytest.mark.upstream
@pytest.mark.skipif(not os.environ.get("OPENPI_UPSTREAM"), reason="set OPENPI_UPSTREAM=1; needs a package index")
@pytest.mark.parametrize("backend", ["pytorch", "jax"])
def test_an_environment_with_one_extra_trains_serves_and_converts(backend, arm_dataset, tmp_path):
    environment = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(tmp_path / "environment")}
    sync = ["uv", "sync", "--quiet", "--no-default-groups", "--extra", EXTRAS[backend]]
    subprocess.run(sync, check=True, cwd=ROOT, env=environment)
    python = tmp_path / "environment" / "bin" / "python"
    absent = [*one_backend.OTHERS[backend], "mujoco", "gymnasium"]
    program = f"import importlib.util as u; print([name for name in {absent} if u.find_spec(name)])"
    found = subprocess.run([python, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
    folder = tmp_path / "work"
    folder.mkdir()
    check_work(python, backend, arm_dataset, folder)


@pytest.fixture
def only(monkeypatch):
    """Only the named frameworks are installed."""

    def these(*backends: str) -> None:
        missing = {package for name, package in frameworks.PACKAGES.items() if name not in backends}
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name in missing else find_spec(name, *rest)
        )

    return these


FROZEN = GOLDEN / "checkpoint_v1" / "1"
TRAIN = ("train", f"{SUPPORT / 'tiny_recipe.py'}:tiny", "--exp-name=x")
INFER = ("infer", FROZEN, "--observation={observation}", "--output=actions.npz")
CONVERT = ("convert-checkpoint", FROZEN, "converted", "--to=pytorch")


@pytest.mark.parametrize(
    ("there", "words", "expected"),
    [
        ("pytorch", TRAIN, r"backend=jax needs JAX; .*--extra jax .*PyTorch is installed: --backend=pytorch"),
        ("jax", (*TRAIN, "--backend=pytorch"), r"backend=pytorch needs PyTorch; .*--extra torch .*: --backend=jax"),
        ("", TRAIN, r"backend=jax needs JAX; .*--extra jax "),
        ("pytorch", (*TRAIN[:2], "--plan"), r"--plan needs JAX; .*--extra jax "),
        ("pytorch", (*INFER, "--backend=jax"), r"backend=jax needs JAX; .*: --backend=pytorch"),
        ("jax", (*INFER, "--pytorch-device=cpu"), r"backend=pytorch needs PyTorch; .*--extra torch "),
        ("pytorch", ("infer", TRAIN[1], *INFER[2:]), r"a recipe without a checkpoint needs JAX"),
        ("", INFER, r"a policy needs JAX or PyTorch, and neither is installed; .*--extra jax .*'torch'"),
        ("", CONVERT, r"the certificate \(leave it out with --no-certify\) needs JAX or PyTorch"),
        ("jax", ("calibrate-fp8", FROZEN), r"FP8 needs PyTorch; .*--extra torch "),
    ],
)
def test_a_missing_framework_is_one_line_with_its_extra(
    there, words, expected, only, tmp_path, monkeypatch, capsys, recwarn
):
    monkeypatch.chdir(tmp_path)
    np.savez("observation.npz", **{key: np.asarray(value) for key, value in make_libero_example().items()})
    only(*there.split())
    assert main([str(word).format(observation="observation.npz") for word in words]) == 1
    [line] = [text for text in capsys.readouterr().err.splitlines() if text.startswith("openpi ")]
    assert re.search(expected, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["observation.npz"]


def test_no_extra_brings_two_versions_of_cuda_and_a_server_no_simulator():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = [pin.partition("==")[0] for pin in project["tool"]["uv"]["constraint-dependencies"]]
    assert not [name for name in pins if "cu12" in name or "cuda12" in name]
    base = " ".join(project["project"]["dependencies"])
    assert not [name for name in ("jax", "optax", "torch", "mujoco", "gymnasium") if f"{name}>" in base]
    assert "huggingface-hub" in base and "filelock" in base
    assert project["tool"]["uv"]["default-groups"] == ["dev", "jax"]
