"""LIBERO's published datasets (RLDS) to a LeRobot dataset, with the flags of the published script.

    uv run examples/libero/convert_libero_data_to_lerobot.py --data_dir /path/to/modified_libero_rlds

The dataset is `your_hf_username/libero` in LeRobot's home ($HF_LEROBOT_HOME). TensorFlow is not needed.
LIBERO's original HDF5 files: `openpi convert libero`.
"""

import sys
from pathlib import Path

from openpi.cli.data import published_converters as published
from openpi.convert.engine import Options
from openpi_rlds.libero import LiberoRlds


def main(argv: list[str] | None = None) -> int:
    parser = published.parser(__doc__, "your_hf_username/libero")
    published.add(parser, "data_dir", required=True, type=Path, help="folder of the four datasets")
    args = parser.parse_args(argv)
    tags = ("libero", "panda", "rlds")
    return published.run(args, lambda: LiberoRlds(args.data_dir), Options(use_videos=False), tags, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
