"""`openpi stats NAME [--max-frames N] [--FIELD=VALUE ...]`: normalisation statistics of a recipe's dataset.

They are computed from the columns of its tables, without opening a video, and written where the recipe reads them, or,
where it reads some from a bucket, to its own assets folder.
`openpi train` does the same when there are none; run this after changing the data, or to look at them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openpi.cli.console import command, configure_logging, make_parser
from openpi.cli.data._convert_formats import add_ray
from openpi.shared.normalize import NormStats

if TYPE_CHECKING:
    from openpi.shared.pools import Pool
    from openpi.training.config import TrainConfig
    from openpi.training.data.norm_stats import Comparison


@command("openpi stats")
def main(argv: list[str] | None = None) -> None:
    arguments, overrides = _parser().parse_known_args(argv)
    name = arguments.config_name or arguments.name
    if name is None:
        _parser().error("name a recipe, as in `openpi stats pi0_libero`")
    from openpi.training import config as _config

    config = _config.cli([name, *overrides], prog="openpi stats")
    configure_logging()
    from openpi.shared.pools import open_pool
    from openpi.training.data import norm_stats

    with open_pool(arguments.ray, 0) as pool:
        for data in config.data.with_own_statistics:
            alone = dataclasses.replace(config, data=data)
            if arguments.compare:
                print(_comparison(norm_stats.compare(alone, max_frames=arguments.max_frames, pool=pool)))
            else:
                _compute(alone, arguments.max_frames, pool)


def _compute(config: TrainConfig, max_frames: int | None, pool: Pool) -> None:
    from openpi.training.data import norm_stats

    path = norm_stats.own_path(config)
    computed = norm_stats.compute(config, max_frames=max_frames, path=path, pool=pool)
    for key, stats in computed.stats.items():
        print(f"{key}\n{_table(stats, computed.names[key])}")
    print(f"{computed.num_frames} frames; written to {computed.path}")
    read = config.data.stats_dir(config.assets_dirs)
    if read is not None and not path.is_relative_to(read):
        print(
            f"The recipe reads the statistics in {read}, which stay as they are. To train with these, add "
            f"--data.assets.assets-dir={config.assets_dirs}; to compare, use --compare"
        )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("openpi stats", __doc__)
    parser.add_argument("name", nargs="?", help="recipe: a name, path/to/file.py:attribute or package.module:attribute")
    parser.add_argument("--config-name", "--config_name", help="the same, as a flag")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="write nothing: show how the data lie within the statistics that the recipe reads, such as a base's",
    )
    add_ray(parser)
    parser.add_argument("--max-frames", "--max_frames", type=int, help="look at so many frames; default: all")
    return parser


def _comparison(rows: Sequence[Comparison]) -> str:
    """One line per dimension: the range of the data, the range that training normalises by."""
    width = max(len(row.name) for row in rows)
    lines = [f"  {'':{width}}{'data q01':>12}{'q99':>12}{'used q01':>12}{'q99':>12}"]
    for row in rows:
        numbers = "".join(f"{value:>12.4g}" for value in (*row.data, *row.used))
        lines.append(f"  {row.name:{width}}{numbers}{'' if row.message is None else '   ' + row.message}")
    return "\n".join(lines)


def _table(stats: NormStats, names: Sequence[str]) -> str:
    """One line per dimension."""
    columns = {name: getattr(stats, name) for name in ("mean", "std", "q01", "q99")}
    width = max(3, *map(len, names))
    header = f"  {'dim':{width}}" + "".join(f"{name:>12}" for name in columns)
    rows = (
        f"  {names[i]:{width}}"
        + "".join(f"{'-' if values is None else format(values[i], '.4g'):>12}" for values in columns.values())
        for i in range(stats.width)
    )
    return "\n".join([header, *rows])
