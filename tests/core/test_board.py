"""What the board does without a page: bounds, merging, encoding; and the still pictures."""

from __future__ import annotations

import json
import threading
import time
import zlib

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("anywidget")

from polrl.core.views import Bars, Curve, Heatmap, Histogram, ImageGrid, Lines, Points, Tokens, View
from polrl_widgets import board as board_module
from polrl_widgets.board import (
    MAX_MARKS,
    MAX_NEW_POINTS,
    Board,
    Chart,
    Series,
    Track,
    TrackFrame,
    encode_view,
)
from polrl_widgets.static_views import draw_curves, draw_view, to_png

EDGES = np.linspace(-1, 1, 9)
VIEWS: dict[str, View] = {
    "images": ImageGrid(title="Masks", alt="Masks", images=np.random.rand(2, 3, 8, 8), row_labels=("in", "out")),
    "colours": ImageGrid(title="Samples", alt="Samples", images=np.random.rand(1, 2, 8, 8, 3)),
    "bars": Bars(title="Arms", alt="Arms", labels=["a", "b"], values={"policy": [0.2, 0.8], "data": [0.5, 0.5]}),
    "histogram": Histogram(title="Actions", alt="Actions", edges=EDGES, counts={"policy": np.arange(8)}),
    "lines": Lines(title="Schedule", alt="Schedule", x=[0, 1, 2], y={"beta": [0, 1, 4]}, y_range=(0, 5)),
    "heatmap": Heatmap(title="Q", alt="Q", values=np.random.randn(3, 4), diverging=True, row_labels=list("abc")),
    "points": Points(title="Actions", alt="Actions", groups={"data": np.random.randn(50, 2), "policy": [[0, 0]]}),
    "tokens": Tokens(title="Text", alt="Text", lines=[["one", " $two"], [" three"]], values=[[0.1, 0.9], [0.5]]),
}


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Sink(Board):
    """A board whose messages are kept instead of sent."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self.messages: list[tuple[dict, list[bytes]]] = []
        super().__init__(*arguments, **options)
        self._clock = Clock()

    def send(self, content: dict, buffers: list[bytes] | None = None) -> None:
        json.dumps(content)
        self.messages.append((content, buffers or []))

    def paint(self) -> None:
        """Let the page answer that it has painted everything, well after the last message."""
        self._clock.now += 1.0
        self._hear(self, {"type": "painted", "n": self.messages_sent}, [])

    def sizes(self) -> list[int]:
        return [len(json.dumps(content)) + sum(map(len, buffers)) for content, buffers in self.messages]


@pytest.fixture
def sink() -> Sink:
    sink = Sink([Chart("loss", "Loss", ("loss",))], [Track("run", "Run")])
    sink._hear(sink, {"type": "hello"}, [])
    sink.messages.clear()
    sink.paint()
    return sink


def points(first: int, last: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    steps = np.arange(first, last)
    return {"loss": (steps, np.sin(steps / 50.0))}


def received(messages: list[tuple[dict, list[bytes]]]) -> np.ndarray:
    """The curve as the page puts it together."""
    curve = np.empty((2, 0))
    for content, buffers in messages:
        numbers = np.frombuffer(buffers[0])
        for _, _, count, reset in content["series"]:
            new = numbers[: 2 * count].reshape(2, count)
            curve = new if reset else np.hstack([curve, new])
    return curve


def test_series_stays_bounded_and_keeps_both_ends() -> None:
    series = Series(100)
    for first in range(0, 20_000, 37):
        series.add(np.arange(first, first + 37), np.random.rand(37))
        series.take(whole=False)
        assert len(series.x) <= 2 * 100 + MAX_NEW_POINTS
    assert series.x[0] == 0 and series.x[-1] >= 19_990
    assert np.all(np.diff(series.x) > 0)


def test_values_that_are_not_finite_are_passed_over() -> None:
    series = Series(100)
    series.add([1, 2, 3, 4], [0.5, np.nan, np.inf, 0.25])
    assert series.x.tolist() == [1, 4]


def test_page_holds_the_same_curve_as_the_kernel(sink: Sink) -> None:
    for first in range(0, 9_000, 30):
        sink.frame({"run": TrackFrame(step=first + 30, points=points(first, first + 30))})
        sink.paint()
    series = sink._series["run", "loss"]
    assert np.array_equal(received(sink.messages), np.stack([series.x, series.y]))
    assert series.x[-1] == 8_999


def test_messages_do_not_grow_with_the_run(sink: Sink) -> None:
    for first in range(0, 100_000, 100):
        sink.frame({"run": TrackFrame(step=first + 100, points=points(first, first + 100))})
        sink.paint()
    sizes = sink.sizes()
    early, late = np.array(sizes[10:30]), np.array(sizes[-30:])
    assert np.median(late) <= np.median(early) + 50
    assert max(sizes) <= 16 * 2_000 + 2_000


def test_frames_are_merged_while_the_page_is_silent(sink: Sink) -> None:
    for first in range(0, 50_000, 100):
        sink.frame({"run": TrackFrame(step=first + 100, points=points(first, first + 100))})
    sent = len(sink.messages)
    assert sent == board_module.MAX_IN_FLIGHT or sent == 1  # the clock stands still: the line's budget may hold it too
    assert not sink.ready
    sink.paint()
    assert sink.messages[-1][0]["words"]["run"]["step"] == 50_000
    assert received(sink.messages)[0, -1] == 49_999
    assert max(sink.sizes()) < 40_000


def test_a_merged_last_frame_goes_out_by_itself() -> None:
    sink = Sink([Chart("loss", "Loss", ("loss",))], [Track("run", "Run")])
    sink._clock = time.monotonic
    sink._hear(sink, {"type": "hello"}, [])
    gone = threading.Event()
    for step in range(200):
        sink.frame({"run": TrackFrame(step=step, points=points(step, step + 1))})
    assert sink.messages_sent < 100
    for _ in range(200):
        if sink.messages[-1][0]["words"]["run"]["step"] == 199:
            gone.set()
            break
        time.sleep(0.05)
    assert gone.is_set()
    sink.close()


def test_hello_gets_everything(sink: Sink) -> None:
    for name, view in VIEWS.items():
        sink.frame({"run": TrackFrame(step=5, applied={"x": "1"}, points=points(0, 5), views={name: view})})
        sink.paint()
    sink.say("stopped", "error")
    sink.mark("run", 3, "x 1", "knob")
    sink._hear(sink, {"type": "hello"}, [])
    content, buffers = sink.messages[-1]
    assert content["whole"] and content["words"]["run"]["applied"] == {"x": "1"}
    assert content["message"] == {"text": "stopped", "level": "error"}
    assert [view["name"] for view in content["views"]] == list(VIEWS)
    assert len(content["setup"]["marks"]) == 1 and content["setup"]["tracks"][0]["id"] == "run"
    assert len(buffers) == 1 + sum(len(view["arrays"]) for view in content["views"])


def ask(sink: Sink, again: int) -> str:
    """Let the page ask for everything; return what the board's owner hears."""
    heard: list[str] = []
    sink.on_event(lambda event: heard.append(event["type"]))
    sink._hear(sink, {"type": "hello", "again": again}, [])
    return heard[-1]


def test_a_page_that_hears_no_answer_gets_a_new_board(sink: Sink) -> None:
    first = sink.model_id
    sink._clock.now += 10.0
    assert ask(sink, 0) == "hello" and sink.messages[-1][0]["whole"]
    sink._clock.now += 2.0
    assert ask(sink, 1) == "hello" and sink.model_id == first
    sink._clock.now += 2.0
    sent = sink.messages_sent
    assert ask(sink, 2) == "reopened" and sink.comm is not None and sink.model_id != first
    assert sink.messages_sent == sent  # the new page asks itself
    assert ask(sink, 0) == "hello" and sink.messages[-1][0]["whole"]
    sink.close()


def test_questions_that_waited_for_a_busy_kernel_are_one(sink: Sink) -> None:
    first = sink.model_id
    sink._clock.now += 60.0
    assert [ask(sink, again) for again in range(30)] == ["hello"] + 29 * ["alive"]
    assert sink.model_id == first and len(sink.messages) == 1


def test_before_the_page_speaks_every_message_holds_everything() -> None:
    sink = Sink([Chart("loss", "Loss", ("loss",))], [Track("run", "Run")])
    for step in range(3):
        sink.frame({"run": TrackFrame(step=step, points=points(step, step + 1))})
        sink.flush()
    assert all(content["whole"] for content, _ in sink.messages)


def test_marks_are_bounded_by_kind(sink: Sink) -> None:
    sink.mark("run", 0, "clone", "phase")
    for step in range(3 * MAX_MARKS):
        sink.mark("run", step, f"x {step}")
    kinds = [mark["kind"] for mark in sink._marks]
    assert kinds.count("knob") == MAX_MARKS and kinds.count("phase") == 1
    assert sink._marks[-1]["text"] == f"x {3 * MAX_MARKS - 1}"


def test_a_fork_starts_with_its_parents_curve_and_a_rewind_forgets_the_rest(sink: Sink) -> None:
    sink.frame({"run": TrackFrame(step=100, points=points(0, 100))})
    sink.mark("run", 90, "x 2")
    sink.add_track(Track("fork", "Fork", 1), parent="run")
    sink.truncate("run", 50)
    assert sink._series["run", "loss"].x[-1] == 50 and sink._series["fork", "loss"].x[-1] == 99
    assert [mark["track"] for mark in sink._marks] == ["fork"]
    sink.ghost("fork")
    assert sink._tracks["fork"].ghost
    sink.remove_track("fork")
    assert ("fork", "loss") not in sink._series
    sink.frame({"fork": TrackFrame(step=1, points=points(0, 1))})  # a late frame of a removed track
    assert ("fork", "loss") not in sink._series


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_encoded_as_words_and_bytes(name: str) -> None:
    words, arrays = encode_view(VIEWS[name])
    json.dumps(words)
    assert words["alt"] == VIEWS[name].alt and words["kind"] == type(VIEWS[name]).__name__
    assert [list(array.shape) for array in arrays] == [shape for _, shape in words["arrays"]]
    assert {array.dtype for array in arrays} <= {np.dtype(np.uint8), np.dtype(np.float32)}


def test_large_clouds_are_thinned() -> None:
    cloud = Points(title="", alt="", groups={"all": np.zeros((50_000, 2))})
    assert len(encode_view(cloud)[1][0]) <= board_module.MAX_CLOUD


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_is_drawn_as_a_picture(name: str) -> None:
    figure = draw_view(VIEWS[name])
    picture = to_png(figure)
    assert picture.startswith(b"\x89PNG") and 1_500 < len(picture) < 200_000
    assert VIEWS[name].alt.encode() in picture
    assert zlib.crc32(np.asarray(figure.canvas.buffer_rgba())) != 0
    assert np.asarray(figure.canvas.buffer_rgba())[..., :3].std() > 2


def test_curves_are_drawn_with_marks_and_ghosts() -> None:
    steps = np.arange(200)
    runs = {name: pd.DataFrame({"step": steps, "loss": np.exp(-steps / k)}) for name, k in (("run", 50), ("old", 80))}
    curves = [Curve("loss", "Loss", log=True), Curve(("loss", "missing"), "Both", "nats")]
    figure = draw_curves(runs, curves, marks=[(50, "x 2", "knob"), (0, "clone", "phase")], ghosts=["old"])
    assert len(to_png(figure)) > 5_000
    assert "matplotlib.pyplot" not in vars(board_module)
