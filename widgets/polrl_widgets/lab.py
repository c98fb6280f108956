"""`Lab`: a method on the table. Sliders, transport, curves and views around one or more runs that train."""

from __future__ import annotations

import itertools
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from polrl.core.driver import Driver
from polrl.core.errors import PolrlError, unknown_name
from polrl.core.learner import Learner
from polrl.core.run import ANSWER_SECONDS, SETTLED_SECONDS, Run, learner_class
from polrl.core.store import new_run_folder
from polrl.core.tape import Tape

from .bench import Bench, Rate, as_run, charts_of, class_name, plain_row, run_labels, slug_of, views_of
from .board import Board, Track, TrackFrame
from .controls import KnobControl, StructurePanel, close_whole, folded, format_value, lean
from .lifecycle import opened
from .panels import ChoicePanel, TapePanel, arms_of, button
from .still import curves_csv, curves_png, page_png, still_picture

VIEW_SHARE = 1 / 100  # of the training thread's time, for drawing views
VIEW_SECONDS = 0.5  # between two redraws of the views at the least: on two cores the page draws at the training's cost
VIEW_PATIENCE = 1.0  # that they wait at the most while a knob moves
UNSEEN_SECONDS = 75.0  # training pauses when no page has been heard of for so long
GONE_SECONDS = 3.0  # and so long after the lab was taken off its page
PLAIN_SECONDS = 8.0  # until the lab draws plain pictures, where the page runs no custom widget
PLAIN_EVERY = 1.5  # between two of them
TAPE_SECONDS = 1.0  # between two looks at the tape
MAX_GHOSTS = 4  # abandoned branches of one run that stay in sight
SPEEDS = {"full speed": 0.0, "30 a second": 30.0, "10 a second": 10.0, "2 a second": 2.0}


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


class Lab:
    """Let a method train in the background while its knobs are moved.

    Parameters
    ----------
    *methods : Learner, Run or Learner class
        What to put on the table; several share the axes, each with its own sliders.
    steps : int
        Updates of the static form.
    mode : {"live", "plain", "static"}, optional
        "static" trains `steps` updates and leaves a picture; "plain" is live without custom widgets, with
        pictures instead of moving charts. Found out from the front end if not given.
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
        if mode not in (None, "live", "plain", "static"):
            raise PolrlError(f"mode must be 'live', 'plain' or 'static', got {mode!r}")
        self.mode = mode or front_end()
        self._displayed = 0.0  # when; time.monotonic
        # One core stays with the kernel and the browser.
        threads = max(1, (os.cpu_count() or 2) - 1)
        self.runs = [as_run(method, threads, saved=self.mode != "static") for method in methods]
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

        if self.mode != "static":
            self._displayed = self._displayed or time.monotonic()
        display(self._picture if self.mode == "static" else self.widget)

    # ---- the live form ---------------------------------------------------------------------------------------

    def _begin(self, play: bool) -> None:
        self.id = uuid.uuid4().hex[:8]
        opened(self)
        self._views_due = self._tape_due = self._plain_due = 0.0
        self._gone_since: float | None = None
        self._plain_state: tuple[Any, ...] = ()
        self._tape_panel: TapePanel | None = None
        self._arms = arms_of(run.learner for run in self.runs)
        self._rate = Rate()
        self._shown: tuple[Any, ...] = ()
        self._notice, self._level = "", "info"
        self._track_numbers = itertools.count(len(self.runs))
        tracks = [Track(f"t{i}", label, color=i) for i, label in enumerate(run_labels(self.runs))]
        self.board = Board([], tracks, timeline=True)
        self.board.add_charts(charts_of(self.runs))
        self.board.on_event(self._heard)
        self._benches = [self._bench(run, track) for run, track in zip(self.runs, tracks, strict=True)]
        self.driver = Driver(self.runs)
        self.driver.on_tick = self._tick
        for run in self.runs:
            run.post(run._evaluate)  # the curves begin at the beginning
        self._lay_out()
        if play:
            self.driver.play()

    def _lay_out(self) -> None:
        self._seats = lean(widgets.VBox)
        self._seat()
        beside = widgets.Layout(flex="0 0 300px", padding="0 12px 0 0")
        left = widgets.VBox([self._transport(), self._seats, self._tools()], layout=beside)
        left.add_class("polrl-controls").add_class(f"polrl-controls-{self.id}")
        self._plain_words = lean(widgets.HTML)
        self._plain_picture = widgets.Image(format="png")
        hidden = widgets.Layout(display="" if self.mode == "plain" else "none", min_width="0")
        self._plain = widgets.VBox([self._plain_words, self._plain_picture], layout=hidden).add_class("polrl-plain")
        self._right = right = self._plain if self.mode == "plain" else widgets.VBox([self.board, self._plain])
        right.layout.flex, right.layout.min_width = "1 1 0", "0"
        self.widget = widgets.HBox([left, right]).add_class("polrl-lab").add_class(f"polrl-lab-{self.id}")
        self._name_sliders()

    def _bench(self, run: Run, track: Track, arm: str = "") -> Bench:
        controls: dict[str, KnobControl] = {}
        bench = Bench(run, track, controls, lean(widgets.VBox), arm=arm)
        if arm:  # it has no controls, and shows what makes it that arm
            bench.applied = {name: format_value(value) for name, value in self._arms[arm][1].items()}
            return bench
        config = run.learner.config
        for knob in config.knobs.values():
            controls[knob.name] = KnobControl(knob, config, self._mover(bench))
        structure = StructurePanel(config, lambda values: self._start_again(bench, values))
        bench.panel.children = (self._heading(bench), *(c.widget for c in controls.values()), structure.widget)
        bench.panel.add_class("polrl-bench").add_class(f"polrl-bench-{track.id}")
        bench.applied = {name: format_value(getattr(config, name)) for name in controls}
        return bench

    def _heading(self, bench: Bench) -> widgets.HBox:
        heading = f'<b class="polrl-heading">{bench.track.label}</b>'
        words = lean(widgets.HTML, heading, layout={"flex": "1 1 auto"})
        config = bench.run.learner.config

        def small(name: str, text: str, tooltip: str, act: Callable[[], Any]) -> widgets.Button:
            return self._button(name, text, "", tooltip, act, {"flex": "0 0 auto", "height": "24px"})

        defaults = {name: knob.default for name, knob in config.knobs.items()}
        buttons = [small("defaults", "defaults", "all knobs at their defaults", lambda: self._turn(bench, defaults))]
        if paper := config.paper_values():
            listed = ", ".join(f"{name} = {format_value(value)}" for name, value in paper.items())
            turn = small(
                "paper-values", "paper values", f"as in the paper: {listed}", lambda: self.paper_values(bench.run)
            )
            buttons.append(turn)
        buttons.append(small("remove", "×", "take this run off the table", lambda: self.remove(bench.run)))
        return lean(widgets.HBox, [words, *buttons], layout={"align_items": "center"})

    def _mover(self, bench: Bench) -> Callable[[str, Any], None]:
        def moved(name: str, value: Any) -> None:
            bench.run.touched = time.monotonic()
            future = bench.run.post(lambda: bench.run._tune({name: value}))
            future.add_done_callback(lambda done: self._answered(done.exception()))
            self.driver.nudge()

        return moved

    def _answered(self, error: BaseException | None) -> None:
        """Tell why a value was refused, until one is taken."""
        words = "" if error is None else str(error)
        if words != self._notice:
            self._say(words, "warning" if words else "info")

    def _turn(self, bench: Bench, values: dict[str, Any]) -> None:
        """Turn several knobs at once, and let the sliders show it."""
        turned = bench.run.post(lambda: bench.run._tune(values))
        self.driver.nudge()
        turned.result()
        for name, value in values.items():
            bench.controls[name].show(value)

    def _button(
        self,
        name: str,
        words: str,
        icon: str,
        tooltip: str,
        act: Callable[[], Any],
        layout: Mapping[str, str] | None = None,
    ) -> widgets.Button:
        """Return a button whose failures are told on the board."""
        return button(name, words, icon, tooltip, lambda: self._carefully(act), layout)

    def _transport(self) -> widgets.VBox:
        made = self._button
        first = [
            made("run", "run", "play", "train until paused", self.play),
            made("pause", "pause", "pause", "stop after the present update", self.pause),
            made("step1", "step", "step-forward", "do one update", lambda: self.play(1)),
            made("step100", "100", "fast-forward", "do a hundred updates", lambda: self.play(100)),
        ]
        self._rewind_to = lean(widgets.IntText, value=0, layout={"width": "74px"})
        self._rewind_to.add_class("polrl-rewind-step")
        second = [
            made("fork", "fork", "code-branch", "split the first run in two", self.fork),
            made("reset", "reset", "fast-backward", "begin anew with the present knobs", self.reset),
        ]
        limit = "updates per second at the most"
        speed = lean(widgets.Dropdown, options=SPEEDS, tooltip=limit, layout={"flex": "1 1 0", "width": "auto"})
        speed.add_class("polrl-speed")
        speed.observe(lambda change: setattr(self.driver, "speed_limit", change["new"]), "value")
        back = made("rewind", "rewind to", "history", "go back to this step", lambda: self.rewind())
        third = [back, self._rewind_to]
        rows = [lean(widgets.HBox, row) for row in (first, [*second, speed], third)]
        return lean(widgets.VBox, rows).add_class("polrl-transport")

    def _tools(self) -> widgets.Accordion:
        acts: dict[str, Callable[..., Any]] = {"save": self.save_tape, "load": self.load_tape, "replay": self.replay}
        acts |= {"config": self.copy_config, "code": self.copy_tape}

        def tape() -> widgets.Widget:
            careful = {name: partial(self._carefully, act) for name, act in acts.items()}
            self._tape_panel = TapePanel(careful, f"{slug_of(self.run)}.tape.json")
            self._tape_panel.show(self.run._tape.changes)
            return self._tape_panel.widget

        def pictures() -> widgets.Widget:
            charts = {chart.id: chart.title for chart in self.board.charts}
            views = {name: view.title for run in self.runs for name, view in views_of(run).items()}
            self._pictures = ChoicePanel({**charts, **views}, True, lambda *_: self._choose_pictures(), "show")
            return self._pictures.widget

        def arms() -> widgets.Widget:
            names = {name: name for name in self._arms}
            return ChoicePanel(names, False, partial(self._carefully, self.arm), "arm").widget

        def save() -> widgets.Widget:
            csv = self._button("csv", "curves as CSV", "table", "all numbers of all runs", self._send_csv)
            png = self._button("png", "curves as PNG", "image", "the charts as a picture", self._send_png)
            return widgets.HBox([csv, png])

        makers = {"tape: what was changed when": tape, "pictures: which to show": pictures}
        if self._arms:
            makers["baselines: arms of the study"] = arms
        return folded({**makers, "save: curves as a file": save}).add_class("polrl-tools")

    def _name_sliders(self) -> None:
        names = {}
        for bench in self._benches:
            for name, control in bench.controls.items():
                names[f"polrl-knob-{name}"] = control.describe()
                names[f"polrl-value-{name}"] = f"{name}, type a value"
        names |= {"polrl-rewind-step": "step to rewind to", "polrl-speed": "speed limit"}
        names |= {"polrl-tape-file": "file of the tape", "polrl-tape-code": "code"}
        self.board.name_sliders(f"polrl-controls-{self.id}", names)

    def _carefully(self, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except PolrlError as error:
            self._say(str(error), "warning")
        except Exception as error:
            self._say(f"{type(error).__name__}: {error}", "error")
        return None

    def _say(self, words: str, level: str = "info") -> None:
        """Tell something until there is something else to tell."""
        self._notice, self._level = words, level
        self.board.say(words, level)

    # ---- transport -------------------------------------------------------------------------------------------

    def play(self, rounds: float = float("inf")) -> None:
        """Train for a number of rounds, or until paused."""
        self._say("")
        self._gone_since = None
        for run in self.runs:
            run.message = "" if run.held else run.message
        self.driver.play(rounds)

    def pause(self) -> None:
        """Stop after the present update."""
        self.driver.pause()

    def interrupt(self, words: str) -> None:
        """Pause and say why."""
        if self.driver.training:
            self.driver.pause()
            self._notice, self._level = words, "info"

    def rewind(self, step: int | None = None) -> None:
        """Take all runs back to a step; what came after stays as a ghost."""
        target = int(self._rewind_to.value) if step is None else step
        for bench in self._benches:
            bench.run.rewind(min(target, bench.run.step) if target >= 0 else target)
            for name, control in bench.controls.items():
                control.show(getattr(bench.run.learner.config, name))
        self._views_due = 0.0
        self.driver.nudge()

    def reset(self) -> None:
        """Begin all runs anew, with their present settings; the earlier runs stay as ghosts."""
        for bench in list(self._benches):
            self._start_again(bench, {})

    def fork(self, run: Run | None = None) -> Run:
        """Split a run (the first if none is named) in two, which go on side by side."""
        parent = self._bench_of(run or self.run)
        twin = parent.run.fork(new_run_folder(parent.run.tape.method))
        label = re.sub(r" \(fork at \d+\)$", "", parent.track.label)
        bench = self._put(twin, f"{label} (fork at {twin.step})", parent=parent)
        self.board.mark(bench.track.id, twin.step, "fork", "fork")
        return twin

    def remove(self, run: Run) -> None:
        """Take a run off the table; it is saved before."""
        bench = self._bench_of(run)
        if len([b for b in self._benches if not b.arm]) == 1 and not bench.arm:
            raise PolrlError("this is the only run on the table; close the lab, or reset it")
        self.driver.remove(run)
        run.close()
        self._benches.remove(bench)
        self.runs.remove(run)
        self.board.remove_track(bench.track.id)
        for ghost in bench.ghost_tracks:
            self.board.remove_track(ghost)
        self._seat()
        close_whole(bench.panel)

    def paper_values(self, run: Run | None = None) -> None:
        """Set the knobs of a run (the first if none is named) to the paper's values, where they are known."""
        bench = self._bench_of(run or self.run)
        self._turn(bench, bench.run.learner.config.paper_values())

    def arm(self, name: str, on: bool = True) -> Run | None:
        """Let an arm of the study train beside the runs, or take it off again.

        Its structure is that of the first run, but for what makes it that arm.
        """
        if name not in self._arms:
            raise unknown_name("arm", name, self._arms)
        present = next((b for b in self._benches if b.arm == name), None)
        if present is not None:
            if not on:
                self.remove(present.run)
            return present.run
        if not on:
            return None
        kind, own = self._arms[name]
        first = self.run.tape.config
        begun = {k: v for k, v in first.items() if k in kind.Config.structure() and type(self.run.learner) is kind}
        learner = kind(**{**begun, "seed": first["seed"], "device": first["device"], **own})
        run = Run(learner, threads=self.run.threads)
        self._put(run, name, arm=name)
        return run

    # ---- tape, code, files -----------------------------------------------------------------------------------

    def save_tape(self, file: str | Path) -> Path:
        """Write the first run's tape to a file."""
        path = self.run.tape.save(file)
        self._say(f"the tape is in {path}")
        return path

    def load_tape(self, file: str | Path) -> Tape:
        """Read a tape and list its changes."""
        tape = Tape.load(file)
        if self._tape_panel is not None:
            self._tape_panel.show(tape.changes)
        self._tape_due = time.monotonic() + 10.0  # for a while the list shows the file, not the run
        self._say(f"{file}: {tape.method}, {tape.steps} steps, {len(tape.changes)} changes; replay trains it again")
        return tape

    def replay(self, tape: Tape | str | Path) -> Run:
        """Train a tape's run again, beside the others and with its knobs turned as they were."""
        tape = tape if isinstance(tape, Tape) else Tape.load(tape)
        learner = learner_class(tape.method, type(self.run.learner) if ":" in tape.method else None)(**tape.config)
        run = Run(learner, threads=tape.threads, folder=new_run_folder(learner.slug()))
        run.follow(tape)
        self._put(run, f"{class_name(run)} (replay)")
        self.play()
        return run

    def copy_config(self) -> str:
        """Return the first run's present settings as a line of Python, also on the clipboard."""
        config = self.run.learner.config
        settings = ", ".join(f"{name}={value!r}" for name, value in config.changed().items())
        code = f"{class_name(self.run)}({settings})"
        self.board.copy_text(code)
        return code

    def copy_tape(self) -> str:
        """Return Python that repeats the first run change by change, also on the clipboard."""
        code = self.run.tape.as_code(class_name(self.run))
        self.board.copy_text(code)
        return code

    def _send_csv(self) -> None:
        self.board.download(f"{slug_of(self.run)}.csv", curves_csv(self._labelled()), "text/csv")

    def _send_png(self) -> None:
        self.board.download(f"{slug_of(self.run)}.png", curves_png(self._labelled()), "image/png")

    def _labelled(self) -> dict[str, Run]:
        return {bench.track.label: bench.run for bench in self._benches}

    def _choose_pictures(self) -> None:
        self.board.hide(set(self._pictures.boxes) - self._pictures.checked())
        self._views_due = 0.0
        self.driver.nudge()

    # ---- the table -------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop training, save, and take the lab off the page."""
        self.driver.close()
        for run in self.runs:
            run.close()
        arms = (bench.panel for bench in self._benches if bench.arm)
        for part in (self.widget, self.board, *arms):  # not every board is in the widget, and no arm's panel
            close_whole(part)

    def _bench_of(self, run: Run) -> Bench:
        for bench in self._benches:
            if bench.run is run:
                return bench
        raise PolrlError(f"{run!r} is not on this table")

    def _seat(self) -> None:
        self._seats.children = tuple(bench.panel for bench in self._benches if not bench.arm)

    def _new_track_id(self) -> str:
        return f"t{next(self._track_numbers)}"

    def _put(self, run: Run, label: str, *, parent: Bench | None = None, arm: str = "") -> Bench:
        """Put one more run on the table, beside the others on the same axes."""
        taken = {bench.track.color for bench in self._benches}
        color = next(number for number in itertools.count() if number not in taken)
        track = Track(self._new_track_id(), label, color=color, dash="dot" if arm else "solid")
        bench = self._bench(run, track, arm)
        if parent is not None:
            bench.rows, bench.marks, bench.changes = list(parent.rows), parent.marks, len(run._tape.changes)
            bench.applied_step = run.step
        else:
            run._evaluate()
        self.board.add_charts(charts_of([run]))
        self.board.add_track(track, parent=parent.track.id if parent else None)
        self.runs.append(run)
        self._benches = [*self._benches, bench]
        self._seat()
        self._name_sliders()
        self.driver.add(run)
        self._views_due = 0.0
        self.driver.nudge()
        return bench

    def _start_again(self, bench: Bench, structure: dict[str, Any]) -> None:
        """Put a new learner in the place of a bench's run."""
        old = bench.run
        config = old.learner.config
        knobs = {name: getattr(config, name) for name in config.knobs}
        kept = {name: getattr(config, name) for name in config.structure()}
        try:
            learner = type(old.learner)(**{**kept, **structure, **knobs})
        except Exception as error:
            self._say(str(error), "warning")
            return
        training = self.driver.training
        self.driver.pause()
        self.driver.remove(old)
        old.close()
        self.board.ghost(bench.track.id)
        folder = None if bench.arm else new_run_folder(learner.slug())
        fresh = Run(learner, folder=folder, threads=old.threads)
        track = Track(self._new_track_id(), bench.track.label, color=bench.track.color)
        self.board.add_track(track)
        renewed = self._bench(fresh, track, bench.arm)
        renewed.ghost_tracks = [*bench.ghost_tracks, bench.track.id]
        self._forget_old_ghosts(renewed)
        fresh._evaluate()
        place = self._benches.index(bench)
        self._benches[place] = renewed
        self.runs[place] = fresh
        self._seat()
        close_whole(bench.panel)
        self.driver.add(fresh)
        self._views_due = 0.0
        if training:
            self.driver.play()
        self.driver.nudge()

    # ---- drawing, in the training thread ---------------------------------------------------------------------

    def _tick(self) -> None:
        now = time.monotonic()
        if self._unseen(now):
            self.interrupt("paused: no page shows this lab any more; run goes on")
        training = self.driver.training
        self._draw_plainly(now)
        message = self.driver.error or self._notice or next((r.message for r in self.runs if r.message), "")
        shown = (
            training,
            message,
            *((b.run.step, b.run._tape.changes, len(b.run.ghosts)) for b in self._benches),
        )
        # What a person has just turned is shown first, the pictures with the next frame.
        turned = any(len(b.run._tape.changes) != b.changes for b in self._benches)
        answering = now - max(b.run.touched for b in self._benches) < ANSWER_SECONDS
        patience = VIEW_PATIENCE if answering and training else 0.0
        with_views = now >= self._views_due + patience and self.board.ready and not turned
        for bench in self._benches:
            bench.settle(now)
        if shown == self._shown and not (with_views and self._views_due == 0.0):
            return
        self._shown = shown
        self._rate.add(now, self._benches[0].run.step)
        frames = {b.track.id: self._frame(b, training, with_views) for b in self._benches}
        if not (with_views or training):
            self._views_due = 0.0  # while paused no step follows that would bring the pictures
        if with_views:
            cost = time.monotonic() - now
            self._views_due = now + max(VIEW_SECONDS, cost / VIEW_SHARE)
        if self._tape_panel is not None and now >= self._tape_due:
            self._tape_due = now + TAPE_SECONDS
            self._tape_panel.show(self.run._tape.changes)
        self.board.frame(frames, message=message, level="error" if self.driver.error else self._level)

    def _unseen(self, now: float) -> bool:
        """Whether nobody can see the lab: its page was closed, or it was taken off the page."""
        gone = self._gone_since is not None and now - self._gone_since > GONE_SECONDS
        silent = self.board.last_seen is not None and now - self.board.last_seen > UNSEEN_SECONDS
        return gone or silent

    def _draw_plainly(self, now: float) -> None:
        """Draw pictures where no custom widget arrives: on Colab without its widget manager, say."""
        if self.mode == "live":
            if not self._displayed or self.board.last_seen is not None or now - self._displayed < PLAIN_SECONDS:
                return
            self.mode, self._plain.layout.display = "plain", ""
        if self.mode != "plain" or now < self._plain_due:
            return
        state = (self._notice, self.driver.error, *((b.run.step, b.applied) for b in self._benches))
        if state == self._plain_state:
            return
        self._plain_state = state
        self._plain_picture.value = page_png(self._labelled())
        self._plain_words.value = "".join(
            plain_row(bench, self.driver.error or self._notice) for bench in self._benches
        )
        self._plain_due = time.monotonic() + max(PLAIN_EVERY, 10 * (time.monotonic() - now))

    def _frame(self, bench: Bench, training: bool, with_views: bool) -> TrackFrame:
        run = bench.run
        self._catch_up(bench)
        if run.step != bench.applied_step and not bench.arm:
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

    def _catch_up(self, bench: Bench) -> None:
        """Bring marks and abandoned branches to the board."""
        run, track = bench.run, bench.track
        if len(run.ghosts) > bench.ghosts:
            self._show_ghosts(bench)
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

    def _show_ghosts(self, bench: Bench) -> None:
        """Leave the branches that were abandoned by rewinding in sight, thin and grey."""
        for ghost in bench.run.ghosts[bench.ghosts :]:
            tables = (ghost.history, ghost.evaluations)
            points = {m: (table.steps, table.column(m)) for table in tables if len(table) for m in table.metrics}
            if not points:
                continue
            track = Track(self._new_track_id(), f"{bench.track.label} (left at {ghost.start})", color=0)
            self.board.add_track(track)
            self.board.frame({track.id: TrackFrame(step=ghost.start, points=points)})
            self.board.ghost(track.id)
            bench.ghost_tracks.append(track.id)
        self._forget_old_ghosts(bench)

    def _forget_old_ghosts(self, bench: Bench) -> None:
        while len(bench.ghost_tracks) > MAX_GHOSTS:
            self.board.remove_track(bench.ghost_tracks.pop(0))

    def _heard(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if kind == "gone":
            self._gone_since = time.monotonic()
            return
        if kind in ("hello", "back"):
            self._gone_since = None
        if kind == "hello":
            self._views_due = 0.0
            self.driver.nudge()
        elif kind == "reopened":
            self._right.send_state("children")
        elif kind == "rewind":
            self._carefully(self.rewind, int(event["step"]))
