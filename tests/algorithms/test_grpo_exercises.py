"""The GRPO notebook's exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import statistics

import torch
from exercise_suite import ExerciseSuite

from polrl.language._group_policy import clip_loss, token_mean, token_ratio
from polrl.language._grpo_exercises import check_clip_gradient, check_judged_by_others, check_penalised_rewards

# ---- exercise 1 ----------------------------------------------------------------------------------------------


def by_rows(rule):
    """Make an answer from a rule for one reward: (own, others, all of the group, eps)."""

    def function(rewards, eps):
        found = torch.empty_like(rewards)
        for b, row in enumerate(rewards.tolist()):
            for i, own in enumerate(row):
                found[b, i] = rule(own, row[:i] + row[i + 1 :], row, eps)
        return found

    return function


mean, spread = statistics.fmean, statistics.pstdev
judged_by_others = by_rows(lambda own, others, row, eps: (own - mean(others)) / (spread(others) + eps))


def whole_batch(rewards, eps):
    return judged_by_others(rewards.reshape(1, -1), eps).reshape(rewards.shape)


ADVANTAGE_MISTAKES = {
    "B4": (by_rows(lambda own, others, row, eps: (own - mean(row)) / (spread(row) + eps)), "hides behind itself"),
    "spread of all": (
        by_rows(lambda own, others, row, eps: (own - mean(others)) / (spread(row) + eps)),
        "spread still holds the own reward",
    ),
    "mean of all": (
        by_rows(lambda own, others, row, eps: (own - mean(row)) / (spread(others) + eps)),
        "mean still holds the own reward",
    ),
    "own distance": (
        by_rows(lambda own, others, row, eps: (own - mean(others)) / (statistics.pstdev(row, mean(others)) + eps)),
        "own reward's distance",
    ),
    "unbiased": (
        by_rows(lambda own, others, row, eps: (own - mean(others)) / (statistics.stdev(others) + eps)),
        "G - 2",
    ),
    "eps in the root": (
        by_rows(lambda own, others, row, eps: (own - mean(others)) / (spread(others) ** 2 + eps) ** 0.5),
        "outside the root",
    ),
    "no eps": (
        by_rows(lambda own, others, row, eps: (own - mean(others)) / spread(others) if spread(others) else 0.0),
        "expected",
    ),
    "variance": (
        by_rows(lambda own, others, row, eps: (own - mean(others)) / (spread(others) ** 2 + eps)),
        "This is the variance",
    ),
    "no spread": (by_rows(lambda own, others, row, eps: own - mean(others)), "The spread is missing"),
    "minus": (by_rows(lambda own, others, row, eps: (mean(others) - own) / (spread(others) + eps)), "sign is wrong"),
    "whole batch": (whole_batch, "whole batch"),
}

# ---- exercise 2 ----------------------------------------------------------------------------------------------


def clip_gradient(logp, old_logp, adv, mask, eps_low, eps_high):
    found = torch.zeros_like(logp)
    for i, t in mask.nonzero().tolist():
        ratio = float((logp[i, t] - old_logp[i, t]).exp())
        a = float(adv[i])
        if not (ratio > 1 + eps_high if a > 0 else ratio < 1 - eps_low):
            found[i, t] = -a * ratio / float(mask.sum())
    return found


def by_autograd(logp, old_logp, adv, mask, eps_low, eps_high):
    leaf = logp.clone().requires_grad_()
    loss = token_mean(clip_loss(token_ratio(leaf, old_logp, mask), adv, eps_low, eps_high), mask)
    return torch.autograd.grad(loss, leaf)[0]


def wrong_gradient(stop=None, weight=lambda r, low, high: r, total=lambda mask: mask.sum(), sign=-1, real=None):
    def function(logp, old_logp, adv, mask, eps_low, eps_high):
        ratio, a = (logp - old_logp).exp(), adv[:, None]
        ratio = torch.where(mask > 0, ratio, torch.ones_like(ratio))
        good, bad = (a > 0) & (ratio > 1 + eps_high), (a < 0) & (ratio < 1 - eps_low)
        stopped = stop(ratio, a, eps_low, eps_high) if stop else good | bad
        shown = mask if real is None else real(mask)
        return sign * torch.where(stopped, 0.0, a * weight(ratio, eps_low, eps_high)) * shown / total(mask)

    return function


def nothing(ratio, *_):
    return torch.zeros_like(ratio, dtype=torch.bool)


GRADIENT_MISTAKES = {
    "both sides": (
        wrong_gradient(lambda r, a, low, high: (r < 1 - low) | (r > 1 + high)),
        "one-sided",
    ),
    "wrong sides": (
        wrong_gradient(lambda r, a, low, high: ((a > 0) & (r < 1 - low)) | ((a < 0) & (r > 1 + high))),
        "expected",
    ),
    "sides exchanged": (
        wrong_gradient(lambda r, a, low, high: ((a < 0) & (r > 1 + high)) | ((a > 0) & (r < 1 - low))),
        "sides are exchanged",
    ),
    "bounds exchanged": (
        wrong_gradient(lambda r, a, low, high: ((a > 0) & (r > 1 + low)) | ((a < 0) & (r < 1 - high))),
        "eps_low and eps_high are exchanged",
    ),
    "no clip": (wrong_gradient(nothing), "Nothing is stopped"),
    "no ratio": (wrong_gradient(weight=lambda r, low, high: torch.ones_like(r)), "The ratio is missing"),
    "clipped ratio": (
        wrong_gradient(nothing, lambda r, low, high: r.clamp(1 - low, 1 + high)),
        "not that of the clipped ratio",
    ),
    "plus": (wrong_gradient(sign=1), "sign is wrong"),
    "by rows": (wrong_gradient(total=lambda m: m.sum(1, keepdim=True) * len(m)), "B13"),
    "with padding in the mean": (wrong_gradient(total=lambda m: m.numel()), "padding included"),
    "a sum": (wrong_gradient(total=lambda m: 1.0), "a sum over the tokens"),
    "no mask": (wrong_gradient(real=torch.ones_like), "Padding has a gradient"),
    "scalar": (lambda logp, *_: logp.sum(), "must have the shape"),
}

# ---- exercise 3 ----------------------------------------------------------------------------------------------


def penalised_rewards(rewards, logp, ref_logp, mask, beta):
    found = rewards.clone()
    for i, t in mask.nonzero().tolist():
        found[i] -= beta * float(logp[i, t].detach() - ref_logp[i, t])
    return found


def wrong_penalty(price=lambda p, r: p - r, reduce=lambda x, m: x.sum(1), sign=-1, keep=False, where=True):
    def function(rewards, logp, ref_logp, mask, beta):
        each = price(logp, ref_logp)
        each = torch.where(mask > 0, each, torch.zeros_like(each)) if where else each * mask
        each = each if keep else each.detach()
        return rewards + sign * beta * reduce(each, mask)

    return function


PENALTY_MISTAKES = {
    "plus": (wrong_penalty(sign=1), "sign is wrong"),
    "mean over tokens": (wrong_penalty(reduce=lambda x, m: x.sum(1) / m.sum(1)), "sum over its tokens"),
    "one mean": (wrong_penalty(reduce=lambda x, m: x.sum(1).mean().expand(len(x))), "changes no advantage"),
    "direction": (wrong_penalty(lambda p, r: r - p), "upside down"),
    "k3": (wrong_penalty(lambda p, r: (r - p).exp() - (r - p) - 1), "This is k3"),
    "k2": (wrong_penalty(lambda p, r: (r - p) ** 2 / 2), "This is k2"),
    "not detached": (wrong_penalty(keep=True), "A gradient passes"),
    "probabilities": (wrong_penalty(lambda p, r: p.exp() - r.exp()), "logarithms' difference"),
    "no beta": (lambda rewards, logp, ref, mask, beta: wrong_penalty()(rewards, logp, ref, mask, 1), "beta is missing"),
    "mask as a product": (wrong_penalty(where=False), "Padding may hold NaN"),
    "by token": (lambda rewards, logp, ref, mask, beta: rewards[:, None] - beta * (logp - ref), "must have the shape"),
}


# ---- the checks ----------------------------------------------------------------------------------------------


class TestExercises(ExerciseSuite):
    solutions = [
        (check_judged_by_others, judged_by_others),
        (check_clip_gradient, clip_gradient),
        (check_clip_gradient, by_autograd),
        (check_clip_gradient, wrong_gradient()),
        (check_penalised_rewards, penalised_rewards),
        (check_penalised_rewards, wrong_penalty()),
    ]
    mistakes = {
        check_judged_by_others: ADVANTAGE_MISTAKES,
        check_clip_gradient: GRADIENT_MISTAKES,
        check_penalised_rewards: PENALTY_MISTAKES,
    }
