"""Line plots as SVG text: small, and coloured by the page's style sheet, so that light and dark both work."""

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 26, 38  # of the area in which lines are drawn
MOST_POINTS = 800  # of a line: more than its pixels


@dataclass
class Line:
    """One curve: ``xs`` ascending; points that are not finite are left out, and leave a gap."""

    name: str
    xs: list[float]
    ys: list[float]
    dots: bool = False  # few points, each worth seeing


def line_plot(title: str, x_label: str, lines: list[Line], x_seconds: bool = False) -> str:
    """Return an <svg> of ``lines``, in the colours of the classes line0, line1 ...; "" if no point is finite.

    ``x_seconds``: the x axis is time, and labelled as such.
    """
    points = [(x, y) for line in lines for x, y in zip(line.xs, line.ys, strict=True) if finite(x, y)]
    if not points:
        return ""
    x_low, x_high = span([x for x, _ in points])
    y_low, y_high = span([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img"><title>{escape(title)}</title>']
    parts.append(f'<text class="title" x="{LEFT}" y="15">{escape(title)}</text>')
    for tick in ticks(y_low, y_high):
        _, y = place(x_low, tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="end" x="{LEFT - 5}" y="{y + 4:.1f}">{short(tick)}</text>')
    for tick in ticks(x_low, x_high, time=x_seconds):
        x, _ = place(tick, y_low)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        label = clock(tick) if x_seconds else short(tick)
        parts.append(f'<text class="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}">{label}</text>')
    parts.append(f'<text class="middle" x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    for number, line in enumerate(lines):
        parts.append(_curve(line, number, place))
    if len(lines) > 1:
        right = WIDTH - RIGHT  # names stand beside the title, from right to left
        for number, line in reversed([*enumerate(lines)]):
            parts.append(f'<text class="end fill{number}" x="{right}" y="15">{escape(line.name)}</text>')
            right -= 12 + sum(12 if ord(letter) > 0x2E80 else 6 for letter in line.name)
    return "".join([*parts, "</svg>"])


def _curve(line: Line, number: int, place) -> str:
    step = max(1, math.ceil(len(line.xs) / MOST_POINTS))  # the last point is always among them
    chosen = [*range(len(line.xs) - 1, -1, -step)][::-1]
    path, pen, dots = [], "M", []
    for index in chosen:
        x, y = line.xs[index], line.ys[index]
        if not finite(x, y):
            pen = "M"
            continue
        across, down = place(x, y)
        path.append(f"{pen}{across:.1f} {down:.1f}")
        dots.append(f'<circle class="fill{number}" cx="{across:.1f}" cy="{down:.1f}" r="2.5"/>')
        pen = "L"
    return f'<path class="line line{number}" d="{"".join(path)}"/>' + ("".join(dots) if line.dots else "")


def stacked_bar(title: str, parts: dict[str, int]) -> str:
    """Return an <svg> with one bar divided as ``parts`` are, in the colours fill0, fill1 ...; "" if all are 0."""
    total = sum(parts.values())
    if not total:
        return ""
    drawn = [f'<svg viewBox="0 0 {2 * WIDTH} 40" role="img"><title>{escape(title)}</title>']
    x = 0.0
    for number, (name, count) in enumerate(parts.items()):
        width = count / total * 2 * WIDTH
        note = f"<title>{escape(name)}: {count:,} ({count / total:.2%})</title>"
        drawn.append(f'<rect class="fill{number}" x="{x:.2f}" y="4" width="{width:.2f}" height="32">{note}</rect>')
        x += width
    return "".join([*drawn, "</svg>"])


def finite(*numbers: float | None) -> bool:
    return all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)


def span(values: list[float]) -> tuple[float, float]:
    """Return lowest and highest value, apart from each other, with a little room unless the lowest is 0."""
    low, high = min(values), max(values)
    if low == high:
        return low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    room = (high - low) * 0.04
    return (low if low == 0 else low - room), high + room


def ticks(low: float, high: float, time: bool = False) -> list[float]:
    """Return 3 to 7 round numbers between ``low`` and ``high``; ``time``: round in seconds, minutes, hours or days."""
    raw = (high - low) / 5
    steps = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400, 172800, 604800]
    if time and 1 <= raw <= steps[-1]:
        step = next(step for step in steps if step >= raw)
    else:
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(number: float) -> str:
    """Return 1.5M for 1,500,000, and 2e-05 for what is small."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{letter}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Return 90 s, 5 min, 2.5 h or 3 d."""
    for size, unit in ((172800, "d"), (7200, "h"), (120, "min")):
        if abs(seconds) >= size:
            return f"{seconds / {'d': 86400, 'h': 3600, 'min': 60}[unit]:.3g} {unit}"
    return f"{seconds:.3g} s"
