"""The controls of one run: a slider for each knob, and the structural settings in a folded panel."""

from __future__ import annotations

import contextlib
import functools
import html
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import ipywidgets as widgets
import traitlets

from polrl.core.knobs import Config, Knob
from polrl.core.run import ANSWER_SECONDS

W = TypeVar("W", bound=widgets.DOMWidget)
NUDGES = 100  # arrow-key steps over a slider's travel


def format_value(value: Any) -> str:
    """Write a knob's value so that it reads back: 0.5, 1e-04, True, lse."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


_SHARED: set[widgets.Widget] = set()  # layouts and styles, which outlive what wears them


@functools.cache
def _shared(kind: type[widgets.Widget], **traits: str) -> Any:
    made = kind(**traits)
    _SHARED.add(made)
    return made


def lean(kind: type[W], *arguments: Any, layout: Mapping[str, str] | None = None, **traits: Any) -> W:
    """Make a widget that shares layout and style with all that want the same: each costs the page as much as a widget.

    Neither may be changed afterwards.
    """
    if style := kind.class_traits().get("style"):
        traits["style"] = _shared(style.klass)
    return kind(*arguments, layout=_shared(widgets.Layout, **(layout or {})), **traits)


def close_whole(root: widgets.Widget) -> None:
    """Close a widget and all that is in it; ipywidgets would keep the parts, and show each page all of them."""
    parts = [*getattr(root, "children", ()), *(getattr(root, name, None) for name in ("layout", "style"))]
    root.close()
    for part in parts:
        if isinstance(part, widgets.Widget) and part not in _SHARED:
            close_whole(part)


def folded(makers: Mapping[str, Callable[[], widgets.Widget]]) -> widgets.Accordion:
    """Return folded panels by title; each is made when it is first opened, for a page takes its time over widgets."""
    seats = [lean(widgets.VBox) for _ in makers]
    accordion = lean(widgets.Accordion, seats, titles=tuple(makers), selected_index=None)

    def opened(change: dict[str, Any]) -> None:
        place = change["new"]
        if place is not None and not seats[place].children:
            seats[place].children = (list(makers.values())[place](),)

    accordion.observe(opened, "selected_index")
    return accordion


# ipywidgets sends each move back to the page, for other pages that show the same slider: one message in four, and it
# goes before the move is acted upon. The value beside the slider tells the other pages as well.
class _FloatSlider(widgets.FloatSlider):
    value = traitlets.CFloat(0.0).tag(sync=True, echo_update=False)


class _IntSlider(widgets.IntSlider):
    value = traitlets.CInt(0).tag(sync=True, echo_update=False)


class KnobControl:
    """One knob: its name, a slider, the value to type, and the way back to the default.

    Parameters
    ----------
    knob : Knob
    config : Config
        Where the present value and bounds that depend on structure are read.
    on_change : callable
        Called with name and value when a person moves the control.
    """

    def __init__(self, knob: Knob, config: Config, on_change: Callable[[str, Any], None]) -> None:
        self.knob = knob
        self._config = config
        self._on_change = on_change
        self._quiet = threading.local()  # both threads show values, and each hears its own
        self._box_due = math.inf
        self._value = getattr(config, knob.name)
        self._input, self._box = self._make()
        words = f"back to the default, {format_value(knob.default)}"
        reset = lean(widgets.Button, description="↺", tooltip=words, layout={"width": "30px", "padding": "0"})
        reset.add_class("polrl-default").add_class(f"polrl-default-{knob.name}")
        reset.on_click(lambda _: self._moved(knob.default))
        row = lean(widgets.HBox, [w for w in (self._input, self._box, reset) if w is not None])
        parts = [self._label(), row]
        if knob.first and (knob.at_low or knob.at_high):
            parts.append(self._ends())
        self.widget = lean(widgets.VBox, parts, layout={"margin": "0 0 4px 0"}).add_class("polrl-knob")

    def describe(self) -> str:
        """Say in words what the knob is and what its ends do, as tooltip and accessible name."""
        knob = self.knob
        words = [f"{knob.name}{f' ({knob.unit})' if knob.unit else ''}: {knob.help}" if knob.help else knob.name]
        words.append(knob.allowed(self._config))
        words += [f"low: {knob.at_low}"] * bool(knob.at_low) + [f"high: {knob.at_high}"] * bool(knob.at_high)
        return "; ".join(words)

    def show(self, value: Any) -> None:
        """Show a value without reporting it as moved by hand."""
        self._value, self._box_due = value, math.inf
        with self._quietly():
            if self.knob.kind in ("bool", "choice") or not self._by_position:
                self._input.value = value
            else:
                self._input.value = self.knob.to_position(value, self._config)
            if self._box is not None:
                self._box.value = value

    def settle(self, now: float) -> None:
        """Bring the typed value up to a slider that was moved a moment ago; `now` is of time.monotonic."""
        if now >= self._box_due:
            self._box_due = math.inf
            if self._box is not None:
                with self._quietly():
                    self._box.value = self._value

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        self._quiet.now = True
        try:
            yield
        finally:
            self._quiet.now = False

    def _heard(self) -> bool:
        return not getattr(self._quiet, "now", False)

    @property
    def _by_position(self) -> bool:
        return self.knob.kind == "float" and self.knob.scale != "linear"

    def _make(self) -> tuple[Any, Any]:
        knob, wide = self.knob, {"flex": "1 1 60px", "width": "auto", "min_width": "60px"}
        shared: dict[str, Any] = {"layout": wide, "description": "", "tooltip": self.describe()}
        if knob.kind == "bool":
            made = lean(widgets.Checkbox, value=self._value, indent=False, **shared)
        elif knob.kind == "choice":
            made = lean(widgets.Dropdown, options=knob.options, value=self._value, **shared)
        else:
            low, high = knob.bounds(self._config)
            shared |= {"readout": False, "continuous_update": True}
            if knob.kind == "int":
                step = 2 if knob.odd else knob.step
                start = int(low) + (1 - int(low) % 2 if knob.odd else 0)
                made = lean(_IntSlider, min=start, max=int(high), step=step, value=self._value, **shared)
            elif self._by_position:
                place = knob.to_position(self._value, self._config)
                made = lean(_FloatSlider, min=0.0, max=1.0, step=1 / (2 * NUDGES), value=place, **shared)
            else:
                made = lean(_FloatSlider, min=low, max=high, step=(high - low) / NUDGES, value=self._value, **shared)
        made.add_class(f"polrl-knob-{knob.name}")
        made.observe(self._slid, "value")
        box = None
        if knob.kind in ("float", "int"):
            kind = widgets.FloatText if knob.kind == "float" else widgets.IntText
            box = lean(kind, value=self._value, continuous_update=False, layout={"width": "74px"})
            box.add_class(f"polrl-value-{knob.name}")
            box.observe(self._typed, "value")
        return made, box

    def _label(self) -> widgets.HTMLMath:
        knob = self.knob
        symbol = f" ${knob.symbol}$" if knob.symbol else ""
        paper = f' <span class="polrl-paper">paper: {format_value(knob.paper)}</span>' if knob.paper is not None else ""
        name = knob.name.replace("_", " ")
        words = html.escape(self.describe(), quote=True)
        label = f'<span class="polrl-name" title="{words}">{name}{symbol}</span>{paper}'
        return lean(widgets.HTMLMath, label)

    def _ends(self) -> widgets.HTML:
        low, high = html.escape(self.knob.at_low), html.escape(self.knob.at_high)
        style = "display:flex;justify-content:space-between;gap:1em;line-height:1.25;font-size:11px;opacity:.75"
        words = f'<span>{low}</span><span style="text-align:right">{high}</span>'
        return lean(widgets.HTML, f'<div class="polrl-ends" style="{style}">{words}</div>')

    def _slid(self, change: dict[str, Any]) -> None:
        if not self._heard():
            return
        value, slider = change["new"], self._input
        if self._by_position or self.knob.kind == "float":
            # The page rounds a slider to its step and sends that back: only a real move may turn the knob.
            now = self.knob.to_position(self._value, self._config) if self._by_position else self._value
            if abs(value - now) < 0.6 * slider.step:
                return
        if self._by_position:
            value = self.knob.from_position(value, self._config)
        elif self.knob.kind == "float":
            low, high = self.knob.bounds(self._config)
            value = min(high, max(low, round(value, 10)))  # the slider's own sums end in ...0000004
        self._moved(value, by_slider=True)

    def _typed(self, change: dict[str, Any]) -> None:
        if self._heard():
            self._moved(change["new"])

    def _moved(self, value: Any, by_slider: bool = False) -> None:
        try:
            value = self.knob.check(value, self._config)
        except ValueError:
            self._on_change(self.knob.name, value)  # the run refuses it with the right words
            self.show(self._value)
            return
        self._on_change(self.knob.name, value)  # first: what follows are messages to the page
        if by_slider and self._box is not None:
            self._value, self._box_due = value, time.monotonic() + ANSWER_SECONDS
        else:
            self.show(value)


class StructurePanel:
    """The settings that need a new run, folded away, with the button that starts one.

    Parameters
    ----------
    config : Config
    on_start : callable
        Called with the settings as a dict when a person asks to start again.
    """

    def __init__(self, config: Config, on_start: Callable[[dict[str, Any]], None]) -> None:
        self._config = config
        self._on_start = on_start
        self._fields: dict[str, widgets.Text] = {}
        self.widget = folded({"structure: needs a new run": self._make}).add_class("polrl-structure")

    def _make(self) -> widgets.VBox:
        config = self._config
        for name in type(config).structure():
            value = getattr(config, name)
            text = value if isinstance(value, str) else json.dumps(value)
            field = type(config).model_fields[name]
            self._fields[name] = widgets.Text(
                value=text,
                description=name.replace("_", " "),
                tooltip=field.description or name,
                style={"description_width": "130px"},
                layout=widgets.Layout(width="auto"),
            )
        start = widgets.Button(description="start again", icon="refresh", tooltip="a new run with these settings")
        start.add_class("polrl-restart")
        start.on_click(lambda _: self._start())
        return widgets.VBox([*self._fields.values(), start])

    def _start(self) -> None:
        values: dict[str, Any] = {}
        for name, field in self._fields.items():
            try:
                values[name] = json.loads(field.value)
            except ValueError:
                values[name] = field.value
        self._on_start(values)
