"""Demonstrations of the pendulum: always the same, in the task's own terms, and as good as they claim."""

from __future__ import annotations

import pytest
import torch

from polrl.core.errors import KnobError
from polrl.worlds.control import ControlTask
from polrl.worlds.demonstrations import STEPS, TASK, TORQUE, load_demonstrations


def test_an_episode_is_what_the_task_answers_to_its_actions():
    shown, task = load_demonstrations(2), ControlTask(TASK, seed=5)
    for episode in range(2):
        task.reset(seed=episode)
        for step in range(STEPS):
            torch.testing.assert_close(
                shown.observations[episode, step], torch.tensor(task.observation), rtol=0, atol=1e-5
            )
            task.step(TORQUE * shown.actions[episode, step].numpy())
        assert float(shown.returns[episode]) == pytest.approx(task.episode_return, rel=1e-4)


def test_demonstrators_are_weak_but_get_up():
    shown = load_demonstrations(20)
    assert shown.actions.abs().max() <= 0.5 + 1e-6
    assert shown.observations[:, -20:, 0].mean() > 0.7  # the cosine: upright is 1
    assert -500 < shown.returns.mean() < -200


def test_first_pushes_go_both_ways():
    firsts = load_demonstrations(20).actions[:, :5, 0].mean(dim=1)
    assert (firsts > 0.1).sum() >= 3
    assert (firsts < -0.1).sum() >= 3


def test_fewer_demonstrations_are_the_first_of_more():
    torch.testing.assert_close(load_demonstrations(3).actions, load_demonstrations(5).actions[:3], rtol=0, atol=0)


def test_windows_hold_the_actions_that_follow_each_observation():
    shown = load_demonstrations(2)
    observations, chunks = shown.windows(4)
    assert observations.shape == (2 * (STEPS - 3), 3) and chunks.shape == (2 * (STEPS - 3), 4)
    row = STEPS - 3 + 7  # the second episode's step 7
    torch.testing.assert_close(observations[row], shown.observations[1, 7])
    torch.testing.assert_close(chunks[row], shown.actions[1, 7:11, 0])


@pytest.mark.parametrize("episodes", [0, -1, 1001, 2.0, True])
def test_impossible_numbers_are_refused(episodes):
    with pytest.raises(KnobError, match=r"episodes=.*1 to 1000"):
        load_demonstrations(episodes)


@pytest.mark.parametrize("length", [0, STEPS + 1])
def test_windows_longer_than_an_episode_are_refused(length):
    with pytest.raises(KnobError, match=r"1 to the 200"):
        load_demonstrations(1).windows(length)
