"""SCoRe: each equation against sums written out, the identities of its card, and the learner on two attempts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from closeness import close, normal

from polrl import Run, equations
from polrl.core import conformance
from polrl.core.errors import KnobError, UnknownNameError
from polrl.language import score
from polrl.language.score import (
    OUTCOMES,
    SCoRe,
    attempt_returns,
    imitation_loss,
    kl_regularized_objective,
    kl_weights,
    leave_one_out,
    multi_turn_objective,
    self_correction_metrics,
    shaped_rewards,
    stage_one_objective,
    stage_two_objective,
    study,
    surrogate_loss,
    token_kl,
)
from polrl.models.causal_lm import Completions, token_log_probs
from polrl.models.tiny_lm import encode, load_tiny_lm
from polrl.worlds.text_tasks import RewardError, held_out

ROWS, TOKENS, WORDS, GROUP = 6, 5, 4, 3


def bits(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softmax(row: list[float]) -> list[float]:
    weights = [math.exp(x - max(row)) for x in row]
    return [w / sum(weights) for w in weights]


def batch(**changes):
    """Return arguments of E7: six rows of five tokens, attempts of unequal lengths, an instruction in between."""
    m1 = torch.zeros(ROWS, TOKENS, dtype=torch.float64)
    m2 = torch.zeros_like(m1)
    m1[:, 0], m1[::2, 1] = 1, 1
    m2[:, 3], m2[1::2, 4] = 1, 1
    arguments = {
        "logits": normal(ROWS, TOKENS, WORDS, seed=1),
        "ref_logits": normal(ROWS, TOKENS, WORDS, seed=2),
        "ids": torch.randint(WORDS, (ROWS, TOKENS), generator=torch.Generator().manual_seed(3)),
        "m1": m1,
        "m2": m2,
        "return1": normal(ROWS, seed=4),
        "return2": normal(ROWS, seed=5),
        "group": GROUP,
        "c1": 0.7,
        "c2": 0.2,
    }
    return arguments | changes


def by_hand(logits, ref_logits, ids, m1, m2, return1, return2, group, c1, c2):
    """Return E7 and its parts, written as sums over plain numbers."""
    policy, kl = 0.0, [0.0, 0.0]
    for b in range(ROWS):
        first = b - b % group
        for i, (mask, returns) in enumerate(((m1, return1), (m2, return2))):
            others = [float(returns[j]) for j in range(first, first + group) if j != b]
            advantage = float(returns[b]) - sum(others) / len(others)
            for t in range(TOKENS):
                if float(mask[b, t]) == 0:
                    continue
                p, q = softmax(logits[b, t].tolist()), softmax(ref_logits[b, t].tolist())
                policy -= advantage * math.log(p[int(ids[b, t])]) / ROWS
                kl[i] += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) / ROWS
    return policy + c1 * kl[0] + c2 * kl[1], policy, *kl


def gradient(**changes) -> torch.Tensor:
    arguments = batch(**changes)
    leaf = arguments["logits"].clone().requires_grad_()
    (found,) = torch.autograd.grad(surrogate_loss(**arguments | {"logits": leaf}).loss, leaf)
    return found


# ---- E1 to E4: what is maximised -----------------------------------------------------------------------------


def test_e1_counts_both_attempts():
    close(multi_turn_objective(bits(1, 0, 1), bits(1, 1, 0)), 4 / 3)


def test_e2_pays_for_the_kl_of_a_rollout():
    reward, kl = bits(1, 0), bits(0.5, 2.0)
    close(kl_regularized_objective(reward, kl, 0.1), ((1 - 0.05) + (0 - 0.2)) / 2)


def test_e3_and_e4_are_sums_over_rollouts():
    r1, r2, kl1, kl2 = bits(1, 0, 1, 0), bits(1, 1, 0, 0), normal(4, seed=1).abs(), normal(4, seed=2).abs()
    one = sum(float(r2[b] - 0.3 * kl1[b] - 0.1 * kl2[b]) for b in range(4)) / 4
    two = sum(float(r1[b] + r2[b] - 0.1 * (kl1[b] + kl2[b])) for b in range(4)) / 4
    close(stage_one_objective(r2, kl1, kl2, beta1=0.1, beta2=0.2), one)
    close(stage_two_objective(r1, r2, kl1, kl2, beta1=0.1), two)


def test_e4_is_e2_for_each_attempt_and_e1_without_a_price():
    r1, r2, kl1, kl2 = bits(1, 0, 1, 0), bits(1, 1, 0, 0), normal(4, seed=1).abs(), normal(4, seed=2).abs()
    both = kl_regularized_objective(r1, kl1, 0.3) + kl_regularized_objective(r2, kl2, 0.3)
    close(stage_two_objective(r1, r2, kl1, kl2, 0.3), both)
    close(stage_two_objective(r1, r2, kl1, kl2, 0.0), multi_turn_objective(r1, r2))


# ---- E5, E6: what an attempt is credited with ----------------------------------------------------------------

FIRST, SECOND = bits(0, 1, 1, 0), bits(1, 0, 1, 0)  # mended, spoilt, right twice, wrong twice


@pytest.mark.parametrize("alpha", [0.0, 1.0, 10.0])
def test_e5_is_the_cards_table(alpha):
    shaped1, shaped2 = shaped_rewards(FIRST, SECOND, alpha, stage=2)
    close(shaped1, FIRST)
    close(shaped2, [1 + alpha, -alpha, 1.0, 0.0])


def test_e5_in_stage_one_pays_for_the_second_attempt_only():
    shaped1, shaped2 = shaped_rewards(FIRST, SECOND, 10.0, stage=1)
    close(shaped1, [0.0] * 4)
    close(shaped2, SECOND)


def test_e5_the_mean_bonus_is_alpha_times_delta():
    r1, r2 = bits(1, 0, 1, 0, 0, 0, 1), bits(1, 1, 0, 1, 0, 1, 1)
    shaped1, shaped2 = shaped_rewards(r1, r2, 3.0)
    close((shaped1 + shaped2 - r1 - r2).mean(), 3 * self_correction_metrics(r1, r2)["delta"])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 10.0])
@pytest.mark.parametrize(("p1", "q"), [(0.6, 0.8), (0.6, 0.4), (0.5, 0.5)])
def test_e5_multiplies_the_preference_for_solving_again(alpha, p1, q):
    """Identity 7: the second attempt copies the first, or solves anew and is right with probability q."""
    expected = {}
    for way, law in {
        "copy": {(1, 1): p1, (0, 0): 1 - p1},
        "solve": {(a, b): (p1 if a else 1 - p1) * (q if b else 1 - q) for a in (0, 1) for b in (0, 1)},
    }.items():
        expected[way] = sum(p * float(shaped_rewards(bits(a), bits(b), alpha)[1]) for (a, b), p in law.items())
    close(expected["copy"], p1)
    close(expected["solve"] - expected["copy"], (1 + alpha) * (q - p1))


def test_e6_without_gamma_leaves_each_attempt_its_own():
    found = attempt_returns(bits(1, 0), bits(-10, 11))
    close(found[0], [1.0, 0.0])
    close(found[1], [-10.0, 11.0])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0, 10.0])
def test_e6_with_gamma_one_a_bonus_above_one_punishes_a_right_first_answer(alpha):
    """Identity 8."""
    found, second = attempt_returns(*shaped_rewards(FIRST, SECOND, alpha), gamma=1.0)
    close(found, (1 - alpha) * FIRST + (1 + alpha) * SECOND)
    close(second, shaped_rewards(FIRST, SECOND, alpha)[1])
    right_then_wrong, wrong_twice = float(found[1]), float(found[3])
    assert (right_then_wrong < wrong_twice) == (alpha > 1)


def test_e6_with_half_a_gamma():
    close(attempt_returns(bits(1, 0), bits(4, -2), 0.5)[0], [3.0, -1.0])


# ---- E7: the loss --------------------------------------------------------------------------------------------


def test_e7a_compares_with_the_others_of_the_group():
    close(leave_one_out(bits(1, 0, 0, 3, 5, 10), 3), [1.0, -0.5, -0.5, -4.5, -1.5, 6.0])


def test_e7a_sums_to_zero_in_each_group_and_is_k_over_k_minus_one_times_the_distance_from_the_mean():
    returns = normal(12)
    found = leave_one_out(returns, 4).reshape(3, 4)
    close(found.sum(dim=1), [0.0] * 3)
    rows = returns.reshape(3, 4)
    close(found, (rows - rows.mean(dim=1, keepdim=True)) * 4 / 3)


@pytest.mark.parametrize("same", [0.0, 1.0, -10.0])
def test_e7a_of_equal_rewards_is_zero(same):
    assert not leave_one_out(torch.full((8,), same, dtype=torch.float64), 4).any()


def test_e7b_is_the_kl_of_the_policy_from_the_reference():
    logits, ref = normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    found = token_kl(logits, ref)
    for i in range(2):
        for t in range(3):
            p, q = softmax(logits[i, t].tolist()), softmax(ref[i, t].tolist())
            close(found[i, t], sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    assert bool((found > 0).all())


def test_e7b_is_zero_with_zero_gradient_at_the_reference():
    logits = normal(3, 4).requires_grad_()
    value = token_kl(logits, logits)
    (slope,) = torch.autograd.grad(value.sum(), logits)
    close(value, torch.zeros(3))
    close(slope, torch.zeros(3, 4))


def test_e7b_has_a_gradient_by_the_policy_only():
    logits, ref = normal(3, 4, seed=1).requires_grad_(), normal(3, 4, seed=2).requires_grad_()
    by_policy, by_ref = torch.autograd.grad(token_kl(logits, ref).sum(), (logits, ref), allow_unused=True)
    p, log_ratio = torch.softmax(logits, 1), torch.log_softmax(logits, 1) - torch.log_softmax(ref, 1)
    close(by_policy, p * (log_ratio - (p * log_ratio).sum(1, keepdim=True)))
    assert by_ref is None


def test_e7c_prices_the_first_attempt_higher_in_stage_one():
    assert kl_weights(0.25, 0.5, 1) == (0.75, 0.25)
    assert kl_weights(0.25, 0.5, 2) == (0.25, 0.25)


def test_e7_and_its_parts_are_the_sums_written_out():
    found = surrogate_loss(**batch())
    for value, expected in zip((found.loss, found.policy, found.kl1, found.kl2), by_hand(**batch()), strict=True):
        close(value, expected)


def test_e7s_gradient_in_closed_form():
    """Of row b's logits at t: (A (softmax - chosen) + c dKL) / B, with the mask of the token's attempt."""
    arguments = batch()
    logits, ref = arguments["logits"], arguments["ref_logits"]
    p = torch.softmax(logits, -1)
    log_ratio = torch.log_softmax(logits, -1) - torch.log_softmax(ref, -1)
    chosen = torch.nn.functional.one_hot(arguments["ids"], WORDS)
    slope = p * (log_ratio - (p * log_ratio).sum(-1, keepdim=True))
    expected = torch.zeros_like(logits)
    for mask, returns, price in (("m1", "return1", 0.7), ("m2", "return2", 0.2)):
        rows = arguments[returns].reshape(-1, GROUP)
        advantage = ((rows - rows.mean(1, keepdim=True)) * GROUP / (GROUP - 1)).reshape(-1, 1, 1)
        expected += arguments[mask].unsqueeze(-1) * (advantage * (p - chosen) + price * slope) / ROWS
    close(gradient(), expected)


def test_e7_has_no_gradient_through_returns_and_reference():
    arguments = batch()
    leaves = [arguments[name].requires_grad_() for name in ("logits", "ref_logits", "return1", "return2")]
    by = torch.autograd.grad(surrogate_loss(**arguments).loss, leaves, allow_unused=True)
    assert by[0] is not None and by[1:] == (None, None, None)


def test_stage_one_without_kl_does_not_touch_the_first_attempt():
    """Identity 2: whatever the rewards and the bonus are, no logit of the first attempt moves."""
    shaped1, shaped2 = shaped_rewards(bits(1, 0, 1, 0, 1, 0), bits(1, 1, 0, 0, 1, 0), 10.0, stage=1)
    return1, return2 = attempt_returns(shaped1, shaped2)
    c1, c2 = kl_weights(0.0, 0.0, 1)
    found = gradient(return1=return1, return2=return2, c1=c1, c2=c2)
    assert not found[batch()["m1"] > 0].any()
    assert found[batch()["m2"] > 0].any()


def test_instruction_and_padding_get_no_gradient():
    arguments = batch()
    elsewhere = (arguments["m1"] + arguments["m2"]) == 0
    assert elsewhere.any() and not gradient()[elsewhere].any()


def test_what_stands_on_padding_does_not_matter_even_nan():
    arguments = batch()
    elsewhere = ((arguments["m1"] + arguments["m2"]) == 0).unsqueeze(-1)
    spoilt = {name: arguments[name].masked_fill(elsewhere, math.nan) for name in ("logits", "ref_logits")}
    close(surrogate_loss(**batch(**spoilt)).loss, surrogate_loss(**arguments).loss)
    close(gradient(**spoilt), gradient())


def test_a_group_of_equal_returns_has_no_policy_gradient():
    same = torch.ones(ROWS, dtype=torch.float64)
    assert not gradient(return1=same, return2=-10 * same, c1=0.0, c2=0.0).any()


def test_a_row_without_tokens_counts_in_the_mean():
    arguments = batch()
    arguments["m1"][0], arguments["m2"][0] = 0, 0
    close(surrogate_loss(**arguments).loss, by_hand(**arguments)[0])


def test_at_the_reference_the_kl_part_vanishes():
    """Identity 5: the first step's gradient does not depend on the prices."""
    at = {"ref_logits": batch()["logits"]}
    close(gradient(**at, c1=5.0, c2=5.0), gradient(**at, c1=0.0, c2=0.0))


def test_the_mean_gradient_of_e7_is_that_of_the_objective():
    """By enumeration of pairs of rollouts of one token an attempt: E4 with the bonus, each attempt on its own."""
    table1, table2 = normal(2, seed=1).requires_grad_(), normal(2, 2, seed=2).requires_grad_()
    right1, right2, alpha = bits(1, 0), bits(0, 1), 2.0
    courses = [(a, b) for a in (0, 1) for b in (0, 1)]
    log_law = torch.stack([table1.log_softmax(0)[a] + table2.log_softmax(1)[a, b] for a, b in courses])
    shaped1, shaped2 = shaped_rewards(
        torch.stack([right1[a] for a, _ in courses]), torch.stack([right2[b] for _, b in courses]), alpha
    )
    # gamma = 0: the first attempt's table is moved by its own reward, the second's by its own.
    (up1,) = torch.autograd.grad((log_law.exp() * shaped1).sum(), table1, retain_graph=True)
    (up2,) = torch.autograd.grad((log_law.exp() * shaped2).sum(), table2)
    mean = [torch.zeros_like(table1), torch.zeros_like(table2)]
    m1, m2 = bits(1, 0).expand(2, 2), bits(0, 1).expand(2, 2)
    for i in range(4):
        for j in range(4):
            ids = torch.tensor([courses[i], courses[j]])
            logits = torch.stack([torch.stack([table1, table2[a]]) for a, _ in (courses[i], courses[j])])
            pair = [i, j]
            loss = surrogate_loss(logits, logits, ids, m1, m2, shaped1[pair], shaped2[pair], 2, 0.0, 0.0).loss
            probability = log_law.detach()[pair].sum().exp()
            for total, found in zip(mean, torch.autograd.grad(loss, (table1, table2)), strict=True):
                total += probability * found
    close(mean[0], -up1)
    close(mean[1], -up2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equations_keep_the_dtype(dtype):
    arguments = {
        name: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for name, v in batch().items()
    }
    found = surrogate_loss(**arguments)
    a, b = arguments["return1"], arguments["return2"]
    outcomes = (
        found.loss, found.policy, found.kl1, found.kl2, *shaped_rewards(a, b, 10.0), *shaped_rewards(a, b, 1.0, 1),
        *attempt_returns(a, b, 0.5), leave_one_out(a, 2), multi_turn_objective(a, b),
        kl_regularized_objective(a, b, 0.1), stage_one_objective(a, b, b, 0.1, 0.1),
        stage_two_objective(a, b, a, b, 0.1), *self_correction_metrics(a, b).values(),
    )  # fmt: skip
    assert {outcome.dtype for outcome in outcomes} == {dtype}


# ---- E8: the figures -----------------------------------------------------------------------------------------


def test_e8_counts_shares_of_all_problems():
    found = self_correction_metrics(bits(0, 0, 0, 1, 1, 1, 1, 0, 0, 0), bits(1, 1, 1, 0, 1, 1, 1, 0, 0, 0))
    expected = {"accuracy_t1": 0.4, "accuracy_t2": 0.6, "delta": 0.2, "i_to_c": 0.3, "c_to_i": 0.1}
    assert set(found) == set(expected)
    for name, value in expected.items():
        close(found[name], value)


@pytest.mark.parametrize("seed", range(5))
def test_e8_delta_is_mended_less_spoilt(seed):
    """Identity 1."""
    r1, r2 = (normal(50, seed=2 * seed + i) > 0.2 for i in (0, 1))
    found = self_correction_metrics(r1.double(), r2.double())
    close(found["delta"], found["i_to_c"] - found["c_to_i"])
    close(found["delta"], found["accuracy_t2"] - found["accuracy_t1"])


# ---- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 0, -2])
def test_a_group_of_one_is_refused(group):
    with pytest.raises(ValueError, match=f"at least 2.*got {group}"):
        leave_one_out(torch.zeros(4), group)


def test_rows_that_do_not_fill_their_groups_are_refused():
    with pytest.raises(ValueError, match=r"multiple of group=4.*\(6,\)"):
        leave_one_out(torch.zeros(6), 4)


@pytest.mark.parametrize("stage", [0, 3, "stage1"])
def test_an_unknown_stage_is_refused(stage):
    for refuse in (lambda: shaped_rewards(FIRST, SECOND, 1.0, stage), lambda: kl_weights(0.1, 0.1, stage)):
        with pytest.raises(ValueError, match=f"1 or 2, got {stage!r}"):
            refuse()


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": torch.zeros(ROWS, TOKENS - 1, dtype=torch.long)},
        {"m1": torch.zeros(ROWS, TOKENS + 1)},
        {"ref_logits": torch.zeros(ROWS, TOKENS, WORDS + 1)},
        {"logits": torch.zeros(ROWS, WORDS), "ref_logits": torch.zeros(ROWS, WORDS)},
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match=r"\[B, T, V\]"):
        surrogate_loss(**batch(**changes))


def test_figures_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"at least, got \[0\]"):
        self_correction_metrics(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"one shape.*\[2\] and \[3\]"):
        self_correction_metrics(torch.zeros(2), torch.zeros(3))


def test_every_equation_of_the_card_is_there():
    assert set(equations(score)) == {*(f"E{i}" for i in range(1, 10)), "E7a", "E7b", "E7c"}


# ---- two attempts --------------------------------------------------------------------------------------------


def small(**settings) -> SCoRe:
    return SCoRe(**{"prompts": 3, "group": 2, "test_samples": 1, "stage1_steps": 2, "device": "cpu", **settings})


def writing(monkeypatch, *attempts: tuple[list[str], list[bool]]) -> None:
    """Let the sampler write what is given, call by call: texts with their ends, and whether they are finished."""
    waiting = list(attempts)

    def write(model, prompt_ids, prompt_mask, *, eos, **_):
        texts, finished = waiting.pop(0)
        rows = [[*encode(text), *([eos] if end else [])] for text, end in zip(texts, finished, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
        return Completions(ids, mask, torch.tensor(finished))

    monkeypatch.setattr(score, "sample", write)


def played_by_hand(monkeypatch, learner, first, second, sums=("37+5=", "40+2=", "10+3=")):
    problems = [
        p for split in ("train", "test") for text in sums for p in learner.task.problems(split) if p.prompt == text
    ]
    problems.sort(key=lambda problem: sums.index(problem.prompt))
    writing(monkeypatch, first, second)
    return learner.attempt(learner.model, problems, learner.rng.torch)


def test_the_environment_asks_again_and_masks_hold_each_attempts_own_tokens(monkeypatch):
    learner = small()
    played = played_by_hand(
        monkeypatch, learner, (["42", "4", "13"], [True, True, True]), (["42", "42", "31"], [True] * 3)
    )
    sequence, end = encode("42;?42"), learner.task.second_end
    assert played.ids[0].tolist() == [*sequence, end]
    assert played.ids[1].tolist() == [*encode("4;"), 0, *encode("?42"), end]
    assert played.m1.tolist() == [[1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    assert played.m2.tolist() == [[0, 0, 0, 0, 1, 1, 1]] * 3
    assert played.mask.tolist() == [[1] * 7, [1, 1, 0, 1, 1, 1, 1], [1] * 7]
    assert played.texts == (["42", "4", "13"], ["42", "42", "31"])
    assert played.r1.tolist() == [1, 0, 1] and played.r2.tolist() == [1, 1, 0]


def test_an_attempt_without_its_end_earns_nothing(monkeypatch):
    learner = small()
    played = played_by_hand(
        monkeypatch, learner, (["42", "42", "130"], [False, True, False]), (["42", "421", "13"], [True, False, False])
    )
    assert played.r1.tolist() == [0, 1, 0] and played.r2.tolist() == [1, 0, 0]
    assert played.m1.sum(dim=1).tolist() == [2, 3, 3] and played.m2.sum(dim=1).tolist() == [3, 3, 2]


def test_a_first_attempt_ends_by_its_own_token_and_the_second_by_another():
    learner, asked = small(prompts=200, group=2), []
    original = score.sample

    def spy(*arguments, **options):
        asked.append((options["eos"], options["max_new_tokens"], options.get("temperature", 1.0)))
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "sample", spy)
        learner.update()
    assert asked == [(encode(";")[0], 3, 1.0), (learner.task.second_end, 3, 1.0)]


def test_padding_between_the_attempts_changes_no_probability(monkeypatch):
    """A short first attempt beside a longer one has the second attempt's probabilities it has alone."""
    learner = small()
    sums = ("37+5=", "40+2=")
    alone = played_by_hand(monkeypatch, learner, (["4"], [True]), (["42"], [True]), sums[1:])
    beside = played_by_hand(monkeypatch, learner, (["42", "4"], [True, True]), (["42", "42"], [True] * 2), sums)
    found = [  # what precedes the instruction is padding in one of them, and nobody asks for its prediction
        token_log_probs(played.logits(learner.model), played.ids)[-1][(played.m1 + played.m2)[-1] > 0]
        for played in (alone, beside)
    ]
    close(found[1], found[0], 1e-4)


def test_what_is_drawn_is_what_the_model_says():
    """Seeds apart, the mean probability of the drawn tokens is that of the distribution: ratios are 1 at sampling."""
    learner = small(test_samples=4)
    played = learner.attempt(learner.model, learner.held_out, learner.rng.torch)
    log_pi = played.logits(learner.model).log_softmax(-1)
    chosen = token_log_probs(played.logits(learner.model), played.ids)
    entropy = -(log_pi.exp() * log_pi).sum(-1)
    for mask in (played.m1, played.m2):
        surprise, expected = (-(mask * chosen).sum(1)).mean(), (mask * entropy).sum(1).mean()
        spread = (-(mask * chosen).sum(1)).std() / len(chosen) ** 0.5
        assert abs((surprise - expected).item()) < 4 * spread.item()


# ---- attempts of unequal means -------------------------------------------------------------------------------

UNEQUAL = {"task": "unequal", "test_samples": 1}
COLUMNS = "7+5+0:12,3+8+1:12|122"


def test_each_task_has_its_own_base_model_unless_one_is_named():
    def weights(model):
        return [parameter.detach() for parameter in model.parameters()]

    for settings, name in (({}, "correct-S"), (UNEQUAL, "scratch-S"), ({**UNEQUAL, "model": "add-S"}, "add-S")):
        learner = small(**settings)
        assert same(weights(learner.model), weights(load_tiny_lm(name)))
        assert same(weights(learner.reference), weights(load_tiny_lm(name)))
    with pytest.raises(KnobError, match="task"):
        small(task="unlike")


def test_unequal_attempts_have_masks_of_their_own_tokens_alone(monkeypatch):
    learner = small(**UNEQUAL)
    played = played_by_hand(
        monkeypatch, learner, (["112", "97"], [True, True]), ([COLUMNS, "97"], [True, True]), ("37+85=", "47+50=")
    )
    end, padding = learner.task.second_end, [0] * (len(COLUMNS) - 2)
    assert played.ids.tolist() == [
        [*encode("112;?" + COLUMNS), end],
        [*encode("97;"), 0, *encode("?97"), end, *padding],
    ]
    assert played.m1.tolist() == [[1] * 4 + [0] * 23, [1] * 3 + [0] * 24]
    assert played.m2.tolist() == [[0] * 5 + [1] * 22, [0] * 5 + [1] * 3 + [0] * 19]
    assert played.r1.tolist() == [0, 1] and played.r2.tolist() == [1, 1]


def test_columns_that_come_to_the_first_answer_repeat_it(monkeypatch):
    learner, alike = small(**UNEQUAL), small()
    first, second = (["122", "112", "122"], [True] * 3), ([COLUMNS, COLUMNS, "122"], [True] * 3)
    found = learner.figures(played_by_hand(monkeypatch, learner, first, second, ("37+85=",) * 3))
    close(found["same_answer"], 2 / 3, 1e-6)
    close(found["scratchpad"], 2 / 3, 1e-6)
    assert "scratchpad" not in alike.base


def test_an_update_of_unequal_attempts_keeps_to_the_limits_and_trains_neither_prompt_nor_instruction(monkeypatch):
    learner, played = small(**UNEQUAL, group=4, prompts=12, stage1_steps=1), []
    limits, original, attempt = [], score.sample, learner.attempt

    def spy(*arguments, **options):
        limits.append((options["eos"], options["max_new_tokens"]))
        return original(*arguments, **options)

    def keep(*arguments):
        played.append(attempt(*arguments))
        return played[-1]

    monkeypatch.setattr(score, "sample", spy)
    monkeypatch.setattr(learner, "attempt", keep)
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    for stage in (1, 2):
        assert learner.stage == stage
        learner.update()
    assert limits == [(encode(";")[0], 4), (learner.task.second_end, 22)] * 2
    assert not same(before, list(learner.model.parameters()))
    for tries in played:
        instruction = int(tries.m1.any(dim=0).nonzero().max()) + 1
        assert tries.prompt_ids.shape == (48, 7) and len(tries.ids) == 48
        assert bool((tries.ids[:, instruction] == learner.task.instruction).all())
        assert not (tries.m1 + tries.m2)[:, instruction].any() and not (tries.m1 * tries.m2).any()
        assert bool((tries.mask[:, instruction] == 1).all())
        assert 0 < float(tries.m1.sum(dim=1).max()) <= 4 < float(tries.m2.sum(dim=1).max()) <= 22
        assert torch.equal(
            tries.m1 + tries.m2 == 1, (tries.mask == 1) & (torch.arange(tries.ids.shape[1]) != instruction)
        )


def test_the_unequal_base_model_errs_at_first_and_sometimes_works():
    found = {name: float(value) for name, value in small(**UNEQUAL).base.items()}
    assert 0.15 < found["accuracy_t1"] < 0.45
    assert found["accuracy_t1"] - 0.05 < found["accuracy_t2"] < 0.55
    assert 0.15 < found["scratchpad"] < 0.5 < found["same_answer"]


def test_views_of_unequal_attempts():
    learner = small(**UNEQUAL)
    views = learner.views()
    for shares in views["flow"].values.values():
        assert sum(shares) == pytest.approx(1.0, abs=1e-6)
    lines, values = views["attempts"].lines, views["attempts"].values
    assert len(lines) == 8 and "".join("".join(line) for line in lines).count("?") == 16
    assert [len(line) for line in lines] == [len(marks) for marks in values]
    assert "|" in "".join("".join(line) for line in lines)
    distance = views["distance"]
    assert distance.labels == ("1st columns", "1st answer", "1st end", "2nd columns", "2nd answer", "2nd end")
    assert not np.asarray(distance.values["KL"]).round(6).any()


def test_the_distance_of_unequal_attempts_is_shown_by_part(monkeypatch):
    learner = small(**UNEQUAL)
    played = played_by_hand(
        monkeypatch, learner, (["112", "97"], [True, True]), ([COLUMNS, "97"], [True, True]), ("37+85=", "47+50=")
    )
    # Of each token its place, and 100 where nothing may be counted.
    kl = torch.where(played.m1 + played.m2 > 0, torch.arange(27.0), 100.0)
    found = score.kl_by_part(played, kl)
    columns = len(COLUMNS) - 3
    expected = {
        "1st columns": 0.0,
        "1st answer": (0 + 1 + 2 + 0 + 1) / 5,
        "1st end": (3 + 2) / 2,
        "2nd columns": sum(range(5, 5 + columns)) / columns,
        "2nd answer": (23 + 24 + 25 + 5 + 6) / 5,
        "2nd end": (26 + 7) / 2,
    }
    assert found == pytest.approx(expected)


# ---- the learner ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_is_adams_on_e7_with_the_stages_rewards_and_prices(stage):
    settings = {"alpha": 3.0, "beta1": 0.2, "beta2": 0.7, "gamma": 0.5, "learning_rate": 1e-3, "group": 4}
    learner = small(stage1_steps=0 if stage == 2 else 9, **settings)
    learner.update()  # away from the base model, so that the KL has a gradient
    twin = learner.fork()
    learner.update()

    problems = twin.task.prompts(3, twin.rng.numpy)
    played = twin.attempt(twin.model, [problem for problem in problems for _ in range(4)], twin.rng.torch)
    second = played.r2 + 3.0 * (played.r2 - played.r1) if stage == 2 else played.r2
    first = played.r1 + 0.5 * second if stage == 2 else torch.zeros_like(second)
    logits, ref = played.logits(twin.model), played.logits(twin.reference).detach()
    assert float(torch.stack([first, second]).std()) > 0, "this seed's rollouts must differ"
    loss = surrogate_loss(
        logits, ref, played.ids, played.m1, played.m2, first, second, 4, 0.2 + (0.7 if stage == 1 else 0.0), 0.2
    ).loss
    twin.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)
    twin.optimizer.step()
    for one, other in zip(learner.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def after(steps: int, **settings) -> list[torch.Tensor]:
    learner = small(group=4, **settings)
    for _ in range(steps):
        learner.update()
    return [parameter.detach().clone() for parameter in learner.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bonus_and_gamma_do_nothing_in_stage_one_and_beta2_nothing_in_stage_two():
    one, two = {"stage1_steps": 9}, {"stage1_steps": 0}
    assert same(after(2, **one), after(2, **one, alpha=0.0, gamma=1.0))
    assert not same(after(2, **one), after(2, **one, beta2=0.01))
    assert same(after(2, **two), after(2, **two, beta2=0.01))
    assert not same(after(2, **two), after(2, **two, alpha=0.0))
    assert not same(after(2, **two), after(2, **two, gamma=1.0))
    assert not same(after(2, **one), after(2, **one, beta1=0.5))


def test_the_gradient_is_clipped_at_norm_one():
    learner = small(stage1_steps=0, group=4, prompts=6)
    norm = float(learner.update()["gradient_norm"])
    left = torch.stack([parameter.grad.norm() for parameter in learner.model.parameters()]).norm()
    assert norm > 1 and float(left) == pytest.approx(1.0, abs=1e-3)


def test_rollouts_of_one_prompt_lie_next_to_each_other_and_are_training_problems(monkeypatch):
    learner, seen = small(group=3, prompts=40), []
    original = learner.attempt

    def spy(model, problems, generator):
        seen.append(problems)
        return original(model, problems, generator)

    monkeypatch.setattr(learner, "attempt", spy)
    learner.update()
    learner.evaluate()
    trained, judged = seen
    assert len(trained) == 120 and all(trained[i] == trained[i - i % 3] for i in range(120))
    assert not any(held_out(problem.numbers) for problem in trained)
    assert all(held_out(problem.numbers) for problem in judged)


def test_stages_follow_each_other_and_stage_one_can_be_left_out():
    learner = small()
    stages = []
    for _ in range(4):
        stages.append(learner.stage)
        learner.update()
    assert stages == [1, 1, 2, 2]
    assert small(stage1_steps=0).stage == 2
    assert SCoRe.Config().stage1_steps + SCoRe.Config().stage2_steps == SCoRe(device="cpu", test_samples=1).budget


def test_an_untrained_learner_is_the_base_model():
    found = {name: float(value) for name, value in small(test_samples=2).evaluate().items()}
    assert found["delta_gain"] == found["t1_shift"] == 0.0
    assert abs(found["kl_t1"]) < 1e-6 and abs(found["kl_t2"]) < 1e-6
    assert found["not_spoilt"] == pytest.approx(1 - found["c_to_i"])


def test_the_base_model_errs_at_random_and_repeats_itself():
    """What the checkpoint is for: room for a first attempt to improve, and a second that copies."""
    found = {name: float(value) for name, value in small(test_samples=8).base.items()}
    assert 0.5 < found["accuracy_t1"] < 0.75
    assert found["same_answer"] > 0.65
    assert found["i_to_c"] < 0.1 and found["delta"] < 0.05


def test_the_kl_of_a_trained_learner_is_that_of_each_attempt():
    learner = small(group=4, stage1_steps=9)
    for _ in range(3):
        learner.update()
    found = learner.evaluate()
    again = small(group=4, stage1_steps=9)
    again.load_state(learner.state())
    generator = torch.Generator().manual_seed(0)
    played = again.attempt(again.model, again.held_out, generator)
    with torch.no_grad():
        kl = token_kl(played.logits(again.model), played.logits(again.reference))
    assert float(found["kl_t2"]) > 0
    assert float(found["kl_t1"]) == pytest.approx(float((kl * played.m1).sum(1).mean()), rel=0.5)
    assert float(found["kl_t2"]) == pytest.approx(float((kl * played.m2).sum(1).mean()), rel=0.5)


def test_views_count_every_problem_and_colour_the_attempts():
    learner = small(test_samples=2)
    views = learner.views()
    for shares in views["flow"].values.values():
        assert sum(shares) == pytest.approx(1.0, abs=1e-6) and min(shares) >= -1e-6
    assert views["flow"].labels == OUTCOMES
    assert sum("".join(line).count("?") for line in views["attempts"].lines) == 16
    for line, marks in zip(views["attempts"].lines, views["attempts"].values, strict=True):
        assert set(np.unique(marks)) <= {-1.0, 0.0, 1.0} and marks.any()
        assert all(mark == 0 for token, mark in zip(line, marks, strict=True) if token in "+=? ")
    assert not np.asarray(views["distance"].values["KL"]).round(6).any()


def test_the_credit_view_follows_stage_and_knobs():
    one, two = small(alpha=3.0), small(alpha=3.0, gamma=0.5, stage1_steps=0)
    close(one.views()["credit"].values["first attempt"], [0.0] * 4)
    close(one.views()["credit"].values["second attempt"], [1.0, 0.0, 0.0, 1.0])
    close(two.views()["credit"].values["second attempt"], [4.0, -3.0, 0.0, 1.0])
    close(two.views()["credit"].values["first attempt"], [2.0, -0.5, 0.0, 1.5])


# ---- what is refused -----------------------------------------------------------------------------------------


def raising(problems, texts, finished):
    raise ZeroDivisionError("no verifier today")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (raising, "raising raised ZeroDivisionError.*row 0"),
        (lambda problems, texts, finished: [float("nan")] * len(texts), "returned nan at row 0"),
        (lambda problems, texts, finished: [1.0], r"shape \[1\]; allowed: \[6\]"),
    ],
)
def test_a_reward_function_that_fails_stops_the_step_before_anything_is_learned(monkeypatch, reward, words):
    learner = small()
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    monkeypatch.setattr(learner.task, "reward", reward)
    with pytest.raises(RewardError, match=words):
        learner.update()
    assert same(before, list(learner.model.parameters())) and learner.step == 0


# ---- STaR ----------------------------------------------------------------------------------------------------


def test_star_sums_over_the_second_attempts_tokens_and_means_over_traces():
    given = batch()
    logits, ids, m2 = given["logits"], given["ids"], given["m2"]
    total = 0.0
    for b in range(ROWS):
        for t in range(TOKENS):
            if m2[b, t]:
                total -= math.log(softmax(logits[b, t].tolist())[int(ids[b, t])])
    close(imitation_loss(logits, ids, m2), total / ROWS)


def test_stars_gradient_in_closed_form_leaves_all_but_the_second_attempt_alone():
    given = batch()
    logits, ids, m2 = given["logits"].requires_grad_(), given["ids"], given["m2"]
    imitation_loss(logits, ids, m2).backward()
    chosen = torch.nn.functional.one_hot(ids, WORDS).double()
    close(logits.grad, m2.unsqueeze(-1) * (logits.detach().softmax(-1) - chosen) / ROWS)
    broken = logits.detach().where(m2.unsqueeze(-1) > 0, math.nan).requires_grad_()
    imitation_loss(broken, ids, m2).backward()
    close(broken.grad, logits.grad)


STAR = {"method": "star", "stage1_steps": 0}


def test_star_keeps_what_was_mended_and_pads_it_without_changing_its_probability(monkeypatch):
    learner = small(**STAR, stage2_steps=9)
    texts = ["41", "4", "13"], ["42", "42", "13"]
    played = played_by_hand(monkeypatch, learner, (texts[0], [True] * 3), (texts[1], [True] * 3))
    assert [*zip(played.r1.tolist(), played.r2.tolist(), strict=True)] == [(0, 1), (0, 1), (1, 1)]
    kept = learner.no_traces().joined(played, (played.r1 == 0) & (played.r2 == 1))
    assert kept.ids.shape == (2, learner.task.first_tokens + 1 + learner.task.second_tokens)
    ours = imitation_loss(kept.logits(learner.model), kept.ids, kept.m2)
    torch.testing.assert_close(
        ours, imitation_loss(played.logits(learner.model)[:2], played.ids[:2], played.m2[:2]), rtol=1e-5, atol=1e-5
    )
    again = kept.joined(played, torch.tensor([True, False, False]))
    assert torch.equal(again.drawn(torch.tensor([2])).ids, kept.ids[:1]) and len(again.ids) == 3


def test_a_step_of_star_is_adams_on_traces_that_the_player_mended():
    learner = small(**STAR, stage2_steps=300, prompts=40, learning_rate=1e-3)
    learner.update()
    twin = learner.fork()
    learner.update()

    played = twin.play(twin.player)
    assert 0 < float(((played.r1 == 0) & (played.r2 == 1)).sum()) < 40, "this seed's rollouts must mend some"
    kept = twin.traces.joined(played, (played.r1 == 0) & (played.r2 == 1))
    assert torch.equal(kept.ids, learner.traces.ids)
    batch = kept.drawn(torch.randint(len(kept.ids), (80,), generator=twin.rng.torch))
    twin.optimizer.zero_grad()
    imitation_loss(batch.logits(twin.model), batch.ids, batch.m2).backward()
    torch.nn.utils.clip_grad_norm_(twin.model.parameters(), 1.0)
    twin.optimizer.param_groups[0]["lr"] = 1e-3
    twin.optimizer.step()
    for one, other in zip(learner.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_student_of_star_plays_next_and_a_new_one_begins_as_the_base_model():
    learner = small(**STAR, stage2_steps=8, prompts=40)  # an iteration is three steps
    base = [parameter.detach().clone() for parameter in learner.reference.parameters()]
    for _ in range(3):
        assert same(base, list(learner.player.parameters()))
        learner.update()
    student = [parameter.detach().clone() for parameter in learner.model.parameters()]
    assert not same(base, student) and len(learner.traces.ids)
    learner.update()
    assert same(student, list(learner.player.parameters()))
    assert all(int(state["step"]) == 1 for state in learner.optimizer.state.values())


def test_star_without_anything_mended_learns_nothing(monkeypatch):
    learner = small(**STAR)
    monkeypatch.setattr(learner.task, "reward", lambda problems, texts, finished: torch.zeros(len(problems)))
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    found = learner.update()
    assert found["traces"] == 0 and "imitation_loss" not in found
    assert same(before, list(learner.model.parameters()))


@pytest.mark.parametrize("task", ["alike", "unequal"])
def test_star_has_no_stages_and_no_credit_to_show(task):
    with pytest.raises(KnobError, match=r"stage1_steps=2; allowed: 0 with method='star'"):
        small(method="star")
    learner = small(**STAR, task=task)
    learner.update()
    assert {"flow", "attempts", "distance"} == set(learner.views())


@pytest.mark.parametrize(
    "check",
    [
        conformance.check_observation_is_pure,
        conformance.check_fork,
        conformance.check_rewind,
        conformance.check_resume,
        conformance.check_replay,
        conformance.check_device,
    ],
    ids=lambda check: check.__name__,
)
def test_star_keeps_the_contract(check):
    settings = {**STAR, "prompts": 12, "group": 2, "test_samples": 1, "stage2_steps": 6}
    check(conformance.Case(SCoRe, settings, 3))


def test_settings_that_can_not_work_are_refused():
    with pytest.raises(KnobError, match="group"):
        SCoRe(group=1)
    with pytest.raises(KnobError, match="beta2"):
        SCoRe(beta2=0.0)
    with pytest.raises(UnknownNameError, match="correct-S"):
        SCoRe(model="corect-S", device="cpu")


# ---- the claim -----------------------------------------------------------------------------------------------


def test_arms_that_are_compared_draw_as_many_rollouts():
    assert SCoRe.Config().stage1_steps + SCoRe.Config().stage2_steps == 105
    full = [job for job in study.jobs("full") if job.labels["seed"] == 0 and job.labels["arm"] != "Stage I"]
    for job in full:
        steps = [job.settings.get(name, getattr(SCoRe.Config(), name)) for name in ("stage1_steps", "stage2_steps")]
        assert job.steps == 0 and sum(steps) == 105
        unequal = job.labels["arm"].startswith("unequal: ")
        assert job.settings.get("task", "alike") == ("unequal" if unequal else "alike")
    assert {job.steps for job in study.jobs("fast")} == {50}


def test_stage_one_teaches_the_second_attempt_and_leaves_the_first():
    run = Run(SCoRe(stage1_steps=40, test_samples=8, device="cpu"), threads=1, autosave=0)
    run.advance(40)
    found = run.evaluate()
    assert run.learner.stage == 2
    assert found["delta_gain"] > 0.04 and abs(found["t1_shift"]) < 0.08
    assert found["kl_t2"] > 3 * found["kl_t1"]
