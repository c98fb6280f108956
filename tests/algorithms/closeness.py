"""What tests of equations share: reproducible numbers in float64, and how close two results must be."""

from __future__ import annotations

from typing import Any

import torch


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return standard normal numbers, float64, always the same for one seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Compare shapes and values in float64, whatever both came as: tensors, lists or numbers."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
