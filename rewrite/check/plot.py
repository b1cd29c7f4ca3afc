"""The per-layer error plot, as SVG text: error and noise of every value on a logarithmic scale."""

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
    parts += [
        f'<text x="{_LEFT}" y="{height - 9}" fill="{_TEXT}">first value</text>',
        f'<text x="{width - _RIGHT}" y="{height - 9}" text-anchor="end" fill="{_TEXT}">last value</text>',
        "</svg>",
    ]
    return "\n".join(parts)


def _grid(low: int, high: int, width: int, level: Callable[[float], float]) -> list[str]:
    step = max(1, math.ceil((high - low) / 8))
    lines = []
    for exponent in range(low, high + 1, step):
        at = level(exponent)
        lines.append(
            f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" '
            'stroke="var(--plot-grid, #e4e7ec)" stroke-width="1"/>'
            f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="{_TEXT}">'
            f'10<tspan dy="-4" font-size="8">{str(exponent).replace("-", "−")}</tspan></text>'
        )
    return lines


def _line(points: Sequence[tuple[float, float]], colour: str, dashed: bool = False) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'
