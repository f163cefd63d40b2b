"""`openpi convert FORMAT SRC DST [options]`: recordings in another format to a LeRobot dataset.

SRC and DST are on this machine or at URLs (s3://, gs://). What goes to a URL is made on this machine, and sent when it
is complete. `--dry-run` shows what would become of the first episode.
A conversion that is stopped goes on when the same command is given again. Exit codes: 0 = written; 1 = refused or
failed; 2 = bad command line; 130 = stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any
from urllib.parse import urlsplit

from openpi.cli import _convert_formats

SUMMARY = "recordings in another format to a LeRobot dataset"

logger = logging.getLogger("openpi")


def main(argv: list[str] | None = None) -> int:
    from openpi.cli.console import configure_logging

    argv = sys.argv[1:] if argv is None else argv
    args = _parser(argv).parse_args(argv)
    configure_logging()
    try:
        _positronic(args) if args.format == "positronic" else _convert_formats.run(args)
    except (ValueError, KeyError, OSError, ImportError) as error:
        logger.debug("", exc_info=True)
        print(f"openpi convert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openpi convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    _convert_formats.add_parsers(formats, argv)
    positronic = formats.add_parser("positronic", help="raw recordings of Positronic, by a codec")
    positronic.add_argument("input", help="folder or URL")
    positronic.add_argument("output", help="folder of the dataset, or a URL (s3://, gs://) to send it to")
    positronic.add_argument(
        "--codec", default="ee", help="a name, path/to/file.py:attribute or package.module:attribute"
    )
    positronic.add_argument("--fps", type=float, help="frames per second; default: the codec's")
    positronic.add_argument("--task", help="for all episodes; default: what each recording says")
    positronic.add_argument("--images", action="store_true", help="store cameras as images instead of video")
    existing = positronic.add_mutually_exclusive_group()
    existing.add_argument("--append", action="store_true", help="behind the episodes of an existing dataset")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    positronic.add_argument("--repeat", action="store_true", help="append recordings again that are in it already")
    positronic.add_argument("--skip-unusable", action="store_true", help="leave out episodes that lack a signal")
    positronic.add_argument("--workers", type=int, help="processes; default: one for each processor")
    positronic.add_argument("--refresh", action="store_true", help="fetch a URL again, for recordings that were added")
    positronic.add_argument("--endpoint-url", help="of an S3 service other than Amazon's")
    positronic.add_argument("--anonymous", action="store_true", help="with --endpoint-url: without credentials")
    return parser


def _positronic(args: argparse.Namespace) -> None:
    from openpi.codecs.catalog import get_codec
    from openpi.convert import positronic
    from openpi.convert.destination import write_to
    from openpi.data.raw_episodes import RawDataset
    from openpi.shared.download import maybe_download

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
    write_to(
        args.output,
        lambda folder: positronic.convert(source, folder, codec, num_workers=args.workers, **chosen),
        key=repr((source.paths, codec, chosen)),
        append=args.append,
        options=sent_to,
    )
    logger.info("written: %s", args.output)


if __name__ == "__main__":
    sys.exit(main())
