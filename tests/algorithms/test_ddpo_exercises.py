"""DDPO's exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import collections
import math

import torch
from exercise_suite import ExerciseSuite

from polrl.diffusion._ddpo_exercises import check_buffer_advantages, check_chain_loss, check_exact_divergence

# ---- exercise 1 --------------------------------------------------------------------------------------------------


def buffered(change=""):
    """Return the solution, or it with one change."""

    def function(first, first_prompts, second, second_prompts):
        buffers = collections.defaultdict(lambda: collections.deque(maxlen=None if change == "all" else 4))

        def extend(rewards, prompts):
            for r, p in zip(rewards.tolist(), prompts.tolist(), strict=True):
                buffers[0 if change == "mixed" else p].append(r)

        extend(first, first_prompts)
        if change != "late":
            extend(second, second_prompts)
        found = []
        for r, p in zip(second.tolist(), second_prompts.tolist(), strict=True):
            own = list(buffers[0 if change == "mixed" else p])
            values = torch.tensor(own if len(own) >= 3 or change == "short" else second.tolist(), dtype=torch.float64)
            mean = 0.0 if change == "mean" else float(values.mean())
            std = 1.0 if change == "std" else float(values.std(correction=int(change == "unbiased"))) + 1e-6
            found.append((r - mean) / std)
        return torch.tensor(found, dtype=torch.float64)

    return function


BUFFER_MISTAKES = {
    "late": (buffered("late"), "before the new rewards were added"),
    "all": (buffered("all"), "only the newest 4"),
    "unbiased": (buffered("unbiased"), "divides by n - 1"),
    "mean": (buffered("mean"), "mean is not subtracted"),
    "std": (buffered("std"), "deviation is missing"),
    "first batch": (lambda first, fp, second, sp: buffered()(first, fp, first, fp), "advantage"),
}

# ---- exercise 2 --------------------------------------------------------------------------------------------------


def loss(change=""):
    """Return the solution, or it with one change."""

    def function(new, old, advantage, clip_range):
        total = 0.0
        n, k = new.shape
        log_ratio = new - old
        if change == "product":
            log_ratio = log_ratio.sum(1, keepdim=True).expand(n, k)
        if change == "upside down":
            log_ratio = -log_ratio
        for i in range(n):
            credit = advantage[i] if change == "unbounded" else advantage[i].clamp(-5, 5)
            for j in range(k):
                ratio = log_ratio[i, j].exp()
                low = -math.inf if change == "one side" else 1 - clip_range
                bounded = ratio.clamp(low, 1 + clip_range)
                plain, clipped = -credit * ratio, -credit * bounded
                if change == "plain":
                    total = total + plain
                elif change == "clipped":
                    total = total + clipped
                elif change == "better":
                    total = total + torch.minimum(plain, clipped)
                else:
                    total = total + torch.maximum(plain, clipped)
        total = -total if change == "sign" else total
        return total / n if change == "sum" else total / (n * k)

    return function


LOSS_MISTAKES = {
    "product": (loss("product"), "a product over the steps"),
    "better": (loss("better"), "better of both terms"),
    "clipped only": (loss("clipped"), "Only the clipped term"),
    "never clipped": (loss("plain"), "Nothing is clipped"),
    "one side": (loss("one side"), "bounded above only"),
    "sign": (loss("sign"), "The sign is wrong"),
    "upside down": (loss("upside down"), "upside down"),
    "sum": (loss("sum"), "Steps are summed"),
    "unbounded": (loss("unbounded"), "bounded by 5"),
}

# ---- exercise 3 --------------------------------------------------------------------------------------------------


def exact_divergence(eps, eps_pretrained, abar, abar_next, eta):
    sigma = eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
    means = [
        math.sqrt(abar_next) * (0.0 - math.sqrt(1 - abar) * e) / math.sqrt(abar)
        + math.sqrt(1 - abar_next - sigma**2) * e
        for e in (eps, eps_pretrained)
    ]
    own, before = (torch.distributions.Normal(mean, sigma) for mean in means)
    return torch.distributions.kl_divergence(own, before).sum(1)


def weighed(kappa, half=0.5, power=2, mean=False, eta_used=True):
    def function(eps, eps_pretrained, abar, abar_next, eta):
        sigma = math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) * (eta if eta_used else 1.0)
        squares = (kappa(abar, abar_next, sigma) * (eps - eps_pretrained)) ** 2
        return half * (squares.mean(1) if mean else squares.sum(1)) / sigma**power

    return function


def right(a, b, sigma):
    return math.sqrt(1 - b - sigma**2) - math.sqrt(b * (1 - a) / a)


DIVERGENCE_MISTAKES = {
    "no kappa": (weighed(lambda a, b, s: 1.0), "kappa times as far"),
    "first part": (weighed(lambda a, b, s: math.sqrt(1 - b - s**2)), "the predicted data move too"),
    "second part": (weighed(lambda a, b, s: math.sqrt(b * (1 - a) / a)), "the noise is also added again"),
    "plus": (
        weighed(lambda a, b, s: math.sqrt(1 - b - s**2) + math.sqrt(b * (1 - a) / a)),
        "opposite signs",
    ),
    "no sigma in the root": (
        weighed(lambda a, b, s: math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a)),
        "missing under the first root",
    ),
    "half": (weighed(right, half=1.0), "The half is missing"),
    "mean": (weighed(right, mean=True), "it does not average"),
    "not squared": (weighed(right, power=1), "Divide by sigma squared"),
    "no eta": (weighed(right, eta_used=False), "eta is not used"),
}


class TestExercises(ExerciseSuite):
    solutions = [
        (check_buffer_advantages, buffered()),
        (check_chain_loss, loss()),
        (check_exact_divergence, exact_divergence),
    ]
    mistakes = {
        check_buffer_advantages: BUFFER_MISTAKES,
        check_chain_loss: LOSS_MISTAKES,
        check_exact_divergence: DIVERGENCE_MISTAKES,
    }


def test_prompts_are_told_apart():
    assert "Prompts are mixed" in check_buffer_advantages(buffered("mixed")).words
    assert "whole batch" in check_buffer_advantages(buffered("short")).words
