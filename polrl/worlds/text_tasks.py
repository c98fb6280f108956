"""Tasks for a language model whose answers a program can verify: sums, "make a target", and two attempts.

All of them have one shape: `prompts(count, rng, split)` gives problems, and `reward(problems, texts, finished)`
gives 1 for a right answer and 0 for any other. A tenth of all problems, chosen by a hash of their numbers that is
the same everywhere, is held out as the split "test".
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from polrl.core.errors import KnobError, PolrlError, unknown_name
from polrl.models.causal_lm import Completions
from polrl.models.tiny_lm import EOS, encode, encode_batch

Split = Literal["train", "test"]
SPLITS = ("train", "test")
Flags = torch.Tensor | Sequence[bool]


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes
    ----------
    prompt : str
        What the model reads, without `<bos>`.
    answer : str
        A right completion, without `<eos>`.
    numbers : tuple of int
        The numbers in the prompt.
    target : int
        The number that a right answer comes to.
    level : int
        How hard it is: digits of a summand, or numbers to combine.
    """

    prompt: str
    answer: str
    numbers: tuple[int, ...]
    target: int
    level: int


def held_out(numbers: Sequence[int]) -> bool:
    """Return whether a problem with these numbers belongs to the split "test": one in ten, the same everywhere."""
    return zlib.crc32(",".join(map(str, numbers)).encode()) % 10 == 0


def _wanted(numbers: Sequence[int], split: Split) -> bool:
    return held_out(numbers) == (split == "test")


def _check_request(count: int, split: str) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise KnobError(f"count={count!r}; allowed: a whole number from 1")
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)


def _verdicts(right: Sequence[float], finished: Flags) -> torch.Tensor:
    """Return rewards [N], 0 for every answer without an end; on the device of `finished`."""
    done = torch.as_tensor(finished)
    return torch.tensor(right, dtype=torch.float32, device=done.device) * done


# ---- Task A: sums and differences ------------------------------------------------------------------------------


class Arithmetic:
    """Sums and differences of numbers with as many digits as the level says: `37+85=` wants `122`.

    Parameters
    ----------
    operations : str
        "+", "-" or "+-", of which each problem takes one; a difference is never negative.
    levels : int or mapping of int to float
        Digits of each number, 1 to 4; or a weight for each number of digits.
    scratchpad : bool
        Answers show the columns from the right with their carry first: `7+5+0:12,3+8+1:12|122`.
    format_reward : float
        Reward of a wrong answer that has the right form, from 0 to below 1.

    Examples
    --------
    >>> Arithmetic().prompts(1, np.random.default_rng(0))
    [Problem(prompt='85+63=', answer='148', numbers=(85, 63), target=148, level=2)]
    """

    def __init__(
        self,
        operations: str = "+",
        levels: int | Mapping[int, float] = 2,
        *,
        scratchpad: bool = False,
        format_reward: float = 0.0,
    ) -> None:
        if operations not in ("+", "-", "+-"):
            raise unknown_name("operations", operations, ("+", "-", "+-"))
        weights = {levels: 1.0} if isinstance(levels, int) else dict(levels)
        if not weights or set(weights) - {1, 2, 3, 4} or min(weights.values()) < 0 or not sum(weights.values()) > 0:
            raise KnobError(f"levels={levels!r}; allowed: 1 to 4 digits, or a weight from 0 for each of them")
        if not 0 <= format_reward < 1:
            raise KnobError(f"format_reward={format_reward!r}; allowed: from 0 to below 1")
        self.operations, self.scratchpad, self.format_reward = operations, scratchpad, format_reward
        self._digits = np.array(list(weights))
        self._weights = np.array(list(weights.values())) / sum(weights.values())
        number = r"\d+"
        self._form = re.compile(rf"(\d[+-]\d[+-]\d:\d+,)*\d[+-]\d[+-]\d:\d+\|{number}" if scratchpad else number)

    def prompts(self, count: int, rng: np.random.Generator, split: Split = "train") -> list[Problem]:
        """Draw problems; a problem may come more than once.

        Parameters
        ----------
        count : int
            How many.
        rng : numpy.random.Generator
        split : {"train", "test"}
        """
        _check_request(count, split)
        levels = rng.choice(self._digits, size=count, p=self._weights).tolist()
        operations = rng.choice(list(self.operations), size=count).tolist()
        return [self._draw(rng, level, operation, split) for level, operation in zip(levels, operations, strict=True)]

    def _draw(self, rng: np.random.Generator, level: int, operation: str, split: Split) -> Problem:
        while True:
            for pair in rng.integers(0, 10**level, size=(16, 2)).tolist():
                numbers = sorted(pair, reverse=True) if operation == "-" else pair
                # By their numbers alone no difference of single digits would be held out.
                if _wanted(numbers if level > 1 else [*numbers, level], split):
                    return self.problem(numbers[0], numbers[1], operation, level)

    def problem(self, first: int, second: int, operation: str, level: int) -> Problem:
        """Return the problem `first operation second`, each number written with `level` digits."""
        target = first + second if operation == "+" else first - second
        prompt = f"{first:0{level}d}{operation}{second:0{level}d}="
        answer = f"{columns(first, second, operation, level)}|{target}" if self.scratchpad else str(target)
        return Problem(prompt, answer, (first, second), target, level)

    def reward(self, problems: Sequence[Problem], texts: Sequence[str], finished: Flags) -> torch.Tensor:
        """Return 1 where what follows the last `|` is the number sought and the answer was ended, else 0.

        Parameters
        ----------
        problems : sequence of Problem
            N of them.
        texts : sequence of str
            The completions, without their end token.
        finished : Tensor, bool [N]
            Whether the end token was drawn.

        Returns
        -------
        Tensor, float32 [N]
            On the device of `finished`.
        """
        pairs = zip(problems, texts, strict=True)
        return _verdicts([self._score(problem, text) for problem, text in pairs], finished)

    def _score(self, problem: Problem, text: str) -> float:
        if text.rpartition("|")[2] == str(problem.target):
            return 1.0
        return self.format_reward if self._form.fullmatch(text) else 0.0


def columns(first: int, second: int, operation: str, digits: int) -> str:
    """Return the columns of a sum or difference from the right, each with its carry and its result.

    Examples
    --------
    >>> columns(37, 85, "+", 2)
    '7+5+0:12,3+8+1:12'
    >>> columns(85, 37, "-", 2)
    '5-7-0:8,8-3-1:4'
    """
    carry, written = 0, []
    for place in range(digits):
        x, y = first // 10**place % 10, second // 10**place % 10
        value = x + y + carry if operation == "+" else (x - y - carry) % 10
        written.append(f"{x}{operation}{y}{operation}{carry}:{value}")
        carry = value // 10 if operation == "+" else int(x - y - carry < 0)
    return ",".join(written)


def replace_digit(text: str, rng: np.random.Generator) -> str:
    """Return a text with one of its digits, drawn evenly, replaced by one of the nine others.

    Raises
    ------
    KnobError
        If there is no digit in the text.
    """
    places = [place for place, character in enumerate(text) if character.isdecimal()]
    if not places:
        raise KnobError(f"text={text!r}; allowed: a text with a digit in it")
    place = places[int(rng.integers(len(places)))]
    digit = (int(text[place]) + int(rng.integers(1, 10))) % 10
    return f"{text[:place]}{digit}{text[place + 1 :]}"


# ---- Task B: make a target -------------------------------------------------------------------------------------


class Countdown:
    """Combine all the numbers to a target with + - * and parentheses: `3,5,8:16=` wants `3+5+8` or the like.

    Parameters
    ----------
    operands : int
        How many numbers, 2 to 4, each from 1 to 9.
    """

    TARGETS = range(1, 100)

    def __init__(self, operands: int = 3) -> None:
        if operands not in (2, 3, 4):
            raise KnobError(f"operands={operands!r}; allowed: 2, 3 or 4")
        self.operands = operands

    def prompts(self, count: int, rng: np.random.Generator, split: Split = "train") -> list[Problem]:
        """Draw problems that have a solution; `answer` is one of their solutions, with the numbers in random order."""
        _check_request(count, split)
        return [self._draw(rng, split) for _ in range(count)]

    def _draw(self, rng: np.random.Generator, split: Split) -> Problem:
        while True:
            numbers = tuple(rng.integers(1, 10, size=self.operands).tolist())
            order = [str(numbers[place]) for place in rng.permutation(self.operands)]
            signs = ["+-*"[kind] for kind in rng.integers(3, size=self.operands - 1).tolist()]
            solution = order[0] + "".join(sign + number for sign, number in zip(signs, order[1:], strict=True))
            target, _ = parse_expression(solution)
            # Sorted, so that no order of held-out numbers is seen in training.
            if target in self.TARGETS and _wanted([*sorted(numbers), target], split):
                prompt = f"{','.join(map(str, numbers))}:{target}="
                return Problem(prompt, solution, numbers, target, self.operands)

    def reward(self, problems: Sequence[Problem], texts: Sequence[str], finished: Flags) -> torch.Tensor:
        """Return 1 for an ended expression that uses each number once and comes to the target; see `Arithmetic`."""
        pairs = zip(problems, texts, strict=True)
        return _verdicts([float(self.solves(problem, text)) for problem, text in pairs], finished)

    @staticmethod
    def solves(problem: Problem, text: str) -> bool:
        """Return whether an expression uses each number of a problem exactly once and comes to its target."""
        try:
            value, used = parse_expression(text)
        except ValueError:
            return False
        return value == problem.target and sorted(used) == sorted(problem.numbers)


def parse_expression(text: str) -> tuple[int, list[int]]:
    """Work out an expression of whole numbers, + - * and parentheses; nothing is ever evaluated as a program.

    Returns
    -------
    value : int
    numbers : list of int
        The numbers in the order in which they stand.

    Raises
    ------
    ValueError
        If the text is not such an expression; the message names the place.

    Examples
    --------
    >>> parse_expression("(3+5)*2-1")
    (15, [3, 5, 2, 1])
    """
    return _Parser(text).parse()


class _Parser:
    """Recursive descent: a sum of products of factors; a factor is a number or a sum in parentheses."""

    DEPTH = 20  # parentheses inside each other

    def __init__(self, text: str) -> None:
        self.text, self.place, self.depth = text, 0, 0
        self.numbers: list[int] = []

    def parse(self) -> tuple[int, list[int]]:
        value = self.sum()
        if self.place < len(self.text):
            raise self.error("an operator")
        return value, self.numbers

    def sum(self) -> int:
        value = self.product()
        while (sign := self.peek()) and sign in "+-":
            self.place += 1
            term = self.product()
            value = value + term if sign == "+" else value - term
        return value

    def product(self) -> int:
        value = self.factor()
        while self.peek() == "*":
            self.place += 1
            value *= self.factor()
        return value

    def factor(self) -> int:
        if self.peek() == "(":
            self.depth += 1
            if self.depth > self.DEPTH:
                raise self.error(f"at most {self.DEPTH} parentheses inside each other")
            self.place += 1
            value = self.sum()
            if self.peek() != ")":
                raise self.error("a closing parenthesis")
            self.place += 1
            self.depth -= 1
            return value
        digits = re.compile(r"[0-9]{1,9}(?![0-9])").match(self.text, self.place)
        if digits is None:
            raise self.error("a number of at most nine digits")
        self.place = digits.end()
        self.numbers.append(int(digits.group()))
        return self.numbers[-1]

    def peek(self) -> str:
        return self.text[self.place : self.place + 1]

    def error(self, expected: str) -> ValueError:
        return ValueError(f"expected {expected} at position {self.place} of {self.text!r}")


# ---- Task C: a second attempt ----------------------------------------------------------------------------------


class TwoAttempts:
    """What a problem in two attempts consists of: `<bos>` prompt, first attempt `;` `?` second attempt `<eos>`.

    The environment writes the `?`. An attempt is ended by its own token, `;` or `<eos>`; one that is not earns 0.

    Parameters
    ----------
    problems : sequence of Problem
        All there are, of both splits; their prompts are of one length.

    Attributes
    ----------
    first_end, instruction, second_end : int
        The tokens `;`, `?` and `<eos>`.
    first_tokens, second_tokens : int
        The longest first and the longest second attempt, their end tokens included.
    """

    first_end = encode(";")[0]
    instruction = encode("?")[0]
    second_end = EOS
    first_tokens: int
    second_tokens: int

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = {split: [p for p in problems if _wanted(p.numbers, split)] for split in ("train", "test")}

    def prompts(self, count: int, rng: np.random.Generator, split: Split = "train") -> list[Problem]:
        """Draw problems; see `Arithmetic.prompts`."""
        _check_request(count, split)
        members = self._problems[split]
        return [members[place] for place in rng.integers(len(members), size=count).tolist()]

    def problems(self, split: Split) -> list[Problem]:
        """Return all the problems of a split."""
        _check_request(1, split)
        return list(self._problems[split])

    def first_prompts(
        self, problems: Sequence[Problem], device: str | torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask of what the first attempt is made from, int64 [N, P]; nothing is padded."""
        return encode_batch([problem.prompt for problem in problems], device=device)

    def second_prompts(
        self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, first: Completions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask of what the second attempt is made from: prompt, first attempt, `?`.

        Parameters
        ----------
        prompt_ids, prompt_mask : Tensor, int64 [N, P]
            From `first_prompts`.
        first : Completions
            The first attempts, [N, T]; a short one leaves padding between itself and the `?`.

        Returns
        -------
        ids, mask : Tensor, int64 [N, P + T + 1]
        """
        asked = torch.full_like(prompt_ids[:, :1], self.instruction)
        ids = torch.cat([prompt_ids, first.ids, asked], dim=1)
        return ids, torch.cat([prompt_mask, first.mask.to(ids.dtype), torch.ones_like(asked)], dim=1)

    def final_answer(self, text: str) -> str:
        """Return what an attempt comes to: here, all of it."""
        return text

    def reward(self, problems: Sequence[Problem], texts: Sequence[str], finished: Flags) -> torch.Tensor:
        """Return 1 for each attempt, first or second, that comes to the sum and was ended; else 0."""
        final = self.final_answer
        pairs = zip(problems, texts, strict=True)
        return _verdicts([float(final(text) == final(problem.answer)) for problem, text in pairs], finished)


class SelfCorrection(TwoAttempts):
    """A sum in two attempts of one kind: `<bos>37+5=` 42 `;` `?` 42 `<eos>`.

    The first summand goes from 10 to 89, the second from 0 to 9, and answers have two digits, so that each
    sequence in which both attempts have the right form is 13 tokens long. There are 800 problems in all.
    """

    first_tokens = 3
    second_tokens = 3

    def __init__(self) -> None:
        super().__init__(
            [Problem(f"{a}+{b}=", f"{a + b:02d}", (a, b), a + b, 2) for a in range(10, 90) for b in range(10)]
        )


class UnequalAttempts(TwoAttempts):
    """A sum in two attempts, of which only the second has room to work: `37+85=` 112 `;` `?` 7+5+0:12,3+8+1:12|122.

    Both summands go from 10 to 99, 8,100 problems in all; a sum is written without leading zeros. The first attempt
    has the length of a direct answer, so that its errors can't all be unlearned; the second may show its columns (see
    `columns`) or answer directly too. What follows the last `|` counts. `Problem.answer` is the long form.
    """

    first_tokens = 4
    second_tokens = 22

    def __init__(self) -> None:
        worked = Arithmetic("+", 2, scratchpad=True)
        super().__init__([worked.problem(a, b, "+", 2) for a in range(10, 100) for b in range(10, 100)])

    def final_answer(self, text: str) -> str:
        """Return what follows the last `|`: the number that an attempt comes to, whether it shows columns or not."""
        return text.rpartition("|")[2]


# ---- A reward that may be wrong itself -------------------------------------------------------------------------

RewardFunction = Callable[[Sequence[Problem], Sequence[str], torch.Tensor], Any]


class RewardError(PolrlError, ValueError):
    """A reward function raised, or returned something that is no reward for each row."""


def checked_rewards(
    function: RewardFunction, problems: Sequence[Problem], texts: Sequence[str], finished: torch.Tensor
) -> torch.Tensor:
    """Call a reward function and make sure that what comes back can be learned from.

    A run stops with the error rather than learn from rubbish; its state is that before the step.

    Parameters
    ----------
    function : callable
        Takes problems, texts and `finished`, as `Arithmetic.reward` does; returns N numbers.
    problems, texts, finished
        See `Arithmetic.reward`.

    Returns
    -------
    Tensor, float32 [N]
        On the device of `finished`.

    Raises
    ------
    RewardError
        If the function raises, or returns something else than N finite numbers; the message names the function
        and, where there is one, the row with its prompt and text.
    """
    name = getattr(function, "__qualname__", type(function).__qualname__)

    def at(row: int) -> str:
        return f"at row {row}, prompt {problems[row].prompt!r}, text {texts[row]!r}"

    try:
        returned = function(problems, texts, finished)
    except Exception as error:
        row = _failing_row(function, problems, texts, finished)
        place = f" {at(row)}" if row is not None else ""
        raise RewardError(f"the reward function {name} raised {error!r}{place}") from error
    try:
        rewards = torch.as_tensor(returned, device=finished.device).detach().to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"the reward function {name} returned {returned!r}, which is no list of numbers") from error
    if rewards.shape != (len(texts),):
        raise RewardError(
            f"the reward function {name} returned shape {list(rewards.shape)}; allowed: [{len(texts)}], one a text"
        )
    bad = ~rewards.isfinite()
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise RewardError(f"the reward function {name} returned {float(rewards[row])} {at(row)}; allowed: finite")
    return rewards


def _failing_row(
    function: RewardFunction, problems: Sequence[Problem], texts: Sequence[str], finished: torch.Tensor
) -> int | None:
    """Return the first row on which a function that raised on the batch raises by itself."""
    for row in range(min(len(problems), len(texts))):
        try:
            function(problems[row : row + 1], texts[row : row + 1], finished[row : row + 1])
        except Exception:
            return row
    return None
