"""The course at a glance: every method, built or planned, with its picture, what it regularizes, and its state.

In a live notebook the pictures stand in the table. Where an executed notebook is only read (GitHub strips pictures out
of HTML), one picture a chapter stands above a table of words.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from polrl.core.catalog import Entry, catalog, kinds, syllabus
from polrl.core.errors import unknown_name
from polrl.core.files import find_asset

from .glyphs import GLYPHS, HEIGHT, PLAIN, WIDTH, Glyph
from .static_views import EDGE, INK, MUTED, new_figure, to_png

COLUMNS = 6  # tiles in a row of a picture
PER_INCH = 37.5  # units of a glyph
INLINE = 96  # pixels: the width of a picture in a table
TILE = (60, 57)  # a glyph with its words below, in such units
MARKS = {
    "planned": "○",
    "built": "●",
    "claim shown in part": "◐",
    "claim shown": "✓",
    "claim not shown": "✗",
    "to be run again": "↻",
}
LEFT = "style='text-align:left'"


class Gallery:
    """A table of the course's methods, a chapter a block; shows itself in a notebook.

    Parameters
    ----------
    chapter : str, optional
        Only this chapter, such as "offline"; all by default.
    kind : str, optional
        Only methods of this kind of regularizer, such as "kl".
    built : bool, optional
        Only what is built.

    Raises
    ------
    UnknownNameError
        If there is no such chapter or kind; the nearest names are suggested.
    """

    def __init__(self, chapter: str = "", kind: str = "", built: bool = False) -> None:
        chapters = [each["package"] for each in syllabus()]
        titles = {each["name"]: each["title"] for each in kinds()["kinds"]}
        if chapter and chapter not in chapters:
            raise unknown_name("chapter", chapter, chapters)
        if kind and kind not in titles:
            raise unknown_name("kind", kind, titles)
        self.titles = titles
        self.entries = [
            entry
            for entry in catalog().values()
            if chapter in ("", entry.chapter) and (not kind or kind in entry.kinds) and (entry.built or not built)
        ]
        self.states = {entry.slug: state_words(entry) for entry in self.entries}  # each is a digest of a file

    def __repr__(self) -> str:
        return "\n".join(f"{entry.number} {entry.slug}: {self.states[entry.slug]}" for entry in self.entries)

    def _repr_html_(self) -> str:
        blocks = (heading + self._table(entries, pictures=True) for heading, entries in self._chapters())
        return self._summary() + "".join(blocks)

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, Image, display

        from .lab import front_end

        if front_end() == "live":
            display(HTML(self._repr_html_()))
            return
        display(HTML(self._summary()))
        for heading, entries in self._chapters():
            tiles = [(words(entry), self.states[entry.slug], entry_picture(entry)) for entry in entries]
            said = "; ".join(f"{name}, {state}" for name, state, _ in tiles)
            alt = f"A small picture for each method: {said}."
            display(HTML(heading), Image(sheet(tiles), alt=alt, width=sheet_width(tiles)))
            display(HTML(self._table(entries, pictures=False)))

    def _chapters(self) -> Iterable[tuple[str, list[Entry]]]:
        """Give each chapter's heading with its entries, without the chapters that have none."""
        for chapter in syllabus():
            entries = [entry for entry in self.entries if entry.chapter == chapter["package"]]
            title = html.escape(f"{chapter['number']} {chapter['title']}")
            overview = _course_file(f"{chapter['number']}_{chapter['package']}/00_overview.ipynb")
            if entries:
                yield f"<h3>{_linked(title, overview)}</h3>", entries

    def _summary(self) -> str:
        """Say how many methods there are and what became of them."""
        methods = [entry.slug for entry in self.entries if not entry.baseline]
        states = Counter(_plain(self.states[slug]) for slug in methods)
        counts = ", ".join(f"{MARKS[state]} {state} {states[state]}" for state in MARKS if states[state])
        more = len(self.entries) - len(methods)
        baselines = f"; beside them {more} baseline{'s' * (more > 1)}" if more else ""
        return f"<p>{len(methods)} methods: {counts}{baselines}.</p>" if self.entries else "<p>No method.</p>"

    def _table(self, entries: Sequence[Entry], *, pictures: bool) -> str:
        headings = ("", "method", "what it regularizes", "kinds", "state", "paper")[not pictures :]
        head = "".join(f"<th {LEFT}>{heading}</th>" for heading in headings)
        rows = "".join(self._row(entry, pictures) for entry in entries)
        return f"<table {LEFT}><tr>{head}</tr>{rows}</table>"

    def _row(self, entry: Entry, pictures: bool) -> str:
        title = _linked(html.escape(entry.title), notebook(entry))
        badges = " ".join(badge(kind, self.titles.get(kind, "")) for kind in entry.kinds)
        number = html.escape(entry.arxiv)
        paper = f"<a href='https://arxiv.org/abs/{number}'>arXiv\xa0{number}</a>" if number else ""
        state = html.escape(f"{_mark(self.states[entry.slug])}\xa0{self.states[entry.slug]}".strip())
        says = html.escape(entry.regularizes or "the plain method that others of its chapter are compared with")
        cells = [f"{title}<br><code>{html.escape(entry.slug)}</code>", says, badges, state, paper]
        if pictures:
            cells.insert(0, _inline(entry))
        return "<tr>" + "".join(f"<td {LEFT}>{cell}</td>" for cell in cells) + "</tr>"


# ---- words -----------------------------------------------------------------------------------------------------------


def words(entry: Entry) -> str:
    """Return a method's short name in words."""
    return entry.slug.replace("_", " ")


def badge(kind: str, title: str = "") -> str:
    """Return a kind as a badge; a `code` element, which every page that strips styles still sets off."""
    hint = f" title='{html.escape(title, quote=True)}'" if title else ""
    return f"<code{hint}>{html.escape(kind.replace('_', '-'))}</code>"


def method_link(entry: Entry) -> str:
    """Return a method's short name as HTML, linked to its notebook if there is one."""
    return _linked(html.escape(words(entry)), notebook(entry))


def notebook(entry: Entry) -> str:
    """Return the path of a method's notebook, from the course's folder; "" if there is none."""
    try:
        course = find_asset("course")
    except FileNotFoundError:
        return ""
    found = sorted(course.glob(f"*/[0-9][0-9]_{entry.slug}.ipynb"))
    return found[0].relative_to(course).as_posix() if found else ""


def state_words(entry: Entry) -> str:
    """Return a method's state; a baseline says that it is one."""
    return f"baseline, {entry.state}" if entry.baseline else entry.state


def _plain(state: str) -> str:
    """Return the words of a state without its figures."""
    return state.removeprefix("baseline, ").split(" (")[0]


def _mark(state: str) -> str:
    return MARKS.get(_plain(state), "")


def _linked(text: str, path: str) -> str:
    return f"<a href='{html.escape(path, quote=True)}'>{text}</a>" if path else text


def _course_file(path: str) -> str:
    """Return the path if the course has that file, else ""."""
    try:
        find_asset(f"course/{path}")
    except FileNotFoundError:
        return ""
    return path


# ---- pictures --------------------------------------------------------------------------------------------------------


def glyph(entry: Entry) -> Glyph:
    """Return the glyph of a method's first kind; a plain one if it has none."""
    return next((GLYPHS[kind] for kind in entry.kinds if kind in GLYPHS), PLAIN)


def thumbnail(entry: Entry) -> Path | None:
    """Return the small picture of a built method, made by `course/thumbnails.py`; None if there is none."""
    if not entry.built:
        return None
    try:
        return find_asset(f"course/pictures/thumbnails/{entry.slug}.png")
    except FileNotFoundError:
        return None


def entry_picture(entry: Entry) -> Path | Glyph:
    """Return a method's picture: its thumbnail if it has one, else the glyph of its kind."""
    return thumbnail(entry) or glyph(entry)


def _inline(entry: Entry) -> str:
    """Return a method's picture as an element of a live page, in a box that a narrow table does not squeeze."""
    return f"<div style='width:{INLINE}px'>{_element(entry)}</div>"


def _element(entry: Entry) -> str:
    path = thumbnail(entry)
    if path is None:
        return glyph(entry).svg(entry.kinds[0].replace("_", "-") if entry.kinds else "", INLINE)
    data = path.read_bytes()
    alt = html.escape(_description(data) or f"a view of {words(entry)}", quote=True)
    return f"<img width='{INLINE}' alt='{alt}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"


def _description(png: bytes) -> str:
    """Return the words that a PNG carries for people who can't see it."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return str(image.info.get("Description", ""))


def sheet(tiles: Sequence[tuple[str, str, Path | Glyph]]) -> bytes:
    """Draw pictures side by side, each with a name and a line below it, as a PNG of few colours.

    Parameters
    ----------
    tiles : sequence of (str, str, Path or Glyph)
        Name, line below it ("" for none), and a glyph or the path of a PNG.
    """
    columns = min(len(tiles), COLUMNS)
    rows = -(-len(tiles) // columns)
    figure = new_figure(columns * TILE[0] / PER_INCH, rows * TILE[1] / PER_INCH)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, columns * TILE[0]), ylim=(rows * TILE[1], 0), autoscale_on=False)
    axes.set_axis_off()
    for place, (name, below, picture) in enumerate(tiles):
        left, top = place % columns * TILE[0], place // columns * TILE[1]
        _place(axes, picture, left + (TILE[0] - WIDTH) / 2, top + 2)
        lines = textwrap.wrap(name, 23)
        center, mark = left + TILE[0] / 2, _mark(below)
        axes.text(center, top + 37, "\n".join(lines), ha="center", va="top", fontsize=8, color=INK)
        words_below = f"{mark} {below}".strip()
        axes.text(center, top + 38 + 5.6 * len(lines), words_below, ha="center", va="top", fontsize=6.8, color=MUTED)
    glyphs_only = all(isinstance(picture, Glyph) for _, _, picture in tiles)
    return to_png(figure, 48 if glyphs_only else 96)


def sheet_width(tiles: Sequence[object]) -> int:
    """Return the width of a picture of so many tiles on a page, in pixels of 96 an inch."""
    return round(min(len(tiles), COLUMNS) * TILE[0] / PER_INCH * 96)


def _place(axes: Any, picture: Path | Glyph, left: float, top: float) -> None:
    """Put a glyph or a PNG into a box of the size of a glyph."""
    if isinstance(picture, Glyph):
        picture.draw(axes, (left, top), unit=72 / PER_INCH)
        return
    from matplotlib.image import imread
    from matplotlib.patches import Rectangle

    box = (left, left + WIDTH, top + HEIGHT, top)
    axes.imshow(imread(picture), extent=box, aspect="auto", interpolation="antialiased")
    axes.add_artist(Rectangle((left, top), WIDTH, HEIGHT, fill=False, edgecolor=EDGE, linewidth=0.8))
