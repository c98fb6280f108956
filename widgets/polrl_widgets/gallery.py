"""The course at a glance: every method, built or planned, with its chapter and state."""

from __future__ import annotations

import html

from polrl.core.catalog import Entry, catalog, syllabus
from polrl.core.files import find_asset


class Gallery:
    """A table of all methods, a chapter a block; shows itself in a notebook."""

    def __repr__(self) -> str:
        return "\n".join(f"{e.number} {e.slug}: {e.state}" for e in catalog().values())

    def _repr_html_(self) -> str:
        blocks = []
        for chapter in syllabus():
            entries = [entry for entry in catalog().values() if entry.chapter == chapter["package"]]
            rows = "".join(_row(entry) for entry in entries)
            blocks.append(
                f"<tr><th colspan='3' style='text-align:left;padding-top:1em'>"
                f"{chapter['number']} {html.escape(chapter['title'])}</th></tr>{rows}"
            )
        return f"<table style='text-align:left'>{''.join(blocks)}</table>"


def _row(entry: Entry) -> str:
    title = html.escape(entry.title)
    link = _notebook(entry)
    name = f"<a href='{link}'>{title}</a>" if link else title
    faint = "" if entry.built else " style='opacity:.6'"
    paper = f"<a href='https://arxiv.org/abs/{entry.arxiv}'>arXiv {entry.arxiv}</a>" if entry.arxiv else ""
    cells = (name, html.escape(entry.state), paper)
    return f"<tr{faint}>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells) + "</tr>"


def _notebook(entry: Entry) -> str:
    """Return the path of a method's notebook, from the course's folder; "" if there is none."""
    try:
        course = find_asset("course")
    except FileNotFoundError:
        return ""
    found = sorted(course.glob(f"*/[0-9][0-9]_{entry.slug}.ipynb"))
    return found[0].relative_to(course).as_posix() if found else ""
