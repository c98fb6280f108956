"""Equations: functions that carry their number, formula and source, and show their code without the ornament."""

from __future__ import annotations

import functools
import sys
import types

import pytest
import torch

from polrl import equation, equations


@equation("E1", r"\frac{1}{B}\sum_i x_i", source="Eq. 3")
def mean_of(x: torch.Tensor) -> torch.Tensor:
    """Mean of all entries,
    whatever their shape.

    Args with shapes follow.
    """
    # Why: it is the paper's.
    return x.mean()


@equation("E2", "x^2", source="derived")
def squared(
    x: torch.Tensor,
    words: str = '"""',
) -> torch.Tensor:
    r"""The square, \alpha and all."""
    return x**2


@equation("E3", "0", source="train.py")
def undocumented(x: torch.Tensor) -> torch.Tensor:
    total = """not a docstring"""
    return x * len(total)


@equation("E4", "1", source="Eq. 4")
@torch.no_grad()
def single_quoted(x: torch.Tensor) -> torch.Tensor:
    "One line."
    return x + 1


def helper(x):
    return x


def test_the_function_stays_what_it_is():
    assert mean_of(torch.arange(3.0)) == 1.0 and mean_of.__name__ == "mean_of"
    assert mean_of.equation.function is mean_of
    assert (mean_of.equation.number, mean_of.equation.source) == ("E1", "Eq. 3")
    x = torch.ones(2, requires_grad=True)
    squared(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("function", "code"),
    [
        (mean_of, "def mean_of(x: torch.Tensor) -> torch.Tensor:\n    # Why: it is the paper's.\n    return x.mean()"),
        (squared, 'def squared(\n    x: torch.Tensor,\n    words: str = \'"""\',\n) -> torch.Tensor:\n    return x**2'),
        (
            undocumented,
            "def undocumented(x: torch.Tensor) -> torch.Tensor:\n"
            '    total = """not a docstring"""\n    return x * len(total)',
        ),
        (single_quoted, "def single_quoted(x: torch.Tensor) -> torch.Tensor:\n    return x + 1"),
    ],
    ids=["long", "raw", "none", "short"],
)
def test_the_code_is_shown_without_decorator_and_docstring(function, code):
    assert function.equation.code() == code


def test_a_function_inside_another_is_shown_from_the_margin():
    @equation("E9", "x", source="derived")
    def inner(x):
        """Inner."""
        if x:
            return 1
        return 0

    assert inner.equation.code() == "def inner(x):\n    if x:\n        return 1\n    return 0"


def test_a_notebook_shows_words_formula_and_code():
    text = mean_of.equation._repr_markdown_()
    assert text.startswith("**E1** Mean of all entries, whatever their shape. *(Eq. 3)*\n")
    assert "$$\n\\frac{1}{B}\\sum_i x_i\n$$" in text and text.endswith("return x.mean()\n```") and '"""' not in text
    assert undocumented.equation._repr_markdown_().startswith("**E3** ")


def test_the_equations_of_a_module_are_found_in_the_files_order():
    found = equations(sys.modules[__name__])
    assert list(found) == ["E1", "E2", "E3", "E4"] and found["E2"].function is squared
    assert equations(helper) == found, "of the module of a function or a class"


def test_imported_equations_are_not_a_modules_own():
    other = types.ModuleType("made_up_equations")
    other.mean_of = mean_of
    assert equations(other) == {}


def test_two_equations_of_one_number_are_refused():
    double = types.ModuleType("made_up_double")
    for name in ("first", "second"):
        function = functools.partial(lambda x: x)
        function = types.FunctionType((lambda x: x).__code__, {}, name)
        function.__module__ = double.__name__
        setattr(double, name, equation("E1", "x", source="derived")(function))
    with pytest.raises(ValueError, match="made_up_double has two equations E1"):
        equations(double)
