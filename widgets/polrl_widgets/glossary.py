"""The field's terms as the course uses them."""

from __future__ import annotations

from polrl.core.catalog import glossary
from polrl.core.errors import unknown_name


class Glossary:
    """Terms with their meaning, in alphabetical order; shows itself in a notebook.

    Parameters
    ----------
    *terms : str
        Only these; all by default. Upper and lower case do not matter.

    Raises
    ------
    UnknownNameError
        If there is no such term; the nearest ones are suggested.
    """

    def __init__(self, *terms: str) -> None:
        known = glossary()
        by_letters = {term.lower(): term for term in known}
        for term in terms:
            if term.lower() not in by_letters:
                raise unknown_name("term", term, known)
        chosen = {by_letters[term.lower()] for term in terms} or set(known)
        self.terms = {term: meaning for term, meaning in known.items() if term in chosen}

    def __repr__(self) -> str:
        return "\n".join(f"{term}: {meaning}" for term, meaning in self.terms.items())

    def _ipython_display_(self) -> None:
        from IPython.display import Markdown, display

        display(Markdown(self._repr_markdown_()))

    def _repr_markdown_(self) -> str:
        rows = "\n".join(f"| **{term}** | {meaning} |" for term, meaning in self.terms.items())
        return f"| term | what it means |\n|:--|:--|\n{rows}"
