"""Orbax trees on disk: the published `params/` folders and the `train_state/` of training.

Reads go straight to the wanted dtype, leaf by leaf, and never touch what was not asked for; writes go to a temporary
sibling that is renamed. Source: the checkpoint specification, sections 1.1 to 1.3.
"""

import functools
import logging
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import DTypeLike

from openpi.shared import download
from openpi.shared.tree import Params, flatten, unflatten
from openpi.weights.checksums import Checksums
from openpi.weights.integrity import check_complete
from openpi.weights.safetensors_io import is_here

# A process of several gives up on the others' parts of a checkpoint after this.
_WRITE_TIMEOUT_S = 3600

# Orbax warns about files that only its newer layouts have.
logging.getLogger("absl").setLevel(logging.ERROR)


def read_params(
    path: Path | str,
    *,
    dtype: DTypeLike | None = None,
    as_numpy: bool = True,
    sharding: jax.sharding.Sharding | None = None,
) -> Params:
    """The parameter tree below the top key `params`, whichever of the two published leaf flavours it has.

    What the folder itself has: of adapters alone nothing is read from their base (`models.model.restore_params` does).

    Args:
        path: the `params/` folder, local or remote.
        dtype: cast while reading; None keeps each leaf's own.
        as_numpy: NumPy leaves, else `jax.Array`s on `sharding` (default: the first device).
    Raises:
        FileNotFoundError: no such folder.
        ValueError: not an Orbax tree with the top key `params`, or one that is damaged.
    """
    folder = _existing(path)
    tree = _metadata(folder)
    if "params" not in tree:
        raise ValueError(f"{folder} holds the top keys {sorted(tree)}; expected 'params'")
    read = _restore(folder, {"params": tree["params"]}, _restore_arg(dtype, as_numpy, sharding))
    return _strip_value_level(read["params"])


def leaf_metadata(path: Path | str) -> Params:
    """Every leaf of a stored tree as `leaves_by_path` names it; each has a shape and a dtype. No data is read.

    Raises:
        FileNotFoundError: no such folder.
    """
    return leaves_by_path(_metadata(_existing(path)))


def read_leaves(path: Path | str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Leaves of a stored tree as arrays on their devices; each process reads the parts that its devices hold.

    Args:
        wanted: dtype and sharding (None = the first device) by the names of `leaf_metadata`, all of them stored.
    Raises:
        FileNotFoundError: no such folder.
    """
    folder = _existing(path)
    tree = _metadata(folder)

    def arg(key_path: Iterable[object], _: object) -> ocp.RestoreArgs:
        leaf = wanted.get(_path_text(key_path))
        if leaf is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return _restore_arg(leaf.dtype, as_numpy=False, sharding=leaf.sharding)(leaf)

    args = jax.tree_util.tree_map_with_path(arg, tree)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder, ocp.args.PyTreeRestore(item=tree, restore_args=args))
    return {path: leaf for path, leaf in leaves_by_path(restored).items() if path in wanted}


def leaves_by_path(tree: object) -> Params:
    """Leaves by '/'-joined path through dicts, lists and dataclasses, without the extra last level `value`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_path_text(key_path): leaf for key_path, leaf in leaves}


def _path_text(key_path: Iterable[object]) -> str:
    return "/".join(_key_text(key) for key in key_path).removesuffix("/value")


def _key_text(key: object) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    raise TypeError(f"unknown tree key {key!r}")


def write_params(path: Path | str, params: Mapping[str, object]) -> None:
    """Writes a parameter tree in the layout of the released checkpoints.

    Raises:
        FileExistsError: something is there already.
    """
    write_tree(path, {"params": dict(params)})


def begin_write(trees: Mapping[Path, object]) -> Callable[[], None]:
    """Copies trees of arrays off the devices; the function returned writes them, in whatever thread.

    In a run of several processes all of them call both; each writes the parts that it holds.

    Args:
        trees: by the folder to write to, of which nothing may be there.
    """
    if jax.process_count() == 1:
        copies = jax.device_get(dict(trees))
        return functools.partial(_write_trees, copies)
    writers = [ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=_WRITE_TIMEOUT_S) for _ in trees]
    for writer, (path, tree) in zip(writers, trees.items(), strict=True):
        writer.save(path.absolute(), args=ocp.args.PyTreeSave(tree))

    def finish() -> None:
        for writer in writers:
            writer.close()

    return finish


def write_tree(path: Path | str, tree: object) -> None:
    """Writes any pytree of arrays as an Orbax (OCDBT, zarr v2) folder, all or nothing.

    Raises:
        FileExistsError: something is there already.
    """
    target = Path(path).absolute()
    if target.exists():
        raise FileExistsError(f"{target} exists already; choose another folder or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(partial, tree)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_trees(trees: Mapping[Path, object]) -> None:
    for path, tree in trees.items():
        write_tree(path, tree)


def _existing(path: Path | str) -> Path:
    folder = Path(download.maybe_download(str(path))).absolute()
    if is_here(folder):
        raise ValueError(
            f"{folder} holds PyTorch weights, which cannot be read here without the model's dimensions; expected a "
            "`params` folder. `openpi convert-checkpoint --to jax` makes one"
        )
    if not (folder / "_METADATA").exists():
        raise FileNotFoundError(
            f"{folder} is not a parameter folder: it has no _METADATA file. Expected the `params` folder of a "
            "checkpoint, as in <checkpoint>/params"
        )
    check_complete(folder)
    sums = Checksums.of_weights(folder)
    if sums is not None:
        sums.check_below(folder, (jax.process_index(), jax.process_count()))
    return folder


def _metadata(folder: Path) -> dict[str, object]:
    """The stored tree with shape and dtype at the leaves."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(folder)
    # Orbax before 0.11.? returned the tree itself, later versions an object around it.
    item = getattr(metadata, "item_metadata", metadata)
    tree = getattr(item, "tree", item)
    if not isinstance(tree, Mapping):  # what Orbax cannot read is None to it
        raise ValueError(
            f"{folder / '_METADATA'} is damaged: it describes no tree of arrays. Bring the folder here again"
        )
    return dict(tree)


def _restore(folder: Path, tree: object, restore_arg: Callable[[object], ocp.RestoreArgs]) -> Params:
    args = jax.tree.map(restore_arg, tree)
    with ocp.PyTreeCheckpointer() as checkpointer:
        # Without transformations, the tree may be a part of what is stored.
        return checkpointer.restore(folder, ocp.args.PyTreeRestore(item=tree, restore_args=args, transforms={}))


def _restore_arg(
    dtype: Any, as_numpy: bool, sharding: jax.sharding.Sharding | None
) -> Callable[[object], ocp.RestoreArgs]:
    if as_numpy:
        return lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    # The stored sharding names the devices of the machine that wrote the tree; always say where to go.
    place = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return lambda _: ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=dtype, sharding=place)


def _strip_value_level(tree: Mapping[str, object]) -> Params:
    """Training trees carry one extra last key `value` on every leaf; released ones do not."""
    flat = flatten(tree)
    suffix = "/value" if all(path.endswith("/value") for path in flat) else ""
    return unflatten({path.removesuffix(suffix): leaf for path, leaf in flat.items()})
