"""`openpi-stats`: normalisation statistics of a converted dataset."""

from __future__ import annotations

import configuronic as cfn

from positronic import commands
from positronic.vendors.openpi.recipe import data_flags


@cfn.config(config_name="pi05_positronic_lowmem")
def stats(input_path: str, output_path: str, config_name: str) -> None:
    """Computes them, and writes <output_path>/assets/<config_name>/lerobot/norm_stats.json."""
    from openpi.cli.data import stats as openpi_stats

    with commands.sent_output(output_path) as folder:
        arguments = [commands.text(config_name), *data_flags(input_path), f"--assets-base-dir={folder}/assets"]
        commands.finish(openpi_stats.main(arguments))


def main() -> None:
    commands.run(stats)


if __name__ == "__main__":
    main()
