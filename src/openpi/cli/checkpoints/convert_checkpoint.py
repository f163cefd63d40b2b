"""`openpi convert-checkpoint SRC DST --to pytorch|jax|lerobot`: a checkpoint in another layout.

Tensors pass one by one: it takes less than 2 GB of memory beside the libraries' own, however large the model is.
Adapters are merged (in float32) where the target knows none, in these two. Everything that a policy needs goes along:
statistics, tokenizers, recipe, contract. The result carries a certificate for `openpi verify`.

LeRobot's processors say less than a recipe: relative actions go along, and a recipe that does more to observations or
actions, or a model that LeRobot cannot build, is refused with what would be lost.

An exported model of the first release becomes a checkpoint, with --config NAME. openpi itself serves and fine-tunes
every layout as it is; converting is for other tools. Exit codes: 0 = written; 1 = refused or failed; 2 = bad command
line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openpi.cli.console import command, configure_logging, make_parser
from openpi.shared import frameworks

if TYPE_CHECKING:
    from openpi.checkpoints.checkpoint import Checkpoint
    from openpi.cli.checkpoints._lerobot import Plan
    from openpi.shared.normalize import NormStats
    from openpi.training.config import TrainConfig
    from openpi.weights.blocks import Weights
    from openpi.weights.probe import Witness

DTYPES = ("float32", "bfloat16")

logger = logging.getLogger(__name__)


@command("openpi convert-checkpoint")
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    configure_logging()
    flags = ("to", "dtype", "certify", "weights_only", "any_model")
    target = Target(args.output, **{flag: getattr(args, flag) for flag in flags})
    convert(args.source, target, config=args.config, without=args.without)
    logger.info("written: %s", args.output)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi convert-checkpoint", __doc__)
    parser.add_argument("source", metavar="SRC", help="a step's folder, a run's folder (its latest step), or a URL")
    parser.add_argument("output", metavar="DST", type=Path, help="folder to write; must not exist")
    parser.add_argument("--to", choices=("pytorch", "jax", "lerobot"), default="pytorch", help="default: pytorch")
    parser.add_argument("--config", metavar="NAME", help="recipe of a checkpoint that carries none")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights; default: as they are")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="a tensor of the source that is left out, of two that should be one; may be repeated",
    )
    parser.add_argument(
        "--no-certify", dest="certify", action="store_false", help="do not read the result again and run it"
    )
    lerobot = parser.add_argument_group("for --to lerobot")
    lerobot.add_argument(
        "--weights-only", action="store_true", help="no processors: LeRobot can train from it, not run it"
    )
    lerobot.add_argument(
        "--any-model", action="store_true", help="also sizes and tokenizers that only a LeRobot of your own knows"
    )
    return parser


@dataclasses.dataclass(frozen=True)
class Target:
    """What is written, and where; see the flags of the command line."""

    folder: Path
    to: str = "pytorch"
    dtype: str | None = None
    certify: bool = True
    weights_only: bool = False
    any_model: bool = False


def convert(source: str, target: Target, *, config: str | None = None, without: Sequence[str] = ()) -> None:
    """Writes the checkpoint in another layout, all or nothing.

    Args:
        without: names of tensors in the source that are not meant.
    Raises:
        FileExistsError: the folder is there.
        FileNotFoundError: no checkpoint, or one without a recipe and no `config`.
        ValueError: the checkpoint does not fit the recipe's model, is in that layout already, the layout has no place
            for what the recipe does, its statistics cannot be used, or the result is not what was meant.
        OSError: the disk is too small.
        ImportError: there is no framework for the certificate.
    """
    from openpi.checkpoints.checkpoint import Checkpoint
    from openpi.policies import exported_policy
    from openpi.training.recipe_io import recipe_of

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # leaves the accelerator to whoever is using it
    if target.folder.exists():
        raise FileExistsError(f"{target.folder} exists; choose another folder, or move it away")
    if target.certify:
        frameworks.choose("jax", "the certificate (leave it out with --no-certify)")
    if (folder := exported_policy.find(source)) is not None:
        _convert_exported(folder, target, config)
        return
    checkpoint = Checkpoint.open(source)
    recipe = recipe_of(checkpoint, config)
    if checkpoint.layout.value == target.to and target.dtype is None and not without:
        raise ValueError(f"{checkpoint} is in the layout '{target.to}' already; name a --dtype to change that")
    norm_stats = _find_norm_stats(recipe, checkpoint)
    weights = checkpoint.weights(recipe.model, without=without)
    if target.to != "jax":
        recipe, weights = _without_adapters(recipe, weights)
    _write_all(target, checkpoint, recipe, weights, norm_stats)


def _convert_exported(folder: Path, target: Target, config: str | None) -> None:
    """The weights and statistics of an exported model; its graph is left behind, as a recipe says what it computes."""
    frameworks.require("jax", "an exported model of the first release")
    from openpi.checkpoints.checkpoint import Checkpoint
    from openpi.models import exported
    from openpi.policies import exported_policy
    from openpi.shared import normalize
    from openpi.training.config import AssetsConfig, get_config

    if config is None:
        raise ValueError(
            f"{folder} is an exported model of the first release, which has no recipe: name that of its robot with "
            "--config, such as pi0_aloha, pi0_aloha_sim, pi0_droid, pi0_libero or pi0_calvin"
        )
    recipe: Any = get_config(config)
    known = {robot.processor for robot in exported_policy.ROBOTS.values()} & set(exported.processors(folder))
    processor = exported.choose_processor(folder, default=min(known) if len(known) == 1 else None)
    model = dataclasses.replace(recipe.model, **exported_policy.dims(folder))
    data = dataclasses.replace(recipe.data, assets=AssetsConfig(asset_id=processor))
    recipe = dataclasses.replace(recipe, model=model, data=data)
    weights = exported_policy.open_weights(model, folder)
    with tempfile.TemporaryDirectory() as extras:
        for name in exported.processors(folder):
            normalize.save(Path(extras) / "assets" / name, exported.load_norm_stats(folder, name))
        checkpoint = Checkpoint(Path(extras))
        _write_all(target, checkpoint, recipe, weights, _find_norm_stats(recipe, checkpoint))
    logger.info("served with the statistics of '%s'; others lie beside it in assets/", processor)


def _find_norm_stats(recipe: TrainConfig, checkpoint: Checkpoint) -> tuple[str, dict[str, NormStats]] | None:
    """With their asset id; None if there are none, and says so.

    Raises:
        ValueError: they cannot be used; or a LeRobot policy's actions are relative to the state in other dimensions
            than the recipe's.
    """
    from openpi.policies import policy_config

    data_config = policy_config.data_config_of(recipe, checkpoint)
    try:
        norm_stats = policy_config.norm_stats_of(checkpoint, data_config)
    except (FileNotFoundError, ValueError) as error:
        logger.warning("no normalisation statistics go along: %s", error)
        return None
    policy_config.check_norm_stats(norm_stats, data_config, checkpoint.folder)
    assert data_config.asset_id is not None  # it says which statistics
    return data_config.asset_id, norm_stats


def _write_all(
    target: Target,
    checkpoint: Checkpoint,
    recipe: TrainConfig,
    weights: Weights,
    assets: tuple[str, dict[str, NormStats]] | None,
) -> None:
    """All or nothing; `checkpoint`: where the files beside the weights are."""
    from openpi.checkpoints.checkpoint import written_whole
    from openpi.cli.checkpoints import _lerobot
    from openpi.policies import parity
    from openpi.shared import normalize

    plan = None
    if target.to == "lerobot":
        norm_stats = None if assets is None or target.weights_only else assets[1]
        plan = _lerobot.plan(recipe, checkpoint, norm_stats, any_model=target.any_model)
    with written_whole(target.folder) as partial:
        witness = _write(partial, recipe, weights, plan, to=target.to, dtype=target.dtype)
        checkpoint.copy_extras(partial)
        if assets is not None and not (partial / "assets" / assets[0]).exists():
            normalize.save(partial / "assets" / assets[0], assets[1])
        if target.certify:
            for name, error in parity.certify(partial, recipe.model, witness).items():
                logger.info("%s: largest error of the outputs %.1e", name, error)


def _without_adapters(recipe: TrainConfig, weights: Weights) -> tuple[TrainConfig, Weights]:
    from openpi.models import gemma_config
    from openpi.models.model_config import freeze_nothing
    from openpi.weights.merging import MergedWeights

    plain = gemma_config.without_adapters(recipe.model)
    if plain == recipe.model:
        return recipe, weights
    logger.info("the adapters are merged into the weights")
    merged = MergedWeights(recipe.model, weights)
    return dataclasses.replace(recipe, model=plain, freeze_filter=freeze_nothing, save_frozen_params=True), merged


def _write(
    folder: Path, recipe: TrainConfig, weights: Weights, plan: Plan | None, *, to: str, dtype: str | None
) -> Witness:
    """Weights, recipe and the layout's own files; returns what a certificate is made of."""
    from openpi.training import recipe_io
    from openpi.weights import names, released, spelling
    from openpi.weights.blocks import told
    from openpi.weights.probe import Witness

    model: Any = recipe.model

    def dtype_of(row: names.Row) -> np.dtype:
        return weights.dtype(row) if dtype is None else _numpy_dtype(dtype)

    main_dtype = str(dtype_of(max(names.rows(model), key=lambda row: int(np.prod(row.shape)))))
    if plan is not None and main_dtype not in DTYPES:
        raise ValueError(
            f"the weights are {main_dtype}, which LeRobot does not load; name one with --dtype {DTYPES[1]}"
        )
    size = released.num_bytes(model, dtype_of)
    _check_space(folder, size)
    witness = Witness()
    read = released.cast(weights, None if dtype is None else _numpy_dtype(dtype))
    blocks = told(witness.watch(read), "written", size)
    if to == "jax":
        released.write_params(folder / "params", model, blocks, dtype_of)
    else:
        prefix = spelling.LEROBOT_PREFIX if to == "lerobot" else ""
        released.write_tensors(folder / "model.safetensors", model, blocks, dtype_of, prefix=prefix)
    recipe_io.save_recipe(folder, recipe)
    if plan is not None:
        plan.write(folder, model, dtype=main_dtype)
    elif to == "pytorch":
        _write_config(folder, model, main_dtype)
    return witness


def _numpy_dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder.parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed")


def _write_config(folder: Path, model: object, dtype: str) -> None:
    """The `config.json` of the published converter."""
    fields = ("action_dim", "action_horizon", "paligemma_variant", "action_expert_variant")
    found = {field: getattr(model, field) for field in fields if hasattr(model, field)}
    document = json.dumps({**found, "precision": dtype}, indent=2, default=dataclasses.asdict)
    (folder / "config.json").write_text(document + "\n")
