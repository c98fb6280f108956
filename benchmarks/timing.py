"""Two ways of doing one work, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def interleaved(first: Callable[[int], object], second: Callable[[int], object], steps: int, rounds: int) -> float:
    """Return the median over rounds of (seconds of `first`) / (seconds of `second`) for the same number of steps."""
    ratios = []
    for _ in range(rounds):
        seconds = []
        for work in (first, second):
            begun = time.perf_counter()
            work(steps)
            seconds.append(time.perf_counter() - begun)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return what a work returns, and its processor seconds: on one thread they are what a free machine would take."""
    begun = time.process_time()
    found = work()
    return found, time.process_time() - begun


def repeat(work: Callable[[], object]) -> Callable[[int], None]:
    """Return a function that does a work so many times."""

    def works(steps: int) -> None:
        for _ in range(steps):
            work()

    return works
