"""DDPO: the loss against written-out sums, advantages against a plain buffer, the chain, the learner."""

from __future__ import annotations

import collections
import itertools
import math

import pytest
import torch
from closeness import close, normal

from polrl import Run
from polrl.core.conformance import ALL_CHECKS, Case
from polrl.core.errors import KnobError, StructureError
from polrl.diffusion._chain import DigitWorld, RingWorld, roll_out, shuffle_pairs
from polrl.diffusion.ddpo import (
    DDPO,
    append_rewards,
    clipped_loss,
    dpok_loss,
    importance_objective,
    noise_penalty,
    prompt_advantages,
    step_divergence,
    study,
)
from polrl.models.diffusion import DenoisingChain, RingDenoiser, cosine_schedule, step_log_probability

SMALL = {"samples": 8, "steps": 4, "minibatch": 16, "measured": 16}


# ---- E2 ----------------------------------------------------------------------------------------------------------


def test_e2_sums_over_steps_and_averages_over_samples():
    new, old, reward = normal(3, 4, seed=1), normal(3, 4, seed=2), normal(3, seed=3)
    expected = sum(math.exp(float(new[i, k] - old[i, k])) * float(reward[i]) for i in range(3) for k in range(4)) / 3
    close(importance_objective(new, old, reward), expected)


def test_e2_is_the_score_function_where_nothing_has_changed():
    new, reward = normal(3, 4, seed=1).requires_grad_(), normal(3, seed=3).requires_grad_()
    (gradient,) = torch.autograd.grad(importance_objective(new, new, reward), new)
    (expected,) = torch.autograd.grad((reward.detach().unsqueeze(1) * new).sum(1).mean(), new)
    close(gradient, expected)


def test_e2_is_unbiased_on_a_chain_of_two_gaussian_steps():
    # x1 ~ N(a, 1), x2 ~ N(x1 + a, 1), reward x2: J = 2 a, so dJ/da = 2.
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    noise = normal(200_000, 2)
    x1 = noise[:, :1] + 0.3
    x2 = x1 + 0.3 + noise[:, 1:]
    log_p = torch.stack([step_log_probability(x1, a.expand_as(x1), 1.0), step_log_probability(x2, x1 + a, 1.0)], dim=1)
    (gradient,) = torch.autograd.grad(importance_objective(log_p, log_p, x2[:, 0]), a)
    assert float(gradient) == pytest.approx(2, abs=0.03)


# ---- E6 ----------------------------------------------------------------------------------------------------------


def test_e6_by_hand():
    new, old, advantage = 0.3 * normal(40, seed=1), 0.3 * normal(40, seed=2), 4 * normal(40, seed=3)
    total = 0.0
    for i in range(40):
        ratio, credit = math.exp(float(new[i] - old[i])), max(-5.0, min(5.0, float(advantage[i])))
        credit *= 0.7 if credit > 0 else 1.9
        total += max(-credit * ratio, -credit * max(0.8, min(1.2, ratio)))
    close(clipped_loss(new, old, advantage, 0.2, 5.0, 0.7, 1.9), total / 40)
    close(clipped_loss(new, old, advantage, 0.2), clipped_loss(new, old, advantage, 0.2, 5.0, 1.0, 1.0))


def test_e6_at_the_old_policy_is_the_policy_gradient_whatever_the_clip():
    new, advantage = normal(5, seed=1).requires_grad_(), normal(5, seed=3)
    for clip in (1e-4, 0.1, 1.0):
        (gradient,) = torch.autograd.grad(clipped_loss(new, new.detach(), advantage, clip), new)
        close(gradient, -advantage / 5)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "flat"),
    [
        (1.0, 0.3, True),
        (1.0, -0.3, False),
        (-1.0, -0.3, True),
        (-1.0, 0.3, False),
        (1.0, 0.05, False),
        (-1.0, 0.05, False),
    ],
)
def test_e6_clips_only_the_side_that_has_gone_too_far(advantage, log_ratio, flat):
    new = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    loss = clipped_loss(new, torch.zeros(1).double(), torch.tensor([advantage]).double(), 0.1)
    (gradient,) = torch.autograd.grad(loss, new)
    assert (float(gradient) == 0) is flat


def test_e6_bounds_advantages_and_leaves_them_and_the_old_policy_constant():
    new, old, advantage = (normal(3, seed=s).requires_grad_() for s in (1, 2, 3))
    gradients = torch.autograd.grad(
        clipped_loss(new, old, 20 * advantage, 0.2, 2.0), (old, advantage), allow_unused=True
    )
    assert gradients == (None, None)
    close(
        clipped_loss(new, old, torch.full((3,), 50.0).double(), 9.0, 2.0),
        clipped_loss(new, old, torch.full((3,), 2.0).double(), 9.0, 2.0),
    )


def test_e6d_by_hand():
    new, old, advantage = 0.3 * normal(40, seed=1), 0.3 * normal(40, seed=2), 4 * normal(40, seed=3)
    total = sum(
        -100 * a * max(0.8, min(1.2, math.exp(n - o)))
        for n, o, a in zip(new.tolist(), old.tolist(), advantage.tolist(), strict=True)
    )
    close(dpok_loss(new, old, advantage, 0.2), total / 40)
    close(dpok_loss(new, old, advantage, 0.2, reward_weight=3.0), 0.03 * total / 40)
    close(dpok_loss(new, old, advantage), dpok_loss(new, old, advantage, 1e-4, 100.0))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize(("log_ratio", "flat"), [(0.3, True), (-0.3, True), (0.05, False), (-0.05, False)])
def test_e6d_clips_both_sides_whatever_the_advantage(advantage, log_ratio, flat):
    new = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    old, credit = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (0.0, advantage))
    found = torch.autograd.grad(dpok_loss(new, old, credit, 0.1, 7.0), (new, old, credit), allow_unused=True)
    assert found[1:] == (None, None)
    close(found[0], [0.0 if flat else -7 * advantage * math.exp(log_ratio)])


# ---- advantages and penalty --------------------------------------------------------------------------------------


def test_advantages_are_those_of_a_plain_buffer():
    """A deque for each prompt, filled before its statistics are taken."""
    size, least = 5, 4
    buffers = collections.defaultdict(lambda: collections.deque(maxlen=size))
    kept, kept_prompts = torch.zeros(0).double(), torch.zeros(0).long()
    for stage in range(4):
        reward = normal(9, seed=stage)
        prompts = torch.randint(3, (9,), generator=torch.Generator().manual_seed(stage))
        kept, kept_prompts = append_rewards(kept, kept_prompts, reward, prompts, size)
        found = prompt_advantages(reward, prompts, kept, kept_prompts, least)
        for r, p in zip(reward.tolist(), prompts.tolist(), strict=True):
            buffers[p].append(r)
        for i, p in enumerate(prompts.tolist()):
            values = torch.tensor(list(buffers[p]) if len(buffers[p]) >= least else reward.tolist()).double()
            expected = (reward[i] - values.mean()) / (values.std(correction=0) + 1e-6)
            close(found[i], expected, 1e-6)
        for p, buffer in buffers.items():
            close(kept[kept_prompts == p], list(buffer))


def test_equal_rewards_have_no_advantage():
    kept, prompts = append_rewards(torch.zeros(0), torch.zeros(0).long(), torch.ones(6), torch.zeros(6).long(), 16)
    close(prompt_advantages(torch.ones(6), torch.zeros(6).long(), kept, prompts, 4), torch.zeros(6))


def test_penalty_is_zero_with_zero_gradient_at_the_pretrained_network():
    noise, pretrained = normal(4, 3).requires_grad_(), normal(4, 3).requires_grad_()
    penalty = noise_penalty(noise, pretrained, 0.7)
    by_noise, by_pretrained = torch.autograd.grad(penalty, (noise, pretrained), allow_unused=True)
    assert float(penalty.detach()) == 0 and not by_noise.any() and by_pretrained is None
    close(noise_penalty(noise, noise - 2, 0.7), 0.7 * 4)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_divergence_is_that_of_two_gaussians(eta):
    chain = DenoisingChain(cosine_schedule(), 10, eta=eta, floor=0.02, dtype=torch.float64)
    x, noise, pretrained = (normal(10, 3, seed=s) for s in (1, 2, 3))
    i = torch.arange(10)
    own, before = chain.step(x, noise, i), chain.step(x, pretrained, i)
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Normal(step.mean, step.std.expand_as(step.mean)) for step in (own, before))
    ).sum(1)
    close(step_divergence(noise, pretrained, chain.noise_weight, chain.std), expected, 1e-9)


# ---- the chain ---------------------------------------------------------------------------------------------------


def ring_chain(**options) -> DenoisingChain:
    return DenoisingChain(cosine_schedule(), 6, **{"eta": 1.0, "floor": 0.02, **options})


def test_roll_out_records_what_it_did():
    chain, y = ring_chain(), torch.tensor([0, 3, 5])
    stage = roll_out(RingDenoiser(), chain, y, torch.Generator().manual_seed(1))
    assert stage.before.shape == stage.after.shape == (3, 6, 2) and stage.first == 0
    assert torch.equal(stage.before[:, 1:], stage.after[:, :-1]) and torch.equal(stage.after[:, -1], stage.final)
    assert stage.evaluations == 18
    for i in range(6):
        step = chain.step(stage.before[:, i], chain.predict(RingDenoiser(), stage.before[:, i], i, y), i)
        close(stage.log_probability[:, i], chain.log_probability(stage.after[:, i], step), 1e-5)
        assert bool(((stage.after[:, i] - step.mean).abs() < 6 * step.std).all())


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_branches_share_their_prefix_and_part_afterwards(eta):
    chain, y = ring_chain(eta=eta), torch.tensor([0, 3, 5])
    stage = roll_out(RingDenoiser(), chain, y, torch.Generator().manual_seed(1), suffix=2, branches=4)
    before = stage.before.reshape(3, 4, 2, 2)
    assert stage.first == 4 and stage.classes.tolist() == [0] * 4 + [3] * 4 + [5] * 4
    assert stage.evaluations == 4 * 3 + 2 * 12
    for prefix in before:
        assert all(torch.equal(prefix[0, 0], branch[0]) for branch in prefix), "the same state, bit for bit"
        assert len({tuple(branch[1].tolist()) for branch in prefix}) == 4


def test_without_noise_branches_would_coincide():
    chain, y = ring_chain(eta=0.0, floor=0.0), torch.tensor([0])
    x = torch.zeros(2, 2) + 0.3
    for i in range(6):
        x = chain.step(x, chain.predict(RingDenoiser(), x, i, y.expand(2)), i).mean
    assert torch.equal(x[0], x[1])
    with pytest.raises(ValueError, match="eta is 0"):
        roll_out(RingDenoiser(), chain, y, torch.Generator().manual_seed(1))


def test_every_pair_comes_once_an_epoch():
    chosen = torch.tensor([1, 4, 7])
    batches = shuffle_pairs(chosen, 5, 4, torch.Generator().manual_seed(0))
    assert [len(sample) for sample, _ in batches] == [4, 4, 4, 3]
    pairs = [(int(s), int(j)) for sample, step in batches for s, j in zip(sample, step, strict=True)]
    assert sorted(pairs) == sorted(itertools.product([1, 4, 7], range(5)))
    orders = {tuple(j for s, j in pairs if s == sample) for sample in (1, 4, 7)}
    assert len(orders) == 3, "each sample has an order of its own"
    assert shuffle_pairs(chosen[:0], 5, 4, torch.Generator()) == []


# ---- the worlds --------------------------------------------------------------------------------------------------


def test_ring_rewards_the_disc_around_the_wanted_centre():
    world = RingWorld("class", 0.6, torch.device("cpu"))
    x = world.centres[[0, 0, 0]] + torch.tensor([[0.59, 0.0], [0.0, 0.61], [-4.0, 0.0]])
    close(world.reward(x, torch.tensor([0, 0, 0])), [1.0, 0.0, 0.0])
    close(world.reward(x, torch.tensor([4, 4, 4])), [0.0, 0.0, 1.0])
    assert world.on_data(x).tolist() == [True, False, True]
    close(
        RingWorld("hackable", 0.6, torch.device("cpu")).reward(x, torch.zeros(3).long()),
        x @ torch.full((2,), 0.5**0.5),
        1e-6,
    )


def test_digits_are_judged_by_the_classifier():
    from polrl.models.diffusion_quality import load_digits_8

    digits, world = load_digits_8(), DigitWorld("class", torch.device("cpu"))
    assert float(world.reward(digits.held_out, digits.held_out_labels).mean()) > 0.95
    assert float(world.on_data(digits.held_out).float().mean()) > 0.85
    assert not world.on_data(torch.zeros(1, 64)).any()
    ink = DigitWorld("hackable", torch.device("cpu")).reward(digits.held_out, digits.held_out_labels)
    close(ink, digits.held_out.mean(1), 1e-6)


# ---- the learner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", ALL_CHECKS, ids=lambda check: check.__name__)
def test_digits_keep_the_contract(check):
    check(Case(DDPO, {**SMALL, "kl_weight": 0.1, "world": "digits", "reward": "hackable"}, steps=3))


def test_ratios_begin_at_one():
    learner = DDPO(**{**SMALL, "minibatch": 100}, device="cpu", learning_rate=1e-5, epochs=1)
    assert float(learner.update()["clipped"]) == 0
    chain = learner.chain()
    stage = roll_out(learner.denoiser, chain, learner.draw_classes(8), learner.rng.torch)
    for i in range(4):
        x = stage.before[:, i]
        steps = torch.full((8,), i)
        step = chain.step(x, chain.predict(learner.denoiser, x, steps, stage.classes), steps)
        close(chain.log_probability(stage.after[:, i], step).detach(), stage.log_probability[:, i], 1e-4)


def test_evaluations_are_counted():
    for kl_weight, expected in ((0.0, 32 + 2 * 32 * 3), (0.1, 32 + 2 * 32 * 4)):
        learner = DDPO(**SMALL, device="cpu", kl_weight=kl_weight)
        learner.update()
        assert learner.evaluations == expected


def test_target_is_noted_at_the_middle_of_three_stages():
    learner = DDPO(**SMALL, device="cpu", target=0.5)
    told = iter([(0.2, 1.0), (0.6, 0.9), (0.8, 0.8), (0.3, 0.1)])
    learner.judge = lambda count: dict(zip(("alignment", "diversity"), map(torch.tensor, next(told)), strict=True))
    found = []
    for spent in (100, 200, 300, 400):
        learner.evaluations = spent
        learner.follow()
        found.append([float(learner.reached), *learner.at_target[1:].tolist()])
    assert [row[0] for row in found] == [0, 0, 1, 1]
    close([row[1] for row in found], [1.0, 0.9, 0.9, 0.9], 1e-5)
    close([row[2] for row in found], [100.0, 200.0, 200.0, 200.0], 1e-5)
    del learner.judge
    judged = learner.evaluate()
    close([math.exp(judged["log_evaluations_to_target"]), judged["diversity_at_target"]], [200.0, 0.9], 1e-5)


def test_reward_rises():
    learner = DDPO(device="cpu", seed=1, learning_rate=1e-3)
    before = float(learner.evaluate()["alignment"])
    for _ in range(6):
        learner.update()
    assert before < 0.65 < 0.72 < float(learner.evaluate()["alignment"])


def test_penalty_holds_the_sampler():
    kls = []
    for kl_weight in (0.0, 10.0):
        learner = DDPO(device="cpu", reward="hackable", samples=32, kl_weight=kl_weight)
        for _ in range(4):
            learner.update()
        kls.append(float(learner.evaluate()["kl"]))
    assert kls[1] < 0.5 * kls[0]


def test_views_of_both_worlds():
    for world, views in (("ring", 4), ("digits", 4)):
        learner = DDPO(**SMALL, world=world, device="cpu")
        pictures = learner.views()
        assert len(pictures) == views and all(picture.alt for picture in pictures.values())
        kl = pictures["kl_by_step"].y["KL from the pretrained step"]
        assert not kl.any(), "nothing has moved yet"
        assert not torch.isnan(torch.tensor(pictures["decided"].y["trained steps"])).any(), "all steps are trained"
        again = learner.views()["path"].images
        assert (again == pictures["path"].images).all(), "the noise is fixed"


def test_bad_settings_are_refused():
    with pytest.raises(KnobError, match=r"kl_weight.*0 to 10.*11"):
        DDPO(kl_weight=11.0)
    with pytest.raises(KnobError, match="'square'"):
        DDPO(world="square")
    run = Run(DDPO(**SMALL, device="cpu"), autosave=0)
    run.advance(1)
    with pytest.raises(StructureError, match="samples"):
        run.tune(samples=16)


def test_study_runs():
    result = study.run("smoke")
    assert {v.name for v in result.verdicts} == {c.name for c in study.criteria}
