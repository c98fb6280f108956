"""Every equation of a method's card is an `@equation`, or its file's docstring says why it is not."""

from __future__ import annotations

import importlib
import re

import pytest

from polrl import equations
from polrl.core.catalog import catalog

BUILT = [entry for entry in catalog().values() if entry.built and entry.arxiv]


def mentioned(text: str) -> set[int]:
    """Return the equation numbers that a text names, those inside a range such as E2-E8 included."""
    found = {int(number) for number in re.findall(r"\bE(\d+)", text)}
    for first, last in re.findall(r"\bE(\d+)\s*(?:-|\u2013|to)\s*E?(\d+)", text):
        found.update(range(int(first), int(last) + 1))
    return found


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("E1 and E3a, (E12)", {1, 3, 12}),
        ("E2-E4, E6 to E8", {2, 3, 4, 6, 7, 8}),
        ("MSE2, 1E5, E", set()),
    ],
)
def test_numbers_are_read(text, numbers):
    assert mentioned(text) == numbers


@pytest.mark.parametrize("entry", BUILT, ids=lambda entry: entry.slug)
def test_numbers_are_contiguous(entry):
    module = importlib.import_module(entry.module)
    coded = {number: int(re.match(r"E(\d+)[a-z]*'?$", number)[1]) for number in equations(module)}
    assert coded, f"{entry.module} has no @equation"
    named = mentioned(module.__doc__)
    highest = max([*coded.values(), *named])
    missing = set(range(1, highest + 1)) - set(coded.values()) - named
    assert not missing, f"neither an @equation nor named in the docstring: {sorted(f'E{n}' for n in missing)}"


@pytest.mark.parametrize("entry", BUILT, ids=lambda entry: entry.slug)
def test_equations_say_what_they_are(entry):
    for number, found in equations(importlib.import_module(entry.module)).items():
        assert found.latex and "$" not in found.latex, f"{number}: LaTeX without dollar signs"
        assert found.latex.count("{") == found.latex.count("}"), f"{number}: braces"
        assert found.latex.count(r"\left") - found.latex.count(r"\leftarrow") == found.latex.count(r"\right") - (
            found.latex.count(r"\rightarrow")
        ), f"{number}: left and right"
        assert found.source, f"{number}: source"
        assert found.function.__doc__, f"{number}: docstring"
        assert found.code().startswith("def "), f"{number}: code"
