"""The report: one HTML file that needs nothing beside it, from what `report.json` holds and the films."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from openpi.shared import page
from openpi.shared.charts import Line, line_chart, rate_chart, smooth

Findings = Mapping[str, Any]

EVALUATIONS = "evaluations"
"""Folder of the evaluations in that of the demo."""

FRAMEWORKS = {"jax": "JAX", "pytorch": "PyTorch"}
"""Names of backends, as people write them."""

_STAGE_NAMES = {
    "record": "Record demonstrations",
    "stats": "Statistics",
    "evaluate_before": "Serve the base, evaluate",
    "train": "Fine-tune",
    "evaluate_after": "Serve the checkpoint, evaluate",
    "prompt_swap": "Prompt swap",
    "from_scratch": "Without the base",
}


def render(findings: Findings, folder: Path) -> str:
    """The page.

    Args:
        findings: the contents of `report.json`.
        folder: that the demo wrote to; films are read from `evaluations/` in it.
    """
    sections = [
        _head(findings),
        _success(findings),
        _films(findings, folder),
        _language(findings, folder),
        _training(findings),
        _repeat(findings),
        _costs(findings),
        _machine(findings),
    ]
    return page.document("openpi demo", sections)


def _head(findings: Findings) -> str:
    evaluations = findings["evaluations"]
    swapped = evaluations["swapped"]
    tiles = [
        page.tile("before", "success before", *page.rate_words(evaluations["before"]["total"])),
        page.tile("after", "success after fine-tuning", *page.rate_words(evaluations["after"]["total"])),
        page.tile("other", "success when told something else", *page.rate_words(swapped["total"])),
        page.tile("", "from nothing to this page", page.duration(findings["total_seconds"]), _memory_words(findings)),
    ]
    quick = (
        '<p class="no">A quick run: sizes only fit to see that everything works, nothing was learnt.</p>'
        if findings["quick"]
        else ""
    )
    return (
        "<h1>A new task in a few minutes</h1>"
        "<p>The small pi0.5 that comes with openpi can pick up blocks and move to plates. It was shown "
        f"{findings['demonstrations']} demonstrations of a task that it had never seen, putting a block on a plate, "
        "fine-tuned on them, and served to a simulated robot over a websocket, trained and served with "
        f"{FRAMEWORKS[findings['backend']]}.</p>"
        f'{quick}<div class="tiles">{"".join(tiles)}</div>'
    )


def _success(findings: Findings) -> str:
    evaluations = findings["evaluations"]
    shown = [("before", "before", "before"), ("after", "after", "after"), ("scratch", "without the base", "other")]
    shown = [(name, label, style) for name, label, style in shown if name in evaluations]
    prompts = list(evaluations["after"]["per_prompt"])
    groups = [
        (prompt, [page.rate(evaluations[name]["per_prompt"][prompt], label, style) for name, label, style in shown])
        for prompt in prompts
        if all(prompt in evaluations[name]["per_prompt"] for name, _, _ in shown)
    ]
    groups.append(
        ("all prompts", [page.rate(evaluations[name]["total"], label, style) for name, label, style in shown])
    )
    head = ["prompt", *(label for _, label, _ in shown)]
    rows = [
        [escape(prompt), *(page.tally_cell(evaluations[name]["per_prompt"].get(prompt)) for name, _, _ in shown)]
        for prompt in prompts
    ]
    rows.append(["all prompts", *(page.tally_cell(evaluations[name]["total"]) for name, _, _ in shown)])
    keys = "".join(f'<span class="key {style}">{label}</span>' for _, label, style in shown)
    latency = evaluations["after"]["round_trip_ms"]
    return (
        "<h2>Success in closed loop</h2>"
        f"<p>{findings['episodes']} episodes each, in scenes that no demonstration showed, the same scenes for all. "
        "Bars and brackets are 95 % Wilson intervals. The policy is asked for a chunk every "
        f"{evaluations['after']['execute_horizon']} steps of 0.1 s; its answer takes {latency['p50']:.0f} ms "
        f"(95th percentile {latency['p95']:.0f} ms) over the wire.</p>"
        f'<div class="card"><p class="legend">{keys}</p>{rate_chart(groups)}</div>'
        f'<div class="card">{page.table(head, rows, last_is_sum=True)}</div>'
    )


def _films(findings: Findings, folder: Path) -> str:
    parts = ["<h2>Camera videos</h2><p>Left the front camera, right the wrist camera as the policy sees it.</p>"]
    for name, title in (("after", "After fine-tuning"), ("before", "Before"), ("scratch", "Without the base")):
        if name in findings["evaluations"]:
            parts.append(f"<h3>{title}</h3>{page.films(findings['evaluations'][name]['videos'], folder / EVALUATIONS)}")
    return "".join(parts)


def _language(findings: Findings, folder: Path) -> str:
    swapped, after = findings["evaluations"]["swapped"], findings["evaluations"]["after"]
    trials = swapped["total"]["trials"]
    same_scenes = sum(episode["success"] for episode in after["episodes"][:trials])
    num_compared = min(trials, len(after["episodes"]))
    rows = [
        ["told what it is judged by", f"{same_scenes}/{num_compared}"],
        ["told another prompt, judged by the first", page.tally_cell(swapped["total"])],
        ["told another prompt, judged by what it was told", page.tally_cell(swapped["told"])],
    ]
    return (
        "<h2>Does it listen?</h2>"
        "<p>The same policy in the same scenes, but told another of the six prompts. If it went by the picture alone, "
        "nothing would change; if language steers it, success by the original prompt collapses and the block or plate "
        "that was named is used instead.</p>"
        f'<div class="card">{page.table(["the policy is", "success"], rows)}</div>'
        f"{page.films(swapped['videos'], folder / EVALUATIONS)}"
    )


def _training(findings: Findings) -> str:
    charts = [
        ("Loss", "flow-matching loss", "loss", True),
        ("Validation action error", "mean absolute error, rad", "action_error", False),
        ("Validation loss", "loss on held-out episodes", "validation_loss", False),
        ("Learning rate", "learning rate", "learning_rate", False),
    ]
    cards = "".join(
        f'<div class="card"><h3>{title}</h3>{_metric_chart(findings["training"], metric, unit, is_loss)}</div>'
        for title, unit, metric, is_loss in charts
    )
    return f'<h2>Training</h2><p>From the trainer\'s <code>metrics.jsonl</code>.</p><div class="charts">{cards}</div>'


def _metric_chart(training: Mapping[str, Sequence[Mapping[str, float]]], metric: str, unit: str, is_loss: bool) -> str:
    lines = []
    for run, label, style in (("finetuned", "from the base", "after"), ("scratch", "without the base", "other")):
        points = [(row["step"], row[metric]) for row in training.get(run, ()) if metric in row]
        if is_loss and run == "finetuned":
            lines.append(Line("every report", points, "faint"))
        lines.append(Line(label, smooth(points) if is_loss else points, style))
    return line_chart(lines, x_label="step", y_label=unit, log_y=is_loss)


def _repeat(findings: Findings) -> str:
    commands = "\n".join(page.command(command) for command in findings["commands"])
    return (
        "<h2>Repeat it, or do it with your own data</h2>"
        "<p>Everything above was done by these commands. With a LeRobot dataset of your own, put its folder in "
        "<code>--data.repo-id</code>, and the recipe of your robot in place of <code>tabletop_place</code>.</p>"
        f'<div class="code">{commands}</div>'
    )


def _costs(findings: Findings) -> str:
    seconds, memory = findings["seconds_per_stage"], findings["peak_memory_mb_per_stage"]
    longest = max(seconds.values())
    rows = [
        [
            _STAGE_NAMES[name],
            f'<span class="bar" style="width:{100 * value / longest:.1f}%"></span>',
            f"{value:.1f} s",
            f"{memory[name]:.0f} MB",
        ]
        for name, value in seconds.items()
        if value >= 0.05  # a stage that was left out
    ]
    rows.append(["all", "", f"{findings['total_seconds']:.1f} s", f"{findings['peak_memory_mb']:.0f} MB"])
    table = page.table(["stage", "", "time", "peak memory"], rows, numbers_from=2, last_is_sum=True)
    return (
        f'<h2>What it cost</h2><div class="card">{table}</div>'
        '<p class="note">Memory: the peaks of all processes of a stage added up, an upper bound.</p>'
    )


def _machine(findings: Findings) -> str:
    rows = [[name, escape(value)] for name, value in {**findings["machine"], **findings["versions"]}.items()]
    return f'<h2>Machine and versions</h2><div class="card">{page.table(["", ""], rows)}</div>'


def _memory_words(findings: Findings) -> str:
    return f"{findings['machine']['cores']} cores, at most {findings['peak_memory_mb'] / 1000:.1f} GB of memory"
