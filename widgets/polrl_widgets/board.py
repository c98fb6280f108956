"""The moving half of the lab: learning curves, step counters, applied strengths and views in one thin widget.

A `Board` shows one or more tracks (a track is one run on the axes: a learner, a fork, a baseline, an earlier
run). It knows no learner. Whoever trains hands it a frame per redraw and it sends one small message: the new
points as bytes, the words that changed, the views that changed. The whole run stays in view with a bounded number
of points a curve, so that neither memory nor messages grow with the run. The signatures::

    Track(id, label, color=0, dash="solid", ghost=False)
    Chart(id, title, metrics, y_label="", log=False)
    TrackFrame(step, ups=None, state="", phase="", device="", applied={}, points={}, views={})

    board = Board(charts=[Chart, ...], tracks=[Track, ...], max_points=1000)
    board.frame({track_id: TrackFrame}, message=None, level="info") -> bool  # False: merged into the next
    board.ready -> bool                                # would a frame go out now (else spare the views)
    board.mark(track_id, step, text, kind="knob")      # "knob", "phase", "fork", "rewind"
    board.add_track(Track, parent=None)                # parent: begin with its curves (fork)
    board.truncate(track_id, step=-1)                  # forget what came later; -1 clears
    board.ghost(track_id); board.remove_track(track_id)
    board.say(message, level="info")                   # "info", "warning", "error"
    board.name_sliders(root, {css_class: words})       # accessible names below the element of class `root`
    board.on_event(callback)                           # callback({"type": "hello" | "painted", ...})
    board.flush()                                      # send what waits, whether or not the page keeps up
    board.last_seen, board.bytes_sent, board.messages_sent, board.close()

Every method may be called from any thread.
"""

from __future__ import annotations

import contextvars
import functools
import gzip
import importlib.util
import json
import pathlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import anywidget
import numpy as np
import numpy.typing as npt
import traitlets
from tsdownsample import MinMaxLTTBDownsampler

from polrl.core.views import Bars, Heatmap, Histogram, ImageGrid, Lines, Points, Tokens, View

from .static_views import GHOST, PALETTE

STATIC = pathlib.Path(__file__).parent / "static"
MAX_NEW_POINTS = 200  # of one curve in one message
MAX_CLOUD = 2000  # points of one group in a scatter view
MAX_MARKS = 60  # of one kind
MAX_IN_FLIGHT = 20  # messages that the page has not painted yet; it answers in time, see board.js
BYTES_PER_SECOND = 500_000  # Jupyter's server drops what exceeds a megabyte a second
PATIENCE = (0.25, 1.0)  # seconds: wait for a silent page at first and at most
DEAF_AFTER = 2  # questions that were answered, and yet asked again
ANSWER_TAKES = 1.0  # seconds that a page may need to take an answer in; it asks every two

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Track:
    """One run on the axes; `color` counts in the Okabe-Ito palette, `dash` is a dash style of plotly."""

    id: str
    label: str
    color: int = 0
    dash: str = "solid"
    ghost: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart of learning curves: which metrics share it, and whether its axis is logarithmic."""

    id: str
    title: str
    metrics: Sequence[str]
    y_label: str = ""
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class TrackFrame:
    """What is new on one track.

    Parameters
    ----------
    step : int
        The last step done.
    ups : float, optional
        Updates per second.
    state, phase, device : str
        Words: "running", "paused"; the learner's phase; where it trains.
    applied : mapping of str to str
        The knob values that the last step was trained with, as text.
    points : mapping of str to (steps, values)
        New points by metric; metrics that no chart shows and values that are not finite are passed over.
    views : mapping of str to View
        Views that changed, by name.
    """

    step: int
    ups: float | None = None
    state: str = ""
    phase: str = ""
    device: str = ""
    applied: Mapping[str, str] = field(default_factory=dict)
    points: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]] = field(default_factory=dict)
    views: Mapping[str, View] = field(default_factory=dict)

    def words(self) -> dict[str, Any]:
        """Return the part that is text."""
        ups = None if self.ups is None else float(self.ups)
        words = {"step": int(self.step), "ups": ups, "state": self.state, "phase": self.phase}
        return words | {"device": self.device, "applied": dict(self.applied)}


def thin(x: Floats, y: Floats, count: int) -> tuple[Floats, Floats]:
    """Return at most `count` points that keep the look of the curve, the first and the last among them."""
    if len(x) <= count:
        return x, y
    kept = MinMaxLTTBDownsampler().downsample(x, y, n_out=count)
    return x[kept], y[kept]


class Series:
    """One curve: the whole run in at most `2 * max_points` points, and how much of it the page has."""

    def __init__(self, max_points: int) -> None:
        self.max_points = max_points
        self.x, self.y = np.empty(0), np.empty(0)
        self.sent = 0
        self.reset = False

    def copy(self) -> Series:
        """Return a curve with the same points, none of which the page has."""
        twin = Series(self.max_points)
        twin.x, twin.y = self.x, self.y
        return twin

    def add(self, steps: npt.ArrayLike, values: npt.ArrayLike) -> None:
        """Append points, thinning what would be too many."""
        x, y = np.atleast_1d(np.asarray(steps, np.float64)), np.atleast_1d(np.asarray(values, np.float64))
        finite = np.isfinite(y)
        new = thin(
            np.concatenate([self.x[self.sent :], x[finite]]),
            np.concatenate([self.y[self.sent :], y[finite]]),
            2 * self.max_points if self.reset else MAX_NEW_POINTS,
        )
        self.x, self.y = (
            np.concatenate([self.x[: self.sent], new[0]]),
            np.concatenate([self.y[: self.sent], new[1]]),
        )
        if len(self.x) > 2 * self.max_points:
            self._replace(*thin(self.x, self.y, self.max_points))

    def truncate(self, step: float) -> None:
        """Forget the points after `step`."""
        kept = self.x <= step
        if not kept.all():
            self._replace(self.x[kept], self.y[kept])

    def _replace(self, x: Floats, y: Floats) -> None:
        self.x, self.y, self.sent, self.reset = x, y, 0, True

    def take(self, whole: bool) -> tuple[Floats, Floats, bool]:
        """Return the points that the page lacks, and whether they replace what it has."""
        start, reset = (0, True) if whole or self.reset else (self.sent, False)
        self.sent, self.reset = len(self.x), False
        return self.x[start:], self.y[start:], reset


def encode_view(view: View) -> tuple[dict[str, Any], list[npt.NDArray[Any]]]:
    """Return a view as words (JSON) and arrays (bytes) for the page."""
    words: dict[str, Any] = {"kind": type(view).__name__, "title": view.title, "alt": view.alt}
    arrays: dict[str, npt.NDArray[Any]] = {}
    match view:
        case ImageGrid():
            arrays = {"images": view.to_bytes()}
        case Bars():
            arrays = {name: np.asarray(group) for name, group in view.values.items()}
        case Histogram():
            arrays = {"": np.asarray(view.edges)} | {name: np.asarray(v) for name, v in view.counts.items()}
        case Lines():
            arrays = {"": np.asarray(view.x)} | {name: np.asarray(line) for name, line in view.y.items()}
        case Heatmap():
            arrays = {"values": np.asarray(view.values)}
        case Points():
            for name, group in view.groups.items():
                points = np.asarray(group)
                arrays[name] = points[:: -(-len(points) // MAX_CLOUD)] if len(points) else points
        case Tokens():
            words["lines"] = [list(line) for line in view.lines]
            arrays = {str(row): np.asarray(values) for row, values in enumerate(view.values)}
        case _:
            raise TypeError(f"the board can't draw a view of type {type(view).__name__}")
    for name in ("row_labels", "column_labels", "labels"):
        if hasattr(view, name):
            words[name] = list(getattr(view, name))
    for name in ("x_label", "y_label", "x_range", "y_range", "low", "high", "diverging", "log_x", "log_y"):
        if hasattr(view, name):
            words[name] = getattr(view, name)
    packed = [np.ascontiguousarray(a, a.dtype if a.dtype == np.uint8 else np.float32) for a in arrays.values()]
    words["arrays"] = [[name, list(a.shape)] for name, a in zip(arrays, packed, strict=True)]
    return words, packed


def _script(*names: str) -> str:
    """Return files as the one script, or style sheet, that a widget may have."""
    return "".join((STATIC / name).read_text(encoding="utf-8") for name in names)


class PlotlyLibrary(anywidget.AnyWidget):
    """Carries plotly.js to the page when somebody first points at a chart, once for all boards of the page."""

    _esm = _script("shelf.js", "library.js")
    code = traitlets.Bytes().tag(sync=True)
    _shelf: PlotlyLibrary | None = None
    _shelf_lock = threading.Lock()

    @classmethod
    def send_to_page(cls) -> None:
        """Send plotly.js to a page that asked for it."""
        with cls._shelf_lock:
            if cls._shelf is not None:
                cls._shelf.close()  # from before the page was loaded again
            cls._shelf = cls(code=_compressed_plotly())


@functools.cache
def _compressed_plotly() -> bytes:
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        raise ImportError("zooming needs plotly, which is not installed: pip install 'polrl[course]'")
    source = pathlib.Path(found.origin).parent / "package_data" / "plotly.min.js"
    return gzip.compress(source.read_bytes(), 6)


class Board(anywidget.AnyWidget):
    """Curves, counters, applied strengths and views of one or more runs, moving while they train.

    Parameters
    ----------
    charts : sequence of Chart
        Shown in this order.
    tracks : sequence of Track
        The runs to begin with.
    max_points : int
        A curve is thinned to this many points when twice as many have come together.
    timeline : bool
        True for a slider over the steps, which tells {"type": "rewind", "step": 40} when it is let go.
    """

    _esm = _script("shelf.js", "sketch.js", "board.js")
    _css = _script("board.css")  # text: where anywidget follows a file it keeps each widget that ever showed it

    def __init__(
        self,
        charts: Sequence[Chart],
        tracks: Sequence[Track] = (),
        *,
        max_points: int = 1000,
        timeline: bool = False,
    ) -> None:
        # ipykernel hands what the page says to the subshell that spoke last, and that one may be gone when a page is
        # loaded again: the board always speaks as the cell that made it, which belongs to the main shell.
        self._context = contextvars.copy_context()
        super().__init__()
        self._timeline = timeline
        self._hidden: set[str] = set()
        self.bytes_sent = 0
        self.messages_sent = 0
        self.last_seen: float | None = None
        self._charts = list(charts)
        self._metrics = {metric for chart in charts for metric in chart.metrics}
        self._tracks = {track.id: track for track in tracks}
        self._max_points = max_points
        self._series: dict[tuple[str, str], Series] = {}
        self._marks: list[dict[str, Any]] = []
        self._words: dict[str, dict[str, Any]] = {}
        self._views: dict[tuple[str, str], View] = {}
        self._message: dict[str, str] = {"text": "", "level": "info"}
        self._sliders: dict[str, Any] = {}
        self._events: list[Callable[[dict[str, Any]], None]] = []
        self._lock = threading.RLock()
        self._clock = time.monotonic
        self._painted = 0
        self._answered_at = -np.inf
        self._sent_at = self._credit_at = -np.inf
        self._credit = 0.0
        self._patience = PATIENCE[0]
        self._timer: threading.Timer | None = None
        self._changed = {"setup"}
        self._new_words: dict[str, dict[str, Any]] = {}
        self._new_views: set[tuple[str, str]] = set()
        self._new_marks: list[dict[str, Any]] = []
        self.on_msg(self._hear)

    # -- what the owner calls ------------------------------------------------------------------------------

    def frame(self, tracks: Mapping[str, TrackFrame], *, message: str | None = None, level: str = "info") -> bool:
        """Show what is new; one message, or none where the page has not painted the last ones yet.

        Parameters
        ----------
        tracks : mapping of str to TrackFrame
            By track id. A track that was removed or became a ghost meanwhile is passed over.
        message : str, optional
            Replaces the message line; "" empties it.
        level : {"info", "warning", "error"}

        Returns
        -------
        bool
            False if the frame was merged into the next one, which comes by itself.
        """
        with self._lock:
            for track_id, frame in tracks.items():
                if track_id not in self._tracks or self._tracks[track_id].ghost:
                    continue
                self._new_words[track_id] = self._words[track_id] = frame.words()
                for metric in self._metrics & frame.points.keys():
                    self._curve(track_id, metric).add(*frame.points[metric])
                for name, view in frame.views.items():
                    if name in self._hidden:
                        continue
                    self._views[track_id, name] = view
                    self._new_views.add((track_id, name))
            if message is not None:
                self._message = {"text": message, "level": level}
                self._changed.add("message")
            return self._pump()

    def say(self, message: str, level: str = "info") -> None:
        """Show a message (guard, errors); "" takes it away."""
        self.frame({}, message=message, level=level)

    def mark(self, track_id: str, step: int, text: str, kind: str = "knob") -> None:
        """Draw a thin line at a step in all charts; of each kind the newest sixty stay."""
        with self._lock:
            mark = {"track": track_id, "step": int(step), "text": text, "kind": kind}
            self._marks.append(mark)
            alike = [m for m in self._marks if m["kind"] == kind]
            if len(alike) > MAX_MARKS:
                self._marks.remove(alike[0])
            self._new_marks = [*self._new_marks, mark][-3 * MAX_MARKS :]
            self._pump()

    @property
    def charts(self) -> list[Chart]:
        """The charts, those that are hidden included."""
        return list(self._charts)

    def add_charts(self, charts: Sequence[Chart]) -> None:
        """Show more charts; one of a title that is there already adds its metrics to it."""
        with self._lock:
            for new in charts:
                places = {chart.title: place for place, chart in enumerate(self._charts)}
                if (place := places.get(new.title)) is None:
                    self._charts.append(replace(new, id=f"c{len(self._charts)}"))
                else:
                    metrics = tuple(dict.fromkeys((*self._charts[place].metrics, *new.metrics)))
                    self._charts[place] = replace(self._charts[place], metrics=metrics)
            self._metrics = {metric for chart in self._charts for metric in chart.metrics}
            self._setup_changed()

    def add_track(self, track: Track, parent: str | None = None) -> None:
        """Show one more run; a fork begins with the curves, marks and words of its `parent`."""
        with self._lock:
            self._tracks[track.id] = track
            if parent is not None:
                for (owner, metric), series in list(self._series.items()):
                    if owner == parent:
                        self._series[track.id, metric] = series.copy()
                self._marks += [m | {"track": track.id} for m in self._marks if m["track"] == parent]
                if parent in self._words:
                    self._new_words[track.id] = self._words[track.id] = dict(self._words[parent])
            self._setup_changed()

    def remove_track(self, track_id: str) -> None:
        """Take a run off the board with its curves, marks and views."""
        with self._lock:
            self._tracks.pop(track_id, None)
            self._words.pop(track_id, None)
            self._new_words.pop(track_id, None)
            self._series = {key: s for key, s in self._series.items() if key[0] != track_id}
            self._views = {key: v for key, v in self._views.items() if key[0] != track_id}
            self._new_views &= self._views.keys()
            self._marks = [m for m in self._marks if m["track"] != track_id]
            self._setup_changed()

    def ghost(self, track_id: str) -> None:
        """Keep a run as an earlier one: thin and grey, without header, marks and views."""
        with self._lock:
            self._tracks[track_id] = Track(**(asdict(self._tracks[track_id]) | {"ghost": True}))
            self._views = {key: v for key, v in self._views.items() if key[0] != track_id}
            self._new_views &= self._views.keys()
            self._marks = [m for m in self._marks if m["track"] != track_id]
            self._setup_changed()

    def truncate(self, track_id: str, step: int = -1) -> None:
        """Forget the points and marks of a track after `step`; all of them by default."""
        with self._lock:
            for (owner, _), series in self._series.items():
                if owner == track_id:
                    series.truncate(step)
            self._marks = [m for m in self._marks if m["track"] != track_id or m["step"] <= step]
            self._setup_changed()

    def hide(self, names: Collection[str]) -> None:
        """Leave these charts (by id) and views (by name) out; their curves are kept up to date."""
        with self._lock:
            self._hidden = set(names)
            self._views = {key: view for key, view in self._views.items() if key[1] not in self._hidden}
            self._new_views &= self._views.keys()
            self._setup_changed()

    def download(self, name: str, data: bytes, mime: str) -> None:
        """Let the page save a file."""
        self.send({"act": "download", "name": name, "mime": mime}, [data])

    def copy_text(self, text: str) -> None:
        """Put a text on the clipboard, where the page may."""
        self.send({"act": "copy", "text": text})

    def name_sliders(self, root: str, names: Mapping[str, str]) -> None:
        """Give the sliders below the element of class `root` accessible names, by their CSS class."""
        with self._lock:
            self._sliders = {"root": root, "names": dict(names)}
            self._setup_changed()

    def send(self, content: Any, buffers: list[Any] | None = None) -> None:
        """Send a message to the page, from wherever this is called in the name of the cell that made the board."""
        # A copy, because two threads may send at once and a context is entered by one at a time.
        self._context.copy().run(super().send, content, buffers)

    def on_event(self, callback: Callable[[dict[str, Any]], None]) -> None:
        """Call `callback` with what the page tells.

        {"type": "hello"}, {"type": "painted", "n": 12}, {"type": "alive"} of a hidden page, {"type": "gone"} and
        {"type": "back"} where the board was taken off the page and put there, {"type": "rewind", "step": 40} of
        the timeline. The board itself tells {"type": "reopened"}: whoever shows it has to send it once more.
        """
        self._events.append(callback)

    def flush(self) -> None:
        """Send what waits, whether or not the page keeps up."""
        with self._lock:
            if self._waiting():
                self._send_changes()

    @property
    def ready(self) -> bool:
        """True if a frame would be sent now, False if it would be merged into a later one."""
        with self._lock:
            return self._delay() <= 0

    def close(self) -> None:
        """Take the board off the page."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            super().close()

    # -- what goes to the page and when --------------------------------------------------------------------

    def _curve(self, track_id: str, metric: str) -> Series:
        return self._series.setdefault((track_id, metric), Series(self._max_points))

    def _forget_changes(self) -> None:
        self._changed, self._new_words, self._new_views, self._new_marks = set(), {}, set(), []

    def _setup_changed(self) -> None:
        self._changed.add("setup")
        self._pump()

    def _waiting(self) -> bool:
        lagging = any(series.reset or series.sent < len(series.x) for series in self._series.values())
        return bool(self._changed or self._new_words or self._new_views or self._new_marks or lagging)

    def _delay(self) -> float:
        """Seconds until the next message may go: at once, unless the page is behind or the line is full."""
        now = self._clock()
        behind = self.messages_sent - self._painted >= MAX_IN_FLIGHT
        return max(-self._refill(now) / BYTES_PER_SECOND, self._sent_at + self._patience - now if behind else 0.0)

    def _refill(self, now: float) -> float:
        """Return how many bytes may go out at once; below zero the line has to rest."""
        self._credit = min(BYTES_PER_SECOND / 2, self._credit + (now - self._credit_at) * BYTES_PER_SECOND)
        self._credit_at = now
        return self._credit

    def _pump(self) -> bool:
        """Send what waits if the page keeps up; else try again a little later."""
        if self.comm is None or not self._waiting():
            return False
        delay = self._delay()
        if delay <= 0:
            self._send_changes()
            return True
        if self._timer is None:
            self._timer = threading.Timer(delay, self._try_again)
            self._timer.daemon = True
            self._timer.start()
        return False

    def _try_again(self) -> None:
        with self._lock:
            self._timer = None
            self._pump()

    def _send_changes(self, whole: bool = False) -> None:
        whole = whole or self.last_seen is None  # a page that never spoke may have missed the beginning
        behind = self.messages_sent - self._painted >= MAX_IN_FLIGHT
        self._patience = min(2 * self._patience, PATIENCE[1]) if behind else PATIENCE[0]
        self.messages_sent += 1
        content, buffers = self._compose(whole)
        self._forget_changes()
        self.send(content, buffers)
        size = len(json.dumps(content)) + sum(map(len, buffers))
        self.bytes_sent += size
        self._sent_at = self._clock()
        self._credit = self._refill(self._sent_at) - size

    def _compose(self, whole: bool) -> tuple[dict[str, Any], list[bytes]]:
        """Return one message: everything (`whole`) or what changed since the last one."""
        content: dict[str, Any] = {"n": self.messages_sent, "whole": whole}
        setup = whole or "setup" in self._changed
        if setup:
            content["setup"] = {
                "charts": [asdict(chart) for chart in self._charts if chart.id not in self._hidden],
                "hidden": sorted(self._hidden),
                "timeline": self._timeline,
                "tracks": [asdict(track) for track in self._tracks.values()],
                "marks": self._marks,
                "sliders": self._sliders,
                "palette": PALETTE,
                "ghost": GHOST,
            }
        elif self._new_marks:
            content["marks"] = self._new_marks
        if whole or "message" in self._changed:
            content["message"] = self._message
        content["words"] = self._words if whole else self._new_words
        content["series"], points = [], []
        for (track_id, metric), series in self._series.items():
            x, y, reset = series.take(whole)
            if len(x) or reset:
                content["series"].append([track_id, metric, len(x), reset])
                points += [x, y]
        buffers = [np.concatenate(points).tobytes() if points else b""]
        content["views"] = []
        for track_id, name in [key for key in self._views if whole or key in self._new_views]:
            words, arrays = encode_view(self._views[track_id, name])
            content["views"].append({"track": track_id, "name": name, **words})
            buffers += [array.tobytes() for array in arrays]
        return content, buffers

    def _hear(self, _: Any, content: dict[str, Any], __: list[Any]) -> None:
        """Take a message from the page: it has come (hello) or has painted message n."""
        with self._lock:
            self.last_seen = self._clock()
            if content.get("type") == "hello":
                content = self._answer(int(content.get("again", 0)))
            elif content.get("type") == "painted":
                self._painted = max(self._painted, min(int(content["n"]), self.messages_sent))
                self._pump()
            elif content.get("type") == "library":  # packing it takes half a second: not in the way of the sliders
                threading.Thread(target=PlotlyLibrary.send_to_page, name="polrl-plotly", daemon=True).start()
        for callback in list(self._events):
            callback(content)

    def _answer(self, again: int) -> dict[str, Any]:
        """Send everything to a page that asks for it; return what that is to the board's owner."""
        now = self._clock()
        if again and now - self._answered_at < ANSWER_TAKES:  # asked while the kernel was busy, answered meanwhile
            return {"type": "alive"}
        self._answered_at = now
        self._painted = self.messages_sent
        if again >= DEAF_AFTER:
            self._reopen()
            return {"type": "reopened"}
        self._send_changes(whole=True)
        return {"type": "hello"}

    def _reopen(self) -> None:
        """Leave the model that the page has given up, and begin a new one with the same content."""
        super().close()
        self._model_id = None  # else the new one would have the old one's name
        self.open()
