"""The lab as a person meets it: in JupyterLab, in a real browser."""

from __future__ import annotations

import json
import re

import pytest

IMPORTS = "from polrl_widgets import Lab\nfrom polrl.foundations.noise_mask import NoiseMask"
SMALL = "NoiseMask(width=4, per_class=4, pretrain_epochs=30, finetune_epochs=5)"
CELLS = [IMPORTS, f"lab = Lab({SMALL})\nlab"]


def drag(notebook, knob: str, share: float) -> None:
    """Drag a slider's handle to a place on its track, as a hand would."""
    page = notebook.page
    slider = page.locator(f".polrl-knob-{knob} .noUi-target").first
    slider.scroll_into_view_if_needed()
    handle, track = page.locator(f".polrl-knob-{knob} .noUi-handle").first.bounding_box(), slider.bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(track["x"] + share * track["width"], handle["y"] + handle["height"] / 2, steps=8)
    page.mouse.up()


def test_dragging_a_slider_changes_what_the_next_steps_are_trained_with(lab):
    lab.page.click(".polrl-run")
    lab.wait_steps(5)
    drag(lab, "mask_strength", 0.25)
    lab.page.wait_for_function(
        "() => Math.abs(Number(document.querySelector('.polrl-applied-mask_strength').textContent) - 0.25) < 0.05"
    )
    shown = float(lab.text(".polrl-applied-mask_strength"))
    lab.page.click(".polrl-pause")
    told = json.loads(lab.run_code("import json; print(json.dumps([c.model_dump() for c in lab.run.tape.changes]))"))
    assert told[-1]["knob"] == "mask_strength" and told[-1]["value"] == pytest.approx(shown, abs=1e-3)
    assert lab.errors == []


def test_every_part_has_its_stable_class(lab):
    names = ["run", "pause", "step1", "step100", "reset", "fork", "rewind", "step", "ups", "chart", "message"]
    names += [f"{part}-{knob}" for part in ("knob", "applied") for knob in ("mask_strength", "score", "weight_decay")]
    lab.page.wait_for_selector(".polrl-view-mask canvas")
    names += ["view-mask", "view-mask_values", "view-accuracy_by_class"]
    for name in names:
        assert lab.page.locator(f".polrl-lab .polrl-{name}").count() >= 1, name


def test_transport_does_single_steps_and_pauses(lab):
    for expected in (1, 2):
        lab.page.click(".polrl-step1")
        lab.wait_text(".polrl-step", str(expected))
    lab.page.click(".polrl-step100")
    lab.wait_text(".polrl-step", "102")
    lab.page.click(".polrl-run")
    lab.wait_steps(110)
    lab.page.click(".polrl-pause")
    assert lab.run_code("import time; time.sleep(0.5); n = lab.run.step; time.sleep(1); print(lab.run.step - n)") == "0"


def test_typed_values_arrow_keys_and_the_way_back_to_the_default(lab):
    lab.type_value("mask_strength", "0.3")
    lab.page.click(".polrl-step1")
    lab.wait_text(".polrl-applied-mask_strength", "0.3")
    handle = lab.page.locator(".polrl-knob-mask_strength .noUi-handle").first
    handle.focus()
    handle.press("ArrowRight")
    lab.page.click(".polrl-step1")
    lab.wait_text(".polrl-applied-mask_strength", "0.31")
    lab.page.click(".polrl-default-mask_strength")
    lab.page.click(".polrl-step1")
    lab.wait_text(".polrl-applied-mask_strength", "1")


def test_a_value_out_of_range_is_refused_in_words_and_the_old_one_stays(lab):
    lab.type_value("mask_strength", "7")
    lab.page.wait_for_function("() => document.querySelector('.polrl-message').textContent.includes('mask_strength')")
    assert "from 0 to 1" in lab.text(".polrl-message")
    lab.page.wait_for_function("() => document.querySelector('.polrl-value-mask_strength input').value === '1'")
    lab.page.click(".polrl-step1")
    lab.wait_text(".polrl-step", "1")
    assert lab.text(".polrl-applied-mask_strength") == "1"


def test_sliders_have_accessible_names(lab):
    handle = lab.page.locator(".polrl-knob-mask_strength .noUi-handle").first
    lab.page.wait_for_function("() => document.querySelector('.polrl-knob-mask_strength .noUi-handle').ariaLabel")
    assert "plain training" in handle.get_attribute("aria-label")


def test_opening_the_lab_turns_no_knob(lab):
    wait = "import time; time.sleep(1); print(lab.run.tape.changes)"
    assert lab.run_code(wait) == "[]"


def test_phases_are_marked_and_views_move(lab):
    lab.page.locator(".polrl-step100").click(click_count=1)
    for hundreds in range(1, 4):
        lab.wait_steps(100 * hundreds)
        lab.page.click(".polrl-step100")
    lab.page.wait_for_function("() => document.querySelector('.polrl-lab').textContent.includes('finetune')")
    lab.page.locator(".polrl-view-mask").scroll_into_view_if_needed()
    lab.page.wait_for_function("() => document.querySelector('.polrl-view-mask').textContent.includes('not used')")


def test_fork_goes_on_beside_its_parent_with_sliders_of_its_own(lab):
    lab.page.click(".polrl-step100")
    lab.wait_steps(100)
    lab.page.click(".polrl-fork")
    lab.page.wait_for_function("() => document.querySelectorAll('.polrl-knob-mask_strength').length === 2")
    lab.type_value("mask_strength", "0.2", which=1)
    lab.page.click(".polrl-step1")
    lab.wait_steps(101)
    texts = lab.page.locator(".polrl-applied-mask_strength").all_inner_texts()
    assert texts == ["1", "0.2"]
    assert lab.errors == []


def test_rewind_goes_back_and_leaves_the_old_branch(lab):
    lab.page.click(".polrl-step100")
    lab.wait_steps(100)
    box = lab.page.locator(".polrl-rewind-step input")
    box.fill("40")
    box.press("Enter")
    lab.page.click(".polrl-rewind")
    lab.wait_text(".polrl-step", "40")
    assert lab.run_code("print(lab.run.step, len(lab.run.history), len(lab.run.ghosts))") == "40 40 1"


def test_reset_begins_anew_with_the_present_knobs(lab):
    lab.page.click(".polrl-step100")
    lab.wait_steps(100)
    lab.type_value("mask_strength", "0.5")
    lab.page.click(".polrl-reset")
    lab.wait_text(".polrl-step", "0")
    assert lab.run_code("print(lab.run.step, lab.run.learner.config.mask_strength)") == "0 0.5"


def test_structure_panel_starts_a_new_run_and_refuses_what_can_not_be(lab):
    lab.page.click(".polrl-structure .lm-Collapse-header, .polrl-structure .jupyter-widget-Collapse-header")
    box = lab.page.locator(".polrl-structure input").nth(2)
    lab.page.locator(".polrl-restart").wait_for(state="visible")
    assert re.search("width", lab.page.locator(".polrl-structure").inner_text())
    box.fill("0")
    box.press("Enter")
    lab.page.click(".polrl-restart")
    lab.page.wait_for_function("() => document.querySelector('.polrl-message').textContent.includes('width')")
    lab.page.click(".polrl-step1")
    lab.wait_steps(1)  # so that the new run's 0 is one to wait for
    box.fill("6")
    box.press("Enter")
    lab.page.click(".polrl-restart")
    lab.page.wait_for_function("() => document.querySelector('.polrl-step')?.dataset.value === '0'")
    assert lab.run_code("print(lab.run.learner.config.width)") == "6"


def test_running_the_cell_again_leaves_one_training_thread(lab):
    lab.page.click(".polrl-run")
    lab.wait_steps(3)
    lab.run_cell(1)
    lab.wait_lab()
    count = "import threading; print(sum(t.name == 'polrl-training' for t in threading.enumerate()))"
    assert lab.run_code(count) == "1"


def unfold(notebook, title: str) -> None:
    """Open one of the folded panels below the sliders."""
    head = notebook.page.locator(".polrl-tools [class*=Collapse-header]", has_text=title)
    head.scroll_into_view_if_needed()
    head.click()


def test_a_knob_moved_while_paused_redraws_the_views(lab):
    lab.page.wait_for_selector(".polrl-view-mask canvas")
    masked = """() => { const c = document.querySelector('.polrl-view-mask canvas');
        return c.getContext('2d').getImageData(0, 2 * (c.height + 1) / 3, c.width, c.height / 3).data.join(); }"""
    before = lab.page.evaluate(masked)
    lab.type_value("mask_strength", "0")
    lab.page.wait_for_function(f"before => ({masked})() !== before", arg=before)
    assert lab.read("lab.run.step") == "0"


def test_the_timeline_goes_back_and_leaves_a_ghost_in_sight(lab):
    lab.page.click(".polrl-step100")
    lab.wait_steps(100)
    slider = lab.page.locator(".polrl-timeline input")
    box = slider.bounding_box()
    middle = box["y"] + box["height"] / 2
    lab.page.mouse.move(box["x"] + box["width"] - 5, middle)
    lab.page.mouse.down()
    lab.page.mouse.move(box["x"] + 0.5 * box["width"], middle, steps=5)
    assert "to step" in lab.text(".polrl-timeline output")
    lab.page.mouse.up()
    lab.page.wait_for_function("() => Number(document.querySelector('.polrl-step').dataset.value) < 70")
    assert 30 < int(lab.read("lab.run.step")) < 70
    shown = "() => document.querySelectorAll('.polrl-chart .polrl-plot')[1].figure.traces.map(t => t.x.at(-1) ?? 0)"
    lab.page.wait_for_function(f"() => ({shown})()[0] === 100")  # the ghost is drawn first, below the others
    assert lab.errors == []


def test_a_tape_is_saved_listed_and_replayed_exactly(lab):
    lab.page.click(".polrl-step1")
    lab.wait_text(".polrl-step", "1")
    lab.type_value("mask_strength", "0.5")
    lab.page.click(".polrl-step100")
    lab.wait_steps(101)
    unfold(lab, "tape")
    lab.page.wait_for_selector(".polrl-tape")
    lab.page.wait_for_function("() => document.querySelector('.polrl-tape').textContent.includes('mask_strength')")
    lab.page.click(".polrl-tape-save")
    lab.page.wait_for_function("() => document.querySelector('.polrl-message').textContent.includes('the tape is in')")
    lab.page.click(".polrl-tape-replay")
    lab.page.wait_for_function("() => document.querySelector('.polrl-message').textContent.includes('every number')")
    assert lab.read("lab.runs[1].identical, lab.runs[1].step, lab.runs[1].learner.config.mask_strength") == (
        "True 101 0.5"
    )
    lab.page.click(".polrl-copy-config")
    code = lab.page.locator(".polrl-tape-code textarea")
    lab.page.wait_for_function("() => document.querySelector('.polrl-tape-code textarea').value !== ''")
    assert "mask_strength=0.5" in code.input_value() and code.input_value().startswith("NoiseMask(")
    lab.page.click(".polrl-copy-tape")
    lab.page.wait_for_function("() => document.querySelector('.polrl-tape-code textarea').value.includes('run.tune')")
    assert lab.errors == []


def test_paper_values_and_defaults_are_one_click_away(lab):
    lab.page.click(".polrl-paper-values")
    lab.page.click(".polrl-step1")
    lab.wait_text(".polrl-applied-classifier_lr", "0.1")
    assert lab.text(".polrl-applied-finetune_lr") == "0.001"
    lab.page.click(".polrl-defaults")
    lab.page.click(".polrl-step1")
    lab.wait_text(".polrl-applied-classifier_lr", "0.05")


def test_an_arm_of_the_study_trains_beside_the_run_until_it_is_switched_off(lab):
    unfold(lab, "baselines")
    lab.page.locator(".polrl-arm-clean input").check()
    lab.page.wait_for_function("() => document.querySelectorAll('.polrl-track').length === 2")
    lab.page.click(".polrl-step100")
    lab.wait_steps(100)
    assert lab.read("[r.learner.config.mask_strength for r in lab.runs], lab.runs[1].learner.config.width") == (
        "[1.0, 0.0] 4"
    )
    lab.page.locator(".polrl-arm-clean input").uncheck()
    lab.page.wait_for_function("() => document.querySelectorAll('.polrl-track').length === 1")
    assert lab.read("len(lab.runs), len(lab.driver.runs)") == "1 1"
    assert lab.errors == []


def test_pictures_can_be_left_out_and_come_back(lab):
    lab.page.wait_for_selector(".polrl-view-mask canvas")
    charts = lab.page.locator(".polrl-chart").count()
    unfold(lab, "pictures")
    for box in ("c0", "mask"):
        lab.page.locator(f".polrl-show-{box} input").uncheck()
    lab.page.wait_for_function("() => !document.querySelector('.polrl-view-mask')")
    assert lab.page.locator(".polrl-chart").count() == charts - 1
    for box in ("c0", "mask"):
        lab.page.locator(f".polrl-show-{box} input").check()
    lab.page.wait_for_selector(".polrl-view-mask canvas")
    assert lab.page.locator(".polrl-chart").count() == charts
    assert lab.errors == []


def test_curves_can_be_taken_away_as_csv_and_png(lab, tmp_path):
    lab.page.click(".polrl-step100")
    lab.wait_steps(100)
    unfold(lab, "save")
    with lab.page.expect_download() as csv:
        lab.page.click(".polrl-csv")
    lines = open(csv.value.path()).read().splitlines()
    assert lines[0].startswith("run,step,phase,") and "cross_entropy" in lines[0]
    assert csv.value.suggested_filename == "noise_mask.csv" and lines[-1].startswith("NoiseMask,100,")
    with lab.page.expect_download() as png:
        lab.page.click(".polrl-png")
    assert open(png.value.path(), "rb").read(8) == b"\x89PNG\r\n\x1a\n"


def test_a_fork_can_be_taken_off_the_table_and_the_last_run_can_not(lab):
    lab.page.click(".polrl-fork")
    lab.page.wait_for_function("() => document.querySelectorAll('.polrl-remove').length === 2")
    lab.page.locator(".polrl-remove").nth(1).click()
    lab.page.wait_for_function("() => document.querySelectorAll('.polrl-track').length === 1")
    lab.page.click(".polrl-remove")
    lab.page.wait_for_function("() => document.querySelector('.polrl-message').textContent.includes('only run')")


# Moves of the mouse at their times, however busy the page is: a browser gives its page at most one real move a frame.
MOVES = """
async ([shares, seconds]) => {
  const handle = document.querySelector('.polrl-knob-mask_strength .noUi-handle');
  const track = document.querySelector('.polrl-knob-mask_strength .noUi-base').getBoundingClientRect();
  const tell = (kind, share) => handle.dispatchEvent(new MouseEvent(kind, {
    bubbles: true, cancelable: true, buttons: 1, clientX: track.left + share * track.width, clientY: track.top,
  }));
  const seen = new Set();
  const begun = performance.now();
  tell('mousedown', 1);
  for (let i = 0; i < shares.length; i++) {
    const wait = begun + 1000 * seconds * (i + 1) / shares.length - performance.now();
    if (wait > 0) await new Promise((done) => setTimeout(done, wait));
    tell('mousemove', shares[i]);
    seen.add(handle.getAttribute('aria-valuetext'));
  }
  tell('mouseup', shares.at(-1));
  return [(performance.now() - begun) / 1000, seen.size];
}
"""


def test_a_thousand_moves_in_ten_seconds_lose_no_last_value_and_raise_nothing(lab):
    lab.page.click(".polrl-run")
    lab.wait_steps(3)
    shares = [abs((7 * i) % 200 - 100) / 100 for i in range(999)] + [0.37]
    seconds, values = lab.page.evaluate(MOVES, [shares, 10])
    assert 10 <= seconds < 15 and values > 50
    lab.page.wait_for_function(
        """() => { const shown = document.querySelector('.polrl-value-mask_strength input').value;
                   return Math.abs(shown - 0.37) < 0.02
                       && document.querySelector('.polrl-applied-mask_strength').textContent === shown; }"""
    )
    lab.page.click(".polrl-pause")
    assert lab.read("lab.driver.error == '', abs(lab.run.learner.config.mask_strength - 0.37) < 0.02") == "True True"
    assert lab.errors == []
