"""DROID's raw episodes to a LeRobot dataset, with the flags of the published script.

    uv run examples/droid/convert_droid_data_to_lerobot.py --data_dir /path/to/droid_raw

Looks for `trajectory.h5` with `recordings/MP4` beside it, at any depth, and for `aggregated-annotations-*.json` in the
folder itself. The dataset is `your_hf_username/my_droid_dataset` in LeRobot's home ($HF_LEROBOT_HOME).
"""

import sys
from pathlib import Path

from openpi.cli.data import published_converters as published
from openpi.convert.engine import Options
from openpi.convert.formats.droid_raw import DroidRaw


def main(argv: list[str] | None = None) -> int:
    parser = published.parser(__doc__, "your_hf_username/my_droid_dataset")
    published.add(parser, "data_dir", required=True, type=Path, help="folder of the episodes")
    args = parser.parse_args(argv)
    tags = ("droid", "panda")
    return published.run(args, lambda: DroidRaw(args.data_dir), Options(use_videos=False), tags, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
