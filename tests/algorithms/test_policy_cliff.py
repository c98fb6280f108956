"""The policy cliff: each equation against values computed by other means, the card's identities, the learner."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from polrl import Run, equations
from polrl.core.errors import KnobError, StructureError
from polrl.foundations import policy_cliff
from polrl.foundations.policy_cliff import (
    PolicyCliff,
    ascent_objective,
    effective_reward,
    gibbs_law,
    greedy_policy,
    inverse_bellman,
    kl_optimum,
    missing_advantage,
    optimal_q,
    perturbed_reward,
    policy_bound,
    policy_gradient,
    soft_optimum,
    soft_policy,
    soft_value,
    study,
    tie_breaker_reward,
    total_variation,
    value_bound,
)
from polrl.worlds.tabular import random_mdp
from polrl.worlds.token_tree import TokenTree

DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=generator(seed), dtype=DOUBLE)


def mdp(states: int = 5, actions: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return random_mdp(states, actions, generator(seed))


def policy(states: int = 5, actions: int = 3, seed: int = 9) -> torch.Tensor:
    return torch.softmax(normal(states, actions, seed=seed), dim=1)


def tied_table(states: int, actions: int, m: int, seed: int = 0, s0: int = 0) -> torch.Tensor:
    """Return a table whose first m entries of row s0 tie at the top."""
    table = torch.rand(states, actions, generator=generator(seed), dtype=DOUBLE)
    table[s0, :m] = 1.5
    return table


def values_by_time(P, R, pi, gamma, steps=700):
    """Return the value of a policy by adding rewards over time."""
    P, R, pi = P.numpy(), R.numpy(), pi.numpy()
    move, pay = np.einsum("sa,sat->st", pi, P), (pi * R).sum(1)
    value = np.zeros(len(pay))
    for _ in range(steps):
        value = pay + gamma * move @ value
    return torch.from_numpy(value)


def close(found, expected, tolerance=1e-10):
    found, expected = (torch.as_tensor(x, dtype=DOUBLE) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def distance(p, q) -> float:
    return 0.5 * sum(abs(float(x) - float(y)) for x, y in zip(p, q, strict=True))


def test_total_variation_is_half_the_1_norm():
    p, q = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]]), torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.25, 0.5]])
    close(total_variation(p, q), [1.0, 0.25])


# ---- E1 to E4: values are tame -------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.95])
def test_e1_is_the_best_over_all_deterministic_policies(gamma):
    P, R = mdp(3, 2)
    best = torch.full((3,), -math.inf, dtype=DOUBLE)
    for choice in itertools.product(range(2), repeat=3):
        pi = torch.zeros(3, 2, dtype=DOUBLE)
        pi[range(3), list(choice)] = 1.0
        best = torch.maximum(best, values_by_time(P, R, pi, gamma))
    Q = optimal_q(R, P, gamma)
    close(Q.amax(dim=1), best, 1e-9)
    for s, a in itertools.product(range(3), range(2)):
        close(Q[s, a], R[s, a] + gamma * sum(float(P[s, a, t]) * float(best[t]) for t in range(3)), 1e-9)


def test_e2_is_uniform_over_the_best_or_takes_the_first():
    Q = torch.tensor([[1.0, 3.0, 3.0 - 5e-10, 2.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, -2.0, 0.5]], dtype=DOUBLE)
    close(greedy_policy(Q), torch.tensor([[0, 0.5, 0.5, 0], [0.25] * 4, [0, 0, 0, 1.0]]))
    close(greedy_policy(Q, "first"), torch.tensor([[0, 1.0, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 1.0]]))
    close(greedy_policy(Q, tolerance=0.0)[0], torch.tensor([0, 1.0, 0, 0]))


def test_e2_keeps_ties_that_float_sums_blur():
    P, _ = mdp(20, 5)
    solved = optimal_q(inverse_bellman(tied_table(20, 5, 4), P, 0.9), P, 0.9)
    assert len(set(solved[0, :4].tolist())) > 1  # or this test would show nothing
    close(greedy_policy(solved)[0], torch.tensor([0.25, 0.25, 0.25, 0.25, 0]))
    close(greedy_policy(solved, "first")[0], torch.tensor([1.0, 0, 0, 0, 0]))


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_e3_holds_and_a_constant_shift_reaches_it(gamma):
    for seed in range(20):
        P, R = mdp(seed=seed)
        other = R + normal(5, 3, seed=seed, scale=0.3)
        moved = (optimal_q(R, P, gamma) - optimal_q(other, P, gamma)).abs().max()
        bound = value_bound(R, other, gamma)
        close(bound, max(abs(float(x)) for x in (R - other).flatten()) / (1 - gamma))
        assert float(moved) <= float(bound) + 1e-10
    shifted = (optimal_q(R, P, gamma) - optimal_q(R + 0.3, P, gamma)).abs().max()
    close(shifted, value_bound(R, R + 0.3, gamma), 1e-9)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_identity_1_the_inverse_gives_the_table_back(gamma, scale):
    P, _ = mdp(6, 3)
    Q0 = normal(6, 3, seed=3, scale=scale)
    R = inverse_bellman(Q0, P, gamma)
    for s, a in itertools.product(range(6), range(3)):
        future = sum(float(P[s, a, t]) * max(map(float, Q0[t])) for t in range(6))
        close(R[s, a], float(Q0[s, a]) - gamma * future)
    assert float((optimal_q(R, P, gamma) - Q0).abs().max()) < 1e-9 * max(1.0, scale)
    assert float((soft_optimum(R, P, gamma, 0.0)[0] - Q0).abs().max()) < 1e-9 * max(1.0, scale)


# ---- E5: policies are not ------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 3, 4, 5])
@pytest.mark.parametrize("eps", [1e-8, 1e-5, 1e-2, 1.0])
def test_identity_2_the_uniform_policy_jumps_by_m_minus_one_over_m(m, eps):
    gamma, (P, _) = 0.9, mdp(8, 5)
    Q0 = tied_table(8, 5, m)
    before, after = (optimal_q(perturbed_reward(Q0, P, gamma, 0, 1, by), P, gamma) for by in (0.0, eps))
    assert distance(greedy_policy(before)[0], greedy_policy(after)[0]) == pytest.approx((m - 1) / m, abs=1e-12)
    assert distance(greedy_policy(before, "first")[0], greedy_policy(after, "first")[0]) == 1.0  # from action 0 to 1
    down = greedy_policy(optimal_q(perturbed_reward(Q0, P, gamma, 0, 1, -eps), P, gamma))
    assert distance(greedy_policy(before)[0], down[0]) == pytest.approx(1 / m, abs=1e-12)


def test_first_flips_unless_the_raised_action_is_the_first():
    P, _ = mdp(8, 5)
    Q0 = tied_table(8, 5, 3)
    for a2, jump in ((0, 0.0), (1, 1.0), (2, 1.0)):
        after = optimal_q(perturbed_reward(Q0, P, 0.9, 0, a2, 1e-6), P, 0.9)
        assert distance(greedy_policy(Q0, "first")[0], greedy_policy(after, "first")[0]) == jump


@pytest.mark.parametrize("gamma", [0.0, 0.6, 0.99])
@pytest.mark.parametrize("eps", [1e-4, 0.5])
def test_identity_3_the_reward_moves_by_at_most_eps(gamma, eps):
    for seed in range(5):
        P, _ = mdp(6, 4, seed=seed)
        s0, a2 = 2, 1
        Q0 = tied_table(6, 4, 3, seed=seed, s0=s0)
        R0 = inverse_bellman(Q0, P, gamma)
        change = perturbed_reward(Q0, P, gamma, s0, a2, eps) - R0
        others = [float(P[s, a, s0]) for s, a in itertools.product(range(6), range(4)) if (s, a) != (s0, a2)]
        exact = eps * max(1 - gamma * float(P[s0, a2, s0]), gamma * max(others))
        norm = float(change.abs().max())
        assert norm == pytest.approx(exact, rel=1e-9)
        assert norm <= eps * (1 + 1e-9)
        down = (perturbed_reward(Q0, P, gamma, s0, a2, -eps) - R0).abs()
        assert float(down.max()) == pytest.approx(eps) and int((down > 1e-12).sum()) == 1


def test_tie_breaker_of_prop_3_2_wins_by_its_share_of_a_change_of_eps():
    gamma, eps, (P, _) = 0.8, 1e-3, mdp(6, 4)
    Q0 = tied_table(6, 4, 3)
    R = perturbed_reward(Q0, P, gamma, 0, 2, eps / (1 + gamma))
    assert float((R - inverse_bellman(Q0, P, gamma)).abs().max()) <= eps
    best = optimal_q(R, P, gamma)[0].sort(descending=True).values
    assert float(best[0] - best[1]) == pytest.approx(eps / (1 + gamma), abs=1e-9)


def test_e5_leaves_the_table_it_was_given():
    Q0, (P, _) = tied_table(5, 3, 2), mdp()
    kept = Q0.clone()
    perturbed_reward(Q0, P, 0.9, 0, 1, 0.5)
    assert torch.equal(Q0, kept)


# ---- E6: several rewards -------------------------------------------------------------------------------------


def test_e6_mixes_each_state_by_its_own_weights():
    rewards, weights = normal(3, 5, 4), torch.softmax(normal(5, 3, seed=1), dim=1)
    mixed = effective_reward(rewards, weights)
    for s, a in itertools.product(range(5), range(4)):
        close(mixed[s, a], sum(float(weights[s, k]) * float(rewards[k, s, a]) for k in range(3)))
    moved = rewards + normal(3, 5, 4, seed=2, scale=0.1)
    assert float((effective_reward(moved, weights) - mixed).abs().max()) <= float((moved - rewards).abs().max()) + 1e-12


@pytest.mark.parametrize("weights", [[[0.5, 0.6]], [[1.5, -0.5]], [[math.nan, 1.0]], [[0.4, 0.4]]])
def test_e6_refuses_weights_that_are_no_mixture(weights):
    with pytest.raises(ValueError, match="weights must not be negative and sum to 1"):
        effective_reward(normal(2, 1, 3), torch.tensor(weights, dtype=DOUBLE))


# ---- E7 and E8: the entropy bonus ----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.7, 0.97])
@pytest.mark.parametrize("alpha", [0.05, 0.4, 2.0])
def test_e7_solves_its_equation_and_is_its_softmax(gamma, alpha):
    P, R = mdp(4, 3)
    Q, pi = soft_optimum(R, P, gamma, alpha)
    for s, a in itertools.product(range(4), range(3)):
        future = 0.0
        for t in range(4):
            future += float(P[s, a, t]) * alpha * math.log(sum(math.exp(float(q) / alpha) for q in Q[t]))
        close(Q[s, a], float(R[s, a]) + gamma * future, 1e-9)
    for s in range(4):
        weights = [math.exp(float(q) / alpha) for q in Q[s]]
        close(pi[s], torch.tensor([w / sum(weights) for w in weights], dtype=DOUBLE))


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_e7_is_the_best_policy_of_its_objective(alpha):
    P, R = mdp(4, 3)
    _, best = soft_optimum(R, P, 0.9, alpha)
    value = values_by_time(P, R - alpha * best.log(), best, 0.9)
    for seed in range(30):
        other = torch.softmax(best.log() + normal(4, 3, seed=seed, scale=0.3), dim=1)
        assert bool((values_by_time(P, R - alpha * other.log(), other, 0.9) <= value + 1e-9).all())


def test_zero_alpha_is_the_hard_solver_with_uniform_ties():
    P, _ = mdp(6, 4)
    R = inverse_bellman(tied_table(6, 4, 3), P, 0.9)
    Q, pi = soft_optimum(R, P, 0.9, 0.0)
    close(Q, optimal_q(R, P, 0.9))
    close(pi[0], [1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("alpha", [1e-300, 1e-12, 1e-5, 1e-3])
def test_small_alphas_neither_overflow_nor_leave_the_maximum(alpha):
    P, R = mdp()
    Q, pi = soft_optimum(10 * R, P, 0.9, alpha)
    assert Q.isfinite().all() and pi.isfinite().all()
    close(Q, optimal_q(10 * R, P, 0.9), 10 * alpha * math.log(3) + 1e-9)
    values = torch.tensor([1.0, 1.0, 0.0], dtype=DOUBLE)
    close(soft_value(values, alpha), 1 + alpha * math.log(2))
    close(soft_policy(values, alpha), torch.tensor([0.5, 0.5, 0.0]))


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_identity_4_the_bound_holds_for_every_pair_and_state(alpha, gamma):
    for seed in range(4):
        P, R = mdp(seed=seed)
        other = R + normal(5, 3, seed=seed, scale=10.0 ** (seed - 3))
        policies = [soft_optimum(reward, P, gamma, alpha)[1] for reward in (R, other)]
        bound = float(policy_bound(R, other, alpha, gamma))
        assert bound == pytest.approx(float((R - other).abs().max()) / (2 * alpha * (1 - gamma)))
        for s in range(5):
            assert distance(policies[0][s], policies[1][s]) <= bound + 1e-10


def test_e8_of_several_rewards_takes_the_largest_change():
    rewards, weights = normal(2, 5, 3), torch.full((5, 2), 0.5, dtype=DOUBLE)
    moved = rewards.clone()
    moved[0] += 0.01 * torch.sign(normal(5, 3, seed=4))
    moved[1] += 0.04 * torch.sign(normal(5, 3, seed=5))
    bound = policy_bound(rewards, moved, 0.2, 0.9)
    close(bound, 0.04 / (2 * 0.2 * 0.1))
    P, _ = mdp()
    policies = [soft_optimum(effective_reward(r, weights), P, 0.9, 0.2)[1] for r in (rewards, moved)]
    assert float(total_variation(*policies).max()) <= float(bound)


@pytest.mark.parametrize("alpha", [0.02, 0.5])
def test_identity_5_two_arms_move_by_tanh_and_reach_the_bound(alpha):
    P, none = torch.ones(1, 2, 1, dtype=DOUBLE), torch.zeros(1, 2, dtype=DOUBLE)
    for eps in (1e-6, 0.01, 0.3):
        R = torch.tensor([[eps, -eps]], dtype=DOUBLE)
        found = distance(soft_optimum(R, P, 0.0, alpha)[1][0], soft_optimum(none, P, 0.0, alpha)[1][0])
        assert found == pytest.approx(0.5 * math.tanh(eps / alpha), rel=1e-9)
        ratio = found / float(policy_bound(R, none, alpha, 0.0))
        assert ratio <= 1 + 1e-9 and (eps > 1e-5 or ratio > 1 - 1e-6)


def test_lemma_of_e8_softmax_moves_by_at_most_one_over_alpha_in_the_1_norm():
    alpha, z = 0.3, normal(6)
    for seed in range(20):
        v = torch.sign(normal(6, seed=seed))
        p = torch.softmax(z / alpha, dim=0)
        _, moved = torch.autograd.functional.jvp(lambda x: soft_policy(x, alpha), z, v)
        formula = float((p * (v - (p * v).sum()).abs()).sum()) / alpha
        assert float(moved.abs().sum()) == pytest.approx(formula)
        assert formula <= 1 / alpha + 1e-12


@pytest.mark.parametrize("alpha", [0.02, 0.3, 2.0])
def test_identity_6_the_soft_policy_loses_at_most_alpha_log_a(alpha):
    for seed in range(5):
        P, R = mdp(seed=seed)
        lost = optimal_q(R, P, 0.9).amax(dim=1) - values_by_time(P, R, soft_optimum(R, P, 0.9, alpha)[1], 0.9)
        assert float(lost.min()) >= -1e-9 and float(lost.max()) <= alpha * math.log(3) / 0.1 + 1e-9


def test_identity_7_a_vanishing_alpha_stays_on_the_best_but_need_not_be_uniform():
    P, _ = mdp(6, 4)
    R = inverse_bellman(tied_table(6, 4, 3), P, 0.9)
    off = [float(soft_optimum(R, P, 0.9, alpha)[1][0, 3]) for alpha in (0.3, 0.1, 0.01)]
    assert off == sorted(off, reverse=True) and off[-1] < 1e-6
    limit = soft_optimum(R, P, 0.9, 1e-5)[1][0, :3]
    close(limit.sum(), 1.0)
    assert float((limit - 1 / 3).abs().max()) > 0.01  # weighted by the entropy that is still to come
    close(gibbs_law(torch.tensor([1.0, 1.0, 0.2]).double(), 1e-4), torch.tensor([0.5, 0.5, 0]))  # one step: uniform


# ---- E9: the KL penalty --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_e9_solves_its_equations(beta, gamma):
    P, R = mdp(4, 3)
    base = policy(4, 3)
    Q, V, pi = kl_optimum(R, P, gamma, beta, base)
    for s in range(4):
        weights = [float(base[s, a]) * math.exp(float(Q[s, a]) / beta) for a in range(3)]
        close(V[s], beta * math.log(sum(weights)), 1e-9)
        for a in range(3):
            close(Q[s, a], float(R[s, a]) + gamma * sum(float(P[s, a, t]) * float(V[t]) for t in range(4)), 1e-9)
            close(pi[s, a], float(base[s, a]) * math.exp((float(Q[s, a]) - float(V[s])) / beta), 1e-9)


def test_e9_is_the_best_policy_of_its_objective():
    beta, (P, R) = 0.3, mdp(4, 3)
    base = policy(4, 3)
    _, V, best = kl_optimum(R, P, 0.9, beta, base)
    close(values_by_time(P, R - beta * (best / base).log(), best, 0.9), V, 1e-9)
    for seed in range(30):
        other = torch.softmax(best.log() + normal(4, 3, seed=seed, scale=0.3), dim=1)
        assert bool((values_by_time(P, R - beta * (other / base).log(), other, 0.9) <= V + 1e-9).all())


def test_e9_with_a_uniform_base_is_e7():
    strength, gamma, (P, R) = 0.2, 0.9, mdp()
    Q, V, pi = kl_optimum(R, P, gamma, strength, torch.full((5, 3), 1 / 3, dtype=DOUBLE))
    soft, expected = soft_optimum(R, P, gamma, strength)
    close(pi, expected, 1e-9)
    close(soft_value(soft, strength) - V, [strength * math.log(3) / (1 - gamma)] * 5, 1e-9)
    assert bool((soft > Q).all())


def test_identity_8_a_vanishing_beta_restricts_the_base_to_the_best():
    P, base = torch.ones(1, 4, 1, dtype=DOUBLE), torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=DOUBLE)
    R = torch.tensor([[1.0, 1.0, 0.0, 0.9]], dtype=DOUBLE)
    close(kl_optimum(R, P, 0.0, 1e-3, base)[2], [[1 / 3, 2 / 3, 0, 0]])
    close(kl_optimum(R, P, 0.0, 1e3, base)[2], base, 1e-3)
    close(gibbs_law(R[0], 1e-3, base[0]), [1 / 3, 2 / 3, 0, 0])


def test_identity_8_a_constant_reward_changes_no_policy():
    P, R = mdp()
    close(soft_optimum(R, P, 0.9, 0.2)[1], soft_optimum(R + 3.0, P, 0.9, 0.2)[1], 1e-9)
    close(kl_optimum(R, P, 0.9, 0.2, policy())[2], kl_optimum(R + 3.0, P, 0.9, 0.2, policy())[2], 1e-9)


# ---- E10 and E11: what the reward forgets, and what breaks its ties ------------------------------------------


def test_e10_is_the_advantage_of_the_forgotten_reward():
    P, R = mdp()
    pi = policy()
    V = values_by_time(P, R, pi, 0.9)
    found = missing_advantage(R, P, 0.9, pi)
    for s, a in itertools.product(range(5), range(3)):
        close(found[s, a], R[s, a] + 0.9 * P[s, a] @ V - V[s], 1e-9)
    close((pi * found).sum(dim=1), torch.zeros(5), 1e-9)


def test_e10_a_tied_action_with_a_missing_advantage_makes_the_clever_slacker_strictly_worse():
    gamma, (P, _) = 0.9, mdp(6, 4)
    R_train = inverse_bellman(tied_table(6, 4, 3), P, gamma)
    slacker = greedy_policy(optimal_q(R_train, P, gamma), "first")
    for seed in range(10):
        R_miss = normal(6, 4, seed=seed, scale=0.1)
        gain = missing_advantage(R_miss, P, gamma, slacker)[0, :3].max()
        true = optimal_q(R_train + R_miss, P, gamma)[0].max() - values_by_time(P, R_train + R_miss, slacker, gamma)[0]
        assert float(true) >= -1e-9
        if float(gain) > 1e-9:
            assert float(true) > 1e-6
    nothing = missing_advantage(torch.zeros(6, 4, dtype=DOUBLE), P, gamma, slacker)
    close(nothing, torch.zeros(6, 4))


def test_e11_pays_correct_answers_less_the_missed_length():
    lengths = torch.tensor([100.0, 70.0, 130.0, 100.0])
    paid = tie_breaker_reward(torch.tensor([True, True, False, False]), lengths, 100.0, 3e-4)
    close(paid, torch.tensor([1.0, 1 - 0.009, -0.009, 0.0]), 1e-6)
    close(tie_breaker_reward(torch.ones(2).double(), torch.tensor([0.25, 1.0]).double(), 1.0, -0.1), [1.075, 1.0])
    close(tie_breaker_reward(torch.tensor([1, 0]), torch.tensor([90, 120]), 100, 0.01), [0.9, -0.2], 1e-6)


# ---- E12: training -------------------------------------------------------------------------------------------


def objective(theta, R, P, gamma, alpha, rho, steps=900):
    """Return J by adding rewards and entropies over time, differentiable."""
    pi = torch.softmax(theta, dim=1)
    pay = (pi * (R - alpha * pi.log())).sum(dim=1)
    value = torch.zeros_like(pay)
    for _ in range(steps):
        value = pay + gamma * torch.einsum("sa,sat,t->s", pi, P, value)
    return rho @ value


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_e12_is_the_gradient_of_its_objective(alpha, gamma):
    (P, R), rho = mdp(4, 3), torch.tensor([0.7, 0.1, 0.2, 0.0], dtype=DOUBLE)
    theta = normal(4, 3).requires_grad_()
    expected = objective(theta, R, P, gamma, alpha, rho, steps=400)
    (by_autograd,) = torch.autograd.grad(expected, theta)
    J, gradient = policy_gradient(theta.detach(), R, P, gamma, alpha, rho)
    close(J, expected.detach(), 1e-9)
    close(gradient, by_autograd, 1e-9)
    for place in ((0, 0), (2, 1)):
        ends = []
        for sign in (1, -1):
            moved = theta.detach().clone()
            moved[place] += sign * 1e-5
            ends.append(float(objective(moved, R, P, gamma, alpha, rho, steps=400)))
        assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-7)


def test_e12_vanishes_at_e7_and_ascent_leads_there():
    (P, R), rho = mdp(4, 3), torch.full((4,), 0.25, dtype=DOUBLE)
    Q, pi = soft_optimum(R, P, 0.9, 0.3)
    close(policy_gradient(Q / 0.3, R, P, 0.9, 0.3, rho)[1], torch.zeros(4, 3), 1e-9)
    theta = torch.zeros(4, 3, dtype=DOUBLE)
    for _ in range(400):
        theta = theta + 2.0 * policy_gradient(theta, R, P, 0.9, 0.3, rho)[1]
    close(torch.softmax(theta, dim=1), pi, 1e-4)


def string_objective(log_p, R, alpha):
    return (log_p.exp() * (R - alpha * log_p)).sum()


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_e12b_with_probabilities_is_the_exact_gradient(alpha):
    tree, R = TokenTree(3, 3), normal(27)
    theta = normal(13, 3, seed=2).requires_grad_()
    (expected,) = torch.autograd.grad(string_objective(tree.log_probabilities(theta), R, alpha), theta)
    log_p = tree.log_probabilities(theta)
    (found,) = torch.autograd.grad(ascent_objective(log_p, R, alpha, log_p.exp()), theta)
    close(found, expected, 1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_e12b_with_frequencies_is_reinforce_and_right_on_average(alpha):
    draws, R, theta = 3, normal(4), normal(4, seed=5).requires_grad_()

    def gradient(share):
        log_p = torch.log_softmax(theta, dim=0)
        return torch.autograd.grad(ascent_objective(log_p, R, alpha, share(log_p)), theta)[0]

    exact, mean, p = gradient(torch.exp), torch.zeros(4, dtype=DOUBLE), torch.softmax(theta.detach(), dim=0)
    for drawn in itertools.product(range(4), repeat=draws):
        counts = torch.bincount(torch.tensor(drawn), minlength=4).double()
        earned = [float(R[y]) - alpha * math.log(float(p[y])) for y in drawn]
        by_hand = torch.zeros(4, dtype=DOUBLE)
        for y, one in zip(drawn, earned, strict=True):
            by_hand += (one - sum(earned) / draws) / draws * (torch.eye(4, dtype=DOUBLE)[y] - p)
        found = gradient(lambda log_p, counts=counts: counts / draws)
        close(found, by_hand)
        mean += math.prod(float(p[y]) for y in drawn) * found
    close(mean, (1 - 1 / draws) * exact)  # the baseline's own share


def test_e12b_is_at_rest_at_the_optimum_whatever_is_drawn():
    R, alpha = normal(9), 0.2
    log_p = (R / alpha).log_softmax(dim=0).requires_grad_()
    drawn = torch.tensor([0.5, 0, 0, 0.25, 0, 0, 0, 0, 0.25], dtype=DOUBLE)
    (gradient,) = torch.autograd.grad(ascent_objective(log_p, R, alpha, drawn), log_p)
    close(gradient, torch.zeros(9), 1e-12)


# ---- E13: whole strings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_e13_is_what_backward_induction_over_tokens_finds(alpha):
    tree, R, base = TokenTree(2, 3), normal(8), torch.softmax(normal(8, seed=3), dim=0)

    def law(pull, strength):
        """Return the law of strings by soft values of prefixes, from the last token to the first."""

        def value(prefix):
            if len(prefix) == 3:
                return float(pull[4 * prefix[0] + 2 * prefix[1] + prefix[2]])
            return strength * math.log(sum(math.exp(value((*prefix, x)) / strength) for x in (0, 1)))

        return torch.tensor(
            [
                math.exp(sum(value(s[: t + 1]) - value(s[:t]) for t in range(3)) / strength)
                for s in itertools.product((0, 1), repeat=3)
            ],
            dtype=DOUBLE,
        )

    close(gibbs_law(R, alpha), law(R, alpha))
    weights = [math.exp(float(r) / alpha) for r in R]
    close(gibbs_law(R, alpha), torch.tensor([w / sum(weights) for w in weights], dtype=DOUBLE))
    tilted = [float(b) * math.exp(float(r) / alpha) for b, r in zip(base, R, strict=True)]
    close(gibbs_law(R, alpha, base), torch.tensor([w / sum(tilted) for w in tilted], dtype=DOUBLE))
    log_p = tree.token_log_probabilities(tree.logits_of(gibbs_law(R, alpha)))
    token_entropies = -(gibbs_law(R, alpha)[:, None] * log_p).sum()
    close(token_entropies, -(gibbs_law(R, alpha) * gibbs_law(R, alpha).log()).sum())


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0])
def test_e13_obeys_the_bound_without_a_discount(alpha):
    for seed in range(10):
        R = normal(27, seed=seed)
        other = R + normal(27, seed=seed + 50, scale=0.02)
        bound = float(policy_bound(R, other, alpha, 0.0))
        assert bound == pytest.approx(float((R - other).abs().max()) / (2 * alpha))
        assert distance(gibbs_law(R, alpha), gibbs_law(other, alpha)) <= bound + 1e-10


def test_e13_at_zero_is_uniform_over_the_best_strings():
    close(gibbs_law(torch.tensor([1.0, 0.0, 1.0, 1.0 - 1e-7]).double(), 0.0), torch.tensor([0.5, 0, 0.5, 0]))


# ---- what is refused, and dtypes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda P, R: greedy_policy(R, "last"), "rule.*'uniform' or 'first'.*'last'"),
        (lambda P, R: optimal_q(R, P, 1.0), "gamma.*below 1.*1.0"),
        (lambda P, R: optimal_q(R, P, math.nan), "gamma.*nan"),
        (lambda P, R: optimal_q(R[:, :2], P, 0.9), r"P must be \[S, A, S\].*\[5, 3, 5\] and \[5, 2\]"),
        (lambda P, R: optimal_q(R / 0, P, 0.9), "R must be finite"),
        (lambda P, R: value_bound(R, R, -0.1), "gamma.*-0.1"),
        (lambda P, R: inverse_bellman(R, P[0], 0.9), r"P must be \[S, A, S\]"),
        (lambda P, R: soft_optimum(R, P, 0.9, -0.1), "alpha must be at least 0.*-0.1"),
        (lambda P, R: policy_bound(R, R, 0.0, 0.9), "alpha must be above 0.*0.0"),
        (lambda P, R: kl_optimum(R, P, 0.9, 0.0, policy()), "beta must be above 0.*0.0"),
        (lambda P, R: kl_optimum(R, P, 0.9, 0.1, greedy_policy(R)), "base must be above 0.*0.0"),
        (lambda P, R: missing_advantage(R, P, 1.5, policy()), "gamma.*1.5"),
        (lambda P, R: policy_gradient(R, R, P, 1.0, 0.1, R[:, 0]), "gamma.*1.0"),
        (lambda P, R: gibbs_law(R, -1.0), "temperature must be at least 0.*-1.0"),
        (lambda P, R: gibbs_law(R, 0.1, greedy_policy(R)), "base must be above 0.*0.0"),
    ],
)
def test_bad_input_is_refused_by_name_and_value(call, words):
    P, R = mdp()
    with pytest.raises(ValueError, match=words):
        call(P, R)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equations_keep_the_dtype(dtype):
    P, R = (x.to(dtype) for x in mdp())
    base, rho = policy().to(dtype), torch.full((5,), 0.2, dtype=dtype)
    outcomes = (
        optimal_q(R, P, 0.9), greedy_policy(R), greedy_policy(R, "first"), value_bound(R, R + 1, 0.9),
        inverse_bellman(R, P, 0.9), perturbed_reward(R, P, 0.9, 0, 1, 0.1), *soft_optimum(R, P, 0.9, 0.1),
        effective_reward(torch.stack([R, R]), torch.full((5, 2), 0.5, dtype=dtype)), policy_bound(R, R, 0.1, 0.9),
        *kl_optimum(R, P, 0.9, 0.1, base), missing_advantage(R, P, 0.9, base), tie_breaker_reward(R[0], R[0], 1.0, 0.1),
        *policy_gradient(R, R, P, 0.9, 0.1, rho), ascent_objective(base.log(), R, 0.1, base), gibbs_law(R, 0.1, base),
    )  # fmt: skip
    assert {outcome.dtype for outcome in outcomes} == {dtype}


def test_every_equation_of_the_card_is_there():
    assert {f"E{n}" for n in range(1, 14)} <= equations(policy_cliff).keys()


# ---- the learner ---------------------------------------------------------------------------------------------


def learner(**settings) -> PolicyCliff:
    return PolicyCliff(**{"device": "cpu", "states": 6, "actions": 4, **settings})


def advance(one: PolicyCliff, steps: int) -> PolicyCliff:
    for _ in range(steps):
        one.update()
    return one


def figures(one: PolicyCliff) -> dict[str, float]:
    eps, log_p = one.config.eps, one.log_probabilities(one.logits)
    return {
        name: float(value) for name, value in one.figures(log_p, one.string_rewards(eps), one.mdp_rewards(eps)).items()
    }


def optimum(one: PolicyCliff) -> torch.Tensor:
    return gibbs_law(one.string_rewards(one.config.eps), one.temperature)


def strings(depth: int = 4) -> list[tuple[int, ...]]:
    return list(itertools.product(range(3), repeat=depth))


def card_rewards(eps: float, c: float = 0.0) -> torch.Tensor:
    """Return the card's R+ and R- by counting tokens, with a tie-breaker of weight c."""
    correct = [float(sum(s) % 3 == 0) for s in strings()]
    style = [sum(x == 2 for x in s) / 4 for s in strings()]
    return torch.tensor(
        [[r + (c + sign * eps) * x for r, x in zip(correct, style, strict=True)] for sign in (1, -1)], dtype=DOUBLE
    )


def test_the_tree_pays_as_the_study_says():
    one = learner(eps=0.03, tie_break=0.0)
    assert int(one.correct.sum()) == 27 and len(one.correct) == 81
    rewards = one.string_rewards(0.03)
    close(rewards - rewards[0, 0], card_rewards(0.03) - card_rewards(0.03)[0, 0])
    close(float((rewards[0] - rewards[1]).abs().max()), 0.06)


@pytest.mark.parametrize(("w", "taste"), [(0.5, 0.0), (1.0, 0.05), (0.0, -0.05), (0.7, 0.02)])
def test_the_weight_mixes_two_tastes_around_the_tie_breaker(w, taste):
    rewards = learner(w=w, tie_break=0.01).string_rewards(0.003)
    expected = card_rewards(0.003, 0.01 + taste)
    close(rewards - rewards[0, 0], expected - expected[0, 0])


def test_half_the_weight_keeps_the_ties_of_the_study():
    rewards = learner(tie_break=0.0).string_rewards(0.0)
    close(gibbs_law(rewards, 0.0)[0], [float(sum(s) % 3 == 0) / 27 for s in strings()])


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.0), (0.0, 0.2), (0.3, 0.1), (0.0, 0.0)])
def test_an_exact_step_climbs_the_regularized_return(alpha, beta):
    one = learner(alpha=alpha, beta=beta, lr=0.7, eps=0.05, tie_break=0.0)
    base = torch.softmax(torch.as_tensor(one.log_base), dim=0)
    close(base.sum(), 1.0)
    close(one.log_base.exp(), base)
    theta = torch.zeros(2, 40, 3, dtype=DOUBLE)
    for _ in range(3):
        one.update()
        for k, plain in enumerate(card_rewards(0.05)):
            leaf = theta[k].clone().requires_grad_()
            log_p = one.tree.log_probabilities(leaf)
            p = log_p.exp()
            J = (p * plain).sum() - alpha * (p * log_p).sum() - beta * (p * (log_p - base.log())).sum()
            theta[k] += 0.7 * torch.autograd.grad(J, leaf)[0]
    close(one.logits, theta, 1e-7)


def test_a_sampled_step_is_reinforce_on_the_strings_that_were_drawn():
    one = learner(gradient="sampled", batch=50, alpha=0.2, lr=0.5, eps=0.1)
    twin = one.fork()
    share = torch.full((2, 81), 1 / 81, dtype=DOUBLE)
    drawn = torch.multinomial(share, 50, replacement=True, generator=twin.rng.torch)
    one.update()
    for k in range(2):
        leaf = torch.zeros(40, 3, dtype=DOUBLE, requires_grad=True)
        log_p = one.tree.log_probabilities(leaf)[drawn[k]]
        earned = (one.string_rewards(0.1)[k][drawn[k]] - 0.2 * log_p).detach()
        (gradient,) = torch.autograd.grad(((earned - earned.mean()) * log_p).mean(), leaf)
        close(one.logits[k], 0.5 * gradient)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.0), (0.0, 0.0), (0.0, 0.3), (0.2, 0.1)])
def test_backups_lead_to_the_solvers_optimum(alpha, beta):
    one = advance(learner(alpha=alpha, beta=beta, gamma=0.7, eps=0.02), 120)
    Q0 = one.table.clone()
    Q0[0, :3] = 1.0
    for k, eps in enumerate((0.0, 0.02)):
        Q = Q0.clone()
        Q[0, 1] += eps
        R = inverse_bellman(Q, one.P, 0.7)
        found = soft_policy(one.Q[k], alpha + beta)
        if beta and not alpha:
            expected = kl_optimum(R, one.P, 0.7, beta, one.mdp_log_base.exp())[2]
        else:
            expected = soft_optimum(R + beta * one.mdp_log_base, one.P, 0.7, alpha + beta)[1]
        close(found, expected, 1e-9)
    assert float(one.update()["residual"]) < 1e-9


@pytest.mark.parametrize(
    ("m", "eps", "jump"), [(2, 1e-3, 1 / 2), (3, 1e-3, 2 / 3), (4, 1e-5, 3 / 4), (3, -1e-3, 1 / 3)]
)
def test_the_mdp_jumps_without_a_strength(m, eps, jump):
    one = advance(learner(alpha=0.0, m_ties=m, eps=eps, gamma=0.5), 60)
    assert figures(one)["mdp_tv"] == pytest.approx(jump, abs=1e-9)
    assert figures(one)["mdp_bound"] == figures(one)["tv_bound"] == 1.0
    assert figures(one)["mdp_loss"] == pytest.approx(0.0, abs=1e-9)


def test_an_update_tells_the_distance_the_bound_and_the_price():
    one = advance(learner(alpha=0.3, eps=0.1, tie_break=0.0, gamma=0.8), 40)
    found = figures(one)
    trained = [one.tree.log_probabilities(one.logits[k]).exp() for k in range(2)]
    rewards = card_rewards(0.1)
    best = [torch.softmax(r / 0.3, dim=0) for r in rewards]
    correct = torch.tensor([float(sum(s) % 3 == 0) for s in strings()], dtype=DOUBLE)
    expected = {
        "tv": distance(*trained),
        "tv_optimum": distance(*best),
        "tv_bound": 0.2 / 0.6,
        "tv_error": abs(distance(*trained) - distance(*best)),
        "accuracy": float(sum(p @ correct for p in trained)) / 2,
        "accuracy_optimum": float(sum(p @ correct for p in best)) / 2,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name
    change = one.mdp_rewards(0.1)
    assert found["mdp_bound"] == pytest.approx(min(1.0, float((change[0] - change[1]).abs().max()) / (0.6 * 0.2)))
    advance(one, 150)
    pi = soft_optimum(change[0], one.P, 0.8, 0.3)[1]
    assert figures(one)["mdp_loss"] == pytest.approx(1 - float(values_by_time(one.P, change[0], pi, 0.8)[0]), abs=1e-8)
    assert 0 < figures(one)["mdp_loss"] < 0.3 * math.log(4) / 0.2


def test_ascent_finds_the_optimum():
    one = learner(alpha=0.5, eps=0.1, lr=5.0)
    first = float(one.update()["shortfall"])
    last = float(advance(one, 300).update()["shortfall"])
    assert first > 0.1 and last < 1e-5
    assert figures(one)["tv_error"] < 1e-3
    assert figures(one)["accuracy"] == pytest.approx(figures(one)["accuracy_optimum"], abs=1e-3)


def test_reinforce_comes_close_too():
    one = advance(learner(alpha=0.5, eps=0.1, lr=5.0, gradient="sampled"), 300)
    assert figures(one)["tv_error"] < 0.05


def test_shortfall_is_the_strengths_kl_to_the_optimum():
    one = advance(learner(alpha=0.2, eps=0.1), 5)
    log_p = one.log_probabilities(one.logits)
    expected = 0.2 * float((log_p.exp() * (log_p - optimum(one).log())).sum()) / 2
    assert figures(one)["shortfall"] == pytest.approx(expected, rel=1e-9)
    assert float(one.update()["shortfall"]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 3.0])
@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_every_alpha_trains_and_draws(alpha, gradient):
    one = advance(learner(alpha=alpha, beta=3.0 if alpha == 3 else 0.0, lr=5.0, gradient=gradient), 60)
    assert one.logits.isfinite().all() and one.Q.isfinite().all()
    assert all(math.isfinite(value) for value in figures(one).values())
    assert one.views().keys() == {"cliff", "strings", "actions"}


def test_zero_beta_ignores_the_base_and_a_large_one_is_pinned_to_it():
    one, pinned = learner(alpha=0.0), learner(alpha=0.0, beta=3.0)
    rewards = one.string_rewards(1e-3)
    one.log_base = one.log_base.flip(0)
    assert torch.equal(one.string_rewards(1e-3), rewards)
    assert float(total_variation(optimum(pinned)[0], pinned.log_base.exp())) < 0.12


def test_knobs_act_on_the_very_next_update():
    settings = {
        "alpha": 1.0, "beta": 0.5, "eps": 0.5, "tie_break": 0.1, "w": 1.0, "m_ties": 2, "gamma": 0.3, "lr": 0.1,
    }  # fmt: skip
    acts_on_tree = {"alpha", "beta", "eps", "tie_break", "w", "lr"}
    acts_on_mdp = {"alpha", "beta", "eps", "m_ties", "gamma"}
    for name, value in settings.items():
        run, same = (Run(learner(), threads=1, autosave=0, evaluate_every=0) for _ in "ab")
        for each in (run, same):
            each.advance(3)
        run.tune(**{name: value})
        for each in (run, same):
            each.advance(1)
        assert torch.equal(run.learner.logits, same.learner.logits) == (name not in acts_on_tree), name
        assert torch.equal(run.learner.Q, same.learner.Q) == (name not in acts_on_mdp), name


def test_the_sign_of_the_tie_breaker_decides_the_side_of_the_cliff():
    for c, twos in ((0.01, 3), (-0.01, 0)):
        law = optimum(learner(alpha=0.0, tie_break=c))
        assert figures(learner(alpha=0.0, tie_break=c))["tv_optimum"] == 0.0  # both rewards on the same side
        best = [s for s, p in zip(strings(), law[0], strict=True) if p > 0]
        assert {s.count(2) for s in best} == {twos}


def test_the_mix_of_graders_crosses_the_cliff_at_one_half():
    for w, apart in ((0.45, 0.0), (0.5, 1.0), (0.55, 0.0)):
        assert figures(learner(alpha=0.0, w=w))["tv_optimum"] == apart


def test_the_cliff_view_shows_step_curve_and_bound():
    one = advance(learner(tie_break=0.0, eps=1e-3), 3)
    view = one.views()["cliff"]
    eps = torch.as_tensor(view.x)
    assert view.log_x and float(eps[0]) == pytest.approx(1e-6) and float(eps[-1]) == pytest.approx(1.0)
    assert (np.asarray(view.y["strength 0"]) == 1.0).all()
    close(view.y["bound E8"], (eps / 0.1).clamp(max=1))
    for i in (0, 30, 60):
        plus, minus = (torch.softmax(r / 0.1, dim=0) for r in card_rewards(float(eps[i])))
        assert view.y["optimum"][i] == pytest.approx(distance(plus, minus), abs=1e-6)
    here = np.isfinite(view.y["trained, here"])
    assert 1 < here.sum() < 6 and abs(math.log10(float(eps[torch.as_tensor(here)].mean())) + 3) < 0.1
    assert view.y["trained, here"][here][0] == pytest.approx(figures(one)["tv"])


@pytest.mark.parametrize("eps", [-1.0, -1e-6, 0.0, 1e-9, 1.0])
def test_the_trained_policies_are_marked_at_every_eps(eps):
    view = learner(eps=eps).views()["cliff"]
    assert np.isfinite(view.y["trained, here"]).sum() > 1


def test_the_strings_view_counts_correct_strings_by_their_2s():
    one = learner(alpha=0.0, tie_break=0.0)
    view = one.views()["strings"]
    assert list(view.labels) == ["0", "1", "2", "3", "wrong"]
    close(view.y_range, (0, 1))
    close(view.values["R+ trained"], [5 / 81, 12 / 81, 6 / 81, 4 / 81, 54 / 81])  # uniform at the start
    close(view.values["R+ optimum"], [0, 0, 0, 1, 0])
    close(view.values["R- optimum"], [1, 0, 0, 0, 0])
    assert list(learner(depth=3).views()["strings"].labels) == ["0", "1", "3", "wrong"]


def test_the_actions_view_follows_a_knob_while_paused():
    one = advance(learner(alpha=0.0, gamma=0.5), 60)
    close(one.views()["actions"].values["R_0"], [1 / 3, 1 / 3, 1 / 3, 0])
    close(one.views()["actions"].values["R_eps"], [0, 1, 0, 0])
    one.config.m_ties = 2
    close(one.views()["actions"].values["R_0"], [1 / 2, 1 / 2, 0, 0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": -0.1}, "alpha.*0 to 3.*-0.1"),
        ({"eps": 1.5}, "eps.*-1 to 1.*1.5"),
        ({"m_ties": 5}, "m_ties.*2 to 4.*5"),
        ({"gamma": 1.0}, "gamma.*0.99.*1.0"),
        ({"gradient": "noisy"}, "gradient.*noisy"),
        ({"depth": 1}, "depth.*1"),
        ({"batch": 1}, "batch.*1"),
        ({"actions": 1, "m_ties": 2}, "actions.*1"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(settings, words):
    with pytest.raises(KnobError, match=words):
        learner(**settings)


def test_structure_stays_once_a_run_has_begun():
    with pytest.raises(StructureError, match=r"gradient.*new run"):
        Run(learner(), threads=1, autosave=0).tune(gradient="sampled")


# ---- the study -----------------------------------------------------------------------------------------------


def test_the_exact_figures_are_the_cards():
    found = PolicyCliff(device="cpu", tie_break=0.0, eps=3e-5, actions=5).exact_figures()
    assert found["tree_hard_tv"] == 1.0
    for alpha, lipschitz in {"0.01": 9.9, "0.03": 3.3, "0.1": 0.99, "0.3": 0.33, "1": 0.099}.items():
        assert found[f"tree_L_{alpha}"] == pytest.approx(lipschitz, rel=0.01)
        assert found[f"tree_L_{alpha}"] < 1 / (2 * float(alpha))
    for alpha, accuracy in {"0.01": 1.0, "0.03": 1.0, "0.1": 1.0, "0.3": 0.933, "1": 0.576}.items():
        assert found[f"tree_accuracy_{alpha}"] == pytest.approx(accuracy, abs=0.001)
    for world in ("tree", "mdp"):
        L = [float(found[f"{world}_L_{alpha:g}"]) for alpha in (0.01, 0.03, 0.1, 0.3)]
        slope = np.polyfit(np.log([0.01, 0.03, 0.1, 0.3]), np.log(L), 1)[0]
        assert found[f"{world}_slope"] == pytest.approx(slope)
    assert found["mdp_hard_tv"] == pytest.approx(2 / 3)
    assert 0 < found["tree_tightness"] < 1 and 0 < found["mdp_tightness"] < 1
    wrong = 54 * math.exp(-1 / 0.3) / (27 + 54 * math.exp(-1 / 0.3))
    more = 54 * math.exp(-1) / (27 + 54 * math.exp(-1))
    assert found["tree_price"] == pytest.approx(math.log(more / wrong), rel=1e-3)


@pytest.mark.parametrize("mode", ["smoke", "fast", "full"])
def test_the_studys_trees_are_the_cards(mode):
    for job in study.jobs(mode):
        config = PolicyCliff.Config(**job.settings)
        assert (config.depth, config.tie_break, config.w, config.beta) == (4, 0.0, 0.5, 0.0)
        if mode == "full":
            assert (config.states, config.actions, config.m_ties, config.gamma) == (20, 5, 3, 0.9)
    assert mode != "full" or {job.labels["seed"] for job in study.jobs(mode)} == set(range(20))


def test_study_smoke_form_gives_a_verdict_for_each_criterion():
    result = study.run("smoke", n_jobs=1)
    assert [verdict.name for verdict in result.verdicts] == [criterion.name for criterion in study.criteria]
    assert {row["arm"] for row in result.measures} == set(study.arms)
