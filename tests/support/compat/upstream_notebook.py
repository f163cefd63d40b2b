"""Runs a notebook in Jupyter's kernel: `python upstream_notebook.py FOLDER_OF_PACKAGES NOTEBOOK`."""

import os
import sys

packages, path = sys.argv[1:]
sys.path.append(packages)  # behind ours, which the notebook is for
os.environ["PYTHONPATH"] = packages
os.environ["JUPYTER_PATH"] = f"{packages}/share/jupyter"

import nbclient  # noqa: E402
import nbformat  # noqa: E402

notebook = nbformat.read(path, as_version=4)
nbformat.validate(notebook)
nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
print(sum(cell.cell_type == "code" for cell in notebook.cells), "cells")
