"""The nearest pair: whatever finds it, it is the one that float64 sums over all rows find."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polrl.core.device import torch_threads
from polrl.core.fake_device import pretended_cuda
from polrl.worlds import neighbours
from polrl.worlds.neighbours import NearestPairs

BETAS = (0.05, 0.7, 2.0, 50.0, 5000.0)


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def pairs(count, ds, da, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(count, ds, generator=generator, dtype=dtype)
    return states, torch.rand(count, da, generator=generator, dtype=dtype) * 2 - 1


def questions(states, actions, count, seed=1):
    """Return states of the data with other actions, and a few states that are not in the data."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(states), (count,), generator=generator)
    asked = states[rows].clone()
    asked[: count // 4] += 0.1
    noise = 0.4 * torch.randn(count, actions.shape[1], generator=generator, dtype=actions.dtype)
    return asked, (actions[rows] + noise).clamp(-1, 1)


def sorted_rows(states, actions, asked, chosen, beta):
    """Return all rows by distance, then index, in numpy's float64: int [B, N]."""
    s, a, q, p = (x.double().numpy() for x in (states, actions, asked, chosen))
    distances = beta**2 * ((q[:, None] - s) ** 2).sum(2) + ((p[:, None] - a) ** 2).sum(2)
    return np.argsort(distances, axis=1, kind="stable")


@pytest.fixture(params=["sweep", "tree"])
def engine(request, monkeypatch):
    """Let one of the two ways answer, whatever the sizes."""
    monkeypatch.setattr(neighbours, "_SMALL", 1 << 40 if request.param == "sweep" else 0)
    monkeypatch.setattr(neighbours, "_TOO_MANY", 2.0)
    return request.param


@pytest.mark.parametrize(("ds", "da"), [(1, 1), (3, 1), (11, 3)])
@pytest.mark.parametrize("beta", BETAS)
def test_nearest_row_is_the_one_of_float64_sums(engine, ds, da, beta):
    data = pairs(777, ds, da)
    asked = questions(*data, 40)
    found = NearestPairs(*data)
    expected = sorted_rows(*data, *asked, beta)
    for _ in range(2):
        np.testing.assert_array_equal(found.query(*asked, beta).numpy(), expected[:, 0])
    assert (found._tree is not None) == (engine == "tree")


@pytest.mark.parametrize("k", [1, 2, 7, 20])
def test_kth_row_is_the_kth(engine, k):
    data = pairs(500, 2, 1)
    asked = questions(*data, 30)
    found, expected = NearestPairs(*data), sorted_rows(*data, *asked, 2.0)
    for _ in range(2):
        np.testing.assert_array_equal(found.query(*asked, 2.0, k).numpy(), expected[:, k - 1])


@pytest.mark.parametrize("count", [1, 5, 63, 64, 65, 130])
def test_every_k_up_to_all_rows(engine, count):
    data = pairs(count, 2, 2)
    asked = questions(*data, 6)
    found, expected = NearestPairs(*data), sorted_rows(*data, *asked, 1.5)
    for k in range(1, count + 1):
        np.testing.assert_array_equal(found.query(*asked, 1.5, k).numpy(), expected[:, k - 1])


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_of_equal_rows_the_lowest_index_comes_first(engine, k):
    states, actions = pairs(60, 2, 1)
    order = torch.randperm(180, generator=torch.Generator().manual_seed(3))
    states, actions = (x.repeat(3, 1)[order] for x in (states, actions))
    asked = questions(states, actions, 20)
    found, expected = NearestPairs(states, actions), sorted_rows(states, actions, *asked, 2.0)
    for _ in range(3):
        np.testing.assert_array_equal(found.query(*asked, 2.0, k).numpy(), expected[:, k - 1])


def test_on_a_grid_rows_that_are_equally_near_are_taken_by_index(engine):
    grid = torch.cartesian_prod(torch.arange(8.0), torch.arange(-2.0, 3.0))
    order = torch.randperm(len(grid), generator=torch.Generator().manual_seed(0))
    states, actions = grid[order, :1], grid[order, 1:]
    asked, chosen = torch.full((9, 1), 3.5), torch.linspace(-2, 2, 9).unsqueeze(1)
    found, expected = NearestPairs(states, actions), sorted_rows(states, actions, asked, chosen, 1.0)
    for _ in range(3):
        for k in (1, 2, 4):
            np.testing.assert_array_equal(found.query(asked, chosen, 1.0, k).numpy(), expected[:, k - 1])


def test_a_state_far_from_zero_costs_no_digits(engine):
    """In float32 the sweep's scores near 10^3 are off by more than the distances differ; float64 settles it."""
    states, actions = pairs(400, 1, 1)
    states = 1000 + states
    asked = questions(states, actions, 30)
    found = NearestPairs(states, actions)
    for beta in (0.5, 50.0):
        expected = sorted_rows(states, actions, *asked, beta)
        for _ in range(2):
            np.testing.assert_array_equal(found.query(*asked, beta).numpy(), expected[:, 0])


def test_double_precision_data_keeps_its_digits(engine):
    states, actions = pairs(300, 2, 1, dtype=torch.float64)
    states = torch.cat([states, states + 1e-9])  # one and the same in float32
    actions = torch.cat([actions, actions + 1e-9])
    asked = states[300:340] + 1e-10, actions[300:340] + 1e-10
    found, expected = NearestPairs(states, actions), sorted_rows(states, actions, *asked, 2.0)
    for _ in range(2):
        np.testing.assert_array_equal(found.query(*asked, 2.0).numpy(), expected[:, 0])


@pytest.mark.parametrize("ds", [3, 9])
def test_answers_depend_on_nothing_that_was_asked_before(monkeypatch, ds):
    monkeypatch.setattr(neighbours, "_SMALL", 0)
    data = pairs(2000, ds, 1)
    asked = questions(*data, 50)
    used = NearestPairs(*data)
    for beta in (0.05, 0.05, 2.0, 2.0, 2.0, 0.7, 50.0, 50.0, *[2.0] * 40, 0.7):
        fresh = NearestPairs(*data)
        assert torch.equal(used.query(*asked, beta), fresh.query(*asked, beta))


def test_a_tree_that_prunes_nothing_leaves_the_work_to_the_sweep(monkeypatch):
    monkeypatch.setattr(neighbours, "_SMALL", 0)
    data = pairs(2000, 20, 3)
    asked = questions(*data, 20)
    hard, easy = NearestPairs(*data), NearestPairs(*data)
    for _ in range(4):
        np.testing.assert_array_equal(hard.query(*asked, 0.5), sorted_rows(*data, *asked, 0.5)[:, 0])
        easy.query(data[0][:20], data[1][:20], 50.0)
    assert not hard._selective and easy._selective


def test_boxes_hold_all_rows_and_a_ball_reaches_those_that_it_cuts():
    points = np.random.default_rng(0).normal(size=(1000, 3))
    tree = neighbours._Tree.build(1.0, points, tight=False)
    low, high, rows = neighbours._boxes(points)
    assert rows.sum() == 1000 and 50 < len(rows) == low.shape[1]
    inside = (points[:, :, None] >= low) & (points[:, :, None] <= high)
    np.testing.assert_array_equal(inside.all(1).sum(0), rows)
    query, radius = np.zeros((1, 3)), np.array([0.5])
    nearest = np.clip(0.0, low, high)
    share = rows[(nearest**2).sum(0) <= 0.25].sum() / 1000
    assert tree.reached(query, radius) == share and 0.01 < share < 0.5


def test_the_scores_are_off_by_no_more_than_their_slack():
    for beta in BETAS:
        states, actions = pairs(1000, 5, 2)
        states = states * torch.tensor([1.0, 1.0, 5.0, 1.0, 0.01])
        asked, chosen = questions(states, actions, 20)
        scores, slack = NearestPairs(states, actions)._block_scores(asked, chosen, beta)
        exact = beta**2 * (states.double() ** 2).sum(1) + (actions.double() ** 2).sum(1)
        exact = exact - 2 * beta**2 * asked.double() @ states.double().T - 2 * chosen.double() @ actions.double().T
        exact = torch.nn.functional.pad(exact, (0, 24), value=torch.inf).unflatten(1, (-1, 64)).amin(2)
        assert bool(((scores.double() - exact).abs() <= slack).all())


def test_no_question_has_no_answer():
    data = pairs(100, 2, 1)
    assert NearestPairs(*data).query(data[0][:0], data[1][:0], 2.0).shape == (0,)


def test_it_runs_on_the_data_s_device():
    with pretended_cuda() as tags:
        states, actions = (x.to("cuda") for x in pairs(300, 2, 1))
        found = NearestPairs(states, actions).query(states[:10], actions[10:20], 2.0)
        assert found in tags
    expected = sorted_rows(*pairs(300, 2, 1), pairs(300, 2, 1)[0][:10], pairs(300, 2, 1)[1][10:20], 2.0)
    np.testing.assert_array_equal(found.numpy(), expected[:, 0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta": 0.0}, "beta must be above 0 and finite, got 0.0"),
        ({"beta": float("nan")}, "beta must be above 0"),
        ({"k": 0}, "k must be from 1 to the number of rows, 100, got 0"),
        ({"k": 101}, "got 101"),
        ({"actions": torch.zeros(3, 1)}, r"must be \[B, 2\] and \[B, 1\], got \[5, 2\] and \[3, 1\]"),
        ({"states": torch.zeros(5, 3)}, r"got \[5, 3\]"),
    ],
)
def test_what_can_not_be_asked_is_refused(change, words):
    asked = {"states": torch.zeros(5, 2), "actions": torch.zeros(5, 1), "beta": 1.0, **change}
    with pytest.raises(ValueError, match=words):
        NearestPairs(*pairs(100, 2, 1)).query(**asked)


@pytest.mark.parametrize(
    ("states", "actions"),
    [(torch.zeros(3, 2), torch.zeros(4, 1)), (torch.zeros(0, 2), torch.zeros(0, 1)), (torch.zeros(3), torch.zeros(3))],
)
def test_data_without_pairs_is_refused(states, actions):
    with pytest.raises(ValueError, match="at least one row"):
        NearestPairs(states, actions)


def test_data_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        NearestPairs(torch.tensor([[float("nan")]]), torch.zeros(1, 1))
