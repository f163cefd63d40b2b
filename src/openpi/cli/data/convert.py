"""`openpi convert FORMAT SRC DST [options]`: recordings in another format to a LeRobot dataset.

SRC and DST are on this machine or at URLs (s3://, gs://). What goes to a URL is made on this machine, and sent when it
is complete. `--dry-run` shows what would become of the first episode. A conversion that is stopped goes on when the
same command is given again. Exit codes: 0 = written; 1 = refused or failed; 2 = bad command line; 130 = stopped by
Ctrl-C.

What is in none of these formats: docs/how-to/converting.md, "Files of your own". Packages add formats by the entry
point `openpi.formats`: name -> a format's class.
"""

from __future__ import annotations

import argparse
import sys

from openpi.cli.console import command, configure_logging, make_parser
from openpi.cli.data import _convert_formats
from openpi.convert.formats import ENTRY_POINTS, summaries
from openpi.shared import plugins


@command("openpi convert")
def main(argv: list[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    hint = plugins.hint(ENTRY_POINTS, argv[0]) if argv else ""
    if hint and argv[0] not in summaries():
        print(f"openpi convert: the format '{argv[0]}' is not installed{hint}", file=sys.stderr)
        return 2
    args = _parser(argv).parse_args(argv)
    configure_logging()
    _convert_formats.run(args)
    return None


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = make_parser("openpi convert", __doc__)
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    _convert_formats.add_parsers(formats, argv)
    return parser
