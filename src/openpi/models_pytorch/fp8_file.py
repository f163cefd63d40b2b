"""What was measured of a checkpoint so that it can be served in FP8: data beside its weights.

fp8.json   {"version": 1, "about": {...}, "cosine": {"lowest": c, "mean": c, "target": c},
            "layers": {name: {"amax": of inputs, "weight_amax": w, "error": e, "is_fp8": true}, ...}}
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpi.shared import strict_json, whole_file
from openpi.shared.errors import first_line
from openpi.shared.tree import Tree

FP8_FILE = "fp8.json"

_VERSION = 1
_REMEDY = "`openpi calibrate-fp8` writes it again"


@dataclasses.dataclass(frozen=True)
class Layer:
    """Of a product that could be made in FP8.

    Attributes:
        amax: the largest magnitude among its inputs.
        weight_amax: that of its weights, by which a file of other weights is noticed.
        error: of its outputs on the inputs that were seen, root mean square, relative to theirs.
        is_fp8: false = it stays as it is, for accuracy.
    """

    amax: float
    weight_amax: float
    error: float
    is_fp8: bool


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Attributes:
    layers: by the names that modules have in a sampler, whose products are fused.
    lowest, mean: cosines of action chunks in FP8 and without, from the same noise.
    target: that `lowest` was to reach.
    about: what was seen, for people.
    """

    layers: Mapping[str, Layer]
    lowest: float
    mean: float
    target: float
    about: Mapping[str, Any]

    def chosen(self) -> dict[str, Layer]:
        """Those that are made in FP8."""
        return {name: layer for name, layer in self.layers.items() if layer.is_fp8}

    def save(self, folder: Path) -> Path:
        """Writes the file into a checkpoint's folder, whole or not at all."""
        document = {
            "version": _VERSION,
            "about": dict(self.about),
            "cosine": {"lowest": self.lowest, "mean": self.mean, "target": self.target},
            "layers": {name: dataclasses.asdict(layer) for name, layer in self.layers.items()},
        }
        whole_file.write_text(folder / FP8_FILE, json.dumps(document, indent=1) + "\n")
        return folder / FP8_FILE

    @classmethod
    def load(cls, folder: Path) -> Calibration:
        """Of a checkpoint.

        Raises:
            FileNotFoundError: it has none.
            ValueError: the file is damaged.
        """
        file = folder / FP8_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {FP8_FILE}, which says how large the inputs of its layers are; "
                f"`openpi calibrate-fp8 {folder}` measures it on the recipe's dataset"
            )
        try:
            return _parsed(strict_json.read(file))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} is damaged or of another version ({first_line(error)}); {_REMEDY}") from error


def _parsed(document: Tree) -> Calibration:
    if document["version"] != _VERSION:
        raise ValueError(f"version {document['version']!r}, expected {_VERSION}")
    layers = {name: _layer(name, entry) for name, entry in document["layers"].items()}
    lowest, mean, target = (float(document["cosine"][key]) for key in ("lowest", "mean", "target"))
    return Calibration(layers, lowest, mean, target, dict(document["about"]))


def _layer(name: str, entry: Tree) -> Layer:
    amax, weight_amax, error = (float(entry[key]) for key in ("amax", "weight_amax", "error"))
    if not isinstance(entry["is_fp8"], bool):
        raise TypeError(f"is_fp8 of '{name}' is {entry['is_fp8']!r}, expected true or false")
    for key, value in (("amax", amax), ("weight_amax", weight_amax)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{key} of '{name}' is {value}, expected a positive number")
    return Layer(amax, weight_amax, error, entry["is_fp8"])
