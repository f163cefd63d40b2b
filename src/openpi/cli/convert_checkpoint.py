"""`openpi convert-checkpoint SRC DST --to pytorch|jax|lerobot`: a checkpoint in another layout.

Tensors pass one by one: it takes less than 2 GB of memory beside the libraries' own, however large the model is.
Adapters are merged (in float32) where the target knows none, in these two. Everything that a policy needs goes along:
statistics, tokenizers, recipe, contract. The result carries a certificate for `openpi verify`.

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
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from openpi.training.config import TrainConfig
    from openpi.weights.layout import Weights

SUMMARY = "a checkpoint in another layout: JAX, PyTorch or LeRobot"

DTYPES = ("float32", "bfloat16")

logger = logging.getLogger("openpi")


def main(argv: list[str] | None = None) -> int:
    from openpi.cli.console import configure_logging

    args = _parser().parse_args(argv)
    configure_logging()
    try:
        convert(
            args.source,
            args.output,
            to=args.to,
            config=args.config,
            dtype=args.dtype,
            without=args.without,
            with_certificate=args.certify,
        )
    except (ValueError, OSError, ImportError) as error:
        logger.debug("", exc_info=True)
        print(f"openpi convert-checkpoint: {error}", file=sys.stderr)
        return 1
    logger.info("written: %s", args.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openpi convert-checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    return parser


def convert(
    source: str,
    output: Path,
    *,
    to: str = "pytorch",
    config: str | None = None,
    dtype: str | None = None,
    without: Sequence[str] = (),
    with_certificate: bool = True,
) -> None:
    """Writes the checkpoint in another layout, all or nothing.

    Args:
        without: names of tensors in the source that are not meant.

    Raises:
        FileExistsError: `output` is there.
        FileNotFoundError: no checkpoint, or one without a recipe and no `config`.
        ValueError: the checkpoint does not fit the recipe's model, is in that layout already, or the result is not
            what was meant.
        OSError: the disk is too small.
    """
    from openpi.cli import serve
    from openpi.weights import layout

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # leaves the accelerator to whoever is using it
    if output.exists():
        raise FileExistsError(f"{output} exists; choose another folder, or move it away")
    if (folder := _exported_folder(source)) is not None:
        _convert_exported(folder, output, to=to, config=config, dtype=dtype, with_certificate=with_certificate)
        return
    checkpoint = serve.find_checkpoint(source)
    recipe = serve.choose_recipe(checkpoint, config)
    if layout.find_layout(checkpoint).value == to and dtype is None and not without:
        raise ValueError(f"{checkpoint} is in the layout '{to}' already; name a --dtype to change that")
    weights = layout.open_weights(recipe.model, checkpoint, without=without)
    if to != "jax":
        recipe, weights = _without_adapters(recipe, weights)
    _write_all(output, checkpoint, recipe, weights, to=to, dtype=dtype, with_certificate=with_certificate)


def _exported_folder(source: str) -> Path | None:
    """The folder of an exported model of the first release, if the source is one."""
    from openpi.policies import exported_policy
    from openpi.shared import download

    folder = exported_policy.model_folder(download.maybe_download(source))
    return folder if exported_policy.is_exported(folder) else None


def _convert_exported(folder: Path, output: Path, *, config: str | None, **options: Any) -> None:
    """The weights and statistics of an exported model; its graph is left behind, as a recipe says what it computes."""
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
        _write_all(output, Path(extras), recipe, weights, **options)
    logger.info("served with the statistics of '%s'; others lie beside it in assets/", processor)


def _write_all(
    output: Path,
    checkpoint: Path,
    recipe: TrainConfig,
    weights: Weights,
    *,
    to: str,
    dtype: str | None,
    with_certificate: bool,
) -> None:
    """All or nothing; `checkpoint`: where the files beside the weights are."""
    from openpi.weights import checksums

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write(partial, checkpoint, recipe, weights, to=to, dtype=dtype, with_certificate=with_certificate)
        checksums.write(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _without_adapters(recipe: TrainConfig, weights: Weights) -> tuple[TrainConfig, Weights]:
    from openpi.models import lora
    from openpi.models.model_config import freeze_nothing
    from openpi.weights.merging import MergedWeights

    plain = lora.without_adapters(recipe.model)
    if plain == recipe.model:
        return recipe, weights
    logger.info("the adapters are merged into the weights")
    merged = MergedWeights(recipe.model, weights)
    return dataclasses.replace(recipe, model=plain, freeze_filter=freeze_nothing, save_frozen_params=True), merged


def _write(
    folder: Path,
    checkpoint: Path,
    recipe: TrainConfig,
    weights: Weights,
    *,
    to: str,
    dtype: str | None,
    with_certificate: bool,
) -> None:
    from openpi.policies import parity
    from openpi.training import recipe_io
    from openpi.weights import names, released, spelling
    from openpi.weights.probe import Witness

    model: Any = recipe.model

    def dtype_of(row: names.Row) -> np.dtype:
        return weights.dtype(row) if dtype is None else _numpy_dtype(dtype)

    _check_space(folder, released.num_bytes(model, dtype_of))
    witness = Witness()
    blocks = witness.watch(released.cast(weights, None if dtype is None else _numpy_dtype(dtype)))
    if to == "jax":
        released.write_params(folder / "params", model, blocks, dtype_of)
    else:
        prefix = spelling.LEROBOT_PREFIX if to == "lerobot" else ""
        released.write_tensors(folder / "model.safetensors", model, blocks, dtype_of, prefix=prefix)
    norm_stats = _copy_extras(checkpoint, folder, recipe)
    recipe_io.save_recipe(folder, recipe)
    main_dtype = str(dtype_of(max(names.rows(model), key=lambda row: int(np.prod(row.shape)))))
    if to == "pytorch":
        _write_config(folder, model, main_dtype)
    elif to == "lerobot":
        from openpi.weights import lerobot_files

        lerobot_files.write(folder, model, norm_stats, dtype=main_dtype)
    if with_certificate:
        errors = parity.certify(folder, model, witness)
        for name, error in errors.items():
            logger.info("%s: largest error of the outputs %.1e", name, error)


def _numpy_dtype(name: str) -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder.parent} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed")


def _copy_extras(checkpoint: Path, folder: Path, recipe: TrainConfig) -> Any:
    """What lies beside the weights; returns the statistics, None if there are none."""
    from openpi.policies import policy_config
    from openpi.policies.contract import CONTRACT_FILE
    from openpi.shared import normalize

    if (checkpoint / "assets").is_dir():
        shutil.copytree(checkpoint / "assets", folder / "assets")
    if (checkpoint / CONTRACT_FILE).is_file():
        shutil.copyfile(checkpoint / CONTRACT_FILE, folder / CONTRACT_FILE)
    try:
        asset_id, norm_stats = policy_config.find_norm_stats(recipe, checkpoint)
    except (FileNotFoundError, ValueError) as error:
        logger.warning("no normalisation statistics go along: %s", error)
        return None
    if not (folder / "assets" / asset_id).exists():
        normalize.save(folder / "assets" / asset_id, norm_stats)
    return norm_stats


def _write_config(folder: Path, model: Any, dtype: str) -> None:
    """The `config.json` of the published converter."""
    fields = ("action_dim", "action_horizon", "paligemma_variant", "action_expert_variant")
    found = {field: getattr(model, field) for field in fields if hasattr(model, field)}
    document = json.dumps({**found, "precision": dtype}, indent=2, default=dataclasses.asdict)
    (folder / "config.json").write_text(document + "\n")


if __name__ == "__main__":
    sys.exit(main())
