"""`openpi-server`, `python -m positronic.vendors.openpi.server [serve]`: checkpoints of an experiment for Positronic's
clients. The policy runs in this process, so `openpi_ws_port` is accepted and not used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import configuronic as cfn

from openpi_positronic.codecs import catalog
from openpi_positronic.codecs.codec import Codec
from openpi_positronic.protocol import PositronicProtocol
from positronic import commands
from positronic.vendors.openpi import codecs

_CONFIG_NAME = "pi05_positronic_lowmem"
_GROUPS = {
    "--pipeline.source.": "--",
    "--model.": "--",
    "--pipeline.codec": "--codec",
    "--pipeline.ee_frame": "--ee_frame",
}
_CODEC_OF = {"phail": "phail_v1"}


@cfn.config(
    checkpoint=None,
    codec=codecs.ee,
    config_name=None,
    host="0.0.0.0",
    port=8000,
    openpi_ws_port=8001,
    recording_dir=None,
    api_key=None,
    max_models=1,
    ee_frame=None,
    extra_args=(),
)
def serve(
    checkpoints_dir: str,
    checkpoint: str | int | None,
    codec: Codec | str | None,
    config_name: str | None,
    host: str,
    port: int,
    openpi_ws_port: int,
    recording_dir: str | None,
    api_key: str | None,
    max_models: int,
    ee_frame: object,
    extra_args: Sequence[str],
) -> None:
    """Serves until it is stopped; the latest checkpoint is the default."""
    from openpi.cli.serving import server

    if ee_frame is not None:
        raise ValueError(
            f"ee_frame is {ee_frame}, but openpi-server converts no frames: poses pass as the robot sends them. Leave "
            "it out if they are in the frame of the training data, or serve with a codec of your own that converts them"
        )
    place = _place(commands.text(checkpoints_dir))
    arguments = [
        place,
        f"--host={host}",
        f"--port={port}",
        f"--max-models={max_models}",
    ]
    optional = {
        "--config": _recipe_name(place, config_name),
        "--default-model": checkpoint,
        "--record": None if recording_dir is None else commands.local_output(recording_dir),
        "--api-key": api_key,
    }
    arguments += [f"{flag}={commands.text(value)}" for flag, value in optional.items() if value is not None]
    extra = [extra_args] if isinstance(extra_args, str) else [commands.text(arg) for arg in extra_args]
    chosen = commands.codec(codec)
    served = None if chosen is None else catalog.for_slash_keys(chosen)
    parsed = server.parse([*arguments, *extra])
    if parsed.codec is not None and served is None:
        served = PositronicProtocol.named(parsed.codec).codec
    commands.finish(server.serve(parsed, protocols=[PositronicProtocol(served)]))


def _place(text: str) -> str:
    return text if "://" in text else str(Path(text).expanduser())


def _recipe_name(place: str, config_name: str | None) -> str | None:
    """The one named; else None where the checkpoints bring their own, and what guides train where they do not."""
    from openpi.shared.remote import find_files

    if config_name is not None:
        return config_name
    if "://" in place:
        has_recipe = any(file.name.endswith("recipe.json") for file in find_files(place))
    else:
        has_recipe = any(file for name in ("recipe.json", "*/recipe.json") for file in Path(place).glob(name))
    return None if has_recipe else _CONFIG_NAME


def main() -> None:
    sys.argv[1:] = as_one_command(sys.argv[1:])
    commands.run(serve)


def as_one_command(words: Sequence[str]) -> list[str]:
    """The command lines of all releases as flags of `serve`: some name the codec first, newer ones group the flags of
    the model and of the codec.
    """
    first, *rest = words or [""]
    if first == "serve":
        return [_flag(word) for word in rest]
    if first and not first.startswith("-"):
        codec = _CODEC_OF.get(first, first)
        return [f"--codec=@positronic.vendors.openpi.codecs.{codec}", *(_flag(word) for word in rest)]
    return [_flag(word) for word in words]


def _flag(word: str) -> str:
    for theirs, ours in _GROUPS.items():
        if word.startswith(theirs):
            return ours + word.removeprefix(theirs)
    return word


if __name__ == "__main__":
    main()
