"""Exercise checks answer, explain, and never raise."""

from __future__ import annotations

import pytest
import torch

from polrl.core.exercise import Case, Feedback, call, check, checker, require

X = torch.tensor([1.0, -3.0], dtype=torch.float64)
Y = torch.tensor(2.0, dtype=torch.float64)
TWICE = "This is twice x, not x times x."
DETACHED = "x is detached."


def square_cases() -> list[Case]:
    """Return one case: the sum of y x^2, and y itself."""
    case = Case(
        {"x": X, "y": Y},
        {"total": 2 * (X**2).sum(), "y": Y, "gradient by x": 4 * X},
        mistakes={
            TWICE: lambda x, y: ((2 * x * y).sum(), y),
            DETACHED: lambda x, y: ((x.detach() ** 2 * y).sum(), y),
        },
    )
    return [case]


def judge(function) -> Feedback:
    return check(function, square_cases(), hint="Square x.", praise="Squares are not negative.")


def raises(error: BaseException):
    def function(x, y):
        raise error

    return function


def test_right_answer_is_praised_and_true():
    feedback = judge(lambda x, y: ((y * x**2).sum(), y))
    assert feedback and feedback == Feedback("right", "Squares are not negative.")


@pytest.mark.parametrize(
    "unfinished",
    [
        raises(NotImplementedError()),
        lambda x, y: None,
        lambda x, y: ...,
        lambda x, y: NotImplemented,
        lambda x, y: (..., y),
        lambda x, y: [None, None],
        None,
        ...,
    ],
)
def test_unfinished_answer_gets_the_hint(unfinished):
    assert judge(unfinished) == Feedback("not done yet", "Square x.")


def test_unfinished_answer_without_hint_gets_a_general_one():
    assert "run this cell again" in check(None, square_cases()).words


def test_exception_is_reported_with_type_message_and_line():
    def broken(x, y):
        z = x.reshape(1, 2)
        return z @ z, y  # the line that fails

    feedback = judge(broken)
    line = broken.__code__.co_firstlineno + 2
    assert feedback.state == "wrong"
    assert "RuntimeError: mat1 and mat2" in feedback.words
    assert f"(line {line}: return z @ z, y" in feedback.words


def test_exception_in_code_without_source_is_reported():
    names: dict = {}
    exec("def broken(x, y):\n    return x / [], y\n", names)
    assert "TypeError" in judge(names["broken"]).words
    assert "line 2" in judge(names["broken"]).words


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x, y: (x**2 * y, y), "total must have the shape [], found [2]"),
        (
            lambda x, y: ((x**2 * y).sum().float(), y),
            "total must be float64, as the arguments are, found float32",
        ),
        (lambda x, y: ((x**2 * y).sum() + 1, y), "total: expected 20, found 21."),
        (lambda x, y: (torch.tensor(torch.nan).double(), y), "total: expected 20, found nan."),
        (lambda x, y: (20.0, y), "gradient by x: expected [4, -12], found [0, 0]."),
        (lambda x, y: (20, y), "gradient by x: expected [4, -12], found [0, 0]."),
        (lambda x, y: (20.0, y), DETACHED),
        (lambda x, y: ((2 * x * y).sum(), y), TWICE),
        (lambda x, y: ((2 * x * y).sum(), 0 * y), TWICE),
        (lambda x, y: ((x.detach() ** 2 * y).sum(), y), DETACHED),
        (lambda x, y: ((x**2 * y).sum() + 1, y), "(Tried with x=[1, -3], y=2.)"),
        (lambda x, y: (x**2 * y).sum(), "Return 2 values (total, y); found a tensor of shape []"),
        (lambda x, y: (x, x, x), "Return 2 values (total, y); found 3 values"),
        (lambda x, y: ({}, y), "total must be a tensor, found a value of type dict"),
        (lambda x, y: ("20", y), "total must be a tensor, found a value of type str"),
        (lambda x: x, "must take 2 arguments"),
        (raises(ValueError("no")), "ValueError: no"),
        (torch.tensor(3.0), "Hand over the function itself"),
        ((1, 2), "Hand over the function itself"),
    ],
)
def test_wrong_answer_is_explained(answer, words):
    feedback = judge(answer)
    assert feedback.state == "wrong" and not feedback
    assert words in feedback.words


def test_numbers_that_look_alike_are_shown_with_all_digits():
    words = judge(lambda x, y: ((y * x**2).sum() + 1e-4, y)).words
    assert "expected 20, found 20.0001" in words
    close = check(lambda x: x + 1e-7, [Case({"x": Y}, {"x": Y}, tolerance=1e-9)]).words
    assert "expected 2, found 2.0000001" in close


def test_large_tensors_show_the_worst_entry_only():
    x = torch.zeros(4, 5)
    worse = x.clone()
    worse[2, 3] = 7
    words = check(lambda x: worse, [Case({"x": x}, {"image": x})]).words
    assert words == "image[2, 3]: expected 0, found 7."


def test_arguments_are_copies():
    case = square_cases()[0]
    for _ in range(2):
        assert check(lambda x: x.mul_(2), [Case({"x": case.arguments["x"]}, {"twice": 2 * X})])
    assert torch.equal(X, torch.tensor([1.0, -3.0], dtype=torch.float64))


def test_gradients_are_asked_for_even_inside_no_grad():
    with torch.no_grad():
        assert judge(lambda x, y: ((y * x**2).sum(), y))


def test_checker_never_raises():
    @checker
    def careless(function):
        return Feedback("right", str(1 / call(function, 0)))

    assert careless(lambda x: x) == Feedback(
        "wrong", "This answer can't be judged: ZeroDivisionError: division by zero"
    )
    assert careless(lambda x: None).state == "not done yet"
    assert careless(lambda: 1).state == "wrong"

    @checker
    def strict(function):
        require(call(function) > 2, "It must be above 2.")
        return Feedback("right", "")

    assert strict(lambda: 1) == Feedback("wrong", "It must be above 2.")
    assert strict(lambda: 3)


def test_stopping_by_hand_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt):
        judge(raises(KeyboardInterrupt()))


@pytest.mark.parametrize("state", ["not done yet", "wrong", "right"])
def test_feedback_shows_its_state_in_words_signs_and_colours(state):
    feedback = Feedback(state, "a < b & c")
    assert repr(feedback).endswith(f"{state}: a < b & c")
    page = feedback._repr_html_()
    assert state in page and "a &lt; b &amp; c" in page
    colours = {"not done yet": "#E69F00", "wrong": "#D55E00", "right": "#009E73"}
    assert [colour in page for colour in colours.values()] == [name == state for name in colours]
    assert len({repr(Feedback(other, ""))[0] for other in colours}) == 3
