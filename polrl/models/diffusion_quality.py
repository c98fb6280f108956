"""How good samples of a small diffusion model are: right class, near the data's distribution, not all alike."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from polrl.models.diffusion import Ring


class Digits(NamedTuple):
    """Scikit-learn's 8 x 8 digits, pixels in [-1, 1].

    Attributes
    ----------
    train, held_out : Tensor, float32 [1500, 64] and [297, 64]
    train_labels, held_out_labels : Tensor, int64 [1500] and [297]
    """

    train: torch.Tensor
    train_labels: torch.Tensor
    held_out: torch.Tensor
    held_out_labels: torch.Tensor


@functools.lru_cache(maxsize=2)
def load_digits_8(device: str = "cpu") -> Digits:
    """Return the digits, split by a fixed permutation; learners share them, so they are not to be changed in place.

    Raises
    ------
    ImportError
        If scikit-learn, which carries the images, is not installed.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.tensor(images[order] / 8 - 1, dtype=torch.float32, device=device)
    y = torch.tensor(labels[order], dtype=torch.int64, device=device)
    return Digits(x[:1500], y[:1500], x[1500:], y[1500:])


@functools.lru_cache(maxsize=1)
def digit_judge() -> Any:
    """Return a support-vector classifier of the training digits: independent of any network that may be a reward."""
    from sklearn.svm import SVC

    digits = load_digits_8()
    return SVC(C=10, gamma=0.02).fit(digits.train.numpy(), digits.train_labels.numpy())


def digit_accuracy(samples: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the share of digit samples [n, 64] that the independent classifier takes for the class wanted [n]."""
    return float(digit_judge().score(samples.detach().cpu().numpy(), wanted.cpu().numpy()))


def sliced_wasserstein(
    first: torch.Tensor,
    second: torch.Tensor,
    generator: torch.Generator,
    directions: int = 256,
    quantiles: int = 200,
) -> torch.Tensor:
    """Return the sliced Wasserstein-2 distance, a scalar, of two samples [n, d] and [m, d].

    Along each random direction both samples are sorted and compared rank by rank, or by `quantiles` quantiles where
    sizes differ; the root of the mean over directions of the mean squared difference is returned. Even two samples
    of one distribution are not at distance 0: name the floor at the same n beside any figure (`wasserstein_floor`).
    """
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"both samples must have one dimension, got shapes {first.shape} and {second.shape}")
    axis = torch.randn(first.shape[1], directions, generator=generator, device=first.device, dtype=first.dtype)
    axis = axis / axis.norm(dim=0)
    a, b = first @ axis, second @ axis
    if len(a) == len(b):
        a, b = a.sort(dim=0).values, b.sort(dim=0).values
    else:
        middle = (torch.arange(quantiles, device=a.device, dtype=a.dtype) + 0.5) / quantiles
        a, b = a.quantile(middle, dim=0), b.quantile(middle, dim=0)
    return (a - b).square().mean().sqrt()


def wasserstein_floor(
    real: torch.Tensor, other: torch.Tensor, n: int, generator: torch.Generator, repeats: int = 10
) -> torch.Tensor:
    """Return the mean distance of n real points, drawn anew each time, from another real sample [m, d].

    Points are drawn without repetition; `real` must hold at least n.
    """
    if not 1 <= n <= len(real):
        raise ValueError(f"n must be from 1 to the {len(real)} real points, got {n!r}")
    distances = []
    for _ in range(repeats):
        chosen = torch.randperm(len(real), generator=generator, device=real.device)[:n]
        distances.append(sliced_wasserstein(real[chosen], other, generator))
    return torch.stack(distances).mean()


def pixel_std(images: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation over images [n, d], the mean over pixels: 0.46 for the real digits."""
    return images.std(dim=0).mean()


class RingQuality(NamedTuple):
    """Where points of the ring landed; all scalars.

    Attributes
    ----------
    wanted : Tensor
        Share whose nearest centre is the wanted one.
    spread : Tensor
        Root of the mean squared distance to the nearest centre, by that of the data, std * sqrt(2).
    off : Tensor
        Share farther than `far` from every centre.
    shares : Tensor, [K]
        Share nearest to each centre.
    """

    wanted: torch.Tensor
    spread: torch.Tensor
    off: torch.Tensor
    shares: torch.Tensor


def ring_quality(points: torch.Tensor, wanted: torch.Tensor, ring: Ring | None = None, far: float = 0.6) -> RingQuality:
    """Judge points [n, 2] that were asked for classes wanted [n] (the null class is never nearest)."""
    ring = Ring() if ring is None else ring
    distance, nearest = torch.cdist(points, ring.centres(points)).min(dim=1)
    return RingQuality(
        wanted=(nearest == wanted).to(points.dtype).mean(),
        spread=distance.square().mean().sqrt() / (ring.std * math.sqrt(2)),
        off=(distance > far).to(points.dtype).mean(),
        shares=torch.bincount(nearest, minlength=ring.classes) / len(points),
    )


def class_spread(points: torch.Tensor, y: torch.Tensor, kept: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the standard deviation, a scalar, of points [n, d] around their own class's mean.

    Only points with `kept`, bool [n], count; the mean over dimensions and points is taken of squares, and a class
    with m points counts as m - 1.

    Returns
    -------
    Tensor
        0 where no class has two points.
    """
    weight = kept.to(points.dtype).unsqueeze(1)
    count = torch.zeros(classes, 1, dtype=points.dtype, device=points.device).index_add(0, y, weight)
    total = torch.zeros(classes, points.shape[1], dtype=points.dtype, device=points.device)
    mean = total.index_add(0, y, weight * points) / count.clamp(min=1)
    squares = (weight * (points - mean[y]).square()).sum() / points.shape[1]
    return (squares / (count - 1).clamp(min=0).sum().clamp(min=1)).sqrt()
