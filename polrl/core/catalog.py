"""The catalog: finds the methods by looking at files, without importing one (torch alone takes seconds)."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import io
import json
import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polrl.core.errors import PolrlError, unknown_name
from polrl.core.files import find_asset, from_json

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
        The chapter's package, such as "foundations"; "" for a file of one's own, outside polrl.
    number : str
        The chapter's number, such as "01".
    arxiv : str
        The paper's number; "" for a baseline without a paper.
    path : Path or None
        The file; None while the method is planned.
    headline : str
        First sentence of the file.
    regularizes : str
        One sentence: what the method regularizes; "" for a baseline.
    kinds, helps : tuple of str
        Names of the kinds of regularizer it uses and of the symptoms it answers, from `kinds.json`.
    """

    slug: str
    title: str
    chapter: str
    number: str
    arxiv: str
    path: Path | None
    headline: str = ""
    regularizes: str = ""
    kinds: tuple[str, ...] = ()
    helps: tuple[str, ...] = ()

    @property
    def baseline(self) -> bool:
        """True if this is a plain method that others are compared with, without a paper of its own."""
        return not self.arxiv

    @property
    def built(self) -> bool:
        """True if the method's file is there."""
        return self.path is not None

    @property
    def module(self) -> str:
        """The name to import."""
        return f"polrl.{self.chapter}.{self.slug}" if self.chapter else self.slug

    @property
    def state(self) -> str:
        """One of "planned", "built", "claim shown", "claim not shown", "to be run again"."""
        if self.path is None:
            return "planned"
        result = stored_result(self.slug if self.chapter else str(self.path))
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


def kinds() -> dict[str, list[dict[str, Any]]]:
    """Return the kinds of regularizer: "families", "kinds" of each family, and the "symptoms" that they answer."""
    return json.loads((PACKAGE / "kinds.json").read_text(encoding="utf-8"))


def glossary() -> dict[str, str]:
    """Return the course's terms in alphabetical order, each with what it means."""
    return {entry["term"]: entry["means"] for entry in json.loads((PACKAGE / "glossary.json").read_text("utf-8"))}


@functools.cache
def catalog() -> dict[str, Entry]:
    """Return every method of the course and every baseline beside them, by slug, in the course's order."""
    entries: dict[str, Entry] = {}
    for chapter in syllabus():
        package, number = chapter["package"], chapter["number"]
        files = {path.stem: path for path in sorted((PACKAGE / package).glob("[!_]*.py"))}
        for method in chapter["methods"]:
            slug, title, arxiv = method["slug"], method["title"], method["arxiv"]
            path = files.pop(slug, None)
            words, of, helps = (method.get(field, "") for field in ("regularizes", "kinds", "helps"))
            known = (slug, title, package, number, arxiv, path, _headline(path))
            entries[slug] = Entry(*known, words, tuple(of), tuple(helps))
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
    """Return the entry of a method: of the course's by its name, of one's own by the path of its file or folder.

    Raises
    ------
    UnknownNameError
        If there is none of that name; the nearest names are suggested.
    FileNotFoundError
        If it is a path, and there is no such file.
    """
    entries = catalog()
    if slug in entries:
        return entries[slug]
    path = _own_file(slug)
    if path is None:
        raise unknown_name("method", slug, entries)
    for entry in entries.values():
        if entry.path == path:
            return entry
    headline = _headline(path)
    return Entry(path.stem, headline.rstrip(".") or path.stem, "", "", "", path, headline)


def _own_file(name: str) -> Path | None:
    """Return the file that a path names: `soft_landing/soft_landing.py`, or its folder alone."""
    path = Path(name).resolve()
    if path.is_dir() and (path / f"{path.name}.py").is_file():
        return path / f"{path.name}.py"
    if path.is_file() and path.suffix == ".py":
        return path
    if path.suffix == ".py" or Path(name).name != name:
        raise FileNotFoundError(f"there is no method's file {name}")
    return None


def _import_own(path: Path) -> Any:
    """Import a file outside polrl under its own name, by which the processes of a study find it too."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    importlib.invalidate_caches()
    module = importlib.import_module(path.stem)
    if Path(module.__file__ or "").resolve() != path:
        raise PolrlError(f"{path} can't be imported: {path.stem} is already the name of {module.__file__ or module}")
    return module


def _module(slug: str) -> Any:
    entry = find_method(slug)
    if entry.path is not None and not entry.chapter:
        return _import_own(entry.path)
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
    """Return a digest of a Python file's code, and of the private modules beside it that it imports.

    Comments, docstrings and white space (but indentation) do not count.
    """
    code: dict[Path, str] = {}
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current not in code:
            code[current], private = _code(current.read_text(encoding="utf-8"))
            waiting += filter(Path.is_file, (path.with_name(f"{name}.py") for name in private))
    parts = [code.pop(path), *(code[other] for other in sorted(code))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


@functools.cache  # several methods share a private module
def _code(source: str) -> tuple[str, frozenset[str]]:
    """Return what matters of Python code, as text, and the names beginning with an underscore that it imports."""
    tree = ast.parse(source)
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name.rpartition(".")[2] for alias in node.names}
    drop: set[int] = set()
    for node in ast.walk(tree):
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
    return "".join(code.split()), frozenset(name for name in names if name.startswith("_"))


def stored_result(slug: str) -> dict[str, Any] | None:
    """Return the kept result of a method's full study, or None.

    It lies in `course/results/<slug>.json`; for a file of one's own, which a path names, beside the file.
    """
    try:
        own = None if slug in catalog() else _own_file(slug)
        path = own.with_suffix(".json") if own else find_asset(f"course/results/{slug}.json")
        return from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
