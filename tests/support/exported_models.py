"""Exported models in the layout of the first release, with a graph whose answers say what it was given."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
from jax import export

from openpi.models.pi0_config import Pi0Config
from openpi.shared.tree import unflatten
from openpi.weights import names, orbax_io
from tiny_recipe import MODEL

HORIZON, WIDTH, NUM_TOKENS, SIDE = 10, 24, 48, 28
CONFIG: Any = Pi0Config(**{**vars(MODEL), "action_dim": WIDTH, "action_horizon": HORIZON, "max_token_len": NUM_TOKENS})
SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def answer(params: Any, rng: Any, example: Any, options: Any) -> dict:
    """Step k: the state, plus k/10; dimension 20 counts tokens, 21 masks, 22 is the brightness of the first camera, 23
    the number of denoising steps.
    """
    del rng
    images = example["image"]
    rows = example["state"] + jnp.arange(HORIZON)[:, None] / 10 + 0 * params["decoder"]["action_out_proj"]["bias"]
    masks = sum(value.astype(jnp.float32) for name, value in images.items() if name.endswith("_mask"))
    first = next(value for name, value in images.items() if not name.endswith("_mask"))
    seen = [example["mask_input"].sum(), masks, first.mean() / 255, options["num_steps"]]
    return {"actions": rows.at[:, 20:].set(jnp.stack([jnp.asarray(value, jnp.float32) for value in seen]))}


def spec(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def graph_of(function: Any = answer, *, slots: tuple[str, ...] = SLOTS, **checks: Any) -> bytearray:
    params = {"decoder": {"action_out_proj": {"bias": spec((WIDTH,), jnp.float32)}}}
    images = {slot: spec((SIDE, SIDE, 3), jnp.uint8) for slot in slots}
    example = {
        "image": {**images, **{f"{slot}_mask": spec((), jnp.bool_) for slot in slots}},
        "state": spec((WIDTH,), jnp.float32),
        "prompt_tokens": spec((NUM_TOKENS,), jnp.int32),
        "mask_input": spec((NUM_TOKENS,), jnp.bool_),
    }
    options = {"num_steps": spec((), jnp.int32)}
    exported = export.export(jax.jit(function), platforms=["cpu"], **checks)
    return exported(params, spec((2,), jnp.uint32), example, options).serialize()


def stats(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"mean": rng.normal(size=WIDTH).astype(np.float32), "std": rng.uniform(0.5, 2, WIDTH).astype(np.float32)}


def write(folder: Path, processors: tuple[str, ...], **graph: Any) -> Path:
    """`folder`/model, of the tiny model's weights; the first processor in the newer form, others in the older one."""
    model = folder / "model"
    rng = np.random.default_rng(0)
    shapes = names.tree_shapes(CONFIG)
    decoder = {f"decoder/{path}": rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    orbax_io.write_params(model, {**unflatten(decoder), "unused": np.zeros(1, np.float32)})
    (model / "graph").write_bytes(graph_of(**graph))
    for i, name in enumerate(processors):
        state, actions = stats(2 * i), stats(2 * i + 1)
        if i == 0:
            write_msgpack(
                model, f"{name}/0_normalize", {"input_norms": {"state": state}, "output_norms": {"actions": actions}}
            )
        else:
            write_msgpack(model, f"{name}/0_normalize_actions", actions)
            write_msgpack(model, f"{name}/1_normalize_state", state)
    return model


def write_msgpack(model: Path, step: str, tree: dict) -> None:
    file = model / "processors" / step / "norm_stats.msgpack"
    file.parent.mkdir(parents=True)
    file.write_bytes(msgpack.packb(tree, default=_packed))


def _packed(array: np.ndarray) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))
