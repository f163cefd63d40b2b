"""`openpi doctor RECIPE_OR_CHECKPOINT --port N`: does a server make of an observation what training makes of it?

    openpi serve checkpoints/my_robot/first &
    openpi doctor checkpoints/my_robot/first --port 8000

Recorded frames go through a running server and through the training path, which are compared stage by stage; with
`--robot RECORDING` what a robot sent is compared with the dataset. `--env` tells of this machine. Exit codes: 0 = no
difference; 1 = there are some, or no answer; 2 = bad command line.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from openpi.cli.console import OWN_FIELDS, check_range, command, configure_logging, make_parser

if TYPE_CHECKING:
    from openpi.cli.debugging._doctor_view import Diagnosis


@command("openpi doctor", RuntimeError)
def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args, overrides = parser.parse_known_args(argv)
    configure_logging(logging.ERROR)
    if args.env:
        return _environment(args)
    if args.source is None:
        parser.error("name a recipe or a checkpoint, or --env")
    found = diagnose(args, overrides)
    print(json.dumps(found.as_json(), indent=2) if args.json else found.as_text())
    return 1 if found.differences else 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi doctor", __doc__, epilog=OWN_FIELDS)
    parser.add_argument("source", nargs="?", metavar="RECIPE_OR_CHECKPOINT", help="what was trained")
    parser.add_argument("--config", metavar="RECIPE", help="recipe of a checkpoint that carries none")
    parser.add_argument("--dataset", metavar="PATH|ID", help="LeRobot dataset instead of the recipe's")
    parser.add_argument("--host", default="127.0.0.1", help="of the server: a name, an address, or a URL")
    parser.add_argument("--port", type=int, help="default: 8000, or 443 of wss://...")
    parser.add_argument("--api-key", help="of the server; default: OPENPI_API_KEY")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="wait so long for the server")
    parser.add_argument("--frames", type=int, default=8, help="of the dataset, from all over it (default 8)")
    parser.add_argument(
        "--model", action="store_true", help="load the checkpoint here, too, and compare what the models answer"
    )
    parser.add_argument("--num-steps", type=int, help="with --model: denoising steps, as the server was started with")
    parser.add_argument(
        "--robot", type=Path, metavar="RECORDING", help="what `openpi serve --record` wrote, instead of a server"
    )
    parser.add_argument("--env", action="store_true", help="driver, CUDA, JAX and PyTorch of this machine, as Markdown")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    return parser


def diagnose(args: argparse.Namespace, flags: list[str]) -> Diagnosis:
    """Raises what opening the recipe, the dataset, the recording or the connection raises."""
    from openpi.cli.debugging import _doctor_robot, _doctor_server
    from openpi.cli.debugging import _explain_chain as chain
    from openpi.training import recipe_io
    from openpi.training.data import recipe_data
    from openpi.training.recipe import overrides

    check_range("frames", args.frames, 2)
    check_range("num_steps", args.num_steps, 1)
    config, checkpoint = recipe_io.resolve(args.source, args.config)
    config = overrides.parse(config, flags, prog="openpi doctor") if flags else config
    config = recipe_data.with_dataset(config, args.dataset)
    around = chain.pipeline(config, checkpoint)
    if around.data_config.norm_stats is None:
        raise ValueError(f"recipe '{config.name}' has no statistics yet; name a checkpoint, or run `openpi stats`")
    if args.robot is not None:
        return _doctor_robot.diagnose(config, around, args.robot)
    return _doctor_server.diagnose(config, checkpoint, around, args)


def _environment(args: argparse.Namespace) -> int:
    from openpi.cli.debugging import _environment as environment

    facts = environment.look()
    print(json.dumps(facts.as_json(), indent=2) if args.json else facts.as_text())
    return 1 if facts.problems else 0
