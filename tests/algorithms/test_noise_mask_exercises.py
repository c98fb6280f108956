"""The noise-mask exercises: solutions are right, each typical mistake is recognised and explained."""

from __future__ import annotations

import math

import torch
from exercise_suite import ExerciseSuite
from scipy import ndimage
from torch.nn import functional as F

from polrl.foundations._noise_mask_exercises import (
    check_expected_score_gradient,
    check_noise_mask_loss,
    check_render_mask,
)


def beta_log_density(a, b, m):
    return torch.distributions.Beta(a.exp(), b.exp()).log_prob(m)


# ---- exercise 1 ----------------------------------------------------------------------------------------------


def noise_mask_loss(a, b, m, logits, y):
    score = torch.logsumexp(beta_log_density(a, b, m.detach()), dim=1)
    return score.mean() * F.cross_entropy(logits, y), score


def wrong_loss(score=None, combine=None, keep_mask=False):
    """Return exercise 1 with another score of the log-densities, or another combination."""

    def function(a, b, m, logits, y):
        log_p = beta_log_density(a, b, m if keep_mask else m.detach())
        scored = (score or (lambda p: torch.logsumexp(p, dim=1)))(log_p)
        costs = F.cross_entropy(logits, y, reduction="none")
        return (combine or (lambda s, c: s.mean() * c.mean()))(scored, costs), scored

    return function


def concentrations_not_exponentiated(a, b, m, logits, y):
    score = torch.logsumexp(torch.distributions.Beta(a, b).log_prob(m.detach()), dim=1)
    return score.mean() * F.cross_entropy(logits, y), score


def exchanged(a, b, m, logits, y):
    return noise_mask_loss(b, a, m, logits, y)


def without_normaliser(a, b, m, logits, y):
    m = m.detach()
    score = ((a.exp() - 1) * m.log() + (b.exp() - 1) * (1 - m).log()).exp().sum(dim=1).log()
    return score.mean() * F.cross_entropy(logits, y), score


LOSS_MISTAKES = {
    "joint sum for LSE": (wrong_loss(lambda p: p.sum(dim=1)), "joint log-density"),
    "joint sum for LSE, m not detached": (
        wrong_loss(lambda p: p.sum(dim=1), keep_mask=True),
        "joint log-density",
    ),
    "mean of densities": (wrong_loss(lambda p: p.exp().mean(dim=1).log()), "log of the MEAN density"),
    "mean of logs": (wrong_loss(lambda p: p.mean(dim=1)), "mean of the cells' logs"),
    "gradient through m": (wrong_loss(keep_mask=True), "A gradient passes through m"),
    "minus the loss": (wrong_loss(combine=lambda s, c: -s.mean() * c.mean()), "The sign is wrong"),
    "minus the score": (wrong_loss(lambda p: -torch.logsumexp(p, dim=1)), "The score's sign is wrong"),
    "per-image credit": (
        wrong_loss(combine=lambda s, c: (s * c).mean()),
        "each image with its own cross-entropy",
    ),
    "costs summed": (wrong_loss(combine=lambda s, c: s.mean() * c.sum()), "There is a sum over the batch"),
    "scores summed": (wrong_loss(combine=lambda s, c: s.sum() * c.mean()), "There is a sum over the batch"),
    "both summed": (wrong_loss(combine=lambda s, c: s.sum() * c.sum()), "There are two sums"),
    "cost detached": (
        wrong_loss(combine=lambda s, c: s.mean() * c.mean().detach()),
        "classifier gets no gradient",
    ),
    "score detached": (
        wrong_loss(combine=lambda s, c: s.detach().mean() * c.mean()),
        "policy gets no gradient",
    ),
    "no exp": (concentrations_not_exponentiated, "a and b are logs"),
    "a for b": (exchanged, "alpha and beta are exchanged"),
    "no normaliser": (without_normaliser, "normaliser is missing"),
    "score averaged over the batch": (
        lambda *x: (noise_mask_loss(*x)[0], noise_mask_loss(*x)[1].mean()),
        "score must have the shape [2], found []",
    ),
    "loss only": (lambda *x: noise_mask_loss(*x)[0], "Return 2 values (loss, score)"),
    "float32": (
        lambda *x: noise_mask_loss(*(v.float() if v.is_floating_point() else v for v in x)),
        "float32",
    ),
}


# ---- exercise 2 ----------------------------------------------------------------------------------------------


def render_mask(m, G, H, k, sigma):
    rows = torch.arange(H) * G // H
    cells = m.reshape(-1, G, G)[:, rows][:, :, rows]
    weights = torch.exp(-((torch.arange(k) - (k - 1) / 2) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).double().numpy()
    blurred = cells.double().numpy()
    for axis in (1, 2):
        blurred = ndimage.correlate1d(blurred, weights, axis=axis, mode="mirror")
    return torch.as_tensor(blurred, dtype=m.dtype)[:, None]


def wrong_render(mode="nearest", padding="reflect", weigh=None, turn=False, blur=True):
    """Return exercise 2 with another enlargement, padding, kernel or orientation."""

    def function(m, G, H, k, sigma):
        cells = m.reshape(-1, 1, G, G)
        cells = F.interpolate(cells.transpose(2, 3) if turn else cells, (H, H), mode=mode)
        if not blur:
            return cells
        t = torch.arange(k) - k // 2
        weights = (weigh or (lambda t, s: torch.softmax(-(t**2) / (2 * s**2), dim=0)))(t, sigma)
        kernel = torch.outer(weights, weights)[None, None]
        return F.conv2d(F.pad(cells, [k // 2] * 4, mode=padding), kernel)

    return function


RENDER_MISTAKES = {
    "bilinear": (wrong_render(mode="bilinear"), "bilinear"),
    "nearest-exact": (wrong_render(mode="nearest-exact"), "nearest-exact"),
    "columns first": (wrong_render(turn=True), "Rows and columns are exchanged"),
    "zero padding": (wrong_render(padding="constant"), "pads with zeros"),
    "edge repeated": (wrong_render(padding="replicate"), "repeats the edge pixel"),
    "not normalised": (
        wrong_render(weigh=lambda t, s: torch.exp(-(t**2) / (2 * s**2))),
        "not normalised",
    ),
    "two forgotten": (
        wrong_render(weigh=lambda t, s: torch.softmax(-(t**2) / s**2, dim=0)),
        "the 2 is missing",
    ),
    "sigma for its square": (
        wrong_render(weigh=lambda t, s: torch.softmax(-(t**2) / (2 * s), dim=0)),
        "square of sigma is missing",
    ),
    "no blur": (wrong_render(blur=False), "not blurred"),
    "no channel": (lambda *x: render_mask(*x)[:, 0], "must have the shape [1, 1, 4, 4], found [1, 4, 4]"),
    "double": (lambda m, *x: render_mask(m.double(), *x), "must be float32"),
    "mirrored": (lambda *x: render_mask(*x).flip(3), "mask[0, 0, 0, "),
}


# ---- exercise 3 ----------------------------------------------------------------------------------------------


def score_gradient(
    by="a", average=lambda g, n: float(g.sum()) / n, density=beta_log_density, sample="sample", lse=True
):
    """Return exercise 3, or one of its typical mistakes."""

    def function(alpha, beta, D, score, n):
        a, b = (torch.full((n, D), math.log(x)).double().requires_grad_() for x in (alpha, beta))
        draw = getattr(torch.distributions.Beta(a.exp(), b.exp()), sample)
        log_p = density(a, b, draw().clamp(1e-6, 1 - 1e-6))
        value = torch.logsumexp(log_p, dim=1) if score == "lse" and lse else log_p.sum(dim=1)
        (gradient,) = torch.autograd.grad(value.sum(), a if by == "a" else b)
        return average(gradient / (alpha if by == "alpha" else 1), n)

    return function


def alpha_gradient(alpha, beta, D, score, n):
    return score_gradient()(alpha, beta, D, score, n) / alpha


def always_lse(alpha, beta, D, score, n):
    return score_gradient()(alpha, beta, D, "lse", n)


def bare_density(a, b, m):
    return (a.exp() - 1) * m.log() + (b.exp() - 1) * (1 - m).log()


GRADIENT_MISTAKES = {
    "joint for lse": (score_gradient(lse=False), "log of the SUM"),
    "lse for joint": (always_lse, "joint score's mean gradient is 0"),
    "no normaliser": (score_gradient(density=bare_density), "normaliser is missing"),
    "rsample": (score_gradient(sample="rsample"), "passes through the samples"),
    "mean over cells": (score_gradient(average=lambda g, n: float(g.mean())), "mean over the cells"),
    "sum over masks": (
        score_gradient(average=lambda g, n: float(g.sum())),
        "joint score's mean gradient is 0",
    ),
    "minus": (score_gradient(average=lambda g, n: -float(g.sum()) / n), "The sign is wrong"),
    "by alpha": (alpha_gradient, "derivative by alpha"),
    "by b": (score_gradient(by="b"), "derivative by b"),
    "masks shared by the cells": (lambda *x: score_gradient()(*x) + 1.0, "drawn anew"),
    "by image": (score_gradient(average=lambda g, n: g.sum(dim=1)), "Return one number, found Tensor"),
}


# ---- the checks ----------------------------------------------------------------------------------------------


class TestExercises(ExerciseSuite):
    solutions = [
        (check_noise_mask_loss, noise_mask_loss),
        (check_render_mask, render_mask),
        (check_render_mask, wrong_render()),
        (check_expected_score_gradient, score_gradient()),
        (check_expected_score_gradient, score_gradient(average=lambda g, n: g.sum(dim=1).mean())),
    ]
    mistakes = {
        check_noise_mask_loss: LOSS_MISTAKES,
        check_render_mask: RENDER_MISTAKES,
        check_expected_score_gradient: GRADIENT_MISTAKES,
    }
