"""Sparsity-constrained transport: equations by other means, the card's identities, the solver, the learner."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from closeness import close, normal
from scipy.optimize import brentq, linear_sum_assignment, minimize

from polrl import Run
from polrl.core import conformance
from polrl.core.errors import KnobError, UnknownNameError
from polrl.transport import _sparsity_constrained_ot_solver as fast
from polrl.transport import sparsity_constrained_ot as method
from polrl.transport.sparsity_constrained_ot import (
    Objective,
    SparsityConstrainedOT,
    conjugate,
    dual,
    entropic_conjugate,
    entropic_simplex_conjugate,
    primal,
    routing_problem,
    semi_dual,
    simplex_conjugate,
    solve,
    study,
    topk_simplex_projection,
    transport_cost,
    vertex_value,
)
from polrl.worlds.point_clouds import PointClouds, exact_transport

REGULARIZERS = ("k_sparse", "quadratic", "entropic")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def weights(size, seed=0):
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2
    return drawn / drawn.sum()


def problem(m=6, n=5, seed=0):
    """Return costs up to 1 and uneven masses."""
    cost = torch.rand(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return cost / cost.max(), weights(m, seed + 1), weights(n, seed + 2)


def project(z, size=1.0):
    """Project a list onto the simplex by bisection, without sorting."""
    theta = brentq(lambda t: sum(max(x - t, 0.0) for x in z) - size, min(z) - size - 1, max(z), xtol=1e-15)
    return [max(x - theta, 0.0) for x in z]


def best_on_supports(z, k):
    """Return the nearest k-sparse point of the simplex, by trying every support."""
    best, least = None, math.inf
    for support in itertools.combinations(range(len(z)), k):
        y = np.zeros(len(z))
        y[list(support)] = project([z[i] for i in support])
        distance = ((y - np.array(z)) ** 2).sum()
        if distance < least:
            best, least = y, distance
    return best


def plan_by_loop(S, gamma, k):
    T = np.zeros(S.shape)
    for j in range(S.shape[1]):
        for i in sorted(range(S.shape[0]), key=lambda i: -S[i, j])[:k]:
            T[i, j] = max(float(S[i, j]), 0.0) / gamma
    return T


# ---- E1, E2, E9: the primal and the conjugates ------------------------------------------------------------------


def test_e1_is_cost_and_half_gamma_squares():
    T, C = weights(12).reshape(4, 3), normal(4, 3)
    terms = [t * c + 3.0 / 2 * t * t for t, c in zip(T.flatten().tolist(), C.flatten().tolist(), strict=True)]
    close(primal(T, C, 3.0), math.fsum(terms))
    entropies = [t * c + 3.0 * t * math.log(t) for t, c in zip(T.flatten().tolist(), C.flatten().tolist(), strict=True)]
    close(primal(T, C, 3.0, "entropic"), math.fsum(entropies))
    close(primal(tensor([0.0, 1.0]), tensor([5.0, 2.0]), 1.0, "entropic"), 2.0)


def test_e2_by_hand():
    s = tensor([3.0, -1.0], [1.0, -2.0], [2.0, 0.5])
    value, t = conjugate(s, 2.0, 2)
    close(value, [(9 + 4) / 4, 0.25 / 4])
    close(t, [[1.5, 0.0], [0.0, 0.0], [1.0, 0.25]])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_e2_is_the_maximum_over_supports(k):
    s = normal(4, 3)
    for j in range(3):
        best = 0.0
        for support in itertools.combinations(range(4), k):
            u = s[list(support), j].numpy()
            found = minimize(
                lambda t, u=u: 0.7 / 2 * t @ t - t @ u,
                np.full(k, 0.5),
                bounds=[(0, None)] * k,
                options={"gtol": 1e-12, "ftol": 1e-16},
            )
            best = max(best, -found.fun)
        close(conjugate(s, 0.7, k)[0][j], best, 1e-9)


def test_e2_has_the_plan_as_its_slope():
    for k in (1, 3, 6):
        s = normal(6, 4, seed=k).requires_grad_()
        value, t = conjugate(s, 0.7, k)
        (slope,) = torch.autograd.grad(value.sum(), s)
        close(slope, t)
        close(t, plan_by_loop(s.detach(), 0.7, k))


def test_e9_is_the_exponential():
    s = normal(5, 3).requires_grad_()
    value, t = entropic_conjugate(s, 0.4)
    expected = [[math.exp(x / 0.4 - 1) for x in row] for row in s.tolist()]
    close(t, expected)
    close(value, 0.4 * np.array(expected).sum(axis=0))
    close(torch.autograd.grad(value.sum(), s)[0], t)
    # max over t >= 0 of s t - gamma t log t, at t = exp(s / gamma - 1)
    close(value, (s * t - 0.4 * t * t.log()).sum(dim=0))


# ---- E6 and E4: the projection -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_e6_equals_trying_every_support(k):
    for seed in range(30):
        z = normal(6, seed=seed)
        found = topk_simplex_projection(z, k)
        close(found, best_on_supports(z.tolist(), k), 1e-9)
        assert (found > 0).sum() <= k and (found >= 0).all()
        close(found.sum(), 1.0)
    close(topk_simplex_projection(z, 6), project(z.tolist()), 1e-9)


def test_e6_takes_columns_any_dtype_and_unsorted_input():
    z = normal(7, 4, seed=3)
    together = topk_simplex_projection(z, 3)
    for j in range(4):
        close(together[:, j], topk_simplex_projection(z[:, j], 3))
    assert topk_simplex_projection(z.float(), 3).dtype == torch.float32
    shuffled = torch.tensor([3, 0, 6, 2, 1, 5, 4])
    close(topk_simplex_projection(z[shuffled], 3), together[shuffled])


def test_e6_has_the_projections_jacobian():
    z = tensor(0.3, 0.1, -0.9, 0.2).requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda x: topk_simplex_projection(x, 2), z)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for i, j in itertools.product((0, 3), repeat=2):
        expected[i, j] = float(i == j) - 0.5
    close(jacobian, expected)


def test_identity_7_topk_first_then_project():
    for seed in range(10):
        z = normal(8, seed=seed)
        best = z.topk(3)
        expected = torch.zeros(8, dtype=torch.float64)
        expected[best.indices] = tensor(*project(best.values.tolist()))
        close(topk_simplex_projection(z, 3), expected, 1e-9)
    gap = tensor(5.0, 4.8, 3.7, 5.1)  # more than 1 between the third and the fourth
    close(topk_simplex_projection(gap, 3), topk_simplex_projection(gap, 4))


@pytest.mark.parametrize("k", [0, 7, -1, 2.0, True])
def test_a_cap_beyond_the_rows_is_refused(k):
    z, (C, a, b) = normal(6, 2), problem(6, 2)
    for call in (
        lambda: topk_simplex_projection(z, k),
        lambda: conjugate(z, 1.0, k),
        lambda: simplex_conjugate(z, b, 1.0, k),
        lambda: dual(a, b, a, b, C, 1.0, k),
        lambda: semi_dual(a, a, b, C, 1.0, k),
        lambda: solve(C, a, b, gamma=1.0, max_nz=k),
    ):
        with pytest.raises(ValueError, match=rf"max_nz must be.*1 to m = 6.*got {k!r}"):
            call()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_e4_is_the_maximum_over_the_sparse_simplex(k):
    s, b, gamma = normal(4, 3, seed=1), tensor(0.2, 0.5, 0.3), 1.7
    v, y = simplex_conjugate(s, b, gamma, k)
    for j in range(3):
        strength = gamma * float(b[j])
        nearest = best_on_supports((s[:, j] / strength).tolist(), k)
        close(y[:, j], nearest, 1e-9)
        close(v[j], s[:, j].numpy() @ nearest - strength / 2 * nearest @ nearest, 1e-9)


def test_e4_and_e9b_have_y_as_their_slope():
    s, b = normal(5, 3).requires_grad_(), weights(3)
    for v, y in (simplex_conjugate(s, b, 0.8, 3), entropic_simplex_conjugate(s, b, 0.8)):
        close(torch.autograd.grad(v.sum(), s)[0], y)


def test_e9b_maximises_with_the_entropy_of_t():
    s, b, gamma = normal(4, 2), tensor(0.3, 0.7), 0.6
    v, y = entropic_simplex_conjugate(s, b, gamma)
    for j in range(2):
        e = [math.exp(x / gamma) for x in s[:, j].tolist()]
        close(y[:, j], [x / sum(e) for x in e])
        t = b[j] * y[:, j]
        close(b[j] * v[j], (s[:, j] * t).sum() - gamma * (t * t.log()).sum())


# ---- E3 and E5: dual and semi-dual -------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 6])
def test_e3_written_out(k):
    C, a, b = problem()
    alpha, beta, gamma = 0.3 * normal(6, seed=5), 0.3 * normal(5, seed=6), 0.9
    value, T = dual(alpha, beta, a, b, C, gamma, k)
    S = alpha.numpy()[:, None] + beta.numpy()[None] - C.numpy()
    expected = plan_by_loop(S, gamma, k)
    close(T, expected)
    total = alpha.numpy() @ a.numpy() + beta.numpy() @ b.numpy()
    close(value, total - gamma / 2 * (expected**2).sum())


@pytest.mark.parametrize("k", [1, 3, 6])
def test_e5_written_out(k):
    C, a, b = problem()
    alpha, gamma = 0.3 * normal(6, seed=5), 0.9
    value, T = semi_dual(alpha, a, b, C, gamma, k)
    expected = alpha.numpy() @ a.numpy()
    for j in range(5):
        s = (alpha - C[:, j]).numpy()
        strength = gamma * float(b[j])
        y = best_on_supports((s / strength).tolist(), k)
        expected -= float(b[j]) * (s @ y - strength / 2 * y @ y)
        close(T[:, j], float(b[j]) * y, 1e-9)
    close(value, expected, 1e-9)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_identity_6_gradients_are_what_is_missing_in_the_marginals(regularizer):
    C, a, b = problem()
    C.requires_grad_()
    alpha, beta = (0.3 * normal(6, seed=5)).requires_grad_(), (0.3 * normal(5, seed=6)).requires_grad_()
    value, T = dual(alpha, beta, a, b, C, 0.9, 3, regularizer)
    by_alpha, by_beta, by_cost = torch.autograd.grad(value, (alpha, beta, C))
    close(by_alpha, a - T.sum(dim=1))
    close(by_beta, b - T.sum(dim=0))
    close(by_cost, T)
    value, T = semi_dual(alpha, a, b, C, 0.9, 3, regularizer)
    by_alpha, by_cost = torch.autograd.grad(value, (alpha, C))
    close(by_alpha, a - T.sum(dim=1))
    close(by_cost, T)
    for i in range(6):
        step = torch.zeros(6, dtype=torch.float64)
        step[i] = 1e-6
        up, down = (semi_dual(alpha.detach() + x, a, b, C.detach(), 0.9, 3, regularizer)[0] for x in (step, -step))
        close((up - down) / 2e-6, by_alpha[i], 1e-6)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_identity_5_shifts(regularizer):
    C, a, b = problem()
    alpha, beta = 0.3 * normal(6, seed=5), 0.3 * normal(5, seed=6)
    for first, second in (
        (dual(alpha + 0.7, beta - 0.7, a, b, C, 0.9, 3, regularizer), dual(alpha, beta, a, b, C, 0.9, 3, regularizer)),
        (semi_dual(alpha + 0.7, a, b, C, 0.9, 3, regularizer), semi_dual(alpha, a, b, C, 0.9, 3, regularizer)),
    ):
        close(first[0], second[0])
        close(first[1], second[1])
    close((a - semi_dual(alpha, a, b, C, 0.9, 3, regularizer)[1].sum(dim=1)).sum(), 0.0)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_identity_4_the_semi_duals_columns_are_exact(k):
    C, a, b = problem()
    for seed in range(5):
        T = semi_dual(normal(6, seed=seed), a, b, C, 0.05, k)[1]
        close(T.sum(dim=0), b)
        assert ((T > 0).sum(dim=0) <= k).all()


def test_identity_1_no_cap_is_the_quadratic_problem():
    C, a, b = problem()
    alpha, beta = 0.3 * normal(6, seed=5), 0.3 * normal(5, seed=6)
    for k in (2, 6):
        for capped, quadratic in (
            (dual(alpha, beta, a, b, C, 0.9, 6), dual(alpha, beta, a, b, C, 0.9, k, "quadratic")),
            (semi_dual(alpha, a, b, C, 0.9, 6), semi_dual(alpha, a, b, C, 0.9, k, "quadratic")),
        ):
            close(capped[0], quadratic[0])
            close(capped[1], quadratic[1])
    S = alpha[:, None] + beta - C
    close(dual(alpha, beta, a, b, C, 0.9, 6)[1], S.clamp(min=0) / 0.9)


def test_unknown_regularizers_are_refused_with_a_suggestion():
    C, a, b = problem()
    for call in (
        lambda: dual(a, b, a, b, C, 1.0, 2, "quadratc"),
        lambda: semi_dual(a, a, b, C, 1.0, 2, "quadratc"),
        lambda: primal(C, C, 1.0, "quadratc"),
        lambda: solve(C, a, b, gamma=1.0, regularizer="quadratc"),
    ):
        with pytest.raises(UnknownNameError, match=r"regularizer 'quadratc'.*quadratic"):
            call()


# ---- E8, E7, E10 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_identity_2_k_1_is_unregularized_transport_and_a_constant(seed):
    C, a, b = problem(7, 5, seed)
    ot, plan, alpha, beta = exact_transport(C, a, b)
    gamma = 2.5
    expected = ot + gamma / 2 * math.fsum(x * x for x in b.tolist())
    close(vertex_value(ot, b, gamma), expected)
    value, T = semi_dual(alpha, a, b, C, gamma, 1)
    close(value, expected, 1e-9)
    assert ((T > 0).sum(dim=0) == 1).all()
    close(T.amax(dim=0), b)
    for other in range(20):  # never exceeded
        assert semi_dual(alpha + 0.1 * normal(7, seed=other), a, b, C, gamma, 1)[0] <= expected + 1e-12
    # v_j = max s - gamma b / 2
    s = alpha[:, None] - C
    close(simplex_conjugate(s, b, gamma, 1)[0], s.amax(dim=0) - gamma * b / 2)


def test_e8_order_and_weak_duality():
    clouds = PointClouds.make(12, 12, 1)
    values = [float(solve(clouds.cost, clouds.a, clouds.b, gamma=10.0, max_nz=k).value) for k in (1, 2, 3, 6, 12)]
    assert all(more <= less + 1e-7 for less, more in itertools.pairwise(values))
    assert values[0] > values[1] + 1e-3 > values[-1]
    rows, columns = linear_sum_assignment(clouds.cost.numpy())
    one = torch.zeros(12, 12, dtype=torch.float64)
    one[rows, columns] = 1 / 12  # feasible and 1-sparse
    for value in values:
        assert value <= primal(one, clouds.cost, 10.0) + 1e-9


@pytest.mark.parametrize("k", [2, 8])
def test_e7_the_gradient_by_the_cost_is_the_plan(k):
    C, a, b = problem(8, 6)
    C, a, b = (x.clone().requires_grad_() for x in (C, a, b))
    value = transport_cost(C, a, b, 0.5, k)
    by_cost, by_a = torch.autograd.grad(value, (C, a))
    plan = solve(C, a, b, gamma=0.5, max_nz=k)
    close(value, plan.value)
    close(by_cost, plan.T)
    close(by_a, plan.alpha)
    assert transport_cost(C.float(), a.float(), b.float(), 0.5, k).dtype == torch.float32


def test_e7_by_solving_again():
    C, a, b = problem(8, 6)
    plan = solve(C, a, b, gamma=0.5, tol=1e-13)
    assert plan.row_error < 1e-5
    for place in ((0, 0), (3, 2), (7, 5)):
        step = torch.zeros_like(C)
        step[place] = 1e-4
        up, down = (transport_cost(C + x, a, b, 0.5, 8, tol=1e-13) for x in (step, -step))
        close((up - down) / 2e-4, plan.T[place], 1e-4)


def test_e7_is_a_loss_that_training_can_use():
    C, a, b = problem(6, 6)
    points = normal(6, 2).requires_grad_()
    targets = normal(6, 2, seed=4)
    optimizer = torch.optim.SGD([points], lr=2.0)
    losses = []
    for _ in range(8):
        loss = transport_cost(((points[:, None] - targets) ** 2).sum(-1) / 4, a, b, 0.1, 3, max_iter=100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_e10_counts_places():
    affinity = normal(100, 10)
    for capacity, k in ((1.0, 10), (1.1, 11), (1.25, 13), (0.05, 1), (20.0, 100)):
        C, a, b, found = routing_problem(affinity, capacity)
        assert found == k
    close(C, -affinity)
    close(a, np.full(100, 0.01))
    close(b, np.full(10, 0.1))
    with pytest.raises(ValueError, match="capacity must be above 0, got -1"):
        routing_problem(affinity, -1)


# ---- the solver ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("formulation", ["dual", "semi_dual"])
@pytest.mark.parametrize("k", [1, 2, 5, 7])
@pytest.mark.parametrize("block", [1, 20, 2**16])
def test_the_fast_objective_is_the_equation(regularizer, formulation, k, block, monkeypatch):
    monkeypatch.setattr(fast, "BLOCK", block)
    C, a, b = problem(7, 5)
    objective = Objective(C, a, b, gamma=0.3, max_nz=k, formulation=formulation, regularizer=regularizer)
    for seed in range(3):  # the second call begins Newton's method elsewhere
        alpha, beta = normal(7, seed=seed), normal(5, seed=seed + 10)
        if formulation == "dual":
            x = torch.cat([alpha, beta])
            value, T = dual(alpha, beta, a, b, C, 0.3, k, regularizer)
            expected = torch.cat([a - T.sum(dim=1), b - T.sum(dim=0)])
        else:
            x = alpha
            value, T = semi_dual(alpha, a, b, C, 0.3, k, regularizer)
            expected = a - T.sum(dim=1)
        found, gradient = objective(x)
        close(found, value, 1e-11)
        close(gradient, expected, 1e-11)
        close(objective.plan(x), T, 1e-11)
        potentials = objective.potentials(x)
        close(potentials[:7], alpha)
        # in both forms the plan is E3's at these potentials
        close(dual(potentials[:7], potentials[7:], a, b, C, 0.3, k, regularizer)[1], T, 1e-10)


def test_the_entropic_objective_stays_finite_far_from_the_optimum():
    C, a, b = problem()
    objective = Objective(C, a, b, gamma=1e-3, max_nz=1, formulation="dual", regularizer="entropic")
    for shift in (0.3, 5.0):
        x = torch.full((11,), shift, dtype=torch.float64).requires_grad_()
        value, gradient = objective(x.detach())
        assert value.isfinite() and gradient.isfinite().all()
    near = torch.full((11,), 0.0301, dtype=torch.float64)  # on the tangent, exponents around 60 less the cost
    cheap = Objective(0 * C, a, b, gamma=1e-3, max_nz=1, formulation="dual", regularizer="entropic")
    value, gradient = cheap(near)
    step = torch.zeros(11, dtype=torch.float64)
    step[2] = 1e-6
    close((cheap(near + step)[0] - cheap(near - step)[0]) / 2e-6 / gradient[2], 1.0, 1e-6)


def test_threshold_leaves_exactly_the_mass():
    s = normal(40, 30)
    mass = torch.logspace(-6, 2, 40, dtype=torch.float64)
    alone = fast.threshold(s.clone(), mass)
    close((s - alone[:, None]).clamp(min=0).sum(dim=1), mass, 1e-12)
    for start in (alone + 1.0, alone - 1.0, alone + 100.0, alone):
        close(fast.threshold(s.clone(), mass, start), alone, 1e-12)


@pytest.mark.parametrize("formulation", ["dual", "semi_dual"])
def test_quadratic_plans_are_certified_optimal(formulation):
    C, a, b = problem(9, 7)
    plan = solve(C, a, b, gamma=2.0, formulation=formulation, tol=1e-13)
    assert plan.row_error < 1e-5 and plan.column_error < 1e-5 and plan.converged
    assert abs(plan.gap) < 1e-6
    close(plan.primal, primal(plan.T, C, 2.0))
    close(plan.gap, plan.primal - plan.value)
    # E3 has no better potentials than those of the plan's certificate
    value, T = dual(plan.alpha, plan.beta, a, b, C, 2.0, 9)
    close(value, plan.value, 1e-9)
    close(T, plan.T, 1e-9)


def test_both_formulations_and_both_solvers_agree():
    C, a, b = problem(9, 7)
    for regularizer, k, gamma in (("k_sparse", 4, 1.0), ("quadratic", 9, 1.0), ("entropic", 9, 0.1)):
        values = [
            float(
                solve(
                    C, a, b, gamma=gamma, max_nz=k, regularizer=regularizer, formulation=form, solver=solver, tol=1e-12
                ).value
            )
            for form, solver in itertools.product(("dual", "semi_dual"), ("lbfgs", "adam"))
        ]
        assert max(values) - min(values) < 1e-4


def test_entropic_plans_are_sinkhorns():
    C, a, b = problem(6, 5)
    u = torch.ones(6, dtype=torch.float64)
    kernel = (-C / 0.1).exp()
    for _ in range(5000):
        v = b / (kernel.T @ u)
        u = a / (kernel @ v)
    close(solve(C, a, b, gamma=0.1, regularizer="entropic", tol=1e-13).T, u[:, None] * kernel * v, 1e-5)


def test_identity_8_scaling():
    C, a, b = problem(9, 7)
    alpha = 0.2 * normal(9)
    value, T = semi_dual(alpha, a, b, C, 2.0, 3)
    scaled, same = semi_dual(7 * alpha, a, b, 7 * C, 14.0, 3)
    close(scaled, 7 * value)
    close(same, T)
    one, other = (solve(r * C, a, b, gamma=2.0 * r, tol=1e-13) for r in (1.0, 7.0))
    close(other.value, 7 * one.value, 1e-7)
    close(other.T, one.T, 1e-4)


def test_identity_9_matching_rows_prove_optimality():
    clouds = PointClouds.make(16, 16, 0)
    plan = solve(clouds.cost, clouds.a, clouds.b, gamma=10.0, max_nz=16, tol=1e-13)
    assert plan.row_error < 1e-5 and abs(plan.gap) < 1e-5
    kinked = solve(clouds.cost, clouds.a, clouds.b, gamma=10.0, max_nz=2)
    assert kinked.row_error > 1e-3  # reported, not hidden
    close(kinked.gap, kinked.alpha @ (kinked.T.sum(dim=1) - clouds.a), 1e-9)


def test_identity_10_a_cap_above_the_quadratic_plans_columns_does_nothing():
    clouds = PointClouds.make(16, 16, 0)
    quadratic = solve(clouds.cost, clouds.a, clouds.b, gamma=2.0, tol=1e-13)
    most = int(quadratic.non_zeros().max())
    assert most < 12
    capped = solve(clouds.cost, clouds.a, clouds.b, gamma=2.0, max_nz=most, tol=1e-13)
    close(capped.value, quadratic.value, 1e-8)
    close(capped.T, quadratic.T, 1e-4)
    binding = solve(clouds.cost, clouds.a, clouds.b, gamma=2.0, max_nz=max(1, most // 3))
    assert binding.value > quadratic.value + 1e-4


def test_a_cap_that_no_plan_can_keep_drops_rows():
    C, a, b = problem(9, 3)
    plan = solve(C, a, b, gamma=1.0, max_nz=2, solver="adam", max_iter=500)
    assert (plan.T.sum(dim=1) == 0).sum() >= 3
    close(plan.T.sum(dim=0), b)


def test_a_warm_start_saves_iterations():
    C, a, b = problem(20, 20)
    cold = solve(C, a, b, gamma=1.0)
    warm = solve(C, a, b, gamma=1.05, start=cold)
    assert warm.iterations < solve(C, a, b, gamma=1.05).iterations
    assert solve(C, a, b, gamma=1.0, max_iter=2).converged is False
    with pytest.raises(ValueError, match=r"start must come from a problem of shape \[4, 4\].*\[20, 20\]"):
        solve(C[:4, :4], a[:4] / a[:4].sum(), b[:4] / b[:4].sum(), gamma=1.0, start=cold)


def test_adam_gets_past_a_kink_where_lbfgs_stalls():
    clouds = PointClouds.make(32, 32, 3)
    arguments = (clouds.cost, clouds.a, clouds.b)
    stalled = solve(*arguments, gamma=10.0, max_nz=2)
    climbed = solve(*arguments, gamma=10.0, max_nz=2, solver="adam", max_iter=2000)
    assert climbed.value > stalled.value + 1e-5
    start = solve(*arguments, gamma=10.0, max_nz=2, solver="adam", max_iter=1)
    assert start.iterations == 1


def test_adam_ends_where_nothing_is_left_to_gain():
    cost, a = torch.zeros(3, 3, dtype=torch.float64), tensor(1 / 3, 1 / 3, 1 / 3)
    found = solve(cost, a, a, gamma=1.0, solver="adam", tol=1e-9)
    assert found.iterations == 0 and found.converged
    close(found.T, np.full((3, 3), 1 / 9))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": tensor(0.5, 0.5, 0.5)}, r"equal sums, got 1\.5 and 1"),
        ({"a": tensor(0.5, 0.5, 0.0)}, r"a must be positive.*\[2\] is 0\.0 \(leave a source or target"),
        ({"b": tensor(0.0, 1.0)}, r"b must be positive.*\[0\] is 0\.0 \(leave"),
        ({"a": tensor(1.5, -0.5, 0.1)}, r"a must be positive.*\[1\] is -0\.5$"),
        ({"b": tensor(math.nan, 1.0)}, r"b must be positive and finite; entry \[0\] is nan"),
        ({"b": tensor(math.inf, 1.0)}, r"b must be positive and finite; entry \[0\] is inf"),
        ({"a": tensor(0.5, 0.5)}, r"a must have shape \[3\] beside a cost \[3, 2\], got \[2\]"),
        ({"cost": tensor(1.0, 2.0)}, r"cost must have shape \[m, n\], got \[2\]"),
        ({"cost": tensor([1.0, 2.0], [math.nan, 0.0], [0.0, 0.0])}, r"cost must be finite; entry \[1, 0\] is nan"),
        ({"cost": tensor([1.0, 2.0], [1.0, 0.0], [0.0, -math.inf])}, r"cost must be finite; entry \[2, 1\] is -inf"),
        ({"gamma": 0.0}, r"gamma must be above 0 and finite, got 0\.0"),
        ({"gamma": -1.0}, r"gamma must be above 0 and finite, got -1\.0"),
        ({"gamma": math.inf}, "gamma must be above 0 and finite, got inf"),
        ({"gamma": math.nan}, "gamma must be above 0 and finite, got nan"),
        ({"max_nz": 4}, "max_nz must be a whole number from 1 to m = 3, the number of rows; got 4"),
        ({"max_nz": 0}, "max_nz must.*got 0"),
        ({"tol": 0.0}, r"tol must be above 0 and finite, got 0\.0"),
        ({"max_iter": 0}, "max_iter must be a whole number of at least 1, got 0"),
        ({"max_iter": 2.5}, r"max_iter must be a whole number of at least 1, got 2\.5"),
        ({"formulation": "semidual"}, "formulation 'semidual'; did you mean semi_dual"),
        ({"solver": "lbgfs"}, "solver 'lbgfs'; did you mean lbfgs"),
    ],
)
def test_what_can_t_be_solved_is_refused_by_name(change, words):
    given = {
        "cost": tensor([0.0, 1.0], [1.0, 0.0], [0.5, 0.5]),
        "a": tensor(0.2, 0.3, 0.5),
        "b": tensor(0.4, 0.6),
        "gamma": 1.0,
    } | change
    with pytest.raises((ValueError, UnknownNameError), match=words):
        solve(given.pop("cost"), given.pop("a"), given.pop("b"), **given)


def test_masses_need_not_sum_to_one():
    C, a, b = problem(6, 5)
    one, three = solve(C, a, b, gamma=3.0, tol=1e-13), solve(C, 3 * a, 3 * b, gamma=1.0, tol=1e-13)
    close(three.T, 3 * one.T, 1e-4)


def test_the_solver_takes_lists_arrays_and_single_precision():
    C, a, b = problem(6, 5)
    expected = solve(C, a, b, gamma=3.0, max_nz=3)
    assert solve(C.float(), a.float(), b.float(), gamma=3.0).T.dtype == torch.float64
    close(solve(C.numpy(), a.numpy(), b.tolist(), gamma=3.0, max_nz=3).value, expected.value)


# ---- the learner --------------------------------------------------------------------------------------------------


def make(**settings):
    return SparsityConstrainedOT(**{"device": "cpu", "sources": 12, "targets": 10, **settings})


@pytest.mark.parametrize("solver", ["lbfgs", "adam"])
@pytest.mark.parametrize("formulation", ["dual", "semi_dual"])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_every_variant_climbs(solver, formulation, regularizer):
    learner = make(solver=solver, formulation=formulation, regularizer=regularizer, gamma=1.0, max_nz=6)
    values = [float(learner.update()["dual_value"]) for _ in range(60)]
    C, a, b = learner.cost, learner.a, learner.b
    best = solve(C, a, b, gamma=1.0, max_nz=6, regularizer=regularizer).value
    assert values[0] < values[-1] <= best + 1e-5
    assert values[-1] - values[0] > 0.5 * (best - values[0])


def test_one_long_step_is_the_solver():
    learner = make(max_iter=5000, gamma=10.0)
    metrics = learner.update()
    plan = solve(learner.cost, learner.a, learner.b, gamma=10.0, max_nz=4)
    close(metrics["dual_value"], plan.value)
    assert metrics["iterations"] == plan.iterations
    close(learner.plan().T, plan.T)


def test_steps_are_warm_started():
    learner = make(gamma=10.0, max_nz=12)
    first = learner.update()
    for _ in range(40):
        last = learner.update()
    assert last["dual_value"] > first["dual_value"] and last["row_error"] < 1e-3 < first["row_error"]
    assert last["iterations"] > 3


def test_views_follow_a_knob_while_paused():
    run = Run(make(gamma=10.0, max_nz=12), threads=1, autosave=0)
    run.advance(20)
    before = run.learner.views()
    run.tune(max_nz=2)
    after = run.learner.views()
    counts = [int((np.asarray(views["plan"].values) > 1e-8).sum(axis=0).max()) for views in (before, after)]
    assert counts[0] > 2 == counts[1]
    assert np.asarray(after["non-zeros"].values["non-zeros"]).max() == 2
    assert "k = 2" in after["non-zeros"].title
    close(np.asarray(after["plan"].values).sum(axis=0), run.learner.b)
    run.tune(gamma=1e-3)
    assert not np.array_equal(np.asarray(run.learner.views()["plan"].values), np.asarray(after["plan"].values))


def test_the_graph_has_a_line_for_each_entry():
    learner = make(max_nz=3, max_iter=5000)
    learner.update()
    graph, T = learner.views()["graph"], learner.plan().T
    edges = sum(int(np.isfinite(np.asarray(graph.y[name])).sum()) // 2 for name in ("light edges", "heavy edges"))
    assert edges == int((T > 1e-8).sum()) and f"{edges} edges" in graph.alt


def test_evaluation_beside_the_exact_plan():
    learner = make(sources=10, max_nz=10, gamma=1e-3, max_iter=5000)
    learner.update()
    judged = learner.evaluate()
    close(judged["cost_ratio"], 1.0, 1e-3)
    close(judged["vertex_error"], 0.0, 1e-9)
    assert judged["over_cap"] <= 0 and judged["a_third"] * 3 == judged["all_iterations"] == learner.iterations


def test_routing_keeps_the_capacity():
    pytest.importorskip("sklearn")
    learner = make(world="routing", sources=60, targets=6, max_nz=60, capacity=1.2, max_iter=5000, gamma=5.0)
    assert learner.cap() == 12
    learner.update()
    judged = learner.evaluate()
    assert judged["over_cap"] <= 0 < judged["argmax_over_cap"]
    assert 0.9 < judged["affinity_share"] <= 1.0
    assert list(learner.views()) == ["load", "plan", "experts"]
    for name, k in (("max_nz", 5), ("capacity", 0.5)):
        learner.config._set(name, k)
        assert learner.cap() == 5


def test_capacity_does_not_touch_the_clouds():
    assert make(capacity=0.25).cap() == 4


def test_knobs_know_the_structure():
    with pytest.raises(KnobError, match="max_nz must be a whole number from 1 to 12, got 13"):
        make(max_nz=13)
    run = Run(make(), threads=1, autosave=0)
    for wrong in (0, 13, 2.5):
        with pytest.raises(KnobError, match="max_nz"):
            run.tune(max_nz=wrong)
    for wrong in (0.0, -1.0, 1e3):
        with pytest.raises(KnobError, match="gamma"):
            run.tune(gamma=wrong)
    with pytest.raises(KnobError, match="1 <= targets <= sources <= 1797"):
        make(world="routing", sources=6, targets=10)


def test_adams_rate_decays_and_holds():
    learner = make(solver="adam", decay=10, learning_rate=0.05)
    rates = []
    for _ in range(12):
        learner.update()
        rates.append(learner.optimizer.param_groups[0]["lr"])
    close(rates[:3], [0.05, 0.045, 0.04])
    close(rates[9:], [0.005] * 3)


@pytest.mark.parametrize("settings", [{"solver": "adam", "formulation": "dual"}, {"regularizer": "entropic"}])
@pytest.mark.parametrize("check", conformance.ALL_CHECKS, ids=lambda check: check.__name__)
def test_contract_holds_for_the_variants_too(check, settings):
    check(conformance.Case(SparsityConstrainedOT, {"sources": 8, "targets": 6, **settings}, 3))


# ---- the study ----------------------------------------------------------------------------------------------------


def test_the_study_is_the_cards():
    arms = study.arms
    assert {arm["max_nz"] for name, arm in arms.items() if name.startswith("k =")} == {1, 2, 3, 4, 8, 16, 32}
    assert study.fast.seeds == study.full.seeds == 5
    learner = SparsityConstrainedOT(device="cpu")
    assert learner.cost.shape == (32, 32) and learner.config.gamma == 10.0
    close(exact_transport(learner.cost, learner.a, learner.b)[0], 0.1031, 1e-4)  # as on the card, seed 0
    names = [c.name for c in study.criteria]
    assert len(names) == len(set(names))


def test_the_smoke_study_runs():
    result = study.run("smoke")
    assert {row["arm"] for row in result.measures} == set(study.smoke.arms)
    assert all(row["vertex_error"] < 1e-9 and row["over_cap"] <= 0 for row in result.measures if row["arm"][0] == "k")


def test_the_module_says_which_equations_it_has():
    from polrl import equations

    assert set(equations(method)) == {f"E{n}" for n in range(1, 11)} | {"E9b"}
