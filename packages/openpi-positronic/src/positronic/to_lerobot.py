"""`positronic-to-lerobot convert | append`: raw recordings to a LeRobot dataset."""

from __future__ import annotations

import logging

import configuronic as cfn

from openpi.shared.strict_json import Json
from openpi_positronic.codecs.codec import Codec
from positronic import commands
from positronic.cfg import ds
from positronic.vendors.openpi import codecs

logger = logging.getLogger(__name__)

Encoded = tuple[ds.Recordings, Codec]


@cfn.config(dataset=ds.local, codec=codecs.ee)
def encoded(dataset: ds.Recordings, codec: Codec | str | None) -> Encoded:
    """Recordings, and the codec that makes columns of them."""
    commands.refuse_text(**{"dataset.dataset": dataset})
    chosen = commands.codec(codec)
    if chosen is None:
        raise ValueError("dataset.codec is None; expected one, such as @positronic.vendors.openpi.codecs.ee")
    return dataset, chosen


@cfn.config(
    dataset=encoded,
    fps=None,
    video=True,
    task=None,
    overwrite=False,
    skip_unusable=False,
    num_workers=None,
    refresh=False,
)
def convert(
    dataset: Encoded,
    output_dir: str,
    fps: float | None,
    video: bool,
    task: str | None,
    overwrite: bool,
    skip_unusable: bool,
    num_workers: int | None,
    refresh: bool,
) -> None:
    """Recordings to a new dataset."""
    options = {"fps": fps, "task": task, "use_videos": video, "overwrite": overwrite, "skip_unusable": skip_unusable}
    _write(dataset, output_dir, num_workers, refresh, options)


@cfn.config(dataset=encoded, fps=None, task=None, repeat=False, skip_unusable=False, num_workers=None, refresh=False)
def append(
    dataset: Encoded,
    output_dir: str,
    fps: float | None,
    task: str | None,
    repeat: bool,
    skip_unusable: bool,
    num_workers: int | None,
    refresh: bool,
) -> None:
    """Recordings behind those of an existing dataset."""
    options = {"fps": fps, "task": task, "append": True, "repeat": repeat, "skip_unusable": skip_unusable}
    _write(dataset, output_dir, num_workers, refresh, options)


def _write(dataset: Encoded, output_dir: str, num_workers: int | None, refresh: bool, options: Json) -> None:
    from openpi.convert.destination import write_to
    from openpi.shared.download import maybe_download
    from openpi_positronic import conversion as positronic
    from openpi_positronic.raw_episodes import RawDataset

    recordings, codec = dataset
    options = {**options, "task": None if options["task"] is None else commands.text(options["task"])}
    source = RawDataset(maybe_download(recordings.place, force_download=refresh, **recordings.options))
    write_to(
        commands.text(output_dir),
        lambda folder: positronic.convert(source, folder, codec, num_workers=num_workers, **options),
        key=repr((source.paths, codec, options)),
        append=options.get("append", False),
    )
    logger.info("written: %s", output_dir)


def main() -> None:
    commands.run({"convert": convert, "append": append})


if __name__ == "__main__":
    main()
