"""The exercises of demonstration-regularized RL: solutions are right, each typical mistake is explained."""

from __future__ import annotations

import math

import torch
from exercise_suite import ExerciseSuite

from polrl.foundations._demonstration_regularized_rl_exercises import (
    check_kl_backup,
    check_kl_traj,
    check_lambda_star,
)

# ---- exercise 1 ----------------------------------------------------------------------------------------------


def kl_backup(Q, ref, lam):
    logits = ref.log() + Q / lam
    top = logits.max(dim=-1, keepdim=True).values
    weight = (logits - top).exp()
    total = weight.sum(dim=-1, keepdim=True)
    return (lam * (top + total.log())).squeeze(-1), weight / total


def backup(logits=None, value=None):
    """Return exercise 1 with other logits or another value."""

    def function(Q, ref, lam):
        z = (logits or (lambda Q, ref, lam: ref.log() + Q / lam))(Q, ref, lam)
        pi = z.softmax(-1)
        return (value or (lambda z, pi, Q, lam: lam * z.logsumexp(-1)))(z, pi, Q, lam), pi

    return function


def naive(Q, ref, lam):
    weight = ref * torch.exp(Q / lam)
    return lam * weight.sum(-1).log(), weight / weight.sum(-1, keepdim=True)


def not_normalised(Q, ref, lam):
    return kl_backup(Q, ref, lam)[0], ref * torch.exp(Q / lam)


def pessimist(Q, ref, lam):
    return -lam * torch.logsumexp(ref.log() - Q / lam, -1), torch.softmax(ref.log() - Q / lam, -1)


BACKUP_MISTAKES = {
    "no clone": (backup(lambda Q, ref, lam: Q / lam), "entropy regularization"),
    "ref for log ref": (backup(lambda Q, ref, lam: ref + Q / lam), "need log ref"),
    "times lam": (backup(lambda Q, ref, lam: ref.log() + Q * lam), "divided by lam"),
    "no factor": (backup(value=lambda z, pi, Q, lam: z.logsumexp(-1)), "lacks its factor lam"),
    "penalty forgotten": (backup(value=lambda z, pi, Q, lam: (pi * Q).sum(-1)), "is not taken off"),
    "largest Q": (backup(value=lambda z, pi, Q, lam: Q.amax(-1)), "limit for lam = 0"),
    "mean for sum": (backup(value=lambda z, pi, Q, lam: lam * z.exp().mean(-1).log()), "not of their mean"),
    "not normalised": (not_normalised, "not normalised"),
    "wrong sign": (pessimist, "sign is wrong"),
    "overflow": (naive, "overflows"),
    "epsilon": (backup(lambda Q, ref, lam: (ref + 1e-8).log() + Q / lam), "revives actions"),
    "value detached": (backup(value=lambda z, pi, Q, lam: (lam * z.logsumexp(-1)).detach()), "gradient by Q"),
    "value only": (lambda Q, ref, lam: kl_backup(Q, ref, lam)[0], "Return 2 values (V, pi)"),
    "keepdim": (backup(value=lambda z, pi, Q, lam: lam * z.logsumexp(-1, keepdim=True)), "must have the shape [1]"),
    "over the states": (lambda Q, ref, lam: (kl_backup(Q, ref, lam)[0], pi_over_states(Q, ref, lam)), "pi"),
}


def pi_over_states(Q, ref, lam):
    return torch.softmax(ref.log() + Q / lam, dim=0)


# ---- exercise 2 ----------------------------------------------------------------------------------------------


def kl_traj(P, pi, ref):
    """Backward in time: what is still to come from each state."""
    to_come = torch.zeros(P.shape[1], dtype=P.dtype)
    for h in reversed(range(len(P))):
        to_come = (pi[h] * ((pi[h] / ref[h]).log() + P[h] @ to_come)).sum(1)
    return to_come[0]


def wrong_kl(weigh_by="pi", of=lambda pi, ref: pi * (pi / ref).log(), steps=slice(None), join=torch.sum):
    """Return exercise 2 with other weights, another divergence or other steps."""

    def function(P, pi, ref):
        d = torch.zeros(P.shape[1], dtype=P.dtype)
        d[0] = 1.0
        parts = []
        for h in range(len(P)):
            parts.append((d.unsqueeze(1) * of(pi[h], ref[h])).sum())
            walked = pi[h] if weigh_by == "pi" else ref[h]
            d = torch.einsum("s,sa,sat->t", d, walked, P[h]) if weigh_by != "all" else torch.ones_like(d)
        return join(torch.stack(parts[steps]))

    return function


def all_states(P, pi, ref):
    return (pi * (pi / ref).log()).sum()


def from_anywhere(P, pi, ref):
    to_come = torch.zeros(P.shape[1], dtype=P.dtype)
    for h in reversed(range(len(P))):
        to_come = (pi[h] * ((pi[h] / ref[h]).log() + P[h] @ to_come)).sum(1)
    return to_come.mean()


KL_MISTAKES = {
    "states of ref": (wrong_kl("ref"), "those that ref visits"),
    "states unweighted": (all_states, "count alike"),
    "reversed": (wrong_kl(of=lambda pi, ref: ref * (ref / pi).log()), "KL(ref || pi)"),
    "exchanged": (lambda P, pi, ref: kl_traj(P, ref, pi), "exchanged everywhere"),
    "mean": (wrong_kl(join=torch.mean), "mean over the steps"),
    "no last step": (wrong_kl(steps=slice(None, -1)), "last step is missing"),
    "no first step": (wrong_kl(steps=slice(1, None)), "first step is missing"),
    "uniform start": (from_anywhere, "starts in state 0"),
    "minus": (lambda *x: -kl_traj(*x), "sign is wrong"),
    "by state": (lambda P, pi, ref: (pi * (pi / ref).log()).sum(-1), "KL must have the shape []"),
    "logs unweighted": (wrong_kl(of=lambda pi, ref: (pi / ref).log()), "KL: expected"),
}


# ---- exercise 3 ----------------------------------------------------------------------------------------------


def lambda_star(eps, counts):
    n_demo = counts[0].sum()
    pairs = (counts.sum(-1) > 0).sum()
    return eps / ((counts.shape[-1] - 1) * pairs / (2 * n_demo))


def strength(pairs=lambda c: (c.sum(-1) > 0).sum(), n=lambda c: c[0].sum(), a=-1, two=2, form=lambda e, kl: e / kl):
    """Return exercise 3, or one of its typical mistakes."""
    return lambda eps, counts: form(eps, (counts.shape[-1] + a) * pairs(counts) / (two * n(counts)))


STRENGTH_MISTAKES = {
    "all pairs": (strength(pairs=lambda c: c.shape[0] * c.shape[1]), "only those that the demonstrations reached"),
    "entries": (strength(pairs=lambda c: (c > 0).sum()), "count the pairs (h, s)"),
    "no 2": (strength(two=1), "A factor 2 is missing"),
    "A for A - 1": (strength(a=0), "not A / (2 N_E)"),
    "all counts": (strength(n=lambda c: c.sum()), "is H times that"),
    "upside down": (strength(form=lambda eps, kl: kl / eps), "upside down"),
    "root": (strength(form=lambda eps, kl: eps / kl**0.5), "no root"),
    "KL only": (strength(form=lambda eps, kl: kl), "the KL that E3 foretells"),
    "constant": (lambda eps, counts: 0.1, "lambda: expected"),
}


# ---- the checks ----------------------------------------------------------------------------------------------


class TestExercises(ExerciseSuite):
    solutions = [
        (check_kl_backup, kl_backup),
        (check_kl_backup, backup()),
        (check_kl_traj, kl_traj),
        (check_kl_traj, wrong_kl()),
        (check_lambda_star, lambda_star),
        (check_lambda_star, lambda eps, counts: float(lambda_star(eps, counts))),
    ]
    mistakes = {check_kl_backup: BACKUP_MISTAKES, check_kl_traj: KL_MISTAKES, check_lambda_star: STRENGTH_MISTAKES}


def test_an_answer_that_breaks_in_a_random_world_is_wrong():
    calls = []

    def negative_later(eps, counts):  # right in the two cases
        calls.append(1)
        return lambda_star(eps, counts) * (1 if len(calls) <= 2 else -1)

    feedback = check_lambda_star(negative_later)
    assert feedback.state == "wrong" and "lam must be at least 0" in feedback.words


def test_the_praise_names_a_share_below_one():
    words = check_lambda_star(lambda_star).words
    share = float(words.split("at most ")[1].split()[0])
    assert 0 < share < 1 and not math.isnan(share)
