"""Recorded arrays in a small, lossless form: each different array once, images as lossless WebP.

A folder `packed/` holds `index.json` (set -> key -> where it is), `arrays.npz` and `*.webp`. An entry is an array of
`arrays.npz`, an image file with the array's shape, or rows of another key of the same set.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def load(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of one set, by key."""
    index = json.loads((folder / "index.json").read_text())[name]
    arrays = np.load(folder / "arrays.npz")
    loaded = {key: _read(folder, arrays, entry) for key, entry in index.items() if "rows_of" not in entry}
    for key, entry in index.items():
        if "rows_of" in entry:
            loaded[key] = loaded[entry["rows_of"]][entry["rows"]]
    return loaded


def _read(folder: Path, arrays, entry: dict) -> np.ndarray:
    if "array" in entry:
        return arrays[entry["array"]]
    with Image.open(folder / entry["image"]) as image:
        return np.asarray(image.convert("RGB")).reshape(entry["shape"])
