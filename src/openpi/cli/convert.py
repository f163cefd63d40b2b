"""`openpi convert FORMAT INPUT OUTPUT [options]`: recordings in another format to a LeRobot dataset.

Formats are added by the entry point `openpi.converters`: name -> a module as `cli.main.Command` says.
"""

from __future__ import annotations

import sys

from openpi.cli.main import Command
from openpi.shared import plugins
from openpi.shared.errors import listed

SUMMARY = "recordings in another format to a LeRobot dataset"
ENTRY_POINTS = "openpi.converters"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    formats = plugins.names(ENTRY_POINTS)
    if argv and argv[0] in formats:
        converter: Command = plugins.load(ENTRY_POINTS, argv[0])
        return converter.main(argv[1:]) or 0
    is_help = bool(argv) and argv[0] in ("-h", "--help")
    rows = "\n".join(f"  {name:<18} {plugins.load(ENTRY_POINTS, name).SUMMARY}" for name in formats)
    usage = f"usage: openpi convert FORMAT INPUT OUTPUT [options]\n\n{SUMMARY}; FORMAT is one of\n{rows or '  (none)'}"
    if is_help:
        print(f"{usage}\n\n`openpi convert FORMAT --help` lists the options of one.")
        return 0
    found = f"the format is '{argv[0]}'" if argv else "no format is given"
    hint = plugins.hint(ENTRY_POINTS, argv[0]) if argv else ""
    print(f"{usage}\n\nopenpi convert: {found}; there are {listed(formats)}{hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
