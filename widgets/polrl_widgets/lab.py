"""`Lab`: a method on the table. Sliders, transport, curves and views around one or more runs that train."""

from __future__ import annotations

import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ipywidgets as widgets

from polrl.core.driver import Driver
from polrl.core.errors import PolrlError
from polrl.core.learner import Learner
from polrl.core.run import Run
from polrl.core.store import new_run_folder
from polrl.core.tape import Change

from .board import Board, Chart, Track, TrackFrame
from .controls import KnobControl, StructurePanel, format_value
from .still import still_picture

VIEW_SHARE = 1 / 60  # of the training thread's time, for drawing views
VIEW_SECONDS = 0.25  # between two redraws of the views at the least
UNSEEN_SECONDS = 30.0  # training pauses when no page has painted for so long
SETTLED_SECONDS = 0.4  # a knob that has not moved for so long gets its mark
SPEEDS = {"full speed": 0.0, "30 a second": 30.0, "10 a second": 10.0, "2 a second": 2.0}

_OPEN: dict[str, weakref.ref[Lab]] = {}


def front_end() -> str:
    """Say what shows the output: "live" where widgets can answer, "static" otherwise.

    papermill, nbval, nbconvert and nbgrader run cells without a person: they forbid input, which no notebook
    front end does. POLRL_MODE says so outright.
    """
    if os.environ.get("POLRL_MODE"):
        return "static"
    try:
        from IPython import get_ipython
    except ImportError:
        return "static"
    shell = get_ipython()
    kernel = getattr(shell, "kernel", None)
    return "live" if kernel is not None and getattr(kernel, "_allow_stdin", False) else "static"


@dataclass
class _Bench:
    """One run on the table: its track on the board, its controls, and how much of it was drawn."""

    run: Run
    track: Track
    controls: dict[str, KnobControl]
    panel: widgets.VBox
    rows: list[int] = field(default_factory=lambda: [0, 0])
    ghosts: int = 0
    marks: int = 0
    changes: int = 0
    turned: int = 0
    moving: dict[str, tuple[float, Change]] = field(default_factory=dict)
    applied: dict[str, str] = field(default_factory=dict)
    applied_step: int = 0


class Lab:
    """Let a method train in the background while its knobs are moved.

    Parameters
    ----------
    *methods : Learner, Run or Learner class
        What to put on the table; several share the axes, each with its own sliders.
    steps : int
        Updates of the static form.
    mode : {"live", "static"}, optional
        "static" trains `steps` updates and leaves a picture; found out from the front end if not given.
    play : bool
        Begin training at once, in the live form.

    Attributes
    ----------
    runs : list of Run
        In the order of the methods; `lab.run` is the first.

    Examples
    --------
    >>> from polrl.foundations.noise_mask import NoiseMask
    >>> Lab(NoiseMask())
    """

    def __init__(
        self,
        *methods: Learner[Any] | Run | type[Learner[Any]],
        steps: int = 300,
        mode: str | None = None,
        play: bool = False,
    ) -> None:
        if not methods:
            raise PolrlError("a lab needs a method, such as Lab(NoiseMask())")
        if mode not in (None, "live", "static"):
            raise PolrlError(f"mode must be 'live' or 'static', got {mode!r}")
        self.mode = mode or front_end()
        # One core stays with the kernel and the browser.
        threads = max(1, (os.cpu_count() or 2) - 1)
        self.runs = [_as_run(method, threads, saved=self.mode == "live") for method in methods]
        if self.mode == "static":
            self._picture = still_picture(self.runs, steps)
        else:
            self._begin(play)

    def __repr__(self) -> str:
        return f"<Lab with {', '.join(map(repr, self.runs))}>"

    @property
    def run(self) -> Run:
        """The first run."""
        return self.runs[0]

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self._picture if self.mode == "static" else self.widget)

    # ---- the live form ---------------------------------------------------------------------------------------

    def _begin(self, play: bool) -> None:
        self.id = uuid.uuid4().hex[:8]
        self._take_the_cell()
        self._views_due = 0.0
        self._rate = _Rate()
        self._shown: tuple[Any, ...] = ()
        self._notice = ""
        self._lock = threading.RLock()
        tracks = [Track(f"t{i}", _label(run), color=i) for i, run in enumerate(self.runs)]
        self.board = Board(_charts(self.runs), tracks)
        self.board.on_event(self._heard)
        self._benches = [self._bench(run, track) for run, track in zip(self.runs, tracks, strict=True)]
        self._tracks_made = len(tracks)
        self.driver = Driver(self.runs)
        self.driver.on_tick = self._tick
        for run in self.runs:
            run.post(run._evaluate)  # the curves begin at the beginning
        self._seats = widgets.VBox([bench.panel for bench in self._benches])
        beside = widgets.Layout(flex="0 0 300px", padding="0 12px 0 0")
        left = widgets.VBox([self._transport(), self._seats], layout=beside).add_class("polrl-controls")
        self.widget = widgets.HBox([left, self.board]).add_class("polrl-lab").add_class(f"polrl-lab-{self.id}")
        self.board.name_sliders(f"polrl-lab-{self.id}", self._accessible_names())
        if play:
            self.driver.play()

    def _take_the_cell(self) -> None:
        """Close the lab that an earlier run of this cell left."""
        from IPython import get_ipython

        shell = get_ipython()
        parent = shell.get_parent() if shell is not None and hasattr(shell, "get_parent") else {}
        cell = parent.get("metadata", {}).get("cellId")
        if cell is None:
            return
        former = _OPEN.pop(cell, lambda: None)()
        if former is not None:
            former.close()
        _OPEN[cell] = weakref.ref(self)

    def _bench(self, run: Run, track: Track) -> _Bench:
        controls: dict[str, KnobControl] = {}
        bench = _Bench(run, track, controls, widgets.VBox())
        for knob in run.learner.config.knobs.values():
            controls[knob.name] = KnobControl(knob, run.learner.config, self._mover(bench))
        structure = StructurePanel(run.learner.config, lambda values: self._start_again(bench, values))
        heading = widgets.HTML(f'<b class="polrl-heading">{track.label}</b>')
        bench.panel.children = (heading, *(c.widget for c in controls.values()), structure.widget)
        bench.panel.add_class("polrl-bench").add_class(f"polrl-bench-{track.id}")
        bench.applied = {name: format_value(getattr(run.learner.config, name)) for name in controls}
        return bench

    def _mover(self, bench: _Bench) -> Callable[[str, Any], None]:
        def moved(name: str, value: Any) -> None:
            bench.run.evaluate_after = time.monotonic() + SETTLED_SECONDS
            future = bench.run.post(lambda: bench.run._tune({name: value}))
            future.add_done_callback(lambda done: self._refused(done.exception()))
            self.driver.nudge()

        return moved

    def _refused(self, error: BaseException | None) -> None:
        if error is not None:
            self.board.say(str(error), "warning")

    def _transport(self) -> widgets.VBox:
        def button(name: str, words: str, icon: str, tooltip: str, act: Callable[[], Any]) -> widgets.Button:
            layout = widgets.Layout(flex="1 1 0", width="auto", min_width="0", padding="0 4px")
            made = widgets.Button(description=words, icon=icon, tooltip=tooltip, layout=layout)
            made.add_class(f"polrl-{name}")
            made.on_click(lambda _: self._carefully(act))
            return made

        first = [
            button("run", "run", "play", "train until paused", self.play),
            button("pause", "pause", "pause", "stop after the present update", self.pause),
            button("step1", "step", "step-forward", "do one update", lambda: self.play(1)),
            button("step100", "100", "fast-forward", "do a hundred updates", lambda: self.play(100)),
        ]
        self._rewind_to = widgets.IntText(value=0, layout=widgets.Layout(width="74px"))
        self._rewind_to.add_class("polrl-rewind-step")
        second = [
            button("reset", "reset", "fast-backward", "begin anew with the present knobs", self.reset),
            button("fork", "fork", "code-branch", "split the first run in two", self.fork),
            button("rewind", "rewind", "history", "go back to an earlier step", lambda: self.rewind()),
            self._rewind_to,
        ]
        speed = widgets.Dropdown(
            options=SPEEDS, tooltip="updates per second at the most", layout=widgets.Layout(width="auto")
        ).add_class("polrl-speed")
        speed.observe(lambda change: setattr(self.driver, "speed_limit", change["new"]), "value")
        rows = [widgets.HBox(first), widgets.HBox(second), speed]
        return widgets.VBox(rows).add_class("polrl-transport")

    def _accessible_names(self) -> dict[str, str]:
        names = {}
        for bench in self._benches:
            for name, control in bench.controls.items():
                names[f"polrl-knob-{name}"] = control.describe()
                names[f"polrl-value-{name}"] = f"{name}, type a value"
        return names | {"polrl-rewind-step": "step to rewind to", "polrl-speed": "speed limit"}

    def _carefully(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            self.board.say(f"{type(error).__name__}: {error}", "error")

    # ---- transport -------------------------------------------------------------------------------------------

    def play(self, rounds: float = float("inf")) -> None:
        """Train for a number of rounds, or until paused."""
        self._notice = ""
        self.board.say("")
        self.driver.play(rounds)

    def pause(self) -> None:
        """Stop after the present update."""
        self.driver.pause()

    def rewind(self, step: int | None = None) -> None:
        """Take all runs back to a step; what came after stays as a ghost."""
        target = int(self._rewind_to.value) if step is None else step
        for bench in self._benches:
            bench.run.rewind(min(target, bench.run.step) if target >= 0 else target)
            for name, control in bench.controls.items():
                control.show(getattr(bench.run.learner.config, name))
        self.driver.nudge()

    def reset(self) -> None:
        """Begin all runs anew, with their present settings; the earlier runs stay as ghosts."""
        for bench in list(self._benches):
            self._start_again(bench, {})

    def fork(self) -> Run:
        """Split the first run in two, which go on side by side."""
        parent = self._benches[0]
        twin = parent.run.fork(new_run_folder(parent.run.tape.method))
        track = Track(self._new_track_id(), f"{parent.track.label} (fork at {twin.step})", color=len(self._benches))
        bench = self._bench(twin, track)
        bench.rows, bench.marks, bench.changes = list(parent.rows), parent.marks, len(twin._tape.changes)
        bench.applied_step = twin.step
        self.board.add_track(track, parent=parent.track.id)
        self.board.mark(track.id, twin.step, "fork", "fork")
        self.runs.append(twin)
        self._benches.append(bench)
        self._seats.children = (*self._seats.children, bench.panel)
        self.board.name_sliders(f"polrl-lab-{self.id}", self._accessible_names())
        self.driver.add(twin)
        return twin

    def close(self) -> None:
        """Stop training, save, and take the lab off the page."""
        self.driver.close()
        for run in self.runs:
            run.close()
        self.widget.close()
        self.board.close()

    def _new_track_id(self) -> str:
        self._tracks_made += 1
        return f"t{self._tracks_made}"

    def _start_again(self, bench: _Bench, structure: dict[str, Any]) -> None:
        """Put a new learner in the place of a bench's run."""
        old = bench.run
        config = old.learner.config
        knobs = {name: getattr(config, name) for name in config.knobs}
        kept = {name: getattr(config, name) for name in config.structure()}
        try:
            learner = type(old.learner)(**{**kept, **structure, **knobs})
        except Exception as error:
            self.board.say(str(error), "warning")
            return
        training = self.driver.training
        self.driver.pause()
        self.driver.remove(old)
        old.close()
        self.board.ghost(bench.track.id)
        fresh = Run(learner, folder=new_run_folder(learner.slug()), threads=old.threads)
        track = Track(self._new_track_id(), bench.track.label, color=bench.track.color)
        self.board.add_track(track)
        renewed = self._bench(fresh, track)
        place = self._benches.index(bench)
        self._benches[place] = renewed
        self.runs[place] = fresh
        self._seats.children = tuple(b.panel for b in self._benches)
        self.driver.add(fresh)
        self._views_due = 0.0
        if training:
            self.driver.play()
        self.driver.nudge()

    # ---- drawing, in the training thread ---------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        training = self.driver.training
        if training and self.board.last_seen is not None and now - self.board.last_seen > UNSEEN_SECONDS:
            self.driver.pause()
            self._notice = f"paused: no page has shown this lab for {UNSEEN_SECONDS:.0f} s"
        message = self.driver.error or self._notice or next((r.message for r in self.runs if r.message), "")
        shown = (
            training,
            message,
            *((b.run.step, b.run._tape.changes, len(b.run.ghosts)) for b in self._benches),
        )
        # What a person has just turned is shown first, the pictures with the next frame.
        turned = any(len(b.run._tape.changes) != b.turned for b in self._benches)
        with_views = now >= self._views_due and self.board.ready and not turned
        for bench in self._benches:
            bench.turned = len(bench.run._tape.changes)
        if shown == self._shown and not (with_views and self._views_due == 0.0):
            return
        self._shown = shown
        self._rate.add(now, self._benches[0].run.step)
        frames = {b.track.id: self._frame(b, training, with_views) for b in self._benches}
        if turned and not training:
            self._views_due = 0.0  # while paused no step follows that would bring the pictures
        if with_views:
            cost = time.monotonic() - now
            self._views_due = now + max(VIEW_SECONDS, cost / VIEW_SHARE)
        self.board.frame(frames, message=message, level="error" if self.driver.error else "info")

    def _frame(self, bench: _Bench, training: bool, with_views: bool) -> TrackFrame:
        run = bench.run
        self._catch_up(bench)
        if run.step != bench.applied_step:
            config = run.learner.config
            bench.applied = {name: format_value(getattr(config, name)) for name in config.knobs}
            bench.applied_step = run.step
        points: dict[str, tuple[Any, Any]] = {}
        for i, table in enumerate(run.rows):
            start, bench.rows[i] = bench.rows[i], len(table)
            if len(table) > start:
                steps = table.steps_since(start)
                points.update({metric: (steps, table.column(metric, start)) for metric in table.metrics})
        return TrackFrame(
            step=run.step,
            ups=self._rate.per_second() if training else None,
            state="running" if training else "paused",
            phase=run.learner.phase,
            device=str(run.learner.device),
            applied=bench.applied,
            points=points,
            views=run._views() if with_views else {},
        )

    def _catch_up(self, bench: _Bench) -> None:
        """Bring marks and abandoned branches to the board."""
        run, track = bench.run, bench.track
        if len(run.ghosts) > bench.ghosts:
            bench.ghosts = len(run.ghosts)
            self.board.truncate(track.id, run.step)
            self.board.mark(track.id, run.step, "back", "rewind")
            bench.rows = [min(n, len(table)) for n, table in zip(bench.rows, run.rows, strict=True)]
            bench.marks = min(bench.marks, len(run.phase_marks))
            bench.changes = min(bench.changes, len(run._tape.changes))
            for name, control in bench.controls.items():
                control.show(getattr(run.learner.config, name))
        for step, phase in run.phase_marks[bench.marks :]:
            self.board.mark(track.id, step, phase, "phase")
        bench.marks = len(run.phase_marks)
        now = time.monotonic()
        for change in run._tape.changes[bench.changes :]:
            bench.moving[change.knob] = (now, change)
        bench.changes = len(run._tape.changes)
        for knob, (since, change) in list(bench.moving.items()):
            if now - since > SETTLED_SECONDS:  # one mark a drag, not one a pixel
                self.board.mark(track.id, change.step, f"{knob} = {format_value(change.value)}", "knob")
                del bench.moving[knob]

    def _heard(self, event: dict[str, Any]) -> None:
        if event.get("type") == "hello":
            self._views_due = 0.0
            self.driver.nudge()


class _Rate:
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


def _as_run(method: Learner[Any] | Run | type[Learner[Any]], threads: int, saved: bool) -> Run:
    if isinstance(method, Run):
        return method
    learner = method() if isinstance(method, type) else method
    return Run(learner, threads=threads, folder=new_run_folder(learner.slug()) if saved else None)


def _label(run: Run) -> str:
    return type(run.learner).__name__


def _charts(runs: list[Run]) -> list[Chart]:
    charts: dict[str, Chart] = {}
    for run in runs:
        for curve in run.learner.curves:
            known = charts.get(curve.title)
            metrics = tuple(dict.fromkeys((*(known.metrics if known else ()), *curve.metrics)))
            charts[curve.title] = Chart(f"c{len(charts)}", curve.title, metrics, curve.y_label, curve.log)
    return [Chart(f"c{i}", c.title, c.metrics, c.y_label, c.log) for i, c in enumerate(charts.values())]
