"""The checks of the three exercises in the foundations overview."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from polrl.core.exercise import Case, Feedback, call, check, checker, require
from polrl.foundations.reinforce import gibbs, mean_of_others, policy_loss, regularized_reward, reward_to_go

Tensor = torch.Tensor


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sizes(pi: Tensor) -> Tensor:
    """Return the squared length [K] of each arm's score, e_a - pi."""
    return (torch.eye(len(pi), dtype=pi.dtype) - pi).pow(2).sum(dim=1)


def _best_baseline(
    weight: Callable[[Tensor, Tensor], Tensor] = lambda pi, size: pi * size,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return an answer to exercise 1: a mean of the rewards, weighed by probability and squared length."""

    def answer(logits: Tensor, reward: Tensor) -> Tensor:
        pi = torch.softmax(logits, dim=0)
        weights = weight(pi, _sizes(pi))
        return (weights * reward).sum() / weights.sum()

    return answer


_BASELINE_MISTAKES = {
    "This is the mean reward under the policy, the usual choice: unbiased, and near the best, but an arm whose step "
    "is long should count for more.": _best_baseline(lambda pi, size: pi),
    "This is the plain mean over the arms: weigh each arm by how often it is drawn and by its step's squared "
    "length.": _best_baseline(lambda pi, size: torch.ones_like(pi)),
    "The probabilities are missing: E11 is an expectation under the policy.": _best_baseline(lambda pi, size: size),
    "The length of the step is not squared; a variance is a mean of squares.": _best_baseline(
        lambda pi, size: pi * size.sqrt()
    ),
    "Only the drawn arm's own logit is counted; a draw moves all the logits, so take the whole length of "
    "e_a - pi.": _best_baseline(lambda pi, size: pi * (1 - pi).pow(2)),
    "This is the highest reward; a baseline above most rewards pushes almost everything down.": (
        lambda logits, reward: reward.max()
    ),
}


def check_best_baseline(function: Any) -> Feedback:
    """Judge exercise 1, `best_baseline(logits, reward)`: the number b at which E11 is smallest.

    Parameters
    ----------
    function : callable
        Of logits and rewards, both float64 [K]; returns a scalar.
    """
    cases = [
        Case(
            {"logits": logits, "reward": reward},
            {"baseline": _best_baseline()(logits, reward)},
            _BASELINE_MISTAKES,
        )
        for logits, reward in (
            (torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64), torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)),
            (_normal(4, seed=1), _normal(4, seed=2)),
            (2 * _normal(7, seed=3), 5 + _normal(7, seed=4)),
        )
    ]
    return check(
        function,
        cases,
        hint="The mean step does not depend on b: minimise the sum over arms of pi (R - b)^2 |e_a - pi|^2 over b.",
        praise="A mean of the rewards in which long steps count more. The mean of the samples comes close, for free.",
    )


def _loss(
    sign_alpha: float = 1.0,
    sign_beta: float = 1.0,
    price: Callable[[Tensor], Tensor] = Tensor.detach,
    to_go: Callable[[Tensor], Tensor] = reward_to_go,
    baseline: Callable[[Tensor], Tensor] = lambda g: mean_of_others(g, torch.ones_like(g)),
    combine: Callable[[Tensor, Tensor], Tensor] = lambda log_pi, a: policy_loss(log_pi, a, torch.ones_like(a)),
) -> Callable[..., Tensor]:
    """Return an answer to exercise 2 with one of its parts replaced."""

    def answer(log_pi: Tensor, log_ref: Tensor, reward: Tensor, alpha: float, beta: float) -> Tensor:
        priced = price(log_pi)
        earned = reward - sign_alpha * alpha * priced - sign_beta * beta * (priced - log_ref.detach())
        gains = to_go(earned)
        return combine(log_pi, gains - baseline(gains))

    return answer


def _price_stays(log_pi: Tensor, log_ref: Tensor, reward: Tensor, alpha: float, beta: float) -> Tensor:
    """Credit each decision with its own price only, as a bonus added after the sum."""
    own = regularized_reward(torch.zeros_like(reward), log_pi, log_ref, alpha, beta)
    gains = reward_to_go(reward) + own
    every = torch.ones_like(gains)
    return policy_loss(log_pi, gains - mean_of_others(gains, every), every)


_LOSS_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The sign is wrong: an optimizer goes downhill, so the loss is minus what shall grow.": _loss(
        combine=lambda log_pi, a: (a.detach() * log_pi).sum() / len(log_pi)
    ),
    "Entropy has the wrong sign: a surprising decision, log pi far below 0, earns more.": _loss(sign_alpha=-1.0),
    "KL has the wrong sign: what the policy does more often than the reference costs.": _loss(sign_beta=-1.0),
    "A gradient passes through the price of the sample: E3 is a constant, detach it.": _loss(
        price=lambda log_pi: log_pi, combine=lambda log_pi, a: -(a * log_pi).sum() / len(log_pi)
    ),
    "Every decision is credited with the whole string; E4 takes only what comes from the decision on.": _loss(
        to_go=lambda r: r.sum(dim=1, keepdim=True).expand_as(r)
    ),
    "The sum runs over the past; E4 takes what is earned from the decision on.": _loss(to_go=lambda r: r.cumsum(dim=1)),
    "Later rewards do not reach the earlier decisions: E4 sums from each decision to the end.": _loss(
        to_go=lambda r: r
    ),
    "The price stays with its own letter; later prices are part of what a decision leads to, so add them before the "
    "sum of E4.": _price_stays,
    "The baseline holds the sample's own value, which shrinks the gradient by 1 - 1/N; E5 leaves it out.": _loss(
        baseline=lambda g: g.mean(dim=0, keepdim=True)
    ),
    "The baseline is the mean over all letters; E5 takes it at the same letter of the other strings.": _loss(
        baseline=lambda g: (g.sum() - g.sum(dim=1, keepdim=True)) / (g.numel() - g.shape[1])
    ),
    "The baseline is missing: subtract the mean of the other strings (E5).": _loss(baseline=torch.zeros_like),
    "This is a mean over letters; E6 sums over a string's letters and averages over strings.": _loss(
        combine=lambda log_pi, a: -(a.detach() * log_pi).mean()
    ),
    "This is a sum over the strings; E6 takes their mean.": _loss(
        combine=lambda log_pi, a: -(a.detach() * log_pi).sum()
    ),
}


def check_regularized_loss(function: Any) -> Feedback:
    """Judge exercise 2, `regularized_loss(log_pi, log_ref, reward, alpha, beta)`: E3 to E6.

    Parameters
    ----------
    function : callable
        Of the log-probabilities of N strings' letters under policy and reference, the rewards, all [N, T], and the
        two strengths; returns the scalar loss. All strings have T letters.
    """
    cases = []
    for count, depth, alpha, beta in ((2, 1, 0.0, 0.0), (2, 3, 0.5, 0.0), (3, 2, 0.0, 0.5), (5, 4, 0.2, 0.3)):
        log_pi, log_ref = (-_normal(count, depth, seed=seed).abs() for seed in (1, 2))
        reward = _normal(count, depth, seed=3)
        leaf = log_pi.clone().requires_grad_()
        loss = _loss()(leaf, log_ref, reward, alpha, beta)
        (gradient,) = torch.autograd.grad(loss, leaf)
        cases.append(
            Case(
                {"log_pi": log_pi, "log_ref": log_ref, "reward": reward, "alpha": alpha, "beta": beta},
                {
                    "loss": loss.detach(),
                    "gradient by log_pi": gradient,
                    "gradient by log_ref": torch.zeros_like(log_ref),
                },
                _LOSS_MISTAKES,
            )
        )
    return check(
        function,
        cases,
        hint="Priced reward (detached), its sum from each letter on, less the mean of the others, times log pi.",
        praise="That is the whole update: both strengths have only changed the reward.",
    )


def _gibbs(weigh: Callable[[Tensor, Tensor, float, float], Tensor]) -> Callable[..., Tensor]:
    """Return an answer to exercise 3 from a function that gives the logits."""

    def answer(reward: Tensor, reference: Tensor, alpha: float, beta: float) -> Tensor:
        return torch.softmax(weigh(reward, reference.log(), alpha, beta), dim=0)

    return answer


_GIBBS_MISTAKES: dict[str, Callable[..., Tensor]] = {
    "The weights are not normalised: probabilities sum to 1.": lambda r, q, a, b: ((r + b * q.log()) / (a + b)).exp(),
    "The reward is divided by alpha alone; both strengths hold the policy back, so divide by their sum.": _gibbs(
        lambda r, log_q, a, b: (r + b * log_q) / a
    ),
    "The reward is divided by beta alone; both strengths hold the policy back, so divide by their sum.": _gibbs(
        lambda r, log_q, a, b: (r + b * log_q) / b
    ),
    "The reference counts fully; with entropy beside it, it enters to the power beta / (alpha + beta).": _gibbs(
        lambda r, log_q, a, b: r / (a + b) + log_q
    ),
    "The reference is missing.": _gibbs(lambda r, log_q, a, b: r / (a + b)),
    "The reference is weighed by its own probability and not by its logarithm.": _gibbs(
        lambda r, log_q, a, b: (r + b * log_q.exp()) / (a + b)
    ),
    "The sign of the reward is wrong: high rewards must be likely.": _gibbs(
        lambda r, log_q, a, b: (b * log_q - r) / (a + b)
    ),
    "The reward is multiplied by the strengths; weak strengths must follow the reward more closely, so divide.": _gibbs(
        lambda r, log_q, a, b: r * (a + b) + b / (a + b) * log_q
    ),
}


@checker
def check_gibbs_policy(function: Any) -> Feedback:
    """Judge exercise 3, `gibbs_policy(reward, reference, alpha, beta)`: E9, at any strength above 0.

    Parameters
    ----------
    function : callable
        Of rewards and the reference's probabilities, both float64 [M], and the strengths, of which at least one is
        above 0; returns the probabilities [M].
    """
    rewards = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    other = torch.softmax(_normal(6, seed=1), dim=0)
    cases = [
        Case(
            {"reward": r, "reference": q, "alpha": alpha, "beta": beta},
            {"policy": gibbs(r, q.log(), alpha, beta)},
            _GIBBS_MISTAKES,
        )
        for r, q, alpha, beta in (
            (rewards, reference, 0.4, 0.6),
            (rewards, reference, 0.6, 0.2),
            (_normal(6, seed=2), other, 0.0, 0.3),
            (_normal(6, seed=2), other, 0.3, 0.0),
        )
    ]
    feedback = check(
        function,
        cases,
        hint="Take logarithms: log of the optimum is (reward + beta log reference) / (alpha + beta), up to a constant.",
        praise="Entropy is KL to the uniform policy: with a uniform reference, alpha and beta do the same.",
    )
    if feedback:
        weak = call(function, rewards, reference, 1e-3, 0.0)
        require(
            bool(torch.as_tensor(weak).isfinite().all()),
            "At alpha = 0.001 the exponential of 1000 overflows: subtract the highest exponent first, or use "
            "torch.softmax, which does.",
        )
    return feedback
