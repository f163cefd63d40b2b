"""ALOHA's recordings to a LeRobot dataset, with the flags of the published script.

    uv run examples/aloha_real/convert_aloha_data_to_lerobot.py --raw-dir /path/to/raw/data --repo-id <org>/<name> \
        --task "uncap the pen"

The dataset is in LeRobot's home ($HF_LEROBOT_HOME). Any set of cameras is taken, and nothing is sent to the hub unless
--push-to-hub says so.
"""

import argparse
import logging
import sys
from pathlib import Path

from openpi.cli.data import published_converters as published
from openpi.convert.engine import Options
from openpi.convert.formats.aloha import AlohaHdf5
from openpi.shared.download import maybe_download

_PLACEHOLDER = "DEBUG"


def main(argv: list[str] | None = None) -> int:
    parser = published.parser(__doc__, None)
    published.add(parser, "raw_dir", required=True, type=Path, help="folder of episode_*.hdf5")
    published.add(
        parser, "raw_repo_id", help="dataset repository of the hub to fetch them from, if the folder is not there"
    )
    parser.add_argument("--task", default=_PLACEHOLDER, help="what the robot is told to do")
    parser.add_argument("--episodes", type=int, nargs="+", help="places in the sorted list, from 0; default: all")
    how = {"action": argparse.BooleanOptionalAction, "default": False}
    published.add(parser, "is_mobile", help="call the robot mobile_aloha", **how)
    parser.add_argument("--mode", choices=("image", "video"), default="image", help="how cameras are stored")
    args = parser.parse_args(argv)
    if args.task == _PLACEHOLDER:
        logging.getLogger("openpi").warning("the policy will be told %r: say the task with --task", _PLACEHOLDER)

    def source() -> AlohaHdf5:
        folder = args.raw_dir
        if not folder.exists() and args.raw_repo_id:
            folder = maybe_download(f"hf://datasets/{args.raw_repo_id}")
        return AlohaHdf5(folder, args.is_mobile)

    episodes = None if args.episodes is None else tuple(args.episodes)
    options = Options(task=args.task, use_videos=args.mode == "video", episodes=episodes)
    return published.run(args, source, options, ("aloha",), parser.prog)


if __name__ == "__main__":
    sys.exit(main())
