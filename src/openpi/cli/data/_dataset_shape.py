"""`openpi dataset info | view | split | merge | shrink`: what a dataset is, and new ones of it. None is changed.

    info DATASET                          what is in it
    view DATASET [--port N]               a page to look at it
    split DATASET OUT=PART [OUT=PART ...]  PART: a share (0.9), episodes (0,3,7-12), or `rest`
    merge DATASET DATASET ... --output OUT
    shrink DATASET OUT --size 224x224      cameras letterboxed as a model sees them; --fps 15: at a slower rate

Exit codes: 0 = done; 1 = failed; 2 = bad command line; 130 = stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openpi.cli.data._convert_formats import add_ray, places

if TYPE_CHECKING:
    from openpi.data.lerobot.metadata import LeRobotMetadata
    from openpi.data.lerobot.reader import LeRobotDataset
    from openpi.shared.strict_json import Json

logger = logging.getLogger(__name__)

_MOST_TASKS = 50  # that are listed
_SAME_RATE = 1e-3

SUMMARIES = {
    "info": "what is in a dataset",
    "view": "a page on this machine: pictures, signals and findings, episode by episode",
    "split": "episodes of a dataset into new ones",
    "merge": "datasets of one form into a new one",
    "shrink": "a dataset with its cameras at the size that a model sees, or at a slower rate",
}


def add_parsers(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parsers = {
        verb: verbs.add_parser(
            verb,
            help=summary,
            description=f"{summary}.\n\n{__doc__}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for verb, summary in SUMMARIES.items()
    }
    for verb in ("info", "view", "split", "shrink"):
        parsers[verb].add_argument("source", metavar="DATASET", help="folder of a LeRobot dataset, or user/name")
    parsers["info"].add_argument("--json", action="store_true", help="one JSON document instead of the text")
    parsers["view"].add_argument("--port", type=int, default=8010, help="of this machine; 0 = a free one")
    parsers["view"].add_argument("--no-check", action="store_true", help="look for no findings first")
    parsers["split"].add_argument("parts", nargs="+", type=_part, metavar="OUT=PART")
    parsers["split"].add_argument("--seed", type=int, default=0, help="of which episodes a share gets")
    parsers["merge"].add_argument("sources", nargs="+", metavar="DATASET")
    parsers["merge"].add_argument("--output", type=Path, required=True, metavar="OUT", help="folder of the new dataset")
    parsers["merge"].add_argument("--common", action="store_true", help="leave out columns that not all of them have")
    shrink = parsers["shrink"]
    shrink.add_argument("output", type=Path, metavar="OUT", help="folder of the new dataset")
    shrink.add_argument("--size", type=_size, default=(224, 224), metavar="HxW", help="pixels; default 224x224")
    shrink.add_argument("--codec", choices=("av1", "h264", "images"), help="default: AV1, where it can be written")
    shrink.add_argument("--fps", type=float, help="a whole part of the dataset's rate: other frames are left out")
    shrink.add_argument("--cameras", nargs="+", metavar="KEY", help="to keep; default: all")
    shrink.add_argument("--workers", type=int, help="processes; default: one for each processor")
    add_ray(shrink)
    shrink.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    for verb in ("split", "shrink"):
        _add_selection(parsers[verb])


def run(args: argparse.Namespace) -> None:
    {"info": _info, "view": _view, "split": _split, "merge": _merge, "shrink": _shrink}[args.verb](args)


def _add_selection(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("episodes left out")
    group.add_argument("--exclude-episodes", type=places, default=(), metavar="0,3,7-12")
    # As messages about a dataset have it, which are made for `openpi train`.
    group.add_argument("--data.exclude-episodes", dest="exclude_episodes", nargs="+", type=int, help=argparse.SUPPRESS)
    group.add_argument("--exclude-findings", metavar="FILE", help="of `openpi dataset check --json`: those with errors")
    group.add_argument("--exclude-kinds", nargs="+", default=("error",), metavar="KIND", help="warning, videos, ...")
    group.add_argument("--exclude-where", metavar="CONDITION", help="such as 'length < 50 or max(abs(action)) > 3'")


def _part(text: str) -> tuple[Path, object]:
    name, _, part = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} names no folder; expected OUT=PART, such as train=0.9")
    if part == "rest":
        return Path(name), part
    try:
        share = float(part) if "." in part else None
    except ValueError:
        share = None
    if share is None:
        return Path(name), places(part)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share above 0 and at most 1")
    return Path(name), share


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and 16 <= int(side) <= 4096 for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected height x width in pixels, such as 224x224")
    return int(sides[0]), int(sides[1])


def _opened(args: argparse.Namespace) -> tuple[LeRobotMetadata, list[int]]:
    """The metadata, and the numbers of the episodes that are not left out."""
    from openpi.data.lerobot.home import locate_dataset
    from openpi.data.lerobot.metadata import LeRobotMetadata
    from openpi.data.selection import Selection

    metadata = LeRobotMetadata.load(locate_dataset(args.source))
    kinds = (args.exclude_episodes, args.exclude_findings, tuple(args.exclude_kinds), args.exclude_where)
    return metadata, Selection(*kinds).kept(metadata)


def _split(args: argparse.Namespace) -> None:
    from openpi.data.lerobot.shaping import divide, split

    metadata, kept = _opened(args)
    if len({output for output, _ in args.parts}) < len(args.parts):
        raise ValueError("two parts have one folder")
    parts = divide(kept, {str(output): part for output, part in args.parts}, seed=args.seed)
    told = {"parts": {str(output): str(part) for output, part in args.parts}, "seed": args.seed}
    folders = {Path(name): numbers for name, numbers in parts.items()}
    with _episodes(sum(map(len, parts.values()))) as advance:
        split(metadata, folders, advance, told=told)
    for name, numbers in parts.items():
        logger.info("written: %s, %d episodes", name, len(numbers))


def _merge(args: argparse.Namespace) -> None:
    from openpi.data.lerobot.home import locate_dataset
    from openpi.data.lerobot.metadata import LeRobotMetadata
    from openpi.data.lerobot.shaping import merge

    metadatas = [LeRobotMetadata.load(locate_dataset(source)) for source in args.sources]
    with _episodes(sum(len(metadata.episodes) for metadata in metadatas)) as advance:
        merge(metadatas, args.output, advance, common=args.common)
    logger.info("written: %s", args.output)


def _shrink(args: argparse.Namespace) -> None:
    from openpi.convert.engine import Options, convert
    from openpi.convert.formats.lerobot import ResizedDataset
    from openpi.convert.shrinking import compare
    from openpi.data.lerobot.annotations import copy_subtasks
    from openpi.data.lerobot.copying import warn_of_lost
    from openpi.shared.pools import open_pool

    metadata, kept = _opened(args)
    if unknown := sorted(set(args.cameras or ()) - set(metadata.camera_keys)):
        raise ValueError(f"--cameras has {unknown}; {metadata.root} has {list(metadata.camera_keys)}")
    if args.output.resolve() == metadata.root.resolve():
        raise ValueError(f"{args.output} is the dataset itself; name another folder, nothing is ever changed in place")
    if not metadata.camera_keys:
        raise ValueError(f"{metadata.root} has no cameras to shrink")
    warn_of_lost(metadata)
    stride = 1 if args.fps is None else _stride(metadata.fps, args.fps)
    source = ResizedDataset(metadata.root, args.size, None if args.cameras is None else tuple(args.cameras), stride)
    order = {episode.index: place for place, episode in enumerate(metadata.episodes)}
    use_videos = args.codec != "images"
    options = Options(
        use_videos=use_videos,
        video_codec=args.codec if use_videos else None,
        episodes=tuple(order[number] for number in kept),
    )
    with open_pool(args.ray, args.workers) as pool:
        beside = functools.partial(copy_subtasks, metadata.root)
        convert(source, args.output, options, overwrite=args.overwrite, pool=pool, beside=beside)
    logger.info("written: %s", args.output)
    print(*compare(metadata.root, kept, args.output, args.size, stride).lines(), sep="\n")


def _stride(found: float, wanted: float) -> int:
    """One frame of how many is kept."""
    stride = round(found / wanted) if 0 < wanted <= found else 0
    if not stride or abs(found / wanted - stride) > _SAME_RATE:
        parts = ", ".join(f"{found / part:g}" for part in range(2, 6))
        raise ValueError(
            f"--fps is {wanted:g}, and the dataset has {found:g}; expected a whole part of it: {parts}, ..."
        )
    if stride > 1:
        logger.warning(
            "one frame of %d is kept, with the action that was recorded with it: right where actions are positions to "
            "go to. Changes per frame would have to be added up over the frames that are left out",
            stride,
        )
    return stride


@contextlib.contextmanager
def _episodes(total: int) -> Iterator[Callable[[], None]]:
    """A bar, and what moves it on by an episode."""
    from openpi.convert.progress import Progress

    with Progress("episodes", total) as progress:
        yield progress.advance


def _info(args: argparse.Namespace) -> None:
    from openpi.data.lerobot.home import locate_dataset
    from openpi.data.lerobot.metadata import LeRobotMetadata

    found = describe(LeRobotMetadata.load(locate_dataset(args.source), trust_totals=True))
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(*_told(found), sep="\n")


def _view(args: argparse.Namespace) -> None:
    from openpi.cli._pages import LOOPBACK
    from openpi.cli.data._dataset_view import Pages, open_server
    from openpi.data.check.runner import check_dataset, takes_long
    from openpi.data.lerobot.home import locate_dataset

    root = locate_dataset(args.source)
    dataset = shown(root)
    is_looked_at = not args.no_check and not takes_long(len(dataset), len(dataset.episodes))
    findings = check_dataset(root, decodes=False).findings if is_looked_at else ()
    with open_server(Pages(dataset, findings), args.port) as server:
        print(f"http://{LOOPBACK}:{server.server_address[1]}  (Ctrl-C ends it)", flush=True)
        server.serve_forever()


def shown(root: Path) -> LeRobotDataset:
    """A dataset to look at: without the episodes that cannot be opened, which are told; a large one has to be whole."""
    from openpi.data.check.runner import readable, takes_long
    from openpi.data.lerobot.metadata import LeRobotMetadata
    from openpi.data.lerobot.reader import LeRobotDataset

    metadata = LeRobotMetadata.load(root, trust_totals=True)
    if takes_long(metadata.num_frames, len(metadata.episodes)):
        logger.info(
            "not looked through for faults, for its %d episodes; `openpi dataset check %s` does",
            len(metadata.episodes),
            root,
        )
        return LeRobotDataset(root, metadata=metadata)
    numbers, faults = readable(metadata)
    for fault in faults:
        print(f"not shown: {fault.place}: {fault.found}", file=sys.stderr)
    return LeRobotDataset(root, episodes=numbers, metadata=metadata)


def describe(metadata: LeRobotMetadata) -> dict[str, object]:
    """A dataset in numbers, by its metadata alone, as JSON."""
    from openpi.data.lerobot.features import INDEX_FEATURES, dimension_names

    if not metadata.episodes:
        raise ValueError(f"{metadata.root} has no episodes")
    lengths = np.array([episode.length for episode in metadata.episodes])
    tasks = Counter(task for episode in metadata.episodes for task in episode.tasks)
    features = {
        key: {"dtype": feature["dtype"], "shape": list(feature["shape"]), "names": list(dimension_names(feature))}
        for key, feature in metadata.features.items()
        if key not in INDEX_FEATURES
    }
    for key, reason in metadata.unreadable.items():
        features[key]["unreadable"] = reason
    sizes = [path.stat().st_size for path in metadata.root.rglob("*") if path.is_file()]
    return {
        "dataset": str(metadata.root),
        "version": metadata.version,
        "robot_type": metadata.robot_type,
        "fps": metadata.fps,
        "num_episodes": len(lengths),
        "num_frames": int(lengths.sum()),
        "hours": round(float(lengths.sum()) / metadata.fps / 3600, 3),
        "length": {name: float(np.quantile(lengths, q)) for name, q in (("min", 0), ("median", 0.5), ("max", 1))},
        "num_bytes": sum(sizes),
        "num_files": len(sizes),
        "cameras": list(metadata.camera_keys),
        "features": features,
        "tasks": dict(tasks.most_common()),
    }


def _told(found: Json) -> Sequence[str]:
    length = found["length"]
    lines = [
        f"{found['dataset']}: LeRobot {found['version']}, robot {found['robot_type'] or '(nobody says)'}",
        f"{found['num_episodes']} episodes, {found['num_frames']} frames at {found['fps']:g} Hz ({found['hours']} h)",
        f"episodes of {length['min']:g} to {length['max']:g} frames, median {length['median']:g}",
        f"{found['num_bytes'] / 1e6:,.1f} MB in {found['num_files']} files",
    ]
    width = max(map(len, found["features"]), default=0)
    for key, feature in found["features"].items():
        about = feature.get("unreadable") or ("" if key in found["cameras"] else ", ".join(feature["names"]))
        lines.append(f"  {key:<{width}}  {feature['dtype']} {feature['shape']}  {about}".rstrip())
    tasks = found["tasks"]
    lines += [f"  {count:>6} episodes: {task!r}" for task, count in itertools.islice(tasks.items(), _MOST_TASKS)]
    if len(tasks) > _MOST_TASKS:
        lines.append(f"  and {len(tasks) - _MOST_TASKS} tasks more; --json has all")
    return lines
