"""What is committed of the notebooks: executed, fresh, small, in the form that the course promises."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("course_build", ROOT / "course" / "build.py")
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)

NOTEBOOKS = build.notebooks()
METHOD_NOTEBOOKS = [
    path for path in NOTEBOOKS if re.match(r"\d\d_(?!overview)", path.name) and path.parent != build.COURSE
]
SECTIONS = ("What goes wrong without it", "The idea", "Predict", "The lab", "The claim", "Exercises", "Where it breaks")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_executed_and_fresh(path):
    assert build.outdated(path) == ""
    notebook = read(path)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for number, cell in enumerate(code_cells(notebook), 1):
        assert cell["execution_count"] == number, f"cell {number} was not executed in order"
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", f"cell {number} wrote to stderr: {output['text']}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_small_and_holds_no_widget_state(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) <= build.MAX_BYTES
    assert "application/vnd.jupyter.widget" not in text
    assert "papermill" not in json.dumps(read(path)["metadata"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_cell_is_longer_than_twenty_lines(path):
    for cell in code_cells(read(path)):
        source = "".join(cell["source"])
        assert source.count("\n") < 20, f"a cell has {source.count(chr(10)) + 1} lines: {source[:80]}"
        assert "Output" not in source or "clear_output" not in source


@pytest.mark.parametrize("path", METHOD_NOTEBOOKS, ids=lambda path: path.stem)
def test_method_notebook_has_parameters_and_all_sections_in_order(path):
    notebook = read(path)
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for name in ("mode", "seed", "device"):
        assert re.search(rf"^{name} = ", "".join(tagged[0]["source"]), re.M), f"the parameters cell lacks {name}"
    prose = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    places = [prose.find(f"## {section}") for section in SECTIONS]
    assert -1 not in places and places == sorted(places), dict(zip(SECTIONS, places, strict=True))
    first = "".join(notebook["cells"][0]["source"])
    assert "arxiv.org" in first and "colab" in first and "mybinder" in first and "minutes" in first


@pytest.mark.parametrize("path", METHOD_NOTEBOOKS, ids=lambda path: path.stem)
def test_every_picture_has_words_for_people_who_cannot_see_it(path):
    for cell in code_cells(read(path)):
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                assert output["metadata"]["image/png"].get("alt"), "a picture has no alt text"


def test_cleaning_removes_what_differs_from_run_to_run():
    import nbformat

    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("1", metadata={"papermill": {"duration": 1.0}, "tags": ["parameters"]})],
        metadata={"widgets": {"state": {}}, "papermill": {"start": "now"}},
    )
    build.clean(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.cells[0].metadata == {"tags": ["parameters"]}


def test_a_changed_cell_makes_a_notebook_outdated(tmp_path):
    notebook = read(METHOD_NOTEBOOKS[0])
    code_cells(notebook)[0]["source"] = ["seed = 1\n"]
    path = tmp_path / "changed.ipynb"
    path.write_text(json.dumps(notebook))
    assert "older" in build.outdated(path)
