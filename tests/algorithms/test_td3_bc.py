"""TD3+BC: its equations against sums written out, one whole update by hand, its two ends, and the tasks it runs in."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from polrl import Run
from polrl.core.errors import DataError, KnobError, UnknownNameError
from polrl.offline import _trials
from polrl.offline._trials import TaskTrial, load_problem
from polrl.offline.td3_bc import TD3BC, actor_loss, cloning_loss, scaled_improvement, study
from polrl.worlds.line_world import line_diary


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(**settings) -> TD3BC:
    return TD3BC(**{"rows": 200, "batch_size": 16, "width": 8, "device": "cpu", **settings})


# ---- equations -----------------------------------------------------------------------------------------------


def test_e4_is_a_mean_over_batch_and_dimensions_with_no_gradient_to_the_data():
    action, recorded = normal(5, 3, seed=1).requires_grad_(), normal(5, 3, seed=2).requires_grad_()
    loss = cloning_loss(action, recorded)
    pairs = zip(action.detach().flatten().tolist(), recorded.detach().flatten().tolist(), strict=True)
    assert float(loss.detach()) == pytest.approx(sum((a - b) ** 2 for a, b in pairs) / 15, abs=1e-12)
    gradients = torch.autograd.grad(loss, (action, recorded), allow_unused=True)
    torch.testing.assert_close(gradients[0], 2 * (action - recorded).detach() / 15)
    assert gradients[1] is None


def test_e5_s_scale_is_a_constant():
    q = normal(6, seed=1).requires_grad_()
    size = sum(abs(x) for x in q.tolist()) / 6
    loss = scaled_improvement(q, 0.7)
    assert float(loss.detach()) == pytest.approx(-0.7 / size * sum(q.tolist()) / 6, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, q)
    torch.testing.assert_close(gradient, torch.full((6,), -0.7 / size / 6, dtype=torch.float64))
    torch.testing.assert_close(scaled_improvement(7 * q, 0.7), loss)


def test_e6_adds_both():
    q, action, recorded = normal(5, seed=1), normal(5, 2, seed=2), normal(5, 2, seed=3)
    expected = -2.5 * q.sum() / q.abs().sum() + (action - recorded).pow(2).sum() / 10
    torch.testing.assert_close(actor_loss(q, action, recorded, 2.5), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equations_keep_the_dtype(dtype):
    q, action, recorded = (normal(4).to(dtype), normal(4, 2).to(dtype), normal(4, 2, seed=1).to(dtype))
    outcomes = cloning_loss(action, recorded), scaled_improvement(q, 1.0), actor_loss(q, action, recorded, 1.0)
    assert {outcome.dtype for outcome in outcomes} == {dtype}


# ---- the learner ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "clip", "noise"), [(2.5, 0.5, 0.2), (0.0, 0.5, 0.2), (10.0, 0.1, 0.5)])
def test_one_update_is_td3s_with_cloning(alpha, clip, noise):
    learner = small(policy_freq=1, alpha=alpha, noise_clip=clip, policy_noise=noise, tau=0.05)
    with torch.no_grad():
        for network in (learner.actor_target, learner.critic_target):
            for weight in network.parameters():
                weight.mul_(0.9)
    actor, critic, slow_actor, slow_critic = (
        copy.deepcopy(x) for x in (learner.actor, learner.critic, learner.actor_target, learner.critic_target)
    )
    data, generator = learner.data, torch.Generator()
    generator.set_state(learner.rng.torch.get_state())
    rows = torch.randint(200, (16,), generator=generator)
    s, a, s2 = data.observations[rows], data.actions[rows], data.next_observations[rows]
    xi = torch.randn(a.shape, generator=generator)

    def q(network, states, actions):
        return network(torch.cat([states, actions], 1))[:, 0]

    with torch.no_grad():
        a2 = (slow_actor.body(s2).tanh() + (xi * noise).clamp(-clip, clip)).clamp(-1, 1)
        smaller = torch.min(q(slow_critic.q1, s2, a2), q(slow_critic.q2, s2, a2))
        y = data.rewards[rows] + 0.9 * (1 - data.terminals[rows]) * smaller
    adam = torch.optim.Adam(critic.parameters(), lr=2e-3)
    (F.mse_loss(q(critic.q1, s, a), y) + F.mse_loss(q(critic.q2, s, a), y)).backward()
    adam.step()
    value = q(critic.q1, s, actor.body(s).tanh())
    loss = -alpha / value.abs().mean().detach() * value.mean() + F.mse_loss(actor.body(s).tanh(), a)
    adam = torch.optim.Adam(actor.parameters(), lr=2e-3)
    loss.backward(inputs=list(actor.parameters()))
    adam.step()
    learner.update()
    for found, expected in ((learner.actor, actor), (learner.critic, critic)):
        for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for found, slow, quick in (
        (learner.actor_target, slow_actor, actor),
        (learner.critic_target, slow_critic, critic),
    ):
        for ours, old, new in zip(found.parameters(), slow.parameters(), quick.parameters(), strict=True):
            torch.testing.assert_close(ours, 0.05 * new + 0.95 * old, rtol=1e-5, atol=1e-6)


def test_alpha_zero_clones_whatever_the_critic_says():
    learner, twin = small(alpha=0.0), small(alpha=0.0)
    with torch.no_grad():
        for weight in twin.critic.parameters():
            weight.mul_(3.0)
    for _ in range(20):
        learner.update()
        twin.update()
    for ours, theirs in zip(learner.actor.parameters(), twin.actor.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_higher_alpha_leaves_the_data_further_behind():
    from_data = []
    for alpha in (0.0, 50.0):
        learner = TD3BC(device="cpu", alpha=alpha)
        for _ in range(300):
            learner.update()
        s, a = learner.data.observations, learner.data.actions
        from_data.append(float(cloning_loss(learner.actor(s), a).detach()))
    assert from_data[1] > 1.3 * from_data[0]


def test_the_critic_gets_no_gradient_from_the_actors_loss():
    learner = small(policy_freq=1)
    learner.update()
    before = [weight.grad.clone() for weight in learner.critic.parameters()]
    s = learner.data.observations[:16]
    learner.descend(learner.actor_optimizer, -learner.critic.first(s, learner.actor(s)).mean())
    for weight, grad in zip(learner.critic.parameters(), before, strict=True):
        assert torch.equal(weight.grad, grad)


def test_views_are_drawn():
    views = small().views()
    assert set(views) == {"policy", "values", "gaps"}
    assert float(views["gaps"].counts["data states"].sum()) == pytest.approx(1)


# ---- problems ------------------------------------------------------------------------------------------------


def test_a_recorded_task_is_tried_alike_every_time():
    learner = small(dataset="pendulum-mixed")
    first, second = (learner.trial.play(learner.act, 0.9) for _ in range(2))
    assert float(first.discounted.sum()) == float(second.discounted.sum())
    assert first.scores == second.scores
    assert first.starts.shape == (3, 3)
    score = learner.data.normalized_score(first.scores["mean_return"])
    assert first.scores["score"] == pytest.approx(float(score))
    for _ in range(4):
        learner.update()
    assert all(math.isfinite(float(x)) for x in learner.evaluate().values())
    assert float(learner.act(torch.randn(50, 3)).detach().abs().max()) <= 2.0
    assert learner.actor.a_max.tolist() == [2.0]
    assert set(learner.views()) == {"policy", "values", "gaps"}


def test_a_trials_discounted_return_is_the_sum_of_its_rewards():
    data, trial = load_problem("pendulum-mixed", 0, 0, torch.device("cpu"))
    assert isinstance(trial, TaskTrial)
    played = trial.play(lambda x: torch.zeros(len(x), 1), 0.9)
    task = trial.tasks[1]
    observation, total, plain = task.reset(seed=1), 0.0, 0.0
    torch.testing.assert_close(played.starts[1], torch.tensor(observation))
    for step in range(200):
        _, reward, _, _ = task.step([0.0])
        total, plain = total + 0.9**step * reward, plain + reward
    assert float(played.discounted[1]) == pytest.approx(total, rel=1e-5)
    assert played.scores["mean_return"] == pytest.approx(sum(returned(trial, seed) for seed in range(3)) / 3, rel=1e-6)
    assert returned(trial, 1) == pytest.approx(plain)


def returned(trial, seed):
    task = trial.tasks[seed]
    task.reset(seed=seed)
    for _ in range(200):
        task.step([0.0])
    return task.episode_return


def test_a_data_set_without_a_task_or_with_odd_bounds_is_refused(monkeypatch):
    diary = line_diary(100, 0, "cpu")
    monkeypatch.setattr(_trials, "load_offline", lambda name, device: diary)
    with pytest.raises(DataError, match="does not say in which task"):
        TD3BC(dataset="mine")
    import dataclasses

    odd = dataclasses.replace(diary, task="Pendulum-v1", action_low=torch.tensor([0.0]))
    monkeypatch.setattr(_trials, "load_offline", lambda name, device: odd)
    with pytest.raises(DataError, match=r"bounded alike on both sides, those of mine are from \[0.0\] to \[1.0\]"):
        TD3BC(dataset="mine")


def test_structure_and_knobs_refuse_what_they_can_not_take():
    with pytest.raises(UnknownNameError, match="line-diary"):
        TD3BC(dataset="line_diary")
    with pytest.raises(KnobError, match="batch_size"):
        TD3BC(batch_size=5000)
    with pytest.raises(KnobError, match="alpha must be a number from 0 to 50"):
        Run(small(), threads=1, autosave=0).tune(alpha=-1.0)


def test_the_study_names_what_it_compares():
    assert {job.labels["arm"] for job in study.jobs("fast")} == {"line, cloning", "line, TD3+BC", "line, almost TD3"}
    assert len(study.jobs("full")) == 30
