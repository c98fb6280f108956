"""Schedules: how a knob's value is multiplied in the course of a budget of steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A factor for each step of a budget; past the budget the last non-zero factor holds.

    Parameters
    ----------
    factor : callable
        Maps a step from 0 to budget - 1 to a factor.
    budget : int
        The number of steps that the schedule is made for, at least 1.
    """

    factor: Callable[[int], float]
    budget: int

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"a schedule's budget must be at least 1 step, got {self.budget!r}")

    def __call__(self, step: int) -> float:
        """Return the factor at a step, counted from 0."""
        if step < self.budget:
            return self.factor(step)
        last = self.budget - 1
        while last > 0 and self.factor(last) == 0:
            last -= 1
        return self.factor(last)


def cosine(budget: int) -> Schedule:
    """Half a cosine from 1 towards 0 over the budget."""
    return Schedule(lambda step: 0.5 * (1 + math.cos(math.pi * step / budget)), budget)


def linear_decay(budget: int) -> Schedule:
    """A straight line from 1 towards 0 over the budget."""
    return Schedule(lambda step: 1 - step / budget, budget)


def step_decay(budget: int, every: int, by: float = 0.1) -> Schedule:
    """1, then multiplied by `by` after each `every` steps."""
    return Schedule(lambda step: by ** (step // every), budget)


def warmup(steps: int, start: float = 0.01) -> Schedule:
    """A straight line from `start` to 1 over `steps` steps, then 1."""
    return Schedule(lambda step: start + (1 - start) * step / steps if step < steps else 1.0, steps + 1)
