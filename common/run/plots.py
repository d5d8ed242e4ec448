"""Line plots as SVG text. The page's style sheet gives the colours, so light and dark mode both work.

docs/libraries.md says why matplotlib does not draw them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

WIDTH = 420
HEIGHT = 240
# Margins around the area in which lines are drawn.
LEFT = 52
RIGHT = 10
TOP = 26
BOTTOM = 38
MOST_POINTS = 800  # of a line; a plot is narrower than this in pixels
TIME_STEPS = [  # seconds; each at most 2.5 times the one before, so that an axis has at least two of them
    *(1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800),
    *(hours * 3600 for hours in (1, 2, 4, 6, 12, 24, 48, 96, 168)),
]

Place = Callable[[float, float], tuple[float, float]]  # a point of the data -> its pixels from the left and the top


@dataclass
class Line:
    """One curve: ``xs`` ascending. A point that is not finite leaves a gap."""

    name: str
    xs: list[float]
    ys: list[float]
    dots: bool = False  # draw each point; for lines of few points


def line_plot(title: str, x_label: str, lines: list[Line], x_seconds: bool = False) -> str:
    """Return an <svg> of ``lines``, or "" if no point is finite.

    Line number n is drawn in the colour of the CSS class ``line{n}``.

    Args:
        x_seconds: the x axis is a time in seconds; label it in seconds, minutes, hours or days.
    """
    points = [(x, y) for line in lines for x, y in zip(line.xs, line.ys, strict=True) if finite(x, y)]
    if not points:
        return ""
    x_low, x_high = span([x for x, _ in points])
    y_low, y_high = span([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        from_left = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        from_top = HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return from_left, from_top

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
    parts += [_curve(line, number, place) for number, line in enumerate(lines)]
    if len(lines) > 1:
        parts += _legend([line.name for line in lines])
    return "".join([*parts, "</svg>"])


def _legend(names: list[str]) -> list[str]:
    """Return the names of the lines as <text>, on the title's height and set from right to left."""
    parts = []
    right = WIDTH - RIGHT
    for number, name in reversed([*enumerate(names)]):
        parts.append(f'<text class="end fill{number}" x="{right}" y="15">{escape(name)}</text>')
        right -= 12 + sum(12 if ord(letter) > 0x2E80 else 6 for letter in name)  # Chinese letters are twice as wide
    return parts


def _curve(line: Line, number: int, place: Place) -> str:
    """Return <path> and <circle> elements of at most MOST_POINTS points of ``line``; the last point is one of them."""
    step = max(1, math.ceil(len(line.xs) / MOST_POINTS))
    chosen = [*range(len(line.xs) - 1, -1, -step)][::-1]
    path = []
    dots = []
    command = "M"  # of SVG: M moves without drawing, L draws a straight line
    for index in chosen:
        x = line.xs[index]
        y = line.ys[index]
        if not finite(x, y):
            command = "M"
            continue
        from_left, from_top = place(x, y)
        path.append(f"{command}{from_left:.1f} {from_top:.1f}")
        dots.append(f'<circle class="fill{number}" cx="{from_left:.1f}" cy="{from_top:.1f}" r="2.5"/>')
        command = "L"
    drawn = f'<path class="line line{number}" d="{"".join(path)}"/>'
    return drawn + "".join(dots) if line.dots else drawn


def stacked_bar(title: str, parts: dict[str, int]) -> str:
    """Return an <svg> of one bar, divided in proportion to ``parts``, or "" if all parts are 0.

    Part number n has the colour of the CSS class ``fill{n}``.
    """
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
    """Whether all ``numbers`` are numbers, and neither infinite nor NaN."""
    return all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)


def span(values: list[float]) -> tuple[float, float]:
    """Return the ends of an axis for ``values``: lowest and highest, each with a margin of 4%.

    A lowest value of 0 gets no margin. The two ends always differ.
    """
    low = min(values)
    high = max(values)
    if low == high:
        margin = abs(low) / 10 if low else 0.1
        return low - margin, high + margin
    margin = (high - low) * 0.04
    return (low if low == 0 else low - margin), high + margin


def ticks(low: float, high: float, time: bool = False) -> list[float]:
    """Return 3 to 7 round numbers between ``low`` and ``high``.

    Args:
        time: the numbers are seconds; return 2 to 6 round numbers of seconds, minutes, hours or days.
    """
    smallest_step = (high - low) / 5
    if time and 1 <= smallest_step <= TIME_STEPS[-1]:
        step = next(step for step in TIME_STEPS if step >= smallest_step)
    else:
        power = 10.0 ** math.floor(math.log10(smallest_step))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= smallest_step * 0.999)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def short(number: float) -> str:
    """Return a number in few letters: 1.5M for 1,500,000, and 2e-05 for 0.00002."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{letter}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Return a time with its unit: 90 s, 5 min, 2.5 h or 3 d."""
    # A unit is used from two of it on: 90 s rather than 1.5 min.
    for unit_seconds, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if abs(seconds) >= 2 * unit_seconds:
            return f"{seconds / unit_seconds:.3g} {unit}"
    return f"{seconds:.3g} s"
