"""One checkpoint, open: its folder, and what lies in it. Each file is read once, when it is wanted first.

    checkpoint = Checkpoint.open("checkpoints/fold/first")     # a step, a run (its latest step), or a URL
    checkpoint.layout; checkpoint.norm_stats("arm"); checkpoint.tokenizers; checkpoint.weights(model)
    checkpoint.read(load_recipe) -> TrainConfig; checkpoint.read(Contract.find) -> Contract | None

Recipe and contract are classes of rooms above this one, and so are their readers.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from openpi.checkpoints import find
from openpi.shared import normalize
from openpi.shared.normalize import NormStats
from openpi.weights import checksums, layout, lerobot_files, opening
from openpi.weights.blocks import Weights
from openpi.weights.compare import Shapes
from openpi.weights.layout import Layout

# Others, computed anew, would give a robot other commands.
_OWN_STATS = (
    "a checkpoint is served with the statistics that it was trained with, which training keeps in its `assets`: "
    "correct asset_id of the recipe, or copy that folder back from the run, or from where the checkpoint comes from"
)
TOKENIZER_FILE = "assets/tokenizer.model"
ACTION_TOKENIZER_DIR = "assets/action_tokenizer"
CONTRACT_FILE = "contract.json"
RECIPE_FILE = "recipe.json"

_END_BYTES = 4096

Part = TypeVar("Part")


class Checkpoint:
    """The folder of one step.

    Args:
        folder: of this machine; it is not looked into yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: dict[Hashable, Any] = {}

    @classmethod
    def open(cls, place: Path | str) -> Checkpoint:
        """Of a step, of the latest complete step of a run, or of what is at a URL, which is fetched.

        Raises:
            FileNotFoundError: there is no checkpoint; says what is there.
        """
        return cls(find.find_step(place))

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, reader: Callable[[Path], Part]) -> Part:
        """What a function makes of the folder; it is called once."""
        return self._once(reader, lambda: reader(self.folder))

    @property
    def assets(self) -> Path:
        return self.folder / "assets"

    @functools.cached_property
    def layout(self) -> Layout:
        """Of its weights.

        Raises:
            FileNotFoundError, ValueError: as of `weights.layout.find_layout`.
        """
        return layout.find_layout(self.folder)

    @property
    def identity(self) -> dict[str, str | int]:
        """Which one this is, for whoever asks its policy: `name`, of the run and the step, and `checksums`, a sum of
        those that it has. One as published has none: then, of where its weights and statistics begin and end, in
        which two trainings differ, since to read all of them takes a minute.
        """
        sums = self.folder / checksums.CHECKSUMS_FILE
        known = sums.read_bytes() if sums.is_file() else b"".join(self._ends())
        return {"name": "/".join(self.folder.absolute().parts[-2:]), "checksums": zlib.crc32(known)}

    def _ends(self) -> Iterator[bytes]:
        found = [*(self.folder / "params").rglob("*"), *self.assets.rglob("*"), *self.folder.glob("*.safetensors")]
        for path in sorted(path for path in found if path.is_file()):
            size = path.stat().st_size
            yield f"{path.relative_to(self.folder)} {size} ".encode()
            with path.open("rb") as file:
                yield file.read(_END_BYTES)
                file.seek(max(0, size - _END_BYTES))
                yield file.read()

    @property
    def tokenizers(self) -> dict[str, Path]:
        """Those that it was trained with and brings along: field of the model's config -> file or folder."""
        files = {"tokenizer_path": TOKENIZER_FILE, "action_tokenizer_path": ACTION_TOKENIZER_DIR}
        return {field: self.folder / name for field, name in files.items() if (self.folder / name).exists()}

    def norm_stats(self, asset_id: str, *, use_quantiles: bool = False) -> dict[str, NormStats]:
        """Statistics of state and actions.

        Args:
            use_quantiles: how the recipe normalizes; LeRobot's statistics are of one kind.
        Raises:
            FileNotFoundError: there are none.
            ValueError: they are damaged, or of the other kind.
        """
        return self._once(("norm_stats", asset_id, use_quantiles), lambda: self._read_stats(asset_id, use_quantiles))

    def weights(self, model: object, *, without: Sequence[str] = ()) -> Weights:
        """Compared with a model's config; arguments and errors as of `weights.opening.open_weights`."""
        return opening.open_weights(model, self.folder, without=without, layout=self.layout)

    def weights_of(self, shapes: Shapes) -> Weights:
        """Compared with a tree, path -> shape; errors as of `weights.opening.open_tree`."""
        return opening.open_tree(shapes, self.folder, layout=self.layout)

    def copy_extras(self, folder: Path) -> None:
        """What a policy needs beside weights and recipe, into another checkpoint: statistics, tokenizers, contract."""
        if self.assets.is_dir():
            shutil.copytree(self.assets, folder / "assets")
        if (self.folder / CONTRACT_FILE).is_file():
            shutil.copyfile(self.folder / CONTRACT_FILE, folder / CONTRACT_FILE)

    def _read_stats(self, asset_id: str, use_quantiles: bool) -> dict[str, NormStats]:
        if not self.assets.is_dir() and self.layout is Layout.LEROBOT:
            return lerobot_files.read_norm_stats(self.folder, use_quantiles=use_quantiles)
        return normalize.load(self.assets / asset_id, fix=_OWN_STATS)

    def _once(self, key: Hashable, read: Callable[[], Part]) -> Part:
        if key not in self._parts:
            self._parts[key] = read()
        return self._parts[key]


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Where to write a checkpoint, which gets checksums and its name at the end; nothing is left where it fails."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        checksums.write(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
