"""The notebooks of `examples/` as files; their cells run in `test_published_programs.py`, and in Jupyter's kernel:

OPENPI_UPSTREAM=1 pytest -m upstream tests/house/test_notebooks.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import paths
from notebooks import EXAMPLES, NOTEBOOKS, cells, is_parameters, run_cells, source

KERNEL = ("nbclient", "ipykernel")


def test_the_published_notebooks_are_there_and_one_of_our_own():
    assert {"inference.ipynb", "policy_records.ipynb", "from_dataset_to_report.ipynb"} <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs_and_opens_in_any_version(name: str):
    notebook = json.loads((EXAMPLES / name).read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert sum(is_parameters(cell) for cell in notebook["cells"]) == 1
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    for cell in code:
        compile(source(cell), name, "exec")


def test_from_dataset_to_report_begins_with_a_recorded_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its cells up to the statistics; the others train, and run in a kernel when asked for."""
    import notebooks

    upto = next(n for n, cell in enumerate(cells("from_dataset_to_report.ipynb")) if "openpi explain" in source(cell))
    first = cells("from_dataset_to_report.ipynb")[:upto]
    monkeypatch.setattr(notebooks, "cells", lambda name: first)
    text = run_cells("from_dataset_to_report.ipynb", parameters(tmp_path / "work"))
    assert "2 episodes" in text and "image: image[64, 64, 3]" in text
    assert (tmp_path / "work" / "dataset" / "meta" / "info.json").is_file()


def parameters(work: Path, demonstrations: int = 2) -> str:
    """Of the smallest run: it learns nothing."""
    return f"DEMONSTRATIONS, TRAIN_STEPS, TRIALS, WORK, BACKEND = {demonstrations}, 2, 1, {str(work)!r}, 'jax'"


@pytest.mark.upstream
@pytest.mark.skipif(not os.environ.get("OPENPI_UPSTREAM"), reason="set OPENPI_UPSTREAM=1; needs a package index")
def test_from_dataset_to_report_runs_in_a_kernel(tmp_path: Path):
    install = ["uv", "pip", "install", "--quiet", "--python", sys.executable, "--target", str(tmp_path / "kernel")]
    subprocess.run([*install, *KERNEL], check=True, cwd=tmp_path)
    notebook = json.loads((EXAMPLES / "from_dataset_to_report.ipynb").read_text())
    (cell,) = (cell for cell in notebook["cells"] if is_parameters(cell))
    cell["source"] = [parameters(tmp_path / "work", demonstrations=10)]  # of which the recipe holds eight out
    (tmp_path / "notebook.ipynb").write_text(json.dumps(notebook))
    program = paths.SUPPORT / "compat" / "upstream_notebook.py"
    command = [sys.executable, str(program), str(tmp_path / "kernel"), str(tmp_path / "notebook.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "work" / "evaluation" / "report.html").is_file()
