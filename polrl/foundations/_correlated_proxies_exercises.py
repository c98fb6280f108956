"""The checks of the correlated-proxies notebook's three exercises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from polrl.core.exercise import Case, Feedback, call, check, checker, require
from polrl.foundations.correlated_proxies import (
    chi_square,
    correlation,
    estimate_chi_square,
    lower_bound,
    occupancy,
    orpo_reward,
    worst_case,
)
from polrl.worlds.sprinkler import deviation, expectation
from polrl.worlds.tabular import policy_transitions, policy_value, random_mdp

Tensor = torch.Tensor


def _world(states: int, actions: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return P, rewards, two policies and a start of a small random world."""
    generator = torch.Generator().manual_seed(seed)
    P, R = random_mdp(states, actions, generator)
    drawn = torch.randn(2, states, actions, generator=generator, dtype=torch.float64)
    start = torch.rand(states, generator=generator, dtype=torch.float64)
    return P, R, drawn[0].softmax(dim=1), drawn[1].softmax(dim=1), start / start.sum()


def _summed(P: Tensor, pi: Tensor, mu0: Tensor, factors: list[float], first: int = 0) -> Tensor:
    """Return the visits of the first steps, each with its factor, times the policy."""
    at, total = mu0, torch.zeros_like(mu0)
    step = policy_transitions(P, pi)
    for t in range(len(factors) + first):
        total = total + (factors[t - first] if t >= first else 0.0) * at
        at = at @ step
    return total.unsqueeze(1) * pi


def _untransposed(P: Tensor, pi: Tensor, mu0: Tensor, gamma: float) -> Tensor:
    eye = torch.eye(len(P), dtype=P.dtype)
    return torch.linalg.solve(eye - gamma * policy_transitions(P, pi), (1 - gamma) * mu0).unsqueeze(1) * pi


_OCCUPANCY_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The shares sum to 1 / (1 - gamma): the factor 1 - gamma is missing.": lambda P, pi, mu0, gamma: (
        occupancy(P, pi, mu0, gamma) / (1 - gamma)
    ),
    "P_pi is not transposed: what flows INTO a state comes from P_pi's columns, so solve with I - gamma * P_pi.T.": (
        _untransposed
    ),
    "The action's share is missing: a state's share is split by pi(a|s), not evenly.": lambda P, pi, mu0, gamma: (
        occupancy(P, pi, mu0, gamma).sum(dim=1, keepdim=True).expand_as(pi) / pi.shape[1]
    ),
    "Every action has its state's whole share: multiply by pi(a|s).": lambda P, pi, mu0, gamma: (
        occupancy(P, pi, mu0, gamma).sum(dim=1, keepdim=True).expand_as(pi)
    ),
    "The state moves as if all actions were as likely: mix P over the actions with pi.": lambda P, pi, mu0, gamma: (
        occupancy(P, torch.full_like(pi, 1 / pi.shape[1]), mu0, gamma).sum(dim=1, keepdim=True) * pi
    ),
    "This counts from the second step on: the first, t = 0, belongs to it with factor 1.": lambda P, pi, mu0, gamma: (
        _summed(P, pi, mu0, [(1 - gamma) * gamma**t for t in range(2000)], first=1)
    ),
    "The sum over time was cut after 100 steps: go on until the factor is nothing, or solve.": (
        lambda P, pi, mu0, gamma: _summed(P, pi, mu0, [(1 - gamma) * gamma**t for t in range(100)])
    ),
    "This is the last step's distribution; the discounted sum over ALL steps is asked for.": (
        lambda P, pi, mu0, gamma: _summed(P, pi, mu0, [1.0], first=2000)
    ),
}


@checker
def check_occupancy(function: Any) -> Feedback:
    """Judge exercise 1, `occupancy(P, pi, mu0, gamma)`: E0.

    Parameters
    ----------
    function : callable
        Of transitions P [S, A, S], a policy pi [S, A], a start mu0 [S] and a discount; returns the normalised
        discounted occupancy [S, A].
    """
    cases = []
    for states, actions, seed, gamma in ((2, 2, 0, 0.9), (4, 3, 1, 0.95), (3, 5, 2, 0.0)):
        P, _, pi, _, start = _world(states, actions, seed)
        expected = {"occupancy": occupancy(P, pi, start, gamma)}
        cases.append(Case({"P": P, "pi": pi, "mu0": start, "gamma": gamma}, expected, _OCCUPANCY_MISTAKES, 1e-8))
    hint = "P_pi[s, t] = sum_a pi(a|s) P[s, a, t]; solve (I - gamma P_pi.T) x = (1 - gamma) mu0; return x times pi."
    feedback = check(function, cases, hint=hint)
    if not feedback:
        return feedback
    P, R, pi, _, start = _world(5, 3, 7)
    found = expectation(torch.as_tensor(function(P, pi, start, 0.97)), R)
    value = 0.03 * float(start @ policy_value(P, R, pi, 0.97))
    require(
        abs(float(found) - value) < 1e-8, f"sum mu R must be 1 - gamma times the return {value:.9f}, found {found:.9f}."
    )
    return Feedback(
        "right", "It sums to one, the flow balances, and sum mu R is 1 - gamma times the discounted return."
    )


def _proxy_world(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the occupancies of two policies in a small random world, its reward, and a proxy: the reward and noise."""
    P, reward, pi, pi_b, start = _world(3, 2, seed)
    mu, mu_b = (occupancy(P, x, start, 0.9) for x in (pi, pi_b))
    noise = random_mdp(3, 2, torch.Generator().manual_seed(seed + 10_000))[1]
    return mu, mu_b, reward, reward + 0.5 * noise


def _parts(mu: Tensor, mu_b: Tensor, reward: Tensor, proxy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gain = (expectation(mu, proxy) - expectation(mu_b, proxy)) / deviation(mu_b, proxy)
    return gain, correlation(proxy, reward, mu_b), chi_square(mu, mu_b)


def _bound(combine: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return an answer to exercise 2 that combines gain, r and chi-square in another way."""
    return lambda mu, mu_b, reward, proxy: combine(*_parts(mu, mu_b, reward, proxy))


def _with_flat_weights(mu: Tensor, mu_b: Tensor, reward: Tensor, proxy: Tensor) -> Tensor:
    flat = torch.full_like(mu_b, 1 / mu_b.numel())
    gain = (expectation(mu, proxy) - expectation(mu_b, proxy)) / deviation(flat, proxy)
    return lower_bound(gain, correlation(proxy, reward, flat).abs(), chi_square(mu, mu_b))


def _with_policys_weights(mu: Tensor, mu_b: Tensor, reward: Tensor, proxy: Tensor) -> Tensor:
    gain = (expectation(mu, proxy) - expectation(mu_b, proxy)) / deviation(mu, proxy)
    return lower_bound(gain, correlation(proxy, reward, mu).abs(), chi_square(mu, mu_b))


def _rest(r: Tensor) -> Tensor:
    return (1 - r**2).clamp(min=0)


_BOUND_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The factor 1 / r is missing.": _bound(lambda f, r, x: r * lower_bound(f, r, x)),
    "The sign before the root is wrong: distance from the base takes away from the promise.": _bound(
        lambda f, r, x: (f + (_rest(r) * x).sqrt()) / r
    ),
    "Under the root stands chi-square itself: (1 - r^2) * chi2, then one root.": _bound(
        lambda f, r, x: (f - _rest(r).sqrt() * x) / r
    ),
    "1 - r^2 belongs under the root too.": _bound(lambda f, r, x: (f - _rest(r) * x.sqrt()) / r),
    "Under the root stands 1 - r^2, not 1 - r.": _bound(lambda f, r, x: (f - ((1 - r) * x).clamp(min=0).sqrt()) / r),
    "The chi-square divergence is E_mu[mu / mu_b] LESS 1.": _bound(
        lambda f, r, x: (f - (_rest(r) * (x + 1)).sqrt()) / r
    ),
    "The roles are exchanged: mu is in the numerator, chi2 = sum mu^2 / mu_b - 1.": lambda mu, mu_b, reward, proxy: (
        lower_bound(*_parts(mu, mu_b, reward, proxy)[:2], chi_square(mu_b, mu))
    ),
    "The proxy's gain must be divided by the PROXY's deviation.": lambda mu, mu_b, reward, proxy: lower_bound(
        _parts(mu, mu_b, reward, proxy)[0] * deviation(mu_b, proxy) / deviation(mu_b, reward),
        *_parts(mu, mu_b, reward, proxy)[1:],
    ),
    "The proxy's gain must be divided by its deviation under mu_b.": lambda mu, mu_b, reward, proxy: lower_bound(
        _parts(mu, mu_b, reward, proxy)[0] * deviation(mu_b, proxy), *_parts(mu, mu_b, reward, proxy)[1:]
    ),
    "This is in the reward's unit; the bound is in deviations of the true reward.": lambda mu, mu_b, reward, proxy: (
        lower_bound(*_parts(mu, mu_b, reward, proxy)) * deviation(mu_b, reward)
    ),
    "Deviation and correlation are taken with equal weights; weigh every place by mu_b.": _with_flat_weights,
    "Deviation and correlation are taken under mu; the base policy's mu_b is what they are known for.": (
        _with_policys_weights
    ),
    "This is E3b, the exact worst case; E3 is simpler and lower.": _bound(worst_case),
}


@checker
def check_lower_bound(function: Any) -> Feedback:
    """Judge exercise 2, `lower_bound(mu, mu_b, reward, proxy)`: E1 to E3.

    Parameters
    ----------
    function : callable
        Of the occupancies mu and mu_b, the true reward and the proxy, all [S, A]; returns E3's right side.
    """
    cases = [
        Case(
            dict(zip(("mu", "mu_b", "reward", "proxy"), world, strict=True)),
            {"bound": lower_bound(*_parts(*world))},
            _BOUND_MISTAKES,
        )
        for world in map(_proxy_world, range(4))
    ]
    hint = "Means, deviations and the correlation under mu_b first; then chi2 = sum mu^2 / mu_b - 1, then E3."
    feedback = check(function, cases, hint=hint)
    if not feedback:
        return feedback
    for mu, mu_b, reward, proxy in map(_proxy_world, range(500)):
        if correlation(proxy, reward, mu_b) <= 0:
            continue
        gain = (expectation(mu, reward) - expectation(mu_b, reward)) / deviation(mu_b, reward)
        found = float(call(function, mu, mu_b, reward, proxy, hint=hint))
        require(found <= float(gain) + 1e-9, f"The bound {found:.6f} lies above the true gain {gain:.6f}.")
        same = float(call(function, mu, mu_b, reward, 3 * reward - 1, hint=hint))
        require(
            abs(same - float(gain)) < 1e-6,
            f"With proxy = 3 * reward - 1, r is 1 and the bound is the gain itself, {gain:.6f}; found {same:.6f}. "
            "Does rounding make 1 - r^2 negative?",
        )
    return Feedback("right", "In 500 worlds the promise was never broken, and a perfect proxy's promise was exact.")


def _relabel(
    penalty: Callable[[Tensor], Tensor] = torch.expm1,
    estimate: Callable[[Tensor, float], Tensor] = estimate_chi_square,
    divide: Callable[[Tensor], Tensor] = lambda chi2: torch.where(chi2 > 0, chi2, 1.0).sqrt(),
    sign: float = -1.0,
) -> Callable[..., Tensor]:
    """Return an answer to exercise 3 with another penalty, estimate, divisor or sign."""

    def answer(r_proxy: Tensor, d: Tensor, lam: float, trim: float) -> Tensor:
        d = d.detach()
        return r_proxy + sign * lam * penalty(d) / divide(estimate(d, trim))

    return answer


def _cut(d: Tensor, trim: float) -> tuple[Tensor, int]:
    return d.expm1().sort().values, int(trim * len(d))


def _through_d(r_proxy: Tensor, d: Tensor, lam: float, trim: float) -> Tensor:
    chi2 = estimate_chi_square(d, trim)
    return r_proxy - lam * d.expm1() / torch.where(chi2 > 0, chi2, 1.0).sqrt()


_REWARD_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The penalty is taken off the reward, not added.": _relabel(sign=1.0),
    "This takes off d, the KL's penalty; for chi-square it is e^d - 1.": _relabel(penalty=lambda d: d),
    "e^d - 1, not e^d: without the -1 the estimate of chi-square is 1 too large.": _relabel(
        penalty=torch.exp, estimate=lambda d, trim: estimate_chi_square(d, trim) + 1
    ),
    "The penalty is e^d - 1, not e^d.": _relabel(penalty=torch.exp),
    "The divisor is the ROOT of the estimate.": _relabel(divide=lambda x: torch.where(x > 0, x, 1.0)),
    "The division by the root of the estimate is missing: so chi-square without the root is charged.": _relabel(
        divide=torch.ones_like
    ),
    "The mean is not trimmed: drop the i smallest and the i largest values.": _relabel(
        estimate=lambda d, trim: d.expm1().mean()
    ),
    "Only the largest values are dropped; drop i at each end.": _relabel(
        estimate=lambda d, trim: _cut(d, trim)[0][: len(d) - _cut(d, trim)[1]].mean()
    ),
    "The trimmed sum is divided by all n samples; divide by the n - 2 i that are left.": _relabel(
        estimate=lambda d, trim: estimate_chi_square(d, trim) * (1 - 2 * _cut(d, trim)[1] / len(d))
    ),
    "The trim is a share of each end: i = floor(trim * n), not half of that.": _relabel(
        estimate=lambda d, trim: estimate_chi_square(d, trim / 2)
    ),
    "A negative estimate is no divisor, nor is its magnitude: leave the division out there.": _relabel(
        divide=lambda x: x.abs().sqrt()
    ),
    "A gradient passes through d: the discriminator is a constant here, use d.detach().": _through_d,
}

_EMPTY = "With 4 samples i = 0, and the slice [i:-i] is empty: use [i : n - i]."


@checker
def check_orpo_reward(function: Any) -> Feedback:
    """Judge exercise 3, `orpo_reward(r_proxy, d, lam, trim)`: E5.

    Parameters
    ----------
    function : callable
        Of proxy rewards [n], logits d [n], a strength and the share to trim; returns the relabelled rewards [n].
    """
    generator = torch.Generator().manual_seed(0)

    def case(d: Tensor, lam: float, trim: float, first: Mapping[str, Any] = {}) -> Case:
        r_proxy = torch.rand(len(d), generator=generator, dtype=torch.float64)
        expected = {"reward": orpo_reward(r_proxy, d, lam, trim), "gradient by d": torch.zeros_like(d)}
        arguments = {"r_proxy": r_proxy, "d": d, "lam": lam, "trim": trim}
        return Case(arguments, expected, {**first, **_REWARD_MISTAKES})

    five = torch.tensor([0.5, 1.0, -0.2, 0.1, 2.0], dtype=torch.float64)
    few = torch.tensor([0.5, 1.0, -0.2, 0.1], dtype=torch.float64)
    many = 0.3 + torch.randn(200, generator=generator, dtype=torch.float64)
    empty = {_EMPTY: _relabel(divide=torch.ones_like)}  # a mean of nothing is not above 0
    away = torch.tensor([-1.0, -0.5, 0.1], dtype=torch.float64)
    hint = "x = e^d - 1 with d detached; sort, drop i = int(trim * n) at each end, take the mean; then E5."
    for d, words in (
        (few, _EMPTY),
        (away, "The estimate is negative here, and its root is not a number: leave the division out."),
    ):
        found = torch.as_tensor(call(function, torch.zeros(len(d), dtype=torch.float64), d, 0.5, 0.01, hint=hint))
        require(bool(found.isfinite().all()), f"The rewards are not finite. {words}")
    return check(
        function,
        [case(five, 0.5, 0.4), case(few, 0.5, 0.01, empty), case(away, 0.5, 0.0), case(many, 2.0, 0.02)],
        hint=hint,
        praise="The policy is charged by how much oftener than the base it is somewhere, in units of the root of chi2.",
    )
