"""Text tasks: problems, verifiers, the split, and the guard around reward functions."""

from __future__ import annotations

import ast
import math
import operator
from typing import Any

import numpy as np
import pytest
import torch

from polrl.core.errors import KnobError, UnknownNameError
from polrl.core.sampling import seeded_globals
from polrl.models.causal_lm import Completions, completion_logits, token_log_probs
from polrl.models.tiny_lm import BOS, EOS, PAD, decode, encode, new_tiny_lm
from polrl.worlds.corridor import GRAB, LEFT, OPEN, RIGHT, Corridor, CorridorGames, play, play_noisily
from polrl.worlds.text_tasks import (
    Arithmetic,
    Countdown,
    Problem,
    RewardError,
    SelfCorrection,
    UnequalAttempts,
    checked_rewards,
    columns,
    held_out,
    parse_expression,
    replace_digit,
)

TASKS = [
    Arithmetic("+-", {1: 0.3, 2: 0.5, 3: 0.2}),
    Arithmetic("+-", 4, scratchpad=True),
    *(Arithmetic(operation, level) for operation in "+-" for level in (1, 2, 3, 4)),
    Countdown(2),
    Countdown(3),
    Countdown(4),
    SelfCorrection(),
    UnequalAttempts(),
]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def value(expression: str) -> int:
    """Work out an expression with Python's own parser, as an independent check."""
    operators = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}

    def walk(node: Any) -> int:
        if isinstance(node, ast.BinOp):
            return operators[type(node.op)](walk(node.left), walk(node.right))
        return node.value

    return walk(ast.parse(expression, mode="eval").body)


# ---- what all tasks share --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_own_answers_are_right_and_unended_ones_are_not(task: Any) -> None:
    problems = task.prompts(40, rng())
    answers = [problem.answer for problem in problems]
    assert task.reward(problems, answers, torch.ones(40, dtype=torch.bool)).tolist() == [1.0] * 40
    assert task.reward(problems, answers, [False] * 40).tolist() == [0.0] * 40
    assert task.reward(problems, [""] * 40, [True] * 40).tolist() == [0.0] * 40
    for problem in problems:
        assert encode(problem.prompt + problem.answer)


@pytest.mark.parametrize("task", TASKS)
def test_same_generator_same_problems(task: Any) -> None:
    assert task.prompts(20, rng(3)) == task.prompts(20, rng(3))
    assert task.prompts(20, rng(3)) != task.prompts(20, rng(4))


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_problem(task: Any) -> None:
    def content(problem: Problem) -> Any:
        numbers = sorted(problem.numbers) if isinstance(task, Countdown) else problem.numbers
        return (tuple(numbers), problem.target, problem.level)

    train, test = ({content(p) for p in task.prompts(600, rng(), split)} for split in ("train", "test"))
    assert train and test and not train & test


@pytest.mark.parametrize("task", [*TASKS, Corridor()])
@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_bad_counts_and_splits_are_refused(task: Any, count: Any) -> None:
    draw = getattr(task, "prompts", None) or task.games
    with pytest.raises(KnobError, match=f"count={count}"):
        draw(count, rng())
    with pytest.raises(UnknownNameError, match="tset.*did you mean test"):
        draw(3, rng(), "tset")


def test_split_is_the_same_everywhere_and_a_tenth() -> None:
    expected = [(10, 11), (12, 14), (13, 10), (15, 18), (16, 13), (16, 18)]
    assert [(a, b) for a in range(10, 18) for b in range(10, 20) if held_out((a, b))] == expected
    assert 0.09 < np.mean([held_out((a, b)) for a in range(100) for b in range(100)]) < 0.11


def test_verdicts_lie_where_the_flags_lie() -> None:
    problems = Arithmetic().prompts(2, rng())
    rewards = Arithmetic().reward(problems, ["x", "y"], torch.ones(2, dtype=torch.bool, device="meta"))
    assert rewards.device.type == "meta"
    assert Arithmetic().reward(problems, ["x", "y"], [True, False]).dtype == torch.float32


def test_unequal_lengths_are_refused() -> None:
    problems = Arithmetic().prompts(2, rng())
    with pytest.raises(ValueError):
        Arithmetic().reward(problems, ["1"], [True, True])


# ---- Task A ----------------------------------------------------------------------------------------------------


def test_prompts_are_padded_with_zeros_and_answers_are_not() -> None:
    assert Arithmetic().problem(7, 5, "+", 2) == Problem("07+05=", "12", (7, 5), 12, 2)
    assert Arithmetic().problem(85, 37, "-", 3) == Problem("085-037=", "48", (85, 37), 48, 3)
    assert Arithmetic(scratchpad=True).problem(37, 85, "+", 2).answer == "7+5+0:12,3+8+1:12|122"


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_columns_carry_and_add_up(digits: int) -> None:
    draws = rng()
    for _ in range(200):
        a, b = sorted(draws.integers(0, 10**digits, size=2).tolist(), reverse=True)
        carry, result = 0, 0
        for place, column in enumerate(columns(a, b, "+", digits).split(",")):
            left, total = column.split(":")
            x, y, before = map(int, left.split("+"))
            assert (x, y, before) == (a // 10**place % 10, b // 10**place % 10, carry)
            assert int(total) == x + y + carry
            carry, result = int(total) // 10, result + int(total) % 10 * 10**place
        assert result + carry * 10**digits == a + b
        borrow, result = 0, 0
        for place, column in enumerate(columns(a, b, "-", digits).split(",")):
            left, digit = column.split(":")
            x, y, before = map(int, left.split("-"))
            assert (x, y, before) == (a // 10**place % 10, b // 10**place % 10, borrow)
            borrow, result = int(x - y - borrow < 0), result + int(digit) * 10**place
            assert 0 <= int(digit) <= 9
        assert result == a - b and borrow == 0


def test_differences_are_never_negative_and_both_operations_come() -> None:
    problems = Arithmetic("+-").prompts(300, rng())
    signs = [problem.prompt[2] for problem in problems]
    assert 100 < signs.count("-") < 200
    assert min(problem.target for problem in problems) >= 0
    assert all(value("-".join(map(str, p.numbers))) == p.target for p in problems if "-" in p.prompt)


def test_levels_come_in_their_shares() -> None:
    problems = Arithmetic("+", {1: 0.3, 2: 0.5, 3: 0.2}).prompts(3000, rng())
    shares = [np.mean([p.level == level for p in problems]) for level in (1, 2, 3)]
    assert np.allclose(shares, [0.3, 0.5, 0.2], atol=0.04)
    assert all(len(p.prompt) == 2 * p.level + 2 for p in problems)


@pytest.mark.parametrize(
    ("text", "direct", "scratchpad"),
    [
        ("122", 1, 1), ("121", 0, 0), ("0122", 0, 0), ("122 ", 0, 0), ("122<bos>", 0, 0), ("", 0, 0),
        ("7+5+0:12,3+8+1:12|122", 1, 1), ("nonsense|122", 1, 1), ("122|121", 0, 0), ("122|", 0, 0), ("|5|122", 1, 1),
    ],
)  # fmt: skip
def test_what_follows_the_last_bar_counts(text: str, direct: int, scratchpad: int) -> None:
    for task, expected in ((Arithmetic(), direct), (Arithmetic(scratchpad=True), scratchpad)):
        assert task.reward([task.problem(37, 85, "+", 2)], [text], [True]).tolist() == [expected]


def test_right_form_earns_its_own_reward() -> None:
    direct, scratch = Arithmetic(format_reward=0.5), Arithmetic(scratchpad=True, format_reward=0.5)
    texts = ["122", "7", "x", "7+5+0:12,3+8+1:12|99", "7+5+0:12,|99", "7+5:12|99", "1+1+1:3|5"]
    problem = direct.problem(37, 85, "+", 2)
    assert direct.reward([problem] * 7, texts, [True] * 7).tolist() == [1, 0.5, 0, 0, 0, 0, 0]
    assert scratch.reward([problem] * 7, texts, [True] * 7).tolist() == [1, 0, 0, 0.5, 0, 0, 0.5]
    assert direct.reward([problem], ["7"], [False]).tolist() == [0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"operations": "*"}, r"\*"),
        ({"levels": 0}, "levels=0"),
        ({"levels": 5}, "levels=5"),
        ({"levels": {}}, "levels"),
        ({"levels": {2: -1.0, 1: 2.0}}, "levels"),
        ({"levels": {2: 0.0}}, "levels"),
        ({"format_reward": 1.0}, "format_reward=1.0"),
        ({"format_reward": math.nan}, "format_reward=nan"),
    ],
)
def test_bad_arithmetic_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises((KnobError, UnknownNameError), match=words):
        Arithmetic(**settings)


def test_exactly_one_digit_is_replaced_by_another() -> None:
    draws = rng()
    changed = [replace_digit("a12,3", draws) for _ in range(600)]
    for text in changed:
        assert sum(x != y for x, y in zip(text, "a12,3", strict=True)) == 1 and text[0] == "a" and text[3] == ","
    assert {text[1] for text in changed} == set("0123456789")
    with pytest.raises(KnobError, match="'abc'"):
        replace_digit("abc", draws)


# ---- Task B ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["7", "3+5+8", "2*3+4", "2+3*4", "9-3-2", "(9-3)-2", "9-(3-2)", "((2+3))*4", "2*(3+4)*5-1", "1-9*9"]
)
def test_parser_agrees_with_pythons(text: str) -> None:
    worked_out, numbers = parse_expression(text)
    assert worked_out == value(text)
    assert numbers == [int(c) for c in text if c.isdecimal()]


def test_parser_agrees_on_random_expressions() -> None:
    draws = rng()

    def grow(depth: int) -> str:
        if depth == 0 or draws.random() < 0.2:
            return str(draws.integers(0, 20))
        inner = f"{grow(depth - 1)}{draws.choice(list('+-*'))}{grow(depth - 1)}"
        return f"({inner})" if draws.random() < 0.5 else inner

    for _ in range(200):
        text = grow(4)
        assert parse_expression(text)[0] == value(text)


@pytest.mark.parametrize(
    "text",
    ["", "+", "3+", "3 + 5", "3++5", "-3", "(3", "3)", "()", "3(5)", "3/5", "3**2", "x", "3+x", "٣+1", "²",
     "__import__(1)", "1<bos>", "(" * 5000, "1" * 5000, "(" * 100 + "1" + ")" * 100],
)  # fmt: skip
def test_parser_refuses_everything_else(text: str) -> None:
    with pytest.raises(ValueError, match="expected .* at position"):
        parse_expression(text)


def test_each_number_is_used_exactly_once() -> None:
    problem = Problem("3,5,8:16=", "3+5+8", (3, 5, 8), 16, 3)
    right = ["3+5+8", "8+5+3", "(3+5)+8", "8+(5+3)"]
    wrong = ["16", "8+8", "3+5+8+0", "3+5+8*1", "35+8", "3*5+1", "8*5-3", "3+5+8=", "3+5+8;", "8*(5-3)+3-3"]
    texts = right + wrong
    expected = [1.0] * len(right) + [0.0] * len(wrong)
    assert Countdown().reward([problem] * len(texts), texts, [True] * len(texts)).tolist() == expected
    assert Countdown.solves(Problem("", "", (3, 5, 8), 16, 3), "8*(5-3)") is True


@pytest.mark.parametrize("operands", [2, 3, 4])
def test_countdown_problems_have_the_form_of_the_card(operands: int) -> None:
    for problem in Countdown(operands).prompts(200, rng()):
        numbers, target = problem.prompt[:-1].split(":")
        assert [int(n) for n in numbers.split(",")] == list(problem.numbers) and int(target) == problem.target
        assert len(problem.numbers) == operands and 1 <= min(problem.numbers) and max(problem.numbers) <= 9
        assert 1 <= problem.target <= 99 and value(problem.answer) == problem.target


@pytest.mark.parametrize("operands", [1, 5, "3"])
def test_bad_countdown_is_refused(operands: Any) -> None:
    with pytest.raises(KnobError, match="operands"):
        Countdown(operands)


# ---- Task C ----------------------------------------------------------------------------------------------------


def test_self_correction_has_the_problems_of_the_card() -> None:
    task = SelfCorrection()
    every = task.problems("train") + task.problems("test")
    assert len(every) == 800 and 60 <= len(task.problems("test")) <= 100
    assert {p.numbers for p in every} == {(a, b) for a in range(10, 90) for b in range(10)}
    assert all(p.prompt == f"{p.numbers[0]}+{p.numbers[1]}=" and len(p.answer) == 2 for p in every)


def test_two_attempts_make_thirteen_tokens() -> None:
    task = SelfCorrection()
    problems = task.prompts(4, rng())
    ids, mask = task.first_prompts(problems, "cpu")
    first = Completions(torch.tensor([[4, 5, task.first_end]] * 4), torch.ones(4, 3), torch.ones(4, dtype=torch.bool))
    ids, mask = task.second_prompts(ids, mask, first)
    assert ids.shape[1] + task.second_tokens == 13 and task.first_tokens == task.second_tokens == 3
    assert decode(ids[0]) == f"{problems[0].prompt}12;?" and mask.all()
    assert [decode([token]) for token in (task.first_end, task.instruction)] == [";", "?"] and task.second_end == EOS


def test_short_first_attempt_leaves_padding_before_the_instruction() -> None:
    task = SelfCorrection()
    ids, mask = task.first_prompts(task.prompts(2, rng()), "cpu")
    semicolon = task.first_end
    first = Completions(
        torch.tensor([[4, 5, semicolon], [4, semicolon, PAD]]),
        torch.tensor([[1.0, 1, 1], [1, 1, 0]]),
        torch.tensor([True, True]),
    )
    ids, mask = task.second_prompts(ids, mask, first)
    assert mask.tolist() == [[1] * 10, [1] * 8 + [0, 1]]
    assert ids[:, -1].tolist() == [task.instruction] * 2 and mask.dtype == torch.int64


def test_attempts_need_two_digits() -> None:
    task = SelfCorrection()
    problem = next(p for p in task.problems("train") if p.numbers == (37, 5))
    texts = ["42", "042", "42;", "4", "24", "42?"]
    assert task.reward([problem] * 6, texts, [True] * 6).tolist() == [1, 0, 0, 0, 0, 0]


def test_unequal_attempts_are_all_sums_of_two_digit_numbers() -> None:
    task = UnequalAttempts()
    train, test = task.problems("train"), task.problems("test")
    assert {p.numbers for p in train + test} == {(a, b) for a in range(10, 100) for b in range(10, 100)}
    assert len(train + test) == 8100 and 770 <= len(test) <= 850
    assert all(held_out(p.numbers) for p in test) and not any(held_out(p.numbers) for p in train)
    assert {p.answer for p in train + test if p.numbers == (37, 85)} == {"7+5+0:12,3+8+1:12|122"}


def test_limits_of_unequal_attempts_are_the_longest_right_ones() -> None:
    """Their end tokens included: a direct answer the first, the columns of any sum the second."""
    task = UnequalAttempts()
    every = task.problems("train") + task.problems("test")
    assert max(len(str(p.target)) for p in every) + 1 == task.first_tokens
    assert max(len(p.answer) for p in every) + 1 == task.second_tokens
    assert min(len(p.answer) for p in every) > task.first_tokens  # no columns fit into the first
    ids, mask = task.first_prompts(every[:40], "cpu")
    assert ids.shape == (40, 7) and mask.all()


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("122", 1),
        ("7+5+0:12,3+8+1:12|122", 1),
        ("|122", 1),
        ("121|122", 1),
        ("122|121", 0),
        ("122|", 0),
        ("0122", 0),
        ("7+5+0:12,3+8+1:12", 0),
        ("122;", 0),
    ],
)
def test_what_follows_the_last_bar_counts_in_unequal_attempts(text: str, right: int) -> None:
    task = UnequalAttempts()
    problem = next(p for p in task.problems("train") + task.problems("test") if p.numbers == (37, 85))
    assert task.reward([problem] * 2, [text] * 2, [True, False]).tolist() == [right, 0]


# ---- Task D ----------------------------------------------------------------------------------------------------


def test_corridor_is_won_by_key_then_door() -> None:
    games = CorridorGames([(0, 1, 3), (0, 1, 3), (0, 1, 3)], length=6, turns=12)
    writes = []
    for actions in ("rrr", "gog", "rgr", "rrr", "ooo"):  # one letter for each game
        writes.append([decode(row) for row in games.observe()[0]])
        games.act(torch.tensor(encode(actions)))
    # The second tries to open without the key, and then at the wrong cell.
    assert [row[0] for row in writes] == ["0:k1.", "1:k1.", "1:h3.", "2:h3.", "3:h3."]
    assert [row[1] for row in writes] == ["0:k1.", "1:k1.", "1:k1.", "1:h3.", "2:h3."]
    assert games.opened.tolist() == [True, False, True] and games.over.tolist() == [True, False, True]
    ids, mask = games.observe()
    assert decode(ids[0]) == "....." and mask.tolist() == [[0] * 5, [1] * 5, [0] * 5]


def test_walls_and_actions_without_a_meaning() -> None:
    games = CorridorGames([(0, 5, 3), (5, 0, 3), (2, 4, 3), (2, 2, 3)], length=6, turns=12)
    games.act(torch.tensor(encode("lr?o")))
    assert games.agent.tolist() == [0, 5, 2, 2] and not games.holding.any() and not games.opened.any()
    games.act(torch.tensor([BOS, PAD, GRAB, GRAB]))
    assert games.holding.tolist() == [False, False, False, True]


def test_door_opens_with_the_key_alone_and_at_its_cell_alone() -> None:
    games = CorridorGames([(3, 1, 3), (1, 1, 3)], length=6, turns=12)
    games.act(torch.tensor([OPEN, GRAB]))
    games.act(torch.tensor([OPEN, OPEN]))
    assert games.holding.tolist() == [False, True] and not games.opened.any()


def test_games_end_after_their_turns_and_then_nothing_moves() -> None:
    games = CorridorGames([(0, 5, 3)], length=6, turns=2)
    for _ in range(2):
        assert not games.over.any()
        games.act(torch.tensor([RIGHT]))
    assert games.over.all() and games.agent.tolist() == [2]
    games.act(torch.tensor([RIGHT]))
    assert games.agent.tolist() == [2]


def test_shortest_way_wins_every_game_as_fast_as_can_be() -> None:
    starts = Corridor()._starts["train"] + Corridor()._starts["test"]
    assert len(starts) == 120 and 5 <= len(Corridor()._starts["test"]) <= 20
    assert not set(Corridor()._starts["train"]) & set(Corridor()._starts["test"])
    episodes = play_noisily(CorridorGames(starts, 6, 12), 1.0, torch.Generator())
    lengths = torch.tensor([abs(a - k) + abs(k - d) + 2 for a, k, d in starts])
    assert episodes.reward.all() and torch.equal(episodes.action_mask.sum(1).long(), lengths)
    assert int(lengths.max()) == 11 and 6.5 < float(lengths.float().mean()) < 6.9


@pytest.mark.parametrize(("turns", "skill", "expected"), [(12, 0.0, 0.017), (12, 0.4, 0.357), (16, 0.3, 0.381)])
def test_success_of_the_noisy_player_is_that_of_the_card(turns: int, skill: float, expected: float) -> None:
    games = Corridor(6, turns).games(3000, rng())
    reward = play_noisily(games, skill, torch.Generator().manual_seed(0)).reward
    assert abs(float(reward.mean()) - expected) < 0.03


def test_episode_is_one_text_of_which_actions_alone_count() -> None:
    episodes = play_noisily(Corridor().games(50, rng()), 0.6, torch.Generator().manual_seed(0))
    assert episodes.ids.shape[1] <= 73
    for ids, mask, counts in zip(episodes.ids, episodes.mask, episodes.action_mask, strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and not ids[length:].any() and (length - 1) % 6 == 0
        assert counts[:length].nonzero()[:, 0].tolist() == list(range(6, length, 6)) and not counts[length:].any()
        assert int(ids[0]) == BOS and set(decode(ids[counts == 1])) <= set("lrgo")
        assert not bool((ids[:length] == encode(".....")[0]).view(-1).unfold(0, 5, 1).all(1).any())


def test_model_plays_what_the_teacher_forced_pass_would_have_said() -> None:
    with seeded_globals(0):
        model = new_tiny_lm()
    games = Corridor(6, 4).games(6, rng())
    starts = [(int(a), int(k), int(d)) for a, k, d in zip(games.agent, games.key, games.door, strict=True)]
    episodes = play(model, games, generator=torch.Generator(), temperature=0)
    logits = completion_logits(
        model, episodes.ids[:, :1], episodes.mask[:, :1], episodes.ids[:, 1:], episodes.mask[:, 1:]
    )
    acting = episodes.action_mask[:, 1:] == 1
    assert torch.equal(logits.argmax(-1)[acting], episodes.ids[:, 1:][acting])
    assert token_log_probs(logits, episodes.ids[:, 1:]).isfinite().all()
    again = CorridorGames(starts, 6, 4)  # the observations are those that the actions lead to
    for turn in range(4):
        assert torch.equal(again.observe()[0], episodes.ids[:, 1 + 6 * turn : 6 + 6 * turn])
        again.act(episodes.ids[:, 6 + 6 * turn])


def test_play_repeats_itself_and_uses_up_its_numbers() -> None:
    with seeded_globals(0):
        model = new_tiny_lm().train()
    results, states = [], []
    for skipped in (False, False, True):
        generator = torch.Generator().manual_seed(1)
        games = Corridor(6, 3).games(5, rng())
        if skipped:
            games.over[:] = games.opened[:] = True
        results.append(play(model, games, generator=generator).ids)
        states.append(generator.get_state())
    assert torch.equal(results[0], results[1]) and model.training
    assert torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    ("settings", "words"), [((2, 12), "length=2"), ((11, 12), "length=11"), ((6, 0), "turns=0"), ((6, 22), "21")]
)
def test_bad_corridor_is_refused(settings: tuple[int, int], words: str) -> None:
    with pytest.raises(KnobError, match=words):
        Corridor(*settings)


def test_actions_are_the_letters_of_the_card() -> None:
    assert decode([LEFT, RIGHT, GRAB, OPEN]) == "lrgo"


# ---- the guard -------------------------------------------------------------------------------------------------

PROBLEMS = Arithmetic().prompts(3, rng())
TEXTS = ["1", "2", "3"]
FINISHED = torch.tensor([True, True, False])


@pytest.mark.parametrize("returned", [[1, 0, 0.5], np.array([1.0, 0.0, 0.5]), torch.tensor([1.0, 0.0, 0.5]).double()])
def test_good_rewards_pass(returned: Any) -> None:
    rewards = checked_rewards(lambda *_: returned, PROBLEMS, TEXTS, FINISHED)
    assert rewards.tolist() == [1.0, 0.0, 0.5] and rewards.dtype == torch.float32 and not rewards.requires_grad
    own = Arithmetic()
    assert torch.equal(checked_rewards(own.reward, PROBLEMS, TEXTS, FINISHED), own.reward(PROBLEMS, TEXTS, FINISHED))


def test_graph_of_a_reward_is_cut() -> None:
    grown = torch.ones(3, requires_grad=True) * 2
    assert not checked_rewards(lambda *_: grown, PROBLEMS, TEXTS, FINISHED).requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_reward_that_is_not_finite_names_function_row_and_value(bad: float) -> None:
    def my_reward(problems: Any, texts: Any, finished: Any) -> list[float]:
        return [0.0, bad, 0.0]

    with pytest.raises(RewardError, match=rf"my_reward returned {bad} at row 1.*{PROBLEMS[1].prompt[:2]}.*'2'"):
        checked_rewards(my_reward, PROBLEMS, TEXTS, FINISHED)


@pytest.mark.parametrize(
    ("returned", "words"),
    [([1.0, 2.0], r"shape \[2\]; allowed: \[3\]"), (1.0, r"shape \[\]"), ([[1.0], [2.0], [3.0]], r"\[3, 1\]")],
)
def test_rewards_of_another_shape_are_refused(returned: Any, words: str) -> None:
    with pytest.raises(RewardError, match=words):
        checked_rewards(lambda *_: returned, PROBLEMS, TEXTS, FINISHED)


@pytest.mark.parametrize("returned", [None, "good", ["a", "b", "c"], [1.0, None, 2.0], [[1.0], [1.0, 2.0], []]])
def test_rewards_that_are_no_numbers_are_refused(returned: Any) -> None:
    with pytest.raises(RewardError, match="no list of numbers"):
        checked_rewards(lambda *_: returned, PROBLEMS, TEXTS, FINISHED)


def test_reward_function_that_raises_is_named_with_its_row() -> None:
    def fragile(problems: Any, texts: Any, finished: Any) -> list[float]:
        return [1 / (int(text) - 3) for text in texts]

    with pytest.raises(RewardError, match=r"fragile raised ZeroDivisionError.*at row 2.*'3'") as caught:
        checked_rewards(fragile, PROBLEMS, TEXTS, FINISHED)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_reward_function_that_only_fails_on_batches_names_no_row() -> None:
    def whole(problems: Any, texts: Any, finished: Any) -> list[float]:
        if len(texts) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RewardError, match=r"whole raised RuntimeError\('too many'\)$"):
        checked_rewards(whole, PROBLEMS, TEXTS, FINISHED)
