"""Scikit-learn's handwritten digits as 28 x 28 images: what a network that has never seen a digit makes of them."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F


@functools.lru_cache(maxsize=4)
def load_digits_28(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images [1797, 1, 28, 28], normalised to mean 0 and standard deviation 1, and labels [1797].

    Raises
    ------
    ImportError
        If scikit-learn, which carries the images, is not installed.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    return ((large - large.mean()) / large.std()).to(device), torch.tensor(labels, device=device)


def linear_probe(features: torch.Tensor, labels: torch.Tensor, per_class: int, seed: int = 0) -> float:
    """Fit a linear classifier on `per_class` examples of each class and return its accuracy on the rest.

    Parameters
    ----------
    features : Tensor, [N, d]
    labels : Tensor, int64 [N]
    per_class : int
    seed : int
        Which examples are taken for fitting.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x, y = features.detach().cpu()[order], labels.cpu()[order]
    place = torch.zeros_like(y)
    for label in y.unique():
        own = y == label
        place[own] = torch.arange(int(own.sum()))
    fit = place < per_class
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(x[fit].numpy(), y[fit].numpy())
    return float(probe.score(x[~fit].numpy(), y[~fit].numpy()))
