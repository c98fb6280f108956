"""`polrl new`: a method of one's own, in a folder of its own and in a checkout; what is refused; all files or none."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from polrl.__main__ import main
from polrl.core import catalog as _  # noqa: F401
from polrl.core import scaffold
from polrl.core.catalog import PACKAGE, find_method, load_method, load_study, syllabus
from polrl.core.errors import PolrlError, UnknownNameError
from polrl.core.scaffold import ScaffoldError, as_notebook, class_name, new_method, sort_imports

ROOT = PACKAGE.parent
PLANNED = next(m for c in syllabus() if c["package"] == "theory" for m in c["methods"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, outside any project; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("POLRL_RUNS", str(tmp_path.parent / f"{tmp_path.name}-runs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def checkout(tmp_path):
    """A copy of the checkout with one method and no other chapter; returns its package."""
    package = tmp_path / "polrl"
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("core", "models", "worlds", "templates"):
        shutil.copytree(PACKAGE / name, package / name, ignore=ignore)
    for path in (*PACKAGE.glob("*.py"), *PACKAGE.glob("*.json")):
        shutil.copy(path, package)
    (package / "foundations").mkdir()
    for name in ("__init__.py", "noise_mask.py"):
        shutil.copy(PACKAGE / "foundations" / name, package / "foundations")
    (tmp_path / "course" / "01_foundations").mkdir(parents=True)
    for name in ("00_overview", "01_noise_mask", "07_seventh"):
        (tmp_path / "course" / "01_foundations" / f"{name}.ipynb").write_text("{}")
    (tmp_path / "tests" / "algorithms").mkdir(parents=True)
    for name in ("conftest.py", "test_equations_documented.py"):
        shutil.copy(ROOT / "tests" / "algorithms" / name, tmp_path / "tests" / "algorithms")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return package


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def python(*words: str, folder: Path, package: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": "-p no:nbval"}  # nbval takes 3 s to import
    environment.pop("PYTEST_CURRENT_TEST", None)
    environment["PYTHONPATH"] = str((package or PACKAGE).parent)
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    return subprocess.run([sys.executable, *words], **options, check=False)


# ---- a folder of its own -------------------------------------------------------------------------------------------


def test_the_command_writes_three_files_and_says_in_three_lines_how_to_go_on(here, capsys):
    assert main(["new", "soft_landing"]) == 0
    assert set(tree(here)) == {
        "soft_landing",
        *(f"soft_landing/{name}" for name in ("soft_landing.py", "test_soft_landing.py", "soft_landing.ipynb")),
    }
    written, *lines = capsys.readouterr().out.splitlines()
    assert written.startswith("wrote ") and all(Path(name).is_file() for name in written[6:].split(", "))
    assert [line.split("  ")[0] for line in lines] == [
        "polrl check soft_landing/soft_landing.py",
        "pytest soft_landing/test_soft_landing.py",
        "jupyter lab soft_landing/soft_landing.ipynb",
    ]
    assert all((path.stat().st_mode & 0o444) == 0o444 for path in (here / "soft_landing").iterdir())


def test_no_placeholder_is_left_and_the_name_is_everywhere(here):
    made = new_method("soft_landing")
    for path in (made.method, made.test, made.notebook):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\{\{\w+\}\}", text)
        assert "SoftLanding" in text
    assert "\nclass SoftLanding(Learner[Config]):\n" in made.method.read_text(encoding="utf-8")


def test_the_generated_tests_pass_in_a_folder_of_their_own(here):
    new_method("soft_landing")
    done = python("-m", "pytest", "-q", folder=here / "soft_landing")
    assert done.returncode == 0 and re.search(r"\d\d passed", done.stdout), done.stdout + done.stderr


def test_inside_a_project_its_test_settings_do_not_hold(here):
    (here / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = ["--import-mode=importlib"]\n')
    made = new_method("soft_landing")
    made.method.write_text("X = 1\n")  # torch takes seconds to import
    made.test.write_text("from soft_landing import X\n\n\ndef test_x():\n    assert X == 1\n")
    for folder, words in ((here, ["soft_landing"]), (made.test.parent, [])):
        done = python("-m", "pytest", "-q", *words, folder=folder)
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_the_commands_take_the_file_or_its_folder(here, capsys):
    new_method("soft_landing")
    assert main(["check", "./soft_landing/soft_landing.py"]) == 0
    assert "11 of 11 checks hold" in capsys.readouterr().out
    assert main(["info", "soft_landing"]) == 0
    out = capsys.readouterr().out
    for part in ("a method of your own; state: built", "strength (first)", "E2", "has not been run"):
        assert part in out, part
    assert main(["train", "soft_landing/", "--strength", "0.5", "--steps", "3"]) == 0
    assert "soft_landing-" in capsys.readouterr().out  # the run's folder is named by the method
    assert main(["study", "soft_landing/soft_landing.py", "--smoke"]) == 0
    assert capsys.readouterr().out.count("SHOWN") == 2
    assert main(["sweep", "soft_landing", "--over", "strength=0.1,1", "--steps", "2", "--jobs", "2"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 3  # also where processes of their own train


def test_the_full_studys_result_is_kept_beside_the_file_and_found_again(here, capsys, monkeypatch):
    import dataclasses

    new_method("soft_landing")
    study = load_study("soft_landing")
    small = dataclasses.replace(study, full=dataclasses.replace(study.smoke, seeds=1, settings={"updates": 2}))
    monkeypatch.setattr(sys.modules["soft_landing"], "study", small)
    assert main(["study", "soft_landing", "--full", "--jobs", "1"]) == 0
    assert f"kept in {here / 'soft_landing' / 'soft_landing.json'}" in capsys.readouterr().out
    assert find_method("soft_landing").state == "claim not shown"
    assert main(["info", "soft_landing"]) == 0
    assert capsys.readouterr().out.count("NOT SHOWN") == 2
    file = here / "soft_landing" / "soft_landing.py"
    file.write_text(file.read_text().replace("0.05", "0.04"))
    assert find_method("soft_landing").state == "to be run again"


def test_a_path_to_a_method_of_the_course_is_that_method():
    path = str(PACKAGE / "foundations" / "noise_mask.py")
    assert find_method(path) == find_method("noise_mask")
    assert load_method(path) is load_method("noise_mask")


def test_a_file_that_is_not_there_and_one_whose_name_is_taken_are_refused(here):
    with pytest.raises(FileNotFoundError, match=r"there is no method's file \./nowhere/at_all\.py"):
        load_method("./nowhere/at_all.py")
    with pytest.raises(UnknownNameError, match="noise_mask"):
        load_method("noise_maks")
    (here / "json.py").write_text('"""Hides a module."""\n')
    with pytest.raises(PolrlError, match="json is already the name of"):
        load_method("json.py")


def test_the_generated_code_is_clean_for_ruff_and_mypy(here):
    pytest.importorskip("ruff")
    pytest.importorskip("mypy")
    made = new_method("soft_landing")
    every = [str(path) for path in (made.method, made.test, made.notebook)]
    for words in (["check"], ["format", "--check", "--config", "line-length=120"]):
        done = python("-m", "ruff", *words, "--isolated", "--no-cache", *every, folder=here)
        assert done.returncode == 0, done.stdout + done.stderr
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    done = python("-m", "mypy", *options, str(made.method), folder=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- a checkout ----------------------------------------------------------------------------------------------------


def test_in_a_checkout_the_files_go_where_the_catalog_and_the_suite_find_them(checkout):
    root = checkout.parent
    before = set(tree(root))
    made = new_method("soft_landing", "foundations", package=checkout)
    assert set(tree(root)) - before == {
        "polrl/foundations/soft_landing.py",
        "tests/algorithms/test_soft_landing.py",
        "course/01_foundations/08_soft_landing.ipynb",  # the next free number
    }
    assert made.target == "soft_landing" and len(made.next_steps()) == 3
    first = "".join(json.loads(made.notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    assert "blob/main/course/01_foundations/08_soft_landing.ipynb" in first


@pytest.mark.slow
def test_a_planned_method_takes_its_place_and_everything_passes(checkout):
    root, slug = checkout.parent, PLANNED["slug"]
    done = python("-m", "polrl", "new", slug, "--chapter", "theory", folder=root, package=checkout)
    assert done.returncode == 0, done.stderr
    notebook = root / "course" / "08_theory" / f"01_{slug}.ipynb"
    first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    assert PLANNED["title"] in first and f"arxiv.org/abs/{PLANNED['arxiv']}" in first
    assert (checkout / "theory" / "__init__.py").read_text() == '"""Theory."""\n'
    listed = python("-m", "polrl", "list", "--built", folder=root, package=checkout)
    assert slug in listed.stdout and "2 built of 61" in listed.stdout, listed.stdout
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", folder=root, package=checkout)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout + done.stderr
    for words in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        new = ["polrl/theory", f"tests/algorithms/test_{slug}.py", "course/08_theory"]
        done = python("-m", "ruff", *words, *new, folder=root)
        assert done.returncode == 0, done.stdout + done.stderr


def test_names_of_any_length_in_any_chapter_give_clean_code(checkout):
    pytest.importorskip("ruff")
    every = []
    for part in syllabus():
        planned = [method for method in part["methods"] if method["slug"] != "noise_mask"]
        longest = max(planned, key=lambda method: len(method["title"]))["slug"]
        for slug in (longest, f"config{part['number']}"):
            made = new_method(slug, part["package"], package=checkout)
            every += [str(path) for path in (made.method, made.test, made.notebook)]
    for words in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = python("-m", "ruff", *words, *every, folder=checkout.parent)
        assert done.returncode == 0, done.stdout + done.stderr


def test_imports_are_sorted_with_ones_own_last():
    text = "x = 1\n\nimport torch\nfrom polrl import (\n    a,\n)\n\nfrom mine import b\nimport math\n\n\nfrom = 2\n"
    alone = "import math\n\nimport torch\nfrom polrl import (\n    a,\n)\n\nfrom mine import b\n"
    assert sort_imports(text, {"mine"}) == f"x = 1\n\n{alone}\n\nfrom = 2\n"
    home = "import math\n\nimport torch\nfrom mine import b\n\nfrom polrl import (\n    a,\n)\n"
    assert sort_imports(text, {"polrl"}) == f"x = 1\n\n{home}\n\nfrom = 2\n"


# ---- the notebook --------------------------------------------------------------------------------------------------


def headings(notebook):
    prose = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    return re.findall(r"^## (.+)", prose, re.M)


def test_the_notebook_has_the_courses_form(checkout):
    made = new_method("soft_landing", "value", package=checkout)
    example = json.loads((ROOT / "course" / "01_foundations" / "01_noise_mask.ipynb").read_text(encoding="utf-8"))
    notebook = json.loads(made.notebook.read_text(encoding="utf-8"))
    assert headings(notebook) == headings(example)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all("".join(cell["source"]).count("\n") < 20 for cell in code)
    tagged = [cell for cell in code if cell["metadata"].get("tags") == ["parameters"]]
    assert len(tagged) == 1 and {"mode", "seed", "device"} <= set("".join(tagged[0]["source"]).split())
    first = "".join(notebook["cells"][0]["source"])
    assert all(word in first for word in ("arxiv.org", "colab", "mybinder", "minutes"))


def test_a_script_in_percent_form_becomes_a_notebook():
    nbformat = pytest.importorskip("nbformat")
    text = '# %% [markdown]\n# # Title\n#\n# - one\n\n# %% tags=["parameters"]\nx = 1\n\n\ny = 2  # %% no cell\n'
    notebook = nbformat.reads(as_notebook(text), as_version=4)
    nbformat.validate(notebook)
    assert [cell.source for cell in notebook.cells] == ["# Title\n\n- one", "x = 1\n\n\ny = 2  # %% no cell"]
    assert notebook.cells[1].metadata.tags == ["parameters"]


@pytest.mark.slow
def test_the_generated_notebook_runs(here):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    made = new_method("soft_landing")
    notebook = nbformat.read(made.notebook, as_version=4)
    environment = {**os.environ, "POLRL_MODE": "smoke", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "widgets")])
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(made.notebook.parent)}}
    )
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr" or output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert "not done yet" in str(outputs) and "not run yet" in str(outputs)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "words"),
    [
        ("SoftLanding", "snake_case, such as soft_landing, got 'SoftLanding'; soft_landing would do"),
        ("soft-landing", "soft_landing would do"),
        ("soft landing", "soft_landing would do"),
        ("2fast", "got '2fast'; fast would do"),
        ("soft__landing", "soft_landing would do"),
        ("_private", "got '_private'; private would do"),
        ("trailing_", "got 'trailing_'; trailing would do"),
        ("größe", "got 'größe'"),
        ("../escape", "got '../escape'; escape would do"),
        ("a/b", "got 'a/b'"),
        ("", "got ''"),
        ("a.py", "got 'a.py'; a_py would do"),
        ("lambda", "a word of Python's own"),
        ("match", "a word of Python's own"),
        ("None", "a word of Python's own"),
        ("json", "hide a module of Python's standard library"),
        ("test", "hide a module of Python's standard library"),
        ("numpy", r"hide a package that is installed here \(.*numpy"),
        ("pytest", "hide a package that is installed here"),
        ("polrl", "hide a package that is installed here"),
        ("conftest", "pytest would take conftest.py for a file of tests"),
        ("test_landing", "pytest would take test_landing.py for a file of tests"),
        ("noise_mask", r"noise_mask is a method of polrl already: .*noise_mask\.py"),
    ],
)
def test_a_name_that_would_do_harm_is_refused_and_nothing_written(here, slug, words):
    with pytest.raises(ScaffoldError, match=words):
        new_method(slug)
    assert tree(here) == {}


def test_a_refusal_is_one_line_and_exit_code_2(here, capsys):
    assert main(["new", "json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("polrl: json would hide") and err.count("\n") == 1
    assert main(["new"]) == 2
    assert main(["new", "soft_landing", "--chapter", "foundation"]) == 2
    assert "did you mean foundations?" in capsys.readouterr().err
    assert tree(here) == {}


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_is_there_is_never_touched(here, what):
    there = here / "soft_landing"
    if what == "folder":
        there.mkdir()
    elif what == "file":
        there.write_text("mine")
    else:
        there.symlink_to(here / "nowhere")
    before = tree(here)
    with pytest.raises(ScaffoldError, match="soft_landing is there already"):
        new_method("soft_landing")
    assert tree(here) == before


def test_a_second_call_refuses_and_leaves_the_first_alone(here):
    made = new_method("soft_landing")
    made.method.write_text("mine")
    with pytest.raises(ScaffoldError, match="soft_landing is there already"):
        new_method("soft_landing")
    assert made.method.read_text() == "mine"


@pytest.mark.parametrize(
    "there",
    [
        "polrl/foundations/soft_landing.py",
        "polrl/value/soft_landing.py",
        "tests/algorithms/test_soft_landing.py",
        "course/01_foundations/03_soft_landing.ipynb",
    ],
)
def test_in_a_checkout_what_is_there_is_named(checkout, there):
    path = checkout.parent / there
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    before = tree(checkout.parent)
    with pytest.raises(ScaffoldError, match=re.escape(path.name)):
        new_method("soft_landing", "foundations", package=checkout)
    assert tree(checkout.parent) == before


def test_an_unknown_chapter_is_refused_with_the_nearest(checkout):
    with pytest.raises(UnknownNameError, match="unknown chapter 'foundation'; did you mean foundations"):
        new_method("soft_landing", "foundation", package=checkout)


def test_a_planned_method_belongs_to_its_chapter(checkout):
    with pytest.raises(ScaffoldError, match=f"is planned in the chapter theory: polrl new {PLANNED['slug']} --chapter"):
        new_method(PLANNED["slug"], "value", package=checkout)


def test_a_planned_name_is_free_elsewhere_unless_it_hides_a_package(here, checkout, monkeypatch):
    slug = PLANNED["slug"]
    new_method(slug)
    assert find_method(slug).chapter == "theory" and find_method(f"./{slug}").chapter == ""
    (here / "site").mkdir()
    (here / "site" / f"{slug}.py").write_text("")
    monkeypatch.syspath_prepend(here / "site")
    with pytest.raises(ScaffoldError, match="hide a package that is installed here"):
        new_method(slug, folder=here / "other")
    new_method(slug, "theory", package=checkout)


def test_an_installed_copy_takes_no_chapter(checkout):
    shutil.rmtree(checkout.parent / "course")
    with pytest.raises(ScaffoldError, match="--chapter is for a checkout of polrl, and .* is an installed copy"):
        new_method("soft_landing", "foundations", package=checkout)


@pytest.mark.parametrize(
    ("slug", "name"),
    [("soft_landing", "SoftLanding"), ("r2pvi", "R2pvi"), ("config", "ConfigMethod"), ("bars", "BarsMethod")],
)
def test_the_class_is_named_after_the_method_and_hides_nothing(slug, name):
    assert class_name(slug) == name


# ---- all or none ---------------------------------------------------------------------------------------------------


class Counted:
    """Passes calls on, but fails at one of them."""

    def __init__(self, function, fail_at, error):
        self.function, self.left, self.error = function, fail_at, error

    def __call__(self, *arguments):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*arguments)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
@pytest.mark.parametrize("step", ["write", "place"])
@pytest.mark.parametrize(("chapter", "fail_at"), [("", 1), ("", 3), ("value", 1), ("value", 2), ("value", 4)])
def test_a_failure_midway_leaves_nothing_behind(checkout, monkeypatch, chapter, step, fail_at, error):
    root = checkout.parent
    (root / "pyproject.toml").unlink()
    monkeypatch.chdir(root)
    if step == "write":
        monkeypatch.setattr(scaffold, "write_atomic", Counted(scaffold.write_atomic, fail_at, error))
    else:
        failing = {**vars(os), "replace": Counted(os.replace, fail_at, error)}
        monkeypatch.setattr(scaffold, "os", types.SimpleNamespace(**failing))
    before = tree(root)
    with pytest.raises(ScaffoldError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        new_method("soft_landing", chapter, package=checkout)
    assert tree(root) == before
    if isinstance(error, OSError):
        assert "nothing was written: " in str(raised.value) and "No space left" in str(raised.value)
    monkeypatch.undo()
    monkeypatch.chdir(root)
    assert new_method("soft_landing", chapter, package=checkout).method.exists()


def test_a_file_that_appears_meanwhile_is_not_written_over(checkout, monkeypatch):
    root = checkout.parent
    theirs = checkout / "foundations" / "soft_landing.py"
    before = tree(root)
    write = scaffold.write_atomic

    def write_and_meet(path, text):
        write(path, text)
        theirs.write_text("theirs")

    monkeypatch.setattr(scaffold, "write_atomic", write_and_meet)
    with pytest.raises(ScaffoldError, match="nothing was written"):
        new_method("soft_landing", "foundations", package=checkout)
    assert theirs.read_text() == "theirs"
    theirs.unlink()
    assert tree(root) == before


def test_a_folder_that_cannot_be_written_says_so(here, monkeypatch):
    (here / "closed").write_text("a file")
    with pytest.raises(ScaffoldError, match="nothing was written"):
        new_method("soft_landing", folder=here / "closed" / "inside")


# ---- the command as a whole ----------------------------------------------------------------------------------------


def test_the_command_answers_without_torch(here):
    code = "import sys; from polrl.__main__ import main; main(['new', 'soft_landing']); print('torch' in sys.modules)"
    done = python("-c", code, folder=here)
    assert done.returncode == 0 and done.stdout.strip().endswith("False"), done.stderr


def test_the_templates_are_part_of_the_package():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "polrl" in settings["packages"] and scaffold.TEMPLATES.parent == PACKAGE
    assert {path.name for path in scaffold.TEMPLATES.iterdir() if path.is_file()} == {
        "method.py.txt",
        "notebook.py.txt",
        "test.py.txt",
    }
    ignored = subprocess.run(
        ["git", "check-ignore", *map(str, scaffold.TEMPLATES.iterdir())], cwd=ROOT, capture_output=True, text=True
    )
    assert ignored.stdout == ""  # hatch leaves out what git ignores
