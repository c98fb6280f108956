"""The correlated-proxies exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import math

import numpy as np
import torch
from exercise_suite import ExerciseSuite

from polrl.foundations._correlated_proxies_exercises import check_lower_bound, check_occupancy, check_orpo_reward

# ---- exercise 1 ----------------------------------------------------------------------------------------------


def occupancy(P, pi, mu0, gamma):
    step = (pi[:, :, None] * P).sum(1)
    x = (1 - gamma) * torch.linalg.inv(torch.eye(len(P)).double() - gamma * step).T @ mu0
    return x[:, None] * pi


def by_summing(steps, late=0):
    def function(P, pi, mu0, gamma):
        step, at, total = (pi[:, :, None] * P).sum(1), mu0, 0.0
        for t in range(steps):
            if t >= late:
                total = total + (1 - gamma) * gamma ** (t - late) * at
            at = step.T @ at
        return total[:, None] * pi

    return function


def untransposed(P, pi, mu0, gamma):
    step = (pi[:, :, None] * P).sum(1)
    return (1 - gamma) * torch.linalg.inv(torch.eye(len(P)).double() - gamma * step) @ mu0[:, None] * pi


def last_step(P, pi, mu0, gamma):
    return (mu0 @ torch.linalg.matrix_power((pi[:, :, None] * P).sum(1), 2000))[:, None] * pi


OCCUPANCY_MISTAKES = {
    "unnormalised": (lambda *x: occupancy(*x) / (1 - x[3]), "factor 1 - gamma is missing"),
    "not transposed": (untransposed, "not transposed"),
    "even actions": (lambda *x: occupancy(*x).mean(1, keepdim=True).expand_as(x[1]), "not evenly"),
    "no actions": (lambda *x: occupancy(*x).sum(1, keepdim=True).expand_as(x[1]), "multiply by pi"),
    "uniform moves": (
        lambda P, pi, mu0, gamma: occupancy(P, torch.ones_like(pi) / pi.shape[1], mu0, gamma).sum(1, True) * pi,
        "mix P over the actions",
    ),
    "one late": (by_summing(2001, late=1), "from the second step on"),
    "cut": (by_summing(100), "cut after 100 steps"),
    "last": (last_step, "last step's distribution"),
    "states only": (lambda *x: occupancy(*x).sum(1), "must have the shape [2, 2], found [2]"),
    "single precision": (lambda *x: occupancy(*x).float(), "must be float64"),
}


# ---- exercise 2 ----------------------------------------------------------------------------------------------


def lower_bound(mu, mu_b, reward, proxy, combine=None, chi2=None, divisor=None, weights=None):
    """Return the bound, or with other parts one of its typical mistakes, in numpy."""
    mu, mu_b, reward, proxy = (x.numpy().ravel() for x in (mu, mu_b, reward, proxy))
    w = mu_b if weights is None else weights(mu, mu_b)
    error, proxy_error = (x - (w * x).sum() for x in (reward, proxy))
    sigma, proxy_sigma = (math.sqrt((w * e**2).sum()) for e in (error, proxy_error))
    r = min(1.0, abs((w * error * proxy_error).sum() / (sigma * proxy_sigma)))
    distance = ((mu - mu_b) ** 2 / mu_b).sum() if chi2 is None else chi2(mu, mu_b)
    gain = ((mu - mu_b) * proxy).sum() / (proxy_sigma if divisor is None else divisor(sigma))
    bound = combine or (lambda f, r, x, s: (f - math.sqrt((1 - r * r) * x)) / r)
    return torch.tensor(bound(gain, r, distance, sigma), dtype=torch.float64)


def wrong_bound(**parts):
    return lambda *x: lower_bound(*x, **parts)


BOUND_MISTAKES = {
    "no 1/r": (wrong_bound(combine=lambda f, r, x, s: f - math.sqrt((1 - r * r) * x)), "factor 1 / r"),
    "plus": (wrong_bound(combine=lambda f, r, x, s: (f + math.sqrt((1 - r * r) * x)) / r), "sign before the root"),
    "no root": (wrong_bound(combine=lambda f, r, x, s: (f - math.sqrt(1 - r * r) * x) / r), "chi-square itself"),
    "r outside": (wrong_bound(combine=lambda f, r, x, s: (f - (1 - r * r) * math.sqrt(x)) / r), "under the root too"),
    "r not squared": (wrong_bound(combine=lambda f, r, x, s: (f - math.sqrt((1 - r) * x)) / r), "not 1 - r."),
    "not less 1": (wrong_bound(chi2=lambda mu, mu_b: (mu**2 / mu_b).sum()), "LESS 1"),
    "exchanged": (wrong_bound(chi2=lambda mu, mu_b: ((mu - mu_b) ** 2 / mu).sum()), "roles are exchanged"),
    "true sigma": (wrong_bound(divisor=lambda sigma: sigma), "PROXY's deviation"),
    "not divided": (wrong_bound(divisor=lambda sigma: 1.0), "deviation under mu_b"),
    "in reward": (wrong_bound(combine=lambda f, r, x, s: s * (f - math.sqrt((1 - r * r) * x)) / r), "reward's unit"),
    "under mu": (wrong_bound(weights=lambda mu, mu_b: mu), "taken under mu"),
    "E3b": (
        wrong_bound(combine=lambda f, r, x, s: r * f - math.sqrt((1 - r * r) * max(0.0, x - f * f))),
        "exact worst case",
    ),
    "constant": (lambda *x: torch.tensor(-9.0, dtype=torch.float64), "bound: expected"),
}


def unweighted(mu, mu_b, reward, proxy):
    r = abs(np.corrcoef(reward.numpy().ravel(), proxy.numpy().ravel())[0, 1])
    gain = float(((mu - mu_b) * proxy).sum()) / float(proxy.std(correction=0))
    chi2 = float(((mu - mu_b) ** 2 / mu_b).sum())
    return torch.tensor((gain - math.sqrt((1 - r * r) * chi2)) / r, dtype=torch.float64)


BOUND_MISTAKES["unweighted"] = (unweighted, "equal weights")


def unclamped(mu, mu_b, reward, proxy):
    """Return the bound without care for rounding at r = 1."""
    error, proxy_error = (x - (mu_b * x).sum() for x in (reward, proxy))
    sigma, proxy_sigma = ((mu_b * e**2).sum().sqrt() for e in (error, proxy_error))
    r = (mu_b * error * proxy_error).sum() / (sigma * proxy_sigma)
    chi2 = (mu**2 / mu_b).sum() - 1
    return (((mu - mu_b) * proxy).sum() / proxy_sigma - ((1 - r**2) * chi2).sqrt()) / r


BOUND_MISTAKES["rounding"] = (unclamped, "rounding make 1 - r^2 negative")


# ---- exercise 3 ----------------------------------------------------------------------------------------------


def orpo_reward(r_proxy, d, lam, trim, penalty=None, low=None, high=None, over=None, root=None, sign=-1):
    """Return the relabelled rewards, or with other parts one of their typical mistakes."""
    d = d.detach()
    n = len(d)
    i = math.floor(trim * n)
    x = torch.sort(torch.exp(d) - 1)[0][i if low is None else low(i) : n - i if high is None else high(i, n)]
    chi2 = x.sum() / (len(x) if over is None else over(n))
    divisor = (root or (lambda v: v.sqrt() if v > 0 else 1.0))(chi2)
    return r_proxy + sign * lam * (penalty or (lambda d: torch.exp(d) - 1))(d) / divisor


def wrong_reward(**parts):
    return lambda *x: orpo_reward(*x, **parts)


def attached(r_proxy, d, lam, trim):
    i = int(trim * len(d))
    chi2 = d.expm1().sort().values[i : len(d) - i].mean()
    return r_proxy - lam * d.expm1() / (chi2.sqrt() if chi2 > 0 else 1.0)


def with_e_to_the_d(r_proxy, d, lam, trim):
    d = d.detach()
    i = int(trim * len(d))
    return r_proxy - lam * d.exp() / d.exp().sort().values[i : len(d) - i].mean().sqrt()


REWARD_MISTAKES = {
    "plus": (wrong_reward(sign=1), "not added"),
    "KL": (wrong_reward(penalty=lambda d: d), "KL's penalty"),
    "e^d twice": (with_e_to_the_d, "1 too large"),
    "e^d": (wrong_reward(penalty=torch.exp), "e^d - 1, not e^d"),
    "no root": (wrong_reward(root=lambda v: v if v > 0 else 1.0), "ROOT"),
    "no division": (wrong_reward(root=lambda v: 1.0), "without the root"),
    "not trimmed": (wrong_reward(low=lambda i: 0, high=lambda i, n: n), "not trimmed"),
    "top only": (wrong_reward(low=lambda i: 0), "Only the largest"),
    "over all": (wrong_reward(over=lambda n: n), "divided by all n"),
    "half": (wrong_reward(low=lambda i: i // 2, high=lambda i, n: n - i // 2), "not half of that"),
    "magnitude": (wrong_reward(root=lambda v: v.abs().sqrt()), "nor is its magnitude"),
    "gradient": (attached, "passes through d"),
    "empty slice": (wrong_reward(high=lambda i, n: -i), "[i:-i] is empty"),
    "root of a negative": (wrong_reward(root=lambda v: v.sqrt()), "leave the division out"),
    "mean": (lambda *x: orpo_reward(*x).mean(), "must have the shape [5], found []"),
}


# ---- the checks ----------------------------------------------------------------------------------------------


class TestExercises(ExerciseSuite):
    solutions = [
        (check_occupancy, occupancy),
        (check_occupancy, by_summing(900)),
        (check_lower_bound, lower_bound),
        (check_orpo_reward, orpo_reward),
    ]
    mistakes = {
        check_occupancy: OCCUPANCY_MISTAKES,
        check_lower_bound: BOUND_MISTAKES,
        check_orpo_reward: REWARD_MISTAKES,
    }
