"""The errors that polrl raises on purpose, each with a message for the person at the keyboard."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PolrlError(Exception):
    """Base of every error that polrl raises on purpose."""


class KnobError(PolrlError, ValueError):
    """A value that a knob or a structural setting does not take; the old value stays."""


class UnknownNameError(PolrlError, LookupError):
    """A knob, method, metric or data set of that name does not exist."""


class DrivenConfigError(PolrlError, AttributeError):
    """Direct assignment to a config that a run drives."""


class StructureError(PolrlError, ValueError):
    """A structural setting was changed after the run had begun."""


class StateError(PolrlError, TypeError):
    """A learner holds something that can't be saved or restored."""


class DataError(PolrlError, ValueError):
    """A data file is missing, truncated or altered, or holds what it must not."""


class CheckpointError(PolrlError, ValueError):
    """A saved run can't be read: truncated, altered, or of another form."""


class RunLockedError(PolrlError, RuntimeError):
    """Another process is writing to the run's folder."""


class DivergedError(PolrlError, ArithmeticError):
    """A metric stopped being finite; the run went back to its last finite state.

    Attributes
    ----------
    step : int
        The first step whose metrics were not finite.
    metric : str
        The first metric that was not finite.
    restored_step : int
        The step to which the run went back.
    """

    def __init__(self, message: str, *, step: int, metric: str, restored_step: int) -> None:
        super().__init__(message)
        self.step = step
        self.metric = metric
        self.restored_step = restored_step


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """Make the error for an unknown name, with the nearest known ones.

    Parameters
    ----------
    kind : str
        What was looked for: "knob", "method", "metric" ...
    name : object
        The name that was not found.
    known : iterable of str
        The names that exist.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(near) + "?"
    else:
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        hint = f"there are: {shown}" if names else "there are none"
    return UnknownNameError(f"unknown {kind} {str(name)!r}; {hint}")
