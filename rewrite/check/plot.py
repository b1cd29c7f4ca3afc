"""Plots as SVG text: a value after the other on a logarithmic scale (error and noise, a change), and histograms."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_TEXT = "var(--plot-text, #667085)"
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 30


@dataclass(frozen=True)
class Point:
    """One value: its relative error, the noise there, and whether it departs."""

    name: str
    error: float
    noise: float
    departs: bool = False


@dataclass(frozen=True)
class Change:
    """One value: a positive measure of it before and after a change of basis."""

    name: str
    before: float
    after: float


def change_plot(changes: Sequence[Change], measure: str, width: int = 900, height: int = 220) -> str:
    """A standalone SVG of a measure of every value in order, before (dashed) and after; colours as in `error_plot`."""
    shown = [c for c in changes if all(v > 0 and math.isfinite(v) for v in (c.before, c.after))]
    if not shown:
        return ""
    drawn = [v for c in shown for v in (c.before, c.after)]
    ticks = _ticks(min(drawn), max(drawn))
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    inner_width, inner_height = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def x(index: int) -> float:
        return _LEFT + inner_width * ((index + 0.5) / len(shown))

    def level(exponent: float) -> float:
        return _TOP + inner_height * (high - exponent) / (high - low)

    before = [(x(i), level(math.log10(c.before))) for i, c in enumerate(shown)]
    after = [(x(i), level(math.log10(c.after))) for i, c in enumerate(shown)]
    radius = 2.2 if len(shown) <= 200 else 1.2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(measure, quote=True)} of every value, before and after the change of basis" '
        'font-family="system-ui, sans-serif" font-size="11">',
        *(_rule(level(math.log10(tick)), f"{tick:g}", width) for tick in ticks),
        _line(before, "var(--plot-noise, #8a94a6)", dashed=True),
        _line(after, "var(--plot-error, #2563eb)"),
    ]
    for points, colour in ((before, "var(--plot-noise, #8a94a6)"), (after, "var(--plot-error, #2563eb)")):
        for (across, down), change in zip(points, shown):
            label = html.escape(f"{change.name}: {measure} {change.before:.4g} before, {change.after:.4g} after")
            circle = f'<circle cx="{across:.1f}" cy="{down:.1f}" r="{radius}" fill="{colour}">'
            parts.append(f"{circle}<title>{label}</title></circle>")
    parts += [*_ends(width, height), "</svg>"]
    return "\n".join(parts)


@dataclass(frozen=True)
class Curve:
    """One histogram of a plot: `counts` of equal parts of low … high.

    `kind` is 0 for what was before (grey, dashed), 1 for what is now, 2 for what is made of it.
    """

    name: str
    low: float
    high: float
    counts: Sequence[int]
    kind: int = 1
    note: str = ""


_CURVES = ("var(--plot-noise, #98a2b3)", "var(--plot-error, #2f5fd0)", "var(--plot-stored, #c2540a)")


def histogram_plot(curves: Sequence[Curve], title: str, width: int = 440, height: int = 150) -> str:
    """A standalone SVG of histograms over one axis.

    A curve's height is log(1 + count) over that of its largest, so that single entries far out are seen.
    """
    shown = [curve for curve in curves if sum(curve.counts)]
    if not shown:
        return ""
    low, high = min(curve.low for curve in shown), max(curve.high for curve in shown)
    low, high = (low, high) if high > low else (low - 1, high + 1)
    left, floor, top = 8.0, height - 24.0, 22.0
    scale = (width - 2 * left) / (high - low)
    label = html.escape(title, quote=True)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<text x="{left}" y="12" fill="{_TEXT}">{label}</text>',
        f'<line x1="{left}" x2="{width - left}" y1="{floor}" y2="{floor}" stroke="var(--plot-grid, #e4e7ec)"/>',
    ]
    for curve in shown:
        colour = _CURVES[curve.kind]
        most, step = (
            math.log1p(max(curve.counts)),
            (curve.high - curve.low) / len(curve.counts) or 2 / len(curve.counts),
        )
        start = curve.low if curve.high > curve.low else curve.low - 1
        corners = [f"M{left + scale * (start - low):.1f},{floor}"]
        for place, count in enumerate(curve.counts):
            level = floor - (floor - top) * math.log1p(count) / most
            across = left + scale * (start + step * (place + 1) - low)
            corners.append(f"V{level:.1f}H{across:.1f}")
        dashed = ' stroke-dasharray="4 3"' if curve.kind == 0 else ""
        note = html.escape(f"{curve.name}: {curve.low:.3g} to {curve.high:.3g}{curve.note and f', {curve.note}'}")
        parts.append(
            f'<path d="{"".join(corners)}V{floor}" fill="{colour}" fill-opacity="{0.0 if dashed else 0.12}" '
            f'stroke="{colour}" stroke-width="1.2"{dashed}><title>{note}</title></path>'
        )
    for at, anchor, value in ((left, "start", low), (width - left, "end", high)):
        text = f"{value:.3g}".replace("-", "−")
        parts.append(f'<text x="{at}" y="{height - 8}" text-anchor="{anchor}" fill="{_TEXT}">{text}</text>')
    return "\n".join([*parts, "</svg>"])


def _ends(width: int, height: int) -> list[str]:
    return [
        f'<text x="{_LEFT}" y="{height - 9}" fill="{_TEXT}">first value</text>',
        f'<text x="{width - _RIGHT}" y="{height - 9}" text-anchor="end" fill="{_TEXT}">last value</text>',
    ]


def error_plot(points: Sequence[Point], width: int = 900, height: int = 280) -> str:
    """A standalone SVG of the points in order.

    Colours are the CSS variables --plot-error, --plot-noise, --plot-bad, --plot-grid and --plot-text where the page
    sets them. A zero error has no logarithm: it is drawn on the floor of the plot, an infinite one at its top.
    """
    drawn = [v for p in points for v in (p.error, p.noise) if v > 0 and math.isfinite(v)]
    if not points or not drawn:
        return ""
    low, high = math.floor(math.log10(min(drawn))), math.ceil(math.log10(max(drawn)))
    high = max(high, low + 1)
    inner_width, inner_height = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def x(index: int) -> float:
        return _LEFT + inner_width * ((index + 0.5) / len(points))

    def level(exponent: float) -> float:
        return _TOP + inner_height * (high - exponent) / (high - low)

    def y(value: float) -> float:
        return level(low if value <= 0 else high if not math.isfinite(value) else math.log10(value))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Relative error and noise of every value, in the order they are computed" '
        'font-family="system-ui, sans-serif" font-size="11">',
        *_grid(low, high, width, level),
        _line([(x(i), y(p.noise)) for i, p in enumerate(points)], "var(--plot-noise, #8a94a6)", dashed=True),
        _line([(x(i), y(p.error)) for i, p in enumerate(points)], "var(--plot-error, #2563eb)"),
    ]
    for i, point in enumerate(points):
        colour = "var(--plot-bad, #dc2626)" if point.departs else "var(--plot-error, #2563eb)"
        radius = 4 if point.departs else 2.2 if len(points) <= 200 else 1.2
        label = html.escape(f"{point.name}: error {point.error:.2e}, noise {point.noise:.2e}")
        parts.append(
            f'<circle cx="{x(i):.1f}" cy="{y(point.error):.1f}" r="{radius}" fill="{colour}">'
            f"<title>{label}</title></circle>"
        )
    parts += [*_ends(width, height), "</svg>"]
    return "\n".join(parts)


def _ticks(least: float, most: float) -> list[float]:
    """Numbers from the 1, 2, 5 series (powers of ten where the range is long) that enclose a range.

    >>> _ticks(2.5, 7.0)
    [2.0, 5.0, 10.0]
    """
    long = most / least > 1e3
    exponents = range(math.floor(math.log10(least)), math.floor(math.log10(most)) + 2)
    series = [float(f"{digit}e{exponent}") for exponent in exponents for digit in ((1,) if long else (1, 2, 5))]
    below, above = max(t for t in series if t <= least), min(t for t in series if t > most)
    return [tick for tick in series if below <= tick <= above]


def _rule(at: float, label: str, width: int) -> str:
    return (
        f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
        'stroke="var(--plot-grid, #e4e7ec)" stroke-width="1"/>'
        f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="{_TEXT}">{label}</text>'
    )


def _grid(low: int, high: int, width: int, level: Callable[[float], float]) -> list[str]:
    step = max(1, math.ceil((high - low) / 8))
    lines = []
    for exponent in range(low, high + 1, step):
        power = f'10<tspan dy="-4" font-size="8">{str(exponent).replace("-", "−")}</tspan>'
        lines.append(_rule(level(exponent), power, width))
    return lines


def _line(points: Sequence[tuple[float, float]], colour: str, dashed: bool = False) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'
