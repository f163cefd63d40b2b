"""`openpi convert FORMAT SRC DST` for the formats of `openpi.convert.formats`: flags from a format's fields."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from openpi.convert.formats import format_class, summaries
from openpi.shared.strict_json import Json
from openpi_client import docstrings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


logger = logging.getLogger(__name__)


def add_parsers(formats: argparse._SubParsersAction[argparse.ArgumentParser], argv: Sequence[str]) -> None:
    """A parser for each format, behind which `run` stands; flags of its own for the one in `argv`."""
    for word, summary in summaries().items():
        parser = formats.add_parser(word, help=summary, description=summary)
        parser.add_argument("input", metavar="SRC", help="file, folder or URL")
        parser.add_argument(
            "output", metavar="DST", help="folder of the dataset, or a URL (s3://, gs://) to send it to"
        )
        add_common(parser)
        if word not in argv:
            continue
        kind = format_class(word)
        _add_fields(parser, kind)
        if hasattr(kind, "draft"):
            parser.add_argument("--draft", metavar="FILE", help="write a mapping of SRC there, to be edited, and stop")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags that every format has."""
    parser.add_argument("--task", help="for all episodes; default: what each recording says")
    rate = "frames per second; default: what the recordings say"
    parser.add_argument("--fps", type=float, help=f"{rate}. positronic, ros, session: sampled by it; others: called so")
    parser.add_argument("--images", action="store_true", help="store cameras as images, without loss, instead of video")
    parser.add_argument("--swap-colors", action="store_true", help="the pictures are BGR, whatever the recording says")
    parser.add_argument("--episodes", type=places, help="places in the list of episodes, from 0, such as 0,3,7-12")
    parser.add_argument("--dry-run", action="store_true", help="show what would become of the first episode, and stop")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--append", action="store_true", help="behind the episodes of an existing dataset")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument("--repeat", action="store_true", help="append recordings again that are in it already")
    parser.add_argument("--skip-unusable", action="store_true", help="leave out episodes that are damaged or unlike")
    parser.add_argument("--workers", type=int, help="processes; default: one for each processor")
    add_ray(parser)
    parser.add_argument("--refresh", action="store_true", help="fetch a URL again, for recordings that were added")
    parser.add_argument("--endpoint-url", help="of an S3 service other than Amazon's")
    parser.add_argument("--anonymous", action="store_true", help="with --endpoint-url: without credentials")


def add_ray(parser: argparse.ArgumentParser) -> None:
    """The flag of commands that work episode by episode."""
    parser.add_argument("--ray", metavar="ADDRESS", help="on a Ray cluster: auto, host:6379, ray://host:10001, local")


def run(args: argparse.Namespace) -> None:
    """Converts, or shows what would be."""
    from openpi.convert.destination import convert_to
    from openpi.convert.engine import Options
    from openpi.convert.preview import preview
    from openpi.shared.download import maybe_download
    from openpi.shared.pools import open_pool

    kind = format_class(args.format)
    given = {field.name: _value(kind, field.name, getattr(args, field.name)) for field in _fields(kind)}
    services: Json = {}
    if args.endpoint_url:
        services["s3"] = {"endpoint_url": args.endpoint_url, "anon": args.anonymous}
    root = maybe_download(args.input, force_download=args.refresh, **services)
    source = kind(root=root, **given, **_readers(kind))
    if getattr(args, "draft", None):
        _write_draft(Path(args.draft), source.draft())
        return
    # Formats that sample choose their frames by the rate; of the others it is only told.
    fps = None if "fps" in given else args.fps
    options = Options(args.task, fps, not args.images, args.swap_colors, args.episodes)
    if args.dry_run:
        print(*preview(source, options), sep="\n")
        return
    choices = {name: getattr(args, name) for name in ("append", "overwrite", "repeat", "skip_unusable")}
    filesystem = services.get(urlsplit(args.output).scheme)
    with open_pool(args.ray, args.workers) as pool:
        convert_to(args.output, source, options, pool=pool, filesystem=filesystem, **choices)


def _value(kind: object, name: str, given: object) -> object:
    """What a flag says; of a field that is read from a file, what the file says."""
    parts = typing.get_args(typing.get_type_hints(kind)[name])
    load = next((part.load for part in parts if hasattr(part, "load")), None)
    return load(given.expanduser()) if load is not None and isinstance(given, Path) else given


def _readers(kind: type[DataclassInstance]) -> Json:
    """What a format is given that no file says."""
    if not any(field.name == "read_session" for field in dataclasses.fields(kind)):
        return {}
    from openpi.serving.recording import read_session

    return {"read_session": read_session}


def _write_draft(path: Path, content: Mapping[str, object]) -> None:
    with path.open("x", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
    logger.info("written: %s. Look through it, then convert with --mapping %s", path, path)


def _fields(kind: type[DataclassInstance]) -> list[dataclasses.Field[object]]:
    return [field for field in dataclasses.fields(kind) if field.name != "root" and field.repr]


def _add_fields(parser: argparse.ArgumentParser, kind: type[DataclassInstance]) -> None:
    told = docstrings.attributes(kind.__doc__ or "")
    hints = typing.get_type_hints(kind)
    for field in _fields(kind):
        if field.name == "fps":  # every format has that flag
            continue
        flag = f"--{field.name.replace('_', '-')}"
        help_text = told[field.name].replace("%", "%%")
        if hints[field.name] is bool:
            parser.add_argument(flag, action="store_true", dest=field.name, help=help_text)
            continue
        parts = [part for part in typing.get_args(hints[field.name]) if part not in (type(None), ...)]
        if typing.get_origin(hints[field.name]) is tuple:
            reader: Any = _words
        else:
            reader = parts[0] if parts else hints[field.name]
            reader = Path if hasattr(reader, "load") else reader
        parser.add_argument(flag, type=reader, dest=field.name, default=field.default, help=help_text)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def places(text: str) -> tuple[int, ...]:
    """`0,3,7-9` -> (0, 3, 7, 8, 9)."""
    places: list[int] = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())):
            raise argparse.ArgumentTypeError(f"{part!r} is no number or range; expected such as 0,3,7-12")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < first + 1_000_000:
            raise argparse.ArgumentTypeError(f"{part!r} is no range; expected the smaller number first")
        places += range(first, last + 1)
    return tuple(dict.fromkeys(places))
