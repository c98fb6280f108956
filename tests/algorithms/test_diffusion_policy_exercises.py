"""Diffusion policy's exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import math

import torch
from exercise_suite import ExerciseSuite

from polrl.diffusion._diffusion_policy_exercises import (
    check_chain_log_probabilities,
    check_minibatch_credit,
    check_ratio_bounds,
)

# ---- exercise 1 --------------------------------------------------------------------------------------------------


def credit(change=""):
    """Return the solution, or it with one change."""

    def function(advantage, chunk, step, finetuned_steps, denoising_discount):
        numbers = [advantage[c] for c in chunk.tolist()]
        powers = {"j": lambda j: j, "late": lambda j: finetuned_steps - j, "none": lambda j: 0}
        power = powers.get(change, lambda j: finetuned_steps - 1 - j)
        weights = [denoising_discount ** power(j) for j in step.tolist()]
        if change == "discount first":
            numbers = [a * w for a, w in zip(numbers, weights, strict=True)]
        compared = {"all": list(advantage), "distinct": [advantage[c] for c in sorted(set(chunk.tolist()))]}.get(
            change, numbers
        )
        mean = sum(compared) / len(compared)
        variance = sum((a - mean) ** 2 for a in compared) / (len(compared) - (0 if change == "population" else 1))
        scale = 1.0 if change == "no deviation" else variance.sqrt() + (0.0 if change == "no epsilon" else 1e-8)
        found = [(a - (0.0 if change == "no mean" else mean)) / scale for a in numbers]
        if change != "discount first":
            found = [a * w for a, w in zip(found, weights, strict=True)]
        result = torch.stack(found)
        return result if change == "no detach" else result.detach()

    return function


CREDIT_MISTAKES = {
    "discount first": (credit("discount first"), "E16 normalises first"),
    "population": (credit("population"), "divides by m"),
    "exponent j": (credit("j"), "the noisiest step gets the most credit"),
    "exponent one too large": (credit("late"), "one too large"),
    "not discounted": (credit("none"), "Nothing is discounted"),
    "no mean": (credit("no mean"), "mean is not subtracted"),
    "no deviation": (credit("no deviation"), "deviation is missing"),
    "all chunks": (credit("all"), "normalises in the minibatch"),
    "distinct chunks": (credit("distinct"), "counts twice"),
    "no epsilon": (credit("no epsilon"), "1e-8 is missing"),
    "no detach": (credit("no detach"), "The credit is a constant"),
    "of the chunks": (lambda a, c, j, k, g: credit()(a, torch.arange(5), torch.zeros(5), k, g), "shape [6]"),
}

# ---- exercise 2 --------------------------------------------------------------------------------------------------


def bounds(change=""):
    """Return the solution, or it with one change."""

    def function(finetuned_steps, start, end):
        if change == "backwards":
            start, end = end, start
        lower, upper = [], []
        for j in range(finetuned_steps):
            if change == "by K'":
                u = j / finetuned_steps
            elif change == "from 1":
                u = (j + 1) / finetuned_steps
            elif finetuned_steps == 1 and change != "unguarded":
                u = 0.0 if change == "start" else 1.0
            else:
                u = j / (finetuned_steps - 1)
            share = {
                "linear": u,
                "rate": (math.exp(u) - 1) / (math.e - 1),
                "not normalised": math.exp(3 * u) - 1,
                "no one": math.exp(3 * u) / math.exp(3),
            }.get(change, (math.exp(3 * u) - 1) / (math.exp(3) - 1))
            e = start + (end - start) * share
            lower.append(1 / (1 + e) if change == "symmetric in the log" else 1 - e)
            upper.append(1 + e)
        return torch.tensor(lower, dtype=torch.float64), torch.tensor(upper, dtype=torch.float64)

    return function


def unguarded(finetuned_steps, start, end):
    """Divide zero by zero with tensors, which raises nothing."""
    u = torch.arange(finetuned_steps, dtype=torch.float64) / (finetuned_steps - 1)
    e = start + (end - start) * torch.expm1(3 * u) / math.expm1(3)
    return 1 - e, 1 + e


BOUNDS_MISTAKES = {
    "backwards": (bounds("backwards"), "j = 0 is the noisiest step"),
    "linear": (bounds("linear"), "rises linearly"),
    "by K'": (bounds("by K'"), "never reaches 1"),
    "from 1": (bounds("from 1"), "above 0 at the first step"),
    "rate": (bounds("rate"), "The rate is 3"),
    "not normalised": (bounds("not normalised"), "divide by e^3 - 1"),
    "no one": (bounds("no one"), "is 0 at the first step"),
    "symmetric in the log": (bounds("symmetric in the log"), "not 1 / (1 + e)"),
    "division by zero": (bounds("unguarded"), "divides by zero"),
    "zero by zero": (unguarded, "divides by zero"),
    "start where K' = 1": (bounds("start"), "gets e_1, not e_0"),
    "one value": (lambda k, start, end: bounds()(k, start, end)[0], "Return 2 values"),
}

# ---- exercise 3 --------------------------------------------------------------------------------------------------


def log_probabilities(change=""):
    """Return the solution, or it with one change."""

    def function(stages, means, std, floor):
        columns = []
        for j in range(means.shape[1]):
            sigma = std[j] + floor if change == "added" else std[j] if change == "no floor" else max(std[j], floor)
            after = stages[:, j] if change == "before" else stages[:, j + 1]
            after = after if change == "through" else after.detach()
            normal = torch.distributions.Normal(means[:, j], sigma)
            density = normal.log_prob(after)
            if change == "no half":
                density = density - 0.5 * ((after - means[:, j]) / sigma) ** 2
            if change == "no constant":
                density = density + 0.5 * math.log(2 * math.pi)
            if change == "whole constant":
                density = density - 0.5 * math.log(2 * math.pi)
            if change == "no log":
                density = density + math.log(sigma)
            low, high = {"above only": (None, 2), "below only": (-5, None)}.get(change, (-5, 2))
            if change == "average first":
                density = density.mean(dim=1, keepdim=True)
            if change != "free":
                density = density.clamp(low, high)
            columns.append(density.sum(dim=1) if change == "sum" else density.mean(dim=1))
        return torch.stack(columns, dim=1)

    return function


LOG_PROBABILITY_MISTAKES = {
    "average first": (log_probabilities("average first"), "Averaged first, then clamped"),
    "sum": (log_probabilities("sum"), "Elements are summed"),
    "no floor": (log_probabilities("no floor"), "floor of the deviation is missing"),
    "added": (log_probabilities("added"), "The floor is added"),
    "above only": (log_probabilities("above only"), "Clamped above only"),
    "below only": (log_probabilities("below only"), "Clamped below only"),
    "free": (log_probabilities("free"), "Nothing is clamped"),
    "through": (log_probabilities("through"), "through the means only"),
    "before": (log_probabilities("before"), "where it began"),
    "no half": (log_probabilities("no half"), "The half before"),
    "no constant": (log_probabilities("no constant"), "half log 2 pi is missing"),
    "whole constant": (log_probabilities("whole constant"), "half of log 2 pi"),
    "no log": (log_probabilities("no log"), "log sigma is missing"),
    "detached means": (lambda s, m, std, f: log_probabilities()(s, m.detach(), std, f), "gradient by means"),
}


class TestExercises(ExerciseSuite):
    solutions = [
        (check_minibatch_credit, credit()),
        (check_ratio_bounds, bounds()),
        (check_chain_log_probabilities, log_probabilities()),
    ]
    mistakes = {
        check_minibatch_credit: CREDIT_MISTAKES,
        check_ratio_bounds: BOUNDS_MISTAKES,
        check_chain_log_probabilities: LOG_PROBABILITY_MISTAKES,
    }


def test_one_step_is_judged_only_after_all_others():
    """A linear rise without a guard hears of the rise first: one thing at a time."""

    def both(finetuned_steps, start, end):
        u = torch.arange(finetuned_steps, dtype=torch.float64) / (finetuned_steps - 1)
        return 1 - start - (end - start) * u, 1 + start + (end - start) * u

    assert "rises linearly" in check_ratio_bounds(both).words


def test_error_with_one_step_only_is_reported():
    def broken(finetuned_steps, start, end):
        if finetuned_steps == 1:
            raise IndexError("no steps")
        return bounds()(finetuned_steps, start, end)

    feedback = check_ratio_bounds(broken)
    assert feedback.state == "wrong" and "IndexError: no steps" in feedback.words
