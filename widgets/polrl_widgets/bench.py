"""What a lab holds of each run on its table, and the words it has for it."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import Any

import ipywidgets as widgets

from polrl.core.learner import Learner
from polrl.core.run import Run
from polrl.core.store import new_run_folder
from polrl.core.tape import Change

from .board import Chart, Track
from .controls import KnobControl


@dataclass
class Bench:
    """One run on the table: its track on the board, its controls, and how much of it was drawn.

    An arm of the study that was switched on is a bench without controls.
    """

    run: Run
    track: Track
    controls: dict[str, KnobControl]
    panel: widgets.VBox
    rows: list[int] = field(default_factory=lambda: [0, 0])
    ghosts: int = 0
    marks: int = 0
    changes: int = 0
    moving: dict[str, tuple[float, Change]] = field(default_factory=dict)
    applied: dict[str, str] = field(default_factory=dict)
    applied_step: int = 0
    arm: str = ""
    ghost_tracks: list[str] = field(default_factory=list)

    def settle(self, now: float) -> None:
        """Bring the controls up to what was done with them a moment ago."""
        for control in self.controls.values():
            control.settle(now)


class Rate:
    """Updates per second over about the last second."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def add(self, now: float, step: int) -> None:
        if self._seen and step < self._seen[-1][1]:
            self._seen = []
        self._seen = [*((t, s) for t, s in self._seen[-40:] if now - t < 1.0), (now, step)]

    def per_second(self) -> float | None:
        (first, start), (last, end) = self._seen[0], self._seen[-1]
        return (end - start) / (last - first) if last - first > 0.2 else None


def as_run(method: Learner[Any] | Run | type[Learner[Any]], threads: int, saved: bool) -> Run:
    """Return what was put on the table as a run; if `saved` it is saved as it goes, unless its autosave is off."""
    if isinstance(method, Run):
        if saved and method.folder is None and method.autosave:
            method.save(new_run_folder(method.learner.slug()))
        return method
    learner = method() if isinstance(method, type) else method
    return Run(learner, threads=threads, folder=new_run_folder(learner.slug()) if saved else None)


def class_name(run: Run) -> str:
    """Return the name of a run's method, as its class is called."""
    return type(run.learner).__name__


def run_labels(runs: list[Run]) -> list[str]:
    """Return the runs' names, numbered where they are alike."""
    labels: list[str] = []
    for run in runs:
        number = 2
        label = class_name(run)
        while label in labels:
            label, number = f"{class_name(run)} ({number})", number + 1
        labels.append(label)
    return labels


def slug_of(run: Run) -> str:
    """Return a run's method as part of a file name."""
    return re.sub(r"\W+", "_", run.learner.slug().rsplit(":")[-1])


def views_of(run: Run) -> dict[str, Any]:
    """Return a run's views, for their names; a view that fails shows when it is drawn."""
    try:
        return run.views()
    except Exception:
        return {}


def plain_row(bench: Bench, message: str) -> str:
    """Return step, strengths and message of a run as HTML."""
    applied = ", ".join(f"{name} {value}" for name, value in bench.applied.items())
    note = f"<br>{html.escape(message.splitlines()[-1])}" if message else ""
    return f"<b>{html.escape(bench.track.label)}</b> {bench.run.step:,} steps; applied {html.escape(applied)}{note}<br>"


def charts_of(runs: list[Run]) -> list[Chart]:
    """Return the charts that the learners of some runs declare; the board puts those of one title together."""
    return [Chart("", c.title, c.metrics, c.y_label, c.log) for run in runs for c in run.learner.curves]
