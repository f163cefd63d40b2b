"""An episode as one picture: commands with their seams and holds above, lateness and delays below. SVG, by hand."""

from html import escape
from typing import Dict, List, Mapping, Sequence, Tuple

import numpy as np

_WIDTH, _LEFT, _RIGHT = 1200, 140, 20
_COMMANDS = (50, 300)  # top, height
_LATE = (400, 110)
_DELAY = (560, 110)
_LEGEND = (730, 20, 4)  # first line, height of a line, names in a line
_COLORS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#2a9d8f", "#8d5524", "#5b5f97")
_DASHES = ("", "6 3", "2 3")  # where there are more dimensions than colors
_MAX_POINTS = 2000
_LONGEST_TEXT, _LONGEST_NAME = 60, 22


def timeline(
    ticks: np.ndarray, commands: np.ndarray, events: Sequence[Mapping[str, object]], summary: Mapping[str, object]
) -> str:
    """
    Args:
        ticks, commands, events, summary: those of `EpisodeLog`.
    Returns:
        an SVG document.
    """
    parts, height = [_title(summary)], _LEGEND[0]
    if len(ticks):
        span = (float(ticks["number"][0]), float(max(ticks["number"][-1], ticks["number"][0] + 1)))
        parts += _holds(ticks, span)
        parts += _curves(ticks, commands, span)
        seams = ticks["number"][ticks["is_seam"]]
        parts += [_vertical(_x(seam, span), _COMMANDS, "#bbb") for seam in seams[:: max(1, len(seams) // 400)]]
        parts += _bars(ticks["number"], 1e3 * ticks["late_s"], span, _LATE, "tick late, in ms")
        answers = [event for event in events if "delay_ticks" in event]
        numbers, delays = (np.array([event[key] for event in answers], np.float64) for key in ("tick", "delay_ticks"))
        is_played = np.array([event["kind"] in ("chunk", "blend") for event in answers], bool)
        parts += _bars(numbers, delays, span, _DELAY, "answer after, in ticks")
        parts += [_vertical(_x(number, span), _DELAY, "#d00") for number in numbers[~is_played][-_MAX_POINTS:]]
        parts.append(_text(_LEFT, _DELAY[0] + _DELAY[1] + 25, _axis(span, summary.get("rate_hz"))))
        legend, height = _legend(commands, summary.get("names"))
        parts += legend
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        f'font-size="13">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _title(summary: Mapping[str, object]) -> str:
    keys = ("strategy", "end", "rows_played", "holds", "ticks_skipped", "asked", "stale", "discarded")
    return _text(
        20, 28, ", ".join(f"{key.replace('_', ' ')}: {_short(summary[key])}" for key in keys if key in summary)
    )


def _axis(span: Tuple[float, float], rate_hz: object) -> str:
    ticks = f"ticks {span[0]:.0f} to {span[1]:.0f}"
    if isinstance(rate_hz, (int, float)) and rate_hz > 0:
        ticks = f"{(span[1] - span[0]) / rate_hz:.1f} s, {ticks} at {rate_hz:g} Hz"
    return (
        f"{ticks}; grey: the robot held, or got no command; vertical lines: new chunks; red: answers "
        "that were not played"
    )


def _legend(commands: np.ndarray, names: object) -> Tuple[List[str], int]:
    """Names, colors and ranges of the commands, and where they end."""
    top, line, per_line = _LEGEND
    labels = names if isinstance(names, (list, tuple)) else ()
    wide = (_WIDTH - 40) // per_line
    found = []
    for dim in range(commands.shape[1]):
        known = commands[:, dim][np.isfinite(commands[:, dim])]
        name = _short(labels[dim] if dim < len(labels) else dim, _LONGEST_NAME)
        label = f"{name}: {known.min():.2f} to {known.max():.2f}" if len(known) else name
        x, y = 20 + wide * (dim % per_line), top + line * (dim // per_line)
        found += [f'<path d="M{x} {y - 4}h18" {_stroke(dim)}/>', _text(x + 24, y, label)]
    return found, top + line * -(-commands.shape[1] // per_line) + 10


def _stroke(dim: int) -> str:
    dash = _DASHES[dim // len(_COLORS) % len(_DASHES)]
    return f'stroke="{_COLORS[dim % len(_COLORS)]}" stroke-width="1.2" stroke-dasharray="{dash or "none"}"'


def _short(value: object, longest: int = _LONGEST_TEXT) -> str:
    """In a line that XML may have: an episode may end with what a server says, in colours and with its traceback."""
    text = "".join(char if char.isprintable() else " " for char in str(value))
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def _holds(ticks: np.ndarray, span: Tuple[float, float]) -> List[str]:
    """Grey where the robot held."""
    is_hold = np.concatenate([[0], (ticks["kind"] <= 1).astype(np.int8), [0]])
    starts, ends = np.flatnonzero(np.diff(is_hold) == 1), np.flatnonzero(np.diff(is_hold) == -1)
    top, height = _COMMANDS
    found = []
    for start, end in zip(starts, ends):
        left, right = _x(ticks["number"][start], span), _x(ticks["number"][end - 1] + 1, span)
        found.append(f'<rect x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{height}" fill="#e6e6e6"/>')
    return found


def _curves(ticks: np.ndarray, commands: np.ndarray, span: Tuple[float, float]) -> List[str]:
    """One line per dimension, each on its own scale: what matters are jumps, not values."""
    top, height = _COMMANDS
    found = [_text(5, top + 14, "commands, each"), _text(5, top + 32, "over its range")]
    for dim in range(commands.shape[1]):
        known = np.isfinite(commands[:, dim])
        if not known.any():
            continue
        kept = _extremes(commands[known, dim])
        numbers, values = ticks["number"][known][kept], commands[known, dim][kept]
        low, high = values.min(), values.max()
        scaled = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
        points = " ".join(f"{_x(n, span):.1f},{top + height * (0.98 - 0.96 * v):.1f}" for n, v in zip(numbers, scaled))
        found.append(f'<polyline points="{points}" fill="none" {_stroke(dim)}/>')
    return found


def _extremes(values: np.ndarray) -> np.ndarray:
    """Places of the least and the largest of each group, or a jump of one tick would be lost."""
    every = max(1, 2 * len(values) // _MAX_POINTS)
    starts = range(0, len(values), every)
    places = [start + int(find(values[start : start + every])) for start in starts for find in (np.argmin, np.argmax)]
    return np.unique(places)


def _bars(
    numbers: np.ndarray, values: np.ndarray, span: Tuple[float, float], place: Tuple[int, int], label: str
) -> List[str]:
    top, height = place
    highest = max(0.0, float(values.max())) if len(values) else 0.0
    every = max(1, len(values) // _MAX_POINTS)
    # The worst of each group, or it would be lost.
    groups: Dict[int, Tuple[float, float]] = {}
    for index in range(len(values)):
        number, worst = groups.get(index // every, (float(numbers[index]), 0.0))
        groups[index // every] = (number, max(worst, float(values[index])))
    bars = " ".join(
        f"M{_x(number, span):.1f} {top + height}V{top + height * (1 - max(0.0, value) / (highest or 1.0)):.1f}"
        for number, value in groups.values()
    )
    return [
        _text(5, top + 12, label),
        _text(5, top + 30, f"max {highest:.3g}"),
        f'<path d="M{_LEFT} {top + height}H{_WIDTH - _RIGHT}" stroke="#999"/>',
        f'<path d="{bars}" stroke="#1b6ca8" stroke-width="1"/>',
    ]


def _x(number: float, span: Tuple[float, float]) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (float(number) - span[0]) / (span[1] - span[0])


def _vertical(x: float, place: Tuple[int, int], color: str) -> str:
    return f'<path d="M{x:.1f} {place[0]}V{place[0] + place[1]}" stroke="{color}" stroke-width="0.5"/>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x}" y="{y}">{escape(text)}</text>'
