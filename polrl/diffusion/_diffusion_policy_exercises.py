"""The checks of the three exercises in the notebook on fine-tuning a diffusion policy (DPPO)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from polrl.core.exercise import Answered, Case, Feedback, call, check, checker, require
from polrl.diffusion.diffusion_policy import clamped_log_probability, clip_schedule, denoising_advantages

Tensor = torch.Tensor


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- exercise 1: the credit of a minibatch -----------------------------------------------------------------------


def _credit(
    correction: int = 1,
    epsilon: float = 1e-8,
    exponent: Callable[[Tensor, int], Tensor] = lambda j, count: count - 1 - j,
    discount_first: bool = False,
    centre: bool = True,
    scale: bool = True,
    among: Callable[[Tensor, Tensor], Tensor] = lambda advantage, chunk: advantage[chunk],
    detach: bool = True,
) -> Callable[..., Tensor]:
    """Return an answer to exercise 1 with one of its parts replaced."""

    def answer(
        advantage: Tensor, chunk: Tensor, step: Tensor, finetuned_steps: int, denoising_discount: float
    ) -> Tensor:
        weight = denoising_discount ** exponent(step, finetuned_steps)
        credit = advantage[chunk] * weight if discount_first else advantage[chunk]
        compared = credit if discount_first else among(advantage, chunk)
        credit = credit - compared.mean() if centre else credit
        credit = credit / (compared.std(correction=correction) + epsilon) if scale else credit
        credit = credit if discount_first else credit * weight
        return credit.detach() if detach else credit

    return answer


_CREDIT_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "Discounted first, then normalised: the mean that is taken off is then another one, and undoes some of the "
    "discount. E16 normalises first.": _credit(discount_first=True),
    "The deviation divides by m; E16 takes the unbiased one, by m - 1.": _credit(correction=0),
    "The exponent is j, so that the noisiest step gets the most credit; it is K' - 1 - j.": _credit(
        exponent=lambda j, count: j
    ),
    "The exponent is one too large: the last step, j = K' - 1, is not discounted.": _credit(
        exponent=lambda j, count: count - j
    ),
    "Nothing is discounted by the denoising step.": _credit(exponent=lambda j, count: torch.zeros_like(j)),
    "The mean is not subtracted.": _credit(centre=False),
    "The deviation is missing.": _credit(scale=False),
    "Mean and deviation are those of all chunks; E16 normalises in the minibatch.": _credit(
        among=lambda advantage, chunk: advantage
    ),
    "A chunk that is in the minibatch with two steps counts twice in mean and deviation: pairs are compared.": _credit(
        among=lambda advantage, chunk: advantage[chunk.unique()]
    ),
    "1e-8 is missing: advantages that are all alike are blown up to a deviation of 1.": _credit(epsilon=0.0),
    "The credit is a constant: no gradient passes to the advantage.": _credit(detach=False),
}


def check_minibatch_credit(function: Any) -> Feedback:
    """Judge exercise 1, `minibatch_credit(advantage, chunk, step, finetuned_steps, denoising_discount)`.

    Parameters
    ----------
    function : callable
        Of the advantages of all chunks [n], the chunk and the denoising step of each pair in the minibatch, int64
        [m] each, K' and the discount of a denoising step; returns E16's credit of the pairs [m], a constant.
    """
    chunk, step = torch.tensor([0, 1, 1, 2, 4, 4]), torch.tensor([0, 2, 1, 0, 1, 2])
    cases = []
    for advantage, discount in (
        (torch.tensor([2.0, -1.0, 0.5, 9.0, 4.0], dtype=torch.float64), 0.5),
        (3 + 2 * _normal(5, seed=1), 0.9),
        (1e-8 * _normal(5, seed=2), 0.5),
        (torch.ones(5, dtype=torch.float64), 0.5),
    ):
        cases.append(
            Case(
                {
                    "advantage": advantage,
                    "chunk": chunk,
                    "step": step,
                    "finetuned_steps": 3,
                    "denoising_discount": discount,
                },
                {
                    "credit": denoising_advantages(advantage[chunk], step, 3, discount),
                    "gradient by advantage": torch.zeros_like(advantage),
                },
                _CREDIT_MISTAKES,
            )
        )
    return check(
        function,
        cases,
        hint="Look up each pair's advantage; take mean and unbiased deviation of those m numbers; only then discount.",
        praise="All pairs of a chunk share its advantage; the noisier the step, the less of it counts.",
    )


# ---- exercise 2: the bounds of the ratios ------------------------------------------------------------------------


def _bounds(
    rise: Callable[[Tensor], Tensor] = lambda u: torch.expm1(3 * u) / math.expm1(3),
    place: Callable[[Tensor, int], Tensor] = lambda j, count: j / (count - 1) if count > 1 else torch.ones_like(j),
    backwards: bool = False,
    low: Callable[[Tensor], Tensor] = lambda e: 1 - e,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return an answer to exercise 2 with one of its parts replaced."""

    def answer(finetuned_steps: int, start: float, end: float) -> tuple[Tensor, Tensor]:
        first, last = (end, start) if backwards else (start, end)
        u = place(torch.arange(finetuned_steps, dtype=torch.float64), finetuned_steps)
        e = first + (last - first) * rise(u)
        return low(e), 1 + e

    return answer


_BOUNDS_MISTAKES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "It goes from the range of the last step to that of the first; j = 0 is the noisiest step and gets e_0.": _bounds(
        backwards=True
    ),
    "The range rises linearly; E17 rises exponentially, so that it stays near e_0 for long.": _bounds(rise=lambda u: u),
    "u = j / K' never reaches 1, and the last step never its own range; divide by K' - 1.": _bounds(
        place=lambda j, count: j / count
    ),
    "u = (j + 1) / K' is above 0 at the first step, which should have e_0 exactly.": _bounds(
        place=lambda j, count: (j + 1) / count
    ),
    "The rate is 3: e^(3u) - 1 over e^3 - 1.": _bounds(rise=lambda u: torch.expm1(u) / math.expm1(1)),
    "The quotient is not normalised to end at 1; divide by e^3 - 1.": _bounds(rise=lambda u: torch.expm1(3 * u)),
    "The 1 under the exponentials is missing: e^(3u) - 1 over e^3 - 1 is 0 at the first step.": _bounds(
        rise=lambda u: torch.exp(3 * u - 3)
    ),
    "The lower bound is 1 - e, not 1 / (1 + e).": _bounds(low=lambda e: 1 / (1 + e)),
}
_ONE_STEP_MISTAKES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "The only step is the last one as well: with K' = 1 it gets e_1, not e_0.": _bounds(
        place=lambda j, count: j / max(count - 1, 1)
    ),
}
_ONE_STEP = "With K' = 1 the quotient j / (K' - 1) divides by zero. The only step is the last one: give it e_1."


@checker
def check_ratio_bounds(function: Any) -> Feedback:
    """Judge exercise 2, `ratio_bounds(finetuned_steps, start, end)`.

    Parameters
    ----------
    function : callable
        Of K', e_0 and e_1; returns the lower and the upper bound of the ratio of every step j, float64 [K'] each.
    """
    hint = "u = torch.arange(K', dtype=torch.float64) / (K' - 1), and a thought for K' = 1; then 1 - e and 1 + e."
    cases = []
    for steps, start, end in ((3, 0.01, 0.1), (5, 0.02, 0.2), (2, 0.1, 0.05), (4, 0.05, 0.05), (1, 0.01, 0.1)):
        e = clip_schedule(torch.arange(steps), steps, start, end, torch.float64)
        arguments = {"finetuned_steps": steps, "start": start, "end": end}
        mistakes = _BOUNDS_MISTAKES if steps > 1 else _ONE_STEP_MISTAKES
        cases.append(Case(arguments, {"lower": 1 - e, "upper": 1 + e}, mistakes, tolerance=1e-9))
    feedback = check(function, cases[:-1], hint=hint)
    if not feedback:
        return feedback
    try:  # what divides by zero either raises or is not a number, and neither is like any number
        found = call(function, 1, 0.01, 0.1)
    except Answered as answered:
        require("ZeroDivisionError" not in answered.feedback.words, _ONE_STEP)
        raise
    numbers = (torch.as_tensor(value, dtype=torch.float64) for value in found)
    require(not any(bool(value.isnan().any()) for value in numbers), _ONE_STEP)
    return check(
        function,
        cases[-1:],
        praise="Noisy steps, which decide much, are held close; clean ones, which only polish, may move.",
    )


# ---- exercise 3: the log-probabilities of a chain ----------------------------------------------------------------


def _log_probabilities(
    floor_of: Callable[[Tensor, float], Tensor] = lambda std, floor: std.clamp(min=floor),
    bound: Callable[[Tensor], Tensor] = lambda density: density.clamp(-5, 2),
    reduce: Callable[[Tensor], Tensor] = lambda density: density.mean(dim=2),
    bound_last: bool = False,
    through: bool = False,
    after: slice = slice(1, None),
    half: float = 0.5,
    constant: float = 0.5 * math.log(2 * math.pi),
    log_weight: float = 1.0,
) -> Callable[..., Tensor]:
    """Return an answer to exercise 3 with one of its parts replaced."""

    def answer(stages: Tensor, means: Tensor, std: Tensor, floor: float) -> Tensor:
        sigma = floor_of(std, floor)[:, None]
        reached = stages[:, after] if through else stages[:, after].detach()
        density = -half * ((reached - means) / sigma) ** 2 - log_weight * sigma.log() - constant
        return bound(reduce(density)) if bound_last else reduce(bound(density))

    return answer


_LOG_PROBABILITY_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "Averaged first, then clamped: one element far off then drags the whole step down. E15 clamps each element.": (
        _log_probabilities(bound_last=True)
    ),
    "Elements are summed; E15 takes the mean over the chunk.": _log_probabilities(
        reduce=lambda density: density.sum(dim=2)
    ),
    "The floor of the deviation is missing: std is at least the floor.": _log_probabilities(
        floor_of=lambda std, floor: std
    ),
    "The floor is added; it is a least value, max(std, floor).": _log_probabilities(
        floor_of=lambda std, floor: std + floor
    ),
    "Clamped above only; below, the floor is -5.": _log_probabilities(bound=lambda density: density.clamp(max=2)),
    "Clamped below only; above, the limit is 2.": _log_probabilities(bound=lambda density: density.clamp(min=-5)),
    "Nothing is clamped: the elements lie between -5 and 2.": _log_probabilities(bound=lambda density: density),
    "The stages are what was sampled, constants: the gradient passes through the means only.": _log_probabilities(
        through=True
    ),
    "Step j leads to stage j + 1; its mean is compared with stage j, where it began.": _log_probabilities(
        after=slice(None, -1)
    ),
    "The half before the squared distance is missing.": _log_probabilities(half=1.0),
    "The constant half log 2 pi is missing.": _log_probabilities(constant=0.0),
    "The constant is half of log 2 pi.": _log_probabilities(constant=math.log(2 * math.pi)),
    "log sigma is missing: a step with little noise has a higher density.": _log_probabilities(log_weight=0.0),
}


def check_chain_log_probabilities(function: Any) -> Feedback:
    """Judge exercise 3, `chain_log_probabilities(stages, means, std, floor)`: E15 for whole chains.

    Parameters
    ----------
    function : callable
        Of the K' + 1 stages of m chunks [m, K' + 1, n], the means of the K' steps [m, K', n], their deviations
        without the floor [K'], and the floor; returns log-probabilities [m, K'].
    """
    cases = []
    for count, steps, size, stds, floor in (
        (1, 2, 2, (0.3, 0.03), 0.02),  # clamped below in the first step, above in the second
        (2, 3, 4, (0.4, 0.2, 0.05), 0.1),  # the last step has less noise than the floor
    ):
        std = torch.tensor(stds, dtype=torch.float64)
        means = _normal(count, steps, size, seed=3)
        reach = 1.5 * std.clamp(min=floor)[:, None] * _normal(count, steps, size, seed=4)
        reach[:, :, 0] *= torch.where(torch.arange(steps) % 2 == 0, 4.0, 0.1)  # far off, or quite near
        stages = torch.cat([_normal(count, 1, size, seed=5), means + reach], dim=1)
        leaf = means.clone().requires_grad_()
        expected = torch.stack(
            [clamped_log_probability(stages[:, j + 1], leaf[:, j], std[j], floor) for j in range(steps)], dim=1
        )
        (gradient,) = torch.autograd.grad(expected.sum(), leaf)
        cases.append(
            Case(
                {"stages": stages, "means": means, "std": std, "floor": floor},
                {
                    "log_probability": expected.detach(),
                    "gradient by means": gradient,
                    "gradient by stages": torch.zeros_like(stages),
                },
                _LOG_PROBABILITY_MISTAKES,
            )
        )
    return check(
        function,
        cases,
        hint="sigma = std.clamp(min=floor)[:, None]; stages[:, 1:] as constants; clamp the elements, then average.",
        praise="No element can push a ratio by more than its share: 7 nats, divided by the chunk's length.",
    )
