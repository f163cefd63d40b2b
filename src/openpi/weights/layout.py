"""Which layout the weights of a checkpoint folder have.

    jax       `params/`, an Orbax tree
    pytorch   `model.safetensors` or shards, in the names of the published converter
    lerobot   the same names behind `model.`, with a `config.json` that has a `type`

Source: the checkpoint specification, sections 1 to 5.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection
from pathlib import Path

from openpi.shared import strict_json
from openpi.shared.errors import first_line
from openpi.shared.file_kinds import found_instead
from openpi.shared.strict_json import Json
from openpi.weights import safetensors_io, spelling

CONFIG_FILE = "config.json"


class Layout(enum.Enum):
    JAX = "jax"
    PYTORCH = "pytorch"
    LEROBOT = "lerobot"


def find_layout(folder: Path) -> Layout:
    """Of a checkpoint's folder, or of a `params/` folder itself.

    Raises:
        FileNotFoundError: it is none; what is there is listed.
        ValueError: the header of its file is damaged.
    """
    if safetensors_io.is_here(folder):
        params = params_folder(folder)
        if params is not None and any(params.iterdir()):
            raise ValueError(
                f"{folder} has weights twice, params/ (JAX) and {safetensors_io.SINGLE_FILE} (PyTorch), and they need "
                "not be the same: move those that are not meant out of the folder"
            )
        is_lerobot = "type" in read_config(folder) or _has_prefix(safetensors_io.open_tensors(folder))
        return Layout.LEROBOT if is_lerobot else Layout.PYTORCH
    if params_folder(folder) is not None:
        return Layout.JAX
    found = sorted(path.name for path in folder.iterdir())[:10] if folder.is_dir() else []
    raise FileNotFoundError(
        f"{folder} has neither params/ nor {safetensors_io.SINGLE_FILE}; expected a checkpoint, such as "
        f"checkpoints/<recipe>/<run>/<step>. There is: {', '.join(found) or 'nothing'}{advice(found)}"
    )


def advice(found: Collection[str]) -> str:
    """On weights in a form that is not read."""
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in found):
        return f". These shards lack their {safetensors_io.INDEX_FILE}; bring the whole folder here again"
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in found):
        return ". Pickled weights are not read, since reading them runs what they say: save them with safetensors"
    return ""


def read_config(folder: Path) -> Json:
    """`config.json`, empty when there is none.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    try:
        return dict(strict_json.read(file))
    except (ValueError, TypeError) as error:
        why = found_instead(file) or first_line(error)
        raise ValueError(f"{file} is damaged ({why}); expected a JSON object") from error


def _has_prefix(stored: Collection[str]) -> bool:
    return bool(stored) and all(spelling.unwrapped(name).startswith(spelling.LEROBOT_PREFIX) for name in stored)


def step_of(weights: Path) -> Path:
    """The folder of a checkpoint, of its `params/` or of itself."""
    return weights.parent if weights.name == "params" else weights


def params_folder(folder: Path) -> Path | None:
    for params in (folder / "params", folder):
        if (params / "_METADATA").is_file() or (params.name == "params" and params.is_dir()):
            return params
    return None
