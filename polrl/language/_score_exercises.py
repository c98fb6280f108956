"""The checks of the SCoRe notebook's three exercises."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from polrl.core.exercise import Case, Feedback, call, check, checker, require
from polrl.language.score import (
    attempt_returns,
    kl_weights,
    leave_one_out,
    self_correction_metrics,
    shaped_rewards,
    surrogate_loss,
    token_kl,
)

Tensor = torch.Tensor


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- exercise 1: advantages of both attempts -------------------------------------------------------------------

Advantages = Callable[[Tensor, Tensor, float, int, int], tuple[Tensor, Tensor]]


def _advantages(
    shape: Callable[..., tuple[Tensor, Tensor]] = shaped_rewards,
    compare: Callable[[Tensor, int], Tensor] = leave_one_out,
) -> Advantages:
    """Return an answer to exercise 1 with other rewards, or another baseline."""

    def answer(r1: Tensor, r2: Tensor, alpha: float, stage: int, K: int) -> tuple[Tensor, Tensor]:
        first, second = shape(r1, r2, alpha, stage)
        return compare(first, K), compare(second, K)

    return answer


def _both_get_the_bonus(r1: Tensor, r2: Tensor, alpha: float, stage: int) -> tuple[Tensor, Tensor]:
    first, second = shaped_rewards(r1, r2, alpha, stage)
    return (first + alpha * (r2 - r1), second) if stage == 2 else (first, second)


def _credit_for_both(r1: Tensor, r2: Tensor, alpha: float, stage: int) -> tuple[Tensor, Tensor]:
    return attempt_returns(*shaped_rewards(r1, r2, alpha, stage), gamma=1.0)


def _from_the_mean(returns: Tensor, K: int) -> Tensor:
    rows = returns.reshape(-1, K)
    return (rows - rows.mean(dim=1, keepdim=True)).reshape(-1)


def _from_the_sum(returns: Tensor, K: int) -> Tensor:
    rows = returns.reshape(-1, K)
    return (2 * rows - rows.sum(dim=1, keepdim=True)).reshape(-1)


def _standardised(returns: Tensor, K: int) -> Tensor:
    rows = returns.reshape(-1, K)
    return ((rows - rows.mean(dim=1, keepdim=True)) / (rows.std(dim=1, keepdim=True) + 1e-6)).reshape(-1)


def _groups_across(returns: Tensor, K: int) -> Tensor:
    rows = leave_one_out(returns.reshape(K, -1).T.reshape(-1), K)
    return rows.reshape(-1, K).T.reshape(-1)


_ADVANTAGE_MISTAKES: dict[str, Advantages] = {
    "The baseline is the mean of the OTHER K - 1 rollouts of the prompt; this one takes the rollout itself in, and "
    "every advantage shrinks by (K - 1) / K.": _advantages(compare=_from_the_mean),
    "The baseline is the mean of the others, not their sum: divide by K - 1.": _advantages(compare=_from_the_sum),
    "This divides by the standard deviation, as GRPO does; leave-one-out only subtracts.": _advantages(
        compare=_standardised
    ),
    "This compares with the whole batch; a rollout is compared with those of its own prompt, K by K.": _advantages(
        compare=lambda returns, K: leave_one_out(returns, len(returns))
    ),
    "The rows of one prompt lie next to each other: reshape to [-1, K], not to [K, -1].": _advantages(
        compare=_groups_across
    ),
    "These are the rewards themselves: the baseline is missing.": _advantages(compare=lambda returns, K: returns),
    "The bonus has the wrong sign: it pays for r2 - r1, progress from the first attempt to the second.": _advantages(
        lambda r1, r2, alpha, stage: shaped_rewards(r1, r2, -alpha, stage)
    ),
    "The bonus is there, but the second attempt's own reward is missing: r2 + alpha (r2 - r1).": _advantages(
        lambda r1, r2, alpha, stage: (r1, alpha * (r2 - r1)) if stage == 2 else shaped_rewards(r1, r2, alpha, 1)
    ),
    "The first attempt gets the bonus too; it belongs to the second alone, or being wrong first would pay.": (
        _advantages(_both_get_the_bonus)
    ),
    "The first attempt is credited with the second's reward; with gamma = 0 each attempt has its own.": _advantages(
        _credit_for_both
    ),
    "The bonus is missing in Stage II.": _advantages(lambda r1, r2, alpha, stage: shaped_rewards(r1, r2, 0.0, stage)),
    "In Stage I the first attempt earns nothing: its advantages are 0.": _advantages(
        lambda r1, r2, alpha, stage: shaped_rewards(r1, r2, alpha, 2) if stage == 2 else (r1, r2)
    ),
    "In Stage I the second attempt earns its plain reward, without a bonus.": _advantages(
        lambda r1, r2, alpha, stage: (r1 * (stage == 2), shaped_rewards(r1, r2, alpha, 2)[1])
    ),
    "This pays as in Stage II, whatever `stage` is; in Stage I it is 0 for the first attempt and r2 for the second.": (
        _advantages(lambda r1, r2, alpha, stage: shaped_rewards(r1, r2, alpha, 2))
    ),
}


def check_attempt_advantages(function: Any) -> Feedback:
    """Judge exercise 1, `attempt_advantages(r1, r2, alpha, stage, K) -> (A1, A2)`: E5 and E7a.

    Parameters
    ----------
    function : callable
        Of both attempts' rewards [B], 0 or 1, the bonus, the stage (1 or 2) and the rollouts a prompt, which lie next
        to each other; returns the advantages of both attempts, [B] each.
    """
    table = _numbers(0, 1, 1, 0), _numbers(1, 0, 1, 0)  # mended, spoilt, right twice, wrong twice
    two_prompts = _numbers(0, 1, 1, 0, 1, 1), _numbers(1, 1, 0, 0, 1, 0)
    right = _advantages()
    cases = []
    for (r1, r2), alpha, stage, K in (
        (table, 2.0, 2, 4), (two_prompts, 10.0, 2, 3), (two_prompts, 10.0, 1, 3), (two_prompts, 0.0, 2, 2),
    ):  # fmt: skip
        arguments = {"r1": r1, "r2": r2, "alpha": alpha, "stage": stage, "K": K}
        expected = dict(zip(("A1", "A2"), right(r1, r2, alpha, stage, K), strict=True))
        cases.append(Case(arguments, expected, _ADVANTAGE_MISTAKES, tolerance=1e-8))
    return check(
        function,
        cases,
        hint="First what each attempt earns in this stage, then each rollout less the mean of its prompt's others.",
        praise="The advantages of a prompt sum to 0. In Stage I the first attempt has none: only the KL holds it.",
    )


# ---- exercise 2: the figures that a claim of self-correction rests on ------------------------------------------

Report = Callable[[Tensor, Tensor, Tensor], Mapping[str, float]]


def _report(y1: Tensor, y2: Tensor, truth: Tensor) -> dict[str, float]:
    figures = self_correction_metrics((y1 == truth).double(), (y2 == truth).double())
    short = {"accuracy_t1": "t1", "accuracy_t2": "t2"}
    named = {short.get(name, name): float(value) for name, value in figures.items()}
    return {**named, "changed": float((y1 != y2).double().mean())}


def _of_the_wrong(y1: Tensor, y2: Tensor, truth: Tensor) -> float:
    return float((y2 == truth)[y1 != truth].double().mean())


def _of_the_right(y1: Tensor, y2: Tensor, truth: Tensor) -> float:
    return float((y2 != truth)[y1 == truth].double().mean())


#: Under the figure that is wrong: a sentence, and what the mistake makes of the figure.
_REPORT_MISTAKES: dict[str, dict[str, Callable[[Tensor, Tensor, Tensor], float]]] = {
    "t1": {"This is the second attempt's accuracy.": lambda *y: _report(*y)["t2"]},
    "t2": {"This is the first attempt's accuracy.": lambda *y: _report(*y)["t1"]},
    "delta": {"The sign is wrong: delta is t2 less t1.": lambda *y: -_report(*y)["delta"]},
    "i_to_c": {
        "This is the share of the WRONG first answers that were mended; the paper divides by all problems.": (
            _of_the_wrong
        ),
        "i_to_c and c_to_i are exchanged.": lambda *y: _report(*y)["c_to_i"],
        "This is a count; divide by the number of problems.": lambda *y: _report(*y)["i_to_c"] * len(y[0]),
    },
    "c_to_i": {
        "This is the share of the RIGHT first answers that were spoilt; the paper divides by all problems.": (
            _of_the_right
        ),
        "This is a count; divide by the number of problems.": lambda *y: _report(*y)["c_to_i"] * len(y[0]),
    },
    "changed": {
        "This counts changes between right and wrong; a wrong answer that becomes another wrong one changed too.": (
            lambda *y: _report(*y)["i_to_c"] + _report(*y)["c_to_i"]
        ),
        "This is the share of answers that stayed the same; changed is 1 less that.": (
            lambda *y: 1 - _report(*y)["changed"]
        ),
    },
}


@checker
def check_self_correction_report(function: Any) -> Feedback:
    """Judge exercise 2, `self_correction_report(y1, y2, truth) -> dict`: E8, from the answers themselves.

    Parameters
    ----------
    function : callable
        Of both answers and the right one, int64 [N] each; returns a dict of the shares t1, t2, delta, i_to_c, c_to_i
        and changed, each of all N problems.
    """
    generator = torch.Generator().manual_seed(0)
    # Right twice three times, mended twice, spoilt once, wrong in another way once, wrong twice two times.
    few = (
        torch.tensor([42, 51, 60, 17, 38, 42, 30, 17, 25]),
        torch.tensor([42, 51, 60, 71, 83, 40, 33, 17, 25]),
        torch.tensor([42, 51, 60, 71, 83, 42, 35, 71, 52]),
    )
    many = tuple(torch.randint(4, (200,), generator=generator) for _ in range(3))
    for y in (few, many):
        _judge_report(function, y)
    return Feedback(
        "right",
        "delta = i_to_c - c_to_i, always: the same delta can hide much mending and much spoiling, or none of both.",
    )


def _judge_report(function: Any, y: tuple[Tensor, ...]) -> None:
    hint = 'Compare y1 and y2 with truth, then take means; return {"t1": ..., "t2": ..., "delta": ..., ...}.'
    found, expected = call(function, *(part.clone() for part in y), hint=hint), _report(*y)
    require(isinstance(found, Mapping), f"Return a dict with {', '.join(expected)}; found {type(found).__name__}.")
    require(set(found) == set(expected), f"The dict's keys must be {', '.join(expected)}; found {', '.join(found)}.")
    for name, value in expected.items():
        figure = float(found[name])
        if math.isclose(figure, value, abs_tol=1e-5):
            continue
        words = [s for s, make in _REPORT_MISTAKES[name].items() if math.isclose(figure, make(*y), abs_tol=1e-5)]
        tried = f"(Tried with y1={y[0].tolist()}, y2={y[1].tolist()}, truth={y[2].tolist()}.)" if len(y[0]) < 10 else ""
        require(False, " ".join(filter(None, [*words[:1], f"{name}: expected {value:g}, found {figure:g}.", tried])))


# ---- exercise 3: Stage I's loss --------------------------------------------------------------------------------

Loss = Callable[..., Tensor]


def _stage_one(
    logits: Tensor, ref_logits: Tensor, ids: Tensor, m1: Tensor, m2: Tensor, r2: Tensor, K: int,
    beta1: float, beta2: float,
) -> Tensor:  # fmt: skip
    c1, c2 = kl_weights(beta1, beta2, 1)
    return surrogate_loss(logits, ref_logits, ids, m1, m2, torch.zeros_like(r2), r2, K, c1, c2).loss


def _loss(
    credited: Callable[[Tensor, Tensor], Tensor] = lambda m1, m2: m2,
    weights: Callable[[float, float], tuple[float, float]] = lambda b1, b2: (b1 + b2, b1),
    divergence: Callable[[Tensor, Tensor], Tensor] = token_kl,
    compare: Callable[[Tensor, int], Tensor] = lambda r, K: leave_one_out(r.detach(), K),
    sign: float = -1.0,
    rows: Callable[[Tensor], Tensor] = torch.mean,
) -> Loss:
    """Return an answer to exercise 3 with another mask, price, divergence, baseline, sign or mean over rows."""

    def answer(
        logits: Tensor, ref_logits: Tensor, ids: Tensor, m1: Tensor, m2: Tensor, r2: Tensor, K: int,
        beta1: float, beta2: float,
    ) -> Tensor:  # fmt: skip
        log_probs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        c1, c2 = weights(beta1, beta2)
        by_token = divergence(logits, ref_logits)
        row = sign * compare(r2, K) * (credited(m1, m2) * log_probs).sum(1)
        return rows(row + ((c1 * m1 + c2 * m2) * by_token).sum(1))

    return answer


def _reversed_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_pi, log_ref = logits.log_softmax(-1), ref_logits.detach().log_softmax(-1)
    return (log_ref.exp() * (log_ref - log_pi)).sum(-1)


def _no_stop_at_reference(logits: Tensor, ref_logits: Tensor) -> Tensor:
    log_pi, log_ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (log_pi.exp() * (log_pi - log_ref)).sum(-1)


def _token_means(*arguments: Any) -> Tensor:
    logits, ref_logits, ids, m1, m2, *rest = arguments
    return _stage_one(logits, ref_logits, ids, m1 / m1.sum(1, keepdim=True), m2 / m2.sum(1, keepdim=True), *rest)


_LOSS_MISTAKES: dict[str, Loss] = {
    "The first attempt's tokens are reinforced too: in Stage I only those of m2 are credited, and without KL the "
    "gradient at the first attempt is exactly 0.": _loss(lambda m1, m2: m1 + m2),
    "The first attempt's tokens are credited in place of the second's.": _loss(lambda m1, m2: m1),
    "Every position is reinforced, prompt and instruction included: multiply by m2.": _loss(
        lambda m1, m2: torch.ones_like(m1)
    ),
    "The sign of the policy term is wrong: the loss is minimised, so it is minus the advantage times log pi.": _loss(
        sign=1.0
    ),
    "There is a sum over the rows; E7 takes their mean.": _loss(rows=torch.sum),
    "This is a mean over each attempt's tokens; E7 sums over them.": _token_means,
    "The baseline is missing: subtract the mean of the other rollouts of the prompt.": _loss(
        compare=lambda r, K: r.detach()
    ),
    "The baseline takes the rollout itself in: the mean of the OTHER K - 1 is asked for.": _loss(
        compare=lambda r, K: _from_the_mean(r.detach(), K)
    ),
    "A gradient passes through the reward: an advantage is a constant, use .detach().": _loss(compare=leave_one_out),
    "A gradient passes through the base model's logits: the reference is a constant, use .detach().": _loss(
        divergence=_no_stop_at_reference
    ),
    "The KL has the wrong direction: it is taken from the policy, sum pi log(pi / pi_ref).": _loss(
        divergence=_reversed_kl
    ),
    "The KL has the wrong direction, and lets a gradient pass through the base model's logits.": _loss(
        divergence=lambda logits, ref: _no_stop_at_reference(ref, logits)
    ),
    "beta2 prices the second attempt as well; it pins the first alone.": _loss(
        weights=lambda b1, b2: (b1 + b2, b1 + b2)
    ),
    "The ordinary penalty beta1 is missing on the first attempt, whose price is beta1 + beta2.": _loss(
        weights=lambda b1, b2: (b2, b1)
    ),
    "The ordinary penalty beta1 is missing on the second attempt.": _loss(weights=lambda b1, b2: (b1 + b2, 0.0)),
    "beta2 stands at the second attempt; it pins the first.": _loss(weights=lambda b1, b2: (b1, b1 + b2)),
    "The KL is missing.": _loss(weights=lambda b1, b2: (0.0, 0.0)),
    "The KL is subtracted; it is a cost, so the loss adds it.": _loss(weights=lambda b1, b2: (-b1 - b2, -b1)),
}


def check_stage_one_loss(function: Any) -> Feedback:
    """Judge exercise 3, `stage_one_loss(logits, ref_logits, ids, m1, m2, r2, K, beta1, beta2)`: E7 in Stage I.

    Parameters
    ----------
    function : callable
        Of logits [B, T, V] of policy and base model that predict the tokens ids [B, T], masks of both attempts
        [B, T], the second attempt's rewards [B], the rollouts a prompt and both prices; returns the scalar loss.
    """
    cases = [_loss_case(4, 2, beta1=0.0, beta2=0.0), _loss_case(6, 3, beta1=0.1, beta2=1.0)]
    return check(
        function,
        cases,
        hint="Policy term: advantage times the log-probabilities under m2. KL: beta1 + beta2 under m1, beta1 under m2.",
        praise="Without KL the first attempt gets no gradient at all; with it, only a pull back to the base model.",
    )


def _loss_case(rows: int, K: int, beta1: float, beta2: float) -> Case:
    generator = torch.Generator().manual_seed(rows)
    logits, ref_logits = (torch.randn(rows, 5, 4, generator=generator, dtype=torch.float64) for _ in "pr")
    m1, m2 = torch.zeros(2, rows, 5, dtype=torch.float64)
    m1[:, 0], m1[1:, 1], m2[:, 3], m2[:-1, 4] = 1, 1, 1, 1  # attempts of unequal lengths; place 2 is the instruction
    r2 = (torch.arange(rows) % 2).double()
    arguments = {
        "logits": logits, "ref_logits": ref_logits, "ids": torch.randint(4, (rows, 5), generator=generator),
        "m1": m1, "m2": m2, "r2": r2, "K": K, "beta1": beta1, "beta2": beta2,
    }  # fmt: skip
    leaf = logits.clone().requires_grad_()
    loss = _stage_one(leaf, *list(arguments.values())[1:])
    (by_logits,) = torch.autograd.grad(loss, leaf)
    expected = {
        "loss": loss.detach(),
        "gradient by logits": by_logits,
        "gradient by ref_logits": torch.zeros_like(logits),
        "gradient by r2": torch.zeros_like(r2),
    }
    return Case(arguments, expected, _LOSS_MISTAKES, tolerance=1e-8)
