"""Small convolutional networks for images of 28 x 28 pixels."""

from __future__ import annotations

import torch
from torch import nn


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3 x 3 convolution, batch norm, ReLU; the batch norm makes a bias needless."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class ConvNet(nn.Module):
    """Three convolutions with two max-pools between them, global average pool, linear.

    Parameters
    ----------
    width : int
        Channels of the first convolution; the others have twice and four times as many.
    classes : int
        Logits.

    Examples
    --------
    >>> ConvNet(width=8, classes=36)(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 36])
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(1, width),
            nn.MaxPool2d(2),
            convolution(width, 2 * width),
            nn.MaxPool2d(2),
            convolution(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(4 * width, classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on a CPU

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images [B, 1, H, W] to logits [B, classes]."""
        return self.head(self.features(images))


class TwoHeadedPolicy(nn.Module):
    """A shared encoder of two strided convolutions, and two heads of three linear layers each.

    Parameters
    ----------
    outputs : int
        Numbers that each head returns.
    features : int
        Width of the encoder's output and of the heads' hidden layers.
    """

    def __init__(self, outputs: int, features: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            convolution(1, 8, stride=2),
            convolution(8, features, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.first, self.second = _head(features, outputs), _head(features, outputs)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Map images [B, 1, H, W] to two tensors [B, outputs]."""
        features = self.encoder(images)
        return self.first(features), self.second(features)


def _head(features: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(features, features), nn.BatchNorm1d(features), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(features, outputs))
