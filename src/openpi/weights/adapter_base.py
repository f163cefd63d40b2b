"""Checkpoints without their frozen weights: `<checkpoint>/adapters.json` says where those are.

`params/` beside it holds what was trained (adapters, and whatever else the recipe does not freeze); the rest is read
from the base, which may be a URL. A fingerprint tells another base, or one that has changed, from the right one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from openpi.shared import download
from openpi.shared.tree import flatten

ADAPTERS_FILE = "adapters.json"
_VERSION = 1
_NUM_POINTS = 4096


@dataclasses.dataclass(frozen=True)
class AdapterBase:
    """Where the frozen weights of a checkpoint are.

    Attributes:
        params_path: `params/` folder, or its URL.
        frozen: '/'-joined paths of the parameters to take from there.
        fingerprint: of these.
    """

    params_path: str
    frozen: tuple[str, ...]
    fingerprint: str

    @classmethod
    def of(cls, params_path: str, frozen: Mapping[str, Any]) -> AdapterBase:
        """Describes the frozen parameters of a model, by path, that were read from `params_path`."""
        is_place = "://" in params_path or params_path.startswith("package:")
        place = params_path if is_place else str(Path(params_path).expanduser().absolute())
        return cls(place, tuple(sorted(frozen)), fingerprint(frozen))

    @classmethod
    def load(cls, checkpoint: Path) -> AdapterBase | None:
        """Of a checkpoint's folder; None when it holds all its weights itself.

        Raises:
            ValueError: the file is damaged or of another version.
        """
        file = checkpoint / ADAPTERS_FILE
        if not file.is_file():
            return None
        try:
            document = json.loads(file.read_text())
            if document["version"] != _VERSION:
                raise ValueError(f"version {document['version']}, expected {_VERSION}")
            return cls(document["base"], tuple(document["frozen"]), document["fingerprint"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged or of another version: {error}") from error

    def save(self, checkpoint: Path) -> None:
        document = {"version": _VERSION, "base": self.params_path, "fingerprint": self.fingerprint}
        text = json.dumps({**document, "frozen": self.frozen}, indent=2) + "\n"
        partial = checkpoint / f".{ADAPTERS_FILE}.partial"
        partial.write_text(text)
        partial.replace(checkpoint / ADAPTERS_FILE)

    def folder(self) -> Path:
        """The base's `params/` on this machine, downloaded if need be.

        Raises:
            FileNotFoundError, ConnectionError: it is not there; what to do is said.
        """
        try:
            return download.maybe_download(self.params_path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"this checkpoint holds adapters only, and its base is not there: {error}. Put the base back, or "
                f"correct 'base' in {ADAPTERS_FILE}; `openpi export --full`, run where the base is, makes a checkpoint "
                "that needs none"
            ) from error

    def folders(self) -> dict[str, Path]:
        """Per frozen path the `params/` folder that holds it, also where the base has left it in a base of its own."""
        folder = self.folder()
        further = AdapterBase.load(folder.parent)
        below = {} if further is None else further.folders()
        return {path: below.get(path, folder) for path in self.frozen}

    def read(self, read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """The frozen parameters by path, in bfloat16: as training held them, and as whole checkpoints have them.

        Args:
            read: a `params/` folder -> its parameter tree; only the frozen ones are needed.
        Raises:
            ValueError: the base is not the one that was trained on.
        """
        found = flatten(read(self.folder()))
        missing = [path for path in self.frozen if path not in found]
        if missing:
            raise ValueError(f"{self.params_path} has no {missing[0]} ({len(missing)} missing); {self._expected()}")
        frozen = {path: found[path].astype(ml_dtypes.bfloat16) for path in self.frozen}
        self.check(frozen)
        return frozen

    def check(self, frozen: Mapping[str, Any]) -> None:
        """Raises ValueError unless these are the frozen parameters that were trained on."""
        if fingerprint(frozen) != self.fingerprint:
            raise ValueError(f"the weights in {self.params_path} are others than before; {self._expected()}")

    def _expected(self) -> str:
        return f"expected the base that the adapters were trained on. Correct 'base' in {ADAPTERS_FILE}"


def fingerprint(params: Mapping[str, Any]) -> str:
    """Of parameters by path, from their shapes and some thousand values of each, rounded to bfloat16."""
    digest = hashlib.sha256()
    for path in sorted(params):
        leaf = params[path]
        digest.update(f"{path}{tuple(leaf.shape)}".encode())
        digest.update(np.asarray(leaf[_spread(leaf.shape)]).astype(ml_dtypes.bfloat16).tobytes())
    return digest.hexdigest()


def _spread(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Points all over an array; slices, so that an array in parts is not put together for it."""
    per_axis = round(_NUM_POINTS ** (1 / max(1, len(shape))))
    return tuple(slice(None, None, max(1, -(-size // per_axis))) for size in shape)
