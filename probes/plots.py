"""Small inline SVG: bars, lines, rasters. No library, so that a report is one file that needs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["COLOURS", "bars_svg", "lines_svg", "raster_svg", "scatter_svg", "stacks_svg"]

COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#666666", "#0b3c5d", "#b22222")
WIDTH, ROW, LEFT = 720, 18, 190


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(title)}">'
    return head + "".join(parts) + "</svg>"


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = "#999", width: float = 1.0) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"/>'


def _rect(x: float, y: float, w: float, h: float, colour: str, title: str = "") -> str:
    tip = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{h:.1f}" fill="{colour}">{tip}</rect>'


def bars_svg(rows: Sequence[tuple[str, float, float, float]], *, title: str) -> str:
    """Horizontal bars from -1 to 1 with intervals: (name, value, low, high); NaN intervals are left out."""
    span = WIDTH - LEFT - 70
    zero = LEFT + span * 0.25  # the axis runs from -0.5 to 1.5 clipped
    scale = span * 0.7

    def place(value: float) -> float:
        return zero + scale * max(-0.35, min(1.05, value))

    parts = [_line(zero, 0, zero, ROW * len(rows), "#444")]
    parts.append(_line(place(1.0), 0, place(1.0), ROW * len(rows), "#bbb"))
    for number, (name, value, low, high) in enumerate(rows):
        y = ROW * number
        parts.append(_text(LEFT - 6, y + 13, name, anchor="end"))
        if math.isnan(value):
            continue
        left, right = sorted((zero, place(value)))
        parts.append(_rect(left, y + 3, right - left, ROW - 6, COLOURS[0], f"{name}: {value:.3f}"))
        if not (math.isnan(low) or math.isnan(high)):
            parts.append(_line(place(low), y + ROW / 2, place(high), y + ROW / 2, "#222", 2))
        parts.append(_text(WIDTH - 6, y + 13, f"{value:.3f}", anchor="end"))
    return _svg(WIDTH, ROW * len(rows) + 4, parts, title)


def lines_svg(
    series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x_name: str, y_name: str, log_x: bool = False
) -> str:
    """Lines through points (x, y); points that are not finite are left out."""
    height, left, bottom = 300, 60, 40
    points = {
        name: sorted((x, y) for x, y in part if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x))
        for name, part in series.items()
    }
    points = {name: part for name, part in points.items() if part}
    if not points:
        return f"<p>{escape(title)}: nothing to draw.</p>"
    xs = [math.log2(x) if log_x else x for part in points.values() for x, _ in part]
    ys = [y for part in points.values() for _, y in part]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(0.0, *ys), max(1.0, *ys)
    wide, tall = WIDTH - left - 200, height - bottom - 10

    def at(x: float, y: float) -> tuple[float, float]:
        share = ((math.log2(x) if log_x else x) - low_x) / ((high_x - low_x) or 1.0)
        return left + wide * share, 10 + tall * (1 - (y - low_y) / ((high_y - low_y) or 1.0))

    parts = [_line(left, 10, left, 10 + tall), _line(left, 10 + tall, left + wide, 10 + tall)]
    for value in (low_y, (low_y + high_y) / 2, high_y):
        parts.append(_text(left - 6, at(2**low_x if log_x else low_x, value)[1] + 4, f"{value:.2g}", anchor="end"))
    for value in (low_x, high_x):
        shown = 2**value if log_x else value
        parts.append(_text(at(shown, low_y)[0], 10 + tall + 16, f"{shown:,.4g}", anchor="middle"))
    parts.append(_text(left + wide / 2, height - 6, x_name, anchor="middle"))
    parts.append(_text(4, 12, y_name))
    for number, (name, part) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in part))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts += [f'<circle cx="{at(*p)[0]:.1f}" cy="{at(*p)[1]:.1f}" r="2.5" fill="{colour}"/>' for p in part]
        parts.append(_rect(left + wide + 14, 14 + 16 * number, 10, 10, colour))
        parts.append(_text(left + wide + 28, 23 + 16 * number, name, size=10))
    return _svg(WIDTH, max(height, 30 + 16 * len(points)), parts, title)


def stacks_svg(rows: Sequence[tuple[str, dict[str, float]]], *, title: str) -> str:
    """Horizontal stacked bars of shares that add up to 1."""
    span = WIDTH - LEFT - 20
    names = list(dict.fromkeys(part for _, shares in rows for part in shares))
    parts = []
    for number, (name, shares) in enumerate(rows):
        x, y = float(LEFT), ROW * number
        parts.append(_text(LEFT - 6, y + 13, name, anchor="end"))
        for part, share in shares.items():
            colour = COLOURS[names.index(part) % len(COLOURS)]
            parts.append(_rect(x, y + 3, span * share, ROW - 6, colour, f"{part}: {share:.2f}"))
            x += span * share
    for number, part in enumerate(names):
        x = LEFT + 110 * number
        parts.append(_rect(x, ROW * len(rows) + 6, 10, 10, COLOURS[number % len(COLOURS)]))
        parts.append(_text(x + 14, ROW * len(rows) + 15, part.replace("_", " "), size=10))
    return _svg(WIDTH, ROW * len(rows) + 24, parts, title)


def raster_svg(rows: Sequence[tuple[str, Sequence[bool], str]], *, title: str) -> str:
    """Marks along time: (name, which rows, colour)."""
    length = max((len(marks) for _, marks, _ in rows), default=1)
    span = WIDTH - LEFT - 10
    parts = []
    for number, (name, marks, colour) in enumerate(rows):
        parts.append(_text(LEFT - 6, ROW * number + 13, name, anchor="end"))
        for place, marked in enumerate(marks):
            if marked:
                parts.append(
                    _rect(LEFT + span * place / length, ROW * number + 2, max(span / length, 1.2), ROW - 5, colour)
                )
    return _svg(WIDTH, ROW * len(rows) + 4, parts, title)


def scatter_svg(points: Sequence[tuple[float, float, bool]], *, title: str, x_name: str, y_name: str) -> str:
    """Points (x, y, marked)."""
    clean = [(x, y, m) for x, y, m in points if math.isfinite(x) and math.isfinite(y)]
    if not clean:
        return f"<p>{escape(title)}: nothing to draw.</p>"
    xs, ys = [p[0] for p in clean], [p[1] for p in clean]
    wide, tall = WIDTH - 90, 220
    span_x, span_y = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    parts = [_text(WIDTH / 2, 256, x_name, anchor="middle"), _text(4, 12, y_name)]
    for x, y, marked in clean:
        parts.append(
            f'<circle cx="{50 + wide * (x - min(xs)) / span_x:.1f}" cy="{16 + tall * (1 - (y - min(ys)) / span_y):.1f}"'
            f' r="2.2" fill="{COLOURS[1] if marked else "#9bb"}"/>'
        )
    return _svg(WIDTH, 262, parts, title)
