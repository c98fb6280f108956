"""Two clouds of points in the plane, the cost of moving mass from one to the other, and what it costs at best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from polrl import Lines
from polrl.core.errors import DataError

#: An edge is drawn as heavy if it carries at least this share of its column's mass.
HEAVY = 0.3


@dataclass(frozen=True)
class PointClouds:
    """m sources from N(0, I), n targets from a smaller cloud beside it, all of equal weight.

    Attributes
    ----------
    sources, targets : Tensor, [m, 2] and [n, 2]
    cost : Tensor, [m, n]
        Squared distances, divided by their largest.
    a, b : Tensor, [m] and [n]
        Weights, each summing to one.
    """

    sources: torch.Tensor
    targets: torch.Tensor
    cost: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor

    @classmethod
    def make(cls, m: int, n: int, seed: int, device: torch.device | str = "cpu") -> PointClouds:
        """Draw the clouds of a seed; in float64, where the device has it."""
        draw = np.random.default_rng(seed)
        sources = draw.normal(size=(m, 2))
        targets = 0.6 * draw.normal(size=(n, 2)) + 1.0
        cost = ((sources[:, None] - targets[None]) ** 2).sum(axis=-1)
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        parts = (sources, targets, cost / cost.max(), np.full(m, 1 / m), np.full(n, 1 / n))
        return cls(*(torch.as_tensor(part).to(device, dtype) for part in parts))

    def draw(self, plan: torch.Tensor, title: str = "The plan as a graph") -> Lines:
        """Draw a plan [m, n] as a graph: a line from source to target for each entry above 1e-8."""
        x, y = self.sources.cpu().numpy(), self.targets.cpu().numpy()
        mass = (plan / plan.sum(dim=0)).nan_to_num().cpu().numpy()
        curves = {
            "light edges": _edges(x, y, (mass > 1e-8) & (mass < HEAVY)),
            "heavy edges": _edges(x, y, mass >= HEAVY),
            "sources": _marks(x, [(0.0, -0.05), (0.0, 0.05), (np.nan, np.nan), (-0.05, 0.0), (0.05, 0.0)]),
            "targets": _marks(y, [(0, -0.05), (0.05, 0), (0, 0.05), (-0.05, 0), (0, -0.05)]),
        }
        sizes = [len(curve) for curve in curves.values()]
        ends = np.cumsum(sizes)
        along = np.concatenate(list(curves.values()))
        lines = {}
        for name, size, end in zip(curves, sizes, ends, strict=True):
            lines[name] = np.full(ends[-1], np.nan)
            lines[name][end - size : end] = along[end - size : end, 1]
        count = int((plan > 1e-8).sum())
        return Lines(
            title=title,
            alt=f"Sources (crosses) and targets (diamonds) in the plane, joined by the {count} edges of the plan; "
            f"heavy ones carry at least {HEAVY:.0%} of their target's mass",
            x=np.nan_to_num(along[:, 0]),
            y=lines,
        )


def _edges(x: np.ndarray, y: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return one path [3 per edge, 2] along the edges of a matrix, broken after each."""
    rows, columns = where.nonzero()
    return np.stack([x[rows], y[columns], np.full((len(rows), 2), np.nan)], axis=1).reshape(-1, 2)


def _marks(points: np.ndarray, shape: list[tuple[float, float]]) -> np.ndarray:
    """Return one path that draws a small shape at each point."""
    corners = np.array([*shape, (np.nan, np.nan)], dtype=np.float64)
    return (points[:, None] + corners).reshape(-1, 2)


def exact_transport(
    cost: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve the unregularized problem as a linear programme.

    Parameters
    ----------
    cost : Tensor, [m, n]
    a, b : Tensor, [m] and [n]
        Of equal sums.

    Returns
    -------
    (float, Tensor [m, n], Tensor [m], Tensor [n])
        The least cost, a plan that attains it, and potentials of rows and columns that prove it.

    Raises
    ------
    DataError
        If there is no plan (the sums of a and b differ, say).
    """
    import scipy.sparse as sp
    from scipy.optimize import linprog

    m, n = cost.shape
    rows, columns = sp.kron(sp.eye(m), np.ones((1, n))), sp.kron(np.ones((1, m)), sp.eye(n))
    masses = torch.cat([a, b]).double().cpu().numpy()
    flat = cost.double().cpu().numpy().ravel()
    found = linprog(flat, A_eq=sp.vstack([rows, columns]).tocsr(), b_eq=masses, method="highs")
    if not found.success:
        raise DataError(f"the transport problem has no solution: {found.message}")
    plan, potentials = (torch.as_tensor(part).to(cost) for part in (found.x.reshape(m, n), found.eqlin.marginals))
    return float(found.fun), plan, potentials[:m], potentials[m:]
