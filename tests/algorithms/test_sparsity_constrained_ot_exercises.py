"""The sparsity-constrained transport exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import itertools

import pytest
import torch
from exercise_suite import ExerciseSuite

from polrl.transport._sparsity_constrained_ot_exercises import check_budgeted_projection, check_router, check_row_capped

# ---- exercise 1 ---------------------------------------------------------------------------------------------------


def dense(z, mass):
    """Project by bisection, without E6."""
    low, high = z.min() - mass, z.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (z - middle).clamp(min=0).sum() > mass else (low, middle)
    return (z - (low + high) / 2).clamp(min=0)


def projection(z, k, mass):
    best = None
    for support in itertools.combinations(range(len(z)), k):
        y = torch.zeros_like(z)
        y[list(support)] = dense(z[list(support)], mass)
        best = y if best is None or ((y - z) ** 2).sum() < ((best - z) ** 2).sum() else best
    return best


def kept(z, k, make, chosen=lambda z: z):
    where = chosen(z).argsort(descending=True)[:k]
    y = torch.zeros_like(z)
    y[where] = make(z[where])
    return y


PROJECTION_MISTAKES = {
    "mass one": (lambda z, k, mass: projection(z, k, 1.0), "must sum to mass"),
    "scaled after": (lambda z, k, mass: mass * projection(z, k, 1.0), "shrink z by mass first"),
    "no cap": (lambda z, k, mass: dense(z, mass), "cap is not kept"),
    "cut after": (lambda z, k, mass: kept(dense(z, mass), k, lambda u: u), "Cut after projecting"),
    "normalised": (
        lambda z, k, mass: kept(z, k, lambda u: mass * u.clamp(min=0) / u.clamp(min=0).sum()),
        "one threshold",
    ),
    "softmax": (lambda z, k, mass: kept(z, k, lambda u: mass * u.softmax(0)), "softmax is never zero"),
    "rho is k": (lambda z, k, mass: kept(z, k, lambda u: (u - (u.sum() - mass) / k).clamp(min=0)), "count only rho"),
    "negative": (lambda z, k, mass: kept(z, k, lambda u: u - (u.sum() - mass) / k), "below zero"),
    "magnitude": (lambda z, k, mass: kept(z, k, lambda u: dense(u, mass), torch.abs), "largest magnitude"),
    "zeros": (lambda z, k, mass: torch.zeros_like(z), "projection: expected"),
    "single precision": (lambda z, k, mass: projection(z, k, mass).float(), "must be float64"),
}


# ---- exercise 2 ---------------------------------------------------------------------------------------------------


def row_capped(beta, a, b, C, gamma, k, *, strength=None, weights=None, quadratic=1.0, sign=-1.0):
    value, columns = beta @ b, torch.zeros_like(b)
    for i in range(len(a)):
        s = beta + sign * C[i]
        own = gamma * (a[i] if strength is None else strength)
        y = projection(s / own, k, 1.0)
        weight = a[i] if weights is None else weights
        value = value - weight * (s @ y - quadratic * own / 2 * y @ y)
        columns = columns + weight * y
    return value, b - columns


def changed(**parts):
    return lambda *x: row_capped(*x, **parts)


def by_columns(beta, a, b, C, gamma, k):
    if len(a) != len(b):
        raise NotImplementedError
    return row_capped(beta, b, a, C.T, gamma, k)


DUAL_MISTAKES = {
    "columns": (by_columns, "caps the columns"),
    "gradient's sign": (lambda *x: (row_capped(*x)[0], -row_capped(*x)[1]), "missing in the columns; its sign"),
    "value's sign": (lambda *x: (-row_capped(*x)[0], row_capped(*x)[1]), "is maximised"),
    "strength": (changed(strength=1.0), "gamma * a_i"),
    "no quadratic": (changed(quadratic=0.0), "quadratic term of v"),
    "unweighted": (changed(weights=1.0), "counts a_i times"),
    "plus cost": (changed(sign=1.0), "not beta + C"),
    "no cap": (lambda beta, a, b, C, gamma, k: row_capped(beta, a, b, C, gamma, len(b)), "cap is not kept"),
    "value alone": (lambda *x: row_capped(*x)[0], "Return 2 values"),
}


# ---- exercise 3 ---------------------------------------------------------------------------------------------------


def chosen(k, gamma):
    return lambda tokens, experts: (k, gamma)


ROUTER_MISTAKES = {
    "loads": (chosen(80, 10.0), "more than 40 tokens: lower k"),
    "no room": (chosen(20, 1.0), "room for 200 of 320 tokens"),
    "too strong": (chosen(36, 100.0), "lower gamma"),
    "not whole": (chosen(40.0, 1.0), "whole number from 1 to 320, found 40.0"),
    "too large": (chosen(321, 1.0), "found 321"),
    "gamma out of range": (chosen(40, 0.0), "from 0.001 to 100, found 0.0"),
    "one number": (lambda tokens, experts: 40, "two numbers, k and gamma; found 40"),
}


class TestExercises(ExerciseSuite):
    solutions = [
        (check_budgeted_projection, projection),
        (check_row_capped, row_capped),
        (check_router, chosen(40, 1.0)),
        (check_router, lambda tokens, experts: (int(1.2 * tokens / experts), 2)),
    ]
    mistakes = {
        check_budgeted_projection: PROJECTION_MISTAKES,
        check_row_capped: DUAL_MISTAKES,
        check_router: ROUTER_MISTAKES,
    }


@pytest.fixture(autouse=True)
def _needs_digits():
    pytest.importorskip("sklearn")
