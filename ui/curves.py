"""Curves of a training run as small SVG pictures: drawn here, so that the page loads no library.

Public   Series, chart
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22
"""Room around the curves, for the labels of the axes."""
MAX_POINTS = 240
"""Longer curves are averaged: more points than pixels show nothing."""
NUM_TICKS = 4
COLOURS = ("#0d9488", "#ea580c")

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One curve."""

    label: str
    points: Sequence[Point]
    """(step, value), steps growing."""


def chart(title: str, series: Sequence[Series]) -> str:
    """A picture of all curves over one pair of axes; empty where there is nothing to draw."""
    shown = [Series(one.label, _finite(one.points)) for one in series]
    shown = [one for one in shown if one.points]
    if not shown:
        return ""
    ticks = nice_ticks([value for one in shown for _, value in one.points])
    steps = [step for one in shown for step, _ in one.points]
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return (
            HEIGHT - BOTTOM - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (HEIGHT - BOTTOM - TOP)
        )

    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" class="value">{tick:g}</text>')
    for step, anchor in {first: "start", max(steps): "end"}.items():
        name = f"step {step:g}" if step == first else f"{step:g}"
        parts.append(
            f'<text x="{x(step):.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{name}</text>'
        )
    legend = []
    for one, colour in zip(shown, COLOURS, strict=False):
        points = [(x(step), y(value)) for step, value in thinned(one.points)]
        path = "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in points)
        parts.append(f'<path class="curve" d="{path}" stroke="{colour}"/>')
        left, top = points[-1]
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="2.5" fill="{colour}"/>')
        value = f"{one.points[-1][1]:.4g}"
        legend.append(f'<span style="color:{colour}">●</span> {escape(one.label)} <b>{value}</b>')
    words = ", ".join(f"{one.label} {one.points[-1][1]:.4g}" for one in shown)
    label = escape(f"{title}: {words} at step {max(steps):g}")
    return (
        f'<figure class="herd-chart"><figcaption>{escape(title)} {" ".join(legend)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )


def nice_ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that enclose the values; at least two."""
    low, high = min(values), max(values)
    span = max(high - low, abs(high) * 1e-3, 1e-6)
    step = 10.0 ** math.floor(math.log10(span / NUM_TICKS))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if span / (factor * step) <= NUM_TICKS)
    begin = math.floor(low / step)
    end = max(math.ceil(high / step), begin + 1)
    return [round(count * step, 12) for count in range(begin, end + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MAX_POINTS, each the mean of as many neighbours; the last one as it is."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size == 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    means = [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
    return [*means[:-1], points[-1]]


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(step, value) for step, value in points if math.isfinite(value)]
