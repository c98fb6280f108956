"""The catalog: what there is and what is planned, without importing a method; and what a method's code amounts to."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from polrl.core import catalog as _  # noqa: F401
from polrl.core.catalog import Entry, catalog, find_method, fingerprint, load_method, load_study, syllabus
from polrl.core.errors import PolrlError, UnknownNameError

module = sys.modules["polrl.core.catalog"]


# ---- the course ----------------------------------------------------------------------------------------------------------


def test_the_course_has_sixty_one_methods_of_their_own():
    slugs = [method["slug"] for chapter in syllabus() for method in chapter["methods"]]
    assert len(slugs) == len(set(slugs)) == 61
    assert all(method["title"] and method["arxiv"] for chapter in syllabus() for method in chapter["methods"])
    assert [chapter["number"] for chapter in syllabus()] == [f"{i:02d}" for i in range(1, len(syllabus()) + 1)]


def test_the_catalog_lists_built_and_planned_methods_in_the_courses_order():
    entries = catalog()
    slugs = [method["slug"] for chapter in syllabus() for method in chapter["methods"]]
    assert [slug for slug in entries if slug in set(slugs)] == slugs
    assert {entry.built for entry in entries.values()} == {True, False}
    for entry in entries.values():
        if entry.built:
            assert entry.headline.endswith(".") and entry.path.stem == entry.slug and entry.state != "planned"
        else:
            assert entry.state == "planned"


def test_an_unknown_method_is_refused_with_the_nearest_names():
    for look in (find_method, load_method, load_study):
        with pytest.raises(UnknownNameError, match="unknown method 'noise_msak'; did you mean .*noise_mask"):
            look("noise_msak")


def test_a_planned_method_says_so():
    planned = next(entry for entry in catalog().values() if not entry.built)
    with pytest.raises(PolrlError, match=f"{planned.slug} is planned, but not built yet; built are: .*noise_mask"):
        load_method(planned.slug)


@pytest.mark.parametrize(
    "code",
    [
        "import polrl.core.catalog as c; assert len(c.catalog()) >= 61; [e.state for e in c.catalog().values()]",
        "import polrl; dir(polrl); polrl.__version__; polrl.catalog()",
        "import polrl.core.errors, polrl.core.files",
    ],
)
def test_looking_into_the_catalog_imports_nothing_heavy(code):
    check = "import sys; heavy = {'torch', 'numpy', 'pandas', 'scipy', 'IPython', 'plotly'} & set(sys.modules); assert not heavy, heavy"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], env=_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


# ---- a made-up course -------------------------------------------------------------------------------------------------------


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A package of one chapter with a method, a planned one and a baseline."""
    (tmp_path / "chapter").mkdir()
    (tmp_path / "chapter" / "method.py").write_text('"""A method. More words.\n\nMore."""\nX = 1\n')
    (tmp_path / "chapter" / "baseline.py").write_text('"""A baseline\nin two lines. And more."""\n')
    (tmp_path / "chapter" / "_private.py").write_text("")
    (tmp_path / "chapter" / "__init__.py").write_text("")
    (tmp_path / "syllabus.json").write_text(
        '[{"number": "01", "package": "chapter", "title": "Chapter", "methods": ['
        '{"slug": "later", "title": "Later", "arxiv": "1"}, {"slug": "method", "title": "Method", "arxiv": "2"}]}]'
    )
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    catalog.cache_clear()
    yield tmp_path
    catalog.cache_clear()


def test_methods_and_baselines_are_found_by_their_files(course):
    entries = catalog()
    assert list(entries) == ["later", "method", "baseline"]
    assert entries["method"] == Entry(
        "method", "Method", "chapter", "01", "2", course / "chapter" / "method.py", "A method."
    )
    assert entries["baseline"].title == "A baseline in two lines" and entries["baseline"].arxiv == ""
    assert not entries["later"].built and entries["method"].module == "polrl.chapter.method"


@pytest.mark.parametrize(
    ("shown", "changed", "state"),
    [
        (None, False, "built"),
        ([True, True], False, "claim shown"),
        ([False], False, "claim not shown"),
        ([True, False], False, "claim shown in part (1 of 2)"),
        ([], False, "built"),
        ([True], True, "to be run again"),
    ],
)
def test_the_state_of_a_method_follows_its_kept_result(course, monkeypatch, shown, changed, state):
    path = course / "chapter" / "method.py"
    result = {"fingerprint": fingerprint(path), "verdicts": [{"shown": s} for s in shown or []]}
    monkeypatch.setattr(module, "stored_result", lambda slug: None if shown is None else result)
    if changed:
        path.write_text(path.read_text() + "Y = 2\n")
    assert find_method("method").state == state


@pytest.mark.parametrize(
    ("source", "words"),
    [("NONE", r"must define one public learner, found \[\]"), ("TWO", r".* found \['A', 'B'\]")],
)
def test_a_file_defines_one_public_learner(course, monkeypatch, source, words):
    import types

    from polrl import Learner

    made = types.ModuleType("made_up_method")
    if source == "TWO":
        for name in ("A", "B", "_C"):
            setattr(made, name, type(name, (Learner,), {"__module__": made.__name__}))
    made.Imported = Learner
    monkeypatch.setattr(module, "_module", lambda slug: made)
    with pytest.raises(PolrlError, match=f"made_up_method {words}"):
        load_method("method")
    with pytest.raises(PolrlError, match="method states no study"):
        load_study("method")


def test_a_kept_result_that_cannot_be_read_counts_as_none(monkeypatch, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    monkeypatch.setattr(module, "find_asset", lambda relative: tmp_path / "broken.json")
    assert module.stored_result("method") is None


# ---- fingerprints -------------------------------------------------------------------------------------------------------------

SOURCE = '''
"""The idea."""

import math


class Learner:
    """A class."""

    def update(self, x):
        """One step."""
        total = 0  # a comment
        for value in x:
            total += value
            total *= 2
        text = f"{total} # not a comment"
        return {"loss": total, "text": text}


def short(x): return x
'''


def of(tmp_path, source):
    path = tmp_path / "method.py"
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return fingerprint(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""The idea."""', '"""Another idea,\nin two lines."""'),
        ('"""The idea."""', ""),
        ('        """One step."""\n', ""),
        ('"""A class."""', "'Another docstring.'"),
        ("  # a comment", ""),
        ("  # a comment", '  # another comment with \'quotes\' and """'),
        ("total = 0 ", "total  =  0 "),
        ("\n\nclass", "\n\n\n\nclass"),
        ("import math", "import math\n# Why: because."),
        ('{"loss": total, "text": text}', '{\n            "loss": total,\n            "text": text}'),
        ("def update(self, x)", "def update(\n        self, x)"),
        ("    def update", "    # before\n\n    def update"),
    ],
)
def test_comments_docstrings_and_white_space_do_not_count(tmp_path, old, new):
    assert SOURCE.count(old) == 1
    assert of(tmp_path, SOURCE.replace(old, new)) == of(tmp_path, SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total = 0", "total = 1"),
        ("total *= 2", "total *= 3"),
        ("            total *= 2", "        total *= 2"),
        ("# not a comment", "# no comment"),
        ("return x", "return -x"),
        ("def short(x): return x", "def other(x): return x"),
        ('"loss": total', '"loss": -total'),
        ("import math", "import cmath"),
    ],
)
def test_any_change_of_code_counts(tmp_path, old, new):
    assert SOURCE.count(old) == 1
    assert of(tmp_path, SOURCE.replace(old, new)) != of(tmp_path, SOURCE)


def test_a_file_with_letters_of_any_kind_has_a_fingerprint(tmp_path):
    assert of(tmp_path, 'x = "π"  # größer\n') == of(tmp_path, 'x = "π"  # kleiner\n') != of(tmp_path, 'x = "ρ"\n')


def test_private_modules_that_a_file_imports_count_and_others_do_not(tmp_path):
    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")

    write("_world", "from mine import _chain\nSTEP = 1\n")
    write("_chain", "from mine._world import STEP\nLINKS = 2\n")
    write("_exercises", "ASKED = 3\n")
    write("public", "OPEN = 4\n")
    importing = "from mine._world import STEP\nfrom mine.public import OPEN\n"
    before = of(tmp_path, importing)
    assert before != of(tmp_path, "from mine.public import OPEN\n")
    for name, source in {"_exercises": "ASKED = 5\n", "public": "OPEN = 5\n", "_chain": None}.items():
        write(name, source or "# why\nfrom mine._world import STEP\nLINKS = 2\n")
        assert of(tmp_path, importing) == before
    write("_chain", "from mine._world import STEP\nLINKS = 5\n")
    after = of(tmp_path, importing)
    write("_world", "from mine import _chain\nSTEP = 5\n")
    assert len({before, after, of(tmp_path, importing)}) == 3
