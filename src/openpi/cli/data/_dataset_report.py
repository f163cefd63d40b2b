"""The page of `openpi dataset check`: one HTML file that needs nothing beside it.

All findings as a table; then, of each episode that has some, pictures of every camera and the signals concerned, with
the frames marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from openpi.data.check.findings import Finding, Kind, Report, Severity, by_kind
from openpi.data.lerobot.metadata import LeRobotMetadata
from openpi.data.lerobot.reader import LeRobotDataset
from openpi.shared import page, whole_file
from openpi.shared.charts import Line, line_chart
from openpi.shared.evenly_spaced import evenly_spaced

_MAX_EPISODES = 40  # a page of some MB
_MAX_CHARTS = 6  # of an episode
_PICTURES, _PICTURE_PX = 6, 160
_MOST_POINTS = 600
_STYLE = """
.error { color: var(--other); font-weight: 600; } .warning { font-weight: 600; } .info { color: var(--soft); }
.sheet { display: grid; grid-template-columns: repeat(6, 1fr); gap: 6px; margin: 4px 0 14px; }
.sheet img { width: 100%; border-radius: 4px; display: block; image-rendering: auto; }
.sheet figcaption { font-size: 12px; margin: 2px 0 0; }
.sheet .marked img { outline: 3px solid var(--other); }
td { overflow-wrap: anywhere; } td:first-child, td:nth-child(2) { white-space: nowrap; overflow-wrap: normal; }
.findings { min-width: 900px; } .findings th:nth-child(n + 3) { width: 21%; } .findings th:nth-child(4) { width: 26%; }
main { max-width: 1280px; }
"""


def write(report: Report, root: Path, path: Path) -> None:
    """Writes the page, whole or not at all."""
    whole_file.write_text(path, render(report, root))


def render(report: Report, root: Path) -> str:
    """The page.

    Args:
        root: of the dataset, whose pictures and signals are read again.
    """
    shown = _worst_first(report)[:_MAX_EPISODES]
    sections = [_head(report), _kinds(report), *(_episode(report, root, number) for number in shown)]
    if more := len(report.per_episode) - len(shown):
        sections.append(f'<p class="note">{more} more episodes have findings; the JSON has all of them.</p>')
    return page.document("openpi dataset check", sections, _STYLE)


def _worst_first(report: Report) -> list[int]:
    """Episodes with errors, then those with warnings, then the others."""
    rank = list(Severity)
    found = report.per_episode
    return sorted(found, key=lambda number: (min(rank.index(f.severity) for f in found[number]), number))


def _head(report: Report) -> str:
    tiles = (
        page.tile("other", "errors", str(report.count(Severity.ERROR)), "a policy would learn something wrong"),
        page.tile("before", "warnings", str(report.count(Severity.WARNING)), "somebody should look"),
        page.tile("after", "episodes", str(len(report.lengths)), f"{sum(report.lengths.values())} frames"),
        page.tile("after", "pictures", str(report.num_pictures), f"looked at, in {report.seconds:.0f} s in all"),
    )
    return f'<h1>Dataset check</h1><p><code>{escape(report.root)}</code></p><div class="tiles">{"".join(tiles)}</div>'


def _kinds(report: Report) -> str:
    kinds = by_kind(report.findings)
    if not kinds:
        return "<h2>Findings</h2><p>None.</p>"
    rows = "".join(_kind_row(kind) for kind in kinds)
    head = "<tr><th></th><th>what</th><th>where</th><th>found</th><th>expected</th><th>fix</th></tr>"
    table = f'<table class="findings"><thead>{head}</thead><tbody>{rows}</tbody></table>'
    return f'<h2>Findings</h2><div class="card">{table}</div>'


def _kind_row(kind: Kind) -> str:
    first = kind.first
    level = first.severity.value
    cells = (first.code, kind.where or "the dataset", first.found, first.expected, kind.fix)
    return f'<tr><td class="{level}">{level}</td>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'


def _episode(report: Report, root: Path, number: int) -> str:
    findings = report.per_episode[number]
    told = "".join(
        f'<li><span class="{f.severity.value}">{escape(f.code)}</span> {escape(f.place)}: {escape(f.found)}'
        f"{'; expected ' + escape(f.expected) if f.expected else ''}</li>"
        for f in findings
    )
    title = f'<h2 id="episode-{number}">Episode {number}</h2><ul>{told}</ul>'
    try:
        metadata = LeRobotMetadata.load(root, trust_totals=True)
        columns = [key for key in metadata.column_keys if key in {f.column for f in findings}]
        signals = LeRobotDataset(root, episodes=[number], columns=columns, metadata=metadata)
    except (ValueError, OSError) as error:
        return f'{title}<p class="note">It cannot be shown: {escape(str(error))}</p>'
    sheets = "".join(_sheet(metadata, number, key, findings) for key in metadata.camera_keys)
    return f"{title}{sheets}{_charts(signals, findings)}"


def _sheet(metadata: LeRobotMetadata, number: int, key: str, findings: Sequence[Finding]) -> str:
    try:
        dataset = LeRobotDataset(metadata.root, episodes=[number], columns=[key], metadata=metadata)
        frames = evenly_spaced(range(len(dataset)), _PICTURES)
        pictures = dataset.camera_frames(key, 0, frames)
    except (ValueError, OSError) as error:
        return f"<h3>{escape(key)}</h3><p class='note'>{escape(str(error))}</p>"
    concerned = [finding for finding in findings if finding.column == key]
    figures = [
        f'<figure class="{"marked" if any(_covers(finding, frame) for finding in concerned) else ""}">'
        f'<img alt="{escape(key)}, frame {frame}" src="{_as_url(picture)}">'
        f"<figcaption>frame {frame}</figcaption></figure>"
        for frame, picture in zip(frames, pictures, strict=True)
    ]
    return f'<h3>{escape(key)}</h3><div class="sheet">{"".join(figures)}</div>'


def _covers(finding: Finding, frame: int) -> bool:
    return finding.frames is None or finding.frames[0] <= frame <= finding.frames[1]


def _as_url(picture: np.ndarray) -> str:
    image = Image.fromarray(picture)
    image.thumbnail((_PICTURE_PX, _PICTURE_PX))
    if max(image.size) < _PICTURE_PX:
        scale = _PICTURE_PX // max(image.size)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    return page.jpeg_url(image, quality=85)


def _charts(signals: LeRobotDataset, findings: Sequence[Finding]) -> str:
    cards = []
    for finding in findings:
        if finding.column not in signals.metadata.column_keys or len(cards) >= _MAX_CHARTS:
            continue
        values = signals.column(finding.column).astype(np.float64)
        for dim, name in _dimensions(signals.metadata, finding, values):
            cards.append(_chart(values if values.ndim == 1 else values[:, dim], name, finding))
    return f'<div class="charts">{"".join(cards[:_MAX_CHARTS])}</div>' if cards else ""


def _dimensions(metadata: LeRobotMetadata, finding: Finding, values: np.ndarray) -> list[tuple[int, str]]:
    """Those that a finding is about; the first ones where it is about the column."""
    from openpi.data.lerobot.features import dimension_names

    if values.ndim == 1:
        return [(0, str(finding.column))]
    width = values.shape[1]
    names = dimension_names(metadata.features[str(finding.column)])
    labels = names if len(names) == width else tuple(map(str, range(width)))
    wanted = set((finding.dimension or "").split(", "))
    chosen = [(dim, f"{finding.column}/{name}") for dim, name in enumerate(labels) if name in wanted]
    return chosen or [(dim, f"{finding.column}/{name}") for dim, name in enumerate(labels)][:3]


def _chart(values: np.ndarray, name: str, finding: Finding) -> str:
    step = max(1, len(values) // _MOST_POINTS)
    points = [(float(frame), float(value)) for frame, value in enumerate(values)]
    lines = [Line(name, points[::step], "before")]
    if finding.frames is not None and finding.frames != (0, len(values) - 1):
        first, last = finding.frames
        lines.append(Line(finding.code, points[max(0, first - 1) : last + 2], "other"))
    return f'<div class="card"><h3>{escape(name)}</h3>{line_chart(lines, x_label="frame", y_label=name)}</div>'
