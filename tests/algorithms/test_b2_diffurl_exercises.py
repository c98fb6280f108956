"""B²-DiffuRL's exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import math

import torch
from exercise_suite import ExerciseSuite

from polrl.diffusion._b2_diffurl_exercises import check_branch_advantages, check_ddim_logprob, check_stage_cost

# ---- exercise 1 --------------------------------------------------------------------------------------------------


def ddim_logprob(x, x_next, eps, abar, abar_next, eta):
    data = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    sigma = eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
    mean = math.sqrt(abar_next) * data + math.sqrt(1 - abar_next - sigma**2) * eps
    return torch.distributions.Normal(mean, sigma).log_prob(x_next.detach()).mean(1)


def logprob(change):
    """Return a wrong answer: `change` gets density terms, mean and sigma, and what went in."""

    def function(x, x_next, eps, abar, abar_next, eta):
        full = math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
        sigma, reduce, taken, root = eta * full, lambda terms: terms.mean(1), x_next.detach(), None
        if change == "sum":
            reduce = lambda terms: terms.sum(1)  # noqa: E731
        elif change == "all":
            reduce = torch.mean
        elif change == "attached":
            taken = x_next
        elif change == "root":
            root = math.sqrt(1 - abar_next)
        elif change == "eta":
            sigma = full
        elif change == "square":
            sigma = sigma**2
        if change == "swapped":
            abar, abar_next = abar_next, abar
        data = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        root = math.sqrt(1 - abar_next - sigma**2) if root is None else root
        normal = torch.distributions.Normal(math.sqrt(abar_next) * data + root * eps, sigma)
        terms = normal.log_prob(taken)
        if change == "constant":
            terms = terms + math.log(sigma) + 0.5 * math.log(2 * math.pi)
        return -reduce(terms) if change == "sign" else reduce(terms)

    return function


LOGPROB_MISTAKES = {
    "sum": (logprob("sum"), "sums over the dimensions"),
    "one number": (logprob("all"), "must have the shape"),
    "attached": (logprob("attached"), "so detach it"),
    "root": (logprob("root"), "sigma^2 is missing under the root"),
    "no eta": (logprob("eta"), "eta is not used"),
    "variance": (logprob("square"), "sigma is squared"),
    "no constant": (logprob("constant"), "The normalising constant is missing"),
    "sign": (logprob("sign"), "The sign is wrong"),
    "detached": (lambda *a: ddim_logprob(*a).detach(), "gradient by eps"),
}

# ---- exercise 2 --------------------------------------------------------------------------------------------------


def branch_advantages(reward, branches, mode):
    rows = [reward[i : i + branches] for i in range(0, len(reward), branches)]
    if mode == "group":
        std = math.sqrt(sum(float(r - reward.mean()) ** 2 for r in reward) / len(reward))
        return torch.cat([(row - row.mean()) / (std + 1e-6) for row in rows])
    z = (reward - reward.mean()) / (reward.std() + 1e-8)
    found = torch.zeros_like(z)
    for start in range(0, len(z), branches):
        row = z[start : start + branches]
        if row.max() >= 0.5:
            found[start + row.argmax()] = row.max()
        if row.min() < -0.5:
            found[start + row.argmin()] = row.min()
    return found


def credit(group=None, best_worst=None):
    def function(reward, branches, mode):
        if mode == "group" and group:
            return group(reward.reshape(-1, branches), reward).flatten()
        if mode == "best_worst" and best_worst:
            return best_worst(reward, branches)
        return branch_advantages(reward, branches, mode)

    return function


def beyond(reward, branches):
    z = (reward - reward.mean()) / (reward.std() + 1e-8)
    return torch.where((z >= 0.5) | (z < -0.5), z, 0.0)


ADVANTAGE_MISTAKES = {
    "batch mean": (credit(lambda r, all_: (r - all_.mean()) / (all_.std(correction=0) + 1e-6)), "the prefix decided"),
    "own deviation": (
        credit(lambda r, all_: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-6)),
        "the branch's own, which blows up",
    ),
    "no deviation": (credit(lambda r, all_: r - r.mean(1, keepdim=True)), "The deviation is missing"),
    "wrong axis": (credit(lambda r, all_: (r - r.mean(0)) / (all_.std(correction=0) + 1e-6)), "side by side"),
    "n - 1": (credit(lambda r, all_: (r - r.mean(1, keepdim=True)) / (all_.std() + 1e-6)), "the population's"),
    "all beyond": (credit(best_worst=beyond), "at most one winner and one loser"),
    "no losers": (
        credit(best_worst=lambda r, b: branch_advantages(r, b, "best_worst").clamp(min=0)),
        "losers are missing",
    ),
    "no winners": (
        credit(best_worst=lambda r, b: branch_advantages(r, b, "best_worst").clamp(max=0)),
        "winners are missing",
    ),
    "rows": (lambda r, b, mode: branch_advantages(r, b, mode).reshape(-1, b), "must have the shape"),
}

# ---- exercise 3 --------------------------------------------------------------------------------------------------


def stage_cost(steps, suffix, prefixes, branches, kept, epochs):
    total = 0
    for step in range(steps):
        total += prefixes if step < steps - suffix else prefixes * branches + 3 * epochs * kept
    return total


COST_MISTAKES = {
    "prefixes copied": (lambda s, k, p, b, n, e: p * b * s + 3 * e * n * k, "sampled once and copied"),
    "no prefixes": (lambda s, k, p, b, n, e: p * b * k + 3 * e * n * k, "prefixes are missing"),
    "no branches": (lambda s, k, p, b, n, e: p * s + 3 * e * n * k, "branches are missing"),
    "all steps trained": (lambda s, k, p, b, n, e: p * (s - k) + p * b * k + 3 * e * n * s, "only the suffix is"),
    "forwards only": (lambda s, k, p, b, n, e: p * (s - k) + p * b * k + e * n * k, "not 1"),
    "one epoch": (lambda s, k, p, b, n, e: p * (s - k) + p * b * k + 3 * n * k, "Each epoch"),
    "sampling only": (lambda s, k, p, b, n, e: p * (s - k) + p * b * k, "training is missing"),
}


class TestExercises(ExerciseSuite):
    solutions = [
        (check_ddim_logprob, ddim_logprob),
        (check_branch_advantages, branch_advantages),
        (check_stage_cost, stage_cost),
    ]
    mistakes = {
        check_ddim_logprob: LOGPROB_MISTAKES,
        check_branch_advantages: ADVANTAGE_MISTAKES,
        check_stage_cost: COST_MISTAKES,
    }


def test_cost_is_what_the_learner_counts():
    from polrl.diffusion.b2_diffurl import B2DiffuRL

    learner = B2DiffuRL(device="cpu", samples=12, steps=6, suffix_start=2, branches=4, selection="none", measured=16)
    learner.update()
    assert learner.evaluations == stage_cost(6, 2, 3, 4, 12, 2)
