"""Small inline SVG: bars, lines, rasters. No library, so that a report is one file that needs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["COLOURS", "bars_svg", "lines_svg", "raster_svg", "scatter_svg", "stacks_svg"]

COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#666666", "#0b3c5d", "#b22222")
WIDTH, ROW, LEFT = 720, 18, 190
# a letter of a name, on average
LETTER = 6.6


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


def bars_svg(rows: Sequence[tuple[str, float, float, float]], *, title: str, unit: str = "skill") -> str:
    """Horizontal bars on an axis from -0.25 to 1: (name, value, low, high); NaN intervals are left out."""
    start = max([LEFT, *(round(LETTER * len(name)) for name, *_ in rows)])
    span = WIDTH - start - 70
    foot = ROW * len(rows)

    def place(value: float) -> float:
        return start + span * (max(-0.25, min(1.0, value)) + 0.25) / 1.25

    parts = [
        _line(place(x), 0, place(x), foot, "#444" if x == 0 else "#ddd") for x in (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    parts += [_text(place(x), foot + 13, f"{x:g}", anchor="middle", size=10) for x in (0.0, 0.5, 1.0)]
    parts.append(_text(place(1.0) + 10, foot + 13, unit, size=10))
    for number, (name, value, low, high) in enumerate(rows):
        y = ROW * number
        parts.append(_text(start - 6, y + 13, name, anchor="end"))
        if math.isnan(value):
            continue
        left, right = sorted((place(0.0), place(value)))
        parts.append(_rect(left, y + 3, right - left, ROW - 6, COLOURS[0], f"{name}: {value:.3f}"))
        if not (math.isnan(low) or math.isnan(high)):
            parts.append(_line(place(low), y + ROW / 2, place(high), y + ROW / 2, "#222", 2))
        parts.append(_text(WIDTH - 6, y + 13, f"{value:.3f}", anchor="end"))
    return _svg(WIDTH, foot + 18, parts, title)


def ticks(low: float, high: float, *, log: bool = False) -> list[float]:
    """Round numbers inside a range, five or so."""
    if not high > low:
        return [low]
    if log:
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        step = max((last - first) // 5, 1)
        found = [2.0**power for power in range(first, last + 1, step)]
        return [x for x in found if low * 0.999 <= x <= high * 1.001] or [low, high]
    size = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (size * factor) <= 5)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def lines_svg(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    x_name: str,
    y_name: str,
    log_x: bool = False,
    band: tuple[str, str] | None = None,
    marks: Sequence[float] = (),
    dots: bool = True,
) -> str:
    """Lines through points (x, y); points that are not finite are left out.

    Args:
        band: two of the lines, between which the plane is shaded.
        marks: places of vertical lines.
    """
    height, left, top, bottom = 290, 56, 26, 40
    points = {
        name: sorted((x, y) for x, y in part if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x))
        for name, part in series.items()
    }
    points = {name: part for name, part in points.items() if part}
    if not points:
        return f"<p>{escape(title)}: nothing to draw.</p>"
    xs = [x for part in points.values() for x, _ in part]
    ys = [y for part in points.values() for _, y in part]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(0.0, *ys), max(ys)
    high_y = max(high_y, 1.0) if high_y > 0.5 else high_y or 1.0
    wide, tall = WIDTH - left - 210, height - bottom - top

    def at(x: float, y: float) -> tuple[float, float]:
        span = math.log2(high_x / low_x) if log_x else high_x - low_x
        share = (math.log2(x / low_x) if log_x else x - low_x) / (span or 1.0)
        return left + wide * share, top + tall * (1 - (y - low_y) / ((high_y - low_y) or 1.0))

    parts = [_text(4, 14, y_name, size=11)]
    for value in ticks(low_y, high_y):
        y = at(low_x, value)[1]
        parts += [_line(left, y, left + wide, y, "#eee"), _text(left - 6, y + 4, f"{value:.3g}", anchor="end", size=10)]
    for value in ticks(low_x, high_x, log=log_x):
        x = at(value, low_y)[0]
        parts += [
            _line(x, top + tall, x, top + tall + 4),
            _text(
                x, top + tall + 16, f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.5g}", anchor="middle", size=10
            ),
        ]
    parts += [_line(left, top, left, top + tall), _line(left, top + tall, left + wide, top + tall)]
    parts.append(_text(left + wide / 2, height - 6, x_name, anchor="middle"))
    parts += [
        _line(at(x, low_y)[0], top, at(x, low_y)[0], top + tall, "#b22222") for x in marks if low_x <= x <= high_x
    ]
    if band is not None and band[0] in points and band[1] in points:
        outline = [at(*p) for p in points[band[0]]] + [at(*p) for p in reversed(points[band[1]])]
        parts.append(f'<polygon points="{_path(outline)}" fill="#1b9e77" fill-opacity="0.08"/>')
    for number, (name, part) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if number >= len(COLOURS) else ""
        path = _path([at(*point) for point in part])
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>')
        if dots:
            parts += [f'<circle cx="{at(*p)[0]:.1f}" cy="{at(*p)[1]:.1f}" r="2.5" fill="{colour}"/>' for p in part]
        key = top + 4 + 16 * number
        parts.append(
            f'<line x1="{left + wide + 12}" y1="{key}" x2="{left + wide + 26}" y2="{key}" stroke="{colour}"'
            f' stroke-width="3"{dash}/>'
        )
        parts.append(_text(left + wide + 30, key + 4, name, size=10))
    return _svg(WIDTH, max(height, top + 14 + 16 * len(points)), parts, title)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


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
    foot = ROW * len(rows)
    parts += [_text(LEFT + span * x, foot + 10, f"{x:.0%}", anchor="middle", size=10) for x in (0.0, 0.5, 1.0)]
    x = float(LEFT)
    for number, part in enumerate(names):
        parts.append(_rect(x, foot + 18, 10, 10, COLOURS[number % len(COLOURS)]))
        parts.append(_text(x + 14, foot + 27, part.replace("_", " "), size=10))
        x += 30 + 6.2 * len(part)
    return _svg(WIDTH, foot + 34, parts, title)


def raster_svg(rows: Sequence[tuple[str, Sequence[float], str]], *, title: str) -> str:
    """Marks along time: (name, how strong at each row, from 0 to 1, colour)."""
    length = max((len(marks) for _, marks, _ in rows), default=1)
    span = WIDTH - LEFT - 10
    wide = max(span / length, 1.2)
    parts = []
    for number, (name, marks, colour) in enumerate(rows):
        y = ROW * number
        parts.append(_text(LEFT - 6, y + 13, name, anchor="end"))
        parts.append(_line(LEFT, y + ROW - 2, LEFT + span, y + ROW - 2, "#eee"))
        for place, strength in enumerate(marks):
            if strength > 0.02:
                tip = f' fill-opacity="{min(float(strength), 1.0):.2f}"' if strength < 1 else ""
                x = LEFT + span * place / length
                parts.append(
                    f'<rect x="{x:.1f}" y="{y + 2}" width="{wide:.1f}" height="{ROW - 5}" fill="{colour}"{tip}/>'
                )
    foot = ROW * len(rows)
    parts += [
        _text(LEFT + span * x / length, foot + 11, f"{x:,}", anchor="middle", size=10) for x in (0, length // 2, length)
    ]
    parts.append(_text(LEFT - 6, foot + 11, "row", anchor="end", size=10))
    return _svg(WIDTH, foot + 16, parts, title)


def scatter_svg(points: Sequence[tuple[float, float, bool]], *, title: str, x_name: str, y_name: str) -> str:
    """Points (x, y, marked)."""
    clean = [(x, y, m) for x, y, m in points if math.isfinite(x) and math.isfinite(y)]
    if not clean:
        return f"<p>{escape(title)}: nothing to draw.</p>"
    xs, ys = [p[0] for p in clean], [p[1] for p in clean]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys), max(ys)
    left, top, wide, tall = 60, 26, 460, 180
    span_x, span_y = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + wide * (x - low_x) / span_x, top + tall * (1 - (y - low_y) / span_y)

    parts = [_text(4, 14, y_name), _text(left + wide / 2, top + tall + 32, x_name, anchor="middle")]
    for value in ticks(low_y, high_y):
        y = at(low_x, value)[1]
        parts += [_line(left, y, left + wide, y, "#eee"), _text(left - 6, y + 4, f"{value:.3g}", anchor="end", size=10)]
    for value in ticks(low_x, high_x):
        x = at(value, low_y)[0]
        parts.append(_text(x, top + tall + 16, f"{value:.3g}", anchor="middle", size=10))
    for x, y, marked in sorted(clean, key=lambda point: point[2]):
        cx, cy = at(x, y)
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="2.6" fill="{COLOURS[1] if marked else "#9bb"}"/>')
    for number, (name, colour) in enumerate((("critical rows", COLOURS[1]), ("other rows", "#9bb"))):
        parts.append(f'<circle cx="{left + wide + 20}" cy="{top + 8 + 16 * number}" r="4" fill="{colour}"/>')
        parts.append(_text(left + wide + 30, top + 12 + 16 * number, name, size=10))
    return _svg(WIDTH, top + tall + 40, parts, title)
