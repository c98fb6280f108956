"""The checks of the three exercises in the notebook on DDPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from polrl.core.exercise import Case, Feedback, check
from polrl.diffusion.ddpo import append_rewards, clipped_loss, prompt_advantages
from polrl.models.diffusion import step_std

Tensor = torch.Tensor


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- exercise 1: advantages from a buffer ------------------------------------------------------------------------


def _two_batches(
    size: int = 4,
    least: int = 3,
    correction: int = 0,
    first_append: bool = True,
    centre: bool = True,
    scale: bool = True,
    by_prompt: bool = True,
    fallback: bool = True,
) -> Callable[..., Tensor]:
    """Return an answer to exercise 1 with one of its parts replaced."""

    def answer(first: Tensor, first_prompts: Tensor, second: Tensor, second_prompts: Tensor) -> Tensor:
        if not by_prompt:
            first_prompts, second_prompts = torch.zeros_like(first_prompts), torch.zeros_like(second_prompts)
        none, nobody = first[:0], first_prompts[:0]
        kept, prompts = append_rewards(none, nobody, first, first_prompts, size)
        after = append_rewards(kept, prompts, second, second_prompts, size)
        found = []
        for r, p in zip(second, second_prompts, strict=True):
            rewards, whose = after if first_append else (kept, prompts)
            own = rewards[whose == p]
            own = second if fallback and len(own) < least else own
            shift = own.mean() if centre else 0.0
            found.append((r - shift) / (own.std(correction=correction) + 1e-6 if scale else 1.0))
        return torch.stack(found)

    return answer


_BUFFER_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The statistics are taken before the new rewards were added; DDPO adds them first.": _two_batches(
        first_append=False
    ),
    "All old rewards are kept; only the newest 4 of a prompt are.": _two_batches(size=1000),
    "The deviation divides by n - 1; the official code takes the population's.": _two_batches(correction=1),
    "The mean is not subtracted.": _two_batches(centre=False),
    "The deviation is missing.": _two_batches(scale=False),
    "Prompts are mixed: an easy prompt then always wins over a hard one.": _two_batches(by_prompt=False),
    "A prompt with fewer than 3 rewards kept is compared with the whole batch.": _two_batches(fallback=False),
}


def check_buffer_advantages(function: Any) -> Feedback:
    """Judge exercise 1, `buffer_advantages(first, first_prompts, second, second_prompts)`.

    Parameters
    ----------
    function : callable
        Of the rewards and prompts of two batches, [n] each, the buffer being empty before; returns the second
        batch's advantages [n]. 4 rewards of a prompt are kept; with fewer than 3 the whole batch is taken.
    """
    cases = []
    for count, seed in ((5, 1), (9, 2), (12, 3)):
        first, second = _normal(count, seed=seed), 2 + _normal(count, seed=seed + 10)
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(3, (count,), generator=generator) for _ in range(2)]
        prompts[1][0] = 3  # one that has not been seen before
        after = append_rewards(*append_rewards(first[:0], prompts[0][:0], first, prompts[0], 4), second, prompts[1], 4)
        cases.append(
            Case(
                {"first": first, "first_prompts": prompts[0], "second": second, "second_prompts": prompts[1]},
                {"advantage": prompt_advantages(second, prompts[1], *after, 3)},
                _BUFFER_MISTAKES,
            )
        )
    return check(
        function,
        cases,
        hint="A collections.deque(maxlen=4) for each prompt: extend all, and only then take means and deviations.",
        praise="Each prompt is compared with itself, so an easy one can't crowd out a hard one.",
    )


# ---- exercise 2: the clipped loss --------------------------------------------------------------------------------


def _surrogate(
    worst: Callable[[Tensor, Tensor], Tensor] = torch.maximum,
    bound: Callable[[Tensor, float], Tensor] = lambda ratio, e: ratio.clamp(1 - e, 1 + e),
    ratio_of: Callable[[Tensor, Tensor], Tensor] = lambda new, old: (new - old).exp(),
    reduce: Callable[[Tensor], Tensor] = Tensor.mean,
    sign: float = -1.0,
    limit: float = 5.0,
) -> Callable[..., Tensor]:
    """Return an answer to exercise 2 with one of its parts replaced."""

    def answer(new: Tensor, old: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
        ratio = ratio_of(new, old)
        credit = sign * advantage.clamp(-limit, limit).unsqueeze(1)
        return reduce(worst(credit * ratio, credit * bound(ratio, clip_range)))

    return answer


_SURROGATE_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The ratio is the whole chain's, a product over the steps; DDPO takes each step's own.": _surrogate(
        ratio_of=lambda new, old: (new - old).sum(dim=1, keepdim=True).exp().expand_as(new)
    ),
    "The better of both terms is taken; the loss takes the worse, which is the maximum.": _surrogate(
        worst=torch.minimum
    ),
    "Only the clipped term is left: then a step that has gone the wrong way has no gradient back.": _surrogate(
        worst=lambda plain, clipped: clipped
    ),
    "Nothing is clipped: the ratio may run away.": _surrogate(bound=lambda ratio, e: ratio),
    "The ratio is bounded above only; for an advantage below 0 the lower side matters.": _surrogate(
        bound=lambda ratio, e: ratio.clamp(max=1 + e)
    ),
    "The sign is wrong: the loss is minimised.": _surrogate(sign=1.0, worst=torch.minimum),
    "The ratio is upside down: new by old.": _surrogate(ratio_of=lambda new, old: (old - new).exp()),
    "Steps are summed; E6 takes the mean over samples and steps.": _surrogate(
        reduce=lambda terms: terms.sum(dim=1).mean()
    ),
    "Advantages are bounded by 5 on both sides first.": _surrogate(limit=math.inf),
}


def check_chain_loss(function: Any) -> Feedback:
    """Judge exercise 2, `chain_loss(new, old, advantage, clip_range)`: E6 for whole chains.

    Parameters
    ----------
    function : callable
        Of log-probabilities under the present and the old network [n, k], advantages [n] (one a sample, bounded
        by 5 inside) and e; returns the scalar loss.
    """
    cases = []
    for count, steps, clip_range in ((1, 2, 0.2), (3, 4, 0.1), (4, 5, 0.3)):
        new, old = (0.3 * _normal(count, steps, seed=seed) for seed in (1, 2))
        advantage = 8 * _normal(count, seed=3)
        leaf = new.clone().requires_grad_()
        credit = advantage.unsqueeze(1).expand_as(new)
        loss = clipped_loss(leaf.flatten(), old.flatten(), credit.flatten(), clip_range)
        (gradient,) = torch.autograd.grad(loss, leaf)
        cases.append(
            Case(
                {"new": new, "old": old, "advantage": advantage, "clip_range": clip_range},
                {"loss": loss.detach(), "gradient by new": gradient},
                _SURROGATE_MISTAKES,
            )
        )
    return check(
        function,
        cases,
        hint="One ratio a step; the sample's advantage for all its steps; the larger of two losses; the mean.",
        praise="PPO, with denoising steps for actions. The chain's length enters nowhere else.",
    )


# ---- exercise 3: what the penalty costs --------------------------------------------------------------------------


def _divergence(
    kappa: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda a, b, s: (
        (1 - b - s**2).sqrt() - (b * (1 - a) / a).sqrt()
    ),
    std: Callable[[Tensor, Tensor, float], Tensor] = step_std,
    half: float = 0.5,
    reduce: Callable[[Tensor], Tensor] = lambda squares: squares.sum(dim=1),
    divide: Callable[[Tensor], Tensor] = lambda sigma: sigma**2,
) -> Callable[..., Tensor]:
    """Return an answer to exercise 3 with one of its parts replaced."""

    def answer(eps: Tensor, eps_pretrained: Tensor, abar: float, abar_next: float, eta: float) -> Tensor:
        a, after = (torch.tensor(v, dtype=eps.dtype) for v in (abar, abar_next))
        sigma = std(a, after, eta)
        moved = kappa(a, after, sigma) * (eps - eps_pretrained)
        return half * reduce(moved**2) / divide(sigma)

    return answer


_DIVERGENCE_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "This is DPOK's squared difference of the noise; the mean of the step moves kappa times as far.": _divergence(
        kappa=lambda a, b, s: torch.ones_like(a)
    ),
    "kappa has a second part: the predicted data move too, the other way.": _divergence(
        kappa=lambda a, b, s: (1 - b - s**2).sqrt()
    ),
    "kappa has a second part: the noise is also added again, with the root of 1 - abar' - sigma^2.": _divergence(
        kappa=lambda a, b, s: (b * (1 - a) / a).sqrt()
    ),
    "The two parts of kappa have opposite signs.": _divergence(
        kappa=lambda a, b, s: (1 - b - s**2).sqrt() + (b * (1 - a) / a).sqrt()
    ),
    "sigma^2 is missing under the first root of kappa.": _divergence(
        kappa=lambda a, b, s: (1 - b).sqrt() - (b * (1 - a) / a).sqrt()
    ),
    "The half is missing.": _divergence(half=1.0),
    "A divergence sums over dimensions, it does not average.": _divergence(reduce=lambda squares: squares.mean(dim=1)),
    "Divide by sigma squared.": _divergence(divide=lambda sigma: sigma),
    "eta is not used: sigma is eta times DDPM's standard deviation.": _divergence(
        std=lambda a, b, eta: step_std(a, b, 1.0)
    ),
}


def check_exact_divergence(function: Any) -> Feedback:
    """Judge exercise 3, `exact_divergence(eps, eps_pretrained, abar, abar_next, eta)`: KL of a step in nats.

    Parameters
    ----------
    function : callable
        Of both predictions of the noise [n, d], the signal levels before and after the step, and eta; returns the
        divergence [n] of the step from the pretrained one. Nothing is clipped, abar_next is below 1.
    """
    cases = [
        Case(
            {
                "eps": _normal(count, size, seed=1),
                "eps_pretrained": _normal(count, size, seed=2),
                "abar": abar,
                "abar_next": after,
                "eta": eta,
            },
            {"divergence": _divergence()(_normal(count, size, seed=1), _normal(count, size, seed=2), abar, after, eta)},
            _DIVERGENCE_MISTAKES,
        )
        for count, size, abar, after, eta in ((1, 2, 0.25, 0.5, 1.0), (3, 3, 0.1, 0.3, 0.5), (2, 4, 0.6, 0.9, 1.0))
    ]
    return check(
        function,
        cases,
        hint="Both steps are Gaussians with one sigma: half the squared distance of their means, by sigma squared.",
        praise="DPOK's code drops the factor, so its penalty weighs all steps alike; the divergence does not.",
    )
