"""A picture of the start times: horizontal bars from zero, as SVG."""

from __future__ import annotations

from html import escape

WIDTH, ROW, LEFT, RIGHT, TOP = 760, 34, 250, 90, 46


def bars(title: str, values: dict[str, float], unit: str, ours: frozenset[str]) -> str:
    """Bars with their values; the bars named in ``ours`` are coloured."""
    scale = (WIDTH - LEFT - RIGHT) / max(values.values())
    height = TOP + ROW * len(values) + 16
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="14">')
    parts = [head, f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
             text(16, 26, title, 'font-size="16" font-weight="bold"')]
    for row, (name, value) in enumerate(values.items()):
        y = TOP + row * ROW
        length = max(2.0, value * scale)
        colour = "#2a6fbb" if name in ours else "#b9bec6"
        place = f'x="{LEFT}" y="{y + 3}" width="{length:.1f}" height="22"'
        parts += [text(LEFT - 10, y + 18, name, 'text-anchor="end"'),
                  f'<rect {place} fill="{colour}"/>',
                  text(LEFT + length + 8, y + 18, f"{value:.3g} {unit}", "")]
    return "\n".join([*parts, "</svg>", ""])


def text(x: float, y: float, words: str, more: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" fill="#222" {more}>{escape(words)}</text>'
