"""`polrl new`: a method of one's own that keeps the whole contract from the first minute.

The files come from `polrl/templates`. In a checkout they go where the course's methods are; elsewhere into a folder of
their own. Nothing that is there is ever written over, and either all files are written or none.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import itertools
import json
import keyword
import os
import re
import sys
import textwrap
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polrl.core import catalog
from polrl.core.errors import PolrlError, unknown_name
from polrl.core.files import write_atomic

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"
SNAKE_CASE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
ARXIV = "2205.11275"  # where the example's E2 comes from, until there is a paper to name
SITE = "polrl/polrl"


class ScaffoldError(PolrlError, ValueError):
    """A method can't be begun under this name or in this place; nothing was written."""


@dataclass(frozen=True)
class Scaffold:
    """What was written.

    Attributes
    ----------
    method, test, notebook : Path
    target : str
        What `polrl check` and the other commands take: the method's name, or its file.
    """

    method: Path
    test: Path
    notebook: Path
    target: str

    def written(self) -> str:
        """Return where the files are."""
        return "wrote " + ", ".join(_shown(path) for path in (self.method, self.test, self.notebook))

    def next_steps(self) -> list[str]:
        """Return the three commands to go on with, and what each is for."""
        if self.target == self.method.stem:
            show = f"python {_shown(self.notebook.parents[1] / 'build.py')} {self.target}"
        else:
            show = f"jupyter lab {_shown(self.notebook)}"
        steps = {
            f"polrl check {self.target}": "the contract: it holds now, and should after every change",
            f"pytest {_shown(self.test)}": "the equations against values found in another way",
            show: "the notebook: what goes wrong, the idea, the lab, the claim",
        }
        width = max(map(len, steps))
        return [f"{command:{width}}  {purpose}" for command, purpose in steps.items()]


def new_method(slug: str, chapter: str = "", *, folder: Path | None = None, package: Path | None = None) -> Scaffold:
    """Write the scaffold of a method.

    Parameters
    ----------
    slug : str
        The method's name, in snake_case.
    chapter : str
        A chapter of the course, in a checkout of polrl; without one, the method gets a folder of its own.
    folder : Path, optional
        Where that folder is made; the present one if not given.
    package : Path, optional
        The `polrl` package to add to; the installed one if not given.

    Raises
    ------
    ScaffoldError
        If the name can't be taken, or something of that name is there.
    UnknownNameError
        If there is no such chapter; the nearest are suggested.
    """
    package = package or catalog.PACKAGE
    chapters: list[dict[str, Any]] = json.loads((package / "syllabus.json").read_text(encoding="utf-8"))
    planned = {method["slug"]: (part["package"], method) for part in chapters for method in part["methods"]}
    _check_name(slug, planned=bool(chapter) and slug in planned)
    for part in chapters:
        if (path := package / part["package"] / f"{slug}.py").exists():
            raise ScaffoldError(f"{slug} is a method of polrl already: {path}")
    if not chapter:
        return _write_own(slug, folder or Path.cwd())
    packages = {part["package"]: part for part in chapters}
    if chapter not in packages:
        raise unknown_name("chapter", chapter, packages)
    if not (package.parent / "course").is_dir() or not (package.parent / "tests").is_dir():
        raise ScaffoldError(
            f"--chapter is for a checkout of polrl, and {package} is an installed copy; leave it out, and {slug} gets "
            "a folder of its own here"
        )
    home, method = planned.get(slug, (chapter, None))
    if home != chapter:
        raise ScaffoldError(f"{slug} is planned in the chapter {home}: polrl new {slug} --chapter {home}")
    return _write_in_chapter(slug, packages[chapter], method, package)


# ---- names -------------------------------------------------------------------------------------------------------


def _check_name(slug: str, planned: bool) -> None:
    """Refuse a name on which Python, pytest or a package would stumble; a planned one is fine in its chapter."""
    if keyword.iskeyword(slug) or keyword.issoftkeyword(slug):
        raise ScaffoldError(f"{slug} is a word of Python's own; take another name")
    if not SNAKE_CASE.fullmatch(slug):
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", slug).lower()
        better = re.sub(r"[^a-z0-9]+", "_", words).strip("_0123456789")
        hint = f"; {better} would do" if SNAKE_CASE.fullmatch(better) else ""
        raise ScaffoldError(f"a method's name is in snake_case, such as soft_landing, got {slug!r}{hint}")
    if slug == "conftest" or slug.startswith("test_") or slug.endswith("_test"):
        raise ScaffoldError(f"pytest would take {slug}.py for a file of tests; take another name")
    if slug in sys.stdlib_module_names or slug in sys.builtin_module_names or slug == "test":
        raise ScaffoldError(f"{slug} would hide a module of Python's standard library; take another name")
    if not planned and (where := _installed(slug)):
        raise ScaffoldError(f"{slug} would hide a package that is installed here ({where}); take another name")


def _installed(name: str) -> str:
    """Return where a package of that name lies, or ""; the present folder, searched by `python -m`, does not count."""
    here = Path.cwd().resolve()
    path = [entry for entry in sys.path if entry and Path(entry).resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec(name, path)
    if spec is None:
        return ""
    return str(spec.origin or next(iter(spec.submodule_search_locations or [""])))


def class_name(slug: str) -> str:
    """Return the learner's name: soft_landing gives SoftLanding; one that the templates use gets a word more."""
    name = "".join(map(str.capitalize, slug.split("_")))
    used = re.search(rf"\b{name}\b", "".join(path.read_text(encoding="utf-8") for path in TEMPLATES.glob("*.py.txt")))
    return f"{name}Method" if used else name


# ---- the two places ----------------------------------------------------------------------------------------------


def _write_own(slug: str, folder: Path) -> Scaffold:
    home = folder / slug
    if home.exists() or home.is_symlink():
        raise ScaffoldError(f"{_shown(home)} is there already; take another name, or move it away")
    made = Scaffold(home / f"{slug}.py", home / f"test_{slug}.py", home / f"{slug}.ipynb", _shown(home / f"{slug}.py"))
    title = slug.replace("_", " ").capitalize()
    words = {
        "slug": slug,
        "title": title,
        "module": slug,
        "target": made.method.name,
        "paper": f"**Your paper**, its authors, [arXiv {ARXIV}](https://arxiv.org/abs/{ARXIV}).",
        "badges": "Your own method: after a change of its file, restart the kernel and run all cells.",
    }
    files = _fill(made, words)
    if any((above / name).exists() for above in home.resolve().parents for name in ("pyproject.toml", "pytest.ini")):
        # Inside a project, that project's test settings would hold here too, and might hide the method's file.
        files[home / "pytest.ini"] = "[pytest]\n"
    _write_all(files)
    return made


def _write_in_chapter(slug: str, part: dict[str, Any], method: dict[str, Any] | None, package: Path) -> Scaffold:
    root, chapter = package.parent, part["package"]
    notebooks = root / "course" / f"{part['number']}_{chapter}"
    taken = {path.stem.partition("_")[2]: path for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))}
    numbers = [int(path.stem[:2]) for path in taken.values()]
    name = f"{max(numbers, default=0) + 1:02d}_{slug}.ipynb"
    made = Scaffold(
        package / chapter / f"{slug}.py", root / "tests" / "algorithms" / f"test_{slug}.py", notebooks / name, slug
    )
    for path in filter(None, (made.method, made.test, taken.get(slug))):
        if path.exists() or path.is_symlink():
            raise ScaffoldError(f"{_shown(path)} is there already; take another name, or move it away")
    title, arxiv = (method["title"], method["arxiv"]) if method else (slug.replace("_", " ").capitalize(), ARXIV)
    place = f"{SITE}/blob/main/course/{notebooks.name}/{name}"
    mybinder = f"https://mybinder.org/v2/gh/{SITE}/main?labpath=course/{notebooks.name}/{name}"
    words = {
        "slug": slug,
        "title": title,
        "module": f"polrl.{chapter}.{slug}",
        "target": slug,
        "paper": f"**{title if method else 'The paper'}**, its authors, [arXiv {arxiv}](https://arxiv.org/abs/{arxiv}).",
        "badges": "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{place})\n"
        f"# [![Open in Binder](https://mybinder.org/badge_logo.svg)]({mybinder})",
    }
    files = _fill(made, words)
    opening = package / chapter / "__init__.py"
    if not opening.exists():
        files = {opening: f'"""{part["title"]}."""\n', **files}
    _write_all(files)
    return made


# ---- texts -------------------------------------------------------------------------------------------------------


def _fill(made: Scaffold, words: Mapping[str, str]) -> dict[Path, str]:
    """Return the files' texts, the method last: once it stands, the catalog finds the rest in place."""
    module = words["module"]
    own = {module} if module == words["slug"] else {"polrl", "polrl_widgets"}
    names = {"class": class_name(words["slug"]), "module": module}
    texts = {}
    for kind in ("test", "notebook", "method"):
        template = (TEMPLATES / f"{kind}.py.txt").read_text(encoding="utf-8")
        headline = textwrap.fill(f"{words['title']}.", 112)
        texts[kind] = _substitute(sort_imports(_substitute(template, names), own), {**words, "headline": headline})
    return {made.test: texts["test"], made.notebook: as_notebook(texts["notebook"]), made.method: texts["method"]}


def _substitute(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: words.get(found[1], found[0]), text)


IMPORT = r"(?:import|from) [^\n(]+(?:\([^)]*\))?\n"


def sort_imports(text: str, own: Collection[str]) -> str:
    """Sort each block of imports by sections, as ruff does.

    What is one's own comes last: polrl in the course, and in a folder of its own the method alone.
    """

    def section(statement: str) -> int:
        root = re.split(r"[\s.]", statement)[1]
        return 0 if root == "__future__" else 1 if root in sys.stdlib_module_names else 2 + (root in own)

    def block(found: re.Match[str]) -> str:
        statements = re.findall(IMPORT, found[0], re.M)
        ordered = sorted(statements, key=lambda each: (section(each), each.startswith("from"), each.split()[1]))
        return "\n".join("".join(part) for _, part in itertools.groupby(ordered, section))

    return re.sub(rf"^(?:{IMPORT}\n?(?={IMPORT}))*{IMPORT}", block, text, flags=re.M)


def as_notebook(text: str) -> str:
    """Turn a script in percent form into a notebook: "# %%" begins a cell, "# %% [markdown]" one of prose."""
    cells = []
    for number, part in enumerate(re.split(r"^# %%", text, flags=re.M)[1:], 1):
        head, _, body = part.partition("\n")
        lines = body.strip("\n").split("\n")
        cell: dict[str, Any] = {"id": f"cell-{number:02d}", "metadata": {}}
        if "[markdown]" in head:
            cell |= {"cell_type": "markdown"}
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        else:
            tags = json.loads(head.partition("tags=")[2] or "[]")
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
            cell["metadata"] = {"tags": tags} if tags else {}
        cells.append({**cell, "source": [line + "\n" for line in lines[:-1]] + lines[-1:]})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _shown(path: Path) -> str:
    """Return a path as one would type it here: relative where that is shorter."""
    try:
        relative = os.path.relpath(path)
    except ValueError:  # another drive
        return str(path)
    return min(relative, str(path), key=len)


# ---- writing -----------------------------------------------------------------------------------------------------


def _write_all(files: Mapping[Path, str]) -> None:
    """Write all files or none, and none over another.

    The texts go to the disk under other names first; then each takes its name, which is quick and hardly fails. If
    anything does, what was made is removed again, folders included.
    """
    folders: list[Path] = []
    waiting: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        for path, text in files.items():
            folders += _make_folder(path.parent)
            waiting[path] = path.with_name(f".{path.name}.{os.getpid()}.new")
            write_atomic(waiting[path], text)
        for path, ready in waiting.items():
            path.open("x").close()  # fails if the name is taken
            placed.append(path)
            os.replace(ready, path)
    except BaseException as error:
        for path in (*placed, *waiting.values()):
            path.unlink(missing_ok=True)
        for each in reversed(folders):
            with contextlib.suppress(OSError):  # someone else's file is in it by now
                each.rmdir()
        if isinstance(error, OSError):
            raise ScaffoldError(f"nothing was written: {error}") from error
        raise


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder with all those above it; returns the new ones, outermost first."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing
