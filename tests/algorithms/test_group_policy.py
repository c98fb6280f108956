"""Group policy basics: B1 to B22 against values computed by loops, the card's identities, the KL gradients."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from polrl import equations
from polrl.core.errors import UnknownNameError
from polrl.language import _group_policy
from polrl.language._group_policy import (
    aggregate,
    cispo_loss,
    clip_higher_loss,
    clip_loss,
    dapo_loss,
    dr_grpo_loss,
    dual_clip_loss,
    entropy,
    group_mean_advantage,
    groups_of,
    grpo_advantage,
    grpo_loss,
    gspo_loss,
    importance_loss,
    informative,
    k1,
    k2,
    k3,
    log_ratio,
    on_tokens,
    reinforce_advantage,
    reinforce_loss,
    rloo_advantage,
    seq_mean,
    seq_sum,
    seq_sum_const,
    sequence_ratio,
    token_mean,
    token_ratio,
    trajectory_ratio,
)

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")

NAN = math.nan
MODES = ("seq_mean", "token_mean", "seq_sum_const", "seq_sum")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def close(found, expected, tolerance=1e-10):
    found, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def rows(lengths, width: int) -> torch.Tensor:
    """Return a mask with rows of the given lengths."""
    return (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).double()


def batch(seed: int = 0, lengths=(1, 4, 2, 3, 4, 2), width: int = 4):
    """Return log-probabilities (with a gradient), older ones, advantages and the mask of six completions."""
    logp = (-normal(len(lengths), width, seed=seed).abs()).requires_grad_()
    old = logp.detach() + 0.4 * normal(len(lengths), width, seed=seed + 1)
    return logp, old, normal(len(lengths), seed=seed + 2), rows(lengths, width)


def slope(loss: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(loss, by, retain_graph=True)
    return gradient


# ---- B1 to B4: advantages ------------------------------------------------------------------------------------

REWARDS, GROUP = vector(1.0, 0.0, 0.5, 3.0, 1.0, 2.0, 0.0), torch.tensor([4, 0, 4, 0, 4, 0, 0])


def by_loop(rule):
    """Apply a rule (own reward, the group's rewards) to each row."""
    groups = [[float(r) for r, h in zip(REWARDS, GROUP, strict=True) if h == g] for g in GROUP]
    return vector(*[rule(float(r), members) for r, members in zip(REWARDS, groups, strict=True)])


def test_b1_subtracts_a_baseline():
    close(reinforce_advantage(REWARDS, 0.5), [0.5, -0.5, 0.0, 2.5, 0.5, 1.5, -0.5])
    each = normal(7, seed=1)
    close(reinforce_advantage(REWARDS, each), [float(r - b) for r, b in zip(REWARDS, each, strict=True)])


def test_b2_subtracts_the_mean_of_the_group_in_any_order():
    close(group_mean_advantage(REWARDS, GROUP), by_loop(lambda r, m: r - statistics.fmean(m)))


def test_b3_leaves_the_own_reward_out():
    close(
        rloo_advantage(REWARDS, GROUP),
        by_loop(lambda r, m: r - (math.fsum(m) - r) / (len(m) - 1)),
    )


@pytest.mark.parametrize("eps", [1e-6, 1e-2, 0.0])
@pytest.mark.parametrize(("mode", "spread"), [("population", statistics.pstdev), ("unbiased", statistics.stdev)])
def test_b4_divides_by_the_spread(eps, mode, spread):
    expected = by_loop(lambda r, m: (r - statistics.fmean(m)) / (spread(m) + eps))
    close(grpo_advantage(REWARDS, GROUP, mode, eps), expected)
    assert torch.equal(grpo_advantage(REWARDS, GROUP, "none", eps), group_mean_advantage(REWARDS, GROUP))


def test_b4_takes_the_population_and_a_millionth_by_default():
    assert torch.equal(grpo_advantage(REWARDS, GROUP), grpo_advantage(REWARDS, GROUP, "population", 1e-6))


@pytest.mark.parametrize("advantage", [group_mean_advantage, rloo_advantage, grpo_advantage])
def test_advantages_are_constants(advantage):
    assert not advantage(REWARDS.clone().requires_grad_(), GROUP).requires_grad
    assert not reinforce_advantage(REWARDS.clone().requires_grad_(), 0.0).requires_grad


@pytest.mark.parametrize("mode", ["population", "unbiased", "none"])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_equal_rewards_give_exactly_zero(mode, eps):
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7])  # means that round in float32
    group = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1])
    for found in (grpo_advantage(rewards, group, mode, eps), rloo_advantage(rewards, group)):
        assert torch.equal(found, torch.zeros(9)) and not found.signbit().any()


def test_a_group_of_one_keeps_its_reward():
    rewards, group = vector(1.0, 0.0, 0.7), torch.tensor([0, 0, 1])
    assert float(group_mean_advantage(rewards, group)[2]) == 0.7
    assert float(rloo_advantage(rewards, group)[2]) == 0.7
    for mode in ("population", "unbiased"):
        close(grpo_advantage(rewards, group, mode, 0.5)[2], 0.7 / 1.5)
    assert informative(rewards, group).tolist() == [True, True, True]


def test_informative_marks_the_groups_that_differ():
    assert informative(vector(1, 1, 0, 0, 0, 1), groups_of(3, 2)).tolist() == [False] * 4 + [True] * 2
    assert groups_of(3, 2).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_float_dtype_stays(dtype):
    assert grpo_advantage(REWARDS.to(dtype), GROUP).dtype == dtype
    logp, old, adv, mask = (x.detach().to(dtype) for x in batch())
    for mode in MODES:
        assert aggregate(clip_loss(token_ratio(logp, old, mask), adv), mask, mode, 4).dtype == dtype


def test_bad_rewards_and_groups_are_named():
    with pytest.raises(ValueError, match=r"\[7\].*\[6\]"):
        group_mean_advantage(REWARDS, GROUP[:6])
    with pytest.raises(ValueError, match="whole numbers.*float64"):
        group_mean_advantage(REWARDS, REWARDS)
    with pytest.raises(ValueError, match="floating point.*int64"):
        group_mean_advantage(GROUP, GROUP)
    with pytest.raises(ValueError, match="at least one"):
        group_mean_advantage(REWARDS[:0], GROUP[:0])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"finite, got {bad} in row 1"):
            rloo_advantage(vector(0.0, bad, 1.0), torch.tensor([0, 1, 0]))
    with pytest.raises(UnknownNameError, match="did you mean population"):
        grpo_advantage(REWARDS, GROUP, "populaton")
    with pytest.raises(ValueError, match="eps must be 0 or above, got -1"):
        grpo_advantage(REWARDS, GROUP, eps=-1)
    with pytest.raises(ValueError, match=r"baseline.*\[7\].*\[3\]"):
        reinforce_advantage(REWARDS, torch.zeros(3))


# ---- B5 to B12: token losses and ratios ----------------------------------------------------------------------


def test_b5_is_minus_advantage_times_log_probability():
    logp, _, adv, _ = batch()
    loss = reinforce_loss(logp, adv)
    for i, t in itertools.product(range(6), range(4)):
        close(loss[i, t], -float(adv[i]) * float(logp[i, t]))
    close(slope(loss.sum(), logp), -adv.unsqueeze(1).expand(6, 4))


def test_b6_weighs_by_the_ratio():
    logp, old, adv, mask = batch()
    ratio = token_ratio(logp, old, mask)
    loss = importance_loss(ratio, adv)
    for i, t in itertools.product(range(6), range(4)):
        expected = math.exp(float(logp[i, t]) - float(old[i, t])) if mask[i, t] else 1.0
        close(ratio[i, t], expected)
        close(loss[i, t], -float(adv[i]) * expected)
    close(slope(loss.sum(), logp), (-adv.unsqueeze(1) * ratio * mask))


RATIOS = [0.5, 0.79, 0.81, 1.0, 1.1, 1.21, 1.29, 4.0]
CLIPPED = [
    (0.2, 0.2, 1.0, {1.21, 1.29, 4.0}),
    (0.2, 0.2, -2.0, {0.5, 0.79}),
    (0.2, 0.28, 1.0, {1.29, 4.0}),
    (0.4, 0.05, 3.0, {1.1, 1.21, 1.29, 4.0}),
    (0.4, 0.05, -1.0, {0.5}),
]


@pytest.mark.parametrize(("eps_low", "eps_high", "advantage", "still"), CLIPPED)
def test_b7_stops_on_one_side_only(eps_low, eps_high, advantage, still):
    for value in RATIOS:
        logp = vector(math.log(value)).reshape(1, 1).requires_grad_()
        loss = clip_loss(token_ratio(logp, torch.zeros(1, 1), torch.ones(1, 1)), vector(advantage), eps_low, eps_high)
        limited = min(max(value, 1 - eps_low), 1 + eps_high)
        close(loss, [[max(-value * advantage, -limited * advantage)]])
        close(slope(loss.sum(), logp), [[0.0 if value in still else -advantage * value]])


def test_b8_bounds_what_has_exploded():
    logp = vector(*map(math.log, (0.5, 1.0, 2.9, 3.1, 9.0))).reshape(1, 5).requires_grad_()
    ratio = token_ratio(logp, torch.zeros(1, 5), torch.ones(1, 5))
    bad = dual_clip_loss(ratio, vector(-2.0))
    close(bad, [[1.6, 2.0, 5.8, 6.0, 6.0]])
    close(slope(bad.sum(), logp), [[0.0, 2.0, 5.8, 0.0, 0.0]])
    close(dual_clip_loss(ratio, vector(-2.0), c=10.0), [[1.6, 2.0, 5.8, 6.2, 18.0]])
    close(dual_clip_loss(ratio, vector(2.0), 0.1, 0.3), clip_loss(ratio, vector(2.0), 0.1, 0.3))
    close(dual_clip_loss(ratio, vector(-2.0), 0.6, 0.3)[0, 0], 1.0)
    close(dual_clip_loss(ratio, vector(0.0)), torch.zeros(1, 5))


def test_b9_is_b7_with_more_room_above():
    ratio = vector(*RATIOS).unsqueeze(0)
    for advantage in (1.0, -1.0):
        close(clip_higher_loss(ratio, vector(advantage)), clip_loss(ratio, vector(advantage), 0.2, 0.28))
    close(clip_higher_loss(ratio, vector(1.0)), [[-min(r, 1.28) for r in RATIOS]])


def test_b10_keeps_the_gradient_of_what_it_clips():
    logp, old, adv, mask = batch()
    ratio = token_ratio(logp, old, mask)
    loss = cispo_loss(logp, ratio, adv, eps_max=1.1)
    weight = ratio.detach().clamp(max=1.1)
    assert bool((ratio > 1.1).any()) and bool((ratio < 0.9).any())
    close(loss, -weight * adv.unsqueeze(1) * logp)
    close(slope(loss.sum(), logp), -weight * adv.unsqueeze(1))


def test_b11_is_the_geometric_mean():
    logp, old, adv, mask = batch()
    s = sequence_ratio(logp, old, mask)
    for i, length in enumerate((1, 4, 2, 3, 4, 2)):
        ratios = [math.exp(float(logp[i, t] - old[i, t])) for t in range(length)]
        close(s[i], math.prod(ratios) ** (1 / length))
    leaf, close_old = logp, logp.detach() - 5e-5 * normal(6, 4, seed=9)
    tight = gspo_loss(leaf, close_old, adv, mask)
    near = sequence_ratio(leaf, close_old, mask)
    low, high = 1 - 3e-4, 1 + 4e-4
    close(
        tight, [max(-float(x * a), -min(max(float(x), low), high) * float(a)) for x, a in zip(near, adv, strict=True)]
    )
    lengths = mask.sum(1)
    close(slope(tight.sum(), leaf), mask * (-adv * near / lengths).unsqueeze(1))
    far = gspo_loss(logp, old, adv, mask)
    stopped = ((adv > 0) & (s > high)) | ((adv < 0) & (s < low))
    assert bool(stopped.any()) and not bool(stopped.all())
    assert torch.equal(slope(far.sum(), logp).abs().sum(1) == 0, stopped)


def test_gspo_clips_within_ten_thousandths():
    logp = vector(2.5e-4, 3.5e-4, 4.5e-4, -2.5e-4, -3.5e-4, -4.5e-4).unsqueeze(1).requires_grad_()
    loss = gspo_loss(logp, torch.zeros(6, 1).double(), vector(1, 1, 1, -1, -1, -1), torch.ones(6, 1))
    assert (slope(loss.sum(), logp)[:, 0] != 0).tolist() == [True, True, False, True, False, False]


def test_b12_is_the_product():
    logp, old, _, mask = batch()
    whole = trajectory_ratio(logp, old, mask)
    for i, length in enumerate((1, 4, 2, 3, 4, 2)):
        close(whole[i], math.prod(math.exp(float(logp[i, t] - old[i, t])) for t in range(length)))
    close(slope(whole.sum(), logp), mask * whole.unsqueeze(1))


def test_old_and_reference_log_probabilities_and_advantages_are_constants():
    logp, old, adv, mask = batch()
    old, adv = old.requires_grad_(), adv.requires_grad_()
    ratio = token_ratio(logp, old, mask)
    for loss in (
        reinforce_loss(logp, adv),
        importance_loss(ratio, adv),
        clip_loss(ratio, adv),
        dual_clip_loss(ratio, adv),
        cispo_loss(logp, ratio, adv, 2.0),
        gspo_loss(logp, old, adv, mask),
        trajectory_ratio(logp, old, mask),
        k1(logp, old, mask),
        k2(logp, old, mask),
        k3(logp, old, mask),
    ):
        by_old, by_adv = torch.autograd.grad(loss.sum(), (old, adv), allow_unused=True, retain_graph=True)
        assert by_old is None and by_adv is None


def test_advantages_may_differ_by_token():
    logp, old, adv, mask = batch()
    ratio, each = token_ratio(logp, old, mask), adv.unsqueeze(1).expand(6, 4).contiguous()
    for loss in (reinforce_loss, importance_loss, clip_loss, dual_clip_loss):
        first = logp if loss is reinforce_loss else ratio
        close(loss(first, adv), loss(first, each))
    assert float(clip_loss(ratio, each * torch.arange(4))[1, 0]) == 0


def test_bad_tokens_are_named():
    logp, old, adv, mask = batch()
    with pytest.raises(ValueError, match=r"old_logp and mask.*\[6, 3\].*\[6, 4\]"):
        token_ratio(logp, old[:, :3], mask)
    with pytest.raises(ValueError, match=r"logp and mask.*\[24\]"):
        token_ratio(logp.flatten(), old, mask)
    with pytest.raises(ValueError, match=r"values and mask.*\[6, 4\].*\[6, 3\]"):
        token_mean(logp, mask[:, :3])
    with pytest.raises(ValueError, match=r"adv.*\[6\].*\[6, 4\].*got shape \[4\]"):
        reinforce_loss(logp, torch.zeros(4))
    with pytest.raises(ValueError, match="eps_low=1.5"):
        clip_loss(old, adv, eps_low=1.5)
    with pytest.raises(ValueError, match="eps_high=-0.1"):
        clip_loss(old, adv, eps_high=-0.1)
    with pytest.raises(ValueError, match="c must be above 1.*got 1"):
        dual_clip_loss(old, adv, c=1)
    with pytest.raises(ValueError, match="eps_max must be above 0, got 0"):
        cispo_loss(logp, old, adv, eps_max=0)
    with pytest.raises(ValueError, match="t_max must be above 0, got 0"):
        seq_sum_const(logp, mask, 0)
    with pytest.raises(UnknownNameError, match="did you mean seq_mean"):
        aggregate(logp, mask, "sec_mean", 4)


# ---- B13 to B16: aggregations --------------------------------------------------------------------------------


def test_aggregations_weigh_tokens_as_the_card_says():
    loss, _, _, mask = batch()
    lengths, n, total = [1, 4, 2, 3, 4, 2], 6, 16
    weights = {
        "seq_mean": lambda i: 1 / (n * lengths[i]),
        "token_mean": lambda i: 1 / total,
        "seq_sum_const": lambda i: 1 / (n * 10),
        "seq_sum": lambda i: 1 / n,
    }
    for mode, weight in weights.items():
        scalar = aggregate(loss, mask, mode, t_max=10)
        by_hand = math.fsum(weight(i) * float(loss[i, t]) for i in range(n) for t in range(lengths[i]))
        close(scalar, by_hand)
        close(slope(scalar, loss), [[weight(i) * (t < lengths[i]) for t in range(4)] for i in range(n)])
    close(seq_mean(loss, mask), aggregate(loss, mask, "seq_mean", 10))
    close(token_mean(loss, mask), aggregate(loss, mask, "token_mean", 10))
    close(seq_sum_const(loss, mask, 10), aggregate(loss, mask, "seq_sum_const", 10))
    close(seq_sum(loss, mask), aggregate(loss, mask, "seq_sum", 10))


@pytest.mark.parametrize("mode", MODES)
def test_padding_may_hold_anything(mode):
    logp, old, adv, mask = batch()
    dirty_old, dirty = old.clone(), logp.detach().clone()
    dirty[mask == 0], dirty_old[mask == 0] = NAN, math.inf
    dirty.requires_grad_()

    def losses(logp, old):
        ratio = token_ratio(logp, old, mask)
        token = (
            clip_loss(ratio, adv),
            importance_loss(ratio, adv),
            reinforce_loss(logp, adv),
            cispo_loss(logp, ratio, adv, 2.0),
            k1(logp, old, mask),
            k2(logp, old, mask),
            k3(logp, old, mask),
        )
        whole = (trajectory_ratio(logp, old, mask), gspo_loss(logp, old, adv, mask))
        return [aggregate(x, mask, mode, 4) for x in token] + [x.mean() for x in whole]

    for clean, found in zip(losses(logp, old), losses(dirty, dirty_old), strict=True):
        close(found, clean)
        (gradient,) = torch.autograd.grad(found, dirty, retain_graph=True)
        (expected,) = torch.autograd.grad(clean, logp, retain_graph=True)
        close(gradient, expected)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_row_adds_nothing_and_an_empty_batch_is_zero(mode):
    loss, old, adv, _ = batch()
    mask = rows((0, 4, 2, 3, 4, 2), 4)
    assert bool(aggregate(loss, mask, mode, 4).isfinite())
    close(slope(aggregate(loss, mask, mode, 4), loss)[0], torch.zeros(4))
    nothing = torch.zeros(6, 4, dtype=torch.float64)
    empty = aggregate(clip_loss(token_ratio(loss, old, nothing), adv), nothing, mode, 4)
    assert float(empty) == 0
    close(slope(empty, loss), nothing)
    close(sequence_ratio(loss, old, nothing), torch.ones(6))


def test_a_boolean_mask_is_a_mask():
    logp, old, adv, mask = batch()
    for mode in MODES:
        found = aggregate(clip_loss(token_ratio(logp, old, mask > 0), adv), mask > 0, mode, 4)
        close(found, aggregate(clip_loss(token_ratio(logp, old, mask), adv), mask, mode, 4))
    close(on_tokens(logp, mask > 0), logp * mask)
    close(log_ratio(logp, old, mask), (logp - old) * mask)


# ---- B17 to B19: recipes -------------------------------------------------------------------------------------


def token_clip(logp, old, adv, low, high):
    ratio = math.exp(float(logp) - float(old))
    return max(-ratio * adv, -min(max(ratio, 1 - low), 1 + high) * adv)


def recipe():
    logp, old, _, mask = batch(3)
    ref = logp.detach() + 0.3 * normal(6, 4, seed=8)
    return logp, old, ref, vector(1, 0, 0, 1, 1, 1), groups_of(2, 3), mask, (1, 4, 2, 3, 4, 2)


def test_b17_puts_the_kl_into_the_same_mean():
    logp, old, ref, rewards, group, mask, lengths = recipe()
    adv = [math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5), 0.0, 0.0, 0.0]
    expected = 0.0
    for i, length in enumerate(lengths):
        for t in range(length):
            d = float(ref[i, t] - logp[i, t])
            expected += (token_clip(logp[i, t], old[i, t], adv[i], 0.2, 0.2) + 0.3 * (math.exp(d) - d - 1)) / 6 / length
    close(grpo_loss(logp, old, ref, rewards, group, mask, beta=0.3), expected, 1e-5)
    other = grpo_loss(logp, old, ref, rewards, group, mask, 0.0, 0.1, 0.5, "unbiased")
    by_hand = sum(
        token_clip(logp[i, t], old[i, t], adv[i] * math.sqrt(2 / 3), 0.1, 0.5) / 6 / n
        for i, n in enumerate(lengths)
        for t in range(n)
    )
    close(other, by_hand, 1e-5)


def test_b18_divides_by_no_spread_and_no_length():
    logp, old, _, rewards, group, mask, lengths = recipe()
    adv = [2 / 3, -1 / 3, -1 / 3, 0, 0, 0]
    expected = sum(
        token_clip(logp[i, t], old[i, t], adv[i], 0.2, 0.2) / 6 / 12 for i, n in enumerate(lengths) for t in range(n)
    )
    close(dr_grpo_loss(logp, old, rewards, group, mask, t_max=12), expected)


def test_b19_lets_a_good_token_rise_by_28_percent():
    logp = vector(*map(math.log, (1.25, 1.3, 0.79, 0.81))).unsqueeze(1).requires_grad_()
    rewards, group = vector(1, 1, 0, 0), groups_of(1, 4)
    loss = dapo_loss(logp, torch.zeros(4, 1).double(), rewards, group, torch.ones(4, 1).double())
    assert (slope(loss, logp)[:, 0] != 0).tolist() == [True, False, False, True]


def test_b19_drops_the_groups_that_agree():
    logp, old, _, rewards, group, mask, lengths = recipe()
    adv = [math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5)]
    expected = sum(token_clip(logp[i, t], old[i, t], adv[i], 0.2, 0.28) for i in range(3) for t in range(lengths[i]))
    close(dapo_loss(logp, old, rewards, group, mask), expected / sum(lengths[:3]), 1e-5)
    alike = dapo_loss(logp, old, torch.ones(6, dtype=torch.float64), group, mask)
    assert float(alike) == 0
    close(slope(alike, logp), torch.zeros(6, 4))


# ---- the card's identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_identity_1_advantages_sum_to_zero_in_a_group(seed):
    rewards, group = normal(12, seed=seed), torch.arange(12) % 3
    everything = [group_mean_advantage(rewards, group), rloo_advantage(rewards, group)]
    everything += [grpo_advantage(rewards, group, mode) for mode in ("population", "unbiased", "none")]
    for adv in everything:
        close(torch.zeros(3, dtype=torch.float64).index_add(0, group, adv), torch.zeros(3))


def test_identity_2_rloo_is_a_multiple_of_the_deviation():
    rewards, group = normal(10, seed=1), torch.tensor([0] * 4 + [1] * 6)
    factor = vector(*[4 / 3] * 4, *[6 / 5] * 6)
    close(rloo_advantage(rewards, group), factor * group_mean_advantage(rewards, group))


@pytest.mark.parametrize("right", [1, 3, 7])
def test_identity_3_binary_rewards(right):
    rewards, group = vector(*[1.0] * right, *[0.0] * (8 - right)), torch.zeros(8, dtype=torch.int64)
    p = right / 8
    expected = vector(*[math.sqrt((1 - p) / p)] * right, *[-math.sqrt(p / (1 - p))] * (8 - right))
    close(grpo_advantage(rewards, group, eps=0.0), expected)
    close(grpo_advantage(rewards, group, eps=0.0).square().mean(), 1.0)
    close(grpo_advantage(rewards, group, "unbiased", 0.0), expected * math.sqrt(7 / 8))


@pytest.mark.parametrize("mode", MODES)
def test_identity_4_on_policy_all_gradients_agree(mode):
    logp, _, adv, mask = batch()
    ratio = token_ratio(logp, logp, mask)
    losses = [
        reinforce_loss(logp, adv),
        importance_loss(ratio, adv),
        clip_loss(ratio, adv),
        cispo_loss(logp, ratio, adv, eps_max=1.0),
        dual_clip_loss(ratio, adv),
    ]
    gradients = [torch.autograd.grad(aggregate(x, mask, mode, 4), logp, retain_graph=True)[0] for x in losses]
    for gradient in gradients[1:]:
        close(gradient, gradients[0])
    assert float(gradients[0].abs().max()) > 0
    close(losses[2], -adv.unsqueeze(1).expand(6, 4))  # the values differ


def test_identity_5_affine_rewards():
    rewards, group = normal(8, seed=2), groups_of(2, 4)
    close(group_mean_advantage(3 * rewards + 7, group), 3 * group_mean_advantage(rewards, group))
    close(grpo_advantage(3 * rewards + 7, group, eps=0.0), grpo_advantage(rewards, group, eps=0.0))


def test_identity_6_equal_lengths():
    loss, mask = normal(5, 3), torch.ones(5, 3)
    for other in (token_mean(loss, mask), seq_sum(loss, mask) / 3, seq_sum_const(loss, mask, 3)):
        close(seq_mean(loss, mask), other)


@pytest.mark.parametrize("mode", MODES)
def test_identity_7_equal_rewards_give_no_gradient(mode):
    logp, old, _, mask = batch()
    rewards, group = torch.full((6,), 0.3, dtype=torch.float64), groups_of(2, 3)
    for advantage in (group_mean_advantage, rloo_advantage, grpo_advantage):
        loss = aggregate(clip_loss(token_ratio(logp, old, mask), advantage(rewards, group)), mask, mode, 4)
        close(slope(loss, logp), torch.zeros(6, 4), 0)


def test_identity_8_a_shared_token_moves_only_where_lengths_count():
    rewards, group, lengths = vector(1, 0, 0, 1), groups_of(1, 4), (1, 4, 4, 2)  # what is right is short
    shared, mask = vector(-0.7).requires_grad_(), rows(lengths, 4)
    rest = -normal(4, 3, seed=4).abs()
    logp = torch.cat([shared.expand(4, 1), rest], dim=1)  # all four begin with the same token after the same prompt
    adv = group_mean_advantage(rewards, group)

    def net(mode):
        loss = aggregate(clip_loss(token_ratio(logp, logp, mask), adv), mask, mode, 4)
        return torch.autograd.grad(loss, shared, retain_graph=True)[0]

    close(net("seq_sum_const"), [0.0], 1e-15)
    close(net("seq_mean"), [-sum(float(a) / n for a, n in zip(adv, lengths, strict=True)) / 4])
    assert float(net("seq_mean")) < -0.1  # it is pushed up for being followed by little


def test_identity_9_ratios_multiply():
    logp, old, _, mask = batch()
    whole = trajectory_ratio(logp, old, mask)
    close(whole.log(), (mask * token_ratio(logp, old, mask).log()).sum(1))
    close(sequence_ratio(logp, old, mask), whole ** (1 / mask.sum(1)))


def two_policies(actions: int = 6):
    logits = normal(actions, seed=1).requires_grad_()
    return logits, torch.log_softmax(logits, 0), torch.log_softmax(normal(actions, seed=2), 0)


def exact_kl(first, second):
    return (first.exp() * (first - second)).sum()


def as_column(log_pi, log_ref):
    return log_pi.unsqueeze(1), log_ref.unsqueeze(1), torch.ones(len(log_pi), 1)


def test_identity_10_estimators():
    _, log_pi, log_ref = two_policies()
    column, pi = as_column(log_pi, log_ref), log_pi.exp()
    for estimator in (k2, k3):
        assert bool((estimator(*column) >= 0).all())
    for estimator in (k1, k3):
        close(pi @ estimator(*column)[:, 0], exact_kl(log_pi, log_ref))
    assert bool((k1(*column) < 0).any())
    assert abs(float(pi @ k2(*column)[:, 0] - exact_kl(log_pi, log_ref))) > 1e-3
    d = (log_ref - log_pi).detach()
    close(k1(*column)[:, 0], -d)
    close(k2(*column)[:, 0], [float(x) ** 2 / 2 for x in d])
    close(k3(*column)[:, 0], [math.exp(x) - float(x) - 1 for x in d])


def mean_gradient(estimator):
    """Return the gradient by the logits of an estimator whose samples are fixed, averaged over all samples."""
    logits, log_pi, log_ref = two_policies()
    return slope((log_pi.exp().detach() * estimator(*as_column(log_pi, log_ref))[:, 0]).sum(), logits)


def test_k1_is_useless_as_a_loss():
    close(mean_gradient(k1), torch.zeros(6))


def test_k2_as_a_loss_follows_the_kl_from_the_policy():
    logits, log_pi, log_ref = two_policies()
    close(mean_gradient(k2), slope(exact_kl(log_pi, log_ref), logits))


def test_k3_as_a_loss_follows_the_other_direction():
    logits, log_pi, log_ref = two_policies()
    other = slope(exact_kl(log_ref, log_pi), logits)
    close(mean_gradient(k3), other)
    assert float((other - mean_gradient(k2)).abs().max()) > 1e-2


def test_k1_of_older_samples_moves_the_policy():
    logits, log_pi, log_old = two_policies()
    gradient = slope((log_old.exp() * -k1(*as_column(log_pi, log_old))[:, 0]).sum(), logits)  # log pi_old - log pi
    close(gradient, slope(exact_kl(log_old, log_pi), logits))
    assert float(gradient.abs().max()) > 1e-2


def test_identity_11_score():
    logits, log_pi, _ = two_policies()
    pi, total = log_pi.exp().detach(), torch.zeros(6, dtype=torch.float64)
    for action in range(6):
        (score,) = torch.autograd.grad(log_pi[action], logits, retain_graph=True)
        close(score, [(1.0 if v == action else 0.0) - float(pi[v]) for v in range(6)])
        total += pi[action] * score
    close(total, torch.zeros(6))


def test_identity_12_and_b22_entropy():
    logits = 3 * normal(50, 7, seed=3)
    h = entropy(logits)
    for row, found in zip(logits, h, strict=True):
        p = [math.exp(float(z)) for z in row]
        p = [x / sum(p) for x in p]
        close(found, -math.fsum(x * math.log(x) for x in p))
    assert bool((h <= math.log(7) + 1e-12).all())
    close(entropy(torch.zeros(2, 3, 7)), math.log(7) * torch.ones(2, 3), 1e-6)
    unsure = logits.softmax(-1).amax(-1) <= 0.5
    assert bool(unsure.any()) and bool((h[unsure] >= math.log(2)).all())


def test_b22_passes_its_gradient_and_takes_forbidden_tokens():
    logits = normal(5, seed=6).requires_grad_()
    log_pi, h = torch.log_softmax(logits, 0), entropy(logits)
    close(slope(h, logits), -(log_pi.exp() * (log_pi + h)))
    forbidden = torch.cat([logits, vector(-math.inf)])
    close(entropy(forbidden), h)
    close(slope(entropy(forbidden), logits), -(log_pi.exp() * (log_pi + h)))


# ---- the file itself -----------------------------------------------------------------------------------------


def test_every_number_of_the_card_is_an_equation():
    found = equations(_group_policy)
    assert {f"B{n}" for n in range(1, 23)} <= set(found)
    for number, each in found.items():
        assert each.latex and "$" not in each.latex and each.source and each.function.__doc__, number
        assert each.latex.count("{") == each.latex.count("}"), number
