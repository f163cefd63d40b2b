"""`openpi-server`: the checkpoints of an experiment, for `positronic-inference --policy=.remote`."""

from __future__ import annotations

import sys
from pathlib import Path

import configuronic as cfn

from openpi.codecs.codec import Codec
from positronic import commands
from positronic.vendors.openpi import codecs

_CONFIG_NAME = "pi05_positronic_lowmem"


@cfn.config(
    checkpoint=None,
    codec=codecs.ee,
    config_name=None,
    host="0.0.0.0",
    port=8000,
    openpi_ws_port=8001,
    recording_dir=None,
)
def server(
    checkpoints_dir: str,
    checkpoint: str | None,
    codec: Codec | None,
    config_name: str | None,
    host: str,
    port: int,
    openpi_ws_port: int,
    recording_dir: str | None,
) -> None:
    """Serves until stopped. Nothing listens at `openpi_ws_port`: the policy is in this process."""
    from openpi.cli import serve
    from openpi.codecs.catalog import for_slash_keys

    place = commands.text(checkpoints_dir)
    arguments = serve.Args(
        checkpoint=place if "://" in place else str(Path(place).expanduser()),
        default_model=None if checkpoint is None else commands.text(checkpoint),
        config=_config_name(place, config_name),
        host=commands.text(host),
        port=port,
        record=None if recording_dir is None else Path(commands.local_output(recording_dir)),
    )
    commands.finish(serve.serve(arguments, codec=None if codec is None else for_slash_keys(codec)))


def _config_name(place: str, config_name: str | None) -> str | None:
    """The recipe named; else that of the checkpoints (None), and where they bring none, what guides train."""
    from openpi.shared.remote import find_files

    if config_name is not None:
        return commands.text(config_name)
    if "://" in place:
        has_recipe = any(file.name.endswith("recipe.json") for file in find_files(place))
    else:
        has_recipe = any(
            file for name in ("recipe.json", "*/recipe.json") for file in Path(place).expanduser().glob(name)
        )
    return None if has_recipe else _CONFIG_NAME


def main() -> None:
    """Also in the words of other releases: `serve`, or the name of a codec, before the flags."""
    words = sys.argv[1:2]
    if words == ["serve"]:
        sys.argv[1:2] = []
    elif words and not words[0].startswith("-"):
        sys.argv[1:2] = [f"--codec=@{codecs.__name__}.{words[0]}"]
    commands.run(server)


if __name__ == "__main__":
    main()
