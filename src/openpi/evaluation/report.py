"""What an evaluation found, for people: `report.html`, which needs nothing beside it, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from openpi.shared import page
from openpi.shared.charts import rate_chart
from openpi.shared.strict_json import Json

Results = Mapping[str, Any]


def render(results: Results, folder: Path) -> str:
    """The page of one evaluation: the contents of `results.json`, and the folder that it is in."""
    sections = [_head(results), _tasks(results), _films(results, folder), _ends(results), _setup(results)]
    return page.document(f"{results['world']}: evaluation", sections)


def render_comparison(comparison: Results, a: Results, b: Results, folders: Sequence[Path]) -> str:
    """The page of two evaluations: what `compare` found, and the two."""
    total = comparison["total"]
    tiles = [
        page.tile("before", f"A: {_policy(a)}", *page.rate_words(total["a"])),
        page.tile("after", f"B: {_policy(b)}", *page.rate_words(total["b"])),
        page.tile("", "B less A", _points(total["difference"]), difference_words(total)),
    ]
    groups = [
        (task, [page.rate(pair["a"], "A", "before"), page.rate(pair["b"], "B", "after")])
        for task, pair in [*comparison["per_task"].items(), ("all tasks", total)]
    ]
    rows = [[escape(cell) for cell in row] for row in comparison_rows(comparison)]
    sections = [
        f"<h1>Two policies in {escape(str(a['world']))}</h1><p>The same tasks and seeds for both.</p>"
        f'<div class="tiles">{"".join(tiles)}</div>',
        '<h2>Success</h2><p class="legend"><span class="key before">A</span><span class="key after">B</span></p>'
        f'<div class="card">{rate_chart(groups)}</div>'
        f'<div class="card">{page.table(_COMPARED, rows, numbers_from=4, last_is_sum=True)}</div>',
        *(_films(results, folder, name) for name, results, folder in zip("AB", (a, b), folders, strict=True)),
        *(_setup(results, name) for name, results in zip("AB", (a, b), strict=True)),
    ]
    return page.document(f"{a['world']}: comparison", sections)


def difference_words(pair: Json) -> str:
    low, high = pair["newcombe_95"]
    return (
        f"95 % interval {_points(low)} to {_points(high)}; only A {pair['only_a']}, only B {pair['only_b']}, "
        f"exact McNemar p = {pair['p_value']:.2g}"
    )


_COMPARED = ("task", "A", "B", "B less A", "only A", "only B", "p")


def comparison_rows(comparison: Results) -> list[list[str]]:
    """A row per task, and one for all."""
    pairs = [*comparison["per_task"].items(), ("all tasks", comparison["total"])]
    return [
        [
            task,
            page.tally_cell(pair["a"]),
            page.tally_cell(pair["b"]),
            f"{_points(pair['difference'])} [{_points(pair['newcombe_95'][0])}, {_points(pair['newcombe_95'][1])}]",
            str(pair["only_a"]),
            str(pair["only_b"]),
            f"{pair['p_value']:.2g}",
        ]
        for task, pair in pairs
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For the terminal; the last row is the sum."""
    shown = Table(*head, box=None, header_style="dim", pad_edge=False)
    for row in rows:
        shown.add_row(*row, style="bold" if row is rows[-1] else None)
    return shown


def terminal_table(results: Results) -> Table:
    return table(_PER_TASK, _task_rows(results))


def comparison_table(comparison: Results) -> Table:
    return table(_COMPARED, comparison_rows(comparison))


_PER_TASK = ("task", "success, with its 95 % interval", "steps of a success")


def _task_rows(results: Results) -> list[list[str]]:
    rows = [
        [task, page.tally_cell(tally), _number(results["steps_of_success"][task])]
        for task, tally in results["per_task"].items()
    ]
    return [*rows, ["all tasks", page.tally_cell(results["total"]), ""]]


def _head(results: Results) -> str:
    tiles = [
        page.tile("after", "success", *page.rate_words(results["total"])),
        page.tile(
            "",
            "episodes",
            str(len(results["episodes"])),
            f"{len(results['per_task'])} tasks, seed {results['seed']} on",
        ),
    ]
    if "wall_s" in results:
        seconds = results["wall_s"] / max(1, results["num_played"])
        tiles.append(page.tile("", "per episode", f"{seconds:.1f} s", f"{results['workers']} worlds at once"))
    if "round_trip_ms" in results:
        trip = results["round_trip_ms"]
        small = f"95th percentile {trip['p95']:.0f} ms, {results['mean_batch']:.1f} observations on average"
        tiles.append(page.tile("", "per answer", f"{trip['p50']:.0f} ms", small))
    return (
        f"<h1>{escape(_policy(results))} in {escape(str(results['world']))}</h1>"
        f'<div class="tiles">{"".join(tiles)}</div>'
    )


def _tasks(results: Results) -> str:
    groups = [(task, [page.rate(tally, "success", "after")]) for task, tally in results["per_task"].items()]
    groups.append(("all tasks", [page.rate(results["total"], "success", "after")]))
    rows = [[escape(cell) for cell in row] for row in _task_rows(results)]
    return (
        "<h2>Success in closed loop</h2><p>Bars and brackets are 95 % Wilson intervals.</p>"
        f'<div class="card">{rate_chart(groups)}</div>'
        f'<div class="card">{page.table(_PER_TASK, rows, numbers_from=2, last_is_sum=True)}</div>'
    )


def _films(results: Results, folder: Path, whose: str = "") -> str:
    if not results["videos"]:
        return ""
    notes = [video["note"] or f"seed {video['seed']}" for video in results["videos"]]
    titled = [
        {**video, "prompt": video["task"], "told_prompt": video["prompt"], "note": note}
        for video, note in zip(results["videos"], notes, strict=True)
    ]
    return f"<h2>{f'Episodes of {whose}' if whose else 'Episodes'}, failures first</h2>{page.films(titled, folder)}"


def _ends(results: Results) -> str:
    parts = [("How episodes ended", results["ends"]), ("Warnings, and in how many episodes", results["warnings"])]
    parts.append(("Measured at the end, mean", {k: _number(v) for k, v in results["measurements"].items()}))
    parts.append(("Not played", dict.fromkeys(results["errors"], "")))
    return "".join(f'<h2>{title}</h2><div class="card">{_pairs(values)}</div>' for title, values in parts if values)


def _setup(results: Results, whose: str = "it") -> str:
    names = ("policy", "world_options", "strategy", "execute_horizon", "latency_ms", "held_steps", "repeatable")
    return f'<h2>How {whose} was played</h2><div class="card">{_pairs({name: results[name] for name in names})}</div>'


def _pairs(values: Mapping[str, object]) -> str:
    return page.table(["", ""], [[escape(str(name)), escape(_shown(value))] for name, value in values.items()])


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {inner}" for name, inner in value.items())
    return _number(value) if isinstance(value, float) else str(value)


def _policy(results: Results) -> str:
    return str(next(iter(results["policy"].values())))


def _points(share: float) -> str:
    return f"{100 * share:+.0f} points"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
