"""The checks of the demonstration-regularized-RL notebook's three exercises."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from polrl.core.exercise import Case, Feedback, call, check, checker, require
from polrl.foundations.demonstration_regularized_rl import (
    balancing_strength,
    clone,
    cloning_kl,
    kl_backup,
    regularized_objective,
    regularized_plan,
    trajectory_kl,
)
from polrl.worlds.finite_horizon import (
    count_transitions,
    greedy_policy,
    optimal_values,
    policy_values,
    random_finite_mdp,
    sample_episodes,
    visits,
)

Tensor = torch.Tensor
Backup = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


# ---- exercise 1 ----------------------------------------------------------------------------------------------


def _backup(
    logits: Callable[[Tensor, Tensor, float], Tensor] = lambda Q, ref, lam: ref.log() + Q / lam,
    value: Callable[[Tensor, Tensor, Tensor, float], Tensor] = lambda z, pi, Q, lam: lam * torch.logsumexp(z, dim=-1),
) -> Backup:
    """Return an answer to exercise 1 with other logits, or another value."""

    def answer(Q: Tensor, ref: Tensor, lam: float) -> tuple[Tensor, Tensor]:
        z = logits(Q, ref, lam)
        pi = torch.softmax(z, dim=-1)
        return value(z, pi, Q, lam), pi

    return answer


def _not_normalised(Q: Tensor, ref: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    return kl_backup(Q, ref, lam)[0], ref * (Q / lam).exp()


def _pessimist(Q: Tensor, ref: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    value, pi = kl_backup(-Q, ref, lam)
    return -value, pi


_BACKUP_MISTAKES: dict[str, Backup] = {
    "The clone is missing: this is entropy regularization. Add log ref to Q / lam.": _backup(lambda Q, r, lam: Q / lam),
    "The logits need log ref, not ref.": _backup(lambda Q, r, lam: r + Q / lam),
    "Q is divided by lam, not multiplied with it.": _backup(lambda Q, r, lam: r.log() + Q * lam),
    "The value lacks its factor lam: V = lam log sum ref exp(Q / lam).": _backup(
        value=lambda z, pi, Q, lam: torch.logsumexp(z, dim=-1)
    ),
    "This value is the mean of Q under the new policy; the penalty, lam KL(pi || ref), is not taken off.": _backup(
        value=lambda z, pi, Q, lam: (pi * Q).sum(dim=-1)
    ),
    "This value is the largest Q: that is the limit for lam = 0.": _backup(
        value=lambda z, pi, Q, lam: Q.max(dim=-1).values
    ),
    "The value needs the log of the SUM over the actions, not of their mean.": _backup(
        value=lambda z, pi, Q, lam: lam * (torch.logsumexp(z, dim=-1) - math.log(z.shape[-1]))
    ),
    "The policy is not normalised: divide ref exp(Q / lam) by its sum.": _not_normalised,
    "The sign is wrong: actions with a high Q must become more likely.": _pessimist,
    "A small number inside the log revives actions that the clone forbids; log 0 = -inf is right here, and "
    "torch.logsumexp and softmax take it.": _backup(lambda Q, r, lam: (r + 1e-8).log() + Q / lam),
}


def _backup_case(Q: Tensor, ref: Tensor, lam: float) -> Case:
    value, policy = kl_backup(Q, ref, lam)
    expected = {"V": value, "pi": policy, "gradient by Q": policy}
    return Case({"Q": Q, "ref": ref, "lam": lam}, expected, _BACKUP_MISTAKES)


@checker
def check_kl_backup(function: Any) -> Feedback:
    """Judge exercise 1, `kl_backup(Q, ref, lam) -> (V, pi)`: one step of E4, and identities 1, 2 and 5.

    Parameters
    ----------
    function : callable
        Of action values Q [S, A], the clone ref [S, A] and a strength lam > 0; returns the penalised value [S]
        and the policy [S, A].
    """
    hint = "Begin with the logits, ref.log() + Q / lam; then torch.logsumexp and torch.softmax over the actions."
    generator = torch.Generator().manual_seed(0)
    Q = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    ref = torch.softmax(torch.randn(4, 5, generator=generator, dtype=torch.float64), dim=1)
    simple = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[0.2, 0.8]], dtype=torch.float64)
    first = check(function, [_backup_case(*simple, 0.5), _backup_case(Q, ref, 0.3)], hint=hint)
    if not first:
        return first
    value, policy = call(function, Q + 1, ref, 1e-3, hint=hint)
    require(
        bool(value.isfinite().all() and policy.isfinite().all()),
        "At lam = 0.001 the result is not finite: exp(Q / lam) overflows. Stay with logarithms: torch.logsumexp "
        "takes the largest logit out first.",
    )
    forbidden = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    cases = [
        _backup_case(torch.tensor([[0.0, 0.2, 1.0]], dtype=torch.float64), forbidden, 0.05),
        _backup_case(Q, ref, 1e-3),  # nearly the largest Q
        _backup_case(Q, ref, 1e4),  # nearly the clone
        _backup_case(Q + 7.0, ref, 0.3),  # a constant moves the value and leaves the policy
    ]
    return check(
        function,
        cases,
        praise="Values and policies are right from lam = 0.001, greedy, to 10,000, the clone; and the gradient of V by "
        "Q is the policy itself.",
    )


# ---- exercise 2 ----------------------------------------------------------------------------------------------


def _by_state(pi: Tensor, ref: Tensor) -> Tensor:
    return (torch.xlogy(pi, pi) - torch.xlogy(pi, ref)).sum(dim=-1)


def _uniform_start(P: Tensor, pi: Tensor, ref: Tensor) -> Tensor:
    return torch.stack([trajectory_kl(P, pi, ref, start) for start in range(P.shape[1])]).mean()


_KL_MISTAKES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "The states are those that ref visits; they must be those of pi, the policy that acts.": lambda P, pi, ref: (
        visits(P, ref) * _by_state(pi, ref)
    ).sum(),
    "All states count alike here; each must count as often as pi visits it.": lambda P, pi, ref: _by_state(
        pi, ref
    ).sum(),
    "This is KL(ref || pi); pi comes first, it weighs the logarithms.": lambda P, pi, ref: (
        visits(P, pi) * _by_state(ref, pi)
    ).sum(),
    "The two policies are exchanged everywhere.": lambda P, pi, ref: trajectory_kl(P, ref, pi),
    "This is the mean over the steps; the KL of whole trajectories is their sum.": lambda P, pi, ref: (
        trajectory_kl(P, pi, ref) / len(P)
    ),
    "The last step is missing: its action too is part of the trajectory.": lambda P, pi, ref: (
        visits(P, pi) * _by_state(pi, ref)
    )[:-1].sum(),
    "The first step is missing.": lambda P, pi, ref: (visits(P, pi) * _by_state(pi, ref))[1:].sum(),
    "The start is taken as uniform; every episode starts in state 0.": _uniform_start,
    "The sign is wrong: a KL is never negative.": lambda P, pi, ref: -trajectory_kl(P, pi, ref),
}


def _enumerated_kl(P: Tensor, pi: Tensor, ref: Tensor) -> float:
    """Return the KL of the laws of whole trajectories, by going through all of them."""
    H, S, A = pi.shape
    total = 0.0
    for actions in itertools.product(range(A), repeat=H):
        for later in itertools.product(range(S), repeat=H - 1):
            states = (0, *later)
            p = q = 1.0
            for h in range(H):
                moved = float(P[h, states[h], actions[h], states[h + 1]]) if h < H - 1 else 1.0
                p *= float(pi[h, states[h], actions[h]]) * moved
                q *= float(ref[h, states[h], actions[h]]) * moved
            total += p * math.log(p / q) if p > 0 else 0.0
    return total


def _random_policy(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.softmax(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1)


def check_kl_traj(function: Any) -> Feedback:
    """Judge exercise 2, `kl_traj(P, pi, ref)`: E5a, against identities 7 and 4.

    Parameters
    ----------
    function : callable
        Of P [H, S, A, S] and two policies [H, S, A]; returns the KL of their trajectories from state 0 as a
        scalar.
    """
    generator = torch.Generator().manual_seed(0)
    P, R = random_finite_mdp(3, 2, 2, generator)
    pi, ref = _random_policy((3, 2, 2), generator), _random_policy((3, 2, 2), generator)
    cases = [Case({"P": P, "pi": pi, "ref": ref}, {"KL": _enumerated_kl(P, pi, ref)}, _KL_MISTAKES)]
    # Identity 4: what a policy lacks to the best one of the penalised problem is lambda times a KL.
    best = regularized_plan(P, R, ref, 0.1)
    lack = best.V[0, 0] - regularized_objective(P, R, pi, ref, 0.1)
    cases.append(Case({"P": P, "pi": pi, "best": best.pi}, {"KL": lack / 0.1}, _KL_MISTAKES))
    P, _ = random_finite_mdp(5, 4, 3, generator)
    pi, ref = _random_policy((5, 4, 3), generator), _random_policy((5, 4, 3), generator)
    cases.append(Case({"P": P, "pi": pi, "ref": ref}, {"KL": trajectory_kl(P, pi, ref)}, _KL_MISTAKES))
    return check(
        function,
        cases,
        hint="Push the probabilities of the states forward step by step, starting in state 0; at each step add "
        "their KL, weighted with them.",
        praise="It agrees with the sum over all trajectories, and with identity 4: what a policy lacks to the "
        "penalised optimum is lam times its KL from that optimum. A KL is of second order: hence the fast rate.",
    )


# ---- exercise 3 ----------------------------------------------------------------------------------------------


def _estimate(counts: Tensor) -> tuple[int, int, int]:
    """Return the pairs (h, s) that were reached, the number of actions and that of demonstrations."""
    return int((counts.sum(dim=-1) > 0).sum()), counts.shape[-1], int(counts[0].sum())


def _strength(eps: float, counts: Tensor) -> float:
    return balancing_strength(eps, cloning_kl(*_estimate(counts)))


def _by_tried_pairs(eps: float, counts: Tensor) -> float:
    _, A, n_demo = _estimate(counts)
    return eps / cloning_kl(int((counts > 0).sum()), A, n_demo)


_STRENGTH_MISTAKES: dict[str, Callable[[float, Tensor], float]] = {
    "All H S pairs (h, s) are counted; take only those that the demonstrations reached.": lambda eps, counts: (
        _strength(eps, counts) * _estimate(counts)[0] / (counts.shape[0] * counts.shape[1])
    ),
    "The entries (h, s, a) that are above 0 are counted; count the pairs (h, s).": _by_tried_pairs,
    "A factor 2 is missing: each pair adds (A - 1) / (2 N_E).": lambda eps, counts: _strength(eps, counts) / 2,
    "Each pair adds (A - 1) / (2 N_E), not A / (2 N_E).": lambda eps, counts: (
        _strength(eps, counts) * (counts.shape[-1] - 1) / counts.shape[-1]
    ),
    "N_E is the number of demonstrations; the sum of all counts is H times that.": lambda eps, counts: (
        _strength(eps, counts) * len(counts)
    ),
    "This is the fraction upside down: lambda = eps / KL.": lambda eps, counts: 1 / _strength(eps, counts),
    "The KL itself is the squared epsilon_KL: no root, lambda = eps / KL.": lambda eps, counts: (
        eps * math.sqrt(_strength(eps, counts) / eps)
    ),
    "This is the KL that E3 foretells; lambda = eps / KL.": lambda eps, counts: eps / _strength(eps, counts),
}


@checker
def check_lambda_star(function: Any) -> Feedback:
    """Judge exercise 3, `lambda_star(eps, counts)`: E6a with the KL that E3 foretells, and E6 in 50 random worlds.

    Parameters
    ----------
    function : callable
        Of the error eps that is allowed, and the demonstrations' counts [H, S, A]; returns the strength.
    """
    few = torch.tensor([[[3.0, 1.0, 0.0]], [[2.0, 1.0, 1.0]]], dtype=torch.float64)
    P, R = random_finite_mdp(4, 5, 3, torch.Generator().manual_seed(0))
    P[0, 0, :, 4] = P[1:, :, :, 4] = 0.0  # one state that is never reached
    counts = _demonstrations(P / P.sum(dim=-1, keepdim=True), R, torch.Generator().manual_seed(1))[0]
    cases = [
        Case({"eps": eps, "counts": table}, {"lambda": _strength(eps, table)}, _STRENGTH_MISTAKES)
        for eps, table in ((0.1, few), (0.02, counts))
    ]
    hint = "The KL to expect is (A - 1) / (2 N_E) for each pair (h, s) that was reached; lambda = eps / KL."
    first = check(function, cases, hint=hint)
    if not first:
        return first
    worst = max(_share_of_guarantee(function, seed, eps=0.05) for seed in range(50))
    require(worst <= 1, f"In one of 50 random worlds the gap is {worst:.2f} times eps_E + 2 eps.")
    return Feedback(
        "right",
        f"In 50 random worlds the gap was at most {worst:.2f} of what E6 allows, eps_E + 2 eps. Ten times the "
        "demonstrations allow ten times the strength.",
    )


def _demonstrations(P: Tensor, R: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return counts of 200 demonstrations of an expert with a fifth of uniform actions, and that expert."""
    expert = 0.8 * greedy_policy(optimal_values(P, R)[0]) + 0.2 / R.shape[-1]
    states, actions = sample_episodes(P, expert, 200, generator)
    return count_transitions(states, actions, *R.shape[1:]).sum(dim=-1).double(), expert


def _share_of_guarantee(function: Any, seed: int, eps: float) -> float:
    """Return the gap of the penalised optimum as a share of E6's eps_E + 2 eps, in a random world."""
    generator = torch.Generator().manual_seed(seed)
    P, R = random_finite_mdp(4, 5, 3, generator)
    counts, expert = _demonstrations(P, R, generator)
    policy = regularized_plan(P, R, clone(counts), float(call(function, eps, counts))).pi
    best = optimal_values(P, R)[1][0, 0]
    gap, expert_gap = (best - policy_values(P, R, each)[0, 0] for each in (policy, expert))
    return float(gap / (expert_gap + 2 * eps))
