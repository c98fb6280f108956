"""A plain multilayer perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn


class MLP(nn.Sequential):
    """Linear layers with an activation between them.

    Parameters
    ----------
    sizes : sequence of int
        Inputs, hidden widths, outputs: [4, 64, 64, 2].
    activation : callable
        Returns the module between two layers.
    last_scale : float
        Factor of the last layer's first weights: a small one lets a policy begin near uniform.
    """

    def __init__(
        self, sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.Tanh, *, last_scale: float = 1.0
    ) -> None:
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold at least inputs and outputs, got {list(sizes)}")
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*layers[:-1])
        with torch.no_grad():
            for parameter in layers[-2].parameters():
                parameter.mul_(last_scale)
