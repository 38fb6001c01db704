"""Charts as SVG text. Colours are CSS variables, so one chart fits light and dark pages."""

import math
from html import escape

WIDTH, HEIGHT = 400, 215
LEFT, RIGHT, TOP, BOTTOM = 42, 390, 8, 181  # of the plot: the rest is for labels
DASHES = ("none", "5 3", "1.5 2.5", "9 3 2 3", "3 6")
LIGHT = ["#2f6fb7", "#c0562b", "#3d8f5f", "#8a55b0", "#a8831a", "#c2477f", "#3a8f9f", "#777777"]
DARK = ["#6aa9ef", "#f0915f", "#71c795", "#bd8fe0", "#dcb94e", "#ee85b3", "#7fcbd8", "#b5b5b5"]


def css(num_labels: int) -> str:
    """--run0, --run1, … are the colours of labels; --c is that of the run an element belongs to."""
    light, dark = ("".join(f"--run{i}:{x};" for i, x in enumerate(x)) for x in (LIGHT, DARK))
    runs = "".join(f".run{i}{{--c:var(--run{i % len(LIGHT)})}}" for i in range(num_labels))
    return f"""
:root {{ --ink: #22262b; --line: #dcdfe3; --red: #c0281f; {light} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #dfe3e8; --line: #363c44; --red: #ff7b70; {dark} }} }}
svg text {{ font: 11px sans-serif; fill: var(--ink); text-anchor: middle; }}
svg .end {{ text-anchor: end; }} svg .start {{ text-anchor: start; }}
.rule {{ stroke: var(--line); fill: none; }} .cells {{ fill: var(--run0); }}
.line, .dots {{ fill: none; stroke: var(--c); stroke-width: 1.5; }}
.dots {{ stroke-width: 4.5; stroke-linecap: round; }}
.ring {{ fill: none; stroke: var(--red); stroke-width: 1.5; }}
{runs}"""


def svg(content: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    return f"{opening}{content}</svg>"


def text(x: float, y: float, content: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


class Axes:
    """Maps steps and values to SVG coordinates; `content` begins with the grid and its labels."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]):
        self.x_range, self.y_range = x_range, y_range
        self.legend: dict[str, str] = {}  # name of a line -> its dashes
        grid, labels = f"M{LEFT} {BOTTOM}H{RIGHT}", text((LEFT + RIGHT) / 2, HEIGHT - 4, "step")
        for value in ticks(*x_range):
            x, _ = self.point(value, 0)
            grid += f"M{x:.1f} {TOP}V{BOTTOM + 3}"
            labels += text(x, BOTTOM + 15, f"{value:.6g}")
        for value in ticks(*y_range):
            _, y = self.point(0, value)
            grid += f"M{LEFT - 3} {y:.1f}H{RIGHT}"
            labels += text(LEFT - 6, y + 4, f"{value:.6g}", "end")
        self.content = f'<path class="rule" d="{grid}"/>{labels}'

    def point(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

    def add_line(
        self, x: list[float], y: list[float], number: int, dash: str, tooltip: str
    ) -> None:
        points = ["{:.1f} {:.1f}".format(*self.point(*p)) for p in zip(x, y, strict=True)]
        path = f'<path class="line" stroke-dasharray="{dash}" d="M{"L".join(points)}"/>'
        if len(x) < 30:
            path += f'<path class="dots" d="{"".join(f"M{point}h0" for point in points)}"/>'
        self.content += f'<g class="run{number}"><title>{escape(tooltip)}</title>{path}</g>'

    def add_ring(self, x: float, y: float) -> None:
        px, py = self.point(x, y)
        self.content += f'<circle class="ring" cx="{px:.1f}" cy="{py:.1f}" r="5"/>'

    def add_heatmap(self, columns: list[list[float]]) -> None:
        """A rectangle for each value, the darker the larger; one path for each of ten shades."""
        width, height = (RIGHT - LEFT) / len(columns), (BOTTOM - TOP) / len(columns[0])
        largest, shades = max(map(max, columns)) or 1.0, [""] * 11
        for i, column in enumerate(columns):
            for k, value in enumerate(column):
                corner = f"M{LEFT + i * width:.2f} {BOTTOM - k * height:.2f}"
                cell = f"{corner}h{width:.2f}v{-height:.2f}h{-width:.2f}z"
                shades[math.ceil(10 * (value / largest) ** 0.6)] += cell
        for shade, path in enumerate(shades[1:], 1):
            self.content += f'<path class="cells" opacity="{shade / 10}" d="{path}"/>'


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most `count` + 1 round numbers: multiples of 1, 2 or 5 times a power of ten."""
    unit = 10 ** math.floor(math.log10((high - low) / count))
    unit *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * unit) <= count)
    first, last = math.ceil(low / unit - 1e-6), math.floor(high / unit + 1e-6)
    return [i * unit for i in range(first, last + 1)]


def y_range(values: list[float], is_share: bool) -> tuple[float, float]:
    """All of 0 to 1 for shares, else what the values span; from 0 where that flattens no curve."""
    low, high = min(values), max(values)
    if is_share:
        return min(0.0, low), max(1.02, high)
    margin = 0.05 * (high - low) or abs(high) / 2 or 1.0
    return (0.0 if 0 <= low <= 0.5 * high else low - margin), high + margin
