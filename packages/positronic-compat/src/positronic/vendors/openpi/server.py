"""`openpi-server`, `python -m positronic.vendors.openpi.server [serve]`: checkpoints of an experiment for Positronic's
clients. The policy runs in this process, so `openpi_ws_port` is accepted and not used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import configuronic as cfn

from openpi.codecs import catalog
from openpi.codecs.codec import Codec
from positronic import commands
from positronic.vendors.openpi import codecs


@cfn.config(
    checkpoint=None,
    codec=codecs.ee,
    config_name="pi05_positronic_lowmem",
    host="0.0.0.0",
    port=8000,
    openpi_ws_port=8001,
    recording_dir=None,
    api_key=None,
    max_models=1,
    extra_args=(),
)
def serve(
    checkpoints_dir: str,
    checkpoint: str | int | None,
    codec: Codec | None,
    config_name: str,
    host: str,
    port: int,
    openpi_ws_port: int,
    recording_dir: str | None,
    api_key: str | None,
    max_models: int,
    extra_args: Sequence[str],
) -> None:
    """Serves until it is stopped; the latest checkpoint is the default."""
    from openpi.cli import serve as openpi_serve

    arguments = [
        _place(commands.text(checkpoints_dir)),
        f"--config={commands.text(config_name)}",
        f"--host={host}",
        f"--port={port}",
        f"--max-models={max_models}",
    ]
    optional = {"--default-model": checkpoint, "--record": recording_dir, "--api-key": api_key}
    arguments += [f"{flag}={commands.text(value)}" for flag, value in optional.items() if value is not None]
    extra = [extra_args] if isinstance(extra_args, str) else [commands.text(arg) for arg in extra_args]
    served = None if codec is None else catalog.for_slash_keys(codec)
    commands.finish(openpi_serve.serve(openpi_serve.parse([*arguments, *extra]), codec=served))


def _place(text: str) -> str:
    return text if "://" in text else str(Path(text).expanduser())


def main() -> None:
    sys.argv[1:] = with_codec_flag(sys.argv[1:])
    commands.run(serve)


def with_codec_flag(words: Sequence[str]) -> list[str]:
    """Older command lines name the codec first, newer ones say `serve`."""
    first, *rest = words or [""]
    if first == "serve":
        return rest
    if first and not first.startswith("-"):
        return [f"--codec=@positronic.vendors.openpi.codecs.{first}", *rest]
    return list(words)


if __name__ == "__main__":
    main()
