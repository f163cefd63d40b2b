"""`openpi dataset check DATASET_OR_RECIPE`: everything that is wrong in a dataset, with episode, frame and name.

Looks at every column whole, at some pictures of every camera of every episode, and at all metadata against each other
and against the files. Exit codes: 0 = no errors (there may be warnings), 1 = errors, 2 = bad command line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openpi.cli.console import OWN_FIELDS, command, configure_logging
from openpi.cli.data import _dataset_shape
from openpi.cli.data._convert_formats import add_ray

if TYPE_CHECKING:
    from openpi.data.check.findings import Finding, Report
    from openpi.data.check.subject import Reading

SUMMARY = "whether a dataset is whole and of one kind; what is in it; split, merge, shrink"

_MAX_JOBS = 8
_COLORS = {"error": "red", "warning": "yellow", "info": "dim"}


@command("openpi dataset")
def main(argv: list[str] | None = None) -> int | None:
    parser = _parser()
    args, overrides = parser.parse_known_args(argv)
    configure_logging()
    if args.verb != "check":
        if overrides:
            parser.error(f"unrecognized arguments: {' '.join(overrides)}")
        return _dataset_shape.run(args)
    try:
        _check_outputs(args)
        root, reading = locate(args.source, overrides)
    except (ValueError, KeyError, OSError) as error:
        print(f"openpi dataset: {error}", file=sys.stderr)
        return 2
    return _check(args, root, reading)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="openpi dataset", description=SUMMARY, allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    check = verbs.add_parser(
        "check",
        help="everything that is wrong in a dataset, with episode, frame and name",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=OWN_FIELDS,
        allow_abbrev=False,
    )
    check.add_argument(
        "source",
        metavar="DATASET_OR_RECIPE",
        help="folder of a LeRobot dataset, user/name on the hub, or a recipe, which says what is read of its dataset",
    )
    check.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with pictures and plots")
    check.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    check.add_argument(
        "--fix",
        type=Path,
        metavar="FOLDER",
        help="write a new dataset there with what is certain corrected: times, numbers, counts, statistics",
    )
    check.add_argument("--jobs", type=int, default=0, metavar="N", help="processes; default: one per core, at most 8")
    add_ray(check)
    check.add_argument("--no-pictures", action="store_true", help="decode nothing: only tables and metadata")
    _dataset_shape.add_parsers(verbs)
    return parser


def locate(source: str, overrides: Sequence[str] = ()) -> tuple[Path, Reading]:
    """The folder of a dataset, and what a recipe makes of it.

    Raises:
        FileNotFoundError, ValueError: neither a dataset nor a recipe.
    """
    from openpi.data.check.subject import Reading
    from openpi.data.lerobot.home import locate_dataset

    if not _is_recipe(source):
        if overrides:
            raise ValueError(f"unknown flags {' '.join(overrides)}; fields go with a recipe, and '{source}' is none")
        return locate_dataset(source), Reading()
    from openpi.training import config as _config
    from openpi.training.data.dataset_look import reading_of

    config = _config.cli([source, *overrides], prog="openpi dataset check")
    return reading_of(config)


def _is_recipe(source: str) -> bool:
    from openpi.training.config import config_names

    is_file = ".py" in source or (":" in source and not Path(source).exists())
    return not Path(source).is_dir() and (is_file or source in config_names())


def _check_outputs(args: argparse.Namespace) -> None:
    if args.jobs < 0:
        raise ValueError(f"--jobs is {args.jobs}; expected a number of processes, or 0 for one per core")
    if args.fix is not None and args.fix.exists():
        raise FileExistsError(f"--fix={args.fix} exists; name a new folder, nothing is ever changed in place")
    if args.report is not None and not args.report.absolute().parent.is_dir():
        raise FileNotFoundError(f"--report={args.report}: there is no folder {args.report.absolute().parent}")


def _check(args: argparse.Namespace, root: Path, reading: Reading) -> int:
    from openpi.data.check.findings import Severity
    from openpi.data.check.runner import check_dataset
    from openpi.shared.pools import open_pool

    jobs = args.jobs or min(os.cpu_count() or 1, _MAX_JOBS)
    # Ray prints what happens to its workers to standard output, which is for the table or the document.
    with contextlib.redirect_stdout(sys.stderr), open_pool(args.ray, jobs) as pool, _Bar() as bar:
        report = check_dataset(
            root, reading, pool=pool, decodes=not args.no_pictures, on_episode=bar.show, on_stage=bar.stage
        )
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        show(report)
    if args.report is not None:
        from openpi.cli.data._dataset_report import write

        write(report, root, args.report)
        print(f"report: {args.report}", file=sys.stderr)
    if args.fix is not None:
        from openpi.data.check.repair import repair

        done = repair(root, args.fix)
        print(f"{args.fix}: {'; '.join(done) or 'a copy, nothing that is certain was wrong'}", file=sys.stderr)
    return 1 if report.count(Severity.ERROR) else 0


def show(report: Report) -> None:
    """The table of a terminal: one row for all findings of a kind about one signal."""
    import rich
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from openpi.data.check.findings import by_kind

    console = Console(width=None if rich.get_console().is_terminal else 160)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, ratio in (("", None), ("what", None), ("where", 2), ("found", 3), ("expected, fix", 3)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for kind in by_kind(report.findings):
        first = kind.first
        color = _COLORS[first.severity.value]
        told = [part for part in (first.expected, kind.fix) if part]
        cells = (first.severity.value, first.code, kind.where or "the dataset", first.found, ". ".join(told))
        table.add_row(*(f"[{color}]{escape(cell)}[/]" if i < 2 else escape(cell) for i, cell in enumerate(cells)))
    if report.findings:
        console.print(table)
    console.print(escape(summary(report)), highlight=False)


def summary(report: Report) -> str:
    from openpi.data.check.findings import Severity

    counts = [
        f"{count} {severity.value if severity is Severity.INFO or count == 1 else f'{severity.value}s'}"
        for severity in Severity
        if (count := report.count(severity))
    ]
    found = ", ".join(counts) or "nothing found"
    return (
        f"{report.root}: {found} in {len(report.lengths)} episodes, {sum(report.lengths.values())} frames, "
        f"{report.num_pictures} pictures looked at ({report.seconds:.1f} s)"
    )


def lines(findings: Iterable[Finding]) -> list[str]:
    """One line for each kind of finding that is more than worth knowing."""
    from openpi.data.check.findings import Severity, by_kind

    return [kind.line for kind in by_kind(findings) if kind.first.severity is not Severity.INFO]


class _Bar:
    """What is looked at now, and how far that is: a bar on terminals, else a log line now and then."""

    def __enter__(self) -> _Bar:
        import rich.progress as bars
        from rich.console import Console

        from openpi.shared.slow import Pace

        console = Console(stderr=True)
        columns = ("{task.description}", bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn())
        self._bars = bars.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bars.add_task("opening", total=None)
        self._bars.start()
        self._pace = None if console.is_terminal else Pace("pictures of episodes looked at")
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage(self, name: str) -> None:
        self._bars.update(self._task, description=name)

    def show(self, done: int, total: int) -> None:
        self._bars.update(self._task, completed=done, total=total)
        if self._pace is not None:
            self._pace.show(done, total)
