"""The page: what was found, beside what we aim at."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from gpu_parts import models
from gpu_parts.table import PARTS

Record = dict[str, Any]

_ON_DEVICE = ("prefix", "denoising")


_RATE = "1/s"  # the more the better; of everything else the less


@dataclasses.dataclass(frozen=True)
class Goal:
    """A number that we aim at.

    Attributes:
        parts, case, figure, quantile: where what was reached is found; by the beginning of parts, by a piece of cases.
        chosen_by: the figure by which the best of several is chosen; None = this one.
        without: a part that does not count.
        wants_more: the more the better, as of rates.
    """

    what: str
    parts: str
    case: str
    figure: str
    target: float
    unit: str
    quantile: str = "p50"
    chosen_by: str | None = None
    without: str | None = None
    wants_more: bool = False


_FP8 = "latency/pytorch-fp8"
_CALL, _CLIENTS = ("latency/", "published"), ("serving", "clients, websockets")
GOALS = (
    Goal("whole policy call, first goal", *_CALL, "policy call", 14.0, "ms", without=_FP8),
    Goal("whole policy call", *_CALL, "policy call", 9.2, "ms", without=_FP8),
    Goal("p99 / p50 of the fastest", *_CALL, "p99 / p50", 1.05, "", chosen_by="policy call", without=_FP8),
    Goal("the same in FP8", _FP8, "published", "policy call", 9.0, "ms"),
    Goal("its lowest cosine to bfloat16", _FP8, "published", "cosine to bfloat16", 0.998, "", wants_more=True),
    Goal("serving, 16 clients", *_CLIENTS, "chunks", 100, _RATE),
    Goal("their wait, p99", *_CLIENTS, "wait", 120, "ms", quantile="p99", chosen_by="chunks"),
    Goal("full fine-tuning", "training/", "full", "samples", 30, _RATE),
    Goal("recipe of LIBERO", "training/", "libero", "samples", 50, _RATE),
    Goal("peak of a recipe for 24 GB", "training/", "24 GB", "peak memory", 22, "GB"),
    Goal("a token of pi0-FAST", "tokens/", "pi0-FAST, LIBERO", "a token", 1.5, "ms"),
)


def page(records: Sequence[Record], command: str) -> str:
    """Markdown of everything that is there."""
    blocks = [
        _head(records, command),
        _goals(records),
        _shares(records),
        _figures(records),
        _differences(records),
        *_kernels(records),
        _parts(records),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _head(records: Sequence[Record], command: str) -> str:
    run = next((r for r in records if r["part"] == "run"), {})
    texts = {f"{r['part']}/{r['case']}": r["texts"] for r in records if "texts" in r}
    card, machine = texts.get("environment/card", {}), texts.get("environment/machine", {})
    warning = "" if run.get("gpu") else (
        "**Without a GPU, or with tiny models.** This shows that everything runs, and nothing else.\n\n"
    )  # fmt: skip
    rest = "; ".join(f"{key} {value}" for key, value in card.items() if key != "name")
    return (
        f"# On a GPU: {card.get('name', 'unknown card')}\n\n{warning}{run.get('date', '?')}, commit "
        f"{run.get('commit', '?')}. Command: `{command}`. pi0.5 with random weights in bfloat16, or FP8 "
        "where it says so; `published` has three cameras, 968 prefix tokens, 50 actions; `libero` two cameras, a short "
        "prompt, 10 actions; 10 steps both.\n\n"
        f"Card as it was found: {rest or 'unknown'}.\n\nMachine: "
        f"{'; '.join(f'{key} {value}' for key, value in machine.items()) or 'unknown'}."
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join([f"## {title}", "", *lines])


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# --- goals --------------------------------------------------------------------------------------------------------


def _goals(records: Sequence[Record]) -> str:
    rows = [_goal_row(goal, records) for goal in GOALS]
    return _table("Goals", ("what", "goal", "reached", "by", "spread", "met"), rows)


def _goal_row(goal: Goal, records: Sequence[Record]) -> list[str]:
    wants_more = goal.wants_more or goal.unit == _RATE
    wanted = f"{'>=' if wants_more else '<='} {goal.target:g} {goal.unit}".strip()
    reached = _reached(goal, records)
    if reached is None:
        return [goal.what, wanted, "open", "-", "-", "-"]
    found = reached["figures"][goal.figure]
    value = found[goal.quantile]
    is_met = value >= goal.target if wants_more else value <= goal.target
    by = f"{reached['part']}, {reached['case']}"
    return [goal.what, wanted, f"{_number(value)} {goal.unit}".strip(), by, _spread(found), "yes" if is_met else "no"]


def _reached(goal: Goal, records: Sequence[Record]) -> Record | None:
    """The best record of what the goal is about."""
    candidates = [
        record
        for record in records
        if record["part"].startswith(goal.parts)
        and record["part"] != goal.without
        and goal.case in record["case"]
        and goal.figure in record.get("figures", {})
    ]
    by = goal.chosen_by or goal.figure

    def worth(record: Record) -> float:
        found = record["figures"][by]
        return found["p50"] if found["unit"] == _RATE else -found["p50"]

    return max(candidates, key=worth, default=None)


def _spread(found: dict[str, Any]) -> str:
    if found["n"] == 1:
        return "once"
    return f"{_number(found['min'])} to {_number(found['max'])}, n={found['n']}"


# --- shares -------------------------------------------------------------------------------------------------------


def _shares(records: Sequence[Record]) -> str:
    """Of the device's measured rates, and how far from the least time that they allow."""
    rates = next((r["figures"] for r in records if r["part"] == "ceilings" and "figures" in r), None)
    if rates is None:
        return ""
    gemm, copy = rates["bf16 GEMM"]["p50"], rates["copy on the device"]["p50"]
    works = {r["case"].removeprefix("work of "): r["work"] for r in records if "work" in r}
    rows = [row for record in records for row in _share_rows(record, works, gemm, copy)]
    table = _table(
        "Share of the ceilings",
        ("part", "case", "of it", "TFLOP", "GB", "floor, ms", "p50, ms", "of GEMM", "of copy", "floor / p50"),
        rows,
    )
    note = (
        f"Floor: for prefix and denoising each, the larger of the two times at the measured rates, {gemm:.4g} TFLOP/s "
        f"and {copy:.3g} TB/s. FLOPs of products, and bytes of weights and cache that have to be read, are counted."
    )
    return table and f"{table}\n\n{note}"


def _share_rows(record: Record, works: dict[str, Any], gemm: float, copy: float) -> Iterator[list[str]]:
    figures, work = record.get("figures", {}), works.get(record["case"])
    if work is None or not record["part"].startswith("latency/"):
        return
    parts = {"policy call": _ON_DEVICE, "on the device": _ON_DEVICE, "prefix": ("prefix",)}
    for name, of in parts.items():
        if name not in figures:
            continue
        ms = figures[name]["p50"]
        tflop, gb = (sum(work[part][unit] for part in of) for unit in ("tflop", "gb"))
        floor = sum(max(work[part]["tflop"] / gemm * 1e3, work[part]["gb"] / copy) for part in of)
        shares = (tflop / ms * 1e3 / gemm, gb / ms / copy, floor / ms)
        numbers = map(_number, (tflop, gb, floor, ms))
        yield [record["part"], record["case"], name, *numbers, *(f"{share:.1%}" for share in shares)]


# --- the rest -----------------------------------------------------------------------------------------------------


def _figures(records: Sequence[Record]) -> str:
    rows = [
        [record["part"], record["case"], name, f"{_number(found['p50'])} {found['unit']}".strip()]
        + ([_number(found["p99"]), _spread(found)] if found["n"] > 1 else ["-", "once"])
        for record in records
        for name, found in record.get("figures", {}).items()
    ]
    notes = [f"- {r['part']}, {r['case']}: {r['note']}" for r in records if r.get("note")]
    table = _table("Figures", ("part", "case", "figure", "p50", "p99", "min to max"), rows)
    return "\n".join([table, *(["", *notes] if notes else [])])


def _differences(records: Sequence[Record]) -> str:
    """Of PyTorch's ways, which have the same weights and noise; JAX has random weights of its own."""
    found = {(r["part"], r["case"]): r["actions"] for r in records if "actions" in r and "pytorch" in r["part"]}
    rows = []
    for (part, case), actions in found.items():
        base = next(
            (p for p in ("latency/pytorch-eager", "latency/pytorch-graph") if (p, case) in found and p != part), None
        )
        if base is not None:
            rows.append([part, case, base, f"{models.difference(actions, found[base, case]):.1e}"])
    return _table("Actions, largest difference relative to the largest action", ("part", "case", "from", "by"), rows)


def _kernels(records: Sequence[Record]) -> list[str]:
    return [
        _table(
            f"{record['part']}: {record['case']}",
            ("kernel", "launches", "ms"),
            [[f"`{k['name'].replace('|', '/')}`", f"{k['launches']:.0f}", f"{k['ms']:.3f}"] for k in record["kernels"]],
        )
        for record in records
        if "kernels" in record
    ]


def _parts(records: Sequence[Record]) -> str:
    states = {r["part"]: r for r in records if r["case"] == "status"}
    rows = []
    for name in PARTS:
        state = states.get(name, {"state": "not run"})
        seconds = f"{state['seconds']:.0f}" if "seconds" in state else "-"
        rows.append([name, state["state"], seconds, state.get("why", "").replace("|", "/") or "-"])
    return _table("Parts", ("part", "state", "seconds", "why"), rows)
