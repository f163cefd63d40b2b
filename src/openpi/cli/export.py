"""`openpi export CHECKPOINT --merge --output DIR`: the adapters of a LoRA checkpoint added to its weights.

The result has the published layout without any adapter, for tools that know none. The update is added in float32,
and both models are run on the same random inputs before anything is written. Exit codes: 0 = written; 1 = refused or
failed; 2 = bad command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from openpi.models.model import BaseModel
    from openpi.models.model_config import BaseModelConfig

SUMMARY = "merge the adapters of a LoRA checkpoint into its weights"
TOLERANCE = 1e-4

logger = logging.getLogger("openpi")


def main(argv: list[str] | None = None) -> int:
    from openpi.cli.console import configure_logging

    args = _parser().parse_args(argv)
    configure_logging()
    try:
        merge_checkpoint(args.checkpoint, args.output, config=args.config, verify=args.verify)
    except (ValueError, OSError) as error:
        logger.debug("", exc_info=True)
        print(f"openpi export: {error}", file=sys.stderr)
        return 1
    logger.info("written: %s", args.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openpi export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a step's folder, a run's folder (its latest step), or a URL")
    parser.add_argument("--merge", action="store_true", required=True, help="add the adapters to the weights")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--config", metavar="RECIPE", help="recipe of a checkpoint that carries none")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not compare the two models before writing"
    )
    return parser


def merge_checkpoint(place: str, output: Path, *, config: str | None = None, verify: bool = True) -> None:
    """Writes the merged checkpoint, all or nothing.

    Raises:
        FileExistsError: `output` is there.
        FileNotFoundError: no checkpoint, or one without a recipe and no `config`.
        ValueError: the model has no adapters, or the merged model computes something else.
    """
    from openpi.cli import serve
    from openpi.models import lora
    from openpi.models.model import restore_params
    from openpi.models.model_config import freeze_nothing
    from openpi.training import recipe_io
    from openpi.weights import orbax_io

    if output.exists():
        raise FileExistsError(f"{output} exists; choose another --output, or move it away")
    checkpoint = serve.find_checkpoint(place)
    recipe = serve.choose_recipe(checkpoint, config)
    plain = lora.without_adapters(recipe.model)
    if plain == recipe.model:
        raise ValueError(f"the model of recipe '{recipe.name}' has no adapters; there is nothing to merge")
    params = restore_params(checkpoint / "params")
    model: Any = recipe.model
    merged = lora.merged(model.load(params).params, model.experts)
    if verify:
        _check_same_outputs(model, params, plain, merged)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        orbax_io.write_params(partial / "params", merged)
        if (checkpoint / "assets").is_dir():
            shutil.copytree(checkpoint / "assets", partial / "assets")
        if (checkpoint / "contract.json").is_file():
            shutil.copyfile(checkpoint / "contract.json", partial / "contract.json")
        recipe_io.save_recipe(partial, dataclasses.replace(recipe, model=plain, freeze_filter=freeze_nothing))
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_same_outputs(
    config: BaseModelConfig, params: dict[str, Any], plain: BaseModelConfig, merged: dict[str, Any]
) -> None:
    """Runs both on random inputs in f32.

    Raises:
        ValueError: the losses differ by more than `TOLERANCE`.
    """
    with_adapters = _loss(_in_f32(config).load(_as_f32(params)))
    error = _difference(with_adapters, _loss(_in_f32(plain).load(merged)))
    effect = _difference(with_adapters, _loss(_in_f32(plain).load(_as_f32(params))))
    logger.info("the adapters change the loss on random inputs by %.1e; merging them, by %.1e", effect, error)
    if effect <= 10 * error:
        logger.warning("the adapters hardly change the model: were they trained? The comparison says little")
    if not error <= TOLERANCE:
        raise ValueError(f"the merged model differs by {error:.1e}; expected at most {TOLERANCE}. Please report this")


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.max(np.abs(first - second) / np.maximum(np.abs(first), 1.0)))


def _in_f32(config: Any) -> Any:
    return dataclasses.replace(config, dtype="float32", augmentation=False)


def _as_f32(params: dict[str, Any]) -> dict[str, Any]:
    import jax

    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)


def _loss(model: BaseModel) -> np.ndarray:
    import jax

    observation, actions = random_inputs(model.config)
    return np.asarray(jax.jit(lambda m, o, a: m.compute_loss(jax.random.key(0), o, a))(model, observation, actions))


def random_inputs(config: BaseModelConfig, *, seed: int = 0) -> Any:
    """A batch of two with the shapes of `inputs_spec`: every mask true, tokens below 256."""
    import jax

    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.dtype == np.bool_:
            return np.ones(leaf.shape, np.bool_)
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(0, 256, leaf.shape).astype(leaf.dtype)
        return rng.uniform(-1, 1, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(lambda leaf: jax.numpy.asarray(draw(leaf)), config.inputs_spec(batch_size=2))


if __name__ == "__main__":
    sys.exit(main())
