"""`openpi convert positronic INPUT OUTPUT [options]`: recordings in another format to a LeRobot dataset.

INPUT is a raw dataset of Positronic, or a folder of several; INPUT and OUTPUT are on this machine or at URLs (s3://,
gs://). What goes to a URL is made on this machine, and sent when it is complete.
A conversion that is stopped goes on when the same command is given again. Exit codes: 0 = written; 1 = refused or
failed; 2 = bad command line; 130 = stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any
from urllib.parse import urlsplit

from openpi.cli.console import command, configure_logging, make_parser

SUMMARY = "raw recordings of Positronic, by a codec"

logger = logging.getLogger(__name__)


@command("openpi convert")
def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    configure_logging()
    _positronic(args)
    logger.info("written: %s", args.output)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi convert positronic", __doc__)
    parser.add_argument("input", help="folder or URL")
    parser.add_argument("output", help="folder of the dataset, or a URL (s3://, gs://) to send it to")
    parser.add_argument("--codec", default="ee", help="a name, path/to/file.py:attribute or package.module:attribute")
    parser.add_argument("--fps", type=float, help="frames per second; default: the codec's")
    parser.add_argument("--task", help="for all episodes; default: what each recording says")
    parser.add_argument("--images", action="store_true", help="store cameras as images instead of video")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--append", action="store_true", help="behind the episodes of an existing dataset")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument("--repeat", action="store_true", help="append recordings again that are in it already")
    parser.add_argument("--skip-unusable", action="store_true", help="leave out episodes that lack a signal")
    parser.add_argument("--workers", type=int, help="processes; default: one for each processor")
    parser.add_argument("--ray", metavar="ADDRESS", help="on a Ray cluster: auto, host:6379, ray://host:10001, local")
    parser.add_argument("--refresh", action="store_true", help="fetch a URL again, for recordings that were added")
    parser.add_argument("--endpoint-url", help="of an S3 service other than Amazon's")
    parser.add_argument("--anonymous", action="store_true", help="with --endpoint-url: without credentials")
    return parser


def _positronic(args: argparse.Namespace) -> None:
    from openpi.convert.destination import write_to
    from openpi.shared.download import maybe_download
    from openpi.shared.pools import open_pool
    from openpi_positronic import conversion as positronic
    from openpi_positronic.codecs.catalog import get_codec
    from openpi_positronic.raw_episodes import RawDataset

    codec = get_codec(args.codec)
    options: dict[str, Any] = {}
    if args.endpoint_url:
        options["s3"] = {"endpoint_url": args.endpoint_url, "anon": args.anonymous}
    sent_to = options.get(urlsplit(args.output).scheme)
    source = RawDataset(maybe_download(args.input, force_download=args.refresh, **options))
    for path in source.unfinished:
        logger.warning("left out: %s is not finished", path)
    chosen = {
        "fps": args.fps,
        "task": args.task,
        "use_videos": not args.images,
        "append": args.append,
        "overwrite": args.overwrite,
        "repeat": args.repeat,
        "skip_unusable": args.skip_unusable,
    }
    with open_pool(args.ray, args.workers) as pool:
        write_to(
            args.output,
            lambda folder: positronic.convert(source, folder, codec, pool=pool, **chosen),
            key=repr((source.paths, codec, chosen)),
            append=args.append,
            options=sent_to,
        )
