"""Exercises: checks that answer at once, explain what is wrong, and never raise.

A notebook whose exercises are unsolved must run to its end, so a check turns everything that can happen to a
learner's function into a `Feedback`. Most checks are a list of cases::

    @checker
    def check_square(function):
        x = torch.tensor([1.0, -3.0])
        case = Case({"x": x}, {"square": x**2}, mistakes={"This is twice x, not x times x.": lambda x: 2 * x})
        return check(function, [case], praise="A square is never negative.")
"""

from __future__ import annotations

import functools
import html
import inspect
import linecache
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

State = Literal["not done yet", "wrong", "right"]

#: Okabe and Ito's colours, which differ for every kind of eye; the words and signs say the same.
_LOOKS: dict[str, tuple[str, str]] = {
    "not done yet": ("○", "#E69F00"),
    "wrong": ("✗", "#D55E00"),
    "right": ("✓", "#009E73"),
}
_GRADIENT = "gradient by "
#: Tensors of up to so many numbers are shown whole.
_SHOWN = 8


@dataclass(frozen=True, repr=False)
class Feedback:
    """What a check says; true if the answer is right, so that an assignment can assert it.

    Attributes
    ----------
    state : {"not done yet", "wrong", "right"}
    words : str
        What is wrong, or what was learned.
    """

    state: State
    words: str

    def __bool__(self) -> bool:
        return self.state == "right"

    def __repr__(self) -> str:
        return f"{_LOOKS[self.state][0]} {self.state}: {self.words}"

    def _repr_html_(self) -> str:
        sign, colour = _LOOKS[self.state]
        return (
            f'<div role="status" style="border-left: 6px solid {colour}; padding: 4px 12px">'
            f"<strong>{sign} {self.state}</strong>: {html.escape(self.words)}</div>"
        )


class Answered(Exception):
    """Carries a feedback out of a check, up to its `checker`."""

    def __init__(self, feedback: Feedback) -> None:
        super().__init__(feedback.words)
        self.feedback = feedback


def require(condition: bool, words: str) -> None:
    """End the check with "wrong" and these words unless the condition holds."""
    if not condition:
        raise Answered(Feedback("wrong", words))


def checker(judge: Callable[[Any], Feedback]) -> Callable[[Any], Feedback]:
    """Make a function that judges an answer return its feedback whatever happens."""

    @functools.wraps(judge)
    def judged(function: Any) -> Feedback:
        try:
            return judge(function)
        except Answered as answered:
            return answered.feedback
        except Exception as error:
            return Feedback("wrong", f"This answer can't be judged: {type(error).__name__}: {error}")

    return judged


@dataclass(frozen=True)
class Case:
    """One call of the learner's function, and what should come out.

    Parameters
    ----------
    arguments : mapping of str to object
        In the function's order; small, because they are shown.
    expected : mapping of str to tensor or number
        The returned values by name, in their order. "gradient by x" is the gradient of the (sum of the) first
        value by the argument x; zeros where no gradient should pass.
    mistakes : mapping of str to callable
        A sentence that explains a typical mistake, and a function that makes it; it is recognised by what
        comes out.
    tolerance : float
        Relative to numbers above 1, absolute below.
    """

    arguments: Mapping[str, Any]
    expected: Mapping[str, Any]
    mistakes: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    tolerance: float = 1e-6


def check(function: Any, cases: Sequence[Case], *, hint: str = "", praise: str = "") -> Feedback:
    """Try the learner's function on cases, simple ones first, and report the first thing that is wrong.

    Parameters
    ----------
    function : callable
        The learner's.
    cases : sequence of Case
    hint : str
        Said while the function is unfinished.
    praise : str
        Said when all is right; best a sentence on what the result means.
    """

    def judge(function: Any) -> Feedback:
        for case in cases:
            found = _observe(function, case, hint)
            for name, expected in case.expected.items():
                difference = _difference(name, _tensor(expected), found[name], case.tolerance)
                if difference:
                    words = (_explanation(case, name, found), difference, _show_arguments(case.arguments))
                    return Feedback("wrong", " ".join(filter(None, words)))
        return Feedback("right", praise or "All cases come out as they should.")

    return checker(judge)(function)


def call(function: Any, *arguments: Any, hint: str = "") -> Any:
    """Call the learner's function inside a `checker`; if it is unfinished or fails, the check ends there."""
    if function is None or function is ...:
        raise _unfinished(hint)
    require(
        callable(function),
        f"Hand over the function itself, check(f) and not check(f(...)); not {_kind(function)}.",
    )
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        require(False, f"The function must take {len(arguments)} arguments: {error}.")
    except ValueError:  # some built-in functions have no signature to look at
        pass
    try:
        result = function(*arguments)
    except NotImplementedError:
        raise _unfinished(hint) from None
    except Exception as error:
        raise Answered(Feedback("wrong", f"Your function raised {_report(function, error)}")) from None
    if _missing(result) or (isinstance(result, tuple | list) and any(map(_missing, result))):
        raise _unfinished(hint)
    return result


def _missing(value: Any) -> bool:
    return value is None or value is ... or value is NotImplemented


def _unfinished(hint: str) -> Answered:
    return Answered(Feedback("not done yet", hint or "Fill in the function, then run this cell again."))


def _report(function: Any, error: Exception) -> str:
    """Say type, message and place of an error: the last line of the learner's own cell that was reached."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    message = f"{type(error).__name__}: {error}".rstrip(": ")
    if not frames:
        return message
    line = frames[-1].lineno or 0
    source = linecache.getline(frames[-1].filename, line).strip()
    return f"{message} (line {line}{': ' + source if source else ''})"


@torch.enable_grad()
def _observe(function: Any, case: Case, hint: str = "") -> dict[str, torch.Tensor]:
    """Call a function on copies of a case's arguments; return its values, and gradients, by name."""
    arguments = {
        name: value.detach().clone().requires_grad_(_GRADIENT + name in case.expected)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in case.arguments.items()
    }
    names = [name for name in case.expected if not name.startswith(_GRADIENT)]
    result = call(function, *arguments.values(), hint=hint)
    values = list(result) if len(names) > 1 and isinstance(result, tuple | list) else [result]
    listed = ", ".join(names)
    require(len(values) == len(names), f"Return {len(names)} values ({listed}); found {_kind(result)}.")
    found = {}
    for name, value in zip(names, values, strict=True):
        try:
            found[name] = _tensor(value, _tensor(case.expected[name]).dtype)
        except (TypeError, ValueError, RuntimeError):
            require(False, f"{name} must be a tensor, found {_kind(value)}.")
    wanted = [name for name in case.expected if name.startswith(_GRADIENT)]
    sources = [arguments[name.removeprefix(_GRADIENT)] for name in wanted]
    first = found[names[0]]
    gradients: Sequence[torch.Tensor | None] = [None] * len(sources)
    if sources and first.requires_grad:
        gradients = torch.autograd.grad(first.sum(), sources, allow_unused=True)
    for name, source, gradient in zip(wanted, sources, gradients, strict=True):
        found[name] = torch.zeros_like(source) if gradient is None else gradient
    return found


def _tensor(value: Any, number_dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return a value as a tensor; a plain Python number has no dtype and takes the one that is given."""
    return torch.as_tensor(value, dtype=number_dtype if isinstance(value, int | float) else None)


def _difference(name: str, expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> str:
    """Say how a value differs from what it should be; "" if it does not."""
    if found.shape != expected.shape:
        return f"{name} must have the shape {list(expected.shape)}, found {list(found.shape)}."
    if found.dtype != expected.dtype:
        return f"{name} must be {_dtype(expected)}, as the arguments are, found {_dtype(found)}."
    found, expected = found.detach().double(), expected.detach().double()
    error = (found - expected).abs() / expected.abs().clamp(min=1.0)
    if bool((error <= tolerance).all()):
        return ""
    place = ""
    if found.numel() > _SHOWN:
        worst = torch.unravel_index(error.nan_to_num(nan=torch.inf).argmax(), found.shape)
        place = str([int(i) for i in worst])
        expected, found = expected[worst], found[worst]
    digits = 6 if _show(expected) != _show(found) else 15
    return f"{name}{place}: expected {_show(expected, digits)}, found {_show(found, digits)}."


def _explanation(case: Case, wrong: str, found: Mapping[str, torch.Tensor]) -> str:
    """Return the sentence of the typical mistake that gives what was found, the one that fits best."""
    best, most = "", 0
    for sentence, mistake in case.mistakes.items():
        try:
            made = _observe(mistake, case)
        except Answered:  # this mistake is not possible with these arguments
            continue
        alike = [name for name in found if not _difference(name, made[name], found[name], case.tolerance)]
        if wrong in alike and len(alike) > most:
            best, most = sentence, len(alike)
    return best


def _show(value: torch.Tensor, digits: int = 6) -> str:
    def rounded(entry: Any) -> str:
        if isinstance(entry, list):
            return f"[{', '.join(map(rounded, entry))}]"
        return f"{entry:.{digits}g}"

    return rounded(value.detach().tolist())


def _show_arguments(arguments: Mapping[str, Any]) -> str:
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    if any(value.numel() > _SHOWN for value in tensors):
        return ""
    shown = [f"{n}={_show(v) if isinstance(v, torch.Tensor) else repr(v)}" for n, v in arguments.items()]
    return f"(Tried with {', '.join(shown)}.)"


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{len(value)} values"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a value of type {type(value).__name__}"


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
