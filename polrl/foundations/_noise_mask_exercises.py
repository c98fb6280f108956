"""The checks of the noise-mask notebook's three exercises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from polrl.core.exercise import Answered, Case, Feedback, call, check, checker, require
from polrl.core.sampling import seeded_globals
from polrl.foundations.noise_mask import (
    joint_objective,
    joint_objective_gradient,
    log_density,
    lse_score,
    render_mask,
)

Tensor = torch.Tensor
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _loss(score: Callable[..., Tensor] = lse_score, combine: Callable[..., Tensor] = joint_objective) -> Loss:
    """Return an answer to exercise 1 with another score, or another way to combine it with the costs."""

    def answer(a: Tensor, b: Tensor, m: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = score(a, b, m.detach())
        return combine(found, F.cross_entropy(logits, y, reduction="none")), found

    return answer


def _undetached(a: Tensor, b: Tensor, m: Tensor, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    densities = torch.distributions.Beta(a.exp(), b.exp()).log_prob(m)
    score = torch.logsumexp(densities, dim=1)
    return joint_objective(score, F.cross_entropy(logits, y, reduction="none")), score


def _no_normaliser(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    return torch.logsumexp((a.exp() - 1) * m.log() + (b.exp() - 1) * torch.log1p(-m), dim=1)


_LOSS_MISTAKES: dict[str, Loss] = {
    "This is the joint log-density, the sum of the cells' logs; E6 is the log of the SUM of the densities "
    "(torch.logsumexp over the cells).": _loss(lambda a, b, m: log_density(a, b, m).sum(dim=1)),
    "This is the log of the MEAN density: E6 sums over the cells, so log D is missing.": _loss(
        lambda a, b, m: lse_score(a, b, m) - math.log(m.shape[1])
    ),
    "This is the mean of the cells' logs; E6 is the log of the sum of their densities.": _loss(
        lambda a, b, m: log_density(a, b, m).mean(dim=1)
    ),
    "A gradient passes through m: the mask is a sample, a constant; use m.detach().": _undetached,
    "The sign is wrong: L is minimised, and the cross-entropy is a cost, so there is no minus.": _loss(
        combine=lambda score, costs: -joint_objective(score, costs)
    ),
    "The score's sign is wrong: it is the log-density itself, not its negative.": _loss(lambda *x: -lse_score(*x)),
    "This credits each image with its own cross-entropy; E7 multiplies the batch's mean score by the batch's "
    "mean cross-entropy.": _loss(combine=lambda score, costs: (score * costs).mean()),
    "There is a sum over the batch; E7 multiplies two means over the batch.": _loss(
        combine=lambda score, costs: score.mean() * costs.sum()
    ),
    "There are two sums over the batch; E7 multiplies two means over the batch.": _loss(
        combine=lambda score, costs: score.sum() * costs.sum()
    ),
    "The classifier gets no gradient: do not detach the cross-entropy, one loss trains both networks.": _loss(
        combine=lambda score, costs: joint_objective(score, costs.detach())
    ),
    "The policy gets no gradient: do not detach the score.": _loss(
        combine=lambda score, costs: joint_objective(score.detach(), costs)
    ),
    "a and b are logs of the concentrations: take alpha = exp(a), beta = exp(b).": _loss(
        lambda a, b, m: lse_score(a.log(), b.log(), m)
    ),
    "alpha and beta are exchanged: alpha = exp(a) goes with log m, beta = exp(b) with log(1 - m).": _loss(
        lambda a, b, m: lse_score(b, a, m)
    ),
    "The density's normaliser is missing: subtract log B(alpha, beta).": _loss(_no_normaliser),
}


def _loss_case(a: Tensor, b: Tensor, m: Tensor, logits: Tensor, y: Tensor) -> Case:
    score, cross_entropy = lse_score(a, b, m), F.cross_entropy(logits, y, reduction="none")
    by_a, by_b = joint_objective_gradient(a, b, m, cross_entropy)
    pull = (torch.softmax(logits, dim=1) - F.one_hot(y, logits.shape[1])) / len(y)
    expected = {
        "loss": joint_objective(score, cross_entropy),
        "score": score,
        "gradient by a": by_a,
        "gradient by b": by_b,
        "gradient by logits": score.mean() * pull,
        "gradient by m": torch.zeros_like(m),
    }
    return Case({"a": a, "b": b, "m": m, "logits": logits, "y": y}, expected, _LOSS_MISTAKES, tolerance=1e-8)


def check_noise_mask_loss(function: Any) -> Feedback:
    """Judge exercise 1, `noise_mask_loss(a, b, m, logits, y) -> (loss, score)`: E6 and E7.

    Parameters
    ----------
    function : callable
        Of log-concentrations a, b [B, D], cells m [B, D], logits [B, K] and labels y [B]; returns the scalar
        loss and the scores [B]. m is a constant.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    def random_case(images: int, cells: int, classes: int) -> Case:
        a, b = (uniform(images, cells, low=0.2, high=1.5) for _ in "ab")
        labels = torch.arange(images) % classes
        return _loss_case(
            a, b, uniform(images, cells, low=0.1, high=0.9), uniform(images, classes, low=-2, high=2), labels
        )

    flat = torch.zeros(2, 4, dtype=torch.float64)
    uniform_mask = _loss_case(flat, flat, flat + 0.3, flat[:, :2], torch.tensor([0, 1]))
    return check(
        function,
        [random_case(2, 3, 2), uniform_mask, random_case(5, 16, 4)],
        hint="Begin with the log-densities under Beta(exp(a), exp(b)), then torch.logsumexp over the cells.",
        praise="Values and gradients agree with E8. At alpha = beta = 1 each density is 1, the score log D.",
    )


def _gaussian(k: int, sigma: float) -> Tensor:
    weights = _bell(k, 2 * sigma**2)
    return weights / weights.sum()


def _bell(k: int, width: float) -> Tensor:
    return torch.exp(-((torch.arange(k) - k // 2) ** 2) / width)


def _render(
    mode: str = "nearest",
    padding: str = "reflect",
    turned: bool = False,
    kernel: Callable[[int, float], Tensor] = _gaussian,
) -> Callable[..., Tensor]:
    """Return an answer to exercise 2 with another enlargement, padding, orientation or kernel."""

    def answer(m: Tensor, G: int, H: int, k: int, sigma: float) -> Tensor:
        weights = kernel(k, sigma)
        half = len(weights) // 2
        cells = m.reshape(-1, 1, G, G)
        cells = F.interpolate(cells.mT if turned else cells, size=(H, H), mode=mode)
        cells = F.pad(cells, (half, half, half, half), mode=padding)
        return F.conv2d(F.conv2d(cells, weights.reshape(1, 1, 1, -1)), weights.reshape(1, 1, -1, 1))

    return answer


_RENDER_MISTAKES = {
    "The cells are enlarged by bilinear interpolation; E5 takes the nearest neighbour.": _render(mode="bilinear"),
    "Enlarged with 'nearest-exact'; the official code takes 'nearest'.": _render(mode="nearest-exact"),
    "Rows and columns are exchanged: cells are row-major, cell 1 stands to the right of cell 0.": _render(turned=True),
    "The blur pads with zeros, which darkens the edges; mirror the image there (mode='reflect').": _render(
        padding="constant"
    ),
    "The blur repeats the edge pixel; mirror the image there without repeating it (mode='reflect').": _render(
        padding="replicate"
    ),
    "The kernel is not normalised: divide its weights by their sum; a constant stays constant.": _render(
        kernel=lambda k, sigma: _bell(k, 2 * sigma**2)
    ),
    "The kernel's weights are exp(-t^2 / (2 sigma^2)): the 2 is missing.": _render(
        kernel=lambda k, sigma: _bell(k, sigma**2) / _bell(k, sigma**2).sum()
    ),
    "The kernel's weights are exp(-t^2 / (2 sigma^2)): the square of sigma is missing.": _render(
        kernel=lambda k, sigma: _bell(k, 2 * sigma) / _bell(k, 2 * sigma).sum()
    ),
    "The mask is not blurred.": _render(kernel=lambda k, sigma: torch.ones(1)),
}


def check_render_mask(function: Any) -> Feedback:
    """Judge exercise 2, `render_mask(m, G, H, k, sigma)`: E5.

    Parameters
    ----------
    function : callable
        Of cells m [B, G*G], the grid's side, the image's side, and the blur's kernel side and width; returns
        the mask [B, 1, H, H].
    """
    corners = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    random = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    tries = (
        (corners, 2, 4, 1, 1.0),  # no blur: only the enlargement
        (torch.full((1, 4), 0.5), 2, 6, 5, 1.5),  # a constant stays constant
        (corners, 2, 8, 5, 1.5),
        (random, 8, 28, 1, 6.0),
        (random, 8, 28, 13, 6.0),
    )
    cases = [
        Case(
            {"m": m, "G": G, "H": H, "k": k, "sigma": sigma},
            {"mask": render_mask(m, H, k, sigma)},
            _RENDER_MISTAKES,
        )
        for m, G, H, k, sigma in tries
    ]
    return check(
        function,
        cases,
        hint="Reshape to [B, 1, G, G], enlarge with F.interpolate, pad by reflection, blur rows and columns.",
        praise="A constant stays constant and no pixel leaves the range of the cells: a normalised blur.",
    )


#: What the card gives for 64 cells: the hidden pull of the log-sum-exp score by a, at (alpha, beta).
_PULL = {(3.0, 3.0): 0.112, (3.0, 1.5): 0.296}
_PULL_BY_B = -0.145
_PULL_TOLERANCE = 0.01
_MASKS = 20_000


@checker
def check_expected_score_gradient(function: Any) -> Feedback:
    """Judge exercise 3, `expected_score_gradient(alpha, beta, D, score, n)`: identity 5.

    Parameters
    ----------
    function : callable
        Of concentrations alpha, beta (the same for all D cells), the score ("lse" or "joint") and a number n
        of masks; returns the mean over n sampled masks of the sum over cells of d score / d a, where
        a = log(alpha).
    """
    joint, error = _estimate(function, 3.0, 3.0, 4, "joint"), _joint_error(3.0, 4)
    require(
        abs(joint) <= 3 * error,
        f"The joint score's mean gradient is 0 in theory. {_joint_mistake(joint, 3.0, 4)} "
        f"Joint, alpha = beta = 3, D = 4: expected 0 within {3 * error:.3f}, found {joint:.4g}.",
    )
    for (alpha, beta), pull in _PULL.items():
        lse = _estimate(function, alpha, beta, 64, "lse")
        require(
            abs(lse - pull) <= _PULL_TOLERANCE,
            f"{_pull_mistake(lse, pull, alpha)} "
            f"Lse, alpha = {alpha:g}, beta = {beta:g}, D = 64: expected {pull} within 0.01, found {lse:.4g}.",
        )
    return Feedback(
        "right",
        "The joint score averages to nothing, the log-sum-exp score does not: descent on it pulls alpha and "
        "beta towards 1, a hidden entropy bonus that grows with the cross-entropy.",
    )


def _estimate(function: Any, alpha: float, beta: float, cells: int, score: str) -> float:
    hint = "Sample n masks at once, [n, D]; average the sum over cells of d score / d a (torch.autograd.grad)."
    with seeded_globals(0):
        result = call(function, alpha, beta, cells, score, _MASKS, hint=hint)
    try:
        return float(result)
    except (TypeError, ValueError, RuntimeError):
        raise Answered(Feedback("wrong", f"Return one number, found {type(result).__name__}.")) from None


def _polygamma(order: int, x: float) -> float:
    return float(torch.polygamma(order, torch.tensor(x, dtype=torch.float64)))


def _joint_error(alpha: float, cells: int) -> float:
    """Return the standard error of the joint score's gradient, for beta = alpha."""
    return alpha * math.sqrt(cells * (_polygamma(1, alpha) - _polygamma(1, 2 * alpha)) / _MASKS)


def _joint_mistake(found: float, alpha: float, cells: int) -> str:
    """Explain a joint score whose mean gradient is not 0, for beta = alpha."""
    no_normaliser = cells * alpha * (_polygamma(0, alpha) - _polygamma(0, 2 * alpha))
    entropy_slope = (alpha - 1) * _polygamma(1, alpha) - (2 * alpha - 2) * _polygamma(1, 2 * alpha)
    if math.isclose(found, no_normaliser, rel_tol=0.02):
        return "The density's normaliser is missing: subtract log B(alpha, beta)."
    if math.isclose(found, cells * alpha * entropy_slope, rel_tol=0.1):
        return "A gradient passes through the samples: draw with sample(), not rsample(), or detach m."
    return "Is m a constant for autograd, drawn anew from Beta(alpha, beta) for each mask and cell?"


def _pull_mistake(found: float, pull: float, alpha: float) -> str:
    """Explain a wrong pull of the log-sum-exp score."""
    explanations = {
        "The sign is wrong: it is the gradient of the score itself, not of its negative.": -pull,
        "This is the mean over the cells; take the sum over the 64 cells.": pull / 64,
        "This is the derivative by alpha; by a = log(alpha) it is alpha times as much.": pull / alpha,
        "This is the derivative by b; the one by a is asked for.": _PULL_BY_B,
        "This is summed over the masks; take their mean.": pull * _MASKS,
    }
    for sentence, value in explanations.items():
        if math.isclose(found, value, rel_tol=0.08):
            return sentence
    return (
        "The log-sum-exp score is the log of the SUM of the cells' densities; its mean gradient is not 0. "
        "Does your answer depend on the argument `score`?"
    )
