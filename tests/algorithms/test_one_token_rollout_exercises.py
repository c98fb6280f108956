"""One-token rollout's exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import torch
from exercise_suite import ExerciseSuite

from polrl.language._one_token_rollout_exercises import check_both_gradients, check_fixed_point, check_otr_weights

# ---- exercise 1 ----------------------------------------------------------------------------------------------


def otr_weights(sampled, targets, beta, V):
    B, T, K = sampled.shape
    weights = torch.zeros(B, T, V)
    for b in range(B):
        for t in range(T):
            for token in sampled[b, t].tolist():
                weights[b, t, token] += (1.0 if token == targets[b, t] else beta) / K
    return weights


def vectorised(sampled, targets, beta, V):
    earned = torch.where(sampled == targets[..., None], 1.0, beta)
    empty = torch.zeros(*targets.shape, V)
    return empty.scatter_add(-1, sampled, earned / sampled.shape[-1])


def wrong_weights(change):
    """Return an answer that takes exercise 1's shares [V], token and beta of each position another way."""

    def function(sampled, targets, beta, V):
        weights = torch.zeros(*targets.shape, V)
        for b in range(targets.shape[0]):
            for t in range(targets.shape[1]):
                counts = torch.bincount(sampled[b, t], minlength=V).float()
                weights[b, t] = change(counts, int(targets[b, t]), beta)
        return weights

    return function


def sums(counts, x, beta):
    w = beta * counts
    w[x] = counts[x]
    return w


def distinct(counts, x, beta):
    seen = (counts > 0).float()
    return sums(seen / seen.sum(), x, beta)


def sft(counts, x, beta):
    w = beta * counts / counts.sum()
    w[x] = 1.0
    return w


def never_drawn(counts, x, beta):
    w = torch.full_like(counts, beta)
    w[x] = counts[x] / counts.sum()
    return w


def decomposed_once(counts, x, beta):
    w = beta * counts / counts.sum()
    w[x] = (1 - beta) * counts[x] / counts.sum()
    return w


WEIGHT_MISTAKES = {
    "sum": (wrong_weights(sums), "not divided by K"),
    "distinct": (wrong_weights(distinct), "duplicates count"),
    "sft": (wrong_weights(sft), "that is SFT"),
    "beta for all": (wrong_weights(lambda c, x, b: b * c / c.sum()), "they earn 1"),
    "no beta": (wrong_weights(lambda c, x, b: sums(c / c.sum(), x, 0.0)), "Wrong draws earn nothing"),
    "not drawn": (wrong_weights(never_drawn), "never drawn"),
    "minus beta": (wrong_weights(lambda c, x, b: sums(c / c.sum(), x, -b)), "its own sign"),
    "all alike": (wrong_weights(lambda c, x, b: c / c.sum()), "beta is missing"),
    "half of E10": (wrong_weights(decomposed_once), "E10"),
    "a graph": (lambda *a: otr_weights(*a).requires_grad_(), "constants for autograd"),
    "whole numbers": (lambda *a: otr_weights(*a).long(), "floating-point"),
    "by draw": (lambda s, t, b, V: torch.where(s == t[..., None], 1.0, b) / s.shape[-1], "must have the shape"),
}

# ---- exercise 2 ----------------------------------------------------------------------------------------------


def both_gradients(logits, target, beta, kappa):
    pi, drawn = torch.softmax(logits, 0), torch.softmax(logits / kappa, 0)
    w = beta * drawn
    w[target] = drawn[target]
    hit = torch.zeros_like(pi)
    hit[target] = pi[target]
    return w.sum() * pi - w, hit.sum() * pi - hit


def wrong_gradients(warm=False, through_draws=False, through_weight=False, divide=True, earned=None, sign=1.0, cold=0):
    """Return exercise 2 by autograd, with one part wrong."""

    def function(logits, target, beta, kappa):
        z = logits.clone().requires_grad_()
        drawn = torch.softmax(z / kappa if divide else z * kappa, 0)
        if cold:
            drawn = torch.softmax(z, 0)
        drawn = drawn if through_draws else drawn.detach()
        right, wrong = earned(beta) if earned else (1.0, beta)
        reward = torch.full((len(z),), wrong, dtype=z.dtype)
        reward[target] = right
        log_pi = torch.log_softmax(z / kappa if warm else z, 0)
        (otr,) = torch.autograd.grad(-(drawn * reward * log_pi).sum(), z)
        log_p = torch.log_softmax(z, 0)[target]
        weight = log_p.exp() if through_weight else log_p.exp().detach()
        (dft,) = torch.autograd.grad(-weight * log_p, z)
        return sign * otr, sign * dft

    return function


def sft_for_dft(logits, target, beta, kappa):
    hit = torch.zeros_like(logits)
    hit[target] = 1.0
    return both_gradients(logits, target, beta, kappa)[0], torch.softmax(logits, 0) - hit


GRADIENT_MISTAKES = {
    "uphill": (wrong_gradients(sign=-1.0), "uphill"),
    "through the draws": (wrong_gradients(through_draws=True), "passes through pi'"),
    "through the weight": (wrong_gradients(through_weight=True), "passes through the weight pi(x)"),
    "warm": (wrong_gradients(warm=True), "only the draws are warm"),
    "cold": (wrong_gradients(cold=1), "The draws come from pi here"),
    "multiplied": (wrong_gradients(divide=False), "a temperature divides"),
    "beta zero": (wrong_gradients(earned=lambda b: (1.0, 0.0)), "earn nothing"),
    "one minus beta": (wrong_gradients(earned=lambda b: (1 - b, b)), "1 - beta here"),
    "beta for all": (wrong_gradients(earned=lambda b: (b, b)), "like all others"),
    "sft": (sft_for_dft, "gradient of SFT"),
    "one only": (lambda *a: both_gradients(*a)[0], "Return 2 values"),
    "float32": (lambda *a: tuple(g.float() for g in both_gradients(*a)), "must be float64"),
}

# ---- exercise 3 ----------------------------------------------------------------------------------------------


def fixed_point(kappa_used=lambda k: 1 / k, beta_used=lambda b: b, taught=lambda q: q, mix_used=lambda m: m, sign=1.0,
                steps=1000):  # fmt: skip
    """Return exercise 3, reference by reference, with one part wrong if asked."""

    def function(q, kappa, beta, mix_sft):
        z, mix, frequencies = torch.zeros_like(q), mix_used(mix_sft), taught(q)
        for _ in range(steps):
            pi, drawn = torch.softmax(z, 0), torch.softmax(z * kappa_used(kappa), 0)
            rewards = torch.full((len(q), len(q)), beta_used(beta), dtype=q.dtype)
            rewards.fill_diagonal_(1.0)  # a row a reference
            w = (1 - mix) * frequencies @ (rewards * drawn) + mix * frequencies
            z = (z - sign * 2 * (w.sum() * pi - w)).clamp(-50, 50)
        return torch.softmax(z, 0)

    return function


def one_hot(q):
    return torch.nn.functional.one_hot(q.argmax(), len(q)).to(q)


FIXED_POINT_MISTAKES = {
    "uphill": (fixed_point(sign=-1.0), "subtract the gradient"),
    "one reference": (fixed_point(taught=one_hot), "Only the most frequent reference"),
    "cold": (fixed_point(kappa_used=lambda k: 1.0), "kappa is missing"),
    "multiplied": (fixed_point(kappa_used=lambda k: k), "a temperature divides"),
    "beta zero": (fixed_point(beta_used=lambda b: 0.0), "Wrong draws earn nothing"),
    "minus beta": (fixed_point(beta_used=lambda b: -b), "its own sign"),
    "sft": (fixed_point(mix_used=lambda m: 1.0), "where SFT ends"),
    "no sft": (fixed_point(mix_used=lambda m: 0.0), "share of SFT is missing"),
    "other way round": (fixed_point(mix_used=lambda m: 1 - m), "wrong way round"),
    "not at rest": (fixed_point(steps=10), "Is it at rest?"),
    "logits": (lambda *a: fixed_point()(*a).log(), "expected"),
}


# ---- the checks ----------------------------------------------------------------------------------------------


class TestExercises(ExerciseSuite):
    solutions = [
        (check_otr_weights, otr_weights),
        (check_otr_weights, vectorised),
        (check_otr_weights, lambda *a: otr_weights(*a).double()),
        (check_both_gradients, both_gradients),
        (check_both_gradients, wrong_gradients()),
        (check_fixed_point, fixed_point()),
        (check_fixed_point, fixed_point(steps=1500)),
    ]
    mistakes = {
        check_otr_weights: WEIGHT_MISTAKES,
        check_both_gradients: GRADIENT_MISTAKES,
        check_fixed_point: FIXED_POINT_MISTAKES,
    }
