"""The checks of the sparsity-constrained transport notebook's three exercises."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from polrl.core.exercise import Case, Feedback, call, check, checker, require
from polrl.transport.sparsity_constrained_ot import routing_problem, semi_dual, solve, topk_simplex_projection
from polrl.worlds.routing import DigitRouting, first_choices, loads, routed_affinity

Tensor = torch.Tensor


def _budgeted(z: Tensor, k: int, mass: float) -> Tensor:
    """Return the reference solution of exercise 1."""
    return mass * topk_simplex_projection(z / mass, k)


def _on_best(z: Tensor, k: int, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return zeros but for the k largest entries of z, which become what `make` makes of them."""
    best, where = z.topk(k)
    return torch.zeros_like(z).scatter(0, where, make(best))


def _threshold_over_k(best: Tensor, mass: float) -> Tensor:
    return (best - (best.sum() - mass) / len(best)).clamp(min=0)


_PROJECTION_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "This sums to 1; the entries must sum to mass.": lambda z, k, mass: topk_simplex_projection(z, k),
    "This is the projection of z onto the simplex, times mass: shrink z by mass first, or put mass for 1 in E6.": (
        lambda z, k, mass: mass * topk_simplex_projection(z, k)
    ),
    "The cap is not kept: all entries take part, not only the k largest.": lambda z, k, mass: _budgeted(
        z, len(z), mass
    ),
    "Cut after projecting: project only what is left after the cut, or the sum is too small.": lambda z, k, mass: (
        _on_best(_budgeted(z, len(z), mass), k, lambda best: best)
    ),
    "Dividing by the sum is not the nearest point: all that is kept must fall by one threshold.": lambda z, k, mass: (
        _on_best(z, k, lambda best: mass * best.clamp(min=0) / best.clamp(min=0).sum())
    ),
    "A softmax is never zero and is not the nearest point; subtract a threshold.": lambda z, k, mass: _on_best(
        z, k, lambda best: mass * best.softmax(dim=0)
    ),
    "The threshold is computed from all k entries, but those below it are cut off: count only rho of them (E6).": (
        lambda z, k, mass: _on_best(z, k, lambda best: _threshold_over_k(best, mass))
    ),
    "Entries below zero are left: the positive part is missing.": lambda z, k, mass: _on_best(
        z, k, lambda best: best - (best.sum() - mass) / len(best)
    ),
    "These are the k entries of largest magnitude; the largest are asked for, with their sign.": lambda z, k, mass: (
        torch.zeros_like(z).scatter(0, (i := z.abs().topk(k).indices), _budgeted(z[i], k, mass))
    ),
}


@checker
def check_budgeted_projection(function: Any) -> Feedback:
    """Judge exercise 1, `budgeted_projection(z, k, mass)`: E6 for columns that carry any mass.

    Parameters
    ----------
    function : callable
        Of z [m], a cap k and a mass above 0; returns the nearest vector [m] that is not negative, sums to mass and has
        at most k non-zeros.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(50)]
    cases = [
        Case({"z": z, "k": k, "mass": mass}, {"projection": _budgeted(z, k, mass)}, _PROJECTION_MISTAKES, 1e-9)
        for z, k, mass in (
            (torch.tensor([0.9, 0.1, 0.8, 0.7], dtype=torch.float64), 2, 1.5),
            (torch.tensor([-3.0, 1.0, 0.2, 0.9, 0.6, -0.1], dtype=torch.float64), 3, 0.5),
            *((z, 1 + number % 6, 0.25 * (1 + number % 7)) for number, z in enumerate(drawn)),
        )
    ]
    hint = "topk gives the k largest; their sums so far, less mass, over their rank; rho counts the entries above that."
    return check(
        function, cases, hint=hint, praise="Top-k first, then one threshold: no search over the supports is needed."
    )


def _row_capped(beta: Tensor, a: Tensor, b: Tensor, C: Tensor, gamma: float, k: int) -> tuple[Tensor, Tensor]:
    """Return the reference solution of exercise 2."""
    value, plan = semi_dual(beta, b, a, C.T, gamma, k)
    return value, b - plan.sum(dim=1)


def _untransposed(beta: Tensor, a: Tensor, b: Tensor, C: Tensor, gamma: float, k: int) -> tuple[Tensor, Tensor]:
    value, plan = semi_dual(beta, a, b, C, gamma, k)
    return value, a - plan.sum(dim=1)


def _parts(
    beta: Tensor, a: Tensor, b: Tensor, C: Tensor, gamma: float, k: int, mass: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores [n, m], E4's y [n, m] and v [m], with another mass than a in the strength if one is given."""
    s = beta[:, None] - C.T
    strength = gamma * (a if mass is None else mass)
    y = topk_simplex_projection(s / strength, k)
    return s, y, (s * y).sum(dim=0) - strength / 2 * (y**2).sum(dim=0)


def _wrong_strength(beta: Tensor, a: Tensor, b: Tensor, C: Tensor, gamma: float, k: int) -> tuple[Tensor, Tensor]:
    _, y, v = _parts(beta, a, b, C, gamma, k, torch.ones_like(a))
    return beta @ b - a @ v, b - y @ a


def _no_quadratic(beta: Tensor, a: Tensor, b: Tensor, C: Tensor, gamma: float, k: int) -> tuple[Tensor, Tensor]:
    s, y, _ = _parts(beta, a, b, C, gamma, k)
    return beta @ b - a @ (s * y).sum(dim=0), b - y @ a


def _unweighted(beta: Tensor, a: Tensor, b: Tensor, C: Tensor, gamma: float, k: int) -> tuple[Tensor, Tensor]:
    _, y, v = _parts(beta, a, b, C, gamma, k)
    return beta @ b - v.sum(), b - y.sum(dim=1)


def _added_cost(beta: Tensor, a: Tensor, b: Tensor, C: Tensor, gamma: float, k: int) -> tuple[Tensor, Tensor]:
    return _row_capped(beta, a, b, -C, gamma, k)


_DUAL_MISTAKES: dict[str, Callable[..., Any]] = {
    "This caps the columns: here each ROW may have k non-zeros, and beta belongs to the columns.": _untransposed,
    "The gradient is b - T' 1, what is missing in the columns; its sign is wrong.": lambda *x: (
        _row_capped(*x)[0],
        -_row_capped(*x)[1],
    ),
    "The sign of the value is wrong: the semi-dual is maximised.": lambda *x: (-_row_capped(*x)[0], _row_capped(*x)[1]),
    "Each row has the strength gamma * a_i, not gamma (E4).": _wrong_strength,
    "The quadratic term of v is missing (E4).": _no_quadratic,
    "Each row counts a_i times, in the value and in the plan (E5).": _unweighted,
    "The scores are beta - C, not beta + C.": _added_cost,
    "The cap is not kept.": lambda beta, a, b, C, gamma, k: _row_capped(beta, a, b, C, gamma, len(b)),
}


@checker
def check_row_capped(function: Any) -> Feedback:
    """Judge exercise 2, `row_capped(beta, a, b, C, gamma, k)`: E5 with at most k non-zeros in each row.

    Parameters
    ----------
    function : callable
        Of the columns' potentials [n], masses [m] and [n], costs [m, n], a strength and a cap; returns the semi-dual
        value and its gradient [n].
    """
    cases = []
    sizes = ((3, 3, 2, 6.0), (4, 3, 2, 8.0), (3, 6, 3, 10.0), (7, 5, 1, 5.0), (5, 4, 4, 3.0))
    for seed, (m, n, k, gamma) in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed)
        C = torch.rand(m, n, generator=generator, dtype=torch.float64)
        a, b = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.2 for size in (m, n))
        beta = 0.4 * torch.randn(n, generator=generator, dtype=torch.float64)
        arguments: dict[str, Any] = {"beta": beta, "a": a / a.sum(), "b": b / b.sum(), "C": C, "gamma": gamma, "k": k}
        value, gradient = _row_capped(**arguments)
        cases.append(Case(arguments, {"value": value, "gradient": gradient}, _DUAL_MISTAKES, 1e-9))
    hint = (
        "Transpose: rows take the part of columns, a that of b. The gradient is what is missing in the columns' sums."
    )
    feedback = check(function, cases, hint=hint)
    if not feedback:
        return feedback
    beta, *others = cases[1].arguments.values()
    shifted = call(function, beta + 0.3, *others, hint=hint)
    require(
        abs(float(shifted[0]) - float(cases[1].expected["value"])) < 1e-9,
        "A constant added to beta must not change the value.",
    )
    return Feedback(
        "right", "The gradient sums to zero and a shift of beta changes nothing; rows are exact at every beta."
    )


@functools.cache
def router_task() -> DigitRouting:
    """Return exercise 3's world: 320 digits and 10 experts."""
    return DigitRouting.make(320, 10, seed=0)


@checker
def check_router(function: Any) -> Feedback:
    """Judge exercise 3, `choose(tokens, experts)`: strengths that keep the load low and the affinity high.

    Parameters
    ----------
    function : callable
        Of the numbers of tokens and experts; returns k and gamma.
    """
    affinity = router_task().affinity
    m, n = affinity.shape
    answer = call(function, m, n, hint="Drag k and gamma in the lab on routing, then return both: return k, gamma.")
    require(
        isinstance(answer, tuple | list) and len(answer) == 2, f"Return two numbers, k and gamma; found {answer!r}."
    )
    k, gamma = answer
    whole = isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= m
    require(whole, f"k must be a whole number from 1 to {m}, found {k!r}.")
    number = isinstance(gamma, int | float) and not isinstance(gamma, bool)
    require(number and 1e-3 <= gamma <= 1e2, f"gamma must be a number from 0.001 to 100, found {gamma!r}.")
    cost, a, b, _ = routing_problem(affinity, 1.0)
    plan = solve(cost, a, b, gamma=float(gamma), max_nz=k, max_iter=1000).T
    load = int(loads(plan).max())
    share = float(routed_affinity(plan, affinity) / routed_affinity(first_choices(affinity), affinity))
    found = f"With k = {k} and gamma = {gamma:g} the largest load is {load}, the affinity {share:.1%} of argmax's."
    require(load <= 40, f"{found} An expert has more than 40 tokens: lower k.")
    short = f" {n} experts with {k} places have room for {n * k} of {m} tokens: raise k." if n * k < m else ""
    why = short or " So strong a gamma spreads tokens evenly, and the cap then drops some: lower gamma."
    require(share >= 0.95, f"{found} At least 95 % is asked for.{why}")
    return Feedback(
        "right", f"{found} The argmax router's largest load is {int(loads(first_choices(affinity)).max())}."
    )
