"""PRDC's exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import math

import numpy as np
import torch
from exercise_suite import ExerciseSuite
from scipy.spatial import cKDTree

from polrl.offline._prdc_exercises import check_beta_limit, check_nearest_actions, check_prdc_actor_loss

# ---- exercise 1 ----------------------------------------------------------------------------------------------


def nearest_actions(states, pi, data_s, data_a, beta, k):
    chosen = []
    for s, p in zip(states, pi, strict=True):
        gaps = (
            (torch.cat([beta * s, p]) - torch.cat([beta * ds, da])).norm()
            for ds, da in zip(data_s, data_a, strict=True)
        )
        chosen.append(data_a[torch.stack(list(gaps)).argsort()[k - 1]])
    return torch.stack(chosen)


def by_tree(states, pi, data_s, data_a, beta, k):
    tree = cKDTree(np.concatenate([beta * data_s, data_a], axis=1))
    return data_a[tree.query(np.concatenate([beta * states, pi], axis=1), k=[k])[1][:, 0]]


def wrong_nearest(weight=lambda d_s, d_a, beta: (beta * d_s) ** 2 + d_a**2, take=lambda order, k: order[:, k - 1]):
    def function(states, pi, data_s, data_a, beta, k):
        order = weight(torch.cdist(states, data_s), torch.cdist(pi, data_a), beta).argsort(dim=1)
        return data_a[take(order, k)]

    return function


def mean_of_k(states, pi, data_s, data_a, beta, k):
    joint = torch.cdist(torch.cat([beta * states, pi], 1), torch.cat([beta * data_s, data_a], 1))
    return torch.stack([data_a[row[:k]].mean(0) for row in joint.argsort(dim=1)])


NEAREST_MISTAKES = {
    "beta not squared": (wrong_nearest(lambda s, a, beta: beta * s**2 + a**2), "its square stands before"),
    "no states": (wrong_nearest(lambda s, a, beta: a), "The states are left out"),
    "no actions": (wrong_nearest(lambda s, a, beta: s), "The actions are left out"),
    "beta on the actions": (wrong_nearest(lambda s, a, beta: s**2 + (beta * a) ** 2), "belongs to the states"),
    "sum of norms": (wrong_nearest(lambda s, a, beta: beta * s + a), "their squares are"),
    "farthest": (wrong_nearest(lambda s, a, beta: -((beta * s) ** 2 + a**2)), "farthest"),
    "mean of k": (mean_of_k, "the mean of the k nearest"),
    "k from 0": (wrong_nearest(take=lambda order, k: order[:, k]), "k counts from 1"),
    "k ignored": (wrong_nearest(take=lambda order, k: order[:, 0]), "k is ignored"),
    "indices": (lambda s, p, ds, da, beta, k: torch.zeros(len(s)).double(), "must have the shape"),
}

# ---- exercise 2 ----------------------------------------------------------------------------------------------


def prdc_actor_loss(q, pi, target, alpha):
    size = sum(abs(x) for x in q.tolist()) / len(q)
    return -alpha * q.sum() / len(q) / size + (pi - target.detach()).pow(2).sum() / pi.numel()


def wrong_loss(part=lambda q: q.mean() / q.abs().mean().detach(), alpha_on=0, sign=-1, pull=None, keep=False):
    def function(q, pi, target, alpha):
        gap = pi - (target if keep else target.detach())
        constraint = pull(gap) if pull else gap.pow(2).mean()
        return sign * (1 if alpha_on else alpha) * part(q) + (alpha if alpha_on else 1) * constraint

    return function


LOSS_MISTAKES = {
    "plus": (wrong_loss(sign=1), "The sign of Q is wrong"),
    "scale not detached": (wrong_loss(lambda q: q.mean() / q.abs().mean()), "through the scale of Q"),
    "mean for mean of sizes": (wrong_loss(lambda q: q.mean() / q.mean().detach()), "not of Q"),
    "size of the mean": (wrong_loss(lambda q: q.mean() / q.mean().abs().detach()), "|mean Q|"),
    "no scale": (wrong_loss(lambda q: q.mean()), "not divided by its mean size"),
    "sum of q": (wrong_loss(lambda q: q.sum() / q.abs().mean().detach()), "Q is summed"),
    "alpha on the constraint": (wrong_loss(alpha_on=1), "alpha weighs the constraint"),
    "sum over dimensions": (wrong_loss(pull=lambda g: g.pow(2).sum(1).mean()), "over the action's dimensions"),
    "sum": (wrong_loss(pull=lambda g: g.pow(2).sum()), "mean over batch and dimensions"),
    "not squared": (wrong_loss(pull=lambda g: g.pow(2).sum(1).sqrt().mean()), "not squared"),
    "target not detached": (wrong_loss(keep=True), "passes to the neighbour's action"),
    "by sample": (lambda q, pi, target, alpha: -alpha * q, "must have the shape []"),
    "float32": (lambda *x: prdc_actor_loss(*x).float(), "must be float64"),
}

# ---- exercise 3 ----------------------------------------------------------------------------------------------


def own_rows(states, pi, actions, beta):
    joint = torch.cat([beta * states, actions], dim=1)
    gaps = ((torch.cat([beta * states, pi], dim=1)[:, None] - joint) ** 2).sum(2)
    return bool((gaps.argmin(dim=1) == torch.arange(len(states))).all())


def beta_limit(states, pi, actions):
    low, high = math.log(1e-2), math.log(1e5)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if own_rows(states, pi, actions, math.exp(middle)) else (middle, high)
    return math.exp(high)


def sufficient(states, pi, actions):
    gaps = torch.cdist(states, states) + torch.diag(torch.full((len(states),), math.inf).double())
    return float((pi - actions).norm(dim=1).max() / gaps.min())


def sufficient_by_row(states, pi, actions):
    gaps = torch.cdist(states, states) + torch.diag(torch.full((len(states),), math.inf).double())
    return float(((pi - actions).norm(dim=1) / gaps.min(dim=1).values).max())


def by_row(combine):
    def function(states, pi, actions):
        found = []
        for i in range(len(states)):
            needs = [0.0]
            for j in range(len(states)):
                gain = float((pi[i] - actions[i]).pow(2).sum() - (pi[i] - actions[j]).pow(2).sum())
                if j != i and gain > 0:
                    needs.append(math.sqrt(gain) / float((states[i] - states[j]).norm()))
            found.append(max(needs))
        return combine(found)

    return function


def nearest_only(states, pi, actions):
    found = 0.0
    for i in range(len(states)):
        gaps = (states - states[i]).norm(dim=1)
        gaps[i] = math.inf
        j = int(gaps.argmin())
        gain = float((pi[i] - actions[i]).pow(2).sum() - (pi[i] - actions[j]).pow(2).sum())
        found = max(found, math.sqrt(max(gain, 0.0)) / float(gaps[j]))
    return found


LIMIT_MISTAKES = {
    "sufficient": (sufficient, "the sufficient bound"),
    "sufficient by row": (sufficient_by_row, "row by row"),
    "one row": (by_row(min), "enough for one row"),
    "mean": (by_row(lambda found: sum(found) / len(found)), "the mean over the batch"),
    "squared": (by_row(lambda found: max(found) ** 2), "beta squared"),
    "nearest state only": (nearest_only, "Only the nearest state"),
    "too coarse": (lambda *x: 1.01 * beta_limit(*x), "expected"),
}


# ---- the checks ----------------------------------------------------------------------------------------------


class TestExercises(ExerciseSuite):
    solutions = [
        (check_nearest_actions, nearest_actions),
        (check_nearest_actions, by_tree),
        (check_nearest_actions, wrong_nearest()),
        (check_prdc_actor_loss, prdc_actor_loss),
        (check_prdc_actor_loss, wrong_loss()),
        (check_beta_limit, beta_limit),
        (check_beta_limit, by_row(max)),
    ]
    mistakes = {
        check_nearest_actions: NEAREST_MISTAKES,
        check_prdc_actor_loss: LOSS_MISTAKES,
        check_beta_limit: LIMIT_MISTAKES,
    }


def test_the_sufficient_bound_is_not_smaller():
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        states, pi, actions = (torch.rand(12, d, generator=generator, dtype=torch.float64) for d in (2, 1, 1))
        exact = beta_limit(states, pi, actions)
        assert exact <= sufficient_by_row(states, pi, actions) * (1 + 1e-9)
        assert exact <= sufficient(states, pi, actions) * (1 + 1e-9)
