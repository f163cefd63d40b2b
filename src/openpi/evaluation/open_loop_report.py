"""What an open-loop evaluation found, for people: a page that needs nothing beside it, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table

from openpi.evaluation.open_loop import Moment, Played
from openpi.evaluation.report import table
from openpi.shared import page
from openpi.shared.charts import Line, line_chart
from openpi.shared.evenly_spaced import evenly_spaced
from openpi.shared.image_tools import channels_last
from openpi.shared.tree import flatten

Results = Mapping[str, Any]
_EPISODES, _PICTURES = 3, 6
_PICTURE_PX = 180


def render(results: Results, played: Sequence[tuple[str, Played]], stride: int) -> str:
    """The page; `results` as in `results.json`, and the chunks of each policy by its name."""
    sections = [_head(results), _errors(results), _steps(results), _compared(results), _looks(results)]
    sections += [_episode(results, played, number, stride) for number in _shown(played[0][1].moments)]
    return page.document("open loop: " + " against ".join(name for name, _ in played), filter(None, sections))


def terminal_table(results: Results) -> Table:
    """Error of each policy and baseline, with its share of the best baseline."""
    return table(("mean absolute error", "robot units", "of the best baseline"), [*_rows(results), ("", "", "")])


def _best_baseline(results: Results) -> float:
    return min(found["mean"] for found in results["baselines"].values())


def _rows(results: Results) -> list[tuple[str, str, str]]:
    best = _best_baseline(results)
    return [
        (name, f"{error['mean']:.4g}", f"{error['mean'] / best:.0%}" if best else "") for name, error in _every(results)
    ]


def _every(results: Results) -> list[tuple[str, Results]]:
    """Errors of the policies, then of the baselines, by name."""
    return [*((name, found["error"]) for name, found in results["policies"].items()), *results["baselines"].items()]


def _head(results: Results) -> str:
    best = _best_baseline(results)
    tiles = []
    for i, (name, found) in enumerate(results["policies"].items()):
        small = f"{found['error']['mean'] / best:.0%} of the best baseline" if best else ""
        tiles.append(page.tile("after" if i == 0 else "", name, f"{found['error']['mean']:.4g}", small))
        if found["undecodable"]:
            tiles.append(page.tile("", "no chunk", str(found["undecodable"]), f"of {results['num_frames']} frames"))
    seen = "held out of training" if results["held_out"] else "which training has seen: what was learned by heart"
    if results["trained_on"] is not None:
        seen += f", if this is what training read as {escape(results['trained_on'])}"
    return (
        f"<h1>Open loop on {escape(results['dataset'])}</h1>"
        f"<p>{results['num_frames']} frames of {len(results['episodes'])} episodes, {seen}. A low error here is needed "
        "for a good robot, and no proof of one: errors add up in closed loop.</p>"
        f'<div class="tiles">{"".join(tiles)}</div>'
    )


def _errors(results: Results) -> str:
    names = results["joints"]
    every = _every(results)
    head = ("mean absolute error", "all", *map(escape, names))
    rows = [[escape(name), f"{e['mean']:.4g}", *(_number(v) for v in e["per_joint"])] for name, e in every]
    rows += [
        [
            f"{escape(name)}: spread over noise",
            _number(found["spread"]["mean"]),
            *map(_number, found["spread"]["per_joint"]),
        ]
        for name, found in results["policies"].items()
        if "spread" in found
    ]
    return f'<h2>Per joint, robot units</h2><div class="card">{page.table(head, rows, numbers_from=1)}</div>'


def _steps(results: Results) -> str:
    lines = [
        Line(name, list(enumerate(found["error"]["per_step"])), style)
        for (name, found), style in zip(results["policies"].items(), ("after", "other"), strict=False)
    ]
    best = min(results["baselines"], key=lambda name: results["baselines"][name]["mean"])
    lines.append(Line(best, list(enumerate(results["baselines"][best]["per_step"])), "before"))
    chart = line_chart(lines, x_label="row of the chunk", y_label="mean absolute error")
    smooth = [
        (f"{name}: {what}", values)
        for name, found in results["policies"].items()
        for what, values in found["smoothness"].items()
    ]
    head = ("mean absolute change, in robot units", *map(escape, results["joints"]))
    rows = [[escape(name), *map(_number, values)] for name, values in smooth]
    return (
        f'<h2>Along the chunk, and from step to step</h2><div class="charts"><div class="card">'
        f"<h3>Mean absolute error, in robot units</h3>{chart}</div></div>"
        f'<div class="card">{page.table(head, rows, numbers_from=1)}</div>'
        "<p>A step larger than the recorded one: the policy shakes. A seam larger than a step: a "
        "jump where a new chunk takes over.</p>"
    )


def comparison(results: Results) -> str | None:
    """Of two checkpoints, in words; None of one."""
    found = results.get("paired")
    if found is None:
        return None
    a, b = results["policies"]
    if found["interval_95"] is None:
        return f"{b} less {a}: {found['difference']:+.4g} in one frame, which shows no difference"
    low, high = found["interval_95"]
    verdict = f"{b} is better" if high < 0 else f"{a} is better" if low > 0 else "no difference is shown"
    return (
        f"{b} less {a}: {found['difference']:+.4g}, 95 % interval {low:+.4g} to {high:+.4g} (Student's t over "
        f"{found['drawn_from']}): {verdict}"
    )


def _compared(results: Results) -> str:
    text = comparison(results)
    return "" if text is None else f"<h2>Paired, the same frames and noise</h2><p>{escape(text)}.</p>"


def _looks(results: Results) -> str:
    rows = []
    for name, found in results["policies"].items():
        noise = found.get("spread", {}).get("mean") or float("nan")
        for what, change in found.get("sensitivity", {}).items():
            rows.append([escape(name), escape(what), _number(change), _number(change / noise)])
    if not rows:
        return ""
    head = ("policy", "what was spoilt", "change of the chunk", "times the spread over noise")
    return (
        "<h2>Does it look, does it listen?</h2><p>One input spoilt, the same noise. Well below one: the policy hardly "
        f'uses it.</p><div class="card">{page.table(head, rows, numbers_from=2)}</div>'
    )


def _shown(moments: Sequence[Moment]) -> list[int]:
    return list(dict.fromkeys(moment.episode for moment in moments))[:_EPISODES]


def _episode(results: Results, played: Sequence[tuple[str, Played]], number: int, stride: int) -> str:
    rows = [i for i, moment in enumerate(played[0][1].moments) if moment.episode == number]
    moments = [played[0][1].moments[i] for i in rows]
    charts = []
    for joint, name in enumerate(results["joints"]):
        lines = [Line("recorded", _recorded(moments, joint, stride), "before")]
        for (_, one), style in zip(played, ("after", "other"), strict=False):
            lines += _predicted(one, rows, joint, stride, style)
        chart = line_chart(lines, x_label="step of the episode", y_label=name)
        charts.append(f'<div class="card"><h3>{escape(name)}</h3>{chart}</div>')
    prompt = moments[0].observation.get("prompt", "")
    return (
        f"<h2>Episode {number}</h2><p>{escape(str(prompt))}. Of each chunk what would have been played, and the rest "
        f'faint.</p><div class="films">{_strip(moments)}</div><div class="charts">{"".join(charts)}</div>'
    )


def _recorded(moments: Sequence[Moment], joint: int, stride: int) -> list[tuple[float, float]]:
    return [
        (moment.step + k, float(moment.recorded[k, joint]))
        for moment in moments
        for k in range(min(stride, moment.num_recorded))
    ]


def _predicted(played: Played, rows: Sequence[int], joint: int, stride: int, style: str) -> list[Line]:
    """A line for each chunk; of the first policy its rest, too."""
    lines = []
    for i in rows:
        points = [(played.moments[i].step + k, float(v)) for k, v in enumerate(played.chunks[i, :, joint])]
        inside = points[: max(stride, played.moments[i].num_recorded)]
        lines.append(Line("predicted" if style == "after" else "against", inside[:stride], style))
        if style == "after":
            lines.append(Line("", inside[stride - 1 :], "faint"))
    return lines


def _strip(moments: Sequence[Moment]) -> str:
    """Pictures of all cameras at some frames."""
    figures = []
    for moment in evenly_spaced(moments, _PICTURES):
        images = [np.asarray(v) for v in flatten(moment.observation).values()]
        found = "".join(_picture(i) for i in images if i.dtype == np.uint8 and i.ndim == 3)
        figures.append(f"<figure>{found}<figcaption>step {moment.step}</figcaption></figure>")
    return "".join(figures)


def _picture(image: np.ndarray) -> str:
    picture = Image.fromarray(channels_last(image))
    picture.thumbnail((_PICTURE_PX, _PICTURE_PX))
    return f'<img alt="" src="{page.jpeg_url(picture, quality=80)}">'


def _number(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:.3g}"
