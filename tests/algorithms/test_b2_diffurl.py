"""B²-DiffuRL: the schedule, scores and selection against written-out tables, the identity with DDPO, the learner."""

from __future__ import annotations

import collections
import statistics

import pytest
import torch
from closeness import close, normal

from polrl.core.conformance import ALL_CHECKS, Case
from polrl.core.errors import KnobError
from polrl.diffusion.b2_diffurl import (
    B2DiffuRL,
    best_and_worst,
    group_advantages,
    prompt_scores,
    study,
    suffix_length,
)
from polrl.diffusion.ddpo import DDPO, clipped_loss

SMALL = {"samples": 12, "steps": 6, "minibatch": 32, "measured": 16, "suffix_start": 2, "growth_stages": 4}


# ---- E5 ----------------------------------------------------------------------------------------------------------


def test_e5_takes_every_length_of_the_paper_s_run_equally_often():
    lengths = [suffix_length(stage, 14, 20, 100) for stage in range(100)]
    assert lengths == [14 + stage * 7 // 100 for stage in range(100)]
    counts = collections.Counter(lengths)
    assert set(counts) == set(range(14, 21)) and set(counts.values()) == {14, 15}


def test_e5_stays_at_all_steps():
    assert [suffix_length(stage, 8, 20, 36) for stage in (0, 35, 36, 1000)] == [8, 20, 20, 20]
    assert {suffix_length(stage, 20, 20, 36) for stage in range(100)} == {20}


@pytest.mark.parametrize("start", [0, 21])
def test_e5_refuses(start):
    with pytest.raises(ValueError, match=f"from 1 to the 20 steps, got {start}"):
        suffix_length(0, start, 20, 36)


# ---- E7 ----------------------------------------------------------------------------------------------------------


def test_e7_by_hand():
    reward, past = normal(8, seed=1), normal(6, seed=2)
    prompts, past_prompts = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 1, 2, 3])
    found = prompt_scores(reward, prompts, past, past_prompts)
    for i in range(8):
        p = prompts[i]
        every = [*reward[prompts == p].tolist(), *past[past_prompts == p].tolist()]
        close(found[i], (float(reward[i]) - statistics.mean(every)) / (statistics.stdev(every) + 1e-8), 1e-10)


def test_e7_does_not_see_units():
    reward, prompts = normal(8, seed=1), torch.tensor([0, 1] * 4)
    none, nobody = torch.zeros(0).double(), torch.zeros(0).long()
    close(prompt_scores(5 * reward - 3, prompts, none, nobody), prompt_scores(reward, prompts, none, nobody), 1e-6)


def test_e7_of_equal_or_single_rewards_is_zero():
    none, nobody = torch.zeros(0), torch.zeros(0).long()
    close(prompt_scores(torch.ones(4), torch.tensor([0, 0, 0, 1]), none, nobody), torch.zeros(4))


# ---- E8 ----------------------------------------------------------------------------------------------------------

TABLE = torch.tensor(
    [
        [0.2, 0.9, -0.8, 0.1],  # both
        [0.5, 0.3, 0.2, 0.4],  # the best only, exactly at the threshold
        [0.1, -0.5, -0.1, 0.4],  # neither: -0.5 is not below -0.5
        [-0.6, -0.7, 0.0, 0.1],  # the worst only
        [2.0, 2.0, -3.0, -3.0],  # ties
    ]
)


def test_e8_on_a_planted_table():
    kept = best_and_worst(TABLE, 0.5, -0.5)
    assert kept.tolist()[:4] == [1, 2, 4, 13]
    assert TABLE.flatten()[kept].tolist() == pytest.approx([0.9, -0.8, 0.5, -0.7, 2.0, -3.0])


def test_e8_keeps_nothing_above_high_thresholds_and_one_of_a_single_sample():
    assert len(best_and_worst(TABLE[:4], 1.5, -1.5)) == 0
    assert best_and_worst(torch.tensor([[0.7], [-0.7], [0.0]]), 0.5, -0.5).tolist() == [0, 1]
    assert best_and_worst(torch.tensor([[0.7], [-0.7], [0.0]]), 0.0, 0.0).tolist() == [0, 1, 2]


# ---- E10 ---------------------------------------------------------------------------------------------------------


def test_e10_by_hand_and_its_sums():
    reward = normal(3, 4)
    found = group_advantages(reward)
    spread = statistics.pstdev(reward.flatten().tolist())
    for i in range(3):
        mean = statistics.mean(reward[i].tolist())
        close(found[i], [(r - mean) / (spread + 1e-6) for r in reward[i].tolist()], 1e-10)
    close(found.sum(dim=1), torch.zeros(3).double(), 1e-10)


def test_e10_ignores_what_the_prefix_decided_and_ties_give_no_gradient():
    reward = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    advantage = group_advantages(reward)
    assert not advantage[:2].any() and bool((advantage[2] != 0).all())
    new = torch.zeros(9, requires_grad=True)
    (gradient,) = torch.autograd.grad(clipped_loss(new, torch.zeros(9), advantage.flatten(), 0.1), new)
    assert not gradient[:6].any() and bool(gradient[6:].all())


# ---- the learner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_all_steps_one_branch_and_no_selection_is_ddpo(kl_weight):
    shared = {"samples": 16, "measured": 16, "device": "cpu", "kl_weight": kl_weight, "seed": 3}
    ours = B2DiffuRL(**shared, suffix_start=20, branches=1, selection="none")
    theirs = DDPO(**shared)
    for _ in range(3):
        found, expected = ours.update(), theirs.update()
        for name, value in expected.items():
            assert float(found[name]) == pytest.approx(float(value), rel=1e-7, abs=1e-7), name
    for own, other in zip(ours.denoiser.parameters(), theirs.denoiser.parameters(), strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("change", [{"suffix_start": 19}, {"branches": 2}, {"selection": "group"}, {"neg_weight": 0.5}])
def test_anything_else_is_not_ddpo(change):
    shared = {"samples": 16, "measured": 16, "device": "cpu", "seed": 3}
    ours = B2DiffuRL(**{**shared, "suffix_start": 20, "branches": 1, "selection": "none", **change})
    theirs = DDPO(**shared)
    for learner in (ours, theirs):
        for _ in range(2):
            learner.update()
    assert any(
        not torch.equal(a, b) for a, b in zip(ours.denoiser.parameters(), theirs.denoiser.parameters(), strict=True)
    )


@pytest.mark.parametrize(("sign", "alike"), [(1.0, True), (-1.0, False)])
def test_the_losers_weight_is_the_losers_alone(sign, alike):
    learners = [B2DiffuRL(**SMALL, device="cpu", neg_weight=weight) for weight in (0.0, 1.0)]
    for learner in learners:
        learner.select = lambda reward, y: (torch.full_like(reward, sign), torch.arange(len(y)))
        learner.update()
    first, second = (torch.cat([p.detach().flatten() for p in learner.denoiser.parameters()]) for learner in learners)
    assert torch.equal(first, second) is alike


def test_suffix_grows_with_the_stages():
    learner = B2DiffuRL(**SMALL, device="cpu")
    assert [float(learner.update()["suffix"]) for _ in range(6)] == [2, 3, 4, 5, 6, 6]


def test_only_the_suffix_is_learned_from(monkeypatch):
    learner = B2DiffuRL(**SMALL, device="cpu", pos_threshold=0.0, neg_threshold=0.0)
    seen = []
    chain = learner.chain()
    monkeypatch.setattr(learner, "chain", lambda: chain)
    step = chain.step
    monkeypatch.setattr(chain, "step", lambda x, noise, i: seen.append(i) or step(x, noise, i))
    learner.update()
    trained = torch.cat([i for i in seen if torch.is_tensor(i)])
    assert set(trained.tolist()) == {4, 5}


def test_selected_samples_are_those_of_e8_over_the_last_stages():
    learner = B2DiffuRL(**SMALL, device="cpu", memory=2)
    y = torch.tensor([0] * 8 + [1] * 4)
    past = []
    for stage in range(4):
        reward, learner.step = normal(12, seed=stage).float(), stage
        score, kept = learner.select(reward, y)
        rewards = torch.cat([reward[:0], *past[-2:]])
        expected = prompt_scores(reward, y, rewards, y.repeat(min(stage, 2)))
        close(score, expected, 1e-6)
        assert kept.tolist() == best_and_worst(expected.reshape(3, 4), 0.5, -0.5).tolist()
        past.append(reward)


def test_group_leaves_out_branches_that_tie():
    learner = B2DiffuRL(**SMALL, device="cpu", selection="group")
    reward = torch.tensor([1.0, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0])
    advantage, kept = learner.select(reward, torch.zeros(12).long())
    assert kept.tolist() == [4, 5, 6, 7]
    close(advantage, group_advantages(reward.reshape(3, 4)).flatten())


def test_a_stage_without_winners_and_losers_changes_nothing():
    learner = B2DiffuRL(**SMALL, device="cpu")
    learner.world.reward = lambda x, y: torch.ones(len(x))
    before = [p.clone() for p in learner.denoiser.parameters()]
    metrics = learner.update()
    assert float(metrics["kept_share"]) == 0 and float(metrics["loss"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, learner.denoiser.parameters(), strict=True))


def test_evaluations_are_counted():
    learner = B2DiffuRL(**SMALL, device="cpu", selection="none", branches=4)
    learner.update()  # three prefixes of 4 steps, 12 branches of 2, two epochs on them
    assert learner.evaluations == 3 * 4 + 12 * 2 + 2 * 12 * 2 * 3


@pytest.mark.parametrize("branches", [1, 3, 5, 8])
def test_any_number_of_branches_fits(branches):
    learner = B2DiffuRL(**SMALL, device="cpu", branches=branches)
    learner.update()
    assert len(learner.final) == max(1, 12 // branches) * branches
    learner.config.branches = 2  # a knob: the next stage takes it
    learner.update()
    assert len(learner.final) == 12


@pytest.mark.parametrize("check", ALL_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_digits_keep_the_contract(check):
    check(Case(B2DiffuRL, {**SMALL, "kl_weight": 0.1, "world": "digits", "reward": "hackable"}, steps=3))


def test_views_show_what_was_made_of_the_stage():
    learner = B2DiffuRL(device="cpu", measured=16)
    assert {len(group) for group in learner.views()["stage"].groups.values()} == {0}
    learner.update()
    pictures = learner.views()
    counts = {name: len(group) for name, group in pictures["stage"].groups.items()}
    assert sum(counts.values()) == 64 and min(counts.values()) > 0
    trained = torch.tensor(pictures["decided"].y["trained steps"])
    assert int((~trained.isnan()).sum()) == learner.suffix and not trained[-learner.suffix :].isnan().any()


def test_views_of_digits():
    learner = B2DiffuRL(**SMALL, world="digits", device="cpu")
    assert "stage" not in learner.views()
    learner.update()
    assert learner.views()["stage"].images.shape == (3, 4, 8, 8)


def test_bad_settings_are_refused():
    with pytest.raises(KnobError, match=r"suffix_start.*1 to 6.*7"):
        B2DiffuRL(steps=6, suffix_start=7)
    with pytest.raises(KnobError, match="'best'"):
        B2DiffuRL(selection="best")


def test_study_runs():
    result = study.run("smoke")
    assert {v.name for v in result.verdicts} == {c.name for c in study.criteria}
