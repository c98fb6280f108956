"""The foundations overview's exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import torch
from exercise_suite import ExerciseSuite

from polrl.foundations._reinforce_exercises import check_best_baseline, check_gibbs_policy, check_regularized_loss
from polrl.foundations.reinforce import gradient_variance

# ---- exercise 1 ----------------------------------------------------------------------------------------------


def best_baseline(logits, reward):
    """Return where the parabola of E11 has its lowest point, from three of its values."""
    low, middle, high = (gradient_variance(logits, reward, b) for b in (-1.0, 0.0, 1.0))
    return (low - high) / (2 * (low + high - 2 * middle))


def mean_reward(logits, reward):
    return torch.softmax(logits, 0) @ reward


def weighed(power=2.0, with_pi=True):
    def function(logits, reward):
        pi, top, bottom = torch.softmax(logits, 0), 0.0, 0.0
        for a in range(len(pi)):
            step = -pi.clone()
            step[a] += 1
            weight = (pi[a] if with_pi else 1.0) * step.norm() ** power
            top, bottom = top + weight * reward[a], bottom + weight
        return top / bottom

    return function


def own_logit(logits, reward):
    pi = torch.softmax(logits, 0)
    weight = pi * (1 - pi) ** 2
    return (weight * reward).sum() / weight.sum()


BASELINE_MISTAKES = {
    "mean reward": (mean_reward, "usual choice"),
    "plain mean": (lambda logits, reward: reward.mean(), "plain mean over the arms"),
    "no probabilities": (weighed(with_pi=False), "The probabilities are missing"),
    "not squared": (weighed(power=1.0), "not squared"),
    "own logit": (own_logit, "own logit"),
    "highest": (lambda logits, reward: reward.max(), "highest reward"),
    "one for each arm": (lambda logits, reward: reward, "must have the shape [], found [3]"),
}

# ---- exercise 2 ----------------------------------------------------------------------------------------------


def regularized_loss(log_pi, log_ref, reward, alpha, beta):
    count, depth = log_pi.shape
    earned = (reward - (alpha + beta) * log_pi + beta * log_ref).detach()
    loss = 0.0
    for t in range(depth):
        to_go = earned[:, t:].sum(1)
        for i in range(count):
            others = (to_go.sum() - to_go[i]) / (count - 1)
            loss = loss - (to_go[i] - others) * log_pi[i, t] / count
    return loss


def wrong_loss(
    entropy=-1, divergence=-1, keep=False, sums=None, baseline=None, reduce=lambda x: x.sum() / len(x), sign=-1
):
    """Return exercise 2 with one part wrong."""

    def function(log_pi, log_ref, reward, alpha, beta):
        price = log_pi if keep else log_pi.detach()
        earned = reward + entropy * alpha * price + divergence * beta * (price - log_ref.detach())
        to_go = sums(earned) if sums else earned.flip(1).cumsum(1).flip(1)
        others = baseline(to_go) if baseline else (to_go.sum(0) - to_go) / (len(to_go) - 1)
        return sign * reduce((to_go - others) * log_pi)

    return function


def price_not_passed_on(log_pi, log_ref, reward, alpha, beta):
    to_go = reward.flip(1).cumsum(1).flip(1) - ((alpha + beta) * log_pi - beta * log_ref).detach()
    others = (to_go.sum(0) - to_go) / (len(to_go) - 1)
    return -((to_go - others) * log_pi).sum() / len(to_go)


LOSS_MISTAKES = {
    "minus": (wrong_loss(sign=1), "The sign is wrong"),
    "entropy's sign": (wrong_loss(entropy=1), "Entropy has the wrong sign"),
    "KL's sign": (wrong_loss(divergence=1), "KL has the wrong sign"),
    "price not detached": (wrong_loss(keep=True), "A gradient passes through the price"),
    "whole return": (wrong_loss(sums=lambda r: r.sum(1, keepdim=True).expand_as(r)), "the whole string"),
    "past": (wrong_loss(sums=lambda r: r.cumsum(1)), "over the past"),
    "own reward only": (wrong_loss(sums=lambda r: r), "Later rewards do not reach"),
    "price not passed on": (price_not_passed_on, "The price stays with its own letter"),
    "own sample in the baseline": (wrong_loss(baseline=lambda g: g.mean(0)), "own value"),
    "no baseline": (wrong_loss(baseline=lambda g: 0 * g), "The baseline is missing"),
    "baseline over letters": (
        wrong_loss(
            baseline=lambda g: torch.stack([torch.cat([g[:i], g[i + 1 :]]).mean() for i in range(len(g))])[:, None]
        ),
        "at the same letter",
    ),
    "mean over letters": (wrong_loss(reduce=lambda x: x.mean()), "a mean over letters"),
    "sum over strings": (wrong_loss(reduce=lambda x: x.sum()), "a sum over the strings"),
    "by string": (wrong_loss(reduce=lambda x: x.sum(1)), "must have the shape [], found [2]"),
    "float32": (lambda *x: regularized_loss(*x).float(), "must be float64"),
}

# ---- exercise 3 ----------------------------------------------------------------------------------------------


def gibbs_policy(reward, reference, alpha, beta):
    exponent = reward / (alpha + beta)
    weight = reference ** (beta / (alpha + beta)) * (exponent - exponent.max()).exp()
    return weight / weight.sum()


def wrong_gibbs(tau=lambda a, b: a + b, power=lambda a, b: b / (a + b), sign=1, normalise=True):
    def function(reward, reference, alpha, beta):
        weight = reference ** power(alpha, beta) * (sign * reward / tau(alpha, beta)).exp()
        return weight / weight.sum() if normalise else weight

    return function


GIBBS_MISTAKES = {
    "not normalised": (wrong_gibbs(normalise=False), "not normalised"),
    "by alpha": (wrong_gibbs(tau=lambda a, b: a, power=lambda a, b: b / a), "divided by alpha alone"),
    "by beta": (wrong_gibbs(tau=lambda a, b: b, power=lambda a, b: 1.0), "divided by beta alone"),
    "reference to the first power": (wrong_gibbs(power=lambda a, b: 1.0), "The reference counts fully"),
    "no reference": (wrong_gibbs(power=lambda a, b: 0.0), "The reference is missing"),
    "probability for its logarithm": (
        lambda r, q, a, b: torch.softmax((r + b * q) / (a + b), 0),
        "not by its logarithm",
    ),
    "minus": (wrong_gibbs(sign=-1), "sign of the reward"),
    "multiplied": (wrong_gibbs(tau=lambda a, b: 1 / (a + b)), "multiplied by the strengths"),
    "overflow": (wrong_gibbs(), "overflows"),
}


# ---- the checks ----------------------------------------------------------------------------------------------


class TestExercises(ExerciseSuite):
    solutions = [
        (check_best_baseline, best_baseline),
        (check_best_baseline, weighed()),
        (check_regularized_loss, regularized_loss),
        (check_regularized_loss, wrong_loss()),
        (check_gibbs_policy, gibbs_policy),
    ]
    mistakes = {
        check_best_baseline: BASELINE_MISTAKES,
        check_regularized_loss: LOSS_MISTAKES,
        check_gibbs_policy: GIBBS_MISTAKES,
    }
