"""Charts as inline SVG: lines over steps, and rates with their intervals. Colours are classes of the page's CSS."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 460, 240
_SMALLEST_SPAN = 1e-12  # less is a constant, and division by it would overflow
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 14, 38
_MOST_LOG_TICKS = 12
_SMALLEST_SCALE = 0.7
_MOST_LETTERS = 96  # of a name above the rows of a rate chart


@dataclass(frozen=True)
class Line:
    """One series: `points` are (x, y), x rising. `style` is a CSS class: `before`, `after`, `other` or `faint`."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str = "after"


@dataclass(frozen=True)
class Rate:
    """A success rate and its interval, all from 0 to 1. `style` as in `Line`."""

    label: str
    value: float
    low: float
    high: float
    style: str


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str, log_y: bool = False) -> str:
    """An SVG element. Points that cannot be drawn are left out; if none is left, a sentence says so."""
    lines = [Line(line.label, points, line.style) for line in lines if (points := _drawable(line.points, log_y))]
    if not lines:
        return f'<p class="note">No values of {escape(y_label)}.</p>'
    x_axis = _axis_from_zero([x for line in lines for x, _ in line.points], _LEFT, _WIDTH - _RIGHT)
    make_y_axis = _log_axis if log_y else _axis_from_zero
    y_axis = make_y_axis([y for line in lines for _, y in line.points], _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(x_axis, y_axis, x_label)]
    for line in lines:
        path = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in line.points)
        parts.append(
            f'<polyline class="line {line.style}" points="{path}"><title>{escape(line.label)}</title></polyline>'
        )
    named = list({line.label: line for line in lines if line.style != "faint"}.values())
    legend = _legend(named) if len(named) > 1 else ""
    return f"{legend}{_svg(parts, _WIDTH, _HEIGHT, f'{y_label} over {x_label}')}"


def rate_chart(groups: Sequence[tuple[str, Sequence[Rate]]]) -> str:
    """An SVG element: under each name a row per rate, a dot on its 95 % interval.

    Names stand above their rows, since those of tasks are sentences, often alike but for a word.
    """
    left, right, row_px, gap_px, name_px, top = 10, 60, 20, 8, 18, 8
    width = 760
    axis = _Axis(0.0, 1.0, left, width - right, (0.0, 0.25, 0.5, 0.75, 1.0))
    parts: list[str] = []
    y = top
    for name, rates in groups:
        parts.append(_text(left, y + 12, _shortened(name), "start", tip=name))
        y += name_px
        for rate in rates:
            parts.append(_rate_row(rate, axis, y + row_px / 2, width))
            y += row_px
        y += gap_px
    bottom = y - gap_px + 6
    ticks = "".join(
        f'<line class="grid" x1="{axis.place(t):.1f}" x2="{axis.place(t):.1f}" y1="{top - 4}" y2="{bottom}"/>'
        + _text(axis.place(t), bottom + 15, f"{t:.0%}", "middle" if t else "start", "tick")
        for t in axis.ticks
    )
    return _svg([ticks, *parts], width, bottom + 22, "success rates with 95 % intervals")


def smooth(points: Sequence[tuple[float, float]], weight: float = 0.6) -> list[tuple[float, float]]:
    """Exponential moving average, without the bias of its start."""
    average = norm = 0.0
    smoothed = []
    for x, y in points:
        average = weight * average + (1 - weight) * y
        norm = weight * norm + (1 - weight)
        smoothed.append((x, average / norm))
    return smoothed


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    from_px: float
    to_px: float
    ticks: tuple[float, ...]
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.from_px + (value - low) / (high - low) * (self.to_px - self.from_px)


def _axis_from_zero(values: Sequence[float], from_px: float, to_px: float) -> _Axis:
    """Over zero and all values, widened to whole ticks of a round size, about five."""
    low, high = min(0.0, *values), max(0.0, *values)
    span = high - low if high - low > _SMALLEST_SPAN else 1.0
    step = 10.0 ** math.floor(math.log10(span / 5))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    ticks = tuple(step * i for i in range(first, last + 1))
    return _Axis(ticks[0], ticks[-1], from_px, to_px, ticks)


def _log_axis(values: Sequence[float], from_px: float, to_px: float) -> _Axis:
    """From the smallest to the largest value, widened to ticks at 1, 2 and 5 times powers of ten; where those would be
    too many for their labels, at powers of ten, all or some."""
    lowest, highest = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    stride = -(-(highest - lowest) // _MOST_LOG_TICKS)
    factors = (1, 2, 5) if 3 * (highest - lowest) <= _MOST_LOG_TICKS else (1,)
    decades = range(lowest, highest + max(1, stride), max(1, stride))
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    low = max(tick for tick in ticks if tick <= min(values) * (1 + 1e-9))
    high = min(tick for tick in ticks if tick >= max(values) * (1 - 1e-9) and tick > low)
    return _Axis(low, high, from_px, to_px, tuple(tick for tick in ticks if low <= tick <= high), is_log=True)


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str) -> str:
    rows = [(y_axis.place(t), f"{t:.4g}") for t in y_axis.ticks]
    columns = [(x_axis.place(t), f"{t:.6g}") for t in x_axis.ticks]
    parts = [f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>' for y, _ in rows]
    parts += [_text(_LEFT - 8, y + 4, label, "end", "tick") for y, label in rows]
    parts += [_text(x, _HEIGHT - _BOTTOM + 16, label, "middle", "tick") for x, label in columns]
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 4, x_label, "middle", "tick"))
    return "".join(parts)


def _rate_row(rate: Rate, axis: _Axis, y: float, width: float) -> str:
    low, value, high = (axis.place(v) for v in (rate.low, rate.value, rate.high))
    return (
        f'<g class="rate {rate.style}"><title>{escape(rate.label)}: {rate.value:.0%} '
        f"({rate.low:.0%} to {rate.high:.0%})</title>"
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/><circle cx="{value:.1f}" cy="{y}" r="5"/>'
        f"{_text(width - 8, y + 4, f'{rate.value:.0%}', 'end')}</g>"
    )


def _shortened(name: str) -> str:
    """SVG breaks no lines; what tells names apart may be at either end."""
    half = _MOST_LETTERS // 2
    return name if len(name) <= _MOST_LETTERS else f"{name[:half]} … {name[-half:]}"


def _text(x: float, y: float, text: str, anchor: str, style: str = "label", tip: str = "") -> str:
    hint = f"<title>{escape(tip)}</title>" if tip != text and tip else ""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{hint}{escape(text)}</text>'


def _legend(lines: Sequence[Line]) -> str:
    keys = "".join(f'<span class="key {line.style}">{escape(line.label)}</span>' for line in lines)
    return f'<p class="legend">{keys}</p>'


def _svg(parts: Sequence[str], width: float, height: float, label: str) -> str:
    # On a narrow screen its card scrolls, before its text is too small to read.
    size = f'viewBox="0 0 {width} {height}" style="min-width:{_SMALLEST_SCALE * width:.0f}px"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _drawable(points: Sequence[tuple[float, float]], log_y: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)]
