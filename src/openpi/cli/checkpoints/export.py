"""`openpi export CHECKPOINT --merge | --adapters | --full --output DIR`: a LoRA checkpoint in another form.

    --merge      the adapters added to the weights: the published layout, for tools that know no adapters. The update is
                 added in float32; before anything is written, a small model cut out of each is run on the same inputs
    --adapters   without the frozen weights, which are read from their base: MBs instead of GBs
    --full       with the frozen weights again

The result is for inference: it has no optimiser state. Exit codes: 0 = written; 1 = refused or failed; 2 = bad command
line.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from openpi.cli.console import command, configure_logging, make_parser
from openpi.shared import frameworks

if TYPE_CHECKING:
    from openpi.checkpoints.checkpoint import Checkpoint
    from openpi.models.model_config import BaseModelConfig
    from openpi.training.config import TrainConfig
    from openpi.weights.adapter_base import AdapterBase
    from openpi.weights.blocks import Weights

ModelConfig = TypeVar("ModelConfig", bound="BaseModelConfig")
TOLERANCE = 1e-4

logger = logging.getLogger(__name__)


@command("openpi export")
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    if args.base is not None and not args.adapters:
        _parser().error(
            "--base goes with --adapters; where the base of adapters has moved, correct 'base' in adapters.json"
        )
    configure_logging()
    if args.merge:
        merge_checkpoint(args.checkpoint, args.output, config=args.config, verify=args.verify)
    elif args.adapters:
        extract_adapters(args.checkpoint, args.output, config=args.config, base=args.base)
    else:
        complete_checkpoint(args.checkpoint, args.output, config=args.config)
    logger.info("written: %s", args.output)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi export", __doc__)
    parser.add_argument("checkpoint", help="a step's folder, a run's folder (its latest step), or a URL")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--merge", action="store_true", help="add the adapters to the weights")
    form.add_argument("--adapters", action="store_true", help="leave the frozen weights out; they stay in their base")
    form.add_argument("--full", action="store_true", help="put the frozen weights of the base in")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument(
        "--base",
        help="with --adapters: the base's params/, or folder with model.safetensors; default: the recipe's",
    )
    parser.add_argument("--config", metavar="RECIPE", help="recipe of a checkpoint that carries none")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="with --merge: do not compare the two models first"
    )
    return parser


def merge_checkpoint(place: str, output: Path, *, config: str | None = None, verify: bool = True) -> None:
    """Writes the merged checkpoint, all or nothing.

    Raises:
        FileExistsError: `output` is there.
        FileNotFoundError: no checkpoint, or one without a recipe and no `config`.
        ValueError: the model has no adapters, or the merged model computes something else.
        ImportError: there is no framework to compare the two with.
    """
    from openpi.models import gemma_config
    from openpi.models.model_config import freeze_nothing
    from openpi.weights.merging import MergedWeights

    checkpoint, recipe = _open(place, output, config)
    plain = gemma_config.without_adapters(recipe.model)
    if plain == recipe.model:
        raise ValueError(f"the model of recipe '{recipe.name}' has no adapters; there is nothing to merge")
    weights = checkpoint.weights(recipe.model)
    merged = MergedWeights(recipe.model, weights)
    if verify:
        _check_same_outputs(recipe.model, weights, plain, merged)
    recipe = dataclasses.replace(recipe, model=plain, freeze_filter=freeze_nothing, save_frozen_params=True)
    _write(checkpoint, output, recipe, merged)


def extract_adapters(place: str, output: Path, *, config: str | None = None, base: str | None = None) -> None:
    """Writes the checkpoint without its frozen weights, all or nothing.

    Raises:
        FileExistsError, FileNotFoundError: as of `merge_checkpoint`; or the base is not there.
        ValueError: the recipe freezes nothing, names no base, or the frozen weights are not the base's.
    """
    from openpi.weights import names, opening
    from openpi.weights.adapter_base import AdapterBase

    checkpoint, recipe = _open(place, output, config)
    base = base or getattr(recipe.start_weights, "params_path", None)
    if base is None:
        raise ValueError(f"recipe '{recipe.name}' starts from no checkpoint; name the base with --base")
    table = names.rows(recipe.model)
    frozen = {row.tree for row in table if recipe.freeze_filter(row.tree)}
    if not frozen:
        raise ValueError(f"recipe '{recipe.name}' freezes nothing: every weight may differ from the base's")
    weights = checkpoint.weights(recipe.model)
    adapter_base = AdapterBase.of(base, opening.frozen_arrays(weights, frozen))
    opening.check_base(table, adapter_base)
    _write(checkpoint, output, dataclasses.replace(recipe, save_frozen_params=False), weights, adapter_base)


def complete_checkpoint(place: str, output: Path, *, config: str | None = None) -> None:
    """Writes the checkpoint with all its weights, all or nothing.

    Raises:
        FileExistsError, FileNotFoundError: as of `merge_checkpoint`; or the base is not there.
        ValueError: the checkpoint is whole already, or its base has changed.
    """
    checkpoint, recipe = _open(place, output, config)
    weights = checkpoint.weights(recipe.model)
    if weights.base is None:
        raise ValueError(f"{checkpoint} holds all its weights; there is nothing to put in")
    _write(checkpoint, output, dataclasses.replace(recipe, save_frozen_params=True), weights)


def _open(place: str, output: Path, config: str | None) -> tuple[Checkpoint, TrainConfig]:
    from openpi.checkpoints.checkpoint import Checkpoint
    from openpi.training.recipe_io import recipe_of

    if output.exists():
        raise FileExistsError(f"{output} exists; choose another --output, or move it away")
    checkpoint = Checkpoint.open(place)
    return checkpoint, recipe_of(checkpoint, config)


def _write(
    checkpoint: Checkpoint, output: Path, recipe: TrainConfig, weights: Weights, base: AdapterBase | None = None
) -> None:
    """The checkpoint with other weights and another recipe; JAX's stays in that layout, others become PyTorch's."""
    from openpi.checkpoints.checkpoint import written_whole
    from openpi.shared.normalize import STATS_FILE
    from openpi.training import recipe_io
    from openpi.weights import released, safetensors_io
    from openpi.weights.blocks import told
    from openpi.weights.layout import Layout

    logger.info("writing %s", output)
    left_out = frozenset[str]() if base is None else base.frozen.keys()
    kept = {row.released for row in weights.table if row.tree not in left_out}
    size = released.num_bytes(recipe.model, weights.dtype, left_out=left_out)
    blocks = told(released.cast(weights, only=kept.__contains__), "written", size)
    with written_whole(output) as partial:
        if checkpoint.layout is Layout.JAX:
            released.write_params(partial / "params", recipe.model, blocks, weights.dtype, left_out=left_out)
        else:
            file = partial / safetensors_io.SINGLE_FILE
            released.write_tensors(file, recipe.model, blocks, weights.dtype, left_out=left_out)
        checkpoint.copy_extras(partial)
        if not any((partial / "assets").rglob(STATS_FILE)):
            logger.warning(
                "%s has no normalisation statistics, so neither has %s: to be served it needs those that it was "
                "trained with, in assets/<asset id>/%s",
                checkpoint,
                output,
                STATS_FILE,
            )
        recipe_io.save_recipe(partial, recipe)
        if base is not None:
            base.save(partial)


def _check_same_outputs(config: ModelConfig, weights: Weights, plain: ModelConfig, merged: Weights) -> None:
    """Runs a small model cut out of each on the same inputs, in float32: three whole ones are 40 GB of arrays.

    Raises:
        ValueError: the outputs differ by more than `TOLERANCE`.
        ImportError: no framework is installed.
    """
    from openpi.policies import parity

    backend = frameworks.choose("jax", "comparing the two models (--no-verify leaves that out)")
    with_adapters, without = parity.outputs(backend, weights, config, plain)
    (found,) = parity.outputs(backend, merged, plain)
    error, effect = _difference(with_adapters, found), _difference(with_adapters, without)
    logger.info("the adapters change the outputs on random inputs by %.1e; merging them, by %.1e", effect, error)
    if effect <= 10 * error:
        logger.warning("the adapters hardly change the model: were they trained? The comparison says little")
    if not error <= TOLERANCE:
        raise ValueError(f"the merged model differs by {error:.1e}; expected at most {TOLERANCE}. Please report this")


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.max(np.abs(first - second) / np.maximum(np.abs(first), 1.0)))
