"""PRDC: each equation against sums written out, the card's identities, one whole update by hand, and the limits."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from closeness import close, normal
from torch.nn import functional as F

from polrl import Run
from polrl.core.errors import KnobError, StructureError, UnknownNameError
from polrl.offline import _td3
from polrl.offline._td3 import critic_loss, polyak, smoothed_action, td_target
from polrl.offline.prdc import (
    PRDC,
    Config,
    actor_loss,
    dataset_constraint,
    distance_to_data,
    ideal_constraint,
    nearest_index,
    scaled_improvement,
    study,
)
from polrl.offline.td3_bc import TD3BC
from polrl.offline.td3_bc import actor_loss as cloning_actor_loss

BETAS = (0.05, 0.7, 2.0, 50.0, 5000.0)


def logged(count: int = 40, ds: int = 3, da: int = 2, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(count, ds, seed=seed), normal(count, da, seed=seed + 1).tanh()


def squared_distance(s, a, other_s, other_a, beta) -> float:
    state = sum((beta * float(x) - beta * float(y)) ** 2 for x, y in zip(s, other_s, strict=True))
    return state + sum((float(x) - float(y)) ** 2 for x, y in zip(a, other_a, strict=True))


def small(**settings) -> PRDC:
    return PRDC(**{"rows": 200, "batch_size": 16, "width": 8, "device": "cpu", **settings})


# ---- E1 to E3: the distance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_e1_and_e2_find_the_nearest_pair(beta):
    data_s, data_a = logged()
    s, a = normal(7, 3, seed=1), normal(7, 2, seed=2).tanh()
    found, index = distance_to_data(s, a, data_s, data_a, beta), nearest_index(s, a, data_s, data_a, beta)
    for b in range(7):
        every = [squared_distance(s[b], a[b], data_s[j], data_a[j], beta) for j in range(40)]
        assert int(index[b]) == int(np.argmin(every))
        close(found[b], math.sqrt(min(every)))


@pytest.mark.parametrize("k", [1, 2, 5, 40])
def test_e2_takes_exactly_the_kth_row_and_of_equal_ones_the_first(k):
    data_s, data_a = (x.repeat(2, 1) for x in logged(20))
    s, a = normal(6, 3, seed=1), normal(6, 2, seed=2).tanh()
    index = nearest_index(s, a, data_s, data_a, 2.0, k)
    for b in range(6):
        every = [squared_distance(s[b], a[b], data_s[j % 20], data_a[j % 20], 2.0) for j in range(40)]
        assert int(index[b]) == sorted(range(40), key=lambda j: (every[j], j))[k - 1]


@pytest.mark.parametrize("k", [0, 41])
def test_e2_refuses_a_neighbour_that_does_not_exist(k):
    with pytest.raises(ValueError, match=f"from 1 to the number of logged pairs, 40, got {k}"):
        nearest_index(normal(2, 3), normal(2, 2), *logged(), 1.0, k)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("k", [1, 3])
def test_the_learners_search_finds_the_rows_of_e2(beta, k):
    learner = small()
    data = learner.data
    s, a = data.observations[:60], normal(60, 1, seed=3).tanh().float()
    found = learner.pairs.query(s, a, beta, k)
    expected = nearest_index(s.double(), a.double(), data.observations.double(), data.actions.double(), beta, k)
    assert torch.equal(found, expected)


def test_e3_is_the_mean_of_the_distances_and_its_gradient_points_to_the_data():
    data_s, data_a = logged()
    s, a = normal(7, 3, seed=1), normal(7, 2, seed=2).requires_grad_()
    distances = distance_to_data(s, a, data_s, data_a, 2.0)
    close(ideal_constraint(distances), sum(distances.tolist()) / 7)
    (gradient,) = torch.autograd.grad(ideal_constraint(distances), a)
    nearest = data_a[nearest_index(s, a, data_s, data_a, 2.0)]
    close(gradient, (a.detach() - nearest) / distances.detach()[:, None] / 7)


# ---- E4 to E6: the actor's loss ------------------------------------------------------------------------------


def test_e4_is_a_mean_over_batch_and_dimensions_of_squares():
    a, nearest = normal(5, 3, seed=1), normal(5, 3, seed=2)
    total = sum((float(a[b, i]) - float(nearest[b, i])) ** 2 for b in range(5) for i in range(3))
    close(dataset_constraint(a, nearest), total / 15)


def test_e4_has_no_gradient_to_the_neighbour():
    a, nearest = normal(5, 3, seed=1).requires_grad_(), normal(5, 3, seed=2).requires_grad_()
    gradients = torch.autograd.grad(dataset_constraint(a, nearest), (a, nearest), allow_unused=True)
    close(gradients[0], 2 * (a - nearest).detach() / 15)
    assert gradients[1] is None


def test_e4_has_the_gradient_of_the_mean_squared_distance_over_the_dimensions():
    data_s, data_a = logged()
    s, a = normal(7, 3, seed=1), normal(7, 2, seed=2).requires_grad_()
    nearest = data_a[nearest_index(s, a, data_s, data_a, 0.7)]
    (of_constraint,) = torch.autograd.grad(dataset_constraint(a, nearest), a)
    (of_squares,) = torch.autograd.grad(distance_to_data(s, a, data_s, data_a, 0.7).pow(2).mean(), a)
    close(of_constraint, of_squares / 2)


def test_e5_divides_by_the_mean_absolute_value_as_a_constant():
    q = normal(6, seed=1).requires_grad_()
    size = sum(abs(x) for x in q.tolist()) / 6
    loss = scaled_improvement(q, 0.7)
    close(loss, -0.7 / size * float(q.detach().sum()) / 6)
    (gradient,) = torch.autograd.grad(loss, q)
    close(gradient, torch.full((6,), -0.7 / size / 6, dtype=torch.float64))


@pytest.mark.parametrize("factor", [7.0, 1e-3])
def test_e5_does_not_see_the_scale_of_q(factor):
    base = normal(6, seed=1).requires_grad_()
    losses = scaled_improvement(base, 2.5), scaled_improvement(factor * base, 2.5)
    close(losses[0], losses[1])
    close(*(torch.autograd.grad(loss, base)[0] for loss in losses))


@pytest.mark.parametrize(("sign", "expected"), [(1, -2.5), (-1, 2.5)])
def test_e5_is_alpha_up_to_its_sign_where_q_has_one_sign(sign, expected):
    close(scaled_improvement(sign * normal(6).abs(), 2.5), expected)


def test_e6_adds_the_constraint_with_weight_one():
    q, a, nearest = normal(5, seed=1), normal(5, 3, seed=2), normal(5, 3, seed=3)
    expected = -0.5 * q.sum() / q.abs().sum() + (a - nearest).pow(2).sum() / 15
    close(actor_loss(q, a, nearest, 0.5), expected)


# ---- E7 and E8: TD3 ------------------------------------------------------------------------------------------


def test_e7a_clips_the_noise_and_then_the_action():
    a_max = torch.tensor([1.0, 2.0], dtype=torch.float64)
    action = torch.tensor([[0.0, 0.0], [0.9, -1.9], [-1.0, 0.5]], dtype=torch.float64)
    xi = torch.tensor([[1.0, -9.0], [9.0, -9.0], [-1.0, 1.0]], dtype=torch.float64)
    found = smoothed_action(action, xi, 0.2, 0.5, a_max)
    close(found, [[0.2, -1.0], [1.0, -2.0], [-1.0, 0.9]])
    close(smoothed_action(action, xi, 0.0, 0.5, a_max), action)
    close(smoothed_action(action, xi, 0.2, 0.0, 2.0), action)


def test_e7_takes_the_smaller_value_unless_the_episode_ended():
    columns = ([1.0, 2.0, 3.0], [0.0, 0.0, 1.0], [4.0, 8.0, 9.0], [5.0, 6.0, 9.0])
    r, d, q1, q2 = (torch.tensor(x, dtype=torch.float64) for x in columns)
    close(td_target(r, d, q1, q2, 0.9), [1 + 0.9 * 4, 2 + 0.9 * 6, 3.0])


def test_e7_s_target_is_a_constant():
    q1, q2 = normal(3, seed=1).requires_grad_(), normal(3, seed=2).requires_grad_()
    assert not td_target(normal(3), torch.zeros(3), q1, q2, 0.9).requires_grad


def test_e7b_is_a_sum_of_two_means():
    q1, q2, y = (normal(4, seed=i).requires_grad_() for i in (1, 2, 3))
    expected = sum((q.tolist()[b] - y.tolist()[b]) ** 2 / 4 for q in (q1, q2) for b in range(4))
    loss = critic_loss(q1, q2, y.detach())
    close(loss, expected)
    close(torch.autograd.grad(loss, q1)[0], (q1 - y).detach() / 2)


def test_e8_moves_the_target_by_tau():
    close(polyak(torch.tensor([1.0, 2.0]).double(), torch.tensor([3.0, -2.0]).double(), 0.25), [2.5, -1.0])
    online, target = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = [w.detach().clone() for w in target.parameters()]
    _td3.follow(target, online, 0.1)
    for old, new, found in zip(before, online.parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(found, 0.1 * new + 0.9 * old)
        assert found.grad is None and found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equations_keep_the_dtype(dtype):
    a, b, q = normal(4, 2, seed=1).to(dtype), normal(4, 2, seed=2).to(dtype), normal(4).to(dtype)
    outcomes = (
        distance_to_data(a, b, b, a, 2.0), ideal_constraint(q), dataset_constraint(a, b), scaled_improvement(q, 0.5),
        actor_loss(q, a, b, 0.5), smoothed_action(a, b, 0.2, 0.5, 1.0), td_target(q, q, q, q, 0.9),
        critic_loss(q, q, q), polyak(a, b, 0.1),
    )  # fmt: skip
    assert {outcome.dtype for outcome in outcomes} == {dtype}
    assert nearest_index(a, b, b, a, 2.0).dtype == torch.long


# ---- the card's identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_a_logged_pair_is_at_distance_zero_and_has_no_gradient(beta):
    data_s, data_a = logged()
    a = data_a[:5].clone().requires_grad_()
    distances = distance_to_data(data_s[:5], a, data_s, data_a, beta)
    close(distances, torch.zeros(5))
    constraint = dataset_constraint(a, data_a[nearest_index(data_s[:5], a, data_s, data_a, beta)])
    for value in (constraint, ideal_constraint(distances)):
        close(torch.autograd.grad(value, a)[0], torch.zeros(5, 2))


def threshold(s, p, a) -> float:
    """Identity 2: the smallest beta at which each row is its own state's neighbour."""
    worst = 0.0
    for i in range(len(s)):
        for j in range(len(s)):
            gain = float((p[i] - a[i]).pow(2).sum() - (p[i] - a[j]).pow(2).sum())
            if j != i and gain > 0:
                worst = max(worst, math.sqrt(gain) / float((s[i] - s[j]).norm()))
    return worst


def test_above_the_exact_threshold_the_neighbour_is_the_own_row_and_the_loss_is_td3_bcs():
    s, a = logged(30)
    p, q = normal(30, 2, seed=9).tanh(), normal(30, seed=10)
    beta = threshold(s, p, a)
    own = torch.arange(30)
    assert torch.equal(nearest_index(s, p, s, a, beta * (1 + 1e-9)), own)
    assert not torch.equal(nearest_index(s, p, s, a, beta * (1 - 1e-9)), own)
    nearest = a[nearest_index(s, p, s, a, beta * (1 + 1e-9))]
    assert float(actor_loss(q, p, nearest, 2.5)) == float(cloning_actor_loss(q, p, a, 2.5))
    gaps = torch.cdist(s, s) + torch.diag(torch.full((30,), math.inf, dtype=torch.float64))
    sufficient = float(((p - a).norm(dim=1) / gaps.min(dim=1).values).max())
    assert sufficient >= beta


def test_as_beta_goes_to_zero_only_the_actions_count():
    data_s, data_a = logged()
    s, a = normal(9, 3, seed=1), normal(9, 2, seed=2)
    expected = torch.cdist(a, data_a).argmin(dim=1)
    assert torch.equal(nearest_index(s, a, data_s, data_a, 1e-6), expected)
    assert torch.equal(nearest_index(s + 3, a, data_s, data_a, 1e-6), expected)


def test_the_distance_grows_with_beta_and_shrinks_with_more_data():
    data_s, data_a = logged()
    s, a = normal(9, 3, seed=1), normal(9, 2, seed=2)
    by_beta = torch.stack([distance_to_data(s, a, data_s, data_a, beta) for beta in BETAS])
    assert bool((by_beta.diff(dim=0) >= 0).all()) and bool((by_beta[-1] > by_beta[0]).all())
    by_rows = torch.stack([distance_to_data(s, a, data_s[:n], data_a[:n], 2.0) for n in (5, 20, 40)])
    assert bool((by_rows.diff(dim=0) <= 0).all())


def test_the_distance_is_one_lipschitz_in_the_action():
    data_s, data_a = logged()
    s, a, other = normal(50, 3, seed=1), normal(50, 2, seed=2), normal(50, 2, seed=3)
    change = distance_to_data(s, a, data_s, data_a, 2.0) - distance_to_data(s, other, data_s, data_a, 2.0)
    assert bool((change.abs() <= (a - other).norm(dim=1) + 1e-12).all())


def test_a_lipschitz_critic_is_wrong_by_at_most_its_constant_times_the_distance():
    data_s, data_a = logged()
    s, a, weight, beta = normal(50, 3, seed=1), normal(50, 2, seed=2), normal(5, seed=3), 2.0

    def q(states, actions):
        return torch.cat([beta * states, actions], dim=1) @ weight

    nearest = nearest_index(s, a, data_s, data_a, beta)
    gap = (q(s, a) - q(data_s[nearest], data_a[nearest])).abs()
    assert bool((gap <= weight.norm() * distance_to_data(s, a, data_s, data_a, beta) + 1e-12).all())


# ---- the learner ---------------------------------------------------------------------------------------------


def test_states_are_standardised_before_the_search():
    learner = small()
    x = learner.data.observations * learner.divisor + learner.mean
    close(learner.data.observations.double().mean(), 0.0, 1e-5)
    close(learner.divisor.double(), x.double().std(dim=0, correction=0) + 1e-3, 1e-5)
    assert torch.equal(learner.pairs.states, learner.data.observations)


def reference_step(learner: PRDC, actor_step: bool) -> dict[str, torch.Tensor]:
    """Return what the weights must be after the learner's next update, worked out apart from `update()`."""
    config, data, twin = learner.config, learner.data, copy.deepcopy
    actor, critic, actor_t, critic_t = (
        twin(x) for x in (learner.actor, learner.critic, learner.actor_target, learner.critic_target)
    )
    generator = torch.Generator()
    generator.set_state(learner.rng.torch.get_state())
    rows = torch.randint(len(data), (config.batch_size,), generator=generator)
    s, a, r, s2, d = (
        x[rows] for x in (data.observations, data.actions, data.rewards, data.next_observations, data.terminals)
    )
    xi = torch.randn(a.shape, generator=generator)

    def q(network, states, actions):
        return network(torch.cat([states, actions], 1))[:, 0]

    with torch.no_grad():
        noise = (xi * config.policy_noise).clamp(-config.noise_clip, config.noise_clip)
        a2 = (actor_t.body(s2).tanh() + noise).clamp(-1, 1)
        y = r + config.discount * (1 - d) * torch.min(q(critic_t.q1, s2, a2), q(critic_t.q2, s2, a2))
    adam = torch.optim.Adam(critic.parameters(), lr=config.learning_rate)
    (F.mse_loss(q(critic.q1, s, a), y) + F.mse_loss(q(critic.q2, s, a), y)).backward()
    adam.step()
    if actor_step:
        p = actor.body(s).tanh()
        every = (config.beta**2 * torch.cdist(s.double(), data.observations.double()) ** 2) + torch.cdist(
            p.detach().double(), data.actions.double()
        ) ** 2
        goal = data.actions[every.argsort(dim=1)[:, config.k - 1]]
        value = q(critic.q1, s, p)
        loss = -config.alpha / value.abs().mean().detach() * value.mean() + F.mse_loss(p, goal)
        adam = torch.optim.Adam(actor.parameters(), lr=config.learning_rate)
        loss.backward(inputs=list(actor.parameters()))
        adam.step()
        for slow, quick in ((actor_t, actor), (critic_t, critic)):
            for old, new in zip(slow.parameters(), quick.parameters(), strict=True):
                old.data = config.tau * new.data + (1 - config.tau) * old.data
    parts = {"actor": actor, "critic": critic, "actor_target": actor_t, "critic_target": critic_t}
    return {f"{n}.{name}": w.detach() for n, part in parts.items() for name, w in part.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [
        {"policy_freq": 1},
        {"policy_freq": 2},
        {"policy_freq": 1, "k": 3, "beta": 50.0, "alpha": 7.5, "tau": 0.05},
        {"policy_freq": 1, "policy_noise": 0.5, "noise_clip": 0.1, "discount": 0.5, "beta": 0.05},
    ],
)
def test_one_update_is_the_step_of_the_card(settings):
    learner = small(**settings)
    with torch.no_grad():  # targets that differ from what they follow
        for network in (learner.actor_target, learner.critic_target):
            for weight in network.parameters():
                weight.mul_(0.9)
    expected = reference_step(learner, actor_step=settings["policy_freq"] == 1)
    learner.update()
    for name, weight in expected.items():
        part, _, rest = name.partition(".")
        found = dict(getattr(learner, part).named_parameters())[rest]
        torch.testing.assert_close(found.detach(), weight, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("every", [1, 3])
def test_the_actor_and_all_targets_move_at_every_nth_step_only(every):
    learner = small(policy_freq=every)
    for step in range(1, 7):
        before = {
            n: next(getattr(learner, n).parameters()).detach().clone()
            for n in ("actor", "critic", "actor_target", "critic_target")
        }
        metrics = learner.update()
        moved = {n: not torch.equal(next(getattr(learner, n).parameters()), w) for n, w in before.items()}
        turn = step % every == 0
        assert moved == {"actor": turn, "critic": True, "actor_target": turn, "critic_target": turn}
        assert ("constraint" in metrics) == turn


def test_at_a_very_high_beta_the_whole_training_is_td3_bcs():
    """Identity 2, with places a unit apart, so that the own row is always nearest."""
    settings = {"rows": 50, "batch_size": 16, "width": 8, "device": "cpu", "alpha": 2.5, "policy_freq": 1}
    learners = PRDC(beta=5000.0, **settings), TD3BC(**settings)
    spacing = learners[0].data.observations[:, 0].sort().values.diff().min()
    assert 5000 * float(spacing) > 2, "this diary has two places that are too near"
    for _ in range(30):
        metrics = [learner.update() for learner in learners]
        assert float(metrics[0]["own_row"]) == 1
    for name in ("actor", "critic", "actor_target", "critic_target"):
        for ours, theirs in zip(*(getattr(x, name).parameters() for x in learners), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("knob", ["beta", "alpha", "k", "policy_noise", "noise_clip", "tau", "learning_rate"])
def test_a_knob_acts_on_the_very_next_update(knob):
    learner = small(policy_freq=1)
    twin = learner.fork()
    setattr(twin.config, knob, twin.config.knobs[knob].from_position(0.07, twin.config))
    for each in (learner, twin):
        each.update()
        each.update()  # what the targets took shows in the second
    assert learner.state().digest() != twin.state().digest()
    assert any(
        not torch.equal(a, b)
        for a, b in zip(
            (*learner.actor.parameters(), *learner.critic_target.parameters(), *learner.critic.parameters()),
            (*twin.actor.parameters(), *twin.critic_target.parameters(), *twin.critic.parameters()),
            strict=True,
        )
    )


def test_distance_is_e1_along_the_line():
    learner = small(beta=7.0)
    for _ in range(10):
        learner.update()
    grid = torch.linspace(0, 9, 91).unsqueeze(1)
    s = (grid - learner.mean) / learner.divisor
    expected = distance_to_data(s, learner.actor(s).detach(), learner.data.observations, learner.data.actions, 7.0)
    assert float(learner.evaluate()["distance"]) == pytest.approx(float(expected.mean()), rel=1e-4)


def test_overestimation_is_the_promise_less_what_comes():
    learner = small()
    figures = learner.evaluate()
    x = torch.linspace(0, 5, 20)
    returns, places, weight = torch.zeros(20), x.clone(), 1.0
    arrived = torch.zeros(20, dtype=torch.bool)
    with torch.no_grad():
        for _ in range(40):
            action = learner.actor((places[:, None] - learner.mean) / learner.divisor)[:, 0]
            places = (places + action).clamp(0, 10)
            returns += torch.where(arrived, 0.0, weight * (-0.1 + 10 * (places >= 9)))
            arrived |= places >= 9
            weight *= learner.config.discount
        s = (x[:, None] - learner.mean) / learner.divisor
        promised = learner.critic.q1(torch.cat([s, learner.actor(s)], 1))[:, 0]
    assert float(figures["score"]) == pytest.approx(100 * float(arrived.float().mean()))
    assert float(figures["overestimation"]) == pytest.approx(float((promised - returns).mean()), abs=1e-4)


def test_views_show_the_strengths_effect():
    learner = small(rows=2000)
    low = learner.views()
    learner.config.beta = 5000.0
    high = learner.views()
    assert set(low) == {"policy", "values", "gaps"}
    assert float(high["gaps"].y["to the neighbour's state"].max()) < 0.01
    assert float(low["gaps"].y["to the neighbour's state"].max()) > 0.05
    assert float(high["gaps"].y["to its action"].mean()) > 5 * float(low["gaps"].y["to its action"].mean())


def test_it_learns_where_cloning_can_not():
    learner, rival = PRDC(device="cpu", seed=1), TD3BC(device="cpu", seed=1, alpha=0.5)
    for _ in range(500):
        learner.update()
        rival.update()
    assert float(learner.evaluate()["score"]) == 100
    assert float(rival.evaluate()["score"]) < 20


# ---- structure -----------------------------------------------------------------------------------------------


def test_an_unknown_data_set_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean line-diary"):
        PRDC(dataset="line-dairy")
    with pytest.raises(UnknownNameError, match="pendulum-mixed"):
        PRDC(dataset="pendulum-mixt")


def test_settings_that_can_not_be_are_refused():
    with pytest.raises(KnobError, match="batch_size must be at most the number of transitions, 60, got 64"):
        PRDC(rows=60)
    with pytest.raises(KnobError, match="rows"):
        PRDC(rows=10)
    with pytest.raises(KnobError, match="discount"):
        PRDC(discount=1.0)
    run = Run(small(), threads=1, autosave=0)
    with pytest.raises(StructureError, match="dataset is structure"):
        run.tune(dataset="pendulum-mixed")
    with pytest.raises(KnobError, match="k must be a whole number from 1 to 20"):
        run.tune(k=21)


def test_the_knob_to_drag_first_is_beta_and_the_papers_values_are_known():
    assert next(iter(Config.knobs)) == "beta"
    assert Config().paper_values() == {"alpha": 2.5, "tau": 0.005, "learning_rate": 3e-4}
    assert Config().beta == 2.0


@pytest.mark.slow
def test_a_recorded_task_can_be_learned_from():
    learner = PRDC(dataset="pendulum-mixed", width=16, batch_size=32, device="cpu", alpha=2.5)
    for _ in range(6):
        metrics = learner.update()
    assert all(math.isfinite(float(x)) for x in metrics.values())
    figures = learner.evaluate()
    assert set(figures) == {"score", "mean_return", "overestimation", "promised", "distance"}
    actions = learner.act(torch.randn(5, 3)).detach()
    assert float(actions.abs().max()) <= 2
    assert set(learner.views()) == {"policy", "values", "gaps"}
    assert [float(x) for x in learner.evaluate().values()] == [float(x) for x in figures.values()]


def test_the_study_compares_with_td3_bc():
    jobs = study.jobs("full")
    assert {job.learner for job in jobs} == {PRDC, TD3BC}
    assert {job.labels["seed"] for job in jobs} == set(range(5))
    for mode in ("smoke", "fast", "full"):
        assert all(job.steps == {"smoke": 6, "fast": 800, "full": 1500}[mode] for job in study.jobs(mode))
