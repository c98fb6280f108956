"""The still half of the lab: views and learning curves drawn with matplotlib, for executed notebooks.

Figures are made without pyplot, so that no global state is touched and any thread may draw.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from polrl.core.views import Bars, Curve, Heatmap, Histogram, ImageGrid, Lines, Points, Tokens, View

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours in the order in which tracks take them; "ink" is the colour of the text.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "ink"]
GHOST = "#8c8c8c"
INK = "#1f2328"
MUTED = "#5f6670"
EDGE = "#d5d9de"
DASHES: tuple[Any, ...] = ("-", ":", "--", "-.", (0, (8, 2)))
MARK_DASHES: dict[str, Any] = {"knob": ":", "phase": "-", "fork": "--", "rewind": "--"}


def color(index: int) -> str:
    """Return a colour of the palette, for drawing on white."""
    name = PALETTE[index % len(PALETTE)]
    return INK if name == "ink" else name


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of so many inches, with no window and no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure, colors: int = 256) -> bytes:
    """Return a figure as PNG bytes of few colours; its alt text is stored as the picture's description."""
    buffer = io.BytesIO()
    alt = getattr(figure, "alt", "")
    figure.savefig(buffer, format="png", metadata={"Description": alt} if alt else None)
    return few_colors(buffer.getvalue(), colors)


def few_colors(png: bytes, colors: int = 96, **texts: str) -> bytes:
    """Return a PNG with few colours, which takes a fraction of the bytes; words in it are kept or added."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    with Image.open(io.BytesIO(png)) as image:
        kept = {"Description": str(image.info.get("Description", ""))} | texts
        small = image.convert("RGB").quantize(colors, dither=Image.Dither.NONE)
        info = PngInfo()
        for name, text in kept.items():
            if text:
                info.add_itxt(name, text)
        buffer = io.BytesIO()
        small.save(buffer, format="PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def draw_view(view: View, figure: Figure | None = None) -> Figure:
    """Draw one view.

    Parameters
    ----------
    view : View
    figure : Figure or SubFigure, optional
        Where to draw; a new figure of a fitting size by default.

    Returns
    -------
    Figure
        With the view's `alt` as its attribute of that name.
    """
    figure = new_figure(*_size(view)) if figure is None else figure
    figure.alt = view.alt  # type: ignore[attr-defined]
    if isinstance(view, ImageGrid):
        _draw_images(view, figure)
    else:
        axes = figure.subplots()
        _dress(axes, view.title)
        _PAINTERS[type(view)](view, axes)
    return figure


def draw_curves(
    histories: Mapping[str, pd.DataFrame],
    curves: Sequence[Curve],
    *,
    marks: Sequence[tuple[int, str, str]] = (),
    ghosts: Sequence[str] = (),
    colors: Mapping[str, int] | None = None,
) -> Figure:
    """Draw learning curves, one chart a `Curve`.

    Parameters
    ----------
    histories : mapping of str to DataFrame
        By run: steps in the index or in a column "step", a column a metric.
    curves : sequence of Curve
    marks : sequence of (step, text, kind)
        Vertical lines; kinds as in `Board.mark`. Knob marks carry no words.
    ghosts : sequence of str
        Runs drawn thin and grey.
    colors : mapping of str to int, optional
        Places in the palette; by order by default.
    """
    columns = min(len(curves), 2 if len(curves) == 4 else 3) or 1
    rows = -(-len(curves) // columns)
    figure = new_figure(max(3.4 * columns, 5.0), 2.2 * rows + 0.25)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    places = colors or {name: place for place, name in enumerate(histories)}
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    for axes, curve in zip(grid, curves, strict=False):
        _dress(axes, curve.title, min(10.0, 360 / max(len(curve.title), 1)))  # not into the next chart's title
        for name in sorted(histories, key=lambda name: name not in ghosts):
            _draw_run(axes, curve, histories[name], name, color(places.get(name, 0)), name in ghosts)
        _draw_marks(axes, marks)
        _finish_chart(axes, curve)
    if len(histories) > 1 and len(curves):
        figure.legend(
            *grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9, frameon=False
        )
    names = ", ".join(curve.title for curve in curves)
    figure.alt = f"Learning curves of {', '.join(histories)}: {names} by training step."  # type: ignore[attr-defined]
    return figure


def _dress(axes: Axes, title: str, size: float = 10.0) -> None:
    """Give axes the house style, without touching matplotlib's global settings."""
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(EDGE)
    axes.tick_params(length=0, which="both", labelsize=8.5, labelcolor=MUTED)
    axes.grid(color="#eceef1")
    axes.set_axisbelow(True)
    axes.xaxis.label.set(color=MUTED, fontsize=9)
    axes.yaxis.label.set(color=MUTED, fontsize=9)


def _draw_run(axes: Axes, curve: Curve, history: pd.DataFrame, name: str, ink: str, ghost: bool) -> None:
    steps = history["step"] if "step" in history.columns else history.index.to_series()
    for place, metric in enumerate(curve.metrics):
        if metric not in history.columns:
            continue
        values = history[metric].to_numpy(dtype=float)
        known = np.isfinite(values)
        look: dict[str, Any] = {"color": GHOST, "lw": 0.8, "alpha": 0.7} if ghost else {"color": ink, "lw": 1.5}
        if known.sum() < 25:
            look |= {"marker": "o", "ms": 3}
        label = name if place == 0 else "_" + metric
        axes.plot(steps.to_numpy()[known], values[known], ls=DASHES[place % len(DASHES)], label=label, **look)


def _draw_marks(axes: Axes, marks: Sequence[tuple[int, str, str]]) -> None:
    for step, text, kind in marks:
        axes.axvline(step, color=MUTED, lw=0.8, ls=MARK_DASHES.get(kind, ":"), alpha=0.7)
        if kind != "knob":
            at = axes.get_xaxis_transform()
            axes.text(step, 0.99, f" {text}", transform=at, fontsize=7.5, color=MUTED, va="top", clip_on=True)


def _finish_chart(axes: Axes, curve: Curve) -> None:
    from matplotlib.lines import Line2D

    axes.set_xlabel("step")
    axes.set_ylabel(curve.y_label)
    if curve.log:
        axes.set_yscale("log")
    if len(curve.metrics) > 1:
        lines = [Line2D([], [], color=MUTED, ls=DASHES[i % len(DASHES)]) for i in range(len(curve.metrics))]
        axes.legend(lines, curve.metrics, fontsize=7.5, loc="best", frameon=False)


def _size(view: View) -> tuple[float, float]:
    """Inches that suit a view."""
    match view:
        case ImageGrid():
            rows, columns, height, width = np.asarray(view.images).shape[:4]
            cell = min(0.75, 8.0 / columns)
            return max(columns * cell + 0.9, 2.5), max(rows * cell * height / width + 0.65, 1.2)
        case Tokens():
            return 7.0, 0.6 + 0.3 * len(view.lines)
        case Heatmap():
            return 4.2, 3.2
        case Points():
            return 3.8, 3.2
    return 4.2, 2.6


def _draw_images(view: ImageGrid, figure: Figure) -> None:
    pixels = view.to_bytes()
    figure.suptitle(view.title, fontsize=10, fontweight="bold", x=0.01, ha="left")
    grid: Any = figure.subplots(*pixels.shape[:2], squeeze=False)
    for row, column in np.ndindex(*pixels.shape[:2]):
        axes = grid[row, column]
        axes.imshow(pixels[row, column], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        if view.column_labels and row == 0:
            axes.set_title(view.column_labels[column], fontsize=8, fontweight="normal", loc="center", color=MUTED)
        if view.row_labels and column == 0:
            axes.set_ylabel(view.row_labels[row], fontsize=8, rotation=0, ha="right", va="center", color=MUTED)


def _label(axes: Axes, view: Any) -> None:
    axes.set_xlabel(getattr(view, "x_label", ""))
    axes.set_ylabel(view.y_label)
    if getattr(view, "x_range", None):
        axes.set_xlim(view.x_range)
    if getattr(view, "y_range", None):
        axes.set_ylim(view.y_range)


def _legend(axes: Axes, names: Iterable[str]) -> None:
    if len(list(names)) > 1:
        axes.legend(fontsize=8, frameon=False)


def _draw_bars(view: Bars, axes: Axes) -> None:
    width = 0.8 / max(len(view.values), 1)
    places = np.arange(len(view.labels))
    for i, (name, values) in enumerate(view.values.items()):
        axes.bar(places + (i + 0.5) * width - 0.4, np.asarray(values), width * 0.94, color=color(i), label=name)
    axes.set_xticks(places, view.labels)
    axes.grid(visible=False, axis="x")
    _label(axes, view)
    _legend(axes, view.values)


def _draw_histogram(view: Histogram, axes: Axes) -> None:
    for i, (name, counts) in enumerate(view.counts.items()):
        axes.stairs(np.asarray(counts), np.asarray(view.edges), fill=True, color=color(i), alpha=0.2)
        axes.stairs(np.asarray(counts), np.asarray(view.edges), color=color(i), lw=1.4, label=name)
    axes.set_ylim(bottom=0)
    _label(axes, view)
    _legend(axes, view.counts)


def _draw_lines(view: Lines, axes: Axes) -> None:
    for i, (name, line) in enumerate(view.y.items()):
        axes.plot(np.asarray(view.x), np.asarray(line), color=color(i), lw=1.6, label=name)
    if view.log_x:
        axes.set_xscale("log")
    if view.log_y:
        axes.set_yscale("log")
    _label(axes, view)
    _legend(axes, view.y)


def _ramp(diverging: bool) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colors = ["#D55E00", "#ffffff", "#0072B2"] if diverging else ["#ffffff", "#7fb8d8", "#00426b"]
    return LinearSegmentedColormap.from_list("polrl", colors)


def _draw_heatmap(view: Heatmap, axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    values = np.asarray(view.values)
    reach = float(np.nanmax(np.abs(values))) if values.size else 1.0
    low = view.low if view.low is not None else (-reach if view.diverging else None)
    high = view.high if view.high is not None else (reach if view.diverging else None)
    image = axes.imshow(values, cmap=_ramp(view.diverging), vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if view.row_labels:
        axes.set_yticks(range(len(view.row_labels)), view.row_labels)
    if view.column_labels:
        axes.set_xticks(range(len(view.column_labels)), view.column_labels)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02)
    bar.outline.set_visible(False)
    _label(axes, view)


def _draw_points(view: Points, axes: Axes) -> None:
    for i, (name, group) in enumerate(view.groups.items()):
        points = np.asarray(group)
        axes.scatter(points[:, 0], points[:, 1], s=9, alpha=0.65, color=color(i), label=name, linewidths=0)
    _label(axes, view)
    if view.x_range and view.x_range == view.y_range:  # a plane with one unit, in which a ring is a ring
        axes.set_aspect("equal", anchor="W")
    _legend(axes, view.groups)


def _draw_tokens(view: Tokens, axes: Axes) -> None:
    ramp = _ramp(view.diverging)
    axes.set_axis_off()
    widest = max((sum(len(token) for token in line) for line in view.lines), default=1)
    step = 1 / max(widest + 1, 60)
    for row, (line, values) in enumerate(zip(view.lines, view.values, strict=True)):
        at, y = 0.0, 1 - (row + 0.5) / len(view.lines)
        for token, value in zip(line, np.asarray(values), strict=True):
            share = float(np.clip((value - view.low) / max(view.high - view.low, 1e-12), 0, 1))
            box = {
                "facecolor": ramp(0.5 + (share - 0.5) * 0.7 if view.diverging else share * 0.6),
                "linewidth": 0,
                "pad": 1.5,
            }
            shown = token.replace("\n", "⏎").replace("$", r"\$")
            axes.text(at, y, shown, family="monospace", fontsize=min(9, 840 * step), bbox=box, va="center")
            at += step * len(token)


_PAINTERS: dict[type[View], Any] = {
    Bars: _draw_bars,
    Histogram: _draw_histogram,
    Lines: _draw_lines,
    Heatmap: _draw_heatmap,
    Points: _draw_points,
    Tokens: _draw_tokens,
}
