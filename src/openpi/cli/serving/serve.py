"""`openpi serve DIR`: serves checkpoints to robots.

A checkpoint says everything that is needed: weights, statistics, recipe and contract. Exit codes: 0 =
stopped by SIGTERM or Ctrl-C; 2 = bad command line; 1 = refused or failed.
"""

from __future__ import annotations

import sys

from openpi.cli.console import configure_logging
from openpi.cli.serving import server


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--dummy" for word in words):
        from openpi.cli.serving import serve_dummy

        return serve_dummy.main(words)
    args = server.parse(argv)
    configure_logging()
    return server.serve(args)
