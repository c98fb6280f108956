"""The folded panels of a lab: the tape, which pictures to show, baseline arms, and files to take away."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ipywidgets as widgets

from polrl.core.learner import Learner
from polrl.core.study import Study
from polrl.core.tape import Change

from .controls import format_value, lean

SHOWN_CHANGES = 200


def button(
    name: str, words: str, icon: str, tooltip: str, act: Callable[[], Any], layout: Mapping[str, str] | None = None
) -> widgets.Button:
    """Return a button of the CSS class polrl-NAME that takes its share of a row, if `layout` says nothing else."""
    layout = {"flex": "1 1 0", "width": "auto", "min_width": "0", "padding": "0 4px", **(layout or {})}
    made = lean(widgets.Button, description=words, icon=icon, tooltip=tooltip, layout=layout)
    made.add_class(f"polrl-{name}")
    made.on_click(lambda _: act())
    return made


class TapePanel:
    """What was changed when; saved, loaded, replayed, or copied as code.

    Parameters
    ----------
    acts : mapping of str to callable
        "save", "load" and "replay" take the file's name; "config" and "code" return lines of Python.
    name : str
        The file's name to begin with.
    """

    def __init__(self, acts: Mapping[str, Callable[..., Any]], name: str) -> None:
        self._rows = widgets.HTML().add_class("polrl-tape")
        self.file = widgets.Text(value=name, layout=widgets.Layout(width="auto"), tooltip="a file, beside the notebook")
        self.file.add_class("polrl-tape-file")
        self.code = widgets.Textarea(
            layout=widgets.Layout(width="auto", height="90px", display="none"), tooltip="the code, to be copied"
        ).add_class("polrl-tape-code")

        def with_file(act: str) -> Callable[[], Any]:
            return lambda: acts[act](self.file.value)

        def with_code(act: str) -> Callable[[], Any]:
            return lambda: self.show_code(acts[act]())

        rows = [
            [
                button("tape-save", "save", "save", "write the tape to the file", with_file("save")),
                button("tape-load", "load", "folder-open", "show what a file's tape says", with_file("load")),
                button("tape-replay", "replay", "repeat", "train it again from the file, exactly", with_file("replay")),
            ],
            [
                button("copy-config", "config as code", "copy", "the present settings", with_code("config")),
                button("copy-tape", "tape as code", "copy", "the whole run, change by change", with_code("code")),
            ],
        ]
        self.widget = widgets.VBox([self._rows, self.file, *map(widgets.HBox, rows), self.code])

    def show(self, changes: list[Change]) -> None:
        """List the changes of a run; nothing is sent where they are the same as before."""
        lines = "".join(
            f"<tr><td>{c.step:,}</td><td>{c.knob}</td><td>{format_value(c.value)}</td></tr>"
            for c in changes[-SHOWN_CHANGES:][::-1]
        )
        head = "<tr><th>step</th><th>knob</th><th>value</th></tr>"
        style = "max-height:150px;overflow:auto;line-height:1.4;font-size:12px"
        none = "no knob was turned so far"
        self._rows.value = f'<div style="{style}">{f"<table>{head}{lines}</table>" if changes else none}</div>'

    def show_code(self, code: str) -> None:
        """Show lines of Python to be copied."""
        self.code.value = code
        self.code.layout.display = ""


class ChoicePanel:
    """Check boxes, one a name.

    Parameters
    ----------
    names : mapping of str to str
        Key and words of each.
    checked : bool
        How all begin.
    on_change : callable
        Called with key and state.
    css : str
        Each box gets the class polrl-CSS-KEY.
    """

    def __init__(
        self, names: Mapping[str, str], checked: bool, on_change: Callable[[str, bool], Any], css: str
    ) -> None:
        self.boxes: dict[str, widgets.Checkbox] = {}
        for key, words in names.items():
            box = lean(widgets.Checkbox, value=checked, description=words, indent=False, layout={"width": "auto"})
            box.add_class(f"polrl-{css}-{key.replace(' ', '_')}")
            box.observe(lambda change, key=key: on_change(key, change["new"]), "value")
            self.boxes[key] = box
        self.widget = widgets.VBox(list(self.boxes.values()))

    def checked(self) -> set[str]:
        """Return the keys that are checked."""
        return {key for key, box in self.boxes.items() if box.value}


def arms_of(learners: Iterable[Learner[Any]]) -> dict[str, tuple[type[Learner[Any]], dict[str, Any]]]:
    """Return the arms of the learners' studies: name, class, and the settings in which the arms differ."""
    found: dict[str, tuple[type[Learner[Any]], dict[str, Any]]] = {}
    for kind in dict.fromkeys(type(learner) for learner in learners):
        study = getattr(sys.modules.get(kind.__module__), "study", None)
        if not isinstance(study, Study):
            continue
        every = list(study.arms.values())
        shared = {k: v for k, v in every[0].items() if all(k in arm and arm[k] == v for arm in every)} if every else {}
        for name, settings in study.arms.items():
            own = {key: value for key, value in settings.items() if key not in shared or len(every) == 1}
            found.setdefault(name, (own.pop("learner", study.learner), own))
    return found
