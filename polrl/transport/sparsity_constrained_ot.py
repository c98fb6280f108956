r"""Sparsity-constrained optimal transport: at most k non-zeros in each column of the plan, exactly.

A transport plan says how much of each source (row) goes to each target (column). Entropic regularization (Sinkhorn)
makes it dense: everything goes everywhere a little. Quadratic regularization makes it sparse, but how sparse can only
be nudged through its strength. Where the plan is a router, from tokens to experts, the non-zeros of a column ARE what
its expert has to compute, so they need a hard cap. The paper adds one, "at most k non-zeros in each column", to the
quadratic term. The primal is then no longer convex, but dual and semi-dual stay concave, cost a top-k per column, and
yield to L-BFGS. k leads from unregularized transport (k = 1) to quadratic transport (k = m); a larger k makes the dual
smoother, so sparsity is paid for in iterations.

Liu, Puigcerver and Blondel, arXiv 2209.15466. All of E1 to E10 are below; E8 is a limit that holds exactly, E9 the
baselines, E10 the use as a router. Columns are capped: transpose the problem to cap rows. Where several entries tie at
the k-th place any choice is a valid super-gradient; `topk` makes one. The optimum for small k often lies on such a
kink; then value and potentials are right but the plan's rows are not, which the row error shows and nothing here hides.
Equations are written for reading, in any float dtype; `solve` evaluates the same by faster means, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

import polrl
from polrl import Bars, Budget, Criterion, Curve, Heatmap, Learner, Metrics, Study, View, equation, knob
from polrl.core.errors import unknown_name
from polrl.core.schedules import linear_decay
from polrl.transport._sparsity_constrained_ot_solver import (
    Objective,
    Plan,
    checked_cap,
    describe,
    lbfgs,
    penalty,
    solve,
)
from polrl.worlds.point_clouds import PointClouds, exact_transport
from polrl.worlds.routing import DigitRouting, first_choices, loads, routed_affinity

__all__ = ["Config", "Objective", "Plan", "SparsityConstrainedOT", "solve", "study", "transport_cost"]


class Config(polrl.Config):
    """Settings of the method; the seed chooses the points, or the digits."""

    world: Literal["clouds", "routing"] = Field("clouds", description="points in the plane, or digits to experts")
    sources: int = Field(32, ge=2, le=512, description="rows m: points, or tokens")
    targets: int = Field(32, ge=2, le=512, description="columns n: points, or experts")
    decay: int = Field(1500, ge=1, description="steps in which Adam's rate falls to 0")

    max_nz: int = knob(
        4, low=1, high="sources", scale="log", symbol="k", first=True,
        help="most non-zeros in each column",
        at_low="unregularized transport: not smooth, slow", at_high="quadratic transport: smooth, fast, more non-zeros",
    )  # fmt: skip
    gamma: float = knob(
        10.0, low=1e-3, high=1e2, scale="log", symbol=r"\gamma", paper=1.0,
        help="strength of the quadratic or entropic term; costs are at most 1",
        at_low="the cap no longer binds: plans of few, large entries",
        at_high="every column spreads evenly over k rows",
    )  # fmt: skip
    regularizer: Literal["k_sparse", "quadratic", "entropic"] = knob(
        "k_sparse", help="what regularizes the plan; only k_sparse has a cap"
    )
    capacity: float = knob(
        1.25, low=0.25, high=10.0, scale="log", help="routing: the cap is at most capacity * tokens / experts",
        at_low="tokens are dropped", at_high="experts may be overloaded",
    )  # fmt: skip
    formulation: Literal["semi_dual", "dual"] = knob(
        "semi_dual", help="maximise over the rows' potentials (columns always exact), or over both"
    )
    solver: Literal["lbfgs", "adam"] = knob(
        "lbfgs", help="a few iterations of L-BFGS a step, or one ascent step of Adam"
    )
    max_iter: int = knob(3, low=1, high=5000, scale="log", help="L-BFGS: iterations a step, with warm start", paper=500,
        at_low="watch it converge", at_high="solved in one step")  # fmt: skip
    tol: float = knob(1e-9, low=1e-10, high=1e-4, scale="log", help="L-BFGS: when a step ends before that",
        at_low="exact", at_high="stops early, wrong rows")  # fmt: skip
    learning_rate: float = knob(0.03, low=1e-3, high=0.3, scale="log", help="Adam: its rate, before it decays",
        at_low="slow", at_high="jumps about the optimum")  # fmt: skip


@equation(
    "E1",
    r"P_k=\min_{T\ge0,\;T1_n=a,\;T^\top1_m=b,\;\|t_j\|_0\le k}\ \langle T,C\rangle+\tfrac\gamma2\|T\|_F^2",
    source="main problem",
)
def primal(T: Tensor, C: Tensor, gamma: float, regularizer: str = "k_sparse") -> Tensor:
    """Return what E1 minimises, for a plan and costs [m, n]; for "entropic" the last term is gamma sum T log T."""
    _cap(regularizer, len(T), len(T))
    return (T * C).sum() + penalty(T, gamma, regularizer == "entropic")


@equation(
    "E2",
    r"\delta_k(s)=\max_{t\ge0,\,\|t\|_0\le k}\langle s,t\rangle-\tfrac\gamma2\|t\|^2=\frac1{2\gamma}\sum_{i=1}^k"
    r"[s_{[i]}]_+^2,\qquad\nabla\delta_k(s)=\tfrac1\gamma[\mathrm{top}_k(s)]_+",
    source="ot/smooth.py, delta_Omega",
)
def conjugate(s: Tensor, gamma: float, k: int) -> tuple[Tensor, Tensor]:
    """Return the conjugate of each column of s [m, n], as [n], and its gradient [m, n], a plan's columns."""
    checked_cap(len(s), k)
    best, where = s.topk(k, dim=0)
    best = best.clamp(min=0)
    return (best**2).sum(dim=0) / (2 * gamma), torch.zeros_like(s).scatter(0, where, best / gamma)


@equation(
    "E9",
    r"\delta(s)=\gamma\sum_ie^{s_i/\gamma-1},\qquad\nabla\delta(s)=e^{s/\gamma-1}",
    source="ot/smooth.py, NegEntropy",
)
def entropic_conjugate(s: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return Sinkhorn's conjugate of each column of s [m, n], as [n], and its gradient [m, n]: no zeros anywhere."""
    t = (s / gamma - 1).exp()
    return gamma * t.sum(dim=0), t


@equation(
    "E3",
    r"D_k=\max_{\alpha,\beta}\ \langle\alpha,a\rangle+\langle\beta,b\rangle-\sum_j\delta_k(S_{:j}),\quad "
    r"S=\alpha1^\top+1\beta^\top-C,\quad T_{:j}=\nabla\delta_k(S_{:j}),\quad\nabla_\alpha=a-T1,\ "
    r"\nabla_\beta=b-T^\top1",
    source="ot/smooth.py, dual_obj_grad",
)
def dual(
    alpha: Tensor, beta: Tensor, a: Tensor, b: Tensor, C: Tensor, gamma: float, k: int, regularizer: str = "k_sparse"
) -> tuple[Tensor, Tensor]:
    """Return the dual value, to be maximised, and the plan [m, n] of potentials [m] and [n].

    "quadratic" is k = m, "entropic" takes E9 for E2; neither looks at k. Autograd of the value gives a - T 1, b - T' 1
    and T by C.
    """
    s = alpha[:, None] + beta[None, :] - C
    cap = _cap(regularizer, k, len(s))
    delta, T = conjugate(s, gamma, cap) if cap else entropic_conjugate(s, gamma)
    return alpha @ a + beta @ b - delta.sum(), T


def _cap(regularizer: str, k: int, m: int) -> int:
    """Return how many non-zeros a column may have; 0 for entropic plans, which have no zeros."""
    caps = {"k_sparse": k, "quadratic": m, "entropic": 0}
    if regularizer not in caps:
        raise unknown_name("regularizer", regularizer, caps)
    checked_cap(m, k if regularizer == "k_sparse" else m)
    return caps[regularizer]


@equation(
    "E6",
    r"\rho=\#\Big\{i\le k:\ u_i>\frac{\sum_{l\le i}u_l-1}i\Big\},\quad\theta=\frac{\sum_{l\le\rho}u_l-1}\rho,\quad "
    r"y_i=[z_i-\theta]_+\text{ on the }k\text{ largest},\ 0\text{ elsewhere}",
    source="ot/utils.py, projection_sparse_simplex",
)
def topk_simplex_projection(z: Tensor, k: int) -> Tensor:
    """Return the nearest point of the simplex with at most k non-zeros, for z [m] or each column of z [m, n]."""
    checked_cap(len(z), k)
    u, where = z.topk(k, dim=0)
    ranks = torch.arange(1, k + 1, dtype=z.dtype, device=z.device).reshape(-1, *[1] * (z.dim() - 1))
    means = (u.cumsum(dim=0) - 1) / ranks
    rho = (u > means).sum(dim=0, keepdim=True)
    theta = means.gather(0, rho - 1)
    return torch.zeros_like(z).scatter(0, where, (u - theta).clamp(min=0))


@equation(
    "E4",
    r"v_j=\max_{y\in\Delta^m_k}\langle s,y\rangle-\tfrac{\gamma b_j}2\|y\|^2,\qquad "
    r"y_j^\star=\mathrm{proj}_{\Delta_k}\big(s/(\gamma b_j)\big)",
    source="ot/smooth.py, max_Omega",
)
def simplex_conjugate(s: Tensor, b: Tensor, gamma: float, k: int) -> tuple[Tensor, Tensor]:
    """Return v [n] and y [m, n] for columns s [m, n] of masses b [n]; y's columns sum to one."""
    y = topk_simplex_projection(s / (gamma * b), k)
    return (s * y).sum(dim=0) - gamma * b / 2 * (y**2).sum(dim=0), y


@equation(
    "E9b",
    r"v_j=\gamma\log\sum_ie^{s_i/\gamma}-\gamma\log b_j,\qquad y_j^\star=\mathrm{softmax}(s/\gamma)",
    source="ot/smooth.py, NegEntropy",
)
def entropic_simplex_conjugate(s: Tensor, b: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Return E4's v [n] and y [m, n] with the negative entropy of t = b y in the quadratic term's place."""
    return gamma * ((s / gamma).logsumexp(dim=0) - b.log()), (s / gamma).softmax(dim=0)


@equation(
    "E5",
    r"D_k=\max_\alpha\ \langle\alpha,a\rangle-\sum_jb_j\,v_j(\alpha),\qquad s=\alpha-c_j,\qquad "
    r"T_{:j}=b_j\,y_j^\star,\qquad\nabla_\alpha=a-T1",
    source="ot/smooth.py, semi_dual_obj_grad",
)
def semi_dual(
    alpha: Tensor, a: Tensor, b: Tensor, C: Tensor, gamma: float, k: int, regularizer: str = "k_sparse"
) -> tuple[Tensor, Tensor]:
    """Return the semi-dual value, to be maximised, and the plan [m, n] of the rows' potentials [m].

    The plan's columns sum to b at every alpha, its rows to a only where the value is largest and smooth.
    """
    s = alpha[:, None] - C
    cap = _cap(regularizer, k, len(s))
    v, y = simplex_conjugate(s, b, gamma, cap) if cap else entropic_simplex_conjugate(s, b, gamma)
    return alpha @ a - b @ v, b * y


@equation("E7", r"\frac{\partial D_k}{\partial C}=T", source="envelope theorem")
def transport_cost(
    C: Tensor, a: Tensor, b: Tensor, gamma: float, k: int, tol: float = 1e-9, max_iter: int = 5000
) -> Tensor:
    """Return the largest D_k as a loss: a differentiable layer, whose gradient by C is the plan.

    The solver's steps are not differentiated: at the best alpha a change of alpha changes nothing.
    """
    alpha = solve(C, a, b, gamma=gamma, max_nz=k, tol=tol, max_iter=max_iter).alpha.to(C)
    return semi_dual(alpha, a, b, C, gamma, k)[0]


@equation(
    "E8",
    r"D_1=\mathrm{OT}(a,b;C)+\tfrac\gamma2\|b\|^2,\qquad D_m\le\dots\le D_2\le D_1,\qquad D_k\le P_k",
    source="derived",
)
def vertex_value(ot: Tensor | float, b: Tensor, gamma: float) -> Tensor:
    """Return D_1, from the least cost of unregularized transport and the columns' masses [n]."""
    return ot + gamma / 2 * (b**2).sum()


@equation(
    "E10",
    r"C=-\text{affinity},\quad a=1_m/m,\quad b=1_n/n,\quad k=\lceil\text{capacity}\cdot m/n\rceil",
    source="routing in a mixture of experts",
)
def routing_problem(affinity: Tensor, capacity: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return cost [m, n], masses [m] and [n] and the cap for m tokens, n experts; none gets more than k tokens.

    m times the plan are the combine weights. A token may go to several experts, or, if its row is not met, to none.
    """
    m, n = affinity.shape
    if not capacity > 0:
        raise ValueError(f"capacity must be above 0, got {capacity!r}")
    k = min(m, math.ceil(round(capacity * m / n, 9)))  # 1.1 * 100 / 10 is 11, not 12
    return -affinity, affinity.new_full((m,), 1 / m), affinity.new_full((n,), 1 / n), k


class SparsityConstrainedOT(Learner[Config]):
    """A transport plan, held as its potentials; a step is some iterations of L-BFGS, or one of Adam, warm-started."""

    constants = ("clouds", "routing", "cost", "a", "b", "emd", "exact_alpha")
    evaluate_every = 20
    curves = (
        Curve(("dual_value", "primal_value"), "Dual value, and the plan's cost", "cost"),
        Curve(("row_error", "gap"), "Row error, and gap", "", log=True),
        Curve(("non_zeros", "cap"), "Most non-zeros, and the cap", "entries"),
    )

    def setup(self) -> None:
        config = self.config
        self.clouds = self.routing = None
        if config.world == "clouds":
            self.clouds = PointClouds.make(config.sources, config.targets, config.seed, self.device)
            self.cost, self.a, self.b = self.clouds.cost, self.clouds.a, self.clouds.b
        else:
            self.routing = DigitRouting.make(config.sources, config.targets, config.seed, self.device)
            self.cost, self.a, self.b, _ = routing_problem(self.routing.affinity, config.capacity)
        self.emd, _, self.exact_alpha, _ = exact_transport(self.cost, self.a, self.b)
        self.potentials = torch.nn.Parameter(torch.zeros_like(torch.cat([self.a, self.b])))
        self.optimizer = torch.optim.Adam([self.potentials])
        self.schedule("learning_rate", linear_decay(config.decay))
        self.iterations = 0

    def update(self) -> Metrics:
        tol, max_iter, rate = self.config.tol, self.config.max_iter, self.effective("learning_rate")
        objective = self.objective()
        x = self.potentials.detach()[: objective.size]
        if self.config.solver == "lbfgs":
            x, iterations = lbfgs(objective, x, tol, max_iter)
        else:
            _, gradient = objective(x)
            self.potentials.grad = torch.zeros_like(self.potentials)
            self.potentials.grad[: objective.size] = -gradient  # an optimizer descends, E3 and E5 are maximised
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
            x, iterations = self.potentials.detach()[: objective.size], 1
        self.potentials.data[:] = objective.potentials(x)  # in the semi-dual, beta follows alpha
        self.iterations += iterations
        return self.figures(describe(objective, x, self.cost, iterations))

    def cap(self) -> int:
        """Return k as the knobs have it; in the world of routing the capacity limits it too."""
        max_nz, capacity = self.config.max_nz, self.config.capacity
        return max_nz if self.routing is None else min(max_nz, routing_problem(self.routing.affinity, capacity)[3])

    def objective(self) -> Objective:
        """Return E3 or E5 with the present knobs."""
        config = self.config
        return Objective(
            self.cost,
            self.a,
            self.b,
            gamma=config.gamma,
            max_nz=self.cap(),
            formulation=config.formulation,
            regularizer=config.regularizer,
        )

    def plan(self) -> Plan:
        """Return the plan of the present potentials and the present knobs."""
        objective = self.objective()
        return describe(objective, self.potentials.detach()[: objective.size], self.cost, self.iterations)

    def figures(self, plan: Plan) -> Metrics:
        """Return what is said of a plan at every step."""
        return {
            "dual_value": plan.value,
            "primal_value": plan.primal,
            "gap": abs(plan.gap) + 1e-16,
            "row_error": plan.row_error + 1e-16,
            "non_zeros": plan.non_zeros().max(),
            "cap": float(self.cap()),
            "iterations": float(self.iterations),
        }

    def evaluate(self) -> Metrics:
        """Judge the plan: cost beside the least possible, non-zeros beside the cap, and E8 at the exact potentials."""
        plan, k = self.plan(), self.cap()
        exact = Objective(self.cost, self.a, self.b, gamma=self.config.gamma, max_nz=1)(self.exact_alpha)[0]
        judged: Metrics = {
            "final_value": plan.value,
            "final_row_error": plan.row_error,
            "most_non_zeros": plan.non_zeros().max(),
            "all_iterations": float(self.iterations),
            "cost_ratio": (plan.T * self.cost).sum() / self.emd,
            "all_non_zeros": plan.non_zeros().sum(),
            "over_cap": plan.non_zeros().max() - k,
            "vertex_error": (exact - vertex_value(self.emd, self.b, self.config.gamma)).abs(),
            "a_third": self.iterations / 3,
        }
        if self.routing is not None:
            affinity = self.routing.affinity
            best = first_choices(affinity)
            judged |= {
                "argmax_over_cap": loads(best).max() - k,
                "first_choice_over_cap": loads(first_choices(plan.T)).max() - k,
                "affinity_share": routed_affinity(plan.T, affinity) / routed_affinity(best, affinity),
                "dropped": (plan.T.amax(dim=1) <= 1e-8).sum(),
            }
        return judged

    def views(self) -> dict[str, View]:
        T, k = self.plan().T, self.cap()
        matrix = Heatmap(
            title="The plan",
            alt=f"Mass from each source (row) to each target (column); {int((T > 1e-8).sum())} entries are not zero",
            values=T.cpu().numpy(),
            x_label="target",
            y_label="source",
            low=0.0,
            high=min(float(self.a.max()), float(self.b.max())),
        )
        if self.routing is not None:
            by_router = {"argmax": first_choices(self.routing.affinity), "this plan": T}
            counts = {name: loads(plan) for name, plan in by_router.items()}
            return {"load": self.routing.draw(counts, k), "plan": matrix, "experts": self.routing.pictures(T)}
        assert self.clouds is not None
        count = loads(T).cpu().numpy()
        bars = Bars(
            title=f"Non-zeros in each column (k = {k})",
            alt=f"How many sources serve each target: from {count.min()} to {count.max()}",
            labels=[str(1 + column) for column in range(len(count))],
            values={"non-zeros": count},
            y_range=(0.0, float(len(T))),
        )
        return {"graph": self.clouds.draw(T), "plan": matrix, "non-zeros": bars}


_CAPS = (1, 2, 3, 4, 8, 16, 32)
_SOLVED = {"max_iter": 5000}
_ROUTING = {**_SOLVED, "world": "routing", "sources": 320, "targets": 10, "max_nz": 320}
_SMOOTH = (("k = 16", "k = 32"), "all_iterations")

_CRITERIA = (
    Criterion("cap", "no column has more than k non-zeros, for every k",
              (tuple(f"k = {k}" for k in _CAPS), "over_cap"), above=-100.0, below=0.5),
    *(Criterion(f"value, k = {k}", f"D_k falls from k = {k} to k = {more}",
                (f"k = {k}", "final_value"), (f"k = {more}", "final_value"))
      for k, more in ((1, 2), (2, 3), (3, 4), (4, 8), (8, 16))),
    Criterion("value, k = 16", "D_k does not rise from k = 16 to k = 32, where the cap may no longer bind",
              ("k = 16", "final_value"), ("k = 32", "final_value"), above=-1e-6),
    Criterion("k = 1", "D_1 at the exact potentials is the least cost plus gamma / 2 |b|^2 (within 1e-9)",
              ("k = 1", "vertex_error"), above=-1e-9, below=1e-9),
    *(Criterion(f"iterations, k = {k}", f"k = 16 and 32 take at most a third of the iterations of k = {k}",
                (f"k = {k}", "a_third"), _SMOOTH) for k in (1, 2, 3)),
    Criterion("Sinkhorn", "the entropic plan has more non-zeros than the quadratic one",
              ("Sinkhorn", "all_non_zeros"), ("quadratic", "all_non_zeros")),
    Criterion("routing", "no expert of the k-sparse router gets more tokens than its cap",
              ("routing, k-sparse", "over_cap"), above=-400.0, below=0.5),
    Criterion("argmax", "the argmax router overloads an expert",
              ("routing, k-sparse", "argmax_over_cap")),
    Criterion("Sinkhorn + top-1", "each token's first choice in the entropic plan overloads an expert",
              ("routing, Sinkhorn", "first_choice_over_cap")),
)  # fmt: skip

_CLOUDS: dict[str, Mapping[str, Any]] = {
    **{f"k = {k}": {**_SOLVED, "max_nz": k} for k in _CAPS},
    "quadratic": {**_SOLVED, "regularizer": "quadratic"},
    "Sinkhorn": {**_SOLVED, "regularizer": "entropic", "gamma": 0.02},
}

study = Study(
    claim="A cap of k non-zeros a column is kept exactly; a larger k makes the dual smoother: fewer iterations.",
    learner=SparsityConstrainedOT,
    arms={
        **_CLOUDS,
        "routing, k-sparse": {**_ROUTING, "gamma": 10.0},
        "routing, Sinkhorn": {**_ROUTING, "regularizer": "entropic", "gamma": 0.02},
    },
    criteria=_CRITERIA,
    smoke=Budget(seeds=1, steps=1, arms=("k = 1", "k = 4", "k = 32", "Sinkhorn")),
    fast=Budget(seeds=5, steps=1, arms=tuple(_CLOUDS)),
    full=Budget(seeds=5, steps=1),
)
