"""The same weights in every layout, as users have them."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from openpi.weights import opening, released, spelling

LAYOUTS = ("jax", "pytorch", "lerobot")


def write(source: Path, config: Any, folder: Path, kind: str, dtype: Any = np.float32) -> str:
    """Weights of a `params/` folder in another layout; returns what a recipe's weight loader is given."""
    weights, wanted = opening.open_weights(config, source), np.dtype(dtype)
    blocks = released.cast(weights, wanted)
    if kind == "jax":
        released.write_params(folder / "params", config, blocks, lambda row: wanted)
        return str(folder / "params")
    folder.mkdir(parents=True)
    prefix = spelling.LEROBOT_PREFIX if kind == "lerobot" else ""
    released.write_tensors(folder / "model.safetensors", config, blocks, lambda row: wanted, prefix=prefix)
    if kind == "lerobot":
        (folder / "config.json").write_text('{"type": "pi0"}')
    return str(folder)


def read_orbax(folder: Path) -> Any:
    """All that an Orbax folder holds, such as `train_state/`, as NumPy leaves."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, ocp.args.PyTreeRestore(item=tree, restore_args=args))
