"""The checks of the three exercises in the notebook on B²-DiffuRL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from polrl.core.exercise import Case, Feedback, check
from polrl.diffusion.b2_diffurl import best_and_worst, group_advantages, prompt_scores
from polrl.models.diffusion import step_std

Tensor = torch.Tensor


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- exercise 1: the log-probability of a step, from the predicted noise -----------------------------------------


def _logprob(
    std: Callable[[Tensor, Tensor, float], Tensor] = step_std,
    direction: Callable[[Tensor, Tensor], Tensor] = lambda after, sigma: (1 - after - sigma**2).sqrt(),
    taken: Callable[[Tensor], Tensor] = Tensor.detach,
    quadratic: float = 0.5,
    sign: float = 1.0,
    normaliser: Callable[[Tensor], Tensor] = lambda sigma: sigma.log() + 0.5 * math.log(2 * math.pi),
    reduce: Callable[[Tensor], Tensor] = lambda terms: terms.mean(dim=1),
    swapped: bool = False,
) -> Callable[..., Tensor]:
    """Return an answer to exercise 1 with one of its parts replaced."""

    def answer(x: Tensor, x_next: Tensor, eps: Tensor, abar: float, abar_next: float, eta: float) -> Tensor:
        a, after = (torch.tensor(v, dtype=x.dtype) for v in (abar, abar_next))
        if swapped:
            a, after = after, a
        sigma = std(a, after, eta)
        mean = after.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + direction(after, sigma) * eps
        terms = -quadratic * ((taken(x_next) - mean) / sigma) ** 2 - normaliser(sigma)
        return sign * reduce(terms)

    return answer


_LOGPROB_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "This sums over the dimensions; E4 takes their mean, which is why DDPO's clip range is so small.": _logprob(
        reduce=lambda terms: terms.sum(dim=1)
    ),
    "This is one number for the whole batch; keep one for each sample.": _logprob(reduce=Tensor.mean),
    "A gradient passes through the action: the sample was drawn, it is a constant, so detach it.": _logprob(
        taken=lambda x: x
    ),
    "sigma^2 is missing under the root: part of the noise is drawn anew, so 1 - abar' - sigma^2 is left for the "
    "predicted one.": _logprob(direction=lambda after, sigma: (1 - after).sqrt()),
    "sigma must be linear in eta; here its square is.": _logprob(std=lambda a, b, eta: step_std(a, b, 1.0) * eta**0.5),
    "eta is not used: sigma is eta times DDPM's standard deviation.": _logprob(
        std=lambda a, b, eta: step_std(a, b, 1.0)
    ),
    "sigma is squared where the standard deviation belongs.": _logprob(std=lambda a, b, eta: step_std(a, b, eta) ** 2),
    "Both signal levels are swapped: a step goes from abar, the noisier, to abar_next.": _logprob(swapped=True),
    "The half is missing in the exponent.": _logprob(quadratic=1.0),
    "The normalising constant is missing: - log sigma - log(2 pi) / 2.": _logprob(normaliser=torch.zeros_like),
    "- log(2 pi) / 2 is missing; it cancels in a ratio, yet the density needs it.": _logprob(normaliser=torch.log),
    "- log sigma is missing: a wide Gaussian is low everywhere.": _logprob(
        normaliser=lambda sigma: torch.full_like(sigma, 0.5 * math.log(2 * math.pi))
    ),
    "The sign is wrong: a log-probability is highest at the mean.": _logprob(sign=-1.0),
}


def check_ddim_logprob(function: Any) -> Feedback:
    """Judge exercise 1, `ddim_logprob(x, x_next, eps, abar, abar_next, eta)`: E3 and E4 in one.

    Parameters
    ----------
    function : callable
        Of state, action and predicted noise, all [n, d], the signal levels before and after the step and eta, all
        numbers; returns log-probabilities [n]. No clipping, and no floor is needed: abar_next is below 1.
    """
    cases = []
    for count, size, abar, after, eta in ((1, 1, 0.25, 0.5, 1.0), (2, 3, 0.1, 0.3, 1.0), (3, 2, 0.6, 0.9, 0.4)):
        x, x_next, eps = (_normal(count, size, seed=seed) for seed in (1, 2, 3))
        leaves = {"x": x, "x_next": x_next, "eps": eps.requires_grad_()}
        value = _logprob()(*leaves.values(), abar, after, eta)
        (gradient,) = torch.autograd.grad(value.sum(), eps)
        cases.append(
            Case(
                {"x": x, "x_next": x_next, "eps": eps.detach(), "abar": abar, "abar_next": after, "eta": eta},
                {
                    "log-probability": value.detach(),
                    "gradient by eps": gradient,
                    "gradient by x_next": torch.zeros_like(x_next),
                },
                _LOGPROB_MISTAKES,
            )
        )
    return check(
        function,
        cases,
        hint="Predicted data, then sigma, then the mean; the mean over dimensions of the log-density of x_next.",
        praise="This is all that policy gradient needs to know of a diffusion model.",
    )


# ---- exercise 2: credit within branches --------------------------------------------------------------------------


def _scores(reward: Tensor) -> Tensor:
    one, none = torch.zeros(len(reward), dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    return prompt_scores(reward, one, reward[:0], none)


def _advantages(
    group: Callable[[Tensor], Tensor] = group_advantages,
    score: Callable[[Tensor], Tensor] = _scores,
    select: Callable[[Tensor], Tensor] = lambda z: best_and_worst(z, 0.5, -0.5),
) -> Callable[..., Tensor]:
    """Return an answer to exercise 2 with one of its parts replaced."""

    def answer(reward: Tensor, branches: int, mode: str) -> Tensor:
        if mode == "group":
            return group(reward.reshape(-1, branches)).flatten()
        z = score(reward)
        kept = select(z.reshape(-1, branches))
        return torch.zeros_like(z).index_copy(0, kept, z[kept])

    return answer


def _ends(z: Tensor, top: bool = True, bottom: bool = True) -> Tensor:
    """Select a branch's extremes without any threshold, or one of them with it."""
    if top and bottom:
        return best_and_worst(z, -math.inf, math.inf).unique()
    return best_and_worst(z, 0.5 if top else math.inf, -0.5 if bottom else -math.inf)


def _by_branch(reward: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    return (reward - mean) / (std + 1e-6)


_ADVANTAGE_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The mean is that of the whole batch: what the prefix decided is still inside. Subtract the branch's own.": (
        _advantages(group=lambda r: _by_branch(r, r.mean(), r.std(correction=0)))
    ),
    "The deviation is the branch's own, which blows up small differences; E10 divides by the batch's.": _advantages(
        group=lambda r: _by_branch(r, r.mean(1, keepdim=True), r.std(1, keepdim=True, correction=0))
    ),
    "The deviation is missing: divide by the batch's.": _advantages(group=lambda r: r - r.mean(1, keepdim=True)),
    "The mean runs over the branches and not inside them: members of a branch stand side by side.": _advantages(
        group=lambda r: _by_branch(r, r.mean(0, keepdim=True), r.std(correction=0))
    ),
    "The deviation divides by n - 1; E10 takes the population's.": _advantages(
        group=lambda r: _by_branch(r, r.mean(1, keepdim=True), r.std())
    ),
    "The deviation divides by n; E7 takes n - 1.": _advantages(
        score=lambda r: (r - r.mean()) / (r.std(correction=0) + 1e-8)
    ),
    "Rewards are compared with the thresholds; they hold for the scores, z.": _advantages(score=lambda r: r),
    "Everything beyond a threshold is kept; E8 keeps at most one winner and one loser of a branch.": _advantages(
        select=lambda z: torch.nonzero((z.flatten() >= 0.5) | (z.flatten() < -0.5))[:, 0]
    ),
    "No threshold is asked: a branch's best that is not better than others teaches nothing.": _advantages(select=_ends),
    "The losers are missing.": _advantages(select=lambda z: _ends(z, bottom=False)),
    "The winners are missing.": _advantages(select=lambda z: _ends(z, top=False)),
    "One winner and one loser of the whole batch are kept; E8 asks every branch.": _advantages(
        select=lambda z: best_and_worst(z.reshape(1, -1), 0.5, -0.5)
    ),
}


def check_branch_advantages(function: Any) -> Feedback:
    """Judge exercise 2, `branch_advantages(reward, branches, mode)`: E10, and E7 with E8.

    Parameters
    ----------
    function : callable
        Of rewards [n] for one prompt, members of a branch side by side, the members of a branch, and "group" or
        "best_worst"; returns advantages [n], 0 for what is dropped. Thresholds are 0.5 and -0.5, there are no
        earlier stages, and no ties.
    """
    table = torch.tensor([3.0, 1.0, 0.0, 0.9, 1.1, 0.2], dtype=torch.float64)
    cases = [
        Case(
            {"reward": reward, "branches": branches, "mode": mode},
            {"advantage": _advantages()(reward, branches, mode)},
            _ADVANTAGE_MISTAKES,
        )
        for mode in ("group", "best_worst")
        for reward, branches in ((table, 2), (2 + _normal(12, seed=1), 4), (3 * _normal(15, seed=2), 3))
    ]
    return check(
        function,
        cases,
        hint="reward.reshape(-1, branches) has a row a branch; for best_worst fill the kept scores into zeros.",
        praise="With one reward for a branch's fate, only differences inside the branch speak of the trained steps.",
    )


# ---- exercise 3: what a stage costs ------------------------------------------------------------------------------


def _cost(
    prefix: Callable[[int, int, int, int], int] = lambda s, k, p, b: p * (s - k),
    branch: Callable[[int, int, int, int], int] = lambda s, k, p, b: p * b * k,
    trained: Callable[[int, int, int], int] = lambda s, k, kept: kept * k,
    each: int = 3,
    epochs_count: bool = True,
) -> Callable[..., int]:
    """Return an answer to exercise 3 with one of its parts replaced."""

    def answer(steps: int, suffix: int, prefixes: int, branches: int, kept: int, epochs: int) -> int:
        s, k, p, b = steps, suffix, prefixes, branches
        return prefix(s, k, p, b) + branch(s, k, p, b) + each * (epochs if epochs_count else 1) * trained(s, k, kept)

    return answer


_COST_MISTAKES: dict[str, Callable[..., int]] = {
    "Prefixes are counted once for every branch; they are sampled once and copied.": _cost(
        prefix=lambda s, k, p, b: p * b * (s - k)
    ),
    "The prefixes are missing: their steps are sampled too, once each.": _cost(prefix=lambda s, k, p, b: 0),
    "The branches are missing: each of the prefixes goes on as many times as there are branches.": _cost(
        branch=lambda s, k, p, b: p * k
    ),
    "All steps of the kept samples are counted as trained; only the suffix is.": _cost(
        trained=lambda s, k, kept: kept * s
    ),
    "A trained pair counts 3 evaluations, not 1: forwards once, backwards about twice.": _cost(each=1),
    "Each epoch goes over the kept samples anew.": _cost(epochs_count=False),
    "The training is missing.": _cost(each=0),
}


def check_stage_cost(function: Any) -> Feedback:
    """Judge exercise 3, `stage_cost(steps, suffix, prefixes, branches, kept, epochs)`: network evaluations of a stage.

    Parameters
    ----------
    function : callable
        Of S, k, P, B, the samples kept for training and the epochs, all whole numbers; returns a whole number. A
        sampled row counts 1, a trained pair of sample and step 3.
    """
    cases = [
        Case(
            dict(zip(("steps", "suffix", "prefixes", "branches", "kept", "epochs"), numbers, strict=True)),
            {"evaluations": _cost()(*numbers)},
            _COST_MISTAKES,
        )
        for numbers in ((20, 20, 64, 1, 64, 2), (20, 8, 16, 4, 64, 2), (20, 8, 16, 4, 23, 2), (50, 14, 10, 5, 7, 1))
    ]
    return check(
        function,
        cases,
        hint="Three terms: the prefixes, the branches, and the training of what was kept.",
        praise="A stage of DDPO costs 8,960 with the lab's settings. Of that, 64 samples in branches of a suffix of 8 "
        "cost 42 %, and 20 % where 23 of them are kept: short suffixes and dropped samples are the saving.",
    )
