"""Diffusion policy: DPPO's equations against written-out sums, the two networks of the chain, the learner."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import close, normal

from polrl import Run
from polrl.core.conformance import ALL_CHECKS, Case
from polrl.core.errors import KnobError
from polrl.diffusion.diffusion_policy import (
    DiffusionPolicy,
    approximate_kl,
    clamped_log_probability,
    clip_schedule,
    clipped_loss,
    cloning_loss,
    denoising_advantages,
    generalized_advantages,
    step_divergence,
    study,
    value_loss,
)

SMALL = {
    "demonstrations": 1, "pretrain_epochs": 1, "denoising_steps": 4, "finetuned_steps": 2, "environments": 2,
    "horizon": 2, "width": 8,
}  # fmt: skip


# ---- E2 ----------------------------------------------------------------------------------------------------------


def test_e2_is_a_mean_over_batch_and_chunk_and_leaves_the_noise_alone():
    predicted, noise = normal(3, 4, seed=1).requires_grad_(), normal(3, 4, seed=2).requires_grad_()
    loss = cloning_loss(predicted, noise)
    close(loss.detach(), sum(float((predicted - noise).detach()[i, k]) ** 2 for i in range(3) for k in range(4)) / 12)
    loss.backward()
    close(predicted.grad, 2 * (predicted - noise).detach() / 12)
    assert noise.grad is None


# ---- E15 ---------------------------------------------------------------------------------------------------------


def written_out(after, mean, std, floor):
    rows = []
    for i in range(len(after)):
        terms = []
        for k in range(after.shape[1]):
            s = max(float(std[i, 0]), floor)
            density = -((float(after[i, k]) - float(mean[i, k])) ** 2) / (2 * s * s) - math.log(s)
            terms.append(min(2.0, max(-5.0, density - 0.5 * math.log(2 * math.pi))))
        rows.append(sum(terms) / len(terms))
    return torch.tensor(rows, dtype=torch.float64)


def test_e15_is_clamped_by_element_before_it_is_averaged():
    after, mean = normal(5, 4, seed=1), normal(5, 4, seed=2)
    std = torch.tensor([[0.02], [0.1], [0.3], [0.6], [1.5]], dtype=torch.float64)
    found = clamped_log_probability(after, mean, std, 0.1)
    close(found, written_out(after, mean, std, 0.1))


def test_e15_clamps_far_elements_at_minus_five_and_close_ones_at_two():
    after = torch.tensor([[0.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    std = torch.full((2, 1), 0.01, dtype=torch.float64)
    found = clamped_log_probability(after, torch.zeros(2, 2, dtype=torch.float64), std, 0.02)
    close(found, [(2.0 - 5.0) / 2, 2.0])  # log N(0; 0, 0.02) is 2.99, which is cut to 2
    wide = clamped_log_probability(after, torch.zeros(2, 2, dtype=torch.float64), std, 0.5)
    peak = -math.log(0.5) - 0.5 * math.log(2 * math.pi)
    close(wide, [(peak - 5.0) / 2, peak])


def test_e15_stops_gradients_at_the_step_and_where_it_clamps():
    after = torch.tensor([[0.1, 9.0]], dtype=torch.float64, requires_grad=True)
    mean = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    clamped_log_probability(after, mean, torch.tensor([[0.5]], dtype=torch.float64), 0.1).sum().backward()
    assert after.grad is None
    close(mean.grad, [[0.1 / 0.25 / 2, 0.0]])


@pytest.mark.parametrize("floor", [0.0, -0.1, math.nan])
def test_e15_refuses_a_step_without_noise(floor):
    with pytest.raises(ValueError, match="floor must be above 0"):
        clamped_log_probability(normal(2, 2), normal(2, 2), torch.zeros(2, 1), floor)


# ---- E16 ---------------------------------------------------------------------------------------------------------


def by_sums(reward, value, following, terminated, ended, gamma, lam):
    steps, n = reward.shape
    out = torch.zeros(steps, n, dtype=torch.float64)
    for e in range(n):
        for t in range(steps):
            weight = 1.0
            for k in range(t, steps):
                go_on = 0.0 if terminated[k, e] else 1.0
                delta = reward[k, e] + gamma * go_on * following[k, e] - value[k, e]
                out[t, e] += weight * delta
                if ended[k, e]:
                    break
                weight *= gamma * lam
    return out


def test_e16a_sums_discounted_surprises_up_to_the_end_of_the_episode():
    reward, value, following = normal(6, 3, seed=1), normal(6, 3, seed=2), normal(6, 3, seed=3)
    terminated, ended = torch.zeros(6, 3, dtype=torch.bool), torch.zeros(6, 3, dtype=torch.bool)
    terminated[2, 0] = ended[2, 0] = True  # by the task: nothing follows
    ended[3, 1] = True  # by the time limit: the value of what follows counts, its surprises do not
    found = generalized_advantages(reward, value, following, terminated, ended, 0.9, 0.8)
    close(found, by_sums(reward, value, following, terminated, ended, 0.9, 0.8))


def test_e16a_with_lambda_one_is_the_discounted_return_less_the_value():
    reward, value = normal(4, 1, seed=1), normal(4, 1, seed=2)
    following = torch.cat([value[1:], torch.zeros(1, 1, dtype=torch.float64)])
    none = torch.zeros(4, 1, dtype=torch.bool)
    found = generalized_advantages(reward, value, following, none, none, 0.9, 1.0)
    returns = [sum(0.9 ** (k - t) * float(reward[k, 0]) for k in range(t, 4)) for t in range(4)]
    close(found[:, 0], torch.tensor(returns, dtype=torch.float64) - value[:, 0])


def test_e16_normalises_first_with_the_unbiased_deviation_and_discounts_then():
    advantage, step = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64), torch.tensor([0, 1, 2, 2])
    found = denoising_advantages(advantage, step, 3, 0.5)
    mean = 4.0
    deviation = math.sqrt(((1 - mean) ** 2 + (2 - mean) ** 2 + 0 + (9 - mean) ** 2) / 3)
    factors = [0.25, 0.5, 1.0, 1.0]
    close(found, [(float(a) - mean) / (deviation + 1e-8) * f for a, f in zip(advantage, factors, strict=True)])


def test_e16_is_a_constant_and_all_alike_earn_nothing():
    advantage = torch.full((4,), 3.0, dtype=torch.float64, requires_grad=True)
    found = denoising_advantages(advantage, torch.tensor([0, 1, 0, 1]), 2, 0.9)
    close(found, torch.zeros(4))
    assert not found.requires_grad


def test_e16_refuses_a_single_pair():
    with pytest.raises(ValueError, match="at least 2"):
        denoising_advantages(torch.ones(1), torch.zeros(1, dtype=torch.int64), 2, 0.9)


# ---- E17 ---------------------------------------------------------------------------------------------------------


def test_e17_grows_from_start_to_end_exponentially():
    steps = torch.arange(5)
    found = clip_schedule(steps, 5, 0.01, 0.2, torch.float64)
    expected = [0.01 + 0.19 * (math.exp(3 * j / 4) - 1) / (math.exp(3) - 1) for j in range(5)]
    close(found, expected)
    assert float(found[0]) == pytest.approx(0.01) and float(found[-1]) == pytest.approx(0.2)


def test_e17_with_one_step_is_the_end_and_not_nan():
    close(clip_schedule(torch.zeros(3, dtype=torch.int64), 1, 0.01, 0.2), [0.2] * 3, 1e-6)


def test_e17_with_equal_ends_is_constant():
    close(clip_schedule(torch.arange(4), 4, 0.05, 0.05), [0.05] * 4, 1e-7)


# ---- E6 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "credit", "moves"),
    [(1.3, 1.0, False), (0.7, 1.0, True), (1.3, -1.0, True), (0.7, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_e6_clips_one_side_by_the_sign_of_the_credit(ratio, credit, moves):
    old = torch.zeros(1, dtype=torch.float64)
    new = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    loss = clipped_loss(new, old, torch.tensor([credit], dtype=torch.float64), torch.tensor([0.2]))
    loss.backward()
    close(new.grad, [-credit * ratio if moves else 0.0], 1e-9)
    clipped = min(1.2, max(0.8, ratio))
    close(loss.detach(), max(-credit * ratio, -credit * clipped), 1e-6)


def test_e6_uses_each_steps_own_range_and_averages():
    old, credit = normal(4, seed=1), normal(4, seed=2)
    new, ranges = old + 0.3 * normal(4, seed=3), torch.tensor([0.01, 0.1, 0.2, 0.5], dtype=torch.float64)
    expected = 0.0
    for i in range(4):
        rho, a, e = math.exp(float(new[i] - old[i])), float(credit[i]), float(ranges[i])
        expected += max(-a * rho, -a * min(1 + e, max(1 - e, rho))) / 4
    close(clipped_loss(new, old, credit, ranges), expected)


def test_e6_at_the_old_policy_is_the_score_functions_gradient():
    new, credit = normal(5, seed=1).requires_grad_(), normal(5, seed=2).requires_grad_()
    clipped_loss(new, new, credit, torch.full((5,), 0.01, dtype=torch.float64)).backward()
    close(new.grad, -credit.detach() / 5)
    assert credit.grad is None


def test_e6a_is_half_the_mean_square_and_leaves_the_target_alone():
    value, target = normal(4, seed=1).requires_grad_(), normal(4, seed=2).requires_grad_()
    value_loss(value, target).backward()
    close(value.grad, (value - target).detach() / 4)
    assert target.grad is None


def test_e6b_is_never_negative_and_zero_without_a_change():
    new, old = normal(50, seed=1), normal(50, seed=2)
    expected = sum(math.exp(float(a - b)) - 1 - float(a - b) for a, b in zip(new, old, strict=True)) / 50
    close(approximate_kl(new, old), expected)
    assert expected > 0
    close(approximate_kl(old, old), 0.0)


def test_e6c_is_the_divergence_of_two_gaussians():
    mean, other, std = normal(3, 4, seed=1), normal(3, 4, seed=2), torch.tensor([[0.05], [0.2], [1.0]]).double()
    expected = [
        float(
            torch.distributions.kl_divergence(
                torch.distributions.Normal(mean[i], max(float(std[i, 0]), 0.1)),
                torch.distributions.Normal(other[i], max(float(std[i, 0]), 0.1)),
            ).sum()
        )
        for i in range(3)
    ]
    close(step_divergence(mean, other, std, 0.1), expected)
    close(step_divergence(mean, mean, std, 0.1), [0.0] * 3)


# ---- the learner -------------------------------------------------------------------------------------------------


def finetuning(**settings) -> DiffusionPolicy:
    learner = DiffusionPolicy(**{**SMALL, **settings})
    while learner.phase == "pretrain":
        learner.update()
    return learner


def weights(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def test_ratios_are_one_before_the_first_step():
    learner = finetuning()
    played = learner.play()
    last = learner.config.finetuned_steps
    found = learner.log_probability(
        learner.denoiser, played["before"].flatten(0, 1), played["after"].flatten(0, 1),
        torch.arange(last).repeat(len(played["advantage"])),
        played["observation"].repeat_interleave(last, dim=0),
    )  # fmt: skip
    torch.testing.assert_close(found.detach(), played["log_probability"].flatten(), rtol=0, atol=2e-5)


def test_only_the_last_steps_are_the_learning_networks():
    learner = finetuning()
    observation, start = torch.randn(3, 3), torch.randn(3, 4)
    state = learner.rng.torch.get_state()
    before = learner.act(observation, start)
    with torch.no_grad():
        learner.denoiser.head.bias.add_(1.0)
    learner.rng.torch.set_state(state)
    after = learner.act(observation, start)
    same = [bool(torch.equal(a, b)) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, True, False, False]  # noise, two steps of the pretrained network, two that learn


def test_finetuning_leaves_the_pretrained_network_alone_and_moves_the_other():
    learner = finetuning()
    pretrained, denoiser = weights(learner.pretrained), weights(learner.denoiser)
    assert torch.equal(pretrained, denoiser)
    learner.update()
    assert torch.equal(weights(learner.pretrained), pretrained)
    assert not torch.equal(weights(learner.denoiser), denoiser)


def test_pretraining_acts_with_the_averaged_weights():
    learner = DiffusionPolicy(**{**SMALL, "pretrain_epochs": 3})
    learner.update()
    assert learner.acting is learner.pretrained
    assert not torch.equal(weights(learner.pretrained), weights(learner.denoiser))
    assert float(learner.evaluate()["kl_to_pretrained"]) == 0.0


def test_a_large_cloning_weight_keeps_the_policy_near():
    far, near = (
        finetuning(bc_weight=weight, clip_end=0.5, clip_start=0.5, learning_rate=3e-3) for weight in (0.0, 10.0)
    )
    for learner in (far, near):
        for _ in range(5):
            learner.update()
    assert far.evaluate()["kl_to_pretrained"] > near.evaluate()["kl_to_pretrained"] > 0


def test_no_cloning_loss_is_computed_at_weight_zero():
    assert "cloning_loss" not in finetuning().update()
    assert "cloning_loss" in finetuning(bc_weight=1.0).update()


@pytest.mark.parametrize("finetuned", [1, 4])
def test_any_number_of_last_steps_can_learn(finetuned):
    metrics = finetuning(finetuned_steps=finetuned).update()
    assert all(math.isfinite(float(v)) for v in metrics.values())


def test_more_learning_steps_than_steps_are_refused():
    with pytest.raises(KnobError, match=r"finetuned_steps=5; allowed: 1 to denoising_steps=4"):
        DiffusionPolicy(**{**SMALL, "finetuned_steps": 5})


def test_without_pretraining_it_begins_with_reinforcement():
    assert DiffusionPolicy(**{**SMALL, "pretrain_epochs": 0}).phase == "finetune"


def test_views_show_both_policies_and_agree_before_finetuning():
    views = finetuning().views()
    assert set(views) == {"first_push", "path", "swing_up", "policy", "kl_by_step"}
    counts = views["first_push"].counts
    assert list(counts) == ["pretrained", "now"]
    assert (counts["pretrained"] == counts["now"]).all()
    assert max(views["kl_by_step"].values["KL"]) < 1e-9


def test_smoke_study_runs():
    result = study.run("smoke", n_jobs=1)
    assert len(result.measures) == len(study.arms)


@pytest.mark.parametrize("check", ALL_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance_across_both_phases(check):
    check(Case(DiffusionPolicy, {**SMALL, "bc_weight": 0.5, "epochs": 1}, steps=3))


def test_replay_repeats_a_hand_tuned_run():
    run = Run(DiffusionPolicy(**SMALL), threads=1)
    run.advance(2)
    run.tune(bc_weight=0.5, clip_end=0.1)
    run.advance(2)
    again = Run.replay(run.tape)
    assert again.learner.state().digest() == run.learner.state().digest()
