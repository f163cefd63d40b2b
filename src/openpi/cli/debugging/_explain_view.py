"""The report of `openpi explain`: rich tables on a terminal, aligned text elsewhere, or JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from openpi.training.data.sample_checks import Finding
from openpi.training.data.sample_trace import Leaf

if TYPE_CHECKING:
    from rich.table import Table

_HEADER = ("key", "dtype", "shape", "min", "mean", "max", "value")


@dataclasses.dataclass(frozen=True)
class StageReport:
    """One stage, ready to be shown.

    Attributes:
        direction: `input` or `output`.
        removed: keys that the step took away.
    """

    direction: str
    title: str
    leaves: Sequence[Leaf]
    removed: Sequence[str]
    findings: Sequence[Finding]

    def as_json(self) -> dict[str, object]:
        return {
            "direction": self.direction,
            "title": self.title,
            "leaves": [_leaf_as_json(leaf) for leaf in self.leaves],
            "removed": list(self.removed),
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }


class JsonView:
    """Collects everything and prints one document at the end."""

    def __init__(self, out: TextIO, about: dict[str, str]) -> None:
        self._out = out
        self._about = about
        self._stages: list[StageReport] = []

    def stage(self, report: StageReport) -> None:
        self._stages.append(report)

    def close(self, error: str | None) -> None:
        surprises = sum(f.is_surprise for stage in self._stages for f in stage.findings)
        stages = [stage.as_json() for stage in self._stages]
        document = {**self._about, "stages": stages, "surprises": surprises, "error": error}
        self._out.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


class TextView:
    """Prints stages as they come; colours and tables on a terminal only."""

    def __init__(self, out: TextIO, about: dict[str, str]) -> None:
        from rich.console import Console

        self._console = Console(file=out, highlight=False, soft_wrap=not out.isatty())
        self._surprises = 0
        self._remarks = 0
        for key, value in about.items():
            self._line(f"{key + ':':<13}{value}")

    def stage(self, report: StageReport) -> None:
        self._line("")
        self._line(f"== {report.title}", style="bold")
        changed = [leaf for leaf in report.leaves if leaf.is_new]
        if changed and self._console.is_terminal:
            self._console.print(_table(changed))
        elif changed:
            for line in _aligned([_HEADER, *map(_row, changed)]):
                self._line(line)
        self._keys("unchanged", [leaf.key for leaf in report.leaves if not leaf.is_new])
        self._keys("removed", report.removed)
        for finding in report.findings:
            self._surprises += finding.is_surprise
            self._remarks += not finding.is_surprise
            sign, style = ("!!", "bold red") if finding.is_surprise else ("--", "yellow")
            code = f"[{finding.code}] " if finding.code else ""
            self._line(f"  {sign} {code}{finding.key}: {finding.message}", style=style)

    def close(self, error: str | None) -> None:
        self._line("")
        if error is not None:
            self._line(f"stopped: {error}", style="bold red")
        style = "bold red" if self._surprises else "green"
        self._line(f"{self._surprises} surprises (!!), {self._remarks} remarks (--)", style=style)

    def _keys(self, title: str, keys: Sequence[str]) -> None:
        if keys:
            self._line(f"   {title}: {', '.join(keys)}", style="dim")

    def _line(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, emoji=False)


def _table(leaves: Sequence[Leaf]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in _HEADER:
        table.add_column(name, justify="right" if name in ("min", "mean", "max") else "left", overflow="fold")
    for leaf in leaves:
        table.add_row(*(Text(cell) for cell in _row(leaf)))
    return table


def _row(leaf: Leaf) -> tuple[str, ...]:
    shape = f"[{', '.join(map(str, leaf.shape))}]"
    numbers = ("", "", "") if leaf.range is None or leaf.text is not None else tuple(f"{x:.4g}" for x in leaf.range)
    return (leaf.key, leaf.dtype, shape, *numbers, leaf.text or "")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    return ["   " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _leaf_as_json(leaf: Leaf) -> dict[str, object]:
    low, mean, high = leaf.range or (None, None, None)
    finite = {name: _finite(x) for name, x in (("min", low), ("mean", mean), ("max", high))}
    return {
        "key": leaf.key,
        "dtype": leaf.dtype,
        "shape": list(leaf.shape),
        **finite,
        "text": leaf.text,
        "is_new": leaf.is_new,
    }


def _finite(x: float | None) -> float | None:
    return x if x is not None and abs(x) != float("inf") else None
