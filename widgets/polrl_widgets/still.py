"""The static form of the lab: some steps are trained, and a picture stays in the notebook."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from polrl.core.run import Run
from polrl.core.views import Points, View

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
    labelled: dict[str, Run] = {}
    for run in runs:
        run.evaluate_every = max(1, count // 12)
        run.evaluate()
        run.advance(count)
        name = type(run.learner).__name__
        while name in labelled:
            name += " (2)"
        labelled[name] = run
    figure = _curves_figure(labelled)
    pictures.append((to_png(figure), figure.alt))
    pictures += [_views_picture(views) for run in runs if (views := run.views())]
    caption = f"Static form: {count} steps. In JupyterLab this cell shows sliders, and the curves move."
    return Still(pictures, caption)


def _curves_figure(runs: Mapping[str, Run]) -> Any:
    marks = [(step, phase, "phase") for run in runs.values() for step, phase in run.phase_marks]
    curves = {curve.title: curve for run in runs.values() for curve in run.learner.curves}
    return draw_curves({name: _together(run) for name, run in runs.items()}, list(curves.values()), marks=marks)


def curves_png(runs: Mapping[str, Run]) -> bytes:
    """Return the learning curves of labelled runs as a PNG picture."""
    return to_png(_curves_figure(runs))


def curves_csv(runs: Mapping[str, Run]) -> bytes:
    """Return all numbers of labelled runs as CSV: run, step, phase, and a column a metric."""
    tables = [_together(run).assign(run=name).reset_index(names="step") for name, run in runs.items()]
    table = pd.concat(tables, ignore_index=True)
    first = ["run", "step", "phase"]
    return table[[*first, *(c for c in table.columns if c not in first)]].to_csv(index=False).encode()


def page_png(runs: Mapping[str, Run]) -> bytes:
    """Return curves and the first run's views in one picture, for pages that run no custom widget."""
    views = next(iter(runs.values())).views()
    return _stacked([curves_png(runs), *([_views_picture(views)[0]] if views else [])])


def _stacked(pictures: Sequence[bytes]) -> bytes:
    """Return PNG pictures one below the other."""
    from PIL import Image

    images = [Image.open(io.BytesIO(png)).convert("RGB") for png in pictures]
    sheet = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    out = io.BytesIO()
    sheet.save(out, format="PNG")
    return out.getvalue()


def _together(run: Run) -> pd.DataFrame:
    """Return history and evaluations in one table; a metric is NaN where it was not measured."""
    history, evaluations = run.history, run.evaluations.drop(columns="phase", errors="ignore")
    return history.join(evaluations, how="outer")


def _views_picture(views: dict[str, View]) -> tuple[bytes, str]:
    heights = [3.4 if isinstance(view, Points) else 2.6 if _is_wide(view) else 2.3 for view in views.values()]
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
