"""The checks of the three exercises in the GRPO notebook."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from polrl.core.exercise import Case, Feedback, call, check, checker, require
from polrl.language._group_policy import k1, k2, k3, on_tokens

Tensor = torch.Tensor


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _mask(lengths: tuple[int, ...], width: int) -> Tensor:
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).double()


# ---- exercise 1 ----------------------------------------------------------------------------------------------


def _others(values: Tensor) -> Tensor:
    """Return the mean of the other entries of each row [B, G]."""
    return (values.sum(dim=1, keepdim=True) - values) / (values.shape[1] - 1)


def _judged_by_others(
    center: Callable[[Tensor], Tensor] = _others,
    spread: Callable[[Tensor], Tensor] | None = None,
    divide: Callable[[Tensor, float], Tensor] = lambda spread, eps: spread + eps,
    sign: float = 1.0,
) -> Callable[[Tensor, float], Tensor]:
    """Return an answer to exercise 1 with one of its parts replaced."""

    def others_spread(rewards: Tensor) -> Tensor:
        # One row and column a reward, so that no difference of large squares loses digits.
        deviations = (rewards.unsqueeze(1) - _others(rewards).unsqueeze(2)).square()
        own = torch.eye(rewards.shape[1], dtype=torch.bool)
        return (deviations.masked_fill(own, 0.0).sum(dim=2) / (rewards.shape[1] - 1)).sqrt()

    def answer(rewards: Tensor, eps: float) -> Tensor:
        measure = spread or others_spread
        return sign * (rewards - center(rewards)) / divide(measure(rewards), eps)

    return answer


def _unbiased_others(rewards: Tensor) -> Tensor:
    members = rewards.shape[1]
    deviations = (rewards.unsqueeze(1) - _others(rewards).unsqueeze(2)).square()
    kept = deviations.masked_fill(torch.eye(members, dtype=torch.bool), 0.0)
    return (kept.sum(dim=2) / (members - 2)).sqrt()


def _own_deviation(rewards: Tensor) -> Tensor:
    return (rewards.unsqueeze(1) - _others(rewards).unsqueeze(2)).square().mean(dim=2).sqrt()


_ADVANTAGE_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "This is B4: the own reward is part of its group's mean and spread, so an outlier hides behind itself. Leave it "
    "out of both.": _judged_by_others(
        lambda r: r.mean(dim=1, keepdim=True), lambda r: r.std(dim=1, correction=0, keepdim=True)
    ),
    "The spread still holds the own reward; take the other G - 1 rewards only, around their own mean.": (
        _judged_by_others(spread=lambda r: r.std(dim=1, correction=0, keepdim=True))
    ),
    "The own reward's distance from the others' mean is counted in the spread; leave it out.": (
        _judged_by_others(spread=_own_deviation)
    ),
    "The mean still holds the own reward; the others' sum divided by G - 1 leaves it out.": (
        _judged_by_others(center=lambda r: r.mean(dim=1, keepdim=True))
    ),
    "The spread divides by G - 2, the unbiased form; B4's default is the population's: divide by the number of others, "
    "G - 1.": _judged_by_others(spread=_unbiased_others),
    "eps stands outside the root and is added to the spread, not to the variance.": _judged_by_others(
        divide=lambda spread, eps: (spread.square() + eps).sqrt()
    ),
    "eps is missing: others that agree have no spread, and dividing by 0 gives inf or NaN.": _judged_by_others(
        divide=lambda spread, eps: spread
    ),
    "This is the variance; divide by its root, or rewards in other units would learn at another pace.": (
        _judged_by_others(divide=lambda spread, eps: spread.square() + eps)
    ),
    "The spread is missing: divide by it, plus eps.": _judged_by_others(divide=lambda spread, eps: torch.ones(())),
    "The sign is wrong: what earned more than the others is to be made likelier.": _judged_by_others(sign=-1.0),
    "Mean and spread run over the whole batch; each row is a group of its own.": lambda rewards, eps: (
        _judged_by_others()(rewards.reshape(1, -1), eps).reshape(rewards.shape)
    ),
}


def check_judged_by_others(function: Any) -> Feedback:
    """Judge exercise 1, `judged_by_others(rewards, eps)`: B4 whose mean and spread leave the own reward out.

    Parameters
    ----------
    function : callable
        Of rewards, float64 [B, G], a group a row, G >= 3, and eps > 0; returns the advantages [B, G].
    """
    cases = [
        Case({"rewards": rewards, "eps": eps}, {"advantages": _judged_by_others()(rewards, eps)}, _ADVANTAGE_MISTAKES)
        for rewards, eps in (
            (torch.tensor([[1.0, 0.0, 3.0]], dtype=torch.float64), 1e-6),
            (_normal(2, 5, seed=1), 0.1),
            (torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]], dtype=torch.float64), 0.5),
        )
    ]
    return check(
        function,
        cases,
        hint="For each reward, mean and population standard deviation of the other G - 1 rewards of its row.",
        praise="A single right answer among equals now stands out by 1 / eps: leaving oneself out needs a larger eps "
        "than B4, whose advantages can't exceed the root of G - 1.",
    )


# ---- exercise 2 ----------------------------------------------------------------------------------------------


def _gradient(
    stopped: Callable[[Tensor, Tensor, float, float], Tensor] = lambda r, a, low, high: (
        ((a > 0) & (r > 1 + high)) | ((a < 0) & (r < 1 - low))
    ),
    weight: Callable[[Tensor, float, float], Tensor] = lambda ratio, low, high: ratio,
    share: Callable[[Tensor], Tensor] = lambda mask: mask / mask.sum(),
    sign: float = -1.0,
) -> Callable[..., Tensor]:
    """Return an answer to exercise 2 with one of its parts replaced."""

    def answer(logp: Tensor, old_logp: Tensor, adv: Tensor, mask: Tensor, eps_low: float, eps_high: float) -> Tensor:
        ratio = on_tokens(logp - old_logp, mask).exp()
        each = adv.unsqueeze(1).expand_as(ratio)
        kept = (~stopped(ratio, each, eps_low, eps_high)).to(ratio.dtype)
        return sign * share(mask) * kept * each * weight(ratio, eps_low, eps_high)

    return answer


_GRADIENT_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The clip works on both sides here. It is one-sided: a good token (A > 0) is stopped only above 1 + eps_high, a "
    "bad one only below 1 - eps_low; what has moved the wrong way may always come back.": _gradient(
        lambda r, a, low, high: (r > 1 + high) | (r < 1 - low)
    ),
    "The sides are exchanged: a good token is stopped above, a bad one below.": _gradient(
        lambda r, a, low, high: ((a < 0) & (r > 1 + high)) | ((a > 0) & (r < 1 - low))
    ),
    "eps_low and eps_high are exchanged.": _gradient(
        lambda r, a, low, high: ((a > 0) & (r > 1 + low)) | ((a < 0) & (r < 1 - high))
    ),
    "Nothing is stopped: where the clipped term is the smaller one, it is a constant, and the gradient 0.": _gradient(
        lambda r, a, low, high: torch.zeros_like(r, dtype=torch.bool)
    ),
    "The ratio is missing: its derivative by logp is the ratio itself.": _gradient(
        weight=lambda ratio, low, high: torch.ones_like(ratio)
    ),
    "Where the clip has stopped a token the gradient is 0, not that of the clipped ratio.": _gradient(
        lambda r, a, low, high: torch.zeros_like(r, dtype=torch.bool),
        lambda ratio, low, high: ratio.clamp(1 - low, 1 + high),
    ),
    "The sign is wrong: this is the gradient of the loss, which goes down where the advantage is positive.": _gradient(
        sign=1.0
    ),
    "This is seq_mean (B13): divide by the number of all real tokens, not by each row's.": _gradient(
        share=lambda mask: mask / mask.sum(dim=1, keepdim=True) / len(mask)
    ),
    "This is a mean over all places, padding included: divide by the number of real tokens.": _gradient(
        share=lambda mask: mask / mask.numel()
    ),
    "This is a sum over the tokens: divide by their number.": _gradient(share=lambda mask: mask),
    "Padding has a gradient here: multiply by the mask.": _gradient(
        share=lambda mask: torch.ones_like(mask) / mask.sum()
    ),
}


def check_clip_gradient(function: Any) -> Feedback:
    """Judge exercise 2, `clip_gradient(logp, old_logp, adv, mask, eps_low, eps_high)`: B7 and B14, by hand.

    Parameters
    ----------
    function : callable
        Of log-probabilities, older ones and the mask, float64 [N, T], advantages [N] and both sides of the clip;
        returns the gradient of the loss by `logp` [N, T], computed without autograd.
    """
    cases = []
    for lengths, low, high, scale in (((1,), 0.2, 0.2, 0.0), ((2, 3), 0.2, 0.2, 0.1), ((4, 1, 3, 2, 4), 0.2, 0.4, 0.6)):
        shape = (len(lengths), max(lengths))
        old = -_normal(*shape, seed=1).abs()
        logp = old + scale * _normal(*shape, seed=2)
        if len(lengths) > 2:  # every corner: good and bad tokens, far up and far down, between the two sides as well
            logp[0] = old[0] + torch.tensor([math.log(x) for x in (0.5, 0.9, 1.3, 2.0)])
            logp[4] = old[4] + torch.tensor([math.log(x) for x in (0.5, 0.7, 1.3, 2.0)])
        adv = torch.tensor([1.0, -0.5, 2.0, -1.0, -1.5], dtype=torch.float64)[: len(lengths)]
        arguments: dict[str, Any] = {"logp": logp, "old_logp": old, "adv": adv, "mask": _mask(lengths, max(lengths))}
        arguments |= {"eps_low": low, "eps_high": high}
        cases.append(Case(arguments, {"gradient": _gradient()(*arguments.values())}, _GRADIENT_MISTAKES))
    return check(
        function,
        cases,
        hint="B7's gradient is -A rho, or 0 where the clip has stopped the token; B14 divides by the number of tokens.",
        praise="A clipped token does not push back: it only stops pushing. What brings it back is the next batch.",
    )


# ---- exercise 3 ----------------------------------------------------------------------------------------------


def _penalised(
    price: Callable[[Tensor, Tensor, Tensor], Tensor] = k1,
    combine: Callable[[Tensor, Tensor], Tensor] = lambda price, mask: price.sum(dim=1),
    sign: float = -1.0,
    keep: bool = False,
) -> Callable[..., Tensor]:
    """Return an answer to exercise 3 with one of its parts replaced."""

    def answer(rewards: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: float) -> Tensor:
        found = rewards + sign * beta * combine(on_tokens(price(logp, ref_logp, mask), mask), mask)
        return found if keep else found.detach()

    return answer


_PENALTY_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The sign is wrong, or the log-ratio is upside down: what the policy does more often than the reference costs beta "
    "times log pi - log ref, token by token.": _penalised(sign=1.0),
    "The mean over tokens is subtracted; a completion's log-ratio is the sum over its tokens.": _penalised(
        combine=lambda price, mask: price.sum(dim=1) / mask.sum(dim=1)
    ),
    "One mean for all completions is subtracted, which changes no advantage: each pays for its own tokens.": _penalised(
        combine=lambda price, mask: price.sum(dim=1).mean().expand(len(price))
    ),
    "This is k3; its mean is the same, but the exercise asks for k1, the plain log-ratio.": _penalised(k3),
    "This is k2, which is biased: take the plain log-ratio.": _penalised(k2),
    "A gradient passes through the price. A reward is a constant; differentiating k1 would only add noise, its mean "
    "gradient is 0.": _penalised(keep=True),
    "The probabilities are subtracted from one another; take their logarithms' difference.": _penalised(
        lambda p, r, m: p.exp() - r.exp()
    ),
    "beta is missing.": lambda rewards, logp, ref_logp, mask, beta: _penalised()(rewards, logp, ref_logp, mask, 1.0),
}


@checker
def check_penalised_rewards(function: Any) -> Feedback:
    """Judge exercise 3, `penalised_rewards(rewards, logp, ref_logp, mask, beta)`: the KL as a price on the reward.

    Parameters
    ----------
    function : callable
        Of rewards [N], log-probabilities under policy and reference and the mask [N, T], all float64, and beta;
        returns the rewards less beta times each completion's k1, [N], a constant for autograd.
    """
    cases = []
    for lengths, beta in (((1, 1), 0.0), ((2, 1), 0.5), ((3, 1, 2, 4), 0.3)):
        shape = (len(lengths), max(lengths))
        logp, ref = -_normal(*shape, seed=1).abs(), -_normal(*shape, seed=2).abs()
        rewards, mask = (_normal(len(lengths), seed=3) > 0).double(), _mask(lengths, max(lengths))
        cases.append(
            Case(
                {"rewards": rewards, "logp": logp, "ref_logp": ref, "mask": mask, "beta": beta},
                {
                    "rewards": _penalised()(rewards, logp, ref, mask, beta),
                    "gradient by logp": torch.zeros_like(logp),
                },
                _PENALTY_MISTAKES,
            )
        )
    feedback = check(
        function,
        cases,
        hint="Sum log pi - log ref over each completion's real tokens, detach, subtract beta times it.",
        praise="Now the group's mean and spread see the price, too. In the loss, k1 would do nothing at all.",
    )
    if feedback:
        dirty = torch.full((2, 3), math.nan, dtype=torch.float64)
        mask = _mask((1, 2), 3)
        clean = torch.where(mask > 0, -torch.ones_like(dirty), dirty)
        found = torch.as_tensor(call(function, torch.ones(2, dtype=torch.float64), clean, clean, mask, 0.1))
        require(
            bool((found == 1).all()),
            "Padding may hold NaN, and NaN times 0 is NaN: use torch.where with the mask instead of a product.",
        )
    return feedback
