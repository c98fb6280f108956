"""GRPO: one update against the shared equations, the batch's bookkeeping, the world of sums and its pictures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from polrl import Run
from polrl.core.errors import KnobError, UnknownNameError
from polrl.core.sampling import Generators
from polrl.language import _group_policy as gp
from polrl.language._verified_sums import VerifiedSums, pass_at_k, token_kl, token_picture
from polrl.language.grpo import GRPO, clipped_share, group_weight, study
from polrl.models.causal_lm import token_log_probs
from polrl.models.tiny_lm import EOS, decode_batch, encode
from polrl.worlds.text_tasks import RewardError

SMALL = {"device": "cpu", "prompts": 6, "group_size": 4, "held_out": 6}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(found, expected, tolerance=1e-10):
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def weights(learner: GRPO) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in learner.policy.parameters()])


def prompts_of(learner: GRPO) -> list[str]:
    return decode_batch(learner.batch.prompt_ids, learner.batch.prompt_mask)


# ---- its own equations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "by_spread"), [("population", True), ("none", False)])
def test_e1_is_the_mean_size_of_the_advantages(mode, by_spread):
    for right in range(1, 8):
        rewards = torch.tensor([1.0] * right + [0.0] * (8 - right), dtype=torch.float64)
        adv = gp.grpo_advantage(rewards, torch.zeros(8, dtype=torch.int64), mode, eps=0.0)
        close(group_weight(torch.tensor(right / 8, dtype=torch.float64), by_spread), adv.abs().mean())


def test_e2_counts_the_tokens_without_a_gradient():
    logp = (0.5 * torch.randn(20, 5, generator=generator(), dtype=torch.float64)).requires_grad_()
    mask = (torch.arange(5) < torch.arange(20).remainder(6).unsqueeze(1)).double()
    adv = torch.randn(20, generator=generator(1), dtype=torch.float64)
    ratio = gp.token_ratio(logp, torch.zeros_like(mask), mask)
    (gradient,) = torch.autograd.grad(gp.seq_sum(gp.clip_loss(ratio, adv, 0.1, 0.3), mask), logp)
    still = sum(float(gradient[i, t]) == 0 for i, t in itertools.product(range(20), range(5)) if mask[i, t])
    found = clipped_share(ratio, adv, mask, 0.1, 0.3)
    assert 0.2 < float(found.detach()) < 0.8
    close(found, still / float(mask.sum()))


def test_pass_at_k_is_the_share_of_the_draws_that_hit():
    for n, c in itertools.product((1, 4, 6), range(7)):
        for k in range(1, n + 1):
            if c <= n:
                draws = list(itertools.combinations(range(n), k))
                hit = sum(min(draw) < c for draw in draws) / len(draws)
                close(pass_at_k(torch.tensor([float(c)]).double(), n, k), [hit])
    with pytest.raises(ValueError, match="k must be from 1 to n=4, got 5"):
        pass_at_k(torch.ones(1), 4, 5)


def test_token_kl_is_exact():
    logits, other = (torch.randn(3, 4, generator=generator(s), dtype=torch.float64) for s in (1, 2))
    for row in range(3):
        p, q = logits[row].softmax(0).tolist(), other[row].softmax(0).tolist()
        close(token_kl(logits, other)[row], math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


# ---- the update ----------------------------------------------------------------------------------------------


def by_hand(learner: GRPO, token_loss, reduce) -> torch.Tensor:
    """Return the weights after the update that the equations prescribe, on the learner's present batch."""
    twin = learner.fork()
    batch = twin.batch
    logits = batch.logits(twin.policy)
    logp = token_log_probs(logits, batch.ids)
    twin.optimizer.param_groups[0]["lr"] = twin.config.learning_rate
    twin.optimizer.zero_grad()
    reduce(token_loss(batch, logp, logits), batch.mask).backward()
    torch.nn.utils.clip_grad_norm_(twin.policy.parameters(), 1.0)
    twin.optimizer.step()
    return weights(twin)


def after_one_of_two(**settings) -> GRPO:
    """Return a learner between the two updates of a batch, so that ratios differ from 1."""
    learner = GRPO(**SMALL, reuse=2, learning_rate=2e-3, **settings)
    for _ in range(3):
        learner.update()
    assert learner.uses == 1
    return learner


def test_default_is_b17():
    learner = after_one_of_two(beta=0.3, clip_low=0.1, clip_high=0.3)

    def loss(batch, logp, logits):
        return gp.grpo_loss(
            logp, batch.old_logp, batch.ref_logp, batch.rewards, learner.world.group, batch.mask, 0.3, 0.1, 0.3
        )

    expected = by_hand(learner, loss, lambda value, mask: value)
    before = weights(learner)
    learner.update()
    assert float((weights(learner) - before).abs().max()) > 1e-4
    close(weights(learner), expected, 1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_sum_const", "seq_sum"])
@pytest.mark.parametrize("std_mode", ["unbiased", "none"])
def test_knobs_choose_the_equation(aggregation, std_mode):
    learner = after_one_of_two(aggregation=aggregation, std_mode=std_mode, entropy=0.05, beta=0.1)
    reduce = {
        "token_mean": gp.token_mean,
        "seq_sum_const": lambda loss, mask: gp.seq_sum_const(loss, mask, 6),
        "seq_sum": gp.seq_sum,
    }[aggregation]
    bonus = []

    def loss(batch, logp, logits):
        adv = gp.grpo_advantage(batch.rewards, learner.world.group, std_mode)
        clipped = gp.clip_loss(gp.token_ratio(logp, batch.old_logp, batch.mask), adv, 0.2, 0.2)
        bonus.append(0.05 * gp.token_mean(gp.entropy(logits), batch.mask))
        return clipped + 0.1 * gp.k3(logp, batch.ref_logp, batch.mask)

    expected = by_hand(learner, loss, lambda value, mask: reduce(value, mask) - bonus[0])
    learner.update()
    close(weights(learner), expected, 1e-6)


def test_entropy_bonus_and_kl_push_the_right_way():
    moved = {}
    for name, settings in {"plain": {}, "entropy": {"entropy": 1.0}, "kl": {"beta": 10.0}}.items():
        learner = GRPO(**SMALL, reuse=1, learning_rate=1e-3, **settings)
        for _ in range(12):
            learner.update()
        moved[name] = learner.evaluate()
    assert float(moved["entropy"]["mean_entropy"]) > float(moved["plain"]["mean_entropy"])
    assert float(moved["kl"]["mean_kl"]) < 0.8 * float(moved["plain"]["mean_kl"])


def test_the_update_raises_what_did_better():
    learner = GRPO(**{**SMALL, "prompts": 16}, reuse=1)
    gains = []
    for _ in range(5):
        learner.update()
        batch = learner.batch
        logp = token_log_probs(batch.logits(learner.policy), batch.ids).detach()
        adv = gp.grpo_advantage(batch.rewards, learner.world.group)
        gains.append(float((adv.unsqueeze(1) * (logp - learner.before) * batch.mask).sum()))
    assert sum(gains) > 0


def test_a_batch_is_sampled_every_few_updates():
    learner = GRPO(**SMALL, reuse=3)
    seen = []
    for _ in range(7):
        learner.update()
        seen.append(tuple(prompts_of(learner)))
    assert seen[0] == seen[1] == seen[2] != seen[3]
    assert seen[3] == seen[4] == seen[5] != seen[6]


def test_a_new_temperature_acts_at_once():
    run = Run(GRPO(**SMALL, reuse=16), autosave=0)
    run.advance(2)
    first = prompts_of(run.learner)
    run.tune(temperature=0.5)
    run.advance(1)
    assert prompts_of(run.learner) != first
    assert run.learner.batch.temperature == 0.5


def test_sampler_and_trainer_agree():
    learner = GRPO(**SMALL, reuse=2, temperature=0.7)
    metrics = learner.update()
    batch = learner.batch
    sampler = GRPO(**SMALL, reuse=2, temperature=0.7).policy  # as it was
    with torch.no_grad():
        scored = token_log_probs(batch.logits(sampler), batch.ids)
    close(batch.old_logp * batch.mask, scored * batch.mask, 1e-5)  # of the policy that sampled, at its temperature
    assert float(metrics["clipped"]) == 0
    fresh = GRPO(**SMALL, temperature=0.7)  # the policy is the base model still
    close(fresh.before * fresh.batch.mask, fresh.batch.ref_logp * fresh.batch.mask, 1e-5)
    assert float(fresh.update()["kl"]) < 1e-6


def test_unfinished_answers_earn_nothing_and_equal_groups_teach_nothing():
    learner = GRPO(**SMALL, t_max=1)
    before = weights(learner)
    metrics = learner.update()
    assert float(learner.batch.rewards.sum()) == 0
    assert float(metrics["groups_that_differ"]) == 0
    assert torch.equal(weights(learner), before)


def test_rewards_are_what_the_verifier_says():
    learner = GRPO(**{**SMALL, "prompts": 16, "group_size": 8})
    texts = decode_batch(learner.batch.ids, learner.batch.mask)
    ended = (learner.batch.ids == EOS).any(dim=1)
    for prompt, text, end, reward in zip(prompts_of(learner), texts, ended, learner.batch.rewards, strict=True):
        first, second = prompt.removeprefix("<bos>").rstrip("=").split("+")
        assert float(reward) == float(bool(end) and text == str(int(first) + int(second)))
    assert 0.1 < float(learner.batch.rewards.mean()) < 0.9
    assert learner.world.group.tolist() == [i // 8 for i in range(128)]


def test_a_group_shares_its_prompt():
    prompts = prompts_of(GRPO(**SMALL))
    assert all(len(set(prompts[i : i + 4])) == 1 for i in range(0, 24, 4))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda problems, texts, finished: [math.nan] * len(texts), "nan at row 0"),
        (lambda problems, texts, finished: [1.0], r"shape \[1\]; allowed: \[24\]"),
        (lambda problems, texts, finished: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_broken_reward_stops_the_step(broken, words, monkeypatch):
    learner = GRPO(**SMALL)
    before = weights(learner)
    monkeypatch.setattr(learner.world.task, "reward", broken)
    with pytest.raises(RewardError, match=words):
        learner.update()
    assert learner.step == 0 and torch.equal(weights(learner), before)


def test_structure_is_checked():
    with pytest.raises(KnobError, match="group_size.*greater than or equal to 2, got 1"):
        GRPO(device="cpu", group_size=1)
    with pytest.raises(KnobError, match="checkpoint.*'add-S', 'add-mix-S' or 'add-L'.*got 'add-XL'"):
        GRPO(device="cpu", checkpoint="add-XL")
    options = {"prompts": 1, "group_size": 2, "t_max": 6, "seed": 0, "device": torch.device("cpu")}
    rng = Generators(0, torch.device("cpu"))
    with pytest.raises(KnobError, match="held_out must be 3 or more.*got 2"):
        VerifiedSums("add-mix-S", held_out=2, rng=rng, **options)
    with pytest.raises(UnknownNameError, match="did you mean add-S"):
        VerifiedSums("ad-S", held_out=3, rng=rng, **options)
    with pytest.raises(KnobError, match="beta must be a number from 0 to 10, got -1"):
        GRPO(device="cpu", beta=-1)


# ---- judging -------------------------------------------------------------------------------------------------


def test_the_base_model_gains_nothing():
    learner = GRPO(**SMALL)
    figures = learner.evaluate()
    for name in ("accuracy", "accuracy_on_hard", "pass_at_8", "mean_entropy"):
        assert float(figures[f"gain_in_{name}"]) == 0
    assert abs(float(figures["mean_kl"])) < 1e-6
    assert float(figures["pass_at_8"]) >= float(figures["accuracy"])


def test_hard_prompts_are_those_that_the_base_model_fails():
    learner = GRPO(**{**SMALL, "held_out": 30})
    right = learner.world.attempt(learner.world.base)[-1]
    assert right.shape == (30, 8) and set(right.flatten().tolist()) == {0.0, 1.0}
    hard = [row for row in right.tolist() if sum(row) <= 2]
    assert 0 < len(hard) < 30 and learner.world.hard.sum() == len(hard)
    close(learner.evaluate()["accuracy_on_hard"], np.mean(hard), 1e-6)


def test_held_out_prompts_are_not_trained_on():
    learner = GRPO(**{**SMALL, "held_out": 60})
    held_out = {p.prompt for p in learner.world.test}
    for _ in range(20):
        learner.update()
        assert not held_out & {p.removeprefix("<bos>") for p in prompts_of(learner)}


def test_the_mixture_is_judged_by_digits():
    learner = GRPO(**SMALL, checkpoint="add-mix-S")
    assert [p.level for p in learner.world.test] == [1, 1, 2, 2, 3, 3]
    learner.update()
    assert len({len(p) for p in prompts_of(learner)}) > 1  # of unequal length
    figures = learner.evaluate()
    by_digits = [float(figures[f"accuracy_{n}_digits"]) for n in (1, 2, 3)]
    close(figures["accuracy"], sum(by_digits) / 3, 1e-6)


# ---- pictures ------------------------------------------------------------------------------------------------


def test_token_picture_leaves_the_prompt_and_the_padding_out():
    ids = torch.tensor([[*encode("12"), EOS], [*encode("9"), EOS, 0]])
    view = token_picture(
        "t", "a", ["7+5=", "4+5="], ids, ids.ne(0).float(), torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 9]]), in_a_line=2
    )
    assert ["".join(line) for line in view.lines] == ["7+5=12⏎  4+5=9⏎  "]
    assert view.values[0].tolist() == pytest.approx([0, 0, 0, 0, 0.1, 0.2, 0.3, 0, 0, 0, 0, 0, 0.4, 0.5, 0])


def test_sampled_answers_are_coloured_by_the_verifier():
    view = GRPO(**SMALL).views()["answers"]
    seen = set()
    for line, values in zip(view.lines, view.values, strict=True):
        for text, colours in split(line, values):
            prompt, _, answer = text.partition("=")
            right = answer.endswith("⏎") and answer[:-1] == str(sum(map(int, prompt.split("+"))))
            assert set(colours[len(prompt) + 1 :]) == {1.0 if right else -1.0}
            assert set(colours[: len(prompt) + 1]) == {0.0}
            seen.add(right)
    assert seen == {True, False}


def split(line, values):
    """Yield the texts of a line, and their colours, between the gaps."""
    text, colours = "", []
    for token, value in zip(line, values, strict=True):
        if token.startswith("  "):
            yield text, colours
            text, colours = "", []
        else:
            text, colours = text + token, [*colours, float(value)]


def test_pictures_show_the_update_and_the_groups():
    learner = GRPO(**SMALL, learning_rate=2e-3)
    assert all(float(np.abs(row).max()) < 1e-4 for row in learner.views()["update"].values)  # nothing was pushed yet
    learner.update()
    views = learner.views()
    assert any(float(np.abs(row).max()) > 1e-3 for row in views["update"].values)
    advantages = np.asarray(views["groups"].values)
    assert advantages.shape == (6, 4)
    expected = gp.grpo_advantage(learner.batch.rewards, learner.world.group).reshape(6, 4)
    close(advantages, expected.sort(dim=1, descending=True).values, 1e-6)
    kl = views["by_place"].values["KL from the base"]
    assert np.all(kl >= -1e-6) and kl.max() > 1e-5
    assert all(0 <= v <= 1 for row in views["right_answers"].values for v in row)


# ---- the claim -----------------------------------------------------------------------------------------------


def test_study_runs_and_its_criteria_find_their_figures():
    result = study.run("smoke")
    assert [verdict.name for verdict in result.verdicts] == [criterion.name for criterion in study.criteria]
