"""Line world: its rules, its diary, and walks in it."""

from __future__ import annotations

import pytest
import torch

from polrl.worlds.line_world import line_diary, move, walk


def test_a_step_moves_costs_and_arrives():
    x, action = torch.tensor([0.0, 5.0, 8.5, 8.0, 0.2, 9.9]), torch.tensor([0.5, -0.25, 0.4, 1.0, -1.0, 3.0])
    following, reward, arrived = move(x, action)
    torch.testing.assert_close(following, torch.tensor([0.5, 4.75, 8.9, 9.0, 0.0, 10.0]))
    torch.testing.assert_close(arrived, torch.tensor([0.0, 0, 0, 1, 0, 1]))
    torch.testing.assert_close(reward, torch.tensor([-0.1, -0.1, -0.1, 9.9, -0.1, 9.9]))


def test_the_diary_is_mostly_bad_and_obeys_the_rules():
    diary = line_diary(20_000, 0, "cpu")
    x, action = diary.observations[:, 0], diary.actions[:, 0]
    good = action >= 0.7
    assert float(good.float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float(action[~good].max()) <= 0.4 and float(action.min()) >= -1 and float(action.max()) <= 1
    assert float(x.min()) >= 0 and float(x.max()) <= 9
    assert float(x.mean()) == pytest.approx(4.5, abs=0.1)
    assert abs(float(torch.corrcoef(torch.stack([x, good.float()]))[0, 1])) < 0.03, "good steps are spread evenly"
    following, reward, arrived = move(x, action)
    for found, expected in (
        (diary.next_observations[:, 0], following),
        (diary.rewards, reward),
        (diary.terminals, arrived),
    ):
        torch.testing.assert_close(found, expected)
    assert len(diary) == len(diary.episode_starts) == 20_000


def test_one_seed_one_diary():
    assert line_diary(100, 1, "cpu") is line_diary(100, 1, "cpu")
    assert not torch.equal(line_diary(100, 1, "cpu").actions, line_diary(100, 2, "cpu").actions)


def test_a_walk_earns_its_discounted_rewards_until_it_arrives():
    starts = torch.tensor([8.0, 7.5, 0.0])
    returns, arrived = walk(torch.ones_like, starts, steps=5, discount=0.9)
    expected = [9.9, -0.1 + 0.9 * 9.9, -0.1 * (1 + 0.9 + 0.81 + 0.729 + 0.6561)]
    torch.testing.assert_close(returns, torch.tensor(expected))
    assert arrived.tolist() == [1, 1, 0]


def test_a_policy_sees_the_place_where_it_stands():
    seen = []

    def policy(x):
        seen.append(x[:, 0].tolist())
        return 0.5 * torch.ones_like(x)

    walk(policy, torch.tensor([0.0, 3.0]), steps=3, discount=1.0)
    assert seen == [[0.0, 3.0], [0.5, 3.5], [1.0, 4.0]]
