"""The static form of the lab: some steps are trained, and a picture stays in the notebook."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pandas as pd

from polrl.core.run import Run
from polrl.core.views import Curve, View

from .static_views import draw_curves, draw_view, new_figure, to_png

SMOKE_STEPS = 12


class Still:
    """Pictures with words for people who can't see them; shows itself in a notebook.

    Parameters
    ----------
    pictures : sequence of (bytes, str)
        PNG bytes and alt text.
    caption : str
        A line below.
    """

    def __init__(self, pictures: Sequence[tuple[bytes, str]], caption: str = "") -> None:
        self.pictures = list(pictures)
        self.caption = caption

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, Image, display

        for png, alt in self.pictures:
            display(Image(data=png, alt=alt, width=_width(png)))
        if self.caption:
            display(HTML(f"<small>{self.caption}</small>"))


def still(figure: Any) -> Still:
    """Return a matplotlib figure as a picture that shows itself, with its `alt` words."""
    return Still([(to_png(figure), getattr(figure, "alt", ""))])


def still_picture(runs: Sequence[Run], steps: int) -> Still:
    """Train `steps` updates (a few in smoke mode) and draw curves and views.

    Parameters
    ----------
    runs : sequence of Run
    steps : int
        Updates of each run.
    """
    count = min(steps, SMOKE_STEPS) if os.environ.get("POLRL_MODE") == "smoke" else steps
    pictures = []
    histories, marks = {}, []
    for run in runs:
        run.evaluate_every = max(1, count // 12)
        run.evaluate()
        run.advance(count)
        name = type(run.learner).__name__
        while name in histories:
            name += " (2)"
        histories[name] = _together(run)
        marks += [(step, phase, "phase") for step, phase in run.phase_marks]
    curves = _curves(runs)
    figure = draw_curves(histories, curves, marks=marks)
    pictures.append((to_png(figure), figure.alt))  # type: ignore[attr-defined]
    for run in runs:
        pictures.append(_views_picture(run.views()))
    caption = f"Static form: {count} steps. In JupyterLab this cell shows sliders, and the curves move."
    return Still(pictures, caption)


def _together(run: Run) -> pd.DataFrame:
    """Return history and evaluations in one table; a metric is NaN where it was not measured."""
    history, evaluations = run.history, run.evaluations.drop(columns="phase", errors="ignore")
    return history.join(evaluations, how="outer")


def _curves(runs: Sequence[Run]) -> list[Curve]:
    curves = {curve.title: curve for run in runs for curve in run.learner.curves}
    return list(curves.values())


def _views_picture(views: dict[str, View]) -> tuple[bytes, str]:
    heights = [2.6 if _is_wide(view) else 2.3 for view in views.values()]
    figure = new_figure(10.0, sum(heights))
    parts = figure.subfigures(len(views), 1, height_ratios=heights, squeeze=False).ravel()
    for part, view in zip(parts, views.values(), strict=True):
        draw_view(view, part)
    return to_png(figure), " ".join(view.alt + "." for view in views.values())


def _is_wide(view: View) -> bool:
    images = getattr(view, "images", None)
    return images is not None and images.shape[0] > 1


def _width(png: bytes) -> int:
    """Return a PNG's width for the page: its pixels at the figures' 110 an inch, as 96 an inch."""
    return int.from_bytes(png[16:20], "big") * 96 // 110
