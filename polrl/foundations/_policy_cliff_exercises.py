"""The checks of the policy-cliff notebook's three exercises; the first has two parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from polrl.core.exercise import Case, Feedback, call, check, checker, require
from polrl.foundations.policy_cliff import (
    greedy_policy,
    inverse_bellman,
    kl_optimum,
    perturbed_reward,
    policy_bound,
    policy_gradient,
    soft_optimum,
    soft_policy,
    soft_value,
    total_variation,
)
from polrl.worlds.tabular import random_mdp

Tensor = torch.Tensor


def _mdp(states: int, actions: int, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Return transitions, a table to be used as Q or R, and the generator that drew them."""
    generator = torch.Generator().manual_seed(seed)
    P, R = random_mdp(states, actions, generator)
    return P, R, generator


# ---- exercise 1: both solvers --------------------------------------------------------------------------------

_INVERSE_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The sign is wrong: the reward is what remains of Q when the future is taken away.": lambda Q, P, gamma: (
        Q + gamma * (P @ Q.amax(dim=1))
    ),
    "The discount is missing: the future counts gamma times.": lambda Q, P, gamma: Q - P @ Q.amax(dim=1),
    "This takes the mean over the next state's actions; Q is the OPTIMAL table, so take their maximum.": (
        lambda Q, P, gamma: Q - gamma * (P @ Q.mean(dim=1))
    ),
    "This takes the maximum over states; take it over the actions of the next state (dim=1).": lambda Q, P, gamma: (
        Q - gamma * Q.amax(dim=0)
    ),
    "This takes the maximum of the state itself; the future is the NEXT state's, averaged by P.": lambda Q, P, gamma: (
        Q - gamma * Q.amax(dim=1, keepdim=True)
    ),
    "This is one Bellman backup of Q; go backwards, from Q to the reward.": lambda Q, P, gamma: (
        gamma * (P @ Q.amax(dim=1))
    ),
    "P is used the wrong way round: P[s, a, t] leads FROM s, by a, to t.": lambda Q, P, gamma: (
        Q - gamma * torch.einsum("tas,t->sa", P, Q.amax(dim=1))
    ),
}


def check_inv_bellman(function: Any) -> Feedback:
    """Judge exercise 1a, `inv_bellman(Q, P, gamma)`: E4 and identity 1.

    Parameters
    ----------
    function : callable
        Of a table Q [S, A], transitions P [S, A, S] and the discount; returns the reward [S, A] whose optimal
        table is Q.
    """
    cases = []
    for states, actions, gamma in ((2, 2, 0.5), (4, 3, 0.9)):
        P, Q, _ = _mdp(states, actions, seed=states)
        cases.append(
            Case({"Q": Q, "P": P, "gamma": gamma}, {"reward": inverse_bellman(Q, P, gamma)}, _INVERSE_MISTAKES, 1e-9)
        )
    return check(
        function,
        cases,
        hint="Solve the Bellman equation for R: take gamma times the expected best value of the next state away.",
        praise="Solving your reward gives back the table that you began with: any table is optimal for some reward.",
    )


#: So many from zero: the tables then stand still to 1e-12 where gamma is at most 0.9.
_BACKUPS = 300


def _soft_vi(
    value: Callable[[Tensor, float], Tensor] = soft_value,
    choose: Callable[[Tensor, float], Tensor] = soft_policy,
    backups: int = _BACKUPS,
    discount: Callable[[float], float] = lambda gamma: gamma,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return an answer to exercise 1b with another value, another policy, or fewer backups."""

    def answer(R: Tensor, P: Tensor, gamma: float, alpha: float) -> tuple[Tensor, Tensor]:
        Q = torch.zeros_like(R)
        for _ in range(backups):
            Q = R + discount(gamma) * (P @ value(Q, alpha))
        return Q, choose(Q, alpha)

    return answer


def _mellowmax(Q: Tensor, alpha: float) -> Tensor:
    return soft_value(Q, alpha) - alpha * math.log(Q.shape[-1])


def _expected(Q: Tensor, alpha: float) -> Tensor:
    return (soft_policy(Q, alpha) * Q).sum(dim=-1)


_SOFT_MISTAKES = {
    "This is the hard maximum; E7 puts alpha log sum exp(Q / alpha) in its place.": _soft_vi(
        lambda Q, alpha: Q.amax(dim=-1)
    ),
    "alpha is missing in front of the logarithm.": _soft_vi(lambda Q, alpha: soft_value(Q, alpha) / alpha),
    "Divide Q by alpha inside the exponential.": _soft_vi(lambda Q, alpha: alpha * torch.logsumexp(Q, dim=-1)),
    "Q is multiplied by alpha inside the exponential; divide.": _soft_vi(
        lambda Q, alpha: torch.logsumexp(alpha * Q, dim=-1) / alpha
    ),
    "This is the log of the MEAN exponential, so alpha log A is missing at every step: E7 sums.": _soft_vi(_mellowmax),
    "This is the policy's expected Q: its entropy is missing, alpha H = V - sum pi Q.": _soft_vi(_expected),
    "This is one backup only: repeat until the table no longer moves.": _soft_vi(backups=1),
    "The discount is missing.": _soft_vi(discount=lambda gamma: 1.0),
    "The policy is softmax(Q / alpha), not softmax(Q).": _soft_vi(choose=lambda Q, alpha: torch.softmax(Q, dim=-1)),
    "The policy is softmax(Q / alpha), not softmax(alpha Q).": _soft_vi(
        choose=lambda Q, alpha: torch.softmax(alpha * Q, dim=-1)
    ),
    "The policy is the hard one, the best action alone: E7 is softmax(Q / alpha).": _soft_vi(
        choose=lambda Q, alpha: greedy_policy(Q)
    ),
    "The policy is normalised over the states; each state's row must sum to one (dim=1).": _soft_vi(
        choose=lambda Q, alpha: torch.softmax(Q / alpha, dim=0)
    ),
}


@checker
def check_soft_vi(function: Any) -> Feedback:
    """Judge exercise 1b, `soft_vi(R, P, gamma, alpha) -> (Q, pi)`: E7, identities 4 and 5.

    Parameters
    ----------
    function : callable
        Of a reward R [S, A], transitions P [S, A, S], the discount and alpha > 0; returns the soft optimal table
        and policy, both [S, A], after 300 backups from zero.
    """
    cases = []
    for states, actions, gamma, alpha in ((2, 2, 0.5, 0.8), (4, 3, 0.9, 0.3), (4, 3, 0.9, 2.0)):
        P, R, _ = _mdp(states, actions, seed=states)
        Q, pi = soft_optimum(R, P, gamma, alpha)
        arguments = {"R": R, "P": P, "gamma": gamma, "alpha": alpha}
        cases.append(Case(arguments, {"Q": Q, "pi": pi}, _SOFT_MISTAKES, 1e-8))
    hint = "Begin with Q = 0; repeat Q = R + gamma * (P @ (alpha * torch.logsumexp(Q / alpha, dim=1))) 300 times."
    feedback = check(function, cases, hint=hint)
    if not feedback:
        return feedback
    P, R, _ = _mdp(4, 3, seed=4)
    Q, pi = call(function, R, P, 0.9, 1e-3)
    require(
        bool(torch.as_tensor(Q).isfinite().all() and torch.as_tensor(pi).isfinite().all()),
        "At alpha = 0.001 the exponential overflows: subtract the maximum first, or use torch.logsumexp.",
    )
    one, arms = torch.ones(1, 2, 1, dtype=torch.float64), torch.tensor([[0.01, -0.01]], dtype=torch.float64)
    moved = float(total_variation(call(function, arms, one, 0.0, 0.1)[1], call(function, 0 * arms, one, 0.0, 0.1)[1]))
    bound = float(policy_bound(arms, 0 * arms, 0.1, 0.0))
    return Feedback(
        "right",
        f"On two arms with a gap of +-0.01, alpha 0.1 lets your policy move by {moved:.5f}, tanh(eps / alpha) / 2; "
        f"the bound E8 allows {bound:.5f}.",
    )


# ---- exercise 2: the jump ------------------------------------------------------------------------------------

Jump = Callable[[Tensor, Tensor, float, int, int, float], tuple[Tensor, Tensor]]


def _jump(
    change: Callable[..., Tensor] | None = None, distance: Callable[[Tensor, Tensor], Tensor] = total_variation,
    rule: str = "uniform", everywhere: bool = False,
) -> Jump:  # fmt: skip
    """Return an answer to exercise 2 with another measure of the reward's change, or of the policy's."""

    def answer(P: Tensor, Q0: Tensor, gamma: float, s0: int, a2: int, eps: float) -> tuple[Tensor, Tensor]:
        Q = Q0.clone()
        Q[s0, a2] += eps
        moved = perturbed_reward(Q0, P, gamma, s0, a2, eps) - inverse_bellman(Q0, P, gamma)
        jumps = distance(greedy_policy(Q0, rule), greedy_policy(Q, rule))
        size = moved.abs().max() if change is None else change(moved, gamma, eps)
        return size, (jumps.mean() if everywhere else jumps[s0])

    return answer


def _reward_raised(P: Tensor, Q0: Tensor, gamma: float, s0: int, a2: int, eps: float) -> tuple[Tensor, Tensor]:
    size, jump = _jump()(P, Q0, gamma, s0, a2, eps)
    return torch.full_like(size, eps), jump


def _losing_side(P: Tensor, Q0: Tensor, gamma: float, s0: int, a2: int, eps: float) -> tuple[Tensor, Tensor]:
    return _jump()(P, Q0, gamma, s0, a2, -eps)


_JUMP_MISTAKES: dict[str, Jump] = {
    "Half the sum of absolute differences is the total variation: the factor 1/2 is missing.": _jump(
        distance=lambda p, q: 2 * total_variation(p, q)
    ),
    "This is half the largest difference of one probability; sum over the actions, then halve.": _jump(
        distance=lambda p, q: (p - q).abs().amax(dim=-1) / 2
    ),
    "This takes the first of the tied actions; the uniform rule spreads over all that tie.": _jump(rule="first"),
    "The jump is averaged over the states; it is that of state s0.": _jump(everywhere=True),
    "(1 + gamma) eps is the paper's bound on the reward's change; return the change itself.": _jump(
        lambda moved, gamma, eps: torch.tensor((1 + gamma) * eps, dtype=torch.float64)
    ),
    "The change of the reward is summed over the entries; take the largest absolute one.": _jump(
        lambda moved, gamma, eps: moved.abs().sum()
    ),
    "The change of the reward is averaged over the entries; take the largest absolute one.": _jump(
        lambda moved, gamma, eps: moved.abs().mean()
    ),
    "The change of the reward must be an absolute value: the entries that fall count too.": _jump(
        lambda moved, gamma, eps: moved.max()
    ),
    "Raise the entry of Q0, not of the reward, and run E4 on both tables: the rewards then differ in many "
    "entries.": _reward_raised,
    "The entry is lowered by eps; raise it.": _losing_side,
}


def _sticky_mdp(m: int) -> tuple[Tensor, Tensor]:
    """Return transitions that often lead to state 0, by a2 above all, and a table with m ties there."""
    P, Q0, _ = _mdp(4, 6, seed=m)
    P[:, :, 0] += 3.0
    P[0, 1, 0] += 20.0
    Q0[0, :m] = 1.5
    return P / P.sum(dim=-1, keepdim=True), Q0


def check_tie_policy_jump(function: Any) -> Feedback:
    """Judge exercise 2, `tie_policy_jump(P, Q0, gamma, s0, a2, eps) -> (change, jump)`: E5, identities 2 and 3.

    Parameters
    ----------
    function : callable
        Of transitions P [S, A, S], a table Q0 [S, A] in which a2 ties for the best in state s0, the discount,
        and eps > 0; returns the largest absolute change of the reward and the total variation of the uniform
        optimal policies at s0, before and after the entry (s0, a2) of the optimal table is raised by eps.
    """
    cases = []
    for m in (3, 2, 4, 5):  # with two ties, several mistakes look alike
        P, Q0 = _sticky_mdp(m)
        arguments = {"P": P, "Q0": Q0, "gamma": 0.9, "s0": 0, "a2": 1, "eps": 0.05}
        change, jump = _jump()(P, Q0, 0.9, 0, 1, 0.05)
        cases.append(Case(arguments, {"change": change, "jump": jump}, _JUMP_MISTAKES, 1e-9))
    changes = ", ".join(f"{float(case.expected['change']) / 0.05:.2f}" for case in cases)
    return check(
        function,
        cases,
        hint="Copy Q0, raise one entry, run E4 on both tables; compare their greedy policies at s0, uniform on ties.",
        praise=f"The policy jumps by (m - 1)/m = 2/3, 1/2, 3/4, 4/5; the reward moved by {changes} eps only, where the "
        "paper's bound allows 1.9 eps.",
    )


# ---- exercise 3: the KL penalty ------------------------------------------------------------------------------

Answer3 = Callable[[Tensor, Tensor, float, float, Tensor], tuple[Tensor, Tensor]]


def _kl(
    value: Callable[[Tensor, Tensor, float], Tensor], choose: Callable[[Tensor, Tensor, float, Tensor], Tensor]
) -> Answer3:
    """Return an answer to exercise 3 with another value of a state, or another policy."""

    def answer(R: Tensor, P: Tensor, gamma: float, beta: float, pi_b: Tensor) -> tuple[Tensor, Tensor]:
        V = torch.zeros_like(R[:, 0])
        for _ in range(_BACKUPS):
            V = value(R + gamma * (P @ V), pi_b, beta)
        return V, choose(R + gamma * (P @ V), pi_b, beta, V)

    return answer


def _value(Q: Tensor, pi_b: Tensor, beta: float) -> Tensor:
    return soft_value(Q + beta * pi_b.log(), beta)


def _choice(Q: Tensor, pi_b: Tensor, beta: float, V: Tensor) -> Tensor:
    return pi_b * ((Q - V.unsqueeze(1)) / beta).exp()


_KL_MISTAKES: dict[str, Answer3] = {
    "The base is missing inside the logarithm: V = beta log sum pi_b exp(Q / beta).": _kl(
        lambda Q, pi_b, beta: soft_value(Q, beta),
        lambda Q, pi_b, beta, V: torch.softmax(pi_b.log() + Q / beta, dim=1),
    ),
    "The base is missing altogether: this is the entropy bonus of E7.": _kl(
        lambda Q, pi_b, beta: soft_value(Q, beta), lambda Q, pi_b, beta, V: torch.softmax(Q / beta, dim=1)
    ),
    "The base is missing in the policy: multiply exp((Q - V) / beta) by pi_b.": _kl(
        _value, lambda Q, pi_b, beta, V: ((Q - V.unsqueeze(1)) / beta).exp()
    ),
    "The policy leaves the base out: it is the softmax of Q / beta + log pi_b.": _kl(
        _value, lambda Q, pi_b, beta, V: torch.softmax(Q / beta, dim=1)
    ),
    "This divides by the base: the penalty pulls towards it.": _kl(
        lambda Q, pi_b, beta: soft_value(Q - beta * pi_b.log(), beta),
        lambda Q, pi_b, beta, V: torch.softmax(Q / beta - pi_b.log(), dim=1),
    ),
    "V is the mean of Q under the base; E9 takes beta log sum pi_b exp(Q / beta).": _kl(
        lambda Q, pi_b, beta: (pi_b * Q).sum(dim=1),
        lambda Q, pi_b, beta, V: torch.softmax(pi_b.log() + Q / beta, dim=1),
    ),
    "beta is missing in front of the logarithm.": _kl(
        lambda Q, pi_b, beta: _value(Q, pi_b, beta) / beta,
        lambda Q, pi_b, beta, V: torch.softmax(pi_b.log() + Q / beta, dim=1),
    ),
    "V is the hard maximum; the penalty makes it beta log sum pi_b exp(Q / beta).": _kl(
        lambda Q, pi_b, beta: Q.amax(dim=1), lambda Q, pi_b, beta, V: torch.softmax(pi_b.log() + Q / beta, dim=1)
    ),
}


@checker
def check_kl_optimum(function: Any) -> Feedback:
    """Judge exercise 3, `kl_optimum(R, P, gamma, beta, pi_b) -> (V, pi)`: E9 and identity 8.

    Parameters
    ----------
    function : callable
        Of a reward R [S, A], transitions P [S, A, S], the discount, beta > 0 and the base policy [S, A] > 0;
        returns the values [S] and the policy [S, A] that are optimal with the KL penalty.
    """
    cases = []
    for states, actions, gamma, beta in ((2, 2, 0.5, 0.8), (4, 3, 0.9, 0.2)):
        P, R, generator = _mdp(states, actions, seed=states)
        pi_b = torch.softmax(torch.randn(R.shape, generator=generator, dtype=torch.float64), dim=1)
        _, V, pi = kl_optimum(R, P, gamma, beta, pi_b)
        arguments = {"R": R, "P": P, "gamma": gamma, "beta": beta, "pi_b": pi_b}
        cases.append(Case(arguments, {"V": V, "pi": pi}, _KL_MISTAKES, 1e-8))
    hint = "Repeat V = beta log sum pi_b exp((R + gamma P V) / beta) 300 times; weigh the base by exp((Q - V) / beta)."
    feedback = check(function, cases, hint=hint)
    if not feedback:
        return feedback
    gap = float(total_variation(call(function, *cases[-1].arguments.values())[1], _ascend(**cases[-1].arguments)).max())
    tied, one = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64), torch.ones(1, 3, 1, dtype=torch.float64)
    base = torch.tensor([[0.1, 0.3, 0.6]], dtype=torch.float64)
    limit = torch.as_tensor(call(function, tied, one, 0.0, 1e-3, base)[1])
    require(
        bool(((limit - torch.tensor([[0.25, 0.75, 0.0]])).abs() < 1e-6).all()),
        "At beta = 0.001 the base must be restricted to the best actions, here to [0.25, 0.75, 0]; found "
        f"{[round(float(p), 4) for p in limit.flatten()]}. Does exp(Q / beta) overflow? Use torch.logsumexp.",
    )
    return Feedback(
        "right",
        f"500 steps of gradient ascent come within {gap:.3f} of your policy. As beta vanishes, the base decides "
        "between the tied actions, and nothing else.",
    )


def _ascend(R: Tensor, P: Tensor, gamma: float, beta: float, pi_b: Tensor) -> Tensor:
    """Return the policy after 500 steps of exact gradient ascent (E12) from the base."""
    theta, rho = pi_b.log(), torch.full_like(R[:, 0], 1 / len(R))
    for _ in range(500):
        theta = theta + policy_gradient(theta, R + beta * pi_b.log(), P, gamma, beta, rho)[1]
    return torch.softmax(theta, dim=1)
