"""`positronic-to-lerobot convert | append`: raw recordings to a LeRobot dataset."""

from __future__ import annotations

import configuronic as cfn

from openpi.shared.strict_json import Json
from openpi_positronic.codecs.codec import Codec
from positronic import commands
from positronic.cfg import ds
from positronic.vendors.openpi import codecs

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
    dry_run=False,
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
    dry_run: bool,
) -> None:
    """Recordings to a new dataset; with dry_run only what would become of the first is shown."""
    choices = {"overwrite": overwrite, "skip_unusable": skip_unusable}
    _write(dataset, output_dir, fps, task, num_workers, refresh, choices, use_videos=video, dry_run=dry_run)


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
    choices = {"append": True, "repeat": repeat, "skip_unusable": skip_unusable}
    _write(dataset, output_dir, fps, task, num_workers, refresh, choices)


def _write(
    dataset: Encoded,
    output_dir: str,
    fps: float | None,
    task: str | None,
    num_workers: int | None,
    refresh: bool,
    choices: Json,
    *,
    use_videos: bool = True,
    dry_run: bool = False,
) -> None:
    from openpi.convert.destination import convert_to
    from openpi.convert.engine import Options
    from openpi.convert.preview import preview
    from openpi.shared.download import maybe_download
    from openpi.shared.pools import Processes
    from openpi_positronic.conversion import PositronicRecordings

    recordings, codec = dataset
    root = maybe_download(recordings.place, force_download=refresh, **recordings.options)
    source = PositronicRecordings(root, codec, fps)
    options = Options(task=None if task is None else commands.text(task), use_videos=use_videos)
    if dry_run:
        print(*preview(source, options), sep="\n")
        return
    convert_to(commands.text(output_dir), source, options, pool=Processes(num_workers), **choices)


def main() -> None:
    commands.run({"convert": convert, "append": append})


if __name__ == "__main__":
    main()
