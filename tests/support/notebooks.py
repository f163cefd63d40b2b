"""The notebooks of `examples/`, run cell by cell in this process: a kernel is what `test_notebooks.py` has."""

import contextlib
import io
import json
from typing import Any

import paths

EXAMPLES = paths.ROOT / "examples"
NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def cells(name: str) -> list[dict[str, Any]]:
    """Of a notebook, as Jupyter keeps them."""
    return json.loads((EXAMPLES / name).read_text())["cells"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def is_parameters(cell: dict[str, Any]) -> bool:
    return "parameters" in cell["metadata"].get("tags", ())


def run_cells(name: str, parameters: str) -> str:
    """The output of a notebook's cells in one namespace; its cell of parameters is replaced by the given text."""
    output, namespace = io.StringIO(), {}
    with contextlib.redirect_stdout(output):
        for number, cell in enumerate(cells(name)):
            if cell["cell_type"] == "code":
                text = parameters if is_parameters(cell) else source(cell)
                exec(compile(text, f"{name}, cell {number}", "exec"), namespace)
    return output.getvalue()
