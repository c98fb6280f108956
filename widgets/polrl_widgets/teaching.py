"""What the course's notebooks share: the set-up, questions to answer before looking, and a study's picture."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from polrl.core.errors import PolrlError
from polrl.core.study import Interval, StudyResult

from .still import Still, still

MODES = ("smoke", "fast", "full")


def start(mode: str) -> str:
    """Get a notebook ready, in JupyterLab, Colab and Binder alike.

    Parameters
    ----------
    mode : {"smoke", "fast", "full"}
        From the notebook's parameters; the environment variable POLRL_MODE takes precedence.

    Returns
    -------
    str
        The mode that holds.
    """
    mode = os.environ.get("POLRL_MODE") or mode
    if mode not in MODES:
        raise PolrlError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    pd.set_option("display.max_colwidth", None)  # sentences in tables are shown whole
    if "google.colab" in sys.modules:
        from google.colab import output  # type: ignore[import-not-found]

        output.enable_custom_widget_manager()
    return mode


class Predict:
    """A question to be answered before the answer shows.

    Parameters
    ----------
    question : str
    options : sequence of str
    answer : int
        The place of the right option, from 0.
    why : str
        Shown with the answer.
    """

    def __init__(self, question: str, options: Sequence[str], answer: int, why: str) -> None:
        if not 0 <= answer < len(options):
            raise PolrlError(f"answer must be from 0 to {len(options) - 1}, got {answer!r}")
        self.question, self.options, self.answer, self.why = question, list(options), answer, why

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        from .lab import front_end

        display(HTML(self._folded()) if front_end() == "static" else self._live())

    def _folded(self) -> str:
        items = "".join(f"<li>{html.escape(option)}</li>" for option in self.options)
        solution = html.escape(f"{self.options[self.answer]}. {self.why}")
        return (
            f"<p><b>{html.escape(self.question)}</b></p><ol type='a'>{items}</ol>"
            f"<details><summary>The answer</summary><p>{solution}</p></details>"
        )

    def _live(self) -> Any:
        import ipywidgets as widgets

        wide = widgets.Layout(width="auto")
        choice = widgets.RadioButtons(options=self.options, value=None, layout=wide).add_class("polrl-predict")
        told = widgets.HTML().add_class("polrl-predict-answer")

        def chosen(change: dict[str, Any]) -> None:
            right = self.options.index(change["new"]) == self.answer
            word = "Yes" if right else f"Not quite: {html.escape(self.options[self.answer])}"
            told.value = f"<b>{word}.</b> {html.escape(self.why)}"

        choice.observe(chosen, "value")
        return widgets.VBox([widgets.HTML(f"<b>{html.escape(self.question)}</b>"), choice, told])


def study_picture(result: StudyResult, metrics: Sequence[str]) -> Still:
    """Draw each arm's mean with its 95 % interval and every seed as a dot, a panel a metric.

    Parameters
    ----------
    result : StudyResult
    metrics : sequence of str
        "metric" for the end of the training, "metric@phase" for the end of a phase.
    """
    from .static_views import MUTED, color, new_figure

    arms = list(dict.fromkeys(row["arm"] for row in result.measures))
    figure = new_figure(3.3 * len(metrics) + 1.2, 0.55 * len(arms) + 1.1)
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False).ravel()
    for axes, metric in zip(panels, metrics, strict=True):
        for place, arm in enumerate(arms):
            values = [row[metric] for row in result.measures if row["arm"] == arm and metric in row]
            if not values:
                continue
            interval, ink = Interval.of(values), color(place)
            axes.plot(values, np.full(len(values), place + 0.18), ".", color=ink, alpha=0.6, markersize=5)
            axes.plot(interval.mean, place, "o", color=ink)
            if np.isfinite(interval.low):
                axes.plot([interval.low, interval.high], [place, place], color=ink, linewidth=2)
        axes.set_title(metric.replace("_", " ").replace("@", ", end of "), fontsize=10, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=9, length=0)
        axes.grid(axis="x", alpha=0.25)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    seeds = len({row["seed"] for row in result.measures})
    figure.supxlabel(f"mean and 95 % interval over {seeds} seeds; dots are seeds", fontsize=9, color=MUTED)
    figure.alt = f"{', '.join(metrics)} of the arms {', '.join(arms)}, with intervals over {seeds} seeds."  # type: ignore[attr-defined]
    return still(figure)
