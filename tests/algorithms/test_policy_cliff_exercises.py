"""The policy-cliff exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import torch
from exercise_suite import ExerciseSuite

from polrl.foundations._policy_cliff_exercises import (
    check_inv_bellman,
    check_kl_optimum,
    check_soft_vi,
    check_tie_policy_jump,
)

# ---- exercise 1a ---------------------------------------------------------------------------------------------


def inv_bellman(Q, P, gamma):
    best = torch.stack([row.max() for row in Q])
    return Q - gamma * torch.einsum("sat,t->sa", P, best)


def wrong_inverse(future, sign=-1.0, discounted=True):
    return lambda Q, P, gamma: Q + sign * (gamma if discounted else 1.0) * future(Q, P)


INVERSE_MISTAKES = {
    "plus": (wrong_inverse(lambda Q, P: P @ Q.max(dim=1).values, sign=1.0), "The sign is wrong"),
    "no discount": (wrong_inverse(lambda Q, P: P @ Q.max(dim=1).values, discounted=False), "discount is missing"),
    "mean of actions": (wrong_inverse(lambda Q, P: P @ Q.mean(dim=1)), "OPTIMAL table"),
    "max over states": (wrong_inverse(lambda Q, P: Q.max(dim=0).values), "maximum over states"),
    "own state": (wrong_inverse(lambda Q, P: Q.max(dim=1, keepdim=True).values), "maximum of the state itself"),
    "forwards": (lambda Q, P, gamma: gamma * (P @ Q.max(dim=1).values), "go backwards"),
    "P reversed": (
        wrong_inverse(lambda Q, P: P.permute(2, 1, 0) @ Q.max(dim=1).values),
        "the wrong way round",
    ),
    "values only": (lambda Q, P, gamma: Q.max(dim=1).values, "must have the shape [2, 2], found [2]"),
    "float32": (lambda Q, P, gamma: inv_bellman(Q, P, gamma).float(), "must be float64"),
}


# ---- exercise 1b ---------------------------------------------------------------------------------------------


def soft_vi(R, P, gamma, alpha, value=None, choose=None, backups=300, overflow=False):
    """Solve exercise 1b, or make one of its typical mistakes."""

    def plain(Q):
        return alpha * ((Q / alpha).exp().sum(dim=1).log() if overflow else torch.logsumexp(Q / alpha, dim=1))

    Q = torch.zeros_like(R)
    for _ in range(backups):
        Q = R + gamma * (P @ (value or plain)(Q))
    return Q, choose(Q) if choose else torch.softmax(Q / alpha, dim=1)


def wrong_soft(**changes):
    """Return exercise 1b with parts that know alpha."""

    def function(R, P, gamma, alpha):
        parts = {
            name: (lambda Q, part=part: part(Q, alpha)) if name in ("value", "choose") else part
            for name, part in changes.items()
        }
        return soft_vi(R, P, gamma, alpha, **parts)

    return function


def lse(Q):
    return torch.logsumexp(Q, dim=1)


SOFT_MISTAKES = {
    "hard max": (wrong_soft(value=lambda Q, a: Q.max(dim=1).values), "hard maximum"),
    "no alpha in front": (wrong_soft(value=lambda Q, a: lse(Q / a)), "alpha is missing in front"),
    "not divided": (wrong_soft(value=lambda Q, a: a * lse(Q)), "Divide Q by alpha"),
    "multiplied": (wrong_soft(value=lambda Q, a: lse(Q * a) / a), "multiplied by alpha"),
    "mean exp": (wrong_soft(value=lambda Q, a: a * (Q / a).exp().mean(dim=1).log()), "log of the MEAN"),
    "expected Q": (wrong_soft(value=lambda Q, a: (torch.softmax(Q / a, 1) * Q).sum(1)), "entropy is missing"),
    "no discount": (lambda R, P, gamma, alpha: soft_vi(R, P, 1.0, alpha), "The discount is missing"),
    "one backup": (wrong_soft(backups=1), "one backup only"),
    "policy without alpha": (wrong_soft(choose=lambda Q, a: torch.softmax(Q, dim=1)), "not softmax(Q)"),
    "policy alpha times": (wrong_soft(choose=lambda Q, a: torch.softmax(Q * a, dim=1)), "not softmax(alpha Q)"),
    "hard policy": (
        wrong_soft(choose=lambda Q, a: torch.nn.functional.one_hot(Q.argmax(1), Q.shape[1]).double()),
        "the hard one",
    ),
    "normalised over states": (wrong_soft(choose=lambda Q, a: torch.softmax(Q / a, dim=0)), "over the states"),
    "overflow": (wrong_soft(overflow=True), "the exponential overflows"),
    "table only": (lambda *x: soft_vi(*x)[0], "Return 2 values (Q, pi)"),
}


# ---- exercise 2 ----------------------------------------------------------------------------------------------


def tie_policy_jump(P, Q0, gamma, s0, a2, eps, measure=None, jump=None, where="table"):
    """Solve exercise 2, or make one of its typical mistakes."""
    raised = Q0.clone()
    raised[s0, a2] += eps
    change = inv_bellman(raised, P, gamma) - inv_bellman(Q0, P, gamma)
    if where == "reward":
        change = torch.zeros_like(Q0)
        change[s0, a2] = eps
    before, after = ((Q == Q.max(dim=1, keepdim=True).values).double() for Q in (Q0, raised))
    before, after = (p / p.sum(dim=1, keepdim=True) for p in (before, after))
    size = measure(change, gamma, eps) if measure else change.abs().max()
    return size, jump(before, after, s0) if jump else 0.5 * (before - after)[s0].abs().sum()


def wrong_jump(**changes):
    return lambda P, Q0, gamma, s0, a2, eps: tie_policy_jump(P, Q0, gamma, s0, a2, eps, **changes)


def first_of_ties(P, Q0, gamma, s0, a2, eps):
    raised = Q0.clone()
    raised[s0, a2] += eps
    same = Q0[s0].argmax() == raised[s0].argmax()
    return tie_policy_jump(P, Q0, gamma, s0, a2, eps)[0], 0.0 if same else 1.0


def lowered(P, Q0, gamma, s0, a2, eps):
    return tie_policy_jump(P, Q0, gamma, s0, a2, -eps)


JUMP_MISTAKES = {
    "1-norm": (wrong_jump(jump=lambda p, q, s: (p - q)[s].abs().sum()), "the factor 1/2 is missing"),
    "largest difference": (
        wrong_jump(jump=lambda p, q, s: (p - q)[s].abs().max() / 2),
        "half the largest difference",
    ),
    "first": (first_of_ties, "the first of the tied"),
    "mean over states": (
        wrong_jump(jump=lambda p, q, s: (0.5 * (p - q).abs().sum(dim=1)).mean()),
        "averaged over the states",
    ),
    "the bound": (wrong_jump(measure=lambda d, gamma, eps: (1 + gamma) * eps), "paper's bound"),
    "summed": (wrong_jump(measure=lambda d, *x: d.abs().sum()), "summed over the entries"),
    "averaged": (wrong_jump(measure=lambda d, *x: d.abs().mean()), "averaged over the entries"),
    "signed": (wrong_jump(measure=lambda d, *x: d.max()), "absolute value"),
    "reward raised": (wrong_jump(where="reward"), "Raise the entry of Q0, not of the reward"),
    "lowered": (lowered, "The entry is lowered"),
    "jump only": (lambda *x: tie_policy_jump(*x)[1], "Return 2 values (change, jump)"),
}


# ---- exercise 3 ----------------------------------------------------------------------------------------------


def kl_optimum(R, P, gamma, beta, pi_b, value=None, choose=None):
    """Solve exercise 3, or make one of its typical mistakes."""
    V = torch.zeros(len(R), dtype=R.dtype)
    for _ in range(300):
        Q = R + gamma * (P @ V)
        V = value(Q, pi_b, beta) if value else beta * torch.logsumexp(Q / beta + pi_b.log(), dim=1)
    Q = R + gamma * (P @ V)
    return V, choose(Q, pi_b, beta, V) if choose else pi_b * ((Q - V[:, None]) / beta).exp()


def wrong_kl(**changes):
    return lambda R, P, gamma, beta, pi_b: kl_optimum(R, P, gamma, beta, pi_b, **changes)


def tilted(Q, pi_b, beta, V):
    return torch.softmax(Q / beta + pi_b.log(), dim=1)


KL_MISTAKES = {
    "no base in V": (
        wrong_kl(value=lambda Q, b, beta: beta * lse(Q / beta), choose=tilted),
        "base is missing inside the logarithm",
    ),
    "no base": (
        wrong_kl(value=lambda Q, b, beta: beta * lse(Q / beta), choose=lambda Q, b, beta, V: (Q / beta).softmax(1)),
        "missing altogether",
    ),
    "no base in the policy": (
        wrong_kl(choose=lambda Q, b, beta, V: ((Q - V[:, None]) / beta).exp()),
        "base is missing in the policy",
    ),
    "policy is the softmax of Q": (
        wrong_kl(choose=lambda Q, b, beta, V: (Q / beta).softmax(1)),
        "leaves the base out",
    ),
    "divided by the base": (
        wrong_kl(
            value=lambda Q, b, beta: beta * lse(Q / beta - b.log()),
            choose=lambda Q, b, beta, V: (Q / beta - b.log()).softmax(1),
        ),
        "divides by the base",
    ),
    "mean under the base": (wrong_kl(value=lambda Q, b, beta: (b * Q).sum(dim=1), choose=tilted), "mean of Q"),
    "no beta in front": (
        wrong_kl(value=lambda Q, b, beta: lse(Q / beta + b.log()), choose=tilted),
        "beta is missing in front",
    ),
    "hard": (wrong_kl(value=lambda Q, b, beta: Q.max(dim=1).values, choose=tilted), "hard maximum"),
    "overflow": (
        wrong_kl(value=lambda Q, b, beta: beta * (b * (Q / beta).exp()).sum(dim=1).log()),
        "At beta = 0.001 the base must be restricted",
    ),
    "policy only": (lambda *x: kl_optimum(*x)[1], "Return 2 values (V, pi)"),
}


# ---- the checks ----------------------------------------------------------------------------------------------


class TestExercises(ExerciseSuite):
    solutions = [
        (check_inv_bellman, inv_bellman),
        (check_soft_vi, soft_vi),
        (check_tie_policy_jump, tie_policy_jump),
        (check_tie_policy_jump, lambda *x: tuple(float(y) for y in tie_policy_jump(*x))),
        (check_kl_optimum, kl_optimum),
        (check_kl_optimum, wrong_kl(choose=tilted)),
    ]
    mistakes = {
        check_inv_bellman: INVERSE_MISTAKES,
        check_soft_vi: SOFT_MISTAKES,
        check_tie_policy_jump: JUMP_MISTAKES,
        check_kl_optimum: KL_MISTAKES,
    }


def test_praise_tells_what_was_found():
    assert "0.04983" in check_soft_vi(soft_vi).words and "0.05000" in check_soft_vi(soft_vi).words
    words = check_kl_optimum(kl_optimum).words
    assert float(words.split("within ")[1].split()[0]) < 0.05
    assert "1.9 eps" in check_tie_policy_jump(tie_policy_jump).words
