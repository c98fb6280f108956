"""The lab without a browser: controls made from knobs, the static form, what the notebooks share."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from typing import Literal

import ipywidgets
import pytest
import torch
from ipywidgets.widgets.widget import _instances as WIDGETS

import polrl
from polrl import Bars, Curve, Driver, Learner, Run, knob
from polrl.core.errors import PolrlError
from polrl.core.run import ANSWER_SECONDS
from polrl_widgets import Gallery, Lab, Predict, start
from polrl_widgets.controls import KnobControl, StructurePanel
from polrl_widgets.lab import front_end


class Config(polrl.Config):
    cells: int = 4
    strength: float = knob(0.5, low=0.0, high=2.0, first=True, at_low="nothing", at_high="all")
    rate: float = knob(0.1, low=1e-3, high=1.0, scale="log", paper=0.01)
    weight: float = knob(0.0, low=0.0, high=1.0, scale="log_zero", smallest=1e-3)
    momentum: float = knob(0.9, low=0.5, high=0.999, scale="log_one_minus")
    tilt: float = knob(0.0, low=-2.0, high=2.0, scale="signed_log", smallest=0.01)
    width: int = knob(3, low=1, high=9, odd=True)
    centred: bool = knob(True)
    form: Literal["a", "b"] = knob("a")


class Tiny(Learner[Config]):
    curves = (Curve("value", "Value"), Curve("score", "Score"))
    evaluate_every = 5

    def setup(self):
        self.x = torch.ones(self.config.cells)

    def update(self):
        config = self.config
        _ = config.weight, config.momentum, config.tilt, config.width, config.centred, config.form
        self.x = self.x * (1 - config.rate * config.strength)
        return {"value": self.x.mean()}

    def evaluate(self):
        return {"score": self.x.sum()}

    def views(self):
        return {"x": Bars(title="x", alt="The numbers", labels=list("abcd"), values={"x": self.x.numpy()})}


def wait_until(condition, seconds=20.0):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)


def controls():
    moved = []
    config = Config()
    made = {
        k.name: KnobControl(k, config, lambda name, value: moved.append((name, value))) for k in config.knobs.values()
    }
    return made, moved


def test_each_kind_of_knob_has_its_control():
    made, _ = controls()
    inputs = {name: control._input for name, control in made.items()}
    assert isinstance(inputs["strength"], ipywidgets.FloatSlider) and isinstance(inputs["rate"], ipywidgets.FloatSlider)
    assert isinstance(inputs["width"], ipywidgets.IntSlider)
    assert isinstance(inputs["centred"], ipywidgets.Checkbox) and isinstance(inputs["form"], ipywidgets.Dropdown)


def test_the_typed_value_follows_the_slider_after_the_answer_and_moves_nothing_itself():
    made, moved = controls()
    control = made["rate"]
    before = control._box.value
    control._input.value = 0.5
    assert control._box.value == before and moved == [("rate", pytest.approx(10**-1.5))]
    control.settle(time.monotonic())
    assert control._box.value == before  # the answer has its time first
    control.settle(time.monotonic() + ANSWER_SECONDS)
    assert control._box.value == pytest.approx(10**-1.5) and len(moved) == 1
    control._box.value = 0.01  # typed by a person
    assert moved[-1] == ("rate", 0.01)
    control.settle(time.monotonic() + 10)
    assert control._box.value == 0.01 and len(moved) == 2


def test_showing_a_value_in_one_thread_hides_no_move_of_another():
    made, moved = controls()
    control = made["strength"]
    inside, done = threading.Event(), threading.Event()

    def meanwhile(_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert done.wait(10)

    control._box.observe(meanwhile, "value")
    thread = threading.Thread(target=control.show, args=(0.25,))
    thread.start()
    assert inside.wait(10)
    control._input.value = 1.5  # by hand, while the other thread shows a value
    done.set()
    thread.join()
    assert moved == [("strength", 1.5)]


def test_a_slider_move_reports_the_value_of_its_place():
    made, moved = controls()
    for name, place, expected in (
        ("strength", 1.5, 1.5),
        ("rate", 0.5, 10**-1.5),
        ("weight", 0.0, None),
        ("weight", 1.0, 1.0),
        ("tilt", 0.75, Config.knobs["tilt"].from_position(0.75)),
        ("momentum", 1.0, 0.999),
        ("width", 7, 7),
        ("centred", False, False),
        ("form", "b", "b"),
    ):
        moved.clear()
        made[name]._input.value = place
        if expected is None:
            assert moved == []  # it stood there already
        else:
            assert moved[-1] == (name, pytest.approx(expected) if isinstance(expected, float) else expected)


def test_the_page_rounding_a_slider_turns_no_knob():
    made, moved = controls()
    for name in ("rate", "momentum", "strength"):
        slider = made[name]._input
        slider.value = round(slider.value / slider.step) * slider.step
    assert moved == []


def test_a_typed_value_moves_the_slider_and_a_refused_one_comes_back():
    made, moved = controls()
    made["rate"]._box.value = 0.01
    assert moved[-1] == ("rate", 0.01)
    assert made["rate"]._input.value == pytest.approx(Config.knobs["rate"].to_position(0.01), abs=0.01)
    made["rate"]._box.value = 7.0
    assert moved[-1] == ("rate", 7.0)  # the run says why it can't be
    assert made["rate"]._box.value == 0.01


def test_every_control_says_what_its_ends_do_and_carries_its_class():
    made, _ = controls()
    assert "low: nothing" in made["strength"].describe() and "high: all" in made["strength"].describe()
    assert "from 0 to 2" in made["strength"].describe()
    assert "polrl-knob-strength" in made["strength"]._input._dom_classes
    labels = [child.value for child in made["rate"].widget.children if hasattr(child, "value")]
    assert "paper: 0.01" in labels[0]


def test_showing_a_value_is_not_a_move():
    made, moved = controls()
    for name, value in (("strength", 2.0), ("rate", 0.5), ("form", "b"), ("centred", False), ("width", 9)):
        made[name].show(value)
    assert moved == []


def test_structure_panel_reads_numbers_and_words():
    asked = []
    panel = StructurePanel(Config(), asked.append)
    panel.widget.selected_index = 0
    panel._fields["cells"].value = "6"
    panel._start()
    assert asked == [{"seed": 0, "device": "auto", "cells": 6}]


def test_outside_of_a_notebook_the_lab_is_static(monkeypatch):
    monkeypatch.delenv("POLRL_MODE", raising=False)
    assert front_end() == "static"
    lab = Lab(Tiny(), steps=20)
    assert lab.mode == "static" and lab.run.step == 20
    pictures = lab._picture.pictures
    assert len(pictures) == 2 and all(png.startswith(b"\x89PNG") and alt for png, alt in pictures)


def test_smoke_mode_keeps_the_static_form_short(monkeypatch):
    monkeypatch.setenv("POLRL_MODE", "smoke")
    assert Lab(Tiny(), steps=5000).run.step < 50


def test_static_form_holds_several_methods_on_the_same_axes(monkeypatch):
    monkeypatch.setenv("POLRL_MODE", "fast")
    lab = Lab(Tiny(), Tiny(strength=1.0), steps=10)
    assert [run.step for run in lab.runs] == [10, 10]
    assert "Tiny, Tiny (2)" in lab._picture.pictures[0][1]


def test_a_run_can_be_put_on_the_table(monkeypatch):
    monkeypatch.setenv("POLRL_MODE", "fast")
    run = Run(Tiny(), threads=1)
    run.advance(7)
    assert Lab(run, steps=3).run is run and run.step == 10


def test_a_lab_without_a_method_and_an_unknown_mode_are_refused():
    with pytest.raises(PolrlError, match="needs a method"):
        Lab()
    with pytest.raises(PolrlError, match="'live', 'plain' or 'static', got 'moving'"):
        Lab(Tiny(), mode="moving")


def test_mode_of_a_notebook_comes_from_the_environment_first(monkeypatch):
    monkeypatch.setenv("POLRL_MODE", "smoke")
    assert start("full") == "smoke"
    monkeypatch.delenv("POLRL_MODE")
    assert start("full") == "full"
    with pytest.raises(PolrlError, match="smoke, fast, full, got 'quick'"):
        start("quick")


def test_prediction_hides_its_answer_in_the_static_form():
    question = Predict("Up or <down>?", ["up", "down"], answer=1, why="It falls.")
    words = question._folded()
    assert "<details>" in words and "down. It falls." in words and "&lt;down&gt;" in words
    assert words.index("<details>") < words.index("It falls.")


def test_prediction_answers_once_chosen():
    box = Predict("Which?", ["a", "b"], answer=1, why="Because.")._live()
    _, choice, told = box.children
    assert told.value == ""
    choice.value = "a"
    assert "Not quite" in told.value and "Because." in told.value
    choice.value = "b"
    assert "Yes" in told.value


def test_prediction_with_an_answer_that_is_no_option_is_refused():
    with pytest.raises(PolrlError, match="from 0 to 1, got 2"):
        Predict("Which?", ["a", "b"], answer=2, why="")


def test_gallery_shows_every_method_with_its_state():
    words = Gallery()._repr_html_()
    assert words.count("<tr") >= 61 + 11
    assert "01_foundations/01_noise_mask.ipynb" in words and "planned" in words
    json.dumps(repr(Gallery()))


def test_a_run_that_a_driver_advances_is_saved_as_it_goes(tmp_path):
    run = Run(Tiny(), threads=1, folder=tmp_path / "run", autosave=0.05)
    driver = Driver([run])
    written = (tmp_path / "run" / "state.safetensors").stat().st_mtime_ns
    driver.play()
    try:
        wait_until(lambda: (tmp_path / "run" / "state.safetensors").stat().st_mtime_ns != written)
    finally:
        driver.close()
        run.close()


# ---- the live form, without a page ---------------------------------------------------------------------------------------


class Arms(Tiny):
    """A method with a study, whose arms share a setting."""


study = polrl.Study(
    claim="More strength, smaller numbers.",
    learner=Arms,
    arms={"none": {"strength": 0.0, "cells": 6}, "some": {"cells": 6}, "plain": {"learner": Tiny, "cells": 6}},
    criteria=(),
    fast=polrl.Budget(seeds=1, steps=1),
    full=polrl.Budget(seeds=1, steps=1),
    smoke=polrl.Budget(seeds=1, steps=1),
)


@pytest.fixture
def live(tmp_path, monkeypatch):
    """A function that opens a live lab in a folder of its own and closes it."""
    from polrl_widgets import bench, lab

    for module in (bench, lab):
        monkeypatch.setattr(module, "new_run_folder", lambda slug: tmp_path / f"run{len(list(tmp_path.iterdir()))}")
    labs = []

    def opener(*methods, **options):
        labs.append(Lab(*methods, mode="live", **options))
        return labs[-1]

    yield opener
    for opened in labs:
        opened.close()


def test_arms_hold_only_what_makes_them_differ():
    from polrl_widgets.panels import arms_of

    assert arms_of([Arms(), Arms()]) == {"none": (Arms, {"strength": 0.0}), "some": (Arms, {}), "plain": (Tiny, {})}


def test_an_arm_takes_the_first_runs_structure_and_leaves_again(live):
    lab = live(Arms(cells=3, seed=5))
    run = lab.arm("none")
    assert run.learner.config.cells == 3 and run.learner.config.seed == 5 and run.learner.config.strength == 0.0
    assert lab.arm("none") is run, "an arm stands on the table once"
    lab.arm("none", on=False)
    assert lab.runs == [lab.run]
    with pytest.raises(PolrlError, match="unknown arm 'nonne'; did you mean none"):
        lab.arm("nonne")


def test_a_run_that_is_brought_along_is_saved_from_then_on(live):
    run, unsaved = Run(Tiny(), threads=1), Run(Tiny(), threads=1, autosave=0)
    run.advance(3)
    live(run, unsaved)
    assert (run.folder / "state.safetensors").exists() and run.step == 3
    assert unsaved.folder is None


def test_a_tape_is_replayed_beside_the_run_to_the_same_numbers(live, tmp_path):
    lab = live(Arms())
    lab.play(5)
    wait_until(lambda: not lab.driver.training)
    lab.run.tune(strength=1.5)
    lab.play(5)
    wait_until(lambda: not lab.driver.training)
    path = lab.save_tape(tmp_path / "t.json")
    assert lab.load_tape(path).changes[0].value == 1.5
    again = lab.replay(path)
    wait_until(lambda: again.held)
    assert again.identical and again.step == 10 and again is not lab.run
    assert lab.copy_config() == "Arms(strength=1.5)" and "run.tune(strength=1.5)" in lab.copy_tape()


def test_paper_values_turn_the_knobs_that_have_one(live):
    lab = live(Arms(rate=0.5, strength=0.3))
    lab.paper_values()
    assert lab.run.learner.config.rate == 0.01 and lab.run.learner.config.strength == 0.3
    assert [c.knob for c in lab.run.tape.changes] == ["rate"]


def test_abandoned_branches_stay_in_sight_the_newest_few(live):
    lab = live(Arms())
    for _ in range(7):
        lab.play(6)
        wait_until(lambda: not lab.driver.training)
        lab.rewind(2)
        wait_until(lambda: len(lab._benches[0].run.ghosts) == lab._benches[0].ghosts)
    ghosts = [track for track in lab.board._tracks.values() if track.ghost]
    assert len(ghosts) == 4 and "left at 2" in ghosts[-1].label


def test_the_only_run_stays_on_the_table_and_a_fork_may_leave(live):
    lab = live(Arms())
    twin = lab.fork()
    lab.remove(twin)
    assert lab.runs == [lab.run] and twin not in lab.driver.runs
    with pytest.raises(PolrlError, match="only run on the table"):
        lab.remove(lab.run)
    with pytest.raises(PolrlError, match="is not on this table"):
        lab.fork(twin)


def test_pictures_come_where_no_custom_widget_answers(live, monkeypatch):
    from polrl_widgets import lab as module

    monkeypatch.setattr(module, "PLAIN_SECONDS", 0.0)
    lab = live(Arms())
    assert lab._plain.layout.display == "none"
    lab._displayed = time.monotonic() - 1.0  # shown, and no page said hello
    lab.driver.nudge()
    wait_until(lambda: bytes(lab._plain_picture.value).startswith(b"\x89PNG"))
    assert lab.mode == "plain" and lab._plain.layout.display == "" and "0 steps" in lab._plain_words.value


def test_a_page_that_answers_gets_no_pictures(live, monkeypatch):
    from polrl_widgets import lab as module

    monkeypatch.setattr(module, "PLAIN_SECONDS", 0.0)
    lab = live(Arms())
    lab.board._hear(None, {"type": "hello"}, [])
    lab._displayed = time.monotonic() - 1.0
    lab.play(5)
    wait_until(lambda: not lab.driver.training)
    assert lab.mode == "live"


def test_training_stops_when_nobody_can_see_it(live, monkeypatch):
    from polrl_widgets import lab as module

    monkeypatch.setattr(module, "GONE_SECONDS", 0.1)
    lab = live(Arms())
    lab.board._hear(None, {"type": "hello"}, [])
    lab.play()
    wait_until(lambda: lab.run.step > 3)
    lab._heard({"type": "gone"})
    lab._heard({"type": "painted", "n": 1})  # said on the way out
    wait_until(lambda: not lab.driver.training)
    lab._heard({"type": "back"})
    lab.play()
    step = lab.run.step
    wait_until(lambda: lab.run.step > step)
    monkeypatch.setattr(module, "UNSEEN_SECONDS", 0.2)  # the page was closed: it says nothing any more
    wait_until(lambda: not lab.driver.training)


def test_why_a_value_was_refused_stays_in_sight_while_training_until_one_is_taken(live):
    lab = live(Arms())
    lab.play()
    control = lab._benches[0].controls["strength"]
    control._box.value = 7.0
    wait_until(lambda: "from 0 to 2" in lab.board._message["text"])
    step = lab.run.step
    wait_until(lambda: lab.run.step > step + 2000)  # several frames later
    assert "from 0 to 2" in lab.board._message["text"] and lab.board._message["level"] == "warning"
    control._box.value = 1.0
    wait_until(lambda: lab.board._message["text"] == "")


def test_the_interrupt_pauses_every_lab_and_says_so(live):
    from polrl_widgets.lifecycle import pause_all

    labs = [live(Arms()), live(Arms())]
    for lab in labs:
        lab.play()
    pause_all()
    for lab in labs:
        assert not lab.driver.training and "interrupted" in lab._notice


def test_several_methods_of_one_name_are_told_apart(live):
    lab = live(Arms(), Arms(), Tiny())
    assert [bench.track.label for bench in lab._benches] == ["Arms", "Arms (2)", "Tiny"]


@pytest.mark.parametrize("ending", ["close", "remove", "start again"])
def test_what_leaves_the_table_leaves_neither_widgets_nor_its_run_in_memory(live, ending):
    live(Arms()).close()  # what all labs share is there from now on
    before = set(WIDGETS)
    lab = Lab(Arms(), mode="live")
    lab.arm("none")
    parent, twin = lab.run, lab.fork()
    of_two = set(WIDGETS)
    leaving = twin if ending == "remove" else parent
    if ending == "remove":
        lab.remove(twin)
        assert set(WIDGETS) < of_two
    elif ending == "start again":
        lab._start_again(lab._benches[0], {"cells": 3})
        assert len(WIDGETS) == len(of_two) and set(WIDGETS) != of_two
    learner = weakref.ref(leaving.learner)
    del parent, twin, leaving
    if ending != "close":
        gc.collect()
        assert learner() is None
    lab.close()
    assert set(WIDGETS) == before
    del lab
    gc.collect()
    assert learner() is None


def test_pictures_of_the_last_step_come_when_training_ends_before_they_are_due(live):
    lab = live(Tiny())
    wait_until(lambda: ("t0", "x") in lab.board._views)
    lab._views_due = time.monotonic() + 1000
    lab.play(3)
    wait_until(lambda: lab.run.step == 3 and not lab.driver.training)
    wait_until(lambda: lab.board._views["t0", "x"].values["x"][0] == float(lab.run.learner.x[0]))
