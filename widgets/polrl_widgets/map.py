"""Which method do I need: from what one sees, over the kinds of regularizer, to the methods."""

from __future__ import annotations

import html
from typing import Any

from polrl.core.catalog import Entry, catalog, kinds

from .gallery import badge, method_link, notebook, sheet, sheet_width, words
from .glyphs import GLYPHS


class Symptoms:
    """A table from what goes wrong to the kinds of regularizer and the methods that answer it.

    A method stands in a symptom's row once, with the first of the row's kinds that it has.
    """

    def __init__(self) -> None:
        self.rows = [(symptom, answers(symptom)) for symptom in kinds()["symptoms"]]

    def __repr__(self) -> str:
        return "\n".join(
            f"{symptom['sees']} {kind}: {', '.join(words(entry) for entry in entries)}"
            for symptom, answered in self.rows
            for kind, entries in answered.items()
        )

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        display(HTML(self._repr_html_()))

    def _repr_html_(self) -> str:
        left = "style='text-align:left;vertical-align:top'"
        titles = {kind["name"]: kind["title"] for kind in kinds()["kinds"]}
        rows = []
        for symptom, answered in self.rows:
            lines = (
                f"{badge(kind, titles[kind])} {', '.join(method_link(entry) for entry in entries)}"
                for kind, entries in answered.items()
            )
            cells = (f"<b>{html.escape(symptom['sees'])}</b>", html.escape(symptom["why"]), "<br>".join(lines))
            rows.append("<tr>" + "".join(f"<td {left}>{cell}</td>" for cell in cells) + "</tr>")
        headings = ("what you see", "what is going on", "kinds, and methods that use them")
        head = "".join(f"<th {left}>{heading}</th>" for heading in headings)
        return f"<table style='text-align:left'><tr>{head}</tr>{''.join(rows)}</table>"


def answers(symptom: dict[str, Any]) -> dict[str, list[Entry]]:
    """Return the methods that answer a symptom, by kind, in the order of the symptom's kinds.

    Parameters
    ----------
    symptom : dict
        One of the symptoms of `polrl.core.catalog.kinds()`.
    """
    found: dict[str, list[Entry]] = {kind: [] for kind in symptom["kinds"]}
    for entry in catalog().values():
        if symptom["name"] in entry.helps:
            kind = next((kind for kind in found if kind in entry.kinds), None)
            if kind is not None:
                found[kind].append(entry)
    return {kind: entries for kind, entries in found.items() if entries}


class Kinds:
    """The kinds of regularizer with their terms, their ends and their methods, a family a block."""

    def __init__(self) -> None:
        known = kinds()
        self.kinds = known["kinds"]
        self.families = {family["name"]: family["title"] for family in known["families"]}

    def __repr__(self) -> str:
        return "\n".join(f"{kind['name']}: {kind['does']}" for kind in self.kinds)

    def _repr_markdown_(self) -> str:
        blocks = []
        for family, title in self.families.items():
            rows = "\n".join(_kind_row(kind) for kind in self.kinds if kind["family"] == family)
            head = "| kind | the term | what it does | too weak | too strong | methods |\n|:--|:--|:--|:--|:--|:--|"
            blocks.append(f"#### {title}\n\n{head}\n{rows}")
        return "\n\n".join(blocks)

    def _ipython_display_(self) -> None:
        from IPython.display import Image, Markdown, display

        tiles = [(kind["title"], "", GLYPHS[kind["name"]]) for kind in self.kinds if kind["name"] in GLYPHS]
        alt = "; ".join(f"{title}: {glyph.alt}" for title, _, glyph in tiles)
        display(Image(sheet(tiles), alt=f"A glyph for each kind of regularizer. {alt}.", width=sheet_width(tiles)))
        display(Markdown(self._repr_markdown_()))


def _kind_row(kind: dict[str, str]) -> str:
    methods = ", ".join(_markdown_link(entry) for entry in catalog().values() if kind["name"] in entry.kinds)
    name = kind["name"].replace("_", "-")
    title, term = f"**{kind['title']}** `{name}`", f"${kind['term']}$"
    cells = (title, term, kind["does"], kind["weak"], kind["strong"], methods)
    return f"| {' | '.join(cells)} |"


def _markdown_link(entry: Entry) -> str:
    path = notebook(entry)
    return f"[{words(entry)}]({path})" if path else words(entry)
