"""Writes the frame ranges in which DROID's robot moves: `--data-dir FOLDER --output FILE.json`.

An output that is there is added to, so that a run that was interrupted continues. The published file of DROID 1.0.1 is
fetched by the recipes; this is for other versions and for datasets of one's own.
"""

import argparse
from pathlib import Path

from openpi.cli.console import configure_logging
from openpi_rlds import folder, idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", "--data_dir", required=True, help="the folder that holds NAME/VERSION")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name", default="droid")
    parser.add_argument("--version", default="1.0.1")
    args = parser.parse_args()
    configure_logging()
    dataset = folder.open_folder(args.data_dir, args.name, args.version)
    counts = idle.write_moving_ranges(dataset, args.output)
    print(f"{counts.computed} episodes computed, {counts.known} known, {counts.failed} failed; {args.output}")


if __name__ == "__main__":
    main()
