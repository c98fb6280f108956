"""`@equation`: a pure function that carries its number, its formula and its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Equation:
    """One numbered equation of a paper's card, and the function that computes it.

    Attributes
    ----------
    number : str
        As in the card: "E4".
    latex : str
        The formula, without dollar signs.
    source : str
        Where it stands in the paper or in the official code, or "derived".
    function : callable
    """

    number: str
    latex: str
    source: str
    function: Callable[..., Any] = field(repr=False)  # its address differs from process to process

    def code(self) -> str:
        """Return the function's source without its decorator and docstring, as a reader wants it beside the formula."""
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(self.function)))
        function = ast.parse(source).body[0]
        assert isinstance(function, ast.FunctionDef)
        lines = source.splitlines()
        if ast.get_docstring(function, clean=False) is not None:
            docstring = function.body[0]
            del lines[docstring.lineno - 1 : docstring.end_lineno]
        return "\n".join(lines[function.lineno - 1 :])

    def _repr_markdown_(self) -> str:
        first = (inspect.getdoc(self.function) or "").split("\n\n")[0].replace("\n", " ")
        head = f"**{self.number}** {first} *({self.source})*"
        return f"{head}\n\n$$\n{self.latex}\n$$\n\n```python\n{self.code()}\n```"


def equation(number: str, latex: str, source: str) -> Callable[[F], F]:
    """Mark a pure function as an equation of the card.

    Parameters
    ----------
    number : str
        The card's number, such as "E4".
    latex : str
        The formula, without dollar signs.
    source : str
        Where it stands: "Eq. 5", "train.py", "derived" ...

    Returns
    -------
    callable
        The function itself, with an attribute `equation`.
    """

    def mark(function: F) -> F:
        function.equation = Equation(number, latex, source, function)  # type: ignore[attr-defined]
        return function

    return mark


def equations(where: types.ModuleType | type | Callable[..., Any]) -> dict[str, Equation]:
    """Return the equations that a module, or the module of a learner, defines: by number, in the file's order.

    Raises
    ------
    ValueError
        If two functions carry the same number.
    """
    module = where if isinstance(where, types.ModuleType) else inspect.getmodule(where)
    found: dict[str, Equation] = {}
    for value in vars(module).values():
        marked = getattr(value, "equation", None)
        if not isinstance(marked, Equation) or value.__module__ != module.__name__:  # type: ignore[union-attr]
            continue
        if marked.number in found:
            raise ValueError(f"{module.__name__} has two equations {marked.number}")  # type: ignore[union-attr]
        found[marked.number] = marked
    return found
