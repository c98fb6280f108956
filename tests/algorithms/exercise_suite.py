"""What the check of every exercise must do; a method's own test file names its checks, solutions and mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Answer = Callable[..., Any]


class ExerciseSuite:
    """To be inherited by a class `TestExercises`.

    Attributes
    ----------
    solutions : list of (check, answer)
        Answers that are right, at least one for each check.
    mistakes : dict of check to dict of str to (answer, str)
        For each check typical mistakes by name, with words that its explanation must hold.
    """

    solutions: list[tuple[Answer, Answer]]
    mistakes: dict[Answer, dict[str, tuple[Answer, str]]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "solution" in metafunc.fixturenames:
            metafunc.parametrize(("check", "solution"), self.solutions)
        elif "answer" in metafunc.fixturenames:
            cases = [
                pytest.param(check, answer, words, id=f"{check.__name__}: {name}")
                for check, mistakes in self.mistakes.items()
                for name, (answer, words) in mistakes.items()
            ]
            metafunc.parametrize(("check", "answer", "words"), cases)
        elif "check" in metafunc.fixturenames:
            metafunc.parametrize("check", self.mistakes)

    def test_solution_is_right(self, check, solution):
        before = torch.get_rng_state()
        feedback = check(solution)
        assert feedback.state == "right", feedback
        assert torch.equal(torch.get_rng_state(), before), "a check leaves global randomness alone"

    def test_mistake_is_wrong_and_explained(self, check, answer, words):
        feedback = check(answer)
        assert feedback.state == "wrong", feedback
        assert words in feedback.words, feedback.words

    def test_empty_submission_is_not_done_yet(self, check):
        def to_do(*arguments):
            raise NotImplementedError

        for empty in (to_do, lambda *arguments: None, lambda *arguments: ..., None):
            assert check(empty).state == "not done yet"

    def test_broken_submission_is_reported(self, check):
        def broken(*arguments):
            return arguments[0] @ "matrix"

        feedback = check(broken)
        assert feedback.state == "wrong"
        assert "TypeError" in feedback.words and 'return arguments[0] @ "matrix"' in feedback.words
        assert "arguments" in check(lambda: 0).words

    def test_every_check_has_a_solution_and_mistakes(self):
        assert {check for check, _ in self.solutions} == set(self.mistakes)
        assert all(self.mistakes.values())
