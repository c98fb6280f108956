"""Small drawings, one a kind of regularizer: the same strokes as SVG for a page and on matplotlib axes for a picture.

A glyph lies in a box of 48 x 32, y pointing down. Its colours are Okabe and Ito's; "ink" is the colour of the text, so
that a page's dark theme needs no second drawing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .static_views import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 48, 32
BLUE, ORANGE, VERMILION, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"

Point = tuple[float, float]


@dataclass(frozen=True)
class Stroke:
    """A line, or an area if it is filled."""

    points: tuple[Point, ...]
    color: str = BLUE
    width: float = 2.0
    dashed: bool = False
    filled: bool = False
    opacity: float = 1.0


@dataclass(frozen=True)
class Glyph:
    """Strokes from back to front, and what they show in words."""

    alt: str
    strokes: tuple[Stroke, ...]

    def svg(self, title: str = "", width: int = 72) -> str:
        """Return the glyph as an SVG element of so many pixels; `title` goes before the words for who can't see it."""
        words = html.escape(f"{title}: {self.alt}" if title else self.alt, quote=True)
        shapes = "".join(_element(stroke) for stroke in self.strokes)
        size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{width}" height="{width * HEIGHT // WIDTH}"'
        ends = 'stroke-linecap="round" stroke-linejoin="round"'
        return f'<svg role="img" aria-label="{words}" {size} {ends}><title>{words}</title>{shapes}</svg>'

    def draw(self, axes: Axes, at: Point = (0.0, 0.0), unit: float = 1.5) -> None:
        """Add the glyph to matplotlib axes whose y points down.

        Parameters
        ----------
        axes : Axes
        at : (float, float)
            Its upper left corner, in the axes' units, which are the glyph's.
        unit : float
            The length of a unit in points, for the width of lines.
        """
        from matplotlib.lines import Line2D
        from matplotlib.patches import Polygon

        for stroke in self.strokes:
            points = [(at[0] + x, at[1] + y) for x, y in stroke.points]
            ink = INK if stroke.color == "ink" else stroke.color
            if stroke.filled:
                axes.add_artist(Polygon(points, facecolor=ink, alpha=stroke.opacity, linewidth=0, zorder=2))
                continue
            x, y = zip(*points, strict=True)
            style: dict[str, Any] = {"solid_capstyle": "round", "solid_joinstyle": "round", "zorder": 2}
            if stroke.dashed:
                style["linestyle"] = (0, (3 / stroke.width, 3 / stroke.width))
            axes.add_artist(Line2D(x, y, color=ink, alpha=stroke.opacity, linewidth=stroke.width * unit, **style))


def _element(stroke: Stroke) -> str:
    points = " ".join(f"{x:.4g},{y:.4g}" for x, y in stroke.points)
    color = "currentColor" if stroke.color == "ink" else stroke.color
    faint = f' opacity="{stroke.opacity:g}"' if stroke.opacity < 1 else ""
    if stroke.filled:
        return f'<polygon points="{points}" fill="{color}"{faint}/>'
    dashes = ' stroke-dasharray="3 3"' if stroke.dashed else ""
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{stroke.width:g}"{dashes}{faint}/>'


# ---- the parts that glyphs are made of -----------------------------------------------------------------------------


def _line(points: Sequence[Point], color: str = BLUE, width: float = 2.0, *, dashed: bool = False) -> Stroke:
    return Stroke(tuple(points), color, width, dashed)


def _thin(points: Sequence[Point], *, dashed: bool = False) -> Stroke:
    return Stroke(tuple(points), "ink", 1.0, dashed, opacity=0.6)


def _area(points: Sequence[Point], color: str = BLUE, opacity: float = 0.25) -> Stroke:
    return Stroke(tuple(points), color, filled=True, opacity=opacity)


def _circle(x: float, y: float, radius: float) -> list[Point]:
    turns = [2 * math.pi * i / 32 for i in range(33)]
    return [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]


def _dot(x: float, y: float, color: str = BLUE, radius: float = 2.2, opacity: float = 1.0) -> Stroke:
    return _area(_circle(x, y, radius), color, opacity)


def _dots(places: Sequence[Point], color: str = BLUE, radius: float = 2.2, opacity: float = 1.0) -> list[Stroke]:
    return [_dot(x, y, color, radius, opacity) for x, y in places]


def _box(x: float, y: float, width: float, height: float, color: str = BLUE, opacity: float = 1.0) -> Stroke:
    return _area([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], color, opacity)


def _curve(height: Callable[[float], float], start: float, end: float) -> list[Point]:
    return [(x, height(x)) for x in (start + (end - start) * i / 24 for i in range(25))]


def _bell(center: float, width: float, top: float) -> list[Point]:
    return _curve(lambda x: 28 - (28 - top) * math.exp(-(((x - center) / width) ** 2)), center - 13, center + 13)


def _arrow(start: Point, end: Point, color: str, width: float = 2.0, *, dashed: bool = False) -> list[Stroke]:
    turn = math.atan2(end[1] - start[1], end[0] - start[0])
    barbs = [(end[0] - 5 * math.cos(turn + side), end[1] - 5 * math.sin(turn + side)) for side in (0.6, -0.6)]
    return [_line([start, end], color, width, dashed=dashed), _line([barbs[0], end, barbs[1]], color, width)]


def _bars(heights: Sequence[float], color: str = BLUE, opacity: float = 1.0) -> list[Stroke]:
    step = 40 / len(heights)
    return [_box(4 + i * step + 0.8, 28 - h, step - 1.6, h, color, opacity) for i, h in enumerate(heights)]


FLOOR = _thin([(2, 28.5), (46, 28.5)])


# ---- the glyphs ----------------------------------------------------------------------------------------------------


def _grid(filled: Sequence[tuple[int, int]]) -> list[Stroke]:
    cells = [(row, column) for row in range(4) for column in range(6)]
    return [
        _box(5 + 6.5 * c, 2.5 + 7 * r, 5.2, 5.6, BLUE if (r, c) in filled else "ink", 1.0 if (r, c) in filled else 0.14)
        for r, c in cells
    ]


def _network() -> list[Stroke]:
    left, right = [(9.0, 6.0), (9.0, 16.0), (9.0, 26.0)], [(39.0, 10.0), (39.0, 22.0)]
    widths = [0.8, 2.6, 1.6, 0.8, 2.6, 1.6]
    pairs = [(a, b) for a in left for b in right]
    lines = [_line(pair, ORANGE, width) for pair, width in zip(pairs, widths, strict=True)]
    return [*lines, *_dots(left + right, BLUE, 3.0)]


CLOUD = [(8, 13), (12, 24), (15, 17), (19, 26), (21, 15), (25, 21)]
SCATTER = [
    (5, 14), (8, 22), (11, 7), (14, 15), (17, 24), (20, 9), (23, 26), (26, 13), (29, 20), (32, 8), (35, 24), (38, 12),
    (41, 21), (44, 9),
]  # fmt: skip

GLYPHS: dict[str, Glyph] = {
    "entropy": Glyph(
        "a dashed peak, and bars of almost equal height in its place",
        (FLOOR, *_bars([13, 15, 16, 15, 13]), _line(_bell(24, 4, 3), VERMILION, 1.6, dashed=True)),
    ),
    "kl": Glyph(
        "two bell curves with their peaks tied together",
        (
            FLOOR, _thin(_bell(17, 7, 8), dashed=True), _area(_bell(30, 6, 8)), _line(_bell(30, 6, 8)),
            _line([(17, 6), (30, 6)], VERMILION, 1.6), *_dots([(17, 6), (30, 6)], VERMILION, 2),
        ),
    ),
    "f_divergence": Glyph(
        "a convex curve with its lowest point marked",
        (
            FLOOR, _area([*_curve(lambda x: 27 - (x - 20) ** 2 / 17, 4, 40), (40, 28), (4, 28)], ORANGE, 0.2),
            _line(_curve(lambda x: 27 - (x - 20) ** 2 / 17, 4, 40), ORANGE), _dot(20, 27, BLUE, 2.6),
        ),
    ),
    "clip": Glyph(
        "a line that rises between two bounds and is level outside them",
        (
            _thin([(15, 3), (15, 29)], dashed=True), _thin([(33, 3), (33, 29)], dashed=True),
            _line([(3, 25), (15, 25), (33, 7), (45, 7)], BLUE, 2.4),
        ),
    ),
    "imitation": Glyph(
        "a point pulled to the nearest of a cloud of points",
        (
            *_dots(CLOUD, "ink", 2, 0.45), _dot(25, 21, BLUE, 2.6), *_arrow((38, 8), (28, 18.5), VERMILION, 1.8),
            _dot(40, 6, VERMILION, 2.6),
        ),
    ),
    "conservatism": Glyph(
        "a value curve over some data points: dashed it rises beyond them, drawn through it falls",
        (
            FLOOR, *_dots([(17, 28), (22, 28), (26, 28), (31, 28)], "ink", 1.6, 0.6),
            _line([(30, 12), (36, 8), (45, 3)], VERMILION, 1.6, dashed=True),
            _line([(18, 12), (12, 8), (3, 3)], VERMILION, 1.6, dashed=True),
            _line(_curve(lambda x: 11 + (x - 24) ** 2 / 34, 3, 45)),
        ),
    ),
    "exploration": Glyph(
        "paths that branch from one point to many",
        (
            *[_line([(6, 16), (20, y / 2 + 8), (40, y)], BLUE, 1.4) for y in (4, 12, 20, 28)],
            _dot(6, 16, BLUE, 3), *_dots([(40, 4), (40, 12), (40, 28)], BLUE, 2), _dot(40, 20, ORANGE, 3.4),
        ),
    ),
    "opponent": Glyph(
        "two arrows that point at each other",
        (*_arrow((3, 16), (21, 16), BLUE, 3), *_arrow((45, 16), (27, 16), VERMILION, 3), _thin([(24, 4), (24, 28)])),
    ),
    "lipschitz": Glyph(
        "a curve that stays inside the cone of two crossing lines",
        (
            _area([(24, 16), (4, 4), (4, 28)], ORANGE, 0.18), _area([(24, 16), (44, 4), (44, 28)], ORANGE, 0.18),
            _line([(4, 4), (44, 28)], ORANGE, 1.2), _line([(4, 28), (44, 4)], ORANGE, 1.2),
            _line(_curve(lambda x: 16 - 4.2 * math.sin((x - 24) / 7.5), 4, 44)), _dot(24, 16),
        ),
    ),
    "weights": Glyph("units joined by lines of different width", tuple(_network())),
    "sparsity": Glyph("a grid of cells, few of them filled", tuple(_grid([(0, 4), (1, 1), (2, 3), (3, 0), (3, 5)]))),
    "bottleneck": Glyph(
        "two funnels that meet in three separate points",
        (
            _area([(3, 3), (19, 11), (19, 21), (3, 29)]), _area([(45, 3), (29, 11), (29, 21), (45, 29)]),
            *_dots([(24, 10), (24, 16), (24, 22)], ORANGE, 2.4),
        ),
    ),
    "transport": Glyph(
        "points on the left joined to points on the right by lines that do not cross",
        (
            *[_line([(9, a), (39, b)], "ink", 1) for a, b in ((4, 7), (12, 13), (20, 23), (28, 28))],
            *_dots([(9, 4), (9, 12), (9, 20), (9, 28)], BLUE, 2.6),
            *_dots([(39, 7), (39, 13), (39, 23), (39, 28)], ORANGE, 2.6),
        ),
    ),
    "noise": Glyph(
        "a smooth curve among scattered points",
        (*_dots(SCATTER, ORANGE, 1.6), _line(_curve(lambda x: 16 - 6 * math.sin(x / 7), 3, 45))),
    ),
    "mixing": Glyph("two circles that overlap", (_dot(18, 16, BLUE, 12, 0.55), _dot(30, 16, ORANGE, 12, 0.55))),
    "selection": Glyph(
        "a row of bars, those at both ends in colour, those between pale",
        (
            FLOOR, *_bars([25, 22, 0, 0, 0, 0, 6, 3]),
            *_bars([0, 0, 18, 15, 13, 10, 0, 0], "ink", 0.2),
        ),
    ),
    "curriculum": Glyph(
        "a staircase with a point on its highest step",
        (
            _line([(3, 28), (13, 28), (13, 21), (24, 21), (24, 14), (35, 14), (35, 8), (45, 8)]),
            _dot(41, 4.4, ORANGE, 3),
        ),
    ),
    "distillation": Glyph(
        "an arrow from a large circle to a small one",
        (_line(_circle(12, 16, 9), "ink", 1.6), *_arrow((24, 16), (33, 16), ORANGE), _dot(41, 16, BLUE, 5)),
    ),
    "variance": Glyph(
        "a band that narrows to a line",
        (
            _area([(3, 3), (18, 11), (45, 14.5), (45, 17.5), (18, 21), (3, 29)]),
            _thin([(3, 8), (10, 23), (16, 12), (22, 19), (28, 14.5), (34, 17), (40, 16)]), _line([(3, 16), (45, 16)]),
        ),
    ),
    "negatives": Glyph(
        "a strong arrow up, and a weak one down",
        (*_arrow((16, 28), (16, 4), BLUE, 3.4), *_arrow((33, 6), (33, 22), VERMILION, 1.6, dashed=True)),
    ),
    "shaping": Glyph(
        "a step, and a dashed slope that leads up to it",
        (
            _line([(3, 27), (36, 27), (36, 8), (45, 8)]), _line([(4, 25), (35, 9)], ORANGE, 2, dashed=True),
            _dot(40.5, 4.4, ORANGE, 2.6),
        ),
    ),
    "cost": Glyph(
        "a clock",
        (
            _line(_circle(24, 17, 12), "ink", 1.6), _line([(24, 9), (24, 17), (30, 20)], ORANGE, 2.4),
            _thin([(21, 2), (27, 2)]),
        ),
    ),
    "tuning": Glyph(
        "three sliders at different positions",
        (
            *[_thin([(4, y), (44, y)]) for y in (7, 16, 25)], _dot(14, 7, BLUE, 3.4), _dot(34, 16, ORANGE, 3.4),
            _dot(22, 25, GREEN, 3.4),
        ),
    ),
}  # fmt: skip

# For a method whose kinds are not known: a baseline.
PLAIN = Glyph(
    "a plain learning curve",
    (FLOOR, _thin([(4, 3), (4, 28)]), _line(_curve(lambda x: 7 + 20 * math.exp(-(x - 5) / 9), 5, 45), "ink", 1.8)),
)
