"""REINFORCE: each equation against sums written out, the gradient against enumeration, the learner on both worlds."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch

from polrl import Run
from polrl.core.conformance import ALL_CHECKS, Case
from polrl.core.errors import KnobError
from polrl.core.sampling import Generators
from polrl.foundations._reinforce_worlds import CartPole, Episodes
from polrl.foundations.reinforce import (
    Reinforce,
    best_objective,
    entropy,
    gibbs,
    gradient_variance,
    kl,
    mean_of_others,
    objective,
    policy_loss,
    regularized_reward,
    reward_to_go,
    score_gradient,
    study,
)
from polrl.worlds.control import ControlTask
from polrl.worlds.token_tree import TokenTree

STRENGTHS = [(0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (0.2, 0.7)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def law(count: int, seed: int) -> torch.Tensor:
    """Return log-probabilities [count]."""
    return torch.log_softmax(normal(count, seed=seed), dim=0)


def masks() -> torch.Tensor:
    """Return alive [4, 5]: episodes of 5, 2, 4 and 1 decisions."""
    return (torch.arange(5) < torch.tensor([[5], [2], [4], [1]])).double()


def close(found, expected, tolerance=1e-12):
    found, expected = (
        torch.as_tensor(x, dtype=None if torch.is_tensor(x) else torch.float64) for x in (found, expected)
    )
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


# ---- E1, E7, E8: the objective -------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), STRENGTHS)
def test_e1_is_reward_plus_entropy_minus_kl(alpha, beta):
    log_pi, log_ref, reward = law(6, 1), law(6, 2), normal(6, seed=3)
    p, q, r = (x.tolist() for x in (log_pi.exp(), log_ref.exp(), reward))
    expected = sum(p[y] * r[y] for y in range(6))
    expected += alpha * -sum(p[y] * math.log(p[y]) for y in range(6))
    expected -= beta * sum(p[y] * math.log(p[y] / q[y]) for y in range(6))
    close(objective(log_pi, reward, log_ref, alpha, beta), expected)


def test_e7_and_e8_are_sums_over_the_last_dimension():
    log_pi, log_ref = (torch.log_softmax(normal(2, 3, 4, seed=s), dim=-1) for s in (1, 2))
    for i, t in np.ndindex(2, 3):
        p, q = log_pi[i, t].exp().tolist(), log_ref[i, t].exp().tolist()
        close(entropy(log_pi)[i, t], -sum(a * math.log(a) for a in p))
        close(kl(log_pi, log_ref)[i, t], sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def test_kl_is_measured_from_the_policy_and_is_zero_only_at_the_reference():
    half, skew = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    close(kl(half, half), 0.0)
    close(kl(skew, half), 0.9 * math.log(1.8) + 0.1 * math.log(0.2), 1e-6)
    assert float(kl(half, skew)) > float(kl(skew, half)) > 0


# ---- E2, E11: one sample's step ------------------------------------------------------------------------------


def test_e2_is_the_gradient_of_the_log_probability_times_the_advantage():
    logits, advantage = normal(5, seed=1), normal(3, seed=2)
    steps = score_gradient(logits, torch.tensor([0, 4, 2]), advantage)
    for i, action in enumerate((0, 4, 2)):
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(advantage[i] * torch.log_softmax(leaf, 0)[action], leaf)
        close(steps[i], gradient)


@pytest.mark.parametrize("baseline", [0.0, -1.7, 4.0])
def test_e2_is_unbiased_whatever_the_baseline(baseline):
    logits, reward = normal(5, seed=1).requires_grad_(), normal(5, seed=2)
    pi = torch.softmax(logits, dim=0)
    (uphill,) = torch.autograd.grad((pi * reward).sum(), logits)
    steps = score_gradient(logits.detach(), torch.arange(5), reward - baseline)
    close(pi.detach() @ steps, uphill)


def test_e11_is_the_mean_squared_distance_from_the_mean_step():
    logits, reward, b = normal(4, seed=1), normal(4, seed=2), 0.3
    pi = torch.softmax(logits, 0).tolist()
    steps = [[(float(reward[a]) - b) * ((a == k) - pi[k]) for k in range(4)] for a in range(4)]
    mean = [sum(pi[a] * steps[a][k] for a in range(4)) for k in range(4)]
    expected = sum(pi[a] * sum((steps[a][k] - mean[k]) ** 2 for k in range(4)) for a in range(4))
    close(gradient_variance(logits, reward, b), expected)


def test_e11_is_a_parabola_over_the_baseline():
    logits, reward = normal(4, seed=1), normal(4, seed=2)
    at = [float(gradient_variance(logits, reward, b)) for b in (-1.0, 0.0, 1.0, 2.0)]
    assert at[0] - 3 * at[1] + 3 * at[2] - at[3] == pytest.approx(0, abs=1e-12)
    assert at[0] + at[2] > 2 * at[1]


# ---- E3 to E6: one update ------------------------------------------------------------------------------------


def test_e3_pays_for_surprise_and_charges_for_leaving_the_reference():
    reward, log_pi, log_ref = (normal(2, 3, seed=s) for s in (1, 2, 3))
    priced = regularized_reward(reward, log_pi, log_ref, 0.3, 0.7)
    for i, t in np.ndindex(2, 3):
        close(priced[i, t], reward[i, t] - 0.3 * log_pi[i, t] - 0.7 * (log_pi[i, t] - log_ref[i, t]))


def test_e3_is_a_constant():
    log_pi, log_ref = normal(2, 3).requires_grad_(), normal(2, 3).requires_grad_()
    assert not regularized_reward(torch.zeros(2, 3), log_pi, log_ref, 0.3, 0.7).requires_grad


@pytest.mark.parametrize(("alpha", "beta"), STRENGTHS)
def test_e3_means_e1_when_summed_over_a_strings_letters(alpha, beta):
    tree = TokenTree(3, 3)
    logits, reference, reward = normal(13, 3, seed=1), normal(13, 3, seed=2), normal(27, seed=3)
    step_rewards = torch.zeros(27, 3, dtype=torch.float64)
    step_rewards[:, -1] = reward
    by_letter = [tree.token_log_probabilities(table) for table in (logits, reference)]
    priced = regularized_reward(step_rewards, *by_letter, alpha, beta).sum(dim=1)
    log_pi, log_ref = tree.log_probabilities(logits), tree.log_probabilities(reference)
    close(log_pi.exp() @ priced, objective(log_pi, reward, log_ref, alpha, beta))


def test_e4_sums_from_each_decision_on():
    reward = normal(3, 4)
    found = reward_to_go(reward)
    for i, t in np.ndindex(3, 4):
        close(found[i, t], sum(float(reward[i, k]) for k in range(t, 4)))


def test_e5_is_the_mean_of_the_others_that_are_still_alive():
    to_go, alive = normal(4, 5), masks()
    found = mean_of_others(to_go, alive)
    for i, t in np.ndindex(4, 5):
        others = [float(to_go[j, t]) for j in range(4) if j != i and alive[j, t]]
        close(found[i, t], sum(others) / len(others) if others else 0.0)


def test_e5_of_one_sample_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        mean_of_others(torch.zeros(1, 3), torch.ones(1, 3))


def test_e6_sums_over_decisions_and_averages_over_samples():
    log_pi, advantage, alive = normal(4, 5, seed=1), normal(4, 5, seed=2), masks()
    expected = -sum(float(alive[i, t] * advantage[i, t] * log_pi[i, t]) for i in range(4) for t in range(5)) / 4
    close(policy_loss(log_pi, advantage, alive), expected)


def test_e6_has_no_gradient_through_the_advantage():
    log_pi, advantage, alive = normal(4, 5, seed=1).requires_grad_(), normal(4, 5, seed=2).requires_grad_(), masks()
    gradients = torch.autograd.grad(policy_loss(log_pi, advantage, alive), (log_pi, advantage), allow_unused=True)
    close(gradients[0], -(alive * advantage.detach()) / 4)
    assert gradients[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equations_keep_the_dtype(dtype):
    a, b, alive = normal(4, 5, seed=1).to(dtype), normal(4, 5, seed=2).to(dtype), masks().to(dtype)
    outcomes = (
        objective(a[0], b[0], a[1], 0.1, 0.1), score_gradient(a[0], torch.tensor([1]), b[0, :1]),
        regularized_reward(a, b, a, 0.1, 0.2), reward_to_go(a), mean_of_others(a, alive), policy_loss(a, b, alive),
        entropy(a), kl(a, b), gibbs(a[0], b[0], 0.1, 0.1), gibbs(a[0], b[0], 0.0, 0.0),
        best_objective(a[0], b[0], 0.1, 0.0), gradient_variance(a[0], b[0], 0.3),
    )  # fmt: skip
    assert {outcome.dtype for outcome in outcomes} == {dtype}


# ---- the expected gradient is the objective's, by enumeration ------------------------------------------------


def two_letter_learner(baseline: str, alpha: float, beta: float, depth: int = 2) -> Reinforce:
    """Return a learner of 2 ** depth strings in float64, away from the uniform start."""
    learner = Reinforce(
        vocabulary=2, depth=depth, best=1, batch_size=2, baseline=baseline, alpha=alpha, beta=beta, device="cpu"
    )
    world = learner.world
    world.reward = world.reward.double()
    world.reference_table = torch.log_softmax(world.reference_table.double(), dim=-1)
    learner.policy.double()
    with torch.no_grad():
        learner.policy.weight.copy_(normal(*learner.policy.weight.shape, seed=5))
    return learner


def strings_as_episodes(world, numbers: list[int]) -> Episodes:
    rewards = torch.zeros(len(numbers), world.tree.depth, dtype=torch.float64)
    rewards[:, -1] = world.reward[numbers]
    return Episodes(world.tree.nodes[numbers], world.tree.strings[numbers], rewards, torch.ones_like(rewards))


@pytest.mark.parametrize("baseline", ["none", "mean"])
@pytest.mark.parametrize(("alpha", "beta"), STRENGTHS)
def test_the_mean_gradient_of_an_update_is_the_gradient_of_j(monkeypatch, baseline, alpha, beta):
    learner = two_letter_learner(baseline, alpha, beta)
    world, begin = learner.world, learner.policy.weight.detach().clone()
    leaf = begin.clone().requires_grad_()
    log_pi, log_ref = world.tree.log_probabilities(leaf), world.tree.log_probabilities(world.reference_table)
    (uphill,) = torch.autograd.grad(objective(log_pi, world.reward, log_ref, alpha, beta), leaf)
    mean = torch.zeros_like(begin)
    for pair in itertools.product(range(4), repeat=2):
        monkeypatch.setattr(world, "play", lambda *_, pair=pair: strings_as_episodes(world, list(pair)))
        with torch.no_grad():
            learner.policy.weight.copy_(begin)
        learner.update()
        mean += log_pi[list(pair)].detach().sum().exp() * learner.policy.weight.grad
    close(mean, -uphill, 1e-10)


@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_the_mean_gradient_is_right_where_episodes_end_early(baseline):
    """Action 0 ends an episode of up to 3 decisions; the logits depend on the step alone."""
    alpha, beta = 0.3, 0.6
    rewards, log_ref = normal(3, 2, seed=1), torch.log_softmax(normal(3, 2, seed=2), dim=1)
    leaf = normal(3, 2, seed=3).requires_grad_()
    courses = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)]  # after an end the actions count for nothing
    lengths, steps = [1, 2, 3, 3], torch.arange(3)

    def log_law(log_pi):
        return torch.stack([log_pi[steps[:n], list(c[:n])].sum() for c, n in zip(courses, lengths, strict=True)])

    log_pi = torch.log_softmax(leaf, dim=1)
    earned = torch.stack([rewards[steps[:n], list(c[:n])].sum() for c, n in zip(courses, lengths, strict=True)])
    (uphill,) = torch.autograd.grad(objective(log_law(log_pi), earned, log_law(log_ref), alpha, beta), leaf)
    mean = torch.zeros(3, 2, dtype=torch.float64)
    for pair in itertools.product(range(4), repeat=2):
        actions = torch.tensor([courses[i] for i in pair])
        alive = (steps < torch.tensor([[lengths[i]] for i in pair])).double()
        log_pi = torch.log_softmax(leaf, dim=1)
        chosen = log_pi[steps, actions]
        priced = regularized_reward(rewards[steps, actions], chosen, log_ref[steps, actions], alpha, beta)
        to_go = reward_to_go(priced * alive)
        credit = to_go - mean_of_others(to_go, alive) if baseline == "mean" else to_go
        (gradient,) = torch.autograd.grad(policy_loss(chosen, credit, alive), leaf)
        mean += log_law(log_pi)[list(pair)].detach().sum().exp() * gradient
    close(mean, -uphill, 1e-10)


# ---- E9, E10: where it leads ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), STRENGTHS[1:])
def test_e9_weighs_the_reference_by_the_exponential_of_the_reward(alpha, beta):
    reward, log_ref = normal(5, seed=1), law(5, 2)
    weights = [
        float(log_ref[y].exp()) ** (beta / (alpha + beta)) * math.exp(float(reward[y]) / (alpha + beta))
        for y in range(5)
    ]
    close(gibbs(reward, log_ref, alpha, beta), torch.tensor(weights, dtype=torch.float64) / sum(weights))


@pytest.mark.parametrize(("alpha", "beta"), STRENGTHS[1:])
def test_e9_is_where_ascent_on_e1_ends(alpha, beta):
    reward, log_ref = normal(5, seed=1), law(5, 2)
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    ascent = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        ascent.zero_grad()
        value = -objective(torch.log_softmax(logits, 0), reward, log_ref, alpha, beta)
        value.backward()
        return value

    ascent.step(loss)
    close(torch.softmax(logits.detach(), 0), gibbs(reward, log_ref, alpha, beta), 1e-6)


@pytest.mark.parametrize(("alpha", "beta"), STRENGTHS[1:])
def test_e10_the_regret_is_the_kl_to_the_optimum(alpha, beta):
    reward, log_ref, log_pi = normal(5, seed=1), law(5, 2), law(5, 3)
    optimum = gibbs(reward, log_ref, alpha, beta).log()
    best = best_objective(reward, log_ref, alpha, beta)
    close(best, objective(optimum, reward, log_ref, alpha, beta))
    regret = best - objective(log_pi, reward, log_ref, alpha, beta)
    close(regret, (alpha + beta) * sum(log_pi.exp() * (log_pi - optimum)))


@pytest.mark.parametrize(("alpha", "beta"), STRENGTHS[1:])
def test_at_the_optimum_every_string_earns_the_same(alpha, beta):
    reward, log_ref = normal(5, seed=1), law(5, 2)
    optimum = gibbs(reward, log_ref, alpha, beta).log()
    best = best_objective(reward, log_ref, alpha, beta)
    close(regularized_reward(reward, optimum, log_ref, alpha, beta), best.expand(5))


def test_without_strengths_the_optimum_is_spread_over_the_best():
    reward, log_ref = torch.tensor([1.0, 0.2, 1.0, 0.9]), law(4, 2).float()
    close(gibbs(reward, log_ref, 0.0, 0.0), [0.5, 0.0, 0.5, 0.0])
    close(gibbs(reward, log_ref, 1e-3, 0.0), [0.5, 0.0, 0.5, 0.0], 1e-6)
    close(best_objective(reward, log_ref, 0.0, 0.0), 1.0)
    assert gibbs(100 * reward, log_ref, 1e-3, 0.0).isfinite().all()


def test_a_vanishing_beta_leaves_the_reference_among_the_best():
    reward, log_ref = torch.tensor([1.0, 0.2, 1.0], dtype=torch.float64), torch.tensor([0.3, 0.6, 0.1]).double().log()
    close(gibbs(reward, log_ref, 0.0, 1e-3), [0.75, 0.0, 0.25], 1e-6)


def test_the_optimum_ignores_a_constant_added_to_all_rewards():
    reward, log_ref = normal(5, seed=1), law(5, 2)
    close(gibbs(reward + 7, log_ref, 0.2, 0.3), gibbs(reward, log_ref, 0.2, 0.3))


def test_strong_kl_copies_the_reference_and_strong_entropy_flattens():
    reward, log_ref = normal(5, seed=1), law(5, 2)
    close(gibbs(reward, log_ref, 0.0, 1e6), log_ref.exp(), 1e-5)
    close(gibbs(reward, log_ref, 1e6, 0.0), torch.full((5,), 0.2), 1e-5)


@pytest.mark.parametrize(("alpha", "beta"), [(-0.1, 0.5), (0.5, -0.1)])
def test_negative_strengths_are_refused(alpha, beta):
    with pytest.raises(ValueError, match=r"0 or above.*-0\.1"):
        gibbs(torch.zeros(3), torch.zeros(3), alpha, beta)


# ---- the worlds ----------------------------------------------------------------------------------------------


def played(policy, horizon: int = 40, count: int = 16) -> Episodes:
    return CartPole(horizon, 8, torch.device("cpu")).play(policy, count, Generators(0, torch.device("cpu")))


class Leaning(torch.nn.Module):
    """Push where the pole leans and falls: this balances."""

    def forward(self, states):
        lean = 30 * (states[..., 2] + states[..., 3])
        return torch.stack([-lean, lean], dim=-1)


def test_rewards_and_best_strings_follow_the_seed():
    first, again, other = (Reinforce(seed=s, device="cpu").world for s in (0, 0, 1))
    assert torch.equal(first.reward, again.reward) and not torch.equal(first.reward, other.reward)
    assert torch.equal(first.reference_table, again.reference_table)
    assert int((first.reward == 1).sum()) == 4 and float(first.reward[first.reward < 1].max()) <= 0.8


def test_strings_are_rewarded_after_their_last_letter():
    learner = Reinforce(vocabulary=3, depth=3, device="cpu")
    world = learner.world
    written = world.play(learner.policy, 50, learner.rng)
    for i in range(50):
        number = sum(int(token) * 3 ** (2 - t) for t, token in enumerate(written.actions[i]))
        assert written.rewards[i].tolist() == [0.0, 0.0, float(world.reward[number])]
    assert bool((written.alive == 1).all())


def test_strings_are_spelled_in_letters():
    world = Reinforce(vocabulary=3, depth=2, device="cpu").world
    assert world.spell(torch.tensor([0, 5, 7])) == ["aa", "bc", "cb"]


def test_an_untrained_policy_writes_every_string_alike():
    learner = Reinforce(device="cpu")
    close(learner.laws(learner.world)[0], torch.full((16,), -math.log(16)), 1e-6)
    assert float(learner.evaluate()["best_in_play"]) == pytest.approx(1.0)


def test_cartpole_is_gymnasiums():
    episodes = played(Leaning(), count=4)
    task = ControlTask("CartPole-v1", seed=0)
    for i in range(4):
        task.reset()
        task.env.unwrapped.state = episodes.states[i, 0].double().numpy()
        length = int(episodes.alive[i].sum())
        for t in range(length):
            seen, reward, fallen, _ = task.step(int(episodes.actions[i, t]))
            assert reward == 1 and fallen == (t == length - 1 and length < 40)
            if t + 1 < length:
                torch.testing.assert_close(episodes.states[i, t + 1], torch.as_tensor(seen), rtol=1e-4, atol=1e-5)


def test_cartpole_episodes_end_for_good():
    episodes = played(torch.nn.Linear(4, 2), horizon=60)
    lengths = episodes.alive.sum(dim=1)
    assert torch.equal(episodes.alive, (torch.arange(episodes.alive.shape[1]) < lengths[:, None]).float())
    assert torch.equal(episodes.rewards, episodes.alive)
    assert float(lengths.max()) == episodes.alive.shape[1] <= 60 and float(lengths.min()) < float(lengths.max())


def test_cartpole_stops_at_the_horizon():
    assert bool((played(Leaning()).alive.sum(dim=1) == 40).all())


def test_cartpole_pushes_as_often_as_the_policy_says():
    class Constant(torch.nn.Module):
        def forward(self, states):
            return torch.tensor([0.3, 0.7]).log().expand(len(states), 2)

    episodes = played(Constant(), count=200)
    share = float((episodes.actions * episodes.alive).sum() / episodes.alive.sum())
    assert share == pytest.approx(0.7, abs=0.03)


def test_cartpoles_reference_is_mediocre():
    world = CartPole(200, 8, torch.device("cpu"))

    class Reference(torch.nn.Module):
        def forward(self, states):
            return world.reference(states)

    close(world.reference(torch.randn(3, 4)).exp().sum(dim=-1), torch.ones(3), 1e-6)
    coin, reference = (
        float(world.play(policy, 64, Generators(0, torch.device("cpu"))).rewards.sum(dim=1).mean())
        for policy in (CartPole(200, 8, torch.device("cpu")).new_policy(), Reference())
    )
    assert 1.2 * coin < reference < 80


# ---- the learner ---------------------------------------------------------------------------------------------


def train(steps: int, **settings) -> Reinforce:
    learner = Reinforce(**{"device": "cpu", **settings})
    for _ in range(steps):
        learner.update()
    return learner


def figures(learner: Reinforce) -> dict[str, float]:
    return {name: float(value) for name, value in learner.evaluate().items()}


@pytest.mark.parametrize("world", ["token_tree", "cartpole"])
@pytest.mark.parametrize("baseline", ["none", "mean"])
def test_three_updates_written_out_sample_by_sample(monkeypatch, world, baseline):
    settings = {"world": world, "horizon": 15, "batch_size": 5, "baseline": baseline, "alpha": 0.2, "beta": 0.4}
    learner = Reinforce(device="cpu", learning_rate=0.03, **settings)
    play, batches = learner.world.play, []

    def noted(*arguments):
        batches.append(play(*arguments))
        return batches[-1]

    monkeypatch.setattr(learner.world, "play", noted)
    policy = copy.deepcopy(learner.policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    for _ in range(3):
        metrics = learner.update()
        batch, loss, lengths = batches[-1], 0.0, batches[-1].alive.sum(dim=1).int().tolist()
        log_pi = torch.log_softmax(policy(batch.states), dim=-1)
        log_ref = learner.world.reference(batch.states)
        to_go = [[0.0] * n for n in lengths]
        for i, n in enumerate(lengths):
            for t in reversed(range(n)):
                a = int(batch.actions[i, t])
                here, there = log_pi[i, t, a].item(), log_ref[i, t, a].item()
                later = to_go[i][t + 1] if t + 1 < n else 0.0
                to_go[i][t] = float(batch.rewards[i, t]) - 0.2 * here - 0.4 * (here - there) + later
        spread = []
        for i, n in enumerate(lengths):
            for t in range(n):
                others = [to_go[j][t] for j in range(5) if j != i and t < lengths[j]]
                expected = sum(others) / len(others) if others and baseline == "mean" else 0.0
                spread.append((to_go[i][t] - expected) ** 2)
                loss = loss - (to_go[i][t] - expected) * log_pi[i, t, int(batch.actions[i, t])] / 5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for found, wanted in zip(learner.policy.parameters(), policy.parameters(), strict=True):
            close(found.detach(), wanted.detach(), 1e-4)
        decisions = [(i, t) for i, n in enumerate(lengths) for t in range(n)]
        nats = [-sum((x.exp() * x).item() for x in log_pi[i, t]) for i, t in decisions]
        assert float(metrics["entropy"]) == pytest.approx(sum(nats) / len(nats), rel=1e-4)
        assert float(metrics["advantage_spread"]) == pytest.approx(math.sqrt(sum(spread) / len(spread)), rel=1e-4)
        assert float(metrics["batch_return"]) == pytest.approx(float(batch.rewards.sum()) / 5, rel=1e-5)


def test_evaluation_of_strings_is_the_enumeration():
    learner = train(30, alpha=0.2, beta=0.3)
    world, tables = learner.world, (learner.policy.weight.detach(), learner.world.reference_table)
    p, q = (
        [
            math.prod(
                float(torch.softmax(table[node], 0)[token])
                for node, token in zip(world.tree.nodes[y], world.tree.strings[y], strict=True)
            )
            for y in range(16)
        ]
        for table in tables
    )
    r = world.reward.tolist()
    found = figures(learner)
    value = sum(p[y] * (r[y] - 0.2 * math.log(p[y]) - 0.3 * math.log(p[y] / q[y])) for y in range(16))
    weights = [q[y] ** 0.6 * math.exp(r[y] / 0.5) for y in range(16)]
    best = [y for y in range(16) if r[y] == 1]
    among = [p[y] / sum(p[b] for b in best) for y in best]
    expected = {
        "mean_return": sum(p[y] * r[y] for y in range(16)),
        "return_share": sum(p[y] * r[y] for y in range(16)),
        "mean_entropy": -sum(p[y] * math.log(p[y]) for y in range(16)) / 4,
        "mean_kl": sum(p[y] * math.log(p[y] / q[y]) for y in range(16)) / 4,
        "regret": 0.5 * math.log(sum(weights)) - value,
        "overlap": sum(min(p[y], weights[y] / sum(weights)) for y in range(16)),
        "best_mass": sum(p[y] for y in best),
        "best_in_play": math.exp(-sum(x * math.log(x) for x in among)) / len(best),
    }
    assert found == pytest.approx(expected, rel=1e-4)


def test_plain_reinforce_finds_the_best_strings_and_loses_most_of_them():
    found = figures(train(300, alpha=0.0))
    assert found["best_mass"] > 0.97 and found["best_in_play"] < 0.7


def test_entropy_keeps_every_best_string_and_reaches_its_optimum():
    found = figures(train(300, alpha=0.1))
    assert found["best_in_play"] > 0.98 and found["overlap"] > 0.95 and 0 <= found["regret"] < 0.01


def test_kl_leads_to_the_references_gibbs_policy():
    found = figures(train(300, alpha=0.0, beta=0.3))
    assert found["overlap"] > 0.95 and 0 <= found["regret"] < 0.02


def test_a_bandit_is_a_tree_of_depth_one():
    learner = train(150, vocabulary=5, depth=1, best=1, alpha=0.0)
    assert learner.world.tree.prefixes == 1
    assert figures(learner)["best_mass"] > 0.9


@functools.cache
def on_cartpole(steps: int, beta: float = 0.0) -> dict[str, float]:
    return figures(train(steps, world="cartpole", horizon=50, alpha=0.0, beta=beta))


def test_cartpole_is_learned():
    assert on_cartpole(20)["mean_return"] > 45 > 1.5 * on_cartpole(0)["mean_return"]


def test_on_cartpole_kl_holds_the_policy_to_the_reference():
    assert on_cartpole(20, beta=3.0)["mean_kl"] < 0.8 * on_cartpole(20)["mean_kl"]


def test_the_baseline_narrows_the_advantages():
    spread = {
        baseline: float(
            Reinforce(world="cartpole", horizon=60, baseline=baseline, device="cpu").update()["advantage_spread"]
        )
        for baseline in ("none", "mean")
    }
    assert spread["mean"] < 0.8 * spread["none"]


@pytest.mark.parametrize(
    ("knob", "value"), [("alpha", 1.0), ("beta", 1.0), ("learning_rate", 0.2), ("baseline", "none")]
)
def test_a_knob_acts_on_the_very_next_update(knob, value):
    runs = [Run(Reinforce(device="cpu"), threads=1, autosave=0) for _ in range(2)]
    for run in runs:
        run.advance(5)
    runs[1].tune(**{knob: value})
    for run in runs:
        run.advance(1)
    assert not torch.equal(runs[0].learner.policy.weight, runs[1].learner.policy.weight)


def test_the_batch_size_acts_on_the_very_next_update():
    learner = Reinforce(device="cpu")
    learner.update()
    learner.config.batch_size = 7
    learner.update()
    assert learner.returns.shape == (7,)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vocabulary": 10, "depth": 4}, "at most 4096 strings, got 10000"),
        ({"vocabulary": 2, "depth": 2, "best": 5}, "best must be at most the number of strings, 4, got 5"),
        ({"best": 0}, "best.*0"),
        ({"horizon": 501}, "horizon.*501"),
        ({"world": "chess"}, "world.*chess"),
        ({"batch_size": 1}, "batch_size must be a whole number from 2 to 256, got 1"),
        ({"alpha": -0.1}, r"alpha must be a number from 0 to 3, got -0\.1"),
        ({"baseline": "median"}, "baseline must be one of 'none', 'mean', got 'median'"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(settings, words):
    with pytest.raises(KnobError, match=words):
        Reinforce(device="cpu", **settings)


@pytest.mark.parametrize("check", ALL_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_contract_holds_on_cartpole_too(check):
    check(Case(Reinforce, {"world": "cartpole", "horizon": 10, "batch_size": 3}, steps=3))


# ---- views ---------------------------------------------------------------------------------------------------


def test_views_show_the_best_rewarded_strings_first():
    learner = train(3, vocabulary=3, depth=4, best=27)
    view = learner.views()["strings"]
    assert len(view.labels) == 32 and list(view.values) == ["policy", "optimum"]
    by_label = dict(zip(learner.world.spell(torch.arange(81)), learner.world.reward.tolist(), strict=True))
    shown = [by_label[label] for label in view.labels]
    assert shown == sorted(by_label.values(), reverse=True)[:32]
    earned = learner.views()["earned"].values["reward"]
    np.testing.assert_allclose(earned, shown)


def test_views_show_the_reference_where_it_counts():
    assert list(train(1, beta=0.1).views()["strings"].values) == ["policy", "optimum", "reference"]


def test_views_letters_carry_their_own_probabilities():
    view = train(60).views()["drawn"]
    for line, values in zip(view.lines, view.values, strict=True):
        assert len(line) == 60
        for token, value in zip(line, values, strict=True):
            assert (value > 0) == (token != " ")


def test_views_of_cartpole_agree_with_the_policy():
    learner = train(10, world="cartpole", horizon=40)
    views = learner.views()
    state = torch.tensor([[0.0, 0.0, math.radians(5), 0.0]])
    right = torch.softmax(learner.policy(state), dim=-1)[0, 1].item()
    at = int(np.argmin(np.abs(views["by_angle"].x - 5)))
    assert views["by_angle"].y["policy"][at] == pytest.approx(right, abs=1e-5)
    reference = 1 / (1 + math.exp(-10 * math.radians(5)))
    assert views["by_angle"].y["reference"][at] == pytest.approx(reference, abs=1e-5)
    falling = torch.tensor([[0.0, 0.0, math.radians(5), 1.0]])
    assert views["by_angle_and_speed"].values[0, at] == pytest.approx(
        2 * torch.softmax(learner.policy(falling), dim=-1)[0, 1].item() - 1, abs=1e-5
    )
    assert views["returns"].counts["episodes"].sum() == pytest.approx(1.0)


# ---- the study -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["smoke", "fast", "full"])
def test_study_arms_are_valid(mode):
    jobs = study.jobs(mode)
    assert {job.labels["arm"] for job in jobs} == study.arms.keys()
    for job in jobs:
        job.learner.Config(**job.settings)


def test_study_smoke_form_gives_a_verdict_for_each_criterion():
    result = study.run("smoke", n_jobs=1)
    assert [verdict.name for verdict in result.verdicts] == [criterion.name for criterion in study.criteria]
