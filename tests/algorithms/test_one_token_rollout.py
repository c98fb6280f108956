"""One-token rollout: each equation against sums written out, its identities, the draws' law, and both worlds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from closeness import close, normal

from polrl.core.conformance import ALL_CHECKS, Case
from polrl.core.errors import KnobError, UnknownNameError
from polrl.core.sampling import Generators
from polrl.language._one_token_rollout_worlds import Additions, OneSoftmax, References
from polrl.language.one_token_rollout import (
    OneTokenRollout,
    count_loss,
    decomposed_loss,
    dft_loss,
    draw_shares,
    exact_loss,
    logit_gradient,
    one_step_gradient,
    reward,
    rollout_loss,
    rollout_policy,
    sft_loss,
    study,
    token_weights,
)
from polrl.models.causal_lm import sample
from polrl.models.tiny_lm import EOS, decode, decode_batch
from polrl.worlds.text_tasks import Arithmetic, held_out

BETAS = [-1.0, -0.1, 0.0, 0.4, 1.0]
V = 5


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits [3, 4, 5], targets [3, 4] and a mask for answers of 4, 2 and 1 tokens."""
    targets = torch.tensor([[0, 3, 2, 1], [4, 4, 0, 0], [2, 0, 0, 0]])
    mask = (torch.arange(4) < torch.tensor([[4], [2], [1]])).double()
    return normal(3, 4, V, seed=1), targets, mask


def draws(count: int = 6, seed: int = 2) -> torch.Tensor:
    """Return sampled tokens [3, 4, count]."""
    return torch.randint(0, V, (3, 4, count), generator=torch.Generator().manual_seed(seed))


def shares(sampled: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(sampled, V).double().mean(dim=-2)


def gradient(loss, logits: torch.Tensor) -> torch.Tensor:
    """Return the gradient by the logits of a function of them."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def by_hand(logits, mask, weights) -> tuple[float, torch.Tensor]:
    """Return minus the mean by sequence of sum_v w_v log pi(v), and its gradient, with plain numbers.

    `weights(i, t)` gives the constants w [V] of a position.
    """
    total, slope, count = 0.0, torch.zeros_like(logits), len(logits)
    for i in range(count):
        length = int(mask[i].sum())
        for t in range(logits.shape[1]):
            if not mask[i, t]:
                continue
            exponentials = [math.exp(x) for x in logits[i, t].tolist()]
            pi, w = [e / sum(exponentials) for e in exponentials], weights(i, t)
            total -= sum(w[v] * math.log(pi[v]) for v in range(V)) / length / count
            for v in range(V):
                slope[i, t, v] = (sum(w) * pi[v] - w[v]) / length / count
    return total, slope


# ---- E1, E2, E9: fine-tuning, the policy gradient, DFT -------------------------------------------------------


def test_e1_is_a_mean_over_a_sequences_tokens_then_over_sequences():
    logits, targets, mask = batch()
    value, slope = by_hand(logits, mask, lambda i, t: [float(v == targets[i, t]) for v in range(V)])
    close(sft_loss(logits, targets, mask), value)
    close(gradient(lambda x: sft_loss(x, targets, mask), logits), slope)


def test_e1_is_cross_entropy_where_all_sequences_are_of_one_length():
    logits, targets, mask = batch()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    close(sft_loss(logits, targets, torch.ones_like(mask)), expected)


def test_a_long_answer_weighs_no_more_than_a_short_one():
    logits, targets, mask = batch()
    alone = [sft_loss(logits[[i]], targets[[i]], mask[[i]]) for i in range(3)]
    close(sft_loss(logits, targets, mask), sum(alone) / 3)


def test_e2_is_the_gradient_of_the_expected_reward_and_the_mean_score():
    logits, earned = normal(2, V, seed=1), normal(2, V, seed=2)
    close(one_step_gradient(logits, earned), gradient(lambda x: (torch.softmax(x, -1) * earned).sum(), logits))
    pi, mean = torch.softmax(logits, -1), torch.zeros(2, V, dtype=torch.float64)
    for a in range(V):
        score = gradient(lambda x, a=a: torch.log_softmax(x, -1)[:, a].sum(), logits)
        mean += pi[:, [a]] * earned[:, [a]] * score
    close(one_step_gradient(logits, earned), mean)


def test_at_temperature_one_the_mean_step_of_otr_is_e2_uphill():
    logits, targets, _ = batch()
    earned = torch.full_like(logits, -0.3).scatter(-1, targets[..., None], 1.0)
    step = -gradient(lambda x: exact_loss(x, targets, torch.ones(3, 4), -0.3, 1.0), logits)
    close(step, one_step_gradient(logits, earned) / 12)


def test_e9_weighs_each_token_by_its_own_probability_held_fixed():
    logits, targets, mask = batch()
    pi = torch.softmax(logits, -1)
    value, slope = by_hand(
        logits, mask, lambda i, t: [float(pi[i, t, v]) * float(v == targets[i, t]) for v in range(V)]
    )
    close(dft_loss(logits, targets, mask), value)
    close(gradient(lambda x: dft_loss(x, targets, mask), logits), slope)


# ---- E3: the draws -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.5, 1.0, 1.3])
def test_e3_divides_the_logits_by_kappa(kappa):
    logits = normal(2, V, seed=1)
    for row in range(2):
        weights = [math.exp(x / kappa) for x in logits[row].tolist()]
        close(rollout_policy(logits, kappa)[row], [w / sum(weights) for w in weights])
    assert not rollout_policy(logits.requires_grad_(), kappa).requires_grad


@pytest.mark.parametrize("kappa", [0.0, -1.0, math.nan])
def test_e3_refuses_a_temperature_that_is_none(kappa):
    with pytest.raises(ValueError, match=rf"kappa must be above 0, got {kappa}"):
        rollout_policy(torch.zeros(3), kappa)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_samples", [1, 7, 256])
def test_draws_are_whole_counts_that_sum_to_k(num_samples):
    p = torch.softmax(3 * normal(4, 6, V, seed=1), -1)
    counts = num_samples * draw_shares(p, num_samples, generator())
    assert counts.shape == p.shape
    close(counts, counts.round(), 1e-9)
    close(counts.sum(-1), torch.full((4, 6), float(num_samples)), 1e-9)


def test_two_tokens_follow_the_binomial_law():
    p, k, n = 0.3, 4, 40_000
    counts = k * draw_shares(torch.tensor([p, 1 - p]).expand(n, 2), k, generator())[:, 0]
    for c in range(k + 1):
        law = math.comb(k, c) * p**c * (1 - p) ** (k - c)
        found = float((counts.round() == c).double().mean())
        assert found == pytest.approx(law, abs=4.5 * math.sqrt(law * (1 - law) / n))


def test_identity_7_mean_and_covariances_of_the_shares_are_the_multinomials():
    p, k, n = torch.softmax(normal(V, seed=3), 0), 8, 40_000
    found = draw_shares(p.expand(n, V), k, generator())
    covariance = (torch.diag(p) - torch.outer(p, p)) / k
    close(found.mean(0), p, 4.5 * math.sqrt(0.25 / k / n))
    close(found.T.cov(), covariance, 0.002)
    assert float(found.T.corrcoef()[0, 1]) < -0.05, "draws of one token leave fewer for the others"


def test_positions_are_drawn_independently():
    found = draw_shares(torch.full((20_000, 2, 2), 0.5), 4, generator())[..., 0]
    assert abs(float(found.T.corrcoef()[0, 1])) < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tokens_of_probability_zero_are_never_drawn(dtype):
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=dtype).expand(500, V)
    found = draw_shares(p, 64, generator())
    assert found.dtype == dtype
    assert bool((found[:, [0, 2, 4]] == 0).all())
    assert float(found[:, 1].double().mean()) == pytest.approx(0.5, abs=0.02)


def test_the_same_generator_draws_the_same_and_the_next_call_differs():
    p, same = torch.softmax(normal(9, V, seed=3), -1), generator(4)
    first, second = draw_shares(p, 16, same), draw_shares(p, 16, same)
    assert torch.equal(first, draw_shares(p, 16, generator(4))) and not torch.equal(first, second)


def test_draws_are_a_constant_and_at_least_one():
    assert not draw_shares(torch.softmax(normal(2, V).requires_grad_(), -1), 4, generator()).requires_grad
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        draw_shares(torch.ones(1, 1), 0, generator())


# ---- E4 to E7: the loss --------------------------------------------------------------------------------------


def test_e4_pays_one_for_the_reference_and_beta_for_others():
    found = reward(torch.tensor([[2, 0, 2], [1, 1, 0]]), torch.tensor([2, 0]), -0.1)
    assert found.tolist() == torch.tensor([[1.0, -0.1, 1.0], [-0.1, -0.1, 1.0]]).tolist()
    assert reward(torch.tensor([1]), torch.tensor(0), 0.1, torch.float64).tolist() == [0.1]


@pytest.mark.parametrize("beta", BETAS)
def test_e5_averages_over_all_draws_duplicates_counted(beta):
    (logits, targets, mask), sampled = batch(), draws()

    def weights(i, t):
        w = [0.0] * V
        for a in sampled[i, t].tolist():
            w[a] += (1.0 if a == targets[i, t] else beta) / 6
        return w

    value, slope = by_hand(logits, mask, weights)
    close(rollout_loss(logits, sampled, targets, mask, beta), value)
    close(gradient(lambda x: rollout_loss(x, sampled, targets, mask, beta), logits), slope)


@pytest.mark.parametrize("beta", BETAS)
def test_e6_is_e5_in_value_and_gradient(beta):
    (logits, targets, mask), sampled = batch(), draws()
    share = shares(sampled)
    close(
        count_loss(logits, share, targets, mask, beta),
        rollout_loss(logits, sampled, targets, mask, beta),
    )
    close(
        gradient(lambda x: count_loss(x, share, targets, mask, beta), logits),
        gradient(lambda x: rollout_loss(x, sampled, targets, mask, beta), logits),
    )


@pytest.mark.parametrize("beta", BETAS)
def test_e7_is_the_mean_of_e5_over_all_draws_in_value_and_gradient(beta):
    logits, targets, mask, kappa = normal(1, 1, 3, seed=1), torch.tensor([[2]]), torch.ones(1, 1), 1.3
    p = torch.softmax(logits[0, 0] / kappa, 0)
    value, slope = 0.0, torch.zeros_like(logits)
    for pair in itertools.product(range(3), repeat=2):
        sampled, chance = torch.tensor([[pair]]), p[pair[0]] * p[pair[1]]
        value = value + chance * rollout_loss(logits, sampled, targets, mask, beta)
        slope += chance * gradient(lambda x, s=sampled: rollout_loss(x, s, targets, mask, beta), logits)
    close(exact_loss(logits, targets, mask, beta, kappa), value)
    close(gradient(lambda x: exact_loss(x, targets, mask, beta, kappa), logits), slope)


def test_no_gradient_passes_through_the_draws_or_the_rollout_policy():
    (logits, targets, mask), share = batch(), shares(draws()).requires_grad_()
    for loss in (count_loss, decomposed_loss):
        leaf = logits.clone().requires_grad_()
        found = torch.autograd.grad(loss(leaf, share, targets, mask, 0.4), (leaf, share), allow_unused=True)
        assert found[0] is not None and found[1] is None
    assert not token_weights(share, targets, 0.4).requires_grad


def test_the_log_probability_stands_at_temperature_one():
    """With log pi' in its place gradients would shrink by kappa."""
    (logits, targets, mask), share = batch(), shares(draws())
    w = token_weights(share, targets, -0.1)
    expected = -(w * torch.log_softmax(logits, -1)).sum(-1)
    close(count_loss(logits, share, targets, torch.ones(3, 4), -0.1), expected.mean())
    assert abs(float(exact_loss(logits, targets, mask, 0.0, 3.0) - exact_loss(logits, targets, mask, 0.0, 1.0))) > 1e-3


# ---- E8, E10 and the identities ------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_e8_is_the_gradient_by_the_logits(beta):
    (logits, targets, _), share = batch(), shares(draws())
    found = logit_gradient(logits, token_weights(share, targets, beta))
    close(found / 12, gradient(lambda x: count_loss(x, share, targets, torch.ones(3, 4), beta), logits))


def test_the_weights_are_the_shares_times_the_reward():
    (_, targets, _), share = batch(), shares(draws())
    found = token_weights(share, targets, -0.25)
    for i, t, v in np.ndindex(3, 4, V):
        close(found[i, t, v], share[i, t, v] * (1.0 if v == targets[i, t] else -0.25))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("law", ["draws", "exact"])
def test_identity_1_the_loss_is_reweighted_sft_plus_beta_times_staying(beta, law):
    logits, targets, mask = batch()
    share = shares(draws()) if law == "draws" else rollout_policy(logits, 1.3)
    close(decomposed_loss(logits, share, targets, mask, beta), count_loss(logits, share, targets, mask, beta), 1e-10)
    close(
        gradient(lambda x: decomposed_loss(x, share, targets, mask, beta), logits),
        gradient(lambda x: count_loss(x, share, targets, mask, beta), logits),
        1e-10,
    )
    staying = by_hand(logits, mask, lambda i, t: (beta * share[i, t]).tolist())[0]
    here = share.gather(-1, targets[..., None])[..., 0]
    reweighted = by_hand(
        logits, mask, lambda i, t: [(1 - beta) * float(here[i, t]) * float(v == targets[i, t]) for v in range(V)]
    )[0]
    close(decomposed_loss(logits, share, targets, mask, beta), staying + reweighted, 1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_identity_2_without_temperature_beta_only_scales_dft(beta):
    logits, targets, mask = batch()
    otr = gradient(lambda x: exact_loss(x, targets, mask, beta, 1.0), logits)
    dft = gradient(lambda x: dft_loss(x, targets, mask), logits)
    close(otr, (1 - beta) * dft, 1e-10)
    if beta not in (0.0, 1.0):
        warm = gradient(lambda x: exact_loss(x, targets, mask, beta, 1.3), logits)
        assert float((warm - (1 - beta) * dft).abs().max()) > 1e-3


def test_identity_3_draws_that_always_hit_are_sft():
    logits, targets, mask = batch()
    share = torch.nn.functional.one_hot(targets, V).double()
    for beta in (0.0, -0.7):
        close(count_loss(logits, share, targets, mask, beta), sft_loss(logits, targets, mask))
    close(
        gradient(lambda x: count_loss(x, share, targets, mask, 0.0), logits),
        gradient(lambda x: sft_loss(x, targets, mask), logits),
    )


def test_identity_4_with_beta_one_the_references_do_not_matter():
    logits, targets, _ = batch()
    full = torch.ones(3, 4, dtype=torch.float64)
    found = gradient(lambda x: exact_loss(x, targets, full, 1.0, 1.3), logits)
    close(found, (torch.softmax(logits, -1) - torch.softmax(logits / 1.3, -1)) / 12)
    close(found, gradient(lambda x: exact_loss(x, (targets + 1) % V, full, 1.0, 1.3), logits))
    close(gradient(lambda x: exact_loss(x, targets, full, 1.0, 1.0), logits), torch.zeros_like(logits))


def test_identity_5_a_reference_never_drawn_moves_nothing():
    logits, targets, mask = batch()
    sampled = (targets[..., None] + 1 + draws() % (V - 1)) % V  # anything but the reference
    for found in (
        gradient(lambda x: rollout_loss(x, sampled, targets, mask, 0.0), logits),
        gradient(lambda x: count_loss(x, shares(sampled), targets, mask, 0.0), logits),
    ):
        assert bool((found == 0).all())
    assert bool((gradient(lambda x: rollout_loss(x, sampled, targets, mask, -0.1), logits) != 0).any())


@pytest.mark.parametrize("kind", ["sft", "dft", "drawn", "counted", "exact", "decomposed"])
def test_identity_6_gradients_sum_to_zero_and_vanish_where_masked(kind):
    (logits, targets, mask), sampled = batch(), draws()
    loss = {
        "sft": lambda x: sft_loss(x, targets, mask),
        "dft": lambda x: dft_loss(x, targets, mask),
        "drawn": lambda x: rollout_loss(x, sampled, targets, mask, -0.3),
        "counted": lambda x: count_loss(x, shares(sampled), targets, mask, -0.3),
        "exact": lambda x: exact_loss(x, targets, mask, -0.3, 1.3),
        "decomposed": lambda x: decomposed_loss(x, shares(sampled), targets, mask, -0.3),
    }[kind]
    found = gradient(loss, logits)
    close(found.sum(-1), torch.zeros(3, 4))
    assert bool((found[mask == 0] == 0).all()) and bool((found[mask == 1] != 0).any())


def test_identity_8_without_temperature_the_mean_step_climbs_a_linear_objective():
    logits, q, beta = normal(V, seed=1), torch.softmax(normal(V, seed=2), 0), -0.4
    one = torch.ones(1, 1)
    mean = sum(
        q[x] * gradient(lambda z, x=x: exact_loss(z[None, None], torch.tensor([[x]]), one, beta, 1.0), logits)
        for x in range(V)
    )
    close(mean, gradient(lambda z: -(1 - beta) * (q * torch.softmax(z, 0)).sum(), logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equations_keep_the_dtype(dtype):
    (logits, targets, mask), sampled = batch(), draws()
    logits, share = logits.to(dtype), shares(sampled).to(dtype)
    outcomes = (
        sft_loss(logits, targets, mask), one_step_gradient(logits, logits), rollout_policy(logits, 1.3),
        reward(sampled, targets, 0.1, dtype), rollout_loss(logits, sampled, targets, mask.bool(), 0.1),
        token_weights(share, targets, 0.1), count_loss(logits, share, targets, mask, 0.1),
        exact_loss(logits, targets, mask, 0.1, 1.3), logit_gradient(logits, share), dft_loss(logits, targets, mask),
        decomposed_loss(logits, share, targets, mask, 0.1), draw_shares(share, 5, generator()),
    )  # fmt: skip
    assert {outcome.dtype for outcome in outcomes} == {dtype}


def test_shapes_that_do_not_agree_are_refused():
    (logits, targets, mask), sampled = batch(), draws()
    losses = {
        "sft": lambda x, t, m: sft_loss(x, t, m),
        "dft": lambda x, t, m: dft_loss(x, t, m),
        "drawn": lambda x, t, m: rollout_loss(x, sampled[:, : t.shape[1]], t, m, 0.1),
        "counted": lambda x, t, m: count_loss(x, shares(sampled)[:, : t.shape[1]], t, m, 0.1),
        "exact": lambda x, t, m: exact_loss(x, t, m, 0.1, 1.3),
        "decomposed": lambda x, t, m: decomposed_loss(x, shares(sampled)[:, : t.shape[1]], t, m, 0.1),
    }
    for loss in losses.values():
        for wrong in (mask[:, :3], mask[:1], mask[0]):
            with pytest.raises(ValueError, match=r"mask must be \[B, T\] = \[3, 4\] as the targets are, got \["):
                loss(logits, targets, wrong)
    for name in ("sft", "dft", "drawn", "exact"):
        with pytest.raises(ValueError, match=r"positions \[3, 4\] is needed, got \[3, 3\]"):
            losses[name](logits, targets[:, :3], mask[:, :3])
    with pytest.raises(ValueError, match=r"positions \[3, 4\] is needed, got \[4\]"):
        reward(sampled, targets[0], 0.1)


def test_a_sequence_without_response_counts_as_zero():
    logits, targets, mask = batch()
    mask[2] = 0
    expected = sum(sft_loss(logits[[i]], targets[[i]], mask[[i]]) for i in (0, 1)) / 3
    close(sft_loss(logits, targets, mask), expected)


# ---- one softmax ---------------------------------------------------------------------------------------------


def softmax_learner(**settings) -> OneTokenRollout:
    return OneTokenRollout(**{"world": "one_softmax", "learning_rate": 3e-3, "device": "cpu", **settings})


def end_of(steps: int = 300, **settings) -> dict[str, float]:
    learner = softmax_learner(**settings)
    for _ in range(steps):
        learner.update()
    return {name: float(value) for name, value in learner.evaluate().items()}


def test_one_softmax_has_seventy_percent_right_references():
    world = OneSoftmax(torch.device("cpu"))
    close(world.law, [0.7 if v == 3 else 0.3 / 9 for v in range(10)], 1e-6)
    assert world.draw(1, generator()).targets.shape == (30, 1)


def test_identity_8_sft_copies_the_noise_and_otr_decides():
    sft = end_of(mix_sft=1.0)
    assert sft["accuracy"] == pytest.approx(0.7, abs=1e-3)
    assert sft["distance_from_references"] < 1e-3
    assert sft["token_entropy"] == pytest.approx(1.27, abs=2e-3)
    assert sft["kl"] == pytest.approx(math.log(10) - 1.27, abs=2e-3)
    assert end_of(rollout="exact")["accuracy"] > 0.99
    assert end_of(num_samples=1)["accuracy"] > 0.99
    assert end_of(rollout="exact", kappa=1.0, beta=0.0)["accuracy"] > 0.99


@pytest.mark.parametrize(("beta", "right", "entropy"), [(0.3, 0.842, 0.78), (0.6, 0.347, 2.08), (0.9, 0.131, 2.30)])
def test_the_cards_sweep_of_beta(beta, right, entropy):
    found = end_of(rollout="exact", beta=beta)
    assert found["accuracy"] == pytest.approx(right, abs=2e-3)
    assert found["token_entropy"] == pytest.approx(entropy, abs=1e-2)


def test_without_temperature_beta_changes_the_speed_and_not_the_end():
    def after(steps, beta):
        return end_of(steps, rollout="exact", kappa=1.0, beta=beta, learning_rate=1.5e-3)["accuracy"]

    begun = [after(15, beta) for beta in (-1.0, 0.0, 0.5)]
    assert begun[0] > begun[1] + 0.1 > begun[2] + 0.15
    assert after(80, 0.0) == pytest.approx(after(40, -1.0), abs=0.02)  # twice as fast
    assert min(after(300, beta) for beta in (-1.0, 0.0, 0.5)) > 0.99


def test_a_uniform_policy_that_never_draws_the_reference_stays():
    """The start of identity 8's end: where pi(argmax q) = 0, nothing moves."""
    learner = softmax_learner(beta=0.0, rollout="exact")
    with torch.no_grad():
        learner.policy.logits.fill_(-200.0)
        learner.policy.logits[0] = 200.0
    learner.update()
    assert float(learner.policy.logits[3].detach()) == -200.0


def check_name(check) -> str:
    return check.__name__.removeprefix("check_")


class SoftmaxOnly(OneTokenRollout):
    """Without the curve of what is not taught, which one softmax has not."""

    curves = OneTokenRollout.curves[1:]


@pytest.mark.parametrize("check", ALL_CHECKS, ids=check_name)
def test_one_softmax_keeps_the_contract(check):
    check(Case(SoftmaxOnly, {"world": "one_softmax", "num_samples": 4}))


# ---- additions -----------------------------------------------------------------------------------------------

SMALL = {"batch_size": 6, "held_out": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def world() -> Additions:
    return OneTokenRollout(**SMALL).world


def texts(references: References) -> list[str]:
    return [
        decode(prompt) + answer
        for prompt, answer in zip(
            references.prompts, decode_batch(references.targets, references.mask), strict=True
        )
    ]  # fmt: skip


def parts(text: str) -> tuple[int, str, int, str]:
    """Return first number, sign, second number and what is given as the answer."""
    return int(text[:2]), text[2], int(text[3:5]), text[6:]


def test_a_share_of_the_references_has_one_wrong_digit(world):
    wrong = 0
    for text in texts(world.references):
        first, sign, second, given = parts(text)
        right = str(first + second)
        assert sign == "+" and len(given) == len(right)
        differing = sum(a != b for a, b in zip(given, right, strict=True))
        assert differing <= 1
        wrong += differing
    assert wrong / len(world.references.targets) == pytest.approx(0.3, abs=0.03)
    clean = OneTokenRollout(**SMALL, noise=0.0).world
    assert all(parts(t)[0] + parts(t)[2] == int(parts(t)[3]) for t in texts(clean.references))


def test_the_model_is_judged_on_right_answers_that_it_is_not_taught(world):
    taught = {parts(text)[:3] for text in texts(world.references)}
    for name, sign in (("accuracy", "+"), ("elsewhere", "-")):
        for text in texts(world.judged[name]):
            first, found, second, given = parts(text)
            assert found == sign and held_out((first, second))
            assert int(given) == (first + second if sign == "+" else first - second)
            assert (first, sign, second) not in taught
    other = OneTokenRollout(**SMALL, seed=1).world
    assert texts(other.judged["accuracy"]) == texts(world.judged["accuracy"])
    assert texts(other.references) != texts(world.references)


def test_every_answer_ends_with_the_end_token_and_padding_is_masked(world):
    for targets, mask in zip(world.references.targets, world.references.mask, strict=True):
        length = int(mask.sum())
        assert targets[length - 1] == EOS and bool((targets[: length - 1] != EOS).all())
        assert mask.tolist() == [1.0] * length + [0.0] * (len(mask) - length)


def test_accuracy_is_what_sampling_gives():
    learner = OneTokenRollout(**{**SMALL, "held_out": 40})
    problems = Arithmetic("+").prompts(40, np.random.default_rng(0), split="test")
    prompts = learner.world.judged["accuracy"].prompts
    right, repeats = 0.0, 25
    for i in range(repeats):
        written = sample(learner.policy, prompts, torch.ones_like(prompts), max_new_tokens=5, generator=generator(i))
        answers = decode_batch(written.ids, written.mask)
        right += float(Arithmetic("+").reward(problems, answers, written.finished).sum())
    assert right / 40 / repeats == pytest.approx(float(learner.evaluate()["accuracy"]), abs=0.05)


def test_at_the_start_nothing_is_forgotten_and_half_is_known():
    found = OneTokenRollout(**{**SMALL, "held_out": 128}).evaluate()
    assert float(found["forgotten"]) == pytest.approx(0, abs=1e-6) and float(found["kl"]) == pytest.approx(0, abs=1e-6)
    assert 0.3 < float(found["accuracy"]) < 0.7 and 0.3 < float(found["elsewhere"]) < 0.7


def test_entropy_and_kl_are_means_over_answer_tokens():
    learner = OneTokenRollout(**SMALL, learning_rate=3e-3)
    start = learner.world.new_policy()
    for _ in range(3):
        learner.update()
    entropies, kls = [], {"accuracy": [], "elsewhere": []}
    with torch.no_grad():
        for name, problems in learner.world.judged.items():
            now, before = (
                torch.log_softmax(learner.world.logits(p, problems), -1) for p in (learner.policy, start)
            )  # fmt: skip
            for i, t in zip(*np.nonzero(problems.mask.numpy()), strict=True):
                p, q = now[i, t], before[i, t]
                kls[name].append(float((p.exp() * (p - q)).sum()))
                if name == "accuracy":
                    entropies.append(-float((p.exp() * p).sum()))
    found = learner.evaluate()
    assert float(found["token_entropy"]) == pytest.approx(np.mean(entropies), rel=1e-4)
    assert float(found["kl"]) == pytest.approx((np.mean(kls["accuracy"]) + np.mean(kls["elsewhere"])) / 2, rel=1e-3)
    assert float(found["kl"]) > 1e-4


def batches_of(learner: OneTokenRollout, monkeypatch) -> list[References]:
    drawn, draw = [], learner.world.draw
    monkeypatch.setattr(learner.world, "draw", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    return drawn


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"mix_sft": 1.0}, lambda x, t, m: sft_loss(x, t, m)),
        ({"rollout": "exact", "kappa": 1.0, "beta": 0.0}, lambda x, t, m: dft_loss(x, t, m)),
        ({"rollout": "exact", "beta": -0.5}, lambda x, t, m: exact_loss(x, t, m, -0.5, 1.3)),
        (
            {"rollout": "exact", "mix_sft": 0.25},
            lambda x, t, m: 0.25 * sft_loss(x, t, m) + 0.75 * exact_loss(x, t, m, -0.1, 1.3),
        ),
    ],
    ids=["sft", "dft", "exact", "mixture"],
)
def test_an_update_is_one_step_of_adam_on_the_loss(monkeypatch, settings, loss):
    learner = OneTokenRollout(**SMALL, learning_rate=2e-3, **settings)
    drawn, policy = batches_of(learner, monkeypatch), learner.world.new_policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3, betas=(0.9, 0.98))
    for _ in range(3):
        metrics = learner.update()
        references = drawn[-1]
        value = loss(learner.world.logits(policy, references), references.targets, references.mask)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        assert float(metrics["loss"]) == pytest.approx(float(value.detach()), rel=1e-5)
    for ours, theirs in zip(learner.policy.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_draws_and_loss_come_from_one_forward_pass(monkeypatch):
    learner = OneTokenRollout(**SMALL, num_samples=8)
    calls, logits = [], learner.world.logits
    monkeypatch.setattr(learner.world, "logits", lambda *a: calls.append(logits(*a)) or calls[-1])
    twin, drawn = learner.fork(), batches_of(learner, monkeypatch)
    metrics = learner.update()
    assert len(calls) == 1 and len(drawn) == 1
    twin.rng.torch.set_state(Generators(0, torch.device("cpu")).torch.get_state())
    rng = Generators(0, torch.device("cpu")).torch
    references = learner.world.draw(6, rng)
    share = draw_shares(rollout_policy(calls[0], 1.3), 8, rng)
    expected = count_loss(calls[0], share, references.targets, references.mask, -0.1)
    assert float(metrics["loss"]) == pytest.approx(float(expected.detach()), rel=1e-6)
    hits = share.gather(-1, references.targets[..., None])[..., 0]
    assert float(metrics["hit_fraction"]) == pytest.approx(float(hits[references.mask == 1].mean()), rel=1e-5)


def test_update_reports_means_over_response_tokens(monkeypatch):
    learner = OneTokenRollout(**SMALL, rollout="exact", kappa=2.0)
    drawn, start = batches_of(learner, monkeypatch), learner.world.new_policy()
    metrics = learner.update()
    references = drawn[0]
    with torch.no_grad():
        log_pi = torch.log_softmax(learner.world.logits(start, references), -1)
        warm = torch.softmax(learner.world.logits(start, references) / 2, -1)
    real = references.mask == 1
    targets = references.targets[real][:, None]
    assert float(metrics["reference_probability"]) == pytest.approx(
        float(log_pi[real].gather(1, targets).exp().mean()), rel=1e-4
    )
    assert float(metrics["hit_fraction"]) == pytest.approx(float(warm[real].gather(1, targets).mean()), rel=1e-4)
    assert float(metrics["entropy"]) == pytest.approx(float(-(log_pi.exp() * log_pi)[real].sum(-1).mean()), rel=1e-4)


def test_one_draw_hits_or_misses_and_many_come_close():
    one, many = (OneTokenRollout(**SMALL, num_samples=k) for k in (1, 256))
    tables = []
    for learner in (one, many):
        with torch.no_grad():
            logits = learner.world.logits(learner.policy, learner.world.shown)
        tables.append((learner.rolled_out(logits), rollout_policy(logits, 1.3)))
    assert set(tables[0][0].unique().tolist()) == {0.0, 1.0}
    assert float((tables[1][0] - tables[1][1]).abs().max()) < 0.15


def test_pictures_show_four_errors_first_and_follow_the_knobs():
    learner = OneTokenRollout(**{**SMALL, "rollout": "exact"})
    views = learner.views()
    assert set(views) == {"probability", "hits", "push"}
    lines = ["".join(line) for line in views["probability"].lines]
    assert all("(right: " in line for line in lines[:4]) and not any("(right" in line for line in lines[4:])
    assert len(lines) == 8
    with torch.no_grad():
        pi = torch.softmax(learner.world.logits(learner.policy, learner.world.shown), -1)
    shown = learner.world.shown
    for row in range(8):
        length = int(shown.mask[row].sum())
        expected = pi[row, :length].gather(-1, shown.targets[row, :length, None])[:, 0]
        np.testing.assert_allclose(views["probability"].values[row][1:-1], expected.numpy(), rtol=1e-5)
    learner.config.beta = -1.0
    harder = learner.views()["push"].values
    assert harder.min() < views["push"].values.min() < 0
    learner.config.mix_sft = 1.0
    imitation = learner.views()["push"].values
    columns = [7 if i == 10 else i for i in range(11)]
    assert imitation.shape[1] == len(columns)
    given = learner.world.words[0][1]
    for row, digit in enumerate(given):
        assert imitation[row].argmax() == int(digit)
        assert imitation[row, int(digit)] == pytest.approx(1 - float(pi[0, row, 3 + int(digit)]), rel=1e-4)


def test_what_can_not_be_is_refused():
    with pytest.raises(UnknownNameError, match="add-sub-S"):
        OneTokenRollout(**SMALL, checkpoint="ad-sub-S")
    for name, value in (("beta", 1.0), ("kappa", 0.0), ("num_samples", 0), ("noise", 1.5), ("world", "moon")):
        with pytest.raises(KnobError, match=name):
            OneTokenRollout(**SMALL, **{name: value})


# ---- the study -----------------------------------------------------------------------------------------------


def test_the_studys_arms_are_what_they_are_called():
    assert study.arms["SFT"] == {"mix_sft": 1.0}
    for arm in ("DFT", "softmax, DFT"):
        assert {**study.arms[arm]}.items() >= {"rollout": "exact", "kappa": 1.0, "beta": 0.0}.items()
    learner = OneTokenRollout(**SMALL, **study.arms["OTR"])
    assert (learner.config.beta, learner.config.kappa, learner.config.num_samples) == (-0.1, 1.3, 64)


def row(arm: str, seed: int, accuracy: float, forgotten: float = 0.0) -> dict[str, object]:
    return {"arm": arm, "seed": seed, "accuracy": accuracy, "forgotten": forgotten}


def test_the_claim_can_fail():
    good = {"SFT": (0.65, 0.3), "OTR": (0.9, 0.1), "softmax, SFT": (0.7, 0), "softmax, OTR": (0.998, 0),
            "softmax, DFT": (0.996, 0), "softmax, beta 0.6": (0.35, 0)}  # fmt: skip
    worse = {"noise": ("OTR", (0.74, 0.1)), "forgetting": ("OTR", (0.9, 0.35)), "cap": ("SFT", (0.78, 0.3)),
             "SFT copies": ("softmax, SFT", (0.75, 0)), "OTR decides": ("softmax, OTR", (0.9, 0)),
             "DFT decides": ("softmax, DFT", (0.9, 0)), "beta flattens": ("softmax, beta 0.6", (0.6, 0))}  # fmt: skip

    def verdicts(figures):
        rows = [row(arm, s, a + 1e-4 * s, f) for arm, (a, f) in figures.items() for s in range(3)]
        return {v.name: v.shown for v in study.judge(rows)}

    assert all(verdicts(good).values()) and set(verdicts(good)) == set(worse)
    for name, (arm, figures) in worse.items():
        assert not verdicts({**good, arm: figures})[name]
