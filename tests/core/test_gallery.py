"""The course's map: every method has its sentence, its kinds and its place in gallery, symptoms and kinds."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from polrl.core.catalog import Entry, catalog, glossary, kinds, syllabus
from polrl.core.errors import UnknownNameError
from polrl_widgets import Gallery, Glossary, Kinds, Symptoms
from polrl_widgets import gallery as shown
from polrl_widgets.glyphs import GLYPHS, HEIGHT, PLAIN, WIDTH
from polrl_widgets.map import answers
from polrl_widgets.static_views import few_colors

ROOT = Path(__file__).resolve().parents[2]
METHODS = [entry for entry in catalog().values() if not entry.baseline]
KINDS = [kind["name"] for kind in kinds()["kinds"]]
SYMPTOMS = [symptom["name"] for symptom in kinds()["symptoms"]]


class Page(HTMLParser):
    """Tags with their attributes, and the text of every table cell; complains of tags that are not closed."""

    VOID = {"br", "img", "polyline", "polygon"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.open = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open and "title" not in self.open:
            self.cells[-1] += data

    def links(self):
        return [attributes["href"] for tag, attributes in self.tags if tag == "a"]


def outputs(shows, monkeypatch, mode):
    """What an object hands to the notebook, in order."""
    import IPython.display

    handed = []
    monkeypatch.setattr(IPython.display, "display", lambda *objects: handed.extend(objects))
    monkeypatch.setattr("polrl_widgets.lab.front_end", lambda: mode)
    shows._ipython_display_()
    return handed


# ---- what is written down --------------------------------------------------------------------------------------------


def test_every_method_has_a_sentence_of_its_own():
    sentences = [entry.regularizes for entry in METHODS]
    assert len(set(sentences)) == len(METHODS) == 61
    for sentence in sentences:
        assert len(sentence) <= 110 and sentence[0].isupper() and sentence.endswith(".") and sentence.count(". ") == 0


def test_every_method_has_known_kinds_and_answers_known_symptoms():
    for entry in METHODS:
        assert entry.kinds and set(entry.kinds) <= set(KINDS) and len(set(entry.kinds)) == len(entry.kinds), entry.slug
        assert entry.helps and set(entry.helps) <= set(SYMPTOMS), entry.slug


def test_every_kind_has_methods_a_glyph_and_a_family():
    known = kinds()
    families = [family["name"] for family in known["families"]]
    assert len(set(KINDS)) == len(KINDS) and set(GLYPHS) == set(KINDS)
    assert {kind["family"] for kind in known["kinds"]} == set(families)
    for kind in known["kinds"]:
        assert sum(kind["name"] in entry.kinds for entry in METHODS) >= 2, kind["name"]
        assert all(kind[field] for field in ("title", "term", "does", "weak", "strong"))
        assert kind["does"].endswith(".") and "|" not in json.dumps(kind) and "$" not in kind["term"]


def test_every_symptom_leads_to_methods_of_each_of_its_kinds():
    for symptom in kinds()["symptoms"]:
        assert set(symptom["kinds"]) <= set(KINDS)
        answered = answers(symptom)
        assert list(answered) == symptom["kinds"], f"{symptom['name']}: a kind without a method"
        tagged = {entry.slug for entry in METHODS if symptom["name"] in entry.helps}
        assert {entry.slug for entries in answered.values() for entry in entries} == tagged, symptom["name"]


def test_every_kind_is_reached_from_a_symptom():
    assert {kind for symptom in kinds()["symptoms"] for kind in symptom["kinds"]} == set(KINDS)


def test_terms_are_unique_alphabetical_and_explained_in_one_or_two_sentences():
    raw = json.loads((ROOT / "polrl/glossary.json").read_text(encoding="utf-8"))
    terms = [entry["term"] for entry in raw]
    assert terms == sorted(terms, key=str.lower) and len({term.lower() for term in terms}) == len(terms)
    assert list(glossary()) == terms
    for term, meaning in glossary().items():
        assert meaning.endswith(".") and len(meaning) <= 260 and "|" not in meaning, term
        assert meaning.count("$") % 2 == 0 and len(re.findall(r"[.:?] (?=[A-Z])", meaning)) <= 2, term


# What MathJax knows and matplotlib's small TeX spells otherwise or does without.
SPELLINGS = {"le": "leq", "ge": "geq", "lvert": "vert", "rvert": "vert", "textstyle": "", "bigl": "", "bigr": ""}


def test_formulas_are_tex_that_can_be_set():
    from matplotlib.mathtext import MathTextParser

    formulas = [kind["term"] for kind in kinds()["kinds"]]
    formulas += [formula for meaning in glossary().values() for formula in re.findall(r"\$(.+?)\$", meaning)]
    parser = MathTextParser("agg")
    for formula in formulas:
        plain = re.sub(r"\\tfrac(\d)(\d)", r"\\frac{\1}{\2}", formula).replace(r"\tfrac", r"\frac")
        plain = re.sub(r"\\(math\w+) (\w)", r"\\\1{\2}", plain)
        plain = re.sub(r"\\([a-zA-Z]+)", lambda name: rf"\{SPELLINGS.get(name[1], name[1])} ".replace("\\ ", ""), plain)
        parser.parse(f"${plain}$")


# ---- the gallery -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["live", "static"])
def test_gallery_shows_every_method_once_with_its_state(monkeypatch, mode):
    text = "".join(each.data for each in outputs(Gallery(), monkeypatch, mode) if isinstance(each.data, str))
    page = Page(text)
    states = {
        f"{shown.MARKS[entry.state.split(' (')[0]]}\xa0{shown.state_words(entry)}" for entry in catalog().values()
    }
    assert sum(cell in states for cell in page.cells) == len(catalog())
    for entry in catalog().values():
        assert page.cells.count(entry.title + entry.slug) == 1, entry.slug
        at = page.cells.index(entry.title + entry.slug)
        assert page.cells[at + 1].startswith(entry.regularizes or "the plain method")
        assert page.cells[at + 2].split() == [kind.replace("_", "-") for kind in entry.kinds]
        assert page.cells[at + 3].endswith(shown.state_words(entry))
        assert page.cells[at + 4] == (f"arXiv\xa0{entry.arxiv}" if entry.arxiv else "")


def test_every_state_has_a_mark_and_baselines_are_told_apart():
    made = dataclasses.replace(METHODS[0], arxiv="", regularizes="", kinds=(), helps=())
    assert made.baseline and shown.state_words(made).startswith("baseline, ")
    for entry in catalog().values():
        assert shown._mark(shown.state_words(entry)), entry.state
    assert shown._mark("claim shown in part (2 of 4)") == "◐" != shown._mark("claim shown")


def test_links_lead_to_files_of_the_course_or_to_arxiv():
    for table in (Gallery(), Symptoms()):
        links = Page(table._repr_html_()).links()
        assert links
        for link in links:
            known = re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link) or (ROOT / "course" / link).is_file()
            assert known, link
    assert "01_foundations/01_noise_mask.ipynb" in Page(Gallery()._repr_html_()).links()
    for path in re.findall(r"\]\((.+?)\)", Kinds()._repr_markdown_()):
        assert (ROOT / "course" / path).is_file(), path


def test_live_gallery_has_a_picture_with_words_in_every_row(monkeypatch):
    [html] = outputs(Gallery(), monkeypatch, "live")
    tags = Page(html.data).tags
    words = [a.get("aria-label") or a.get("alt") for tag, a in tags if tag in ("svg", "img")]
    assert len(words) == len(catalog()) and all(words)


def test_static_gallery_has_a_picture_a_chapter_and_nothing_that_a_page_strips(monkeypatch):
    handed = outputs(Gallery(), monkeypatch, "static")
    pictures = [each for each in handed if isinstance(each.data, bytes)]
    chapters = {entry.chapter for entry in catalog().values()}
    assert len(pictures) == len(chapters) == len(syllabus())
    text = "".join(each.data for each in handed if isinstance(each.data, str))
    assert not {"svg", "img", "script", "style"} & {tag for tag, _ in Page(text).tags} and "data:" not in text
    for entry in catalog().values():
        assert any(f"{shown.words(entry)}, {shown.state_words(entry)}" in picture.alt for picture in pictures)
    assert sum(len(picture.data) for picture in pictures) < 61 * 5000


def test_words_from_files_are_escaped():
    odd = Entry(
        "a_b", '<b>Title</b> & "more"', "foundations", "01", "1<2", None, "", "x < y & z.", ("kl",), ("sparse",)
    )
    gallery = Gallery()
    gallery.entries, gallery.states = [odd], {"a_b": "planned <now>"}
    page = gallery._repr_html_()
    assert "<b>" not in page and "x &lt; y &amp; z." in page and "1&lt;2" in page and "planned &lt;now&gt;" in page
    assert "&lt;b&gt;Title&lt;/b&gt; &amp; &quot;more&quot;" in page
    assert "<i>" not in shown.badge("<i>", "'<i>") and "'&#x27;" in shown.badge("k", "'<i>")


@pytest.mark.parametrize("kind", KINDS)
def test_gallery_of_a_kind_shows_its_methods_only(kind):
    found = Gallery(kind=kind).entries
    assert found == [entry for entry in catalog().values() if kind in entry.kinds]


def test_gallery_of_a_chapter_and_of_what_is_built():
    assert {entry.chapter for entry in Gallery(chapter="offline").entries} == {"offline"}
    built = Gallery(built=True)
    assert built.entries == [entry for entry in catalog().values() if entry.built]
    assert Page(built._repr_html_()) and "noise_mask" in repr(built)
    nothing = Gallery(chapter="transport", kind="shaping")
    assert nothing.entries == [] and "No method" in nothing._repr_html_()


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown kind 'entropi'; did you mean .*entropy"):
        Gallery(kind="entropi")
    with pytest.raises(UnknownNameError, match="unknown chapter 'ofline'; did you mean .*offline"):
        Gallery(chapter="ofline")
    with pytest.raises(UnknownNameError, match="unknown term 'entropie'; did you mean .*entropy"):
        Glossary("entropie")


def test_summary_counts_every_method_in_one_state():
    counts = re.findall(r"(\d+)", re.sub(r"\(.*?\)", "", Gallery()._summary()))
    baselines = len(catalog()) - 61
    assert int(counts[0]) == 61 == sum(map(int, counts[1 : len(counts) - bool(baselines)]))


# ---- symptoms, kinds, glossary -----------------------------------------------------------------------------------------


def test_symptoms_table_has_a_row_a_symptom_with_every_method_that_answers_it(monkeypatch):
    [html] = outputs(Symptoms(), monkeypatch, "static")
    page = Page(html.data)
    assert len(page.cells) == 3 * len(SYMPTOMS)
    for place, symptom in enumerate(kinds()["symptoms"]):
        sees, why, methods = page.cells[3 * place : 3 * place + 3]
        assert sees == symptom["sees"] and why == symptom["why"]
        for entry in METHODS:
            assert (symptom["name"] not in entry.helps) or shown.words(entry) in methods
    assert all(symptom["sees"] in repr(Symptoms()) for symptom in kinds()["symptoms"])


def test_kinds_table_has_a_row_a_kind_with_all_its_methods(monkeypatch):
    picture, table = outputs(Kinds(), monkeypatch, "static")
    assert all(kind["title"] in picture.alt for kind in kinds()["kinds"])
    lines = [line for line in table.data.splitlines() if line.startswith("| **")]
    assert len(lines) == len(KINDS)
    for line, kind in zip(lines, kinds()["kinds"], strict=True):
        cells = line.strip("| ").split(" | ")
        assert len(cells) == 6 and kind["title"] in cells[0] and cells[1] == f"${kind['term']}$"
        names = {re.sub(r"\[(.+?)\]\(.+?\)", r"\1", name) for name in cells[5].split(", ")}
        assert names == {shown.words(entry) for entry in METHODS if kind["name"] in entry.kinds}


def test_glossary_shows_all_terms_or_those_asked_for(monkeypatch):
    [table] = outputs(Glossary(), monkeypatch, "static")
    assert all(f"| **{term}** | {meaning} |" in table.data for term, meaning in glossary().items())
    some = Glossary("Entropy", "advantage")
    assert list(some.terms) == ["advantage", "entropy"] and "**KL" not in some._repr_markdown_()
    assert repr(some).startswith("advantage: ")


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*GLYPHS, "plain"])
def test_glyphs_are_well_formed_and_stay_in_their_box(name):
    glyph = GLYPHS.get(name, PLAIN)
    root = ElementTree.fromstring(glyph.svg('a "title" & more'))
    assert root.attrib["aria-label"] == f'a "title" & more: {glyph.alt}' == root.find("title").text
    assert len(root) == 1 + len(glyph.strokes)
    for stroke in glyph.strokes:
        reach = 0 if stroke.filled else stroke.width / 2
        for x, y in stroke.points:
            assert -reach <= x <= WIDTH + reach and -reach <= y <= HEIGHT + reach
        assert stroke.color == "ink" or re.fullmatch(r"#[0-9A-F]{6}", stroke.color)


def test_glyphs_follow_the_pages_text_colour():
    assert "currentColor" in PLAIN.svg() and "ink" not in PLAIN.svg().replace("linecap", "")


def test_glyphs_differ_from_one_another():
    assert (
        len({glyph.strokes for glyph in GLYPHS.values()}) == len({glyph.alt for glyph in GLYPHS.values()}) == len(KINDS)
    )


def test_a_picture_of_few_colours_keeps_its_words_and_size(tmp_path):
    import io

    from PIL import Image

    png = shown.sheet([("one", "planned", GLYPHS["kl"]), ("two", "", PLAIN)])
    small = few_colors(png, 16, Description="two gläyphs")
    before, after = (Image.open(io.BytesIO(data)) for data in (png, small))
    assert before.size == after.size and after.mode == "P" and shown._description(small) == "two gläyphs"
    path = tmp_path / "small.png"
    path.write_bytes(small)
    assert len(shown.sheet([("a method", "built", path)] * 7)) > 1000


def test_thumbnails_are_small_have_words_and_belong_to_a_method():
    for path in (ROOT / "course/pictures/thumbnails").glob("*.png"):
        data = path.read_bytes()
        assert len(data) <= 15_000 and path.stem in catalog() and shown._description(data), path.name


def test_a_built_method_shows_its_thumbnail_and_a_planned_one_its_glyph(tmp_path, monkeypatch):
    built = next(entry for entry in catalog().values() if entry.slug == "noise_mask")
    assert shown.entry_picture(built) == shown.thumbnail(built) != None  # noqa: E711
    assert shown._inline(built).startswith("<div") and "data:image/png;base64," in shown._inline(built)
    planned = dataclasses.replace(built, path=None)
    assert shown.entry_picture(planned) is GLYPHS["noise"] and "<svg" in shown._inline(planned)

    def missing(relative):
        raise FileNotFoundError(relative)

    monkeypatch.setattr(shown, "find_asset", missing)
    assert shown.entry_picture(built) is GLYPHS["noise"] and shown.notebook(built) == ""
    assert Page(Gallery()._repr_html_()).links()  # arXiv remains


def thumbnails():
    spec = importlib.util.spec_from_file_location("course_thumbnails", ROOT / "course" / "thumbnails.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def views():
    import numpy as np

    from polrl.core.views import Bars, Heatmap, Histogram, ImageGrid, Lines, Points, Tokens

    noise, alt = np.random.default_rng(0), "a picture"
    named = {"title": "t", "alt": alt}
    return [
        ImageGrid(images=noise.random((4, 9, 28, 28)), **named),
        ImageGrid(images=noise.random((1, 1, 8, 8, 3)), **named),
        Bars(labels=["a", "b"], values={"x": [1, 2], "y": [2, 1]}, **named),
        Histogram(edges=np.linspace(0, 1, 11), counts={"x": noise.random(10)}, **named),
        Lines(x=[1, 2, 3], y={"x": [1, 3, 2], "y": [1, 2, 9]}, log_x=True, log_y=True, **named),
        Heatmap(values=noise.random((6, 7)), row_labels=list("abcdef"), x_label="x", **named),
        Points(groups={"x": noise.random((300, 2)), "y": noise.random((300, 2))}, **named),
        Tokens(lines=[["a", " b"], ["c"]], values=[[0.1, 0.9], [0.5]], **named),
    ]  # fmt: skip


@pytest.mark.parametrize("view", views(), ids=lambda view: type(view).__name__)
def test_every_kind_of_view_makes_a_small_thumbnail_with_words(view):
    import io

    from PIL import Image

    png = thumbnails().draw(view)
    assert len(png) <= 15_000 and shown._description(png) == "a picture"
    assert Image.open(io.BytesIO(png)).size == (240, 160)


def test_a_thumbnail_is_made_from_a_short_run_and_knows_its_code(tmp_path, monkeypatch, capsys):
    module = thumbnails()
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "short_run", lambda slug: views()[2])
    monkeypatch.setattr(sys, "argv", ["thumbnails.py", "noise_mask"])
    assert not module.is_fresh(catalog()["noise_mask"])
    assert module.main() == 0 and module.is_fresh(catalog()["noise_mask"])
    monkeypatch.setattr(sys, "argv", ["thumbnails.py", "noise_mask", "--check"])
    assert module.main() == 0 and "ok   noise_mask" in capsys.readouterr().out
    assert not module.is_fresh(dataclasses.replace(catalog()["noise_mask"], path=None))


# ---- the index -------------------------------------------------------------------------------------------------------


def index():
    return json.loads((ROOT / "course/index.ipynb").read_text(encoding="utf-8"))


def test_index_names_no_method_but_the_one_of_its_lab():
    source = "\n".join("".join(cell["source"]) for cell in index()["cells"])
    named = {entry.slug for entry in METHODS if re.search(rf"\b{entry.slug}\b", source)}
    assert named <= {"noise_mask", "score"}, "methods are listed by the gallery"


def test_links_of_the_index_lead_somewhere():
    for cell in index()["cells"]:
        for link in re.findall(r"\]\((?!https?:)(.+?)\)", "".join(cell["source"])):
            assert (ROOT / "course" / link).is_file(), link


def test_every_picture_of_the_index_has_words():
    seen = 0
    for cell in index()["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                seen += 1
                assert output["metadata"]["image/png"].get("alt")
    assert seen >= len(syllabus())
