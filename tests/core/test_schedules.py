"""Schedules: the factor at every step, and what holds past the budget."""

from __future__ import annotations

import math

import pytest

from polrl.core.schedules import Schedule, cosine, linear_decay, step_decay, warmup


def test_a_cosine_falls_from_one_and_never_reaches_zero():
    schedule = cosine(10)
    values = [schedule(step) for step in range(10)]
    assert values[0] == 1.0 and values[5] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True) and values[-1] > 0
    assert schedule(3) == pytest.approx(0.5 * (1 + math.cos(0.3 * math.pi)))


def test_a_linear_decay_is_a_straight_line():
    assert [linear_decay(4)(step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_a_step_decay_holds_between_its_steps():
    assert [step_decay(9, every=3, by=0.5)(step) for step in range(9)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_a_warmup_rises_to_one_and_stays():
    schedule = warmup(4, start=0.2)
    assert [schedule(step) for step in range(7)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_no_warmup_is_one_from_the_start():
    assert [warmup(0)(step) for step in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", [cosine(7), linear_decay(7), step_decay(7, 2), warmup(6)])
def test_past_the_budget_the_last_factor_holds(schedule):
    last = schedule(schedule.budget - 1)
    assert last > 0
    assert all(schedule(step) == last for step in (schedule.budget, schedule.budget + 1, 10**6))


def test_past_the_budget_the_last_factor_that_is_not_zero_holds():
    schedule = Schedule(lambda step: max(0.0, 1 - step / 3), 8)
    assert [schedule(step) for step in (2, 3, 7)] == [pytest.approx(1 / 3), 0.0, 0.0]
    assert schedule(8) == schedule(100) == pytest.approx(1 / 3)
    assert Schedule(lambda step: 0.0, 3)(5) == 0.0


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_without_steps_is_refused(budget):
    for make in (cosine, linear_decay, lambda b: step_decay(b, 2)):
        with pytest.raises(ValueError, match="at least 1 step"):
            make(budget)
