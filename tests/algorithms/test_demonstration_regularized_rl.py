"""Demonstration-regularized RL: equations against loops and enumerations, the card's identities, the learner."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import polrl.foundations.demonstration_regularized_rl as method
from polrl import Run
from polrl.core.errors import KnobError
from polrl.foundations.demonstration_regularized_rl import (
    MAX_KL,
    MIN_GAP,
    DemonstrationRegularizedRL,
    balancing_strength,
    behaviour_policies,
    clone,
    cloning_curve,
    cloning_kl,
    cloning_objective,
    exploration_bonus,
    kl_backup,
    optimistic_plan,
    preference_loss,
    regularized_objective,
    regularized_plan,
    study,
    trajectory_kl,
    transfer_bound,
)
from polrl.worlds.finite_horizon import (
    ALIVE,
    DEAD,
    count_transitions,
    empirical_kernel,
    greedy_policy,
    leaky_lock,
    optimal_values,
    policy_values,
    random_finite_mdp,
    roll_out,
    sample_episodes,
    visits,
)

close = torch.testing.assert_close


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def world(seed=0, H=3, S=3, A=2):
    """A random MDP, and two policies in it."""
    draw = generator(seed)
    P, R = random_finite_mdp(H, S, A, draw)
    pi, ref = (torch.softmax(torch.randn(H, S, A, generator=draw, dtype=torch.float64), dim=-1) for _ in "ab")
    return P, R, pi, ref


def trajectories(P, A):
    """Every (states, actions, probability of the states) of H steps from state 0; the last next state is left out."""
    H, S = P.shape[:2]
    for actions in itertools.product(range(A), repeat=H):
        for later in itertools.product(range(S), repeat=H - 1):
            states = (0, *later)
            moved = 1.0
            for h in range(H - 1):
                moved *= float(P[h, states[h], actions[h], states[h + 1]])
            yield states, actions, moved


def along(table, states, actions):
    return [table[h, s, a] for h, (s, a) in enumerate(zip(states, actions, strict=True))]


def expectation(P, pi, what):
    """The sum over all trajectories of their probability under pi times what(states, actions)."""
    total = torch.zeros((), dtype=torch.float64)
    for states, actions, moved in trajectories(P, pi.shape[-1]):
        total = total + moved * math.prod(along(pi, states, actions)) * what(states, actions)
    return total


def penalised_value(P, R, pi, ref, lam):
    def inside(states, actions):
        ratio = [torch.log(p / q) for p, q in zip(along(pi, states, actions), along(ref, states, actions), strict=True)]
        return sum(along(R, states, actions)) - lam * sum(ratio)

    return expectation(P, pi, inside)


def numpy_plan(P, R, ref, lam, bonus=None, clipped=False):
    """E4, or one side of E7, with loops over states."""
    P, R, ref = P.numpy(), R.numpy(), ref.numpy()
    H, S, A = R.shape
    bonus = np.zeros_like(R) if bonus is None else bonus.numpy()
    Q, V, pi = np.zeros((H, S, A)), np.zeros((H + 1, S)), np.zeros((H, S, A))
    for h in range(H - 1, -1, -1):
        for s in range(S):
            for a in range(A):
                Q[h, s, a] = R[h, s, a] + bonus[h, s, a] + sum(P[h, s, a, t] * V[h + 1, t] for t in range(S))
                if clipped:
                    Q[h, s, a] = min(Q[h, s, a], H - h)
            if lam == 0:
                best = max(range(A), key=lambda a: Q[h, s, a])
                V[h, s], pi[h, s, best] = Q[h, s, best], 1.0
            else:
                total = sum(ref[h, s, a] * math.exp(Q[h, s, a] / lam) for a in range(A))
                V[h, s] = lam * math.log(total)
                pi[h, s] = [ref[h, s, a] * math.exp((Q[h, s, a] - V[h, s]) / lam) for a in range(A)]
    return Q, V, pi


# ---- the world -----------------------------------------------------------------------------------------------


def test_values_and_visits_are_sums_over_all_trajectories():
    P, R, pi, _ = world()
    value = expectation(P, pi, lambda states, actions: sum(along(R, states, actions)))
    close(policy_values(P, R, pi)[0, 0], value)
    assert (policy_values(P, R, pi)[-1] == 0).all()
    seen = torch.zeros(3, 3, dtype=torch.float64)
    for states, actions, moved in trajectories(P, 2):
        for h, s in enumerate(states):
            seen[h, s] += moved * math.prod(along(pi, states, actions))
    close(visits(P, pi), seen)
    close((visits(P, pi).unsqueeze(-1) * pi * R).sum(), value)
    assert visits(P, pi, start=2)[0].tolist() == [0, 0, 1]


def test_rewards_and_policies_may_come_in_batches():
    P, R, pi, ref = world()
    both = torch.stack([pi, ref])
    close(policy_values(P, R, both), torch.stack([policy_values(P, R, each) for each in both]))
    close(visits(P, both), torch.stack([visits(P, each) for each in both]))
    close(trajectory_kl(P, both, ref), torch.stack([trajectory_kl(P, each, ref) for each in both]))
    rewards = torch.stack([R, 2 * R])
    for many, one, two in zip(*(regularized_plan(P, r, ref, 0.3) for r in (rewards, R, 2 * R)), strict=True):
        close(many, torch.stack([one, two]))
    Q, V = optimal_values(P, rewards)
    close(Q[1], 2 * Q[0])
    close(V[1], 2 * V[0])


def test_the_best_policy_is_best_among_all_deterministic_ones():
    P, R, _, _ = world(H=2)
    values = []
    for choice in itertools.product(range(2), repeat=6):
        pi = torch.nn.functional.one_hot(torch.tensor(choice).reshape(2, 3), 2).double()
        values.append(float(policy_values(P, R, pi)[0, 0]))
    Q, V = optimal_values(P, R)
    assert float(V[0, 0]) == pytest.approx(max(values))
    close(policy_values(P, R, greedy_policy(Q)), V)
    assert greedy_policy(torch.tensor([0.5, 0.5, 0.1])).tolist() == [1, 0, 0]


def test_episodes_follow_the_policy_and_the_world():
    P, _, pi, _ = world()
    states, actions = sample_episodes(P, pi, 40_000, generator())
    assert states.shape == (40_000, 4) and actions.shape == (40_000, 3)
    for h in range(3):
        seen = torch.bincount(states[:, h], minlength=3) / 40_000
        close(seen.double(), visits(P, pi)[h], atol=0.01, rtol=0)
    frequency = empirical_kernel(count_transitions(states, actions, 3, 2))
    tried = count_transitions(states, actions, 3, 2).sum(-1)
    close(frequency[tried > 1000], P[tried > 1000], atol=0.05, rtol=0)
    taken = tried[1] / tried[1].sum(-1, keepdim=True)
    close(taken.double(), pi[1], atol=0.03, rtol=0)


def test_equal_chance_gives_equal_episodes_and_each_follows_its_own_policy():
    P, _ = leaky_lock(horizon=3, actions=3)
    chance = torch.tensor([[[0.0, 0.0], [0.5, 0.999], [0.999, 0.0]]], dtype=torch.float64)
    uniform = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
    states, actions = roll_out(P, uniform, chance)
    assert actions.tolist() == [[0, 1, 2]]
    assert states.tolist() == [[ALIVE, ALIVE, DEAD, DEAD]]  # no action keeps alive with 0.999
    pure = torch.stack([greedy_policy(torch.eye(3)[a].expand(3, 2, 3)).double() for a in range(3)])
    which = torch.tensor([2, 0, 1, 2])
    _, actions = roll_out(P, pure, chance.expand(4, -1, -1), which)
    assert actions.tolist() == [[2] * 3, [0] * 3, [1] * 3, [2] * 3]
    with pytest.raises(ValueError, match="which must name the policy of each episode, there are 3"):
        roll_out(P, pure, chance)


def test_what_has_no_probability_never_happens():
    P, _ = leaky_lock()
    pi = torch.zeros(6, 2, 10, dtype=torch.float64)
    pi[..., 3], pi[..., 7] = 0.1, 0.9
    for uniform in (0.0, 0.1, 0.5, 1 - 2**-53):
        _, actions = roll_out(P, pi, torch.full((1, 6, 2), uniform, dtype=torch.float64))
        assert set(actions.flatten().tolist()) <= {3, 7}
    # Ten tenths sum to less than one in floating point: the last action takes the rest.
    _, actions = roll_out(P, torch.full_like(pi, 0.1), torch.full((1, 6, 2), 1 - 2**-53, dtype=torch.float64))
    assert actions.tolist() == [[9] * 6]


def test_transitions_are_counted_one_by_one():
    P, _, pi, _ = world()
    states, actions = sample_episodes(P, pi, 20, generator())
    expected = torch.zeros(3, 3, 2, 3, dtype=torch.long)
    for i in range(20):
        for h in range(3):
            expected[h, states[i, h], actions[i, h], states[i, h + 1]] += 1
    counts = count_transitions(states, actions, 3, 2)
    assert torch.equal(counts, expected)
    kernel = empirical_kernel(counts)
    for h, s, a in itertools.product(range(3), range(3), range(2)):
        n = int(expected[h, s, a].sum())
        right = (expected[h, s, a] / n).double() if n else torch.full((3,), 1 / 3, dtype=torch.float64)
        close(kernel[h, s, a], right, atol=1e-7, rtol=0)
    assert kernel.dtype == torch.float64
    close(kernel.sum(-1), torch.ones(3, 3, 2, dtype=torch.float64))


def test_the_leaky_lock_is_the_card_s():
    P, R = leaky_lock()
    assert P.shape == (6, 2, 10, 2) and P.dtype == torch.float64
    draw = np.random.default_rng(0)
    for h in range(6):
        keep = draw.uniform(0.3, 0.92, 10)
        keep[draw.integers(10)] = 0.97
        assert P[h, ALIVE, :, ALIVE].tolist() == keep.tolist()
    close(P.sum(-1), torch.ones(6, 2, 10, dtype=torch.float64))
    assert (P[:, DEAD, :, DEAD] == 1).all()
    assert (R[-1, ALIVE] == 1).all() and float(R.sum()) == 10
    Q, V = optimal_values(P, R)
    assert float(V[0, 0]) == pytest.approx(0.97**5) and round(float(V[0, 0]), 4) == 0.8587
    uniform = torch.full((6, 2, 10), 0.1, dtype=torch.float64)
    assert round(float(policy_values(P, R, uniform)[0, 0]), 3) == 0.126
    expert = 0.9 * greedy_policy(Q) + 0.01
    assert round(float(V[0, 0] - policy_values(P, R, expert)[0, 0]), 3) == 0.128
    assert not torch.equal(leaky_lock(seed=1)[0], P)
    with pytest.raises(ValueError, match="horizon >= 2 and actions >= 2, got 1 and 10"):
        leaky_lock(horizon=1)


def test_a_random_mdp_is_one_and_follows_its_generator():
    P, R = random_finite_mdp(4, 3, 2, generator())
    close(P.sum(-1), torch.ones(4, 3, 2, dtype=torch.float64))
    assert (P > 0).all() and (R >= 0).all() and (R <= 1).all()
    assert torch.equal(random_finite_mdp(4, 3, 2, generator())[0], P)


# ---- E1-E3, cloning ------------------------------------------------------------------------------------------


def counts_of_demos(n=40, seed=0):
    P, _, pi, _ = world(seed)
    states, actions = sample_episodes(P, pi, n, generator(seed))
    return count_transitions(states, actions, 3, 2).sum(-1).double()


@pytest.mark.parametrize("smooth", [0.5, 1.0, 3.0])
def test_the_clone_minimises_its_objective(smooth):
    counts = counts_of_demos()
    best = clone(counts, smooth)
    by_hand = 0.0
    for h, s, a in itertools.product(range(3), range(3), range(2)):
        n = sum(float(counts[h, s, b]) for b in range(2))
        assert float(best[h, s, a]) == pytest.approx((float(counts[h, s, a]) + smooth) / (n + 2 * smooth))
        by_hand += (float(counts[h, s, a]) + smooth) * math.log(1 / float(best[h, s, a]))
    assert float(cloning_objective(best, counts, smooth)) == pytest.approx(by_hand, rel=1e-12)
    logits = best.log().requires_grad_()
    (slope,) = torch.autograd.grad(cloning_objective(logits.softmax(-1), counts, smooth), logits)
    close(slope, torch.zeros_like(slope), atol=1e-10, rtol=0)
    other = (best.log() + 0.1 * torch.randn(best.shape, generator=generator(), dtype=torch.float64)).softmax(-1)
    assert cloning_objective(other, counts, smooth) > cloning_objective(best, counts, smooth)


def test_one_is_the_clone_s_own_smoothing():
    counts = torch.tensor([[[3.0, 1.0, 0.0]]], dtype=torch.float64)
    close(clone(counts), torch.tensor([[[4 / 7, 2 / 7, 1 / 7]]], dtype=torch.float64))
    close(cloning_objective(clone(counts), counts), cloning_objective(clone(counts), counts, 1.0))
    assert clone(torch.tensor([[[2, 1]]])).dtype == torch.float64


def test_without_demonstrations_the_clone_is_uniform():
    none = torch.zeros(2, 3, 4, dtype=torch.float64)
    for smooth in (0.0, 1.0, 10.0):
        close(clone(none, smooth), torch.full((2, 3, 4), 0.25, dtype=torch.float64))


def test_smoothing_lowers_the_likelihood_of_the_demonstrations():
    counts = counts_of_demos()
    raw, smoothed = clone(counts, 0.0), clone(counts)
    assert torch.xlogy(counts, smoothed).sum() < torch.xlogy(counts, raw).sum()
    for each in (raw, smoothed):
        close(each.sum(-1), torch.ones(3, 3, dtype=torch.float64))


def test_without_smoothing_the_demonstrations_never_seen_are_forbidden():
    counts = torch.tensor([[[5.0, 0.0]]], dtype=torch.float64)
    assert clone(counts, 0.0).tolist() == [[[1.0, 0.0]]]
    assert float(cloning_objective(clone(counts, 0.0), counts, 0.0)) == 0.0


def test_the_clone_s_kl_falls_like_one_over_the_demonstrations():
    assert cloning_kl(30, 4, 100) == pytest.approx(0.45)  # H S (A - 1) / (2 N) of the card
    assert cloning_kl(25, 4, 1000) == pytest.approx(25 * 3 / 2000)
    sizes = (1000, 3000, 10_000)
    for size, found in zip(sizes, cloning_curve(sizes, seed=0), strict=True):
        assert 0.75 < found / cloning_kl(25, 4, size) < 1.15


# ---- E4, penalised planning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.05, 0.3, 2.0])
def test_planning_is_the_backward_recursion(lam):
    P, R, _, ref = world()
    for found, expected in zip(regularized_plan(P, R, ref, lam), numpy_plan(P, R, ref, lam), strict=True):
        close(found.numpy(), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("lam", [0.01, 0.2, 3.0])
def test_what_a_policy_lacks_is_lambda_times_its_kl_from_the_best(lam):
    for seed in range(5):
        P, R, pi, ref = world(seed, H=4)
        best = regularized_plan(P, R, ref, lam)
        lack = best.V[0, 0] - regularized_objective(P, R, pi, ref, lam)
        assert float(lack) == pytest.approx(lam * float(trajectory_kl(P, pi, best.pi)), abs=1e-10)
        close(regularized_objective(P, R, best.pi, ref, lam), best.V[0, 0], atol=1e-12, rtol=0)


def test_an_error_in_q_costs_its_square():
    P, R, _, ref = world(H=1)
    lam, wrong = 0.5, torch.randn(1, 3, 2, generator=generator(), dtype=torch.float64)
    best = regularized_plan(P, R, ref, lam)

    def loss(delta):
        _, pi = kl_backup(best.Q + delta * wrong, ref, lam)
        return float(best.V[0, 0] - regularized_objective(P, R, pi, ref, lam))

    assert loss(2e-3) / loss(1e-3) == pytest.approx(4.0, rel=0.01)


def test_a_large_lambda_gives_the_clone_and_a_small_one_plain_rl():
    P, R, _, ref = world()
    far = regularized_plan(P, R, ref, 1e8)
    close(far.pi, ref, atol=1e-7, rtol=0)
    close(far.V, policy_values(P, R, ref), atol=1e-6, rtol=0)
    near = regularized_plan(P, R, ref, 1e-6)
    close(near.V, optimal_values(P, R)[1], atol=1e-4, rtol=0)
    values = [float(regularized_plan(P, R, ref, lam).V[0, 0]) for lam in (0.0, 1e-3, 0.01, 0.1, 1.0, 10.0)]
    assert values == sorted(values, reverse=True)


def test_zero_lambda_ignores_the_clone_even_where_it_forbids():
    P, R, _, ref = world()
    forbidding = greedy_policy(-optimal_values(P, R)[0])
    plan = regularized_plan(P, R, forbidding, 0.0)
    close(plan.V, optimal_values(P, R)[1])
    close(plan.pi, greedy_policy(optimal_values(P, R)[0]))
    assert regularized_plan(P, R, forbidding, 1e-4).V[0, 0] < plan.V[0, 0] - 0.01


def test_the_penalised_value_lies_between_its_bounds():
    for seed, lam in itertools.product(range(5), (0.02, 0.3, 5.0)):
        P, R, _, ref = world(seed)
        Q, V = optimal_values(P, R)
        best, optimum = greedy_policy(Q), regularized_plan(P, R, ref, lam).V[0, 0]
        assert V[0, 0] - lam * trajectory_kl(P, best, ref) <= optimum + 1e-12
        assert policy_values(P, R, ref)[0, 0] - 1e-12 <= optimum <= V[0, 0] + 1e-12
        uniform = torch.full_like(ref, 0.5)
        assert regularized_plan(P, R, uniform, lam).V[0, 0] >= V[0, 0] - lam * 3 * math.log(2) - 1e-12


def test_a_constant_reward_at_a_step_moves_the_values_only():
    P, R, _, ref = world()
    added = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1)
    plain, moved = regularized_plan(P, R, ref, 0.2), regularized_plan(P, R + added, ref, 0.2)
    close(moved.pi, plain.pi)
    close(moved.V[0], plain.V[0] + 1.3)


def test_a_backup_s_gradient_is_its_policy():
    draw = generator()
    Q = torch.randn(4, 3, generator=draw, dtype=torch.float64).requires_grad_()
    ref = torch.softmax(torch.randn(4, 3, generator=draw, dtype=torch.float64), dim=-1)
    for lam in (0.0, 1e-3, 0.4, 100.0):
        value, pi = kl_backup(Q, ref, lam)
        (slope,) = torch.autograd.grad(value.sum(), Q)
        close(slope, pi.detach())
        assert value.isfinite().all() and pi.isfinite().all()


def test_a_backup_s_policy_moves_by_its_own_spread_over_lambda():
    Q, ref, lam = torch.tensor([0.3, 0.1, 0.8]).double(), torch.tensor([0.5, 0.3, 0.2]).double(), 0.4
    moves = torch.autograd.functional.jacobian(lambda Q: kl_backup(Q, ref, lam)[1], Q)
    pi = kl_backup(Q, ref, lam)[1]
    close(moves, (torch.diag(pi) - torch.outer(pi, pi)) / lam)


def test_a_backup_by_hand():
    value, pi = kl_backup(*torch.tensor([[[1.0, 0.0]], [[0.25, 0.75]]], dtype=torch.float64), 0.5)
    total = 0.25 * math.exp(2) + 0.75
    assert float(value) == pytest.approx(0.5 * math.log(total))
    assert pi[0].tolist() == pytest.approx([0.25 * math.exp(2) / total, 0.75 / total])


def test_what_the_clone_forbids_stays_forbidden():
    Q, ref = torch.tensor([[0.0, 5.0]]).double(), torch.tensor([[1.0, 0.0]]).double()
    value, pi = kl_backup(Q, ref, 0.1)
    assert value.tolist() == [0.0] and pi.tolist() == [[1.0, 0.0]]


def test_rewards_divided_by_lambda_need_strength_one():
    P, R, _, ref = world()
    for lam in (0.01, 0.3, 2.0):
        direct, scaled = regularized_plan(P, R, ref, lam), regularized_plan(P, R / lam, ref, 1.0)
        close(scaled.pi, direct.pi)
        close(lam * scaled.V, direct.V)


# ---- E5, the objective and the KL ----------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.1, 1.5])
def test_the_objective_is_the_mean_over_trajectories_of_reward_and_log_ratio(lam):
    P, R, pi, ref = world()
    close(regularized_objective(P, R, pi, ref, lam), penalised_value(P, R, pi, ref, lam))


def test_the_objective_s_gradient_passes_through_the_log_ratio():
    P, R, pi, ref = world()
    logits = pi.log().requires_grad_()
    (found,) = torch.autograd.grad(regularized_objective(P, R, logits.softmax(-1), ref, 0.7), logits)
    (expected,) = torch.autograd.grad(penalised_value(P, R, logits.softmax(-1), ref, 0.7), logits)
    close(found, expected, atol=1e-12, rtol=0)
    place, step = (1, 2, 0), 1e-6
    ends = []
    for sign in (1, -1):
        moved = logits.detach().clone()
        moved[place] += sign * step
        ends.append(float(regularized_objective(P, R, moved.softmax(-1), ref, 0.7)))
    assert float(found[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)
    assert regularized_objective(P, R, pi, ref.clone().requires_grad_(), 0.7).requires_grad


def test_the_log_ratio_itself_is_differentiated():
    # For free entries; on the simplex what the ratio adds, one an entry, cancels.
    P, R, pi, ref = world(H=1)
    pi.requires_grad_()
    (slope,) = torch.autograd.grad(regularized_objective(P, R, pi, ref, 0.7), pi)
    expected = R - 0.7 * (pi.log() - ref.log() + 1)
    close(slope[0, 0], expected[0, 0].detach())
    assert (slope[0, 1:] == 0).all()


def test_the_optimum_s_gradient_by_the_rewards_is_its_occupancy():
    P, R, _, ref = world()
    R.requires_grad_()
    plan = regularized_plan(P, R, ref, 0.3)
    (slope,) = torch.autograd.grad(plan.V[0, 0], R)
    pi = plan.pi.detach()
    close(slope, visits(P, pi).unsqueeze(-1) * pi)


def test_the_kl_is_that_of_whole_trajectories():
    for seed in range(3):
        P, _, pi, ref = world(seed)

        def log_ratio(states, actions, pi=pi, ref=ref):
            return sum(along(pi.log() - ref.log(), states, actions))

        close(trajectory_kl(P, pi, ref), expectation(P, pi, log_ratio))
        assert float(trajectory_kl(P, pi, pi)) == pytest.approx(0, abs=1e-12)


def test_the_first_policy_s_states_weigh_the_kl():
    P, _, pi, ref = world()
    assert abs(float(trajectory_kl(P, pi, ref) - trajectory_kl(P, ref, pi))) > 1e-3
    by_state = (pi * (pi / ref).log()).sum(-1)
    close(trajectory_kl(P, pi, ref), (visits(P, pi) * by_state).sum())
    assert abs(float(trajectory_kl(P, pi, ref) - (visits(P, ref) * by_state).sum())) > 1e-3


def test_a_clone_that_forbids_is_infinitely_far_from_the_expert_but_not_the_other_way():
    P, _, pi, _ = world()
    forbidding = pi.clone()
    forbidding[1, 1] = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert float(trajectory_kl(P, pi, forbidding)) == math.inf
    assert math.isfinite(float(trajectory_kl(P, forbidding, pi)))
    # Where nobody comes, an infinite KL does not count.
    unreached = pi.clone()
    unreached[0, 1] = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert float(trajectory_kl(P, pi, unreached)) == pytest.approx(0, abs=1e-12)


# ---- E6, transfer --------------------------------------------------------------------------------------------


def test_no_policy_s_gap_exceeds_the_bound():
    tightest = math.inf
    for seed, lam in itertools.product(range(10), (0.0, 0.01, 0.1, 1.0)):
        P, R, pi, _ = world(seed)
        Q, V = optimal_values(P, R)
        expert = 0.9 * greedy_policy(Q) + 0.05
        states, actions = sample_episodes(P, expert, 50, generator(seed))
        ref = clone(count_transitions(states, actions, 3, 2).sum(-1).double())
        plan = regularized_plan(P, R, ref, lam)
        for policy in (plan.pi, pi, 0.9 * plan.pi + 0.1 * pi):
            gap, expert_gap = (float(V[0, 0] - policy_values(P, R, each)[0, 0]) for each in (policy, expert))
            eps_rl = float(plan.V[0, 0] - regularized_objective(P, R, policy, ref, lam))
            bound = transfer_bound(expert_gap, eps_rl, lam, float(trajectory_kl(P, expert, ref)))
            assert gap <= bound + 1e-12
            tightest = min(tightest, bound - gap)
    assert tightest < 0.2


def test_the_bound_and_the_balance_by_hand():
    assert transfer_bound(0.1, 0.02, 0.5, 0.3) == pytest.approx(0.1 + 0.02 + 0.15)
    assert transfer_bound(0.1, 0.02, 0.0, math.inf) == pytest.approx(0.12)  # without a penalty the clone is no matter
    lam = balancing_strength(0.02, 0.4)
    assert lam == pytest.approx(0.05)
    assert transfer_bound(0.1, 0.02, lam, 0.4) == pytest.approx(0.1 + 2 * 0.02)


# ---- E7, the online learner ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.1, 1.0])
def test_optimistic_planning_is_two_clipped_recursions(lam):
    P, R, _, ref = world(H=4)
    bonus = torch.rand(R.shape, generator=generator(), dtype=torch.float64)
    upper, lower, pi = optimistic_plan(P, R, bonus, ref, lam)
    high, low = (numpy_plan(P, R, ref, lam, sign * bonus, clipped=True) for sign in (1, -1))
    close(upper.numpy(), high[0], atol=1e-12, rtol=0)
    close(lower.numpy(), low[0], atol=1e-12, rtol=0)
    close(pi.numpy(), high[2], atol=1e-12, rtol=0)
    unclipped = numpy_plan(P, R, ref, lam, bonus)
    assert (unclipped[0] > upper.numpy() + 1e-3).any(), "the clip must matter in this test"


def test_without_a_bonus_both_sides_are_the_plan():
    P, R, _, ref = world()
    upper, lower, pi = optimistic_plan(P, R, torch.zeros_like(R), ref, 0.2)
    plan = regularized_plan(P, R, ref, 0.2)
    for found, expected in ((upper, plan.Q), (lower, plan.Q), (pi, plan.pi)):
        close(found, expected)


def test_the_upper_side_stops_at_the_steps_to_go_and_the_lower_side_nowhere():
    P, R, _, ref = world(H=4)
    for lam in (0.0, 0.5):
        upper, lower, _ = optimistic_plan(P, R, torch.full_like(R, 50.0), ref, lam)
        for h in range(4):
            assert (upper[h] == 4 - h).all()
        assert (lower[0] < -100).all()


def test_the_bonus_by_hand():
    counts = torch.tensor([0.0, 1.0, 4.0, 100.0], dtype=torch.float64).expand(3, 2, 4)
    bonus = exploration_bonus(counts, 0.2)
    for h in range(3):
        left = 3 - h
        assert bonus[h, 1].tolist() == pytest.approx([0.2 * left, 0.2 * left, 0.1 * left, 0.02 * left])
    assert exploration_bonus(counts.long(), 0.2).dtype == torch.float64
    assert (exploration_bonus(counts, 0.0) == 0).all()


def test_behaviour_deviates_to_the_widest_action_at_one_step_or_nowhere():
    P, R, pi, ref = world(H=3, S=2, A=3)
    upper = ref * 3
    lower = upper - pi.flip(-1) - 0.1  # neither the highest nor the lowest need be the widest
    assert not torch.equal((upper - lower).argmax(-1), upper.argmax(-1))
    policies = behaviour_policies(upper, lower, pi)
    assert policies.shape == (4, 3, 2, 3)
    for k, h, s in itertools.product(range(4), range(3), range(2)):
        width = [float(upper[h, s, a] - lower[h, s, a]) for a in range(3)]
        expected = [float(a == width.index(max(width))) for a in range(3)] if k == h else pi[h, s].tolist()
        assert policies[k, h, s].tolist() == expected
    assert torch.equal(policies[3], pi)


def test_enough_bonus_makes_the_upper_side_optimistic():
    P, R, _, ref = world(H=4, S=3, A=2)
    states, actions = sample_episodes(P, torch.full_like(R, 0.5), 60, generator())
    counts = count_transitions(states, actions, 3, 2)
    bonus = exploration_bonus(counts.sum(-1).double(), 2.0)
    for lam in (0.0, 0.1):
        upper, lower, _ = optimistic_plan(empirical_kernel(counts), R, bonus, ref, lam)
        truth = regularized_plan(P, R, ref, lam).Q
        assert (upper >= truth).all() and (lower <= truth).all()


# ---- E9, preferences -----------------------------------------------------------------------------------------


def test_preferences_by_hand():
    one, zero = torch.tensor([1.0, 0.2, -3.0]).double(), torch.tensor([0.0, 0.5, 1.0]).double()
    wins = torch.tensor([1.0, 0.0, 1.0]).double()
    expected = 0.0
    for r1, r0, w in zip(one.tolist(), zero.tolist(), wins.tolist(), strict=True):
        p = 1 / (1 + math.exp(-(r1 - r0)))
        expected -= math.log(p if w else 1 - p)
    assert float(preference_loss(one, zero, wins)) == pytest.approx(expected)
    close(preference_loss(one, zero, wins.bool()), preference_loss(one, zero, wins))
    close(preference_loss(one + 5, zero + 5, wins), preference_loss(one, zero, wins))
    close(preference_loss(zero, one, 1 - wins), preference_loss(one, zero, wins))


def test_the_gradient_of_preferences_is_surprise():
    one, zero = torch.tensor([1.0, 0.2]).double().requires_grad_(), torch.tensor([0.0, 0.5]).double()
    wins = torch.tensor([1.0, 0.0]).double()
    (slope,) = torch.autograd.grad(preference_loss(one, zero, wins), one)
    assert slope.tolist() == pytest.approx([-1 / (1 + math.exp(1.0)), 1 / (1 + math.exp(0.3))])
    far = preference_loss(torch.tensor([1000.0]), torch.tensor([-1000.0]), torch.tensor([0.0]))
    assert float(far) == pytest.approx(2000.0)


# ---- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda P, R, pi: kl_backup(R[0], pi[0], -0.1), r"lam must be at least 0, and finite, got -0\.1"),
        (lambda P, R, pi: kl_backup(R[0], pi[0], math.inf), "lam must be at least 0, and finite, got inf"),
        (lambda P, R, pi: kl_backup(R[0], pi[0], math.nan), "lam must be at least 0, and finite, got nan"),
        (lambda P, R, pi: regularized_plan(P, R, pi, -1), "lam must be at least 0, and finite, got -1"),
        (lambda P, R, pi: regularized_objective(P, R, pi, pi, -1), "lam must be at least 0, and finite, got -1"),
        (lambda P, R, pi: transfer_bound(0.1, 0.1, -1, 0.1), "lam must be at least 0, and finite, got -1"),
        (lambda P, R, pi: clone(R, -0.5), r"smooth must be at least 0, got -0\.5"),
        (lambda P, R, pi: cloning_objective(pi, R, -0.5), r"smooth must be at least 0, got -0\.5"),
        (lambda P, R, pi: cloning_kl(3, 2, 0), "n_demo must be above 0, got 0"),
        (lambda P, R, pi: balancing_strength(0.1, 0.0), r"kl must be above 0, got 0\.0"),
        (lambda P, R, pi: exploration_bonus(R, -1), "c must be at least 0, got -1"),
    ],
)
def test_bad_input_is_refused_by_name_and_value(call, words):
    P, R, pi, _ = world()
    with pytest.raises(ValueError, match=words):
        call(P, R, pi)


# ---- the learner ---------------------------------------------------------------------------------------------


def make(**settings):
    return DemonstrationRegularizedRL(**{"device": "cpu", **settings})


def after(steps, **settings):
    learner = make(**settings)
    for _ in range(steps):
        learner.update()
    return learner


def test_zero_lambda_is_plain_rl():
    few, many = after(10, lam=0.0, n_demo=0), after(10, lam=0.0, n_demo=5000, smooth=3.0)
    assert torch.equal(few.transitions, many.transitions)
    assert torch.equal(few.recommended(few.clone()), many.recommended(many.clone()))
    penalised = after(10, lam=0.03, n_demo=5000, smooth=3.0)
    assert not torch.equal(many.transitions, penalised.transitions)


def test_the_penalty_passes_rl_and_the_clone():
    rl, both = (after(10, lam=lam).evaluate() for lam in (0.0, 0.03))
    assert both["gap"] < rl["gap"] / 5
    assert both["gap"] < both["clone_gap"] / 3


def test_it_learns():
    learner = make()
    before = learner.evaluate()
    for _ in range(30):
        learner.update()
    behind = learner.evaluate()
    assert behind["gap"] < before["gap"] / 10
    assert behind["regularized_gap"] < before["regularized_gap"] / 10


def test_a_large_lambda_stays_near_the_clone():
    figures = [after(5, lam=lam).evaluate() for lam in (0.03, 0.3, 3.0)]
    kls = [float(f["kl_to_clone"]) for f in figures]
    assert kls == sorted(kls, reverse=True) and kls[-1] < 0.01
    assert float(figures[-1]["gap"]) == pytest.approx(float(figures[-1]["clone_gap"]), rel=0.15)


def test_a_step_is_one_batch_of_episodes_planned_by_what_was_seen(monkeypatch):
    calls = []
    plain = method.optimistic_plan

    def recorded(*arguments):
        calls.append((arguments, plain(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(method, "optimistic_plan", recorded)
    learner = make(batch=7, lam=0.1, c_bonus=0.4)
    for step in range(3):
        seen = learner.transitions.clone()
        assert int(seen.sum()) == step * 7 * 6
        metrics = learner.update()
        P_hat, R, bonus, ref, lam = calls[-1][0]
        close(P_hat, empirical_kernel(seen))
        close(bonus, exploration_bonus(seen.sum(-1), 0.4))
        close(ref, learner.clone())
        assert lam == 0.1 and torch.equal(R, learner.R)
        assert 0 <= float(metrics["episode_return"]) <= 1
    assert learner.budget == math.ceil(1000 / 7)


def test_one_episode_in_seven_follows_the_policy_throughout(monkeypatch):
    seen = []
    plain = method.sample_episodes

    def recorded(P, pi, count, draw, which):
        seen.append(which)
        return plain(P, pi, count, draw, which)

    monkeypatch.setattr(method, "sample_episodes", recorded)
    make(batch=7000).update()
    shares = torch.bincount(seen[0], minlength=7) / 7000
    close(shares, torch.full((7,), 1 / 7), atol=0.02, rtol=0)


def test_more_demonstrations_add_to_the_same_first_ones(monkeypatch):
    shown = []
    monkeypatch.setattr(method, "clone", lambda counts, smooth: shown.append(counts) or clone(counts, smooth))
    learner = make()
    for n_demo in (0, 30, 300, 10_000):
        learner.config.n_demo = n_demo
        learner.clone()
    for fewer, more, n in zip(shown, shown[1:], (0, 30, 300), strict=False):
        assert (more >= fewer).all() and int(fewer[0].sum()) == n
    learner.config.expert_noise = 0.0
    learner.config.n_demo = 50
    perfect = learner.clone()
    assert float(perfect[0, ALIVE].max()) == pytest.approx(51 / 60)
    learner.config.smooth = 0.0
    assert learner.clone()[0, ALIVE].max() == 1.0


def test_many_demonstrations_give_the_expert():
    kls = []
    for n_demo in (30, 300, 10_000):
        learner = make(n_demo=n_demo)
        kls.append(float(trajectory_kl(learner.P, learner.expert(), learner.clone())))
    assert kls == sorted(kls, reverse=True)
    assert kls[-1] == pytest.approx(cloning_kl(11, 10, 10_000), rel=0.5)


def test_evaluation_is_exact():
    learner = after(5, lam=0.2)
    ref, expert, figures = learner.clone(), learner.expert(), learner.evaluate()
    _, _, policy = numpy_plan(empirical_kernel(learner.transitions), learner.R, ref, 0.2)
    policy = torch.from_numpy(policy)

    def value(pi):  # of the lock: how likely it is to be alive at the last step
        alive = 1.0
        for h in range(5):
            alive *= float((pi[h, ALIVE] * learner.P[h, ALIVE, :, ALIVE]).sum())
        return alive

    best = 0.97**5
    assert float(figures["gap"]) == pytest.approx(best - value(policy))
    assert float(figures["value"]) == pytest.approx(value(policy))
    assert float(figures["clone_gap"]) == pytest.approx(best - value(ref))
    assert float(figures["kl_to_clone"]) == pytest.approx(float(trajectory_kl(learner.P, policy, ref)))
    assert float(figures["digits"]) == pytest.approx(-math.log10(best - value(policy)))
    optimum = numpy_plan(learner.P, learner.R, ref, 0.2)[1][0, 0]
    penalised = value(policy) - 0.2 * float(trajectory_kl(learner.P, policy, ref))
    assert float(figures["regularized_gap"]) == pytest.approx(optimum - penalised, rel=1e-6)
    bound = best - value(expert) + optimum - penalised + 0.2 * float(trajectory_kl(learner.P, expert, ref))
    assert figures["bound"] == pytest.approx(min(bound, best))
    assert figures["gap"] <= figures["bound"]


def test_figures_stay_finite_where_the_clone_forbids():
    for lam in (0.0, 1e-3, 0.03):
        learner = after(3, lam=lam, smooth=0.0, n_demo=10)
        figures = {name: float(value) for name, value in learner.evaluate().items()}
        assert all(map(math.isfinite, figures.values())), figures
        assert figures["bound"] <= 0.97**5 + 1e-12
    assert float(after(3, lam=0.0, smooth=0.0, n_demo=10).evaluate()["kl_to_clone"]) <= MAX_KL
    solved = after(50, lam=0.0).evaluate()
    assert float(solved["gap"]) == MIN_GAP and float(solved["digits"]) == pytest.approx(6.0)


def test_actions_that_the_clone_forbids_are_never_recommended():
    learner = after(5, smooth=0.0, n_demo=20)
    ref = learner.clone()
    assert (ref == 0).any()
    assert (learner.recommended(ref)[ref == 0] == 0).all()


def test_knobs_act_on_the_very_next_update(monkeypatch):
    plans, clones, bonuses = [], [], []
    for name, kept, place in (("optimistic_plan", plans, 4), ("exploration_bonus", bonuses, 1), ("clone", clones, 1)):
        plain = getattr(method, name)

        def recorded(*arguments, plain=plain, kept=kept, place=place):
            kept.append(arguments)
            return plain(*arguments)

        monkeypatch.setattr(method, name, recorded)
    run = Run(make(), threads=1, autosave=0, evaluate_every=0)
    run.advance(1)
    assert plans[-1][4] == 0.03 and bonuses[-1][1] == 0.2 and clones[-1][1] == 1.0
    run.tune(lam=0.0, c_bonus=1.0, smooth=2.0, n_demo=17, expert_noise=0.0)
    run.advance(1)
    assert plans[-1][4] == 0.0 and bonuses[-1][1] == 1.0 and clones[-1][1] == 2.0
    assert int(clones[-1][0][0].sum()) == 17
    assert clones[-1][0][0, ALIVE].max() == 17  # a perfect expert shows one action


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"horizon": 1}, "horizon.*1"),
        ({"horizon": 21}, "horizon.*21"),
        ({"actions": 1}, "actions.*1"),
        ({"T": 0}, "T.*0"),
        ({"batch": 0}, "batch.*0"),
        ({"world_seed": -1}, "world_seed.*-1"),
        ({"lam": -0.1}, r"lam.*-0\.1"),
        ({"n_demo": 10_001}, "n_demo.*10001"),
        ({"n_demo": 10.5}, r"n_demo.*10\.5"),
        ({"expert_noise": 1.1}, r"expert_noise.*1\.1"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(settings, words):
    with pytest.raises(KnobError, match=words):
        make(**settings)


# ---- what is seen --------------------------------------------------------------------------------------------


def test_the_picture_of_policies_has_the_safest_action_first():
    learner = after(2)
    values = np.asarray(learner.views()["policies"].values)
    assert values.shape == (5, 32)
    assert np.isnan(values[:, [10, 21]]).all()
    expert = values[:, 22:]
    assert expert[:, 0] == pytest.approx(math.log10(0.91)) and expert[:, 1:] == pytest.approx(-2.0)
    safest = learner.P[:5, ALIVE, :, ALIVE].argmax(-1)
    ref = learner.clone()
    assert values[:, 0] == pytest.approx([math.log10(float(ref[h, ALIVE, safest[h]])) for h in range(5)])


def test_the_picture_of_strengths_is_exact_and_marks_the_present_one():
    learner = after(5, lam=0.2)
    view = learner.views()["strengths"]
    x, marker = np.asarray(view.x), np.asarray(view.y["now"])
    here = np.flatnonzero(x == 0.2)
    assert len(here) == 2 and marker[here].tolist() == [1e-4, 1.0] and np.isnan(np.delete(marker, here)).all()
    assert view.y["data so far"][here[0]] == pytest.approx(float(learner.evaluate()["gap"]))
    assert view.y["clone"][0] == pytest.approx(float(learner.evaluate()["clone_gap"]))
    ref = learner.clone()
    for place in (0, 10, 27):
        policy = regularized_plan(learner.P, learner.R, ref, float(x[place])).pi
        lack = 0.97**5 - float(policy_values(learner.P, learner.R, policy)[0, 0])
        assert view.y["endless data"][place] == pytest.approx(max(lack, MIN_GAP), rel=1e-9)


@pytest.mark.parametrize("lam", [0.0, 1e-3, 0.03, 3.0])
def test_every_strength_has_its_mark(lam):
    marker = np.asarray(after(1, lam=lam).views()["strengths"].y["now"])
    known = marker[~np.isnan(marker)]
    assert known[0] == 1e-4 and known[-1] == 1.0


def test_a_knob_moved_while_paused_shows_at_once():
    learner = after(5)
    before = np.asarray(learner.views()["policies"].values)
    learner.config.lam = 3.0
    behind = np.asarray(learner.views()["policies"].values)
    assert (before[:, :10] == behind[:, :10]).all() and (before[:, 11:21] != behind[:, 11:21]).any()


# ---- the study -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["smoke", "fast", "full"])
def test_study_arms_are_valid_and_plan_alike(mode):
    jobs = study.jobs(mode)
    assert {job.labels["arm"] for job in jobs} <= study.arms.keys()
    for job in jobs:
        config = job.learner.Config(**job.settings)
        arm = job.labels["arm"]
        assert config.batch == (10 if "batch 10" in arm else 100)
        assert (config.T == 300) != ("to the end" in arm)
        assert (config.lam == 0.0) == arm.startswith("RL alone")


def test_the_probe_repeats_the_run_itself():
    learner = after(10, batch=100, lam=0.1, n_demo=30)
    state = learner.state().digest()
    rates = learner.rates()
    assert learner.state().digest() == state
    gaps = {}
    again = make(batch=100, lam=0.1, n_demo=30)
    for _ in range(10):
        again.update()
        gaps[again.step * 100] = float(again.evaluate()["regularized_gap"])
    assert rates["gap_speed"] == pytest.approx(-math.log(gaps[1000] / gaps[300]) / math.log(1000 / 300))
    assert -1.3 < rates["cloning_slope"] < -0.7
    assert after(3, batch=100).rates() == {}


def test_study_smoke_form_gives_a_verdict_for_each_criterion():
    result = study.run("smoke", n_jobs=1)
    assert [verdict.name for verdict in result.verdicts] == [criterion.name for criterion in study.criteria]
