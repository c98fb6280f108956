"""The SCoRe exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import torch
from exercise_suite import ExerciseSuite

from polrl.language._score_exercises import (
    check_attempt_advantages,
    check_self_correction_report,
    check_stage_one_loss,
)

# ---- exercise 1 ----------------------------------------------------------------------------------------------


def others(r, K):
    rows = r.view(-1, K)
    return (rows - (rows.sum(1, keepdim=True) - rows) / (K - 1)).flatten()


def advantages(pay=None, pay_first=None, compare=others):
    """Return exercise 1 with another reward of Stage II's attempts, or of Stage I's, or another baseline."""

    def function(r1, r2, alpha, stage, K):
        second = (pay or (lambda r1, r2, a: (r1, r2 + a * (r2 - r1))))(r1, r2, alpha)
        first = (pay_first or (lambda r1, r2, a: (torch.zeros_like(r1), r2)))(r1, r2, alpha)
        return tuple(compare(r, K) for r in (first if stage == 1 else second))

    return function


def standardised(r, K):
    rows = r.view(-1, K)
    return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-6)).flatten()


def loop(r1, r2, alpha, stage, K):
    first, second = torch.zeros_like(r1), torch.zeros_like(r2)
    for b in range(len(r1)):
        mates = [j for j in range(b - b % K, b - b % K + K) if j != b]

        def earned(j):
            return (r1[j], r2[j] + alpha * (r2[j] - r1[j])) if stage == 2 else (0.0, r2[j])

        for i, target in enumerate((first, second)):
            target[b] = earned(b)[i] - sum(earned(j)[i] for j in mates) / (K - 1)
    return first, second


ADVANTAGE_MISTAKES = {
    "mean with itself": (advantages(compare=lambda r, K: (r.view(-1, K) - r.view(-1, K).mean(1, keepdim=True)).flatten()),
                         "OTHER K - 1"),
    "sum of the others": (advantages(compare=lambda r, K: 2 * r - r.view(-1, K).sum(1).repeat_interleave(K)), "not their sum"),
    "GRPO": (advantages(compare=standardised), "standard deviation"),
    "whole batch": (advantages(compare=lambda r, K: others(r, len(r))), "whole batch"),
    "groups across": (advantages(compare=lambda r, K: others(r.view(K, -1).T.flatten(), K).view(-1, K).T.flatten()),
                      "lie next to each other"),
    "no baseline": (advantages(compare=lambda r, K: r), "baseline is missing"),
    "sign of the bonus": (advantages(lambda r1, r2, a: (r1, r2 + a * (r1 - r2))), "wrong sign"),
    "bonus only": (advantages(lambda r1, r2, a: (r1, a * (r2 - r1))), "own reward is missing"),
    "bonus for both": (advantages(lambda r1, r2, a: (r1 + a * (r2 - r1), r2 + a * (r2 - r1))), "gets the bonus too"),
    "gamma 1": (advantages(lambda r1, r2, a: (r1 + r2 + a * (r2 - r1), r2 + a * (r2 - r1)),
                           lambda r1, r2, a: (r2, r2)), "credited with the second's reward"),
    "no bonus": (advantages(lambda r1, r2, a: (r1, r2)), "bonus is missing"),
    "stage I pays the first": (advantages(pay_first=lambda r1, r2, a: (r1, r2)), "In Stage I the first attempt earns nothing"),
    "stage I pays a bonus": (advantages(pay_first=lambda r1, r2, a: (0 * r1, r2 + a * (r2 - r1))), "without a bonus"),
    "always stage II": (advantages(pay_first=lambda r1, r2, a: (r1, r2 + a * (r2 - r1))), "whatever `stage` is"),
    "one value": (lambda *x: loop(*x)[1], "Return 2 values (A1, A2)"),
    "float32": (lambda r1, r2, *x: loop(r1.float(), r2.float(), *x), "float32"),
}  # fmt: skip


# ---- exercise 2 ----------------------------------------------------------------------------------------------


def report(y1, y2, truth):
    a, b = y1 == truth, y2 == truth
    shares = {"t1": a, "t2": b, "i_to_c": ~a & b, "c_to_i": a & ~b, "changed": y1 != y2}
    found = {name: share.float().mean() for name, share in shares.items()}
    return {**found, "delta": found["t2"] - found["t1"]}


def wrong_report(**changes):
    """Return exercise 2 with some figures replaced by functions of the right ones and of r1, r2."""

    def function(y1, y2, truth):
        found, a, b = report(y1, y2, truth), y1 == truth, y2 == truth
        return {**found, **{name: change(found, a, b) for name, change in changes.items()}}

    return function


REPORT_MISTAKES = {
    "attempts exchanged": (wrong_report(t1=lambda f, a, b: f["t2"]), "second attempt's accuracy"),
    "attempts exchanged, second": (wrong_report(t2=lambda f, a, b: f["t1"]), "first attempt's accuracy"),
    "sign of delta": (wrong_report(delta=lambda f, a, b: f["t1"] - f["t2"]), "t2 less t1"),
    "of the wrong ones": (wrong_report(i_to_c=lambda f, a, b: (~a & b).sum() / (~a).sum()), "divides by all problems"),
    "of the right ones": (wrong_report(c_to_i=lambda f, a, b: (a & ~b).sum() / a.sum()), "RIGHT first answers"),
    "exchanged": (
        wrong_report(i_to_c=lambda f, a, b: f["c_to_i"], c_to_i=lambda f, a, b: f["i_to_c"]),
        "are exchanged",
    ),
    "count": (wrong_report(i_to_c=lambda f, a, b: (~a & b).sum()), "This is a count"),
    "count of spoilt": (wrong_report(c_to_i=lambda f, a, b: (a & ~b).sum()), "This is a count"),
    "right or wrong changed": (
        wrong_report(changed=lambda f, a, b: (a != b).float().mean()),
        "between right and wrong",
    ),
    "same for changed": (wrong_report(changed=lambda f, a, b: 1 - f["changed"]), "stayed the same"),
    "a key is missing": (lambda *y: {k: v for k, v in report(*y).items() if k != "changed"}, "keys must be"),
    "a tuple": (lambda *y: tuple(report(*y).values()), "Return a dict"),
    "nan": (wrong_report(delta=lambda f, a, b: float("nan")), "delta: expected"),
}


# ---- exercise 3 ----------------------------------------------------------------------------------------------


def stage_one(
    credit=lambda m1, m2: m2, price=lambda b1, b2: (b1 + b2, b1), sign=-1, reduce=torch.mean, stop=True,
    advantage=others, reverse=False, per_token=False,
):  # fmt: skip
    """Return exercise 3, or one of its typical mistakes."""

    def function(logits, ref_logits, ids, m1, m2, r2, K, beta1, beta2):
        p = torch.softmax(logits, -1)
        q = torch.softmax(ref_logits.detach() if stop else ref_logits, -1)
        kl = (q * (q / p).log() if reverse else p * (p / q).log()).sum(-1)
        chosen = p.gather(-1, ids.unsqueeze(-1)).squeeze(-1).log()
        if per_token:
            m1, m2 = m1 / m1.sum(1, keepdim=True), m2 / m2.sum(1, keepdim=True)
        a = advantage(r2.detach() if stop else r2, K)
        c1, c2 = price(beta1, beta2)
        return reduce(sign * a * (credit(m1, m2) * chosen).sum(1) + (c1 * m1 * kl + c2 * m2 * kl).sum(1))

    return function


def undetached_reward(logits, ref_logits, ids, m1, m2, r2, K, beta1, beta2):
    return stage_one(stop=False)(logits, ref_logits.detach(), ids, m1, m2, r2, K, beta1, beta2)


def undetached_reference(logits, ref_logits, ids, m1, m2, r2, K, beta1, beta2):
    return stage_one(stop=False)(logits, ref_logits, ids, m1, m2, r2.detach(), K, beta1, beta2)


def undetached_reversed(logits, ref_logits, ids, m1, m2, r2, K, beta1, beta2):
    return stage_one(stop=False, reverse=True)(logits, ref_logits, ids, m1, m2, r2.detach(), K, beta1, beta2)


def mean_of_all(r, K):
    rows = r.view(-1, K)
    return (rows - rows.mean(1, keepdim=True)).flatten()


LOSS_MISTAKES = {
    "both attempts": (stage_one(lambda m1, m2: m1 + m2), "exactly 0"),
    "the first attempt": (stage_one(lambda m1, m2: m1), "in place of the second's"),
    "no mask": (stage_one(lambda m1, m2: torch.ones_like(m1)), "instruction included"),
    "sign": (stage_one(sign=1), "sign of the policy term"),
    "sum over rows": (stage_one(reduce=torch.sum), "sum over the rows"),
    "mean over tokens": (stage_one(per_token=True), "mean over each attempt's tokens"),
    "no baseline": (stage_one(advantage=lambda r, K: r), "baseline is missing"),
    "mean with itself": (stage_one(advantage=mean_of_all), "takes the rollout itself in"),
    "reward not detached": (undetached_reward, "through the reward"),
    "reference not detached": (undetached_reference, "through the base model's logits"),
    "reversed KL": (stage_one(reverse=True), "wrong direction"),
    "reversed KL, not detached": (undetached_reversed, "wrong direction, and"),
    "beta2 on both": (stage_one(price=lambda b1, b2: (b1 + b2, b1 + b2)), "pins the first alone"),
    "beta2 alone": (stage_one(price=lambda b1, b2: (b2, b1)), "missing on the first attempt"),
    "no beta1 on the second": (stage_one(price=lambda b1, b2: (b1 + b2, 0)), "missing on the second attempt"),
    "beta2 on the second": (stage_one(price=lambda b1, b2: (b1, b1 + b2)), "beta2 stands at the second"),
    "no KL": (stage_one(price=lambda b1, b2: (0, 0)), "KL is missing"),
    "minus the KL": (stage_one(price=lambda b1, b2: (-b1 - b2, -b1)), "KL is subtracted"),
    "rows": (stage_one(reduce=lambda rows: rows), "must have the shape []"),
    "no gradient": (lambda *x: stage_one()(*x).detach(), "gradient by logits"),
}


# ---- the checks ----------------------------------------------------------------------------------------------


class TestExercises(ExerciseSuite):
    solutions = [
        (check_attempt_advantages, advantages()),
        (check_attempt_advantages, loop),
        (check_self_correction_report, report),
        (check_self_correction_report, lambda *y: {k: float(v) for k, v in report(*y).items()}),
        (check_stage_one_loss, stage_one()),
    ]
    mistakes = {
        check_attempt_advantages: ADVANTAGE_MISTAKES,
        check_self_correction_report: REPORT_MISTAKES,
        check_stage_one_loss: LOSS_MISTAKES,
    }
