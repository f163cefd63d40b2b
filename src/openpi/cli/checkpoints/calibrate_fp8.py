"""`openpi calibrate-fp8 CHECKPOINT [--dataset D] [--samples N] [--target C]`: measures it for `openpi serve --fp8`.

Runs the checkpoint on frames spread evenly over the recipe's dataset: how large the inputs of its products are, and
which of these bear 8 bits. Writes `fp8.json` beside the weights. Exit codes: 0 = written; 1 = refused or failed; 2 =
bad command line.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpi.cli.console import command, configure_logging, make_parser
from openpi.shared import frameworks

if TYPE_CHECKING:
    from openpi.checkpoints.checkpoint import Checkpoint
    from openpi.models_pytorch.fp8_file import Calibration
    from openpi.training.config import TrainConfig


@command("openpi calibrate-fp8")
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    configure_logging()
    frameworks.require("pytorch", "FP8")
    from openpi.checkpoints.checkpoint import Checkpoint
    from openpi.models_pytorch import fp8_calibration
    from openpi.policies import fp8
    from openpi.training.recipe_io import recipe_of

    if args.samples < 1 or not 0 < args.target <= 1:
        raise ValueError(f"--samples is {args.samples}, --target {args.target}; expected at least 1, and above 0 to 1")
    checkpoint = Checkpoint.open(args.checkpoint)
    recipe: Any = recipe_of(checkpoint, args.config)
    if args.dtype is not None:
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype=args.dtype))
    fp8.check_model(recipe.model)
    samples, what = _samples(recipe, checkpoint, args.dataset, args.samples)
    kwargs = None if args.num_steps is None else {"num_steps": args.num_steps}
    found = fp8.calibrate(
        recipe.model,
        checkpoint,
        samples,
        device=args.pytorch_device,
        target=args.target,
        about={"dataset": what},
        sample_kwargs=kwargs,
    )
    print(fp8_calibration.table(found))
    _write(found, checkpoint.folder)


def _write(found: Calibration, checkpoint: Path) -> None:
    from openpi.models_pytorch.fp8_file import FP8_FILE
    from openpi.weights import checksums

    file = found.save(checkpoint)
    checksums.write(checkpoint, only=(FP8_FILE,))
    print(
        f"{len(found.chosen())} of {len(found.layers)} products in FP8; chunks are alike by a cosine of "
        f"{found.lowest:.5f} at the lowest, {found.mean:.5f} on average (wanted: {found.target:g}); written: {file}"
    )
    if not found.chosen():
        print("nothing bears FP8 at this target: `openpi serve --fp8` would gain nothing")


def _samples(
    recipe: TrainConfig, checkpoint: Checkpoint, dataset: str | None, count: int
) -> tuple[list[dict[str, object]], str]:
    """Model inputs of frames all over the dataset, with the checkpoint's statistics and tokenizers."""
    from openpi import transforms
    from openpi.policies import policy_config
    from openpi.shared.evenly_spaced import evenly_spaced
    from openpi.training import data_loader
    from openpi.training.data import recipe_data
    from openpi.training.data.streams import Stream

    recipe = recipe_data.with_dataset(recipe, dataset)
    data_config = policy_config.load_pipeline(recipe, checkpoint).data_config
    if data_config.dataset_name is None:
        raise ValueError(f"recipe '{recipe.name}' has no dataset; name one with --dataset")
    frames = recipe_data.create_dataset(data_config, recipe.model)
    to_model = transforms.compose(data_loader.input_transforms(data_config, frames))
    if isinstance(frames, Stream):
        chosen = [frame for _, frame in frames.spread(count)]
    else:
        if not len(frames):
            raise ValueError(f"{data_config.dataset_name} has no frames")
        chosen = [frames[row] for row in evenly_spaced(range(len(frames)), count)]
    return [to_model(frame) for frame in chosen], str(data_config.dataset_name)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi calibrate-fp8", __doc__)
    parser.add_argument("checkpoint", help="a step's folder, a run's folder (its latest step), or a URL")
    parser.add_argument("--config", metavar="RECIPE", help="recipe of a checkpoint that carries none")
    parser.add_argument("--dataset", metavar="PATH|ID", help="LeRobot dataset instead of the recipe's")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="frames to run (default 32)")
    parser.add_argument(
        "--target", type=float, default=0.998, metavar="C", help="lowest cosine of chunks (default 0.998)"
    )
    parser.add_argument("--num-steps", type=int, metavar="N", help="denoising steps, as it will be served")
    parser.add_argument("--dtype", choices=("bfloat16",), help="of a recipe in float32, as it will be served")
    parser.add_argument("--pytorch-device", metavar="D", help="such as cuda:1 or cpu; default: a GPU if there is one")
    return parser
