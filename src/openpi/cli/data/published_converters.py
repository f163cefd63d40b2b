"""What the published conversion scripts have in common: a dataset in LeRobot's home, by a format of `openpi.convert`.

Unlike the published ones they replace a dataset only when they are told (`--overwrite`), and send it only then, too.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openpi.cli.console import command, configure_logging
from openpi.convert.engine import Options, convert
from openpi.convert.source import Source

logger = logging.getLogger(__name__)


def parser(description: str | None, repo_id: str | None) -> argparse.ArgumentParser:
    """The flags that they share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add(made, "repo_id", required=repo_id is None, default=repo_id, help="name of the dataset")
    made.add_argument("--root", type=Path, help="folder of the dataset; default: LeRobot's home and its name")
    made.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    add(made, "skip_unusable", action="store_true", help="leave out episodes that are damaged or unlike the others")
    made.add_argument("--workers", type=int, help="processes; default: one for each processor")
    add(made, "push_to_hub", action=argparse.BooleanOptionalAction, default=False, help="send it when it is complete")
    return made


def add(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    """A flag in both spellings, `--raw-dir` and `--raw_dir`."""
    flags = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
    parser.add_argument(*flags, dest=name, **options)


def run(
    args: argparse.Namespace, source: Callable[[], Source], options: Options, tags: Sequence[str], prog: str
) -> int:
    """Converts, and sends if that is asked for; the exit code."""
    from openpi.convert.hub_upload import push
    from openpi.data.lerobot.home import lerobot_home

    @command(prog)
    def converted() -> None:
        output = args.root or lerobot_home() / args.repo_id
        choices = {"overwrite": args.overwrite, "skip_unusable": args.skip_unusable}
        convert(source(), output, options, num_workers=args.workers, **choices)
        logger.info("written: %s", output)
        if args.push_to_hub:
            push(output, args.repo_id, tags=tags)

    configure_logging()
    return converted()
