"""The board in JupyterLab, looked at by a real browser."""

from __future__ import annotations

import pytest

SETUP = """
import threading, time
import ipywidgets
import numpy as np
from polrl.core.views import Bars, ImageGrid
from polrl_widgets.board import Board, Chart, PlotlyLibrary, Track, TrackFrame

def new_board():
    return Board([Chart("loss", "Loss", ("loss",)), Chart("return", "Return", ("return",))], [Track("run", "Run")])

def frame(first, last, **more):
    steps = np.arange(first, last)
    points = {"loss": (steps, np.sin(steps / 50)), "return": (steps, steps * 1.0)}
    return {"run": TrackFrame(step=last, ups=100.0, state="running", points=points, applied={"x": str(last)}, **more)}

board = new_board()
"""

CELLS = [SETUP, "board = new_board()\nboard"]

# What a chart shows: the last x of its first trace and how many points it has.
CURVE = """n => { const line = document.querySelectorAll('.polrl-chart .polrl-plot')[n]?.figure?.traces[0];
                 return line ? [line.x.at(-1) ?? null, line.x.length] : [null, 0]; }"""


@pytest.fixture
def lab(shared):
    """The shared notebook with a new board."""
    shared.errors.clear()
    shared.run_cell(1)
    shared.page.wait_for_selector(".polrl-chart canvas")
    wait_curve(shared, None)
    return shared


def wait_curve(notebook, last: int | None, chart: int = 0) -> list[int]:
    notebook.page.wait_for_function(f"([n, last]) => ({CURVE})(n)[0] === last", arg=[chart, last])
    return notebook.page.evaluate(CURVE, chart)


def test_charts_move_and_words_follow(lab) -> None:
    lab.run_code("board.frame(frame(0, 100))")
    assert wait_curve(lab, 99) == [99, 100]
    lab.run_code("board.frame(frame(100, 150))")
    assert wait_curve(lab, 149, chart=1) == [149, 150]
    lab.wait_text(".polrl-applied-x", "150")
    assert lab.page.locator(".polrl-step").first.get_attribute("data-value") == "150"
    assert lab.text(".polrl-ups") == "100"
    assert lab.errors == []


def test_truncate_ghost_marks_and_message(lab) -> None:
    lab.run_code(
        "board.frame(frame(0, 100)); board.mark('run', 40, 'x 1 to 2'); board.mark('run', 0, 'clone', 'phase')"
    )
    wait_curve(lab, 99)
    lab.page.wait_for_function(
        "() => document.querySelector('.polrl-chart .polrl-plot').figure.traces.some(t => t.text?.includes?.('x 1 to 2'))"
    )
    lab.run_code("board.truncate('run', 50); board.say('the loss is not finite', 'error')")
    assert wait_curve(lab, 50)[1] == 51
    lab.wait_text(".polrl-message", "the loss is not finite")
    lab.run_code("board.ghost('run'); board.add_track(Track('two', 'Second', 1))")
    lab.wait_text(".polrl-label", "Second")
    assert lab.page.locator(".polrl-track").count() == 1
    lab.run_code("board.truncate('two'); board.remove_track('run')")
    lab.page.wait_for_function("() => document.querySelector('.polrl-chart .polrl-plot').figure.traces.length === 1")
    assert lab.errors == []


INK = """n => { const canvas = document.querySelectorAll('.polrl-chart canvas')[n];
               const pixels = new Uint32Array(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.buffer);
               return new Set(pixels).size; }"""


def test_a_chart_has_ink_before_anyone_points_at_it(lab) -> None:
    lab.run_code("board.frame(frame(0, 400))")
    wait_curve(lab, 399)
    lab.page.wait_for_function(f"() => ({INK})(0) > 20")
    assert lab.page.locator(".js-plotly-plot").count() == 0
    assert lab.errors == []


LOSING = """
board.frame(frame(0, 40))
send_to_page, asked = PlotlyLibrary.send_to_page, []

def send_second_time():
    asked.append(time.monotonic())
    if len(asked) > 1:
        send_to_page()

PlotlyLibrary.send_to_page = staticmethod(send_second_time)
"""


def test_a_plotly_that_was_lost_is_asked_for_again_while_somebody_points(lab) -> None:
    lab.run_code(LOSING)
    wait_curve(lab, 39)
    lab.page.locator(".polrl-chart .polrl-plot").first.hover()
    lab.page.wait_for_selector(".polrl-chart .js-plotly-plot")
    assert lab.read("len(asked), asked[1] - asked[0] > 7") == "2 True"
    assert lab.errors == []


def test_a_chart_that_slides_under_a_pointer_at_rest_stays_as_it_is(lab) -> None:
    lab.run_code("board.frame(frame(0, 40))")
    wait_curve(lab, 39)
    plot = lab.page.locator(".polrl-chart .polrl-plot").first
    plot.hover()
    lab.page.wait_for_selector(".js-plotly-plot")
    pointer = plot.bounding_box()
    slide = "way => { document.querySelector('.polrl-charts').style.transform = way; }"
    lab.page.evaluate(slide, "translateX(3000px)")
    lab.page.wait_for_selector(".js-plotly-plot", state="detached")  # nobody points at it any more
    lab.page.evaluate(slide, "none")
    lab.page.wait_for_function("() => document.querySelector('.polrl-plot').matches(':hover')")
    lab.page.wait_for_timeout(1000)
    assert lab.page.locator(".js-plotly-plot").count() == 0
    lab.page.mouse.move(pointer["x"] + pointer["width"] / 2 + 5, pointer["y"] + pointer["height"] / 2)
    lab.page.wait_for_selector(".js-plotly-plot")
    assert lab.errors == []


def test_messages_stay_bounded_in_a_long_run(lab) -> None:
    printed = lab.run_code(
        "sizes = []\n"
        "for first in range(0, 100_000, 100):\n"
        "    before = board.bytes_sent\n"
        "    board.frame(frame(first, first + 100)); board.flush()\n"
        "    sizes.append(board.bytes_sent - before)\n"
        "    time.sleep(0.002)\n"
        "print(int(np.median(sizes[5:15])), int(np.median(sizes[-100:])), max(sizes))"
    )
    early, late, largest = map(int, printed.split())
    assert late <= early + 100
    assert largest < 2 * 2 * 1_000 * 16 + 5_000
    assert wait_curve(lab, 99_999)[1] <= 2_200
    assert lab.errors == []


def test_a_feeding_thread_loses_no_last_value(lab) -> None:
    lab.run_code(
        "def feed():\n"
        "    for step in range(0, 800, 10):\n"
        "        board.frame(frame(step, step + 10))\n"
        "        time.sleep(0.05)\n"
        "threading.Thread(target=feed).start()"
    )
    lab.wait_text(".polrl-applied-x", "800")
    assert wait_curve(lab, 799) == [799, 800]
    assert lab.errors == []


DEAF = """
board.close()
board = new_board()
board.frame(frame(0, 30))
hear, missed = board._hear, []

def hear_late(widget, content, buffers):
    if content["type"] == "hello" and not missed:
        missed.append(content)
    else:
        hear(widget, content, buffers)

board.on_msg(board._hear, remove=True)
board.on_msg(hear_late)
board
"""


def test_a_page_whose_first_question_is_lost_asks_again(lab) -> None:
    lab.run_code(DEAF)
    assert wait_curve(lab, 29) == [29, 30]
    assert lab.read("len(missed)") == "1"
    assert lab.errors == []


def test_sliders_have_accessible_names(lab) -> None:
    lab.run_code(
        "slider, late = ipywidgets.FloatLogSlider(value=1.0, min=-3, max=3), ipywidgets.IntSlider()\n"
        "slider.add_class('polrl-knob-x'); late.add_class('polrl-knob-late')\n"
        "board.name_sliders('polrl-lab-1', {'polrl-knob-x': 'noise strength', 'polrl-knob-late': 'later'})\n"
        "box = ipywidgets.VBox([slider]); box.add_class('polrl-lab-1')\n"
        "slider.observe(lambda change: box.set_trait('children', [slider, late]), 'value')\n"
        "box"
    )
    lab.page.wait_for_selector(".polrl-knob-x .noUi-handle[aria-label='noise strength']")
    handle = lab.page.locator(".polrl-knob-x .noUi-handle")
    before = lab.text(".polrl-knob-x .widget-readout")
    handle.focus()
    lab.page.keyboard.press("ArrowRight")
    lab.page.wait_for_selector(".polrl-knob-late .noUi-handle[aria-label='later']")
    readout = lab.text(".polrl-knob-x .widget-readout")
    assert readout != before
    lab.page.wait_for_selector(f".polrl-knob-x .noUi-handle[aria-valuetext='{readout}']")
    assert lab.errors == []


def test_reload_restores_curves_and_images(lab) -> None:
    lab.run_code(
        "images = np.linspace(0, 1, 2 * 8 * 28 * 28).reshape(2, 8, 28, 28)\n"
        "view = ImageGrid(title='Masks', alt='Sixteen masks', images=images)\n"
        "for first in range(0, 5000, 100): board.frame(frame(first, first + 100)); board.flush()\n"
        "board.frame(frame(5000, 5001, views={'masks': view})); board.flush()"
    )
    before = wait_curve(lab, 5000)
    lab.page.wait_for_selector(".polrl-view-masks canvas")
    lab.reload()
    assert wait_curve(lab, 5000) == before
    canvas = lab.page.locator(".polrl-view-masks canvas")
    canvas.wait_for()
    pixel = "e => [...e.getContext('2d').getImageData(e.width - 1, e.height - 1, 1, 1).data]"
    assert canvas.evaluate(pixel) == [255, 255, 255, 255]
    assert lab.page.locator(".polrl-view-masks [role=img]").get_attribute("aria-label") == "Sixteen masks"
    assert lab.errors == []


# The last one of the shared notebook: JupyterLab itself complains, a while after it has changed its theme and back.
def test_charts_follow_the_theme(lab) -> None:
    color = "() => document.querySelector('.polrl-chart .polrl-plot').figure.layout.font.color"
    lab.run_code("board.frame(frame(0, 10))")
    wait_curve(lab, 9)
    light = lab.page.evaluate(color)
    lab.command("apputils:change-theme", theme="JupyterLab Dark")
    try:
        lab.page.wait_for_function(f"light => ({color})() !== light", arg=light)
    finally:
        lab.command("apputils:change-theme", theme="JupyterLab Light")
    lab.page.wait_for_function(f"light => ({color})() === light", arg=light)


# It opens another notebook, which the first one's page would open too if it were loaded again after that.
def test_plotly_takes_over_where_somebody_points_and_hands_back(open_notebook) -> None:
    notebook = open_notebook([SETUP, "board", "other = new_board(); ipywidgets.VBox([other, board])"])
    notebook.page.wait_for_function("() => document.querySelectorAll('.polrl-chart canvas').length >= 6")
    notebook.run_code("board.frame(frame(0, 10)); other.frame(frame(0, 20))")
    notebook.page.wait_for_function(f"() => [0, 4].every(n => ({CURVE})(n)[0] === 9)")
    wait_curve(notebook, 19, chart=2)
    assert max(notebook.received) < 1_000_000, "plotly comes when it is wanted"
    for chart in (0, 2):  # of two boards
        notebook.page.locator(".polrl-chart .polrl-plot").nth(chart).hover()
        notebook.page.wait_for_selector(f".polrl-chart .js-plotly-plot >> nth={0}")
        notebook.page.wait_for_function(
            "n => document.querySelectorAll('.polrl-plot')[n].querySelector('.main-svg')", arg=chart
        )
    held = "n => document.querySelectorAll('.polrl-plot')[n].querySelector('.js-plotly-plot')?.data[0].x.at(-1)"
    notebook.run_code("other.frame(frame(20, 30))")
    notebook.page.wait_for_function(f"() => ({held})(2) === 29")
    notebook.page.locator(".polrl-label").first.hover()
    notebook.page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot').length === 0")
    assert sum(size > 1_000_000 for size in notebook.received) == 1
    assert notebook.errors == []
