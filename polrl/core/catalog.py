"""The catalog: finds the methods by looking at files, without importing one (torch alone takes seconds)."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import io
import json
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polrl.core.errors import PolrlError, unknown_name
from polrl.core.files import find_asset

if TYPE_CHECKING:
    from polrl.core.learner import Learner
    from polrl.core.study import Study

PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Entry:
    """What is known of a method before it is imported.

    Attributes
    ----------
    slug, title : str
    chapter : str
        The chapter's package, such as "foundations".
    number : str
        The chapter's number, such as "01".
    arxiv : str
        The paper's number; "" for a baseline without a paper.
    path : Path or None
        The file; None while the method is planned.
    headline : str
        First sentence of the file.
    """

    slug: str
    title: str
    chapter: str
    number: str
    arxiv: str
    path: Path | None
    headline: str = ""

    @property
    def built(self) -> bool:
        """True if the method's file is there."""
        return self.path is not None

    @property
    def module(self) -> str:
        """The name to import."""
        return f"polrl.{self.chapter}.{self.slug}"

    @property
    def state(self) -> str:
        """One of "planned", "built", "claim shown", "claim not shown", "to be run again"."""
        if self.path is None:
            return "planned"
        result = stored_result(self.slug)
        if result is None:
            return "built"
        if result["fingerprint"] != fingerprint(self.path):
            return "to be run again"
        shown = sum(verdict["shown"] for verdict in result["verdicts"])
        if not result["verdicts"]:
            return "built"
        if shown == len(result["verdicts"]):
            return "claim shown"
        return f"claim shown in part ({shown} of {len(result['verdicts'])})" if shown else "claim not shown"


def syllabus() -> list[dict[str, Any]]:
    """Return the course's chapters with their methods, built or planned."""
    return json.loads((PACKAGE / "syllabus.json").read_text(encoding="utf-8"))


@functools.cache
def catalog() -> dict[str, Entry]:
    """Return every method of the course and every baseline beside them, by slug, in the course's order."""
    entries: dict[str, Entry] = {}
    for chapter in syllabus():
        package, number = chapter["package"], chapter["number"]
        files = {path.stem: path for path in sorted((PACKAGE / package).glob("[!_]*.py"))}
        for method in chapter["methods"]:
            path = files.pop(method["slug"], None)
            entries[method["slug"]] = Entry(
                method["slug"], method["title"], package, number, method["arxiv"], path, _headline(path)
            )
        for slug, path in files.items():
            headline = _headline(path)
            entries[slug] = Entry(slug, headline.rstrip("."), package, number, "", path, headline)
    return entries


def _headline(path: Path | None) -> str:
    if path is None:
        return ""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = doc.split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.)\s", first)[0]


def find_method(slug: str) -> Entry:
    """Return the entry of a method.

    Raises
    ------
    UnknownNameError
        If there is none of that name; the nearest names are suggested.
    """
    entries = catalog()
    if slug not in entries:
        raise unknown_name("method", slug, entries)
    return entries[slug]


def _module(slug: str) -> Any:
    entry = find_method(slug)
    if not entry.built:
        built = ", ".join(e.slug for e in catalog().values() if e.built)
        raise PolrlError(f"{slug} is planned, but not built yet; built are: {built}")
    return importlib.import_module(entry.module)


def load_method(slug: str) -> type[Learner[Any]]:
    """Import a method's file and return its learner class."""
    from polrl.core.learner import Learner

    module = _module(slug)
    own = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Learner)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    if len(own) != 1:
        raise PolrlError(f"{module.__name__} must define one public learner, found {[c.__name__ for c in own]}")
    return own[0]


def load_study(slug: str) -> Study:
    """Import a method's file and return its study."""
    study = getattr(_module(slug), "study", None)
    if study is None:
        raise PolrlError(f"{slug} states no study")
    return study


def fingerprint(path: Path) -> str:
    """Return a digest of a Python file's code: comments, docstrings and white space (but indentation) do not count."""
    source = path.read_text(encoding="utf-8")
    drop: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            drop.update(range(body[0].lineno, (body[0].end_lineno or 0) + 1))  # type: ignore[index]
    lines = source.splitlines()
    blocks: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column]
        elif token.type in (tokenize.INDENT, tokenize.DEDENT):
            blocks[row] = blocks.get(row, "") + ("{" if token.type == tokenize.INDENT else "}")
    code = "".join(blocks.get(n, "") + ("" if n in drop else line) for n, line in enumerate(lines, 1))
    return hashlib.sha256("".join(code.split()).encode()).hexdigest()[:16]


def stored_result(slug: str) -> dict[str, Any] | None:
    """Return the kept result of a method's full study, `course/results/<slug>.json`, or None."""
    try:
        text = find_asset(f"course/results/{slug}.json").read_text(encoding="utf-8")
        return json.loads(text)
    except (FileNotFoundError, ValueError):
        return None
