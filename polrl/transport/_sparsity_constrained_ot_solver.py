"""The solver of sparsity-constrained, quadratic and entropic transport: closed forms, L-BFGS and Adam.

The method's file says what is computed; here it is computed fast. A plan's columns lie contiguous in memory and are
worked on in blocks that fit a processor's cache. Nothing is sorted whole: only a column's k best entries are searched,
and the potential that closes a column (E6's threshold, in other units) is found by Newton's method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from polrl.core.errors import unknown_name

REGULARIZERS = ("k_sparse", "quadratic", "entropic")
FORMULATIONS = ("semi_dual", "dual")
SOLVERS = ("lbfgs", "adam")
#: Numbers worked on at once: half a megabyte in float64.
BLOCK = 2**16
#: Beyond it the exponential of E9 goes on as its tangent, in the solver only: a long step of the line search stays
#: finite. No optimal plan has an entry there.
LARGEST_EXPONENT = 30.0


class Objective:
    """What is maximised, the dual (E3) or the semi-dual (E5), with its gradient in closed form.

    Parameters
    ----------
    cost : Tensor, [m, n]
    a, b : Tensor, [m] and [n]
    gamma : float
    max_nz : int
        k; "quadratic" and "entropic" have no cap and don't look at it.
    formulation : {"semi_dual", "dual"}
    regularizer : {"k_sparse", "quadratic", "entropic"}
    """

    def __init__(
        self,
        cost: Tensor,
        a: Tensor,
        b: Tensor,
        *,
        gamma: float,
        max_nz: int,
        formulation: str = "semi_dual",
        regularizer: str = "k_sparse",
    ) -> None:
        self.columns = cost.detach().T.contiguous()
        self.a, self.b, self.gamma = a.detach(), b.detach(), gamma
        m, n = cost.shape
        self.top = max_nz if regularizer == "k_sparse" and max_nz < m else 0  # 0: no cap
        self.entropic, self.semi = regularizer == "entropic", formulation == "semi_dual"
        self.size = m if self.semi else m + n
        at_once = max(1, min(n, BLOCK // m))
        self.blocks = [slice(start, min(n, start + at_once)) for start in range(0, n, at_once)]
        self.buffer = self.columns.new_empty(at_once, m)
        self.ones = self.columns.new_ones(at_once)
        self.ranks = torch.arange(1, self.top + 1).to(self.columns)
        self.zero = self.a.new_zeros(())
        self.masses = torch.cat([self.a, self.b])
        self.closed: dict[int, Tensor] = {}  # the thresholds found last, by first column: where Newton's method begins

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return value and gradient [size] at alpha [m] (semi-dual) or alpha and beta in one [m + n] (dual)."""
        rows, conjugate = torch.zeros_like(self.a), self.zero
        betas: list[Tensor] = []
        columns: list[Tensor] = []
        for _, r, beta, part, where in self._parts(x):
            if where is None:
                rows.addmv_(r.T, self.ones if len(r) == len(self.ones) else self.ones[: len(r)])
            else:
                rows.index_add_(0, where.flatten(), r.flatten())
            conjugate = conjugate + part
            betas.append(beta)
            if not self.semi:
                columns.append(r.sum(dim=1))
        if self.semi:
            value = x.dot(self.a) + _joined(betas).dot(self.b)
            return value - conjugate, torch.sub(self.a, rows, alpha=1 / self.gamma)
        return x.dot(self.masses) - conjugate, torch.sub(self.masses, torch.cat([rows, *columns]), alpha=1 / self.gamma)

    def plan(self, x: Tensor) -> Tensor:
        """Return the plan [m, n] that belongs to the variables."""
        T = torch.zeros_like(self.columns)
        for block, r, _, _, where in self._parts(x):
            T[block] = r if where is None else T[block].scatter(1, where, r)
        return T.div_(self.gamma).T

    def potentials(self, x: Tensor) -> Tensor:
        """Return alpha and beta in one [m + n]; the semi-dual's beta is the one that gives columns their mass."""
        return torch.cat([x[: len(self.a)], *(beta for _, _, beta, _, _ in self._parts(x))])

    def _parts(self, x: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor | None]]:
        """Yield for some columns at a time: which; gamma times their plan [B, entries], until the next overwrites it;
        their beta [B]; their conjugates' sum; and the rows of the entries, or None for all.

        With a cap all columns come at once, since only k entries of each are left.
        """
        parts: Iterable[tuple[slice, Tensor, Tensor | None]]
        if self.top:
            best = [self._differences(x, block).topk(self.top, dim=1) for block in self.blocks]
            parts = [(slice(0, len(self.b)), _joined([u for u, _ in best]), _joined([where for _, where in best]))]
        else:
            parts = ((block, self._differences(x, block), None) for block in self.blocks)
        for block, s, where in parts:
            beta = self._close(s, block) if self.semi else x[len(self.a) + block.start : len(self.a) + block.stop]
            s.add_(beta.unsqueeze(1))
            if self.entropic:
                exponent = s.div_(self.gamma).sub_(1)
                beyond = (exponent - LARGEST_EXPONENT).clamp_(min=0).add_(1)
                r = exponent.clamp_(max=LARGEST_EXPONENT).exp_().mul_(self.gamma)
                yield block, r, beta, r.flatten().dot(beyond.flatten()), None
            else:
                r = s.clamp_(min=0)
                flat = r.view(-1)
                yield block, r, beta, flat.dot(flat) / (2 * self.gamma), where

    def _differences(self, x: Tensor, block: slice) -> Tensor:
        """Return alpha - c of some columns [B, m], until the next block overwrites it."""
        if len(self.blocks) == 1:  # small problems are all overhead
            return torch.sub(x[: len(self.a)], self.columns, out=self.buffer)
        return torch.sub(x[: len(self.a)], self.columns[block], out=self.buffer[: block.stop - block.start])

    def _close(self, s: Tensor, block: slice) -> Tensor:
        """Return the beta [B] with which each column, from alpha - c [B, entries], carries its mass exactly."""
        mass = self.b[block]
        if self.entropic:
            return self.gamma * (mass.log() + 1 - (s / self.gamma).logsumexp(dim=1))
        if self.top:  # sorted: each rank's tangent has its root at (sum so far - mass) / rank, the largest is the root
            return -s.cumsum(dim=1).sub_(self.gamma * mass.unsqueeze(1)).div_(self.ranks).amax(dim=1)
        self.closed[block.start] = threshold(s, self.gamma * mass, self.closed.get(block.start))
        return -self.closed[block.start]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def threshold(s: Tensor, mass: Tensor, start: Tensor | None = None) -> Tensor:
    """Return the number in each row [B] by which s [B, entries] must fall for its positive part to sum to mass [B].

    The sum is convex and piecewise linear in that number, so Newton's method gets below the root with its first step,
    climbs from there, and ends exactly as soon as a step leaves the set of positive entries unchanged.
    """
    highest = s.amax(dim=1)
    found = highest - mass  # below the root, as one entry alone carries the mass there
    if start is not None:
        found = torch.where(start < highest, start, found)
    ones, before = s.new_ones(s.shape[1]), None
    for _ in range(s.shape[1] + 2):
        left = (s - found.unsqueeze(1)).clamp_(min=0)
        excess = left @ ones - mass
        count = left.sign_() @ ones
        found = found + excess / count
        if before is not None and torch.equal(count, before):
            break
        before = count
    return found


@dataclass(frozen=True)
class Plan:
    """What a solver found.

    Attributes
    ----------
    T : Tensor, float64 [m, n]
        The plan: how much mass goes from each row's source to each column's target.
    alpha, beta : Tensor, float64 [m] and [n]
        The potentials.
    value : Tensor, float64 []
        The dual (or semi-dual) value at them.
    primal : Tensor, float64 []
        E1's cost of the plan, its regularization included.
    gap : Tensor, float64 []
        `primal - value`, the certificate. If the plan's marginals are right it is never negative but for rounding,
        and zero proves that plan and potentials are optimal.
    row_error, column_error : Tensor, float64 []
        Sums of |T 1 - a| and |T' 1 - b|.
    iterations : int
    converged : bool
        False if `max_iter` ended it.
    """

    T: Tensor
    alpha: Tensor
    beta: Tensor
    value: Tensor
    primal: Tensor
    gap: Tensor
    row_error: Tensor
    column_error: Tensor
    iterations: int
    converged: bool

    def non_zeros(self, above: float = 1e-8) -> Tensor:
        """Return how many entries of each column [n] are larger than `above`."""
        return (self.T > above).sum(dim=0)


def solve(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    gamma: float,
    max_nz: int | None = None,
    formulation: str = "semi_dual",
    solver: str = "lbfgs",
    tol: float = 1e-9,
    max_iter: int = 5000,
    regularizer: str = "k_sparse",
    start: Plan | None = None,
) -> Plan:
    """Find the transport plan with at most `max_nz` non-zeros in each column.

    Parameters
    ----------
    cost : Tensor, [m, n]
        Best scaled to a largest entry of about 1.
    a, b : Tensor, [m] and [n]
        Positive masses of the sources (rows) and targets (columns), of equal sums.
    gamma : float
        Strength of the quadratic (or entropic) term, above 0.
    max_nz : int, optional
        k, from 1 to m; m, no cap, if not given.
    formulation : {"semi_dual", "dual"}
        E5, over alpha, whose columns are always exact; or E3, over both potentials.
    solver : {"lbfgs", "adam"}
        scipy's L-BFGS-B, or `max_iter` steps of Adam with a rate that falls from 0.03 to 0, of which the best point is
        kept: for small k, where the optimum lies on a kink and L-BFGS may stop before it.
    tol : float
        L-BFGS ends at a relative change of the value, or a largest entry of the gradient, below it; Adam at such an
        entry.
    max_iter : int
    regularizer : {"k_sparse", "quadratic", "entropic"}
    start : Plan, optional
        A warm start.

    Returns
    -------
    Plan
        Computed in float64, on the device of `cost` (in float32 where the device has no float64).

    Raises
    ------
    ValueError
        If shapes, masses, costs or numbers are not as above; the message names what is wrong.
    UnknownNameError
        If formulation, solver or regularizer is none of the above.

    Notes
    -----
    If n times k is below m no plan with that cap has the right rows: the potentials solve the relaxation, and the plan
    drops sources. For k above 1 the row error can stay at some hundredths although the value is right to five digits,
    because the optimum lies on a kink: look at `row_error` before using the plan.

    Examples
    --------
    >>> a = torch.full((4,), 0.25, dtype=torch.float64)
    >>> cost = 1 - torch.eye(4, dtype=torch.float64)
    >>> solve(cost, a, a, gamma=1.0, max_nz=2).T.diagonal()
    tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    for kind, name, known in (
        ("formulation", formulation, FORMULATIONS),
        ("solver", solver, SOLVERS),
        ("regularizer", regularizer, REGULARIZERS),
    ):
        if name not in known:
            raise unknown_name(kind, name, known)
    cost, a, b = checked_problem(cost, a, b)
    k = checked_strengths(cost, gamma, max_nz, tol, max_iter)
    objective = Objective(cost, a, b, gamma=gamma, max_nz=k, formulation=formulation, regularizer=regularizer)
    x = cost.new_zeros(objective.size)
    if start is not None:
        if start.T.shape != cost.shape:
            raise ValueError(
                f"start must come from a problem of shape {list(cost.shape)}, its T is {list(start.T.shape)}"
            )
        x = torch.cat([start.alpha, start.beta]).to(cost)[: objective.size]
    ascend = {"lbfgs": lbfgs, "adam": adam}[solver]
    x, iterations = ascend(objective, x, tol, max_iter)
    return describe(objective, x, cost, iterations, converged=iterations < max_iter)


def describe(objective: Objective, x: Tensor, cost: Tensor, iterations: int = 0, converged: bool = False) -> Plan:
    """Return the plan that belongs to the variables of an objective, with what can be said of it."""
    T, potentials, value = objective.plan(x), objective.potentials(x), objective(x)[0]
    primal = (T * cost).sum() + penalty(T, objective.gamma, objective.entropic)
    return Plan(
        T=T,
        alpha=potentials[: len(T)],
        beta=potentials[len(T) :],
        value=value,
        primal=primal,
        gap=primal - value,
        row_error=(T.sum(dim=1) - objective.a).abs().sum(),
        column_error=(T.sum(dim=0) - objective.b).abs().sum(),
        iterations=iterations,
        converged=converged,
    )


def penalty(T: Tensor, gamma: float, entropic: bool = False) -> Tensor:
    """Return what regularizes a plan: gamma times half its squares' sum, or its negative entropy."""
    return gamma * (torch.xlogy(T, T).sum() if entropic else (T**2).sum() / 2)


def lbfgs(objective: Objective, x: Tensor, tol: float, max_iter: int) -> tuple[Tensor, int]:
    """Climb by scipy's L-BFGS-B; returns the variables and the number of iterations."""
    from scipy.optimize import minimize

    def negative(point: object) -> tuple[float, object]:
        value, gradient = objective(torch.as_tensor(point).to(x))
        return -value.item(), gradient.neg_().cpu().double().numpy()

    limits = {"maxiter": max_iter, "maxfun": 20 * max_iter, "ftol": tol, "gtol": tol}
    with torch.inference_mode():  # nothing is differentiated, and small problems gain a fifth
        found = minimize(negative, x.cpu().double().numpy(), jac=True, method="L-BFGS-B", options=limits)
    return torch.as_tensor(found.x).to(x), int(found.nit)


def adam(objective: Objective, x: Tensor, tol: float, max_iter: int, rate: float = 0.03) -> tuple[Tensor, int]:
    """Climb by Adam with a rate that falls to 0; returns the best variables met and the number of steps."""
    climber = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.Adam([climber], lr=rate)
    best, best_value = x, -math.inf
    for step in range(max_iter):
        value, gradient = objective(climber.detach())
        if float(value) > best_value:
            best, best_value = climber.detach().clone(), float(value)
        if bool(gradient.abs().max() <= tol):
            return best, step
        optimizer.param_groups[0]["lr"] = rate * (1 - step / max_iter)
        climber.grad = -gradient
        optimizer.step()
    return (climber.detach() if float(objective(climber.detach())[0]) > best_value else best), max_iter


def checked_problem(cost: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return cost and masses as tensors the solver can use, or say what is wrong with them."""
    device = cost.device if isinstance(cost, Tensor) else torch.device("cpu")
    cost = torch.as_tensor(cost, dtype=torch.float32 if device.type == "mps" else torch.float64).detach()
    if cost.dim() != 2 or not cost.numel():
        raise ValueError(f"cost must have shape [m, n], got {list(cost.shape)}")
    if not bool(cost.isfinite().all()):
        raise ValueError(f"cost must be finite; entry {_first(~cost.isfinite())} is {_entry(cost, ~cost.isfinite())}")
    masses = []
    for name, given, size in (("a", a, cost.shape[0]), ("b", b, cost.shape[1])):
        mass = torch.as_tensor(given, dtype=cost.dtype, device=cost.device).detach()
        if mass.shape != (size,):
            raise ValueError(
                f"{name} must have shape [{size}] beside a cost {list(cost.shape)}, got {list(mass.shape)}"
            )
        bad = ~((mass > 0) & mass.isfinite())
        if bool(bad.any()):
            raise ValueError(
                f"{name} must be positive and finite; entry {_first(bad)} is {_entry(mass, bad)}"
                + (" (leave a source or target without mass out)" if _entry(mass, bad) == 0 else "")
            )
        masses.append(mass)
    sums = [float(mass.sum()) for mass in masses]
    if abs(sums[0] - sums[1]) > 1e-6 * max(sums):
        raise ValueError(f"a and b must have equal sums, got {sums[0]:.9g} and {sums[1]:.9g}")
    return cost, masses[0], masses[1]


def _first(where: Tensor) -> list[int]:
    return [int(i) for i in where.nonzero()[0]]


def _entry(values: Tensor, where: Tensor) -> float:
    return float(values[where][0])


def checked_strengths(cost: Tensor, gamma: float, max_nz: int | None, tol: float, max_iter: int) -> int:
    """Return k, or say which number can't be used."""
    m = len(cost)
    checked_cap(m, max_nz)
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be above 0 and finite, got {gamma!r}")
    if not (tol > 0 and math.isfinite(tol)):
        raise ValueError(f"tol must be above 0 and finite, got {tol!r}")
    if isinstance(max_iter, bool) or not isinstance(max_iter, int) or max_iter < 1:
        raise ValueError(f"max_iter must be a whole number of at least 1, got {max_iter!r}")
    return m if max_nz is None else max_nz


def checked_cap(m: int, max_nz: int | None) -> None:
    """Refuse a cap k that is not a whole number from 1 to m."""
    if max_nz is not None and (isinstance(max_nz, bool) or not isinstance(max_nz, int) or not 1 <= max_nz <= m):
        raise ValueError(f"max_nz must be a whole number from 1 to m = {m}, the number of rows; got {max_nz!r}")
