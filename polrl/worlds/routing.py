"""Routing: handwritten digits as tokens, k-means centroids as experts, and who processes what."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from polrl import Bars, ImageGrid
from polrl.core.errors import KnobError
from polrl.worlds.digits import load_digits_28

SIDE = 8


@dataclass(frozen=True)
class DigitRouting:
    """m tokens and n experts.

    Attributes
    ----------
    tokens : Tensor, [m, 64]
        Digits of 8 x 8 pixels, from 0 to 1.
    experts : Tensor, [n, 64]
        The centroids of a k-means clustering of the tokens.
    affinity : Tensor, [m, n]
        Cosine similarity of token and expert, from 0 to 1.
    """

    tokens: torch.Tensor
    experts: torch.Tensor
    affinity: torch.Tensor

    @classmethod
    def make(cls, m: int, n: int, seed: int, device: torch.device | str = "cpu") -> DigitRouting:
        """Draw m digits and cluster them into n experts; in float64, where the device has it.

        Raises
        ------
        KnobError
            If there are not as many digits, or more experts than tokens.
        ImportError
            If scikit-learn is not installed.
        """
        from sklearn.cluster import KMeans

        images = load_digits_28("cpu")[0]
        if not 1 <= n <= m <= len(images):
            raise KnobError(
                f"routing needs 1 <= targets <= sources <= {len(images)} (experts, tokens, digits); "
                f"got {n} targets and {m} sources"
            )
        chosen = np.random.default_rng(seed).choice(len(images), m, replace=False)
        small = F.interpolate(images[chosen], size=(SIDE, SIDE), mode="area").flatten(1).double()
        low, high = images.min(), images.max()
        tokens = (small - low) / (high - low)
        found = KMeans(n, n_init=4, random_state=seed).fit(tokens.numpy())
        experts = torch.as_tensor(found.cluster_centers_, dtype=torch.float64)
        affinity = F.normalize(tokens, dim=1) @ F.normalize(experts, dim=1).T
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        return cls(*(part.to(device, dtype) for part in (tokens, experts, affinity)))

    def draw(self, loads: dict[str, torch.Tensor], cap: int) -> Bars:
        """Draw how many tokens each expert [n] has to process, by router, beside the cap."""
        n = len(self.experts)
        return Bars(
            title=f"Tokens per expert (cap {cap})",
            alt=f"Tokens that each of {n} experts processes, by router: {', '.join(loads)}; the cap is {cap}",
            labels=[str(expert + 1) for expert in range(n)],
            values={name: load.double().cpu().numpy() for name, load in loads.items()} | {"cap": np.full(n, cap)},
            y_label="tokens",
        )

    def pictures(self, plan: torch.Tensor, most: int = 12) -> ImageGrid:
        """Draw each expert, and after it the tokens of which it gets most."""
        shown = min(most, len(self.tokens))
        weights, best = plan.topk(shown, dim=0)  # [shown, n]
        tokens = torch.where((weights > 1e-8).unsqueeze(-1), self.tokens[best], 0.0)
        rows = torch.cat([self.experts.unsqueeze(0), tokens]).transpose(0, 1)
        return ImageGrid(
            title="Experts (left) and the tokens they get most of",
            alt=f"In each row an expert, which is a mean digit, and up to {shown} digits that are routed to it",
            images=rows.reshape(len(self.experts), 1 + shown, SIDE, SIDE).cpu().numpy(),
            row_labels=[str(expert + 1) for expert in range(len(self.experts))],
        )


def loads(plan: torch.Tensor) -> torch.Tensor:
    """Return how many tokens each expert [n] processes under a plan [m, n]: its entries above 1e-8."""
    return (plan > 1e-8).sum(dim=0)


def first_choices(scores: torch.Tensor) -> torch.Tensor:
    """Return the routing [m, n], 0 or 1, that sends each token to the expert of its highest score."""
    return F.one_hot(scores.argmax(dim=1), scores.shape[1]).to(scores)


def routed_affinity(plan: torch.Tensor, affinity: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of their affinity to the experts they go to, for a plan and affinities [m, n].

    A token's weights are its row of the plan, scaled so that the plan sums to m; where they exceed 1 together they are
    scaled down to 1, where they fall short the rest of the token is lost.
    """
    weights = len(plan) * plan / plan.sum()
    return (weights / weights.sum(dim=1, keepdim=True).clamp(min=1) * affinity).sum()
