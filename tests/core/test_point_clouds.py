"""The worlds of transport: clouds of points, routed digits, and the linear programme beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from polrl.core.errors import DataError, KnobError
from polrl.worlds.point_clouds import HEAVY, PointClouds, exact_transport
from polrl.worlds.routing import DigitRouting, first_choices, loads, routed_affinity


def test_costs_are_squared_distances_up_to_one():
    clouds = PointClouds.make(7, 5, 3)
    raw = torch.tensor(
        [[sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) for y in clouds.targets] for x in clouds.sources]
    )
    torch.testing.assert_close(clouds.cost, raw.double() / raw.max().double())
    assert clouds.cost.max() == 1 and clouds.cost.dtype == torch.float64
    for weights, size in ((clouds.a, 7), (clouds.b, 5)):
        torch.testing.assert_close(weights, torch.full((size,), 1 / size, dtype=torch.float64))


def test_clouds_follow_their_seed():
    many = PointClouds.make(4000, 4000, 0)
    assert many.sources.mean(0).abs().max() < 0.06 and (many.sources.std(0) - 1).abs().max() < 0.04
    assert (many.targets.mean(0) - 1).abs().max() < 0.04 and (many.targets.std(0) - 0.6).abs().max() < 0.03
    one, same, other = (PointClouds.make(5, 5, seed) for seed in (1, 1, 2))
    assert torch.equal(one.cost, same.cost) and not torch.equal(one.cost, other.cost)


@pytest.mark.parametrize("seed", range(3))
def test_the_linear_programme_is_the_best_assignment(seed):
    clouds = PointClouds.make(9, 9, seed)
    rows, columns = linear_sum_assignment(clouds.cost.numpy())
    least, plan, alpha, beta = exact_transport(clouds.cost, clouds.a, clouds.b)
    assert least == pytest.approx(clouds.cost.numpy()[rows, columns].mean(), abs=1e-12)
    assert float((plan * clouds.cost).sum()) == pytest.approx(least, abs=1e-12)
    # the potentials prove it
    assert (alpha[:, None] + beta <= clouds.cost + 1e-9).all()
    assert float(alpha @ clouds.a + beta @ clouds.b) == pytest.approx(least, abs=1e-12)


def test_masses_that_do_not_match_have_no_plan():
    with pytest.raises(DataError, match="no solution"):
        exact_transport(torch.rand(3, 3, dtype=torch.float64), torch.ones(3), 2 * torch.ones(3))


def test_a_graph_has_one_stroke_an_entry():
    clouds = PointClouds.make(3, 2, 0)
    plan = torch.tensor([[0.4, 0.0], [0.1, 0.0], [0.0, 0.5]], dtype=torch.float64)
    view = clouds.draw(plan)
    x = np.asarray(view.x)
    heavy, light = (np.flatnonzero(np.isfinite(np.asarray(view.y[name]))) for name in ("heavy edges", "light edges"))
    assert HEAVY == 0.3 and len(heavy) == 4 and len(light) == 2
    ends = {(round(float(x[i]), 9), round(float(np.asarray(view.y["light edges"])[i]), 9)) for i in light}
    points = [clouds.sources[1], clouds.targets[0]]
    assert ends == {tuple(round(float(c), 9) for c in point) for point in points}
    # each stroke is broken from the next
    assert np.isnan(np.asarray(view.y["heavy edges"])[heavy[1] + 1])
    assert "3 edges" in view.alt
    empty = clouds.draw(torch.zeros_like(plan))
    assert "0 edges" in empty.alt


def test_loads_count_tokens_and_first_choices_take_one_expert():
    scores = torch.tensor([[0.2, 0.1], [0.3, 0.0], [0.1, 0.4]], dtype=torch.float64)
    assert first_choices(scores).tolist() == [[1, 0], [1, 0], [0, 1]]
    assert loads(scores).tolist() == [3, 2]
    assert loads(first_choices(scores)).tolist() == [2, 1]


def test_affinity_counts_a_token_once():
    affinity = torch.tensor([[0.5, 1.0], [0.8, 0.2]], dtype=torch.float64)
    exact = torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64)
    assert routed_affinity(exact, affinity) == pytest.approx(1.8)
    assert routed_affinity(first_choices(affinity), affinity) == pytest.approx(1.8)
    dropped = torch.tensor([[0.5, 0.5], [0.0, 0.0]], dtype=torch.float64)  # the first twice, the second not at all
    assert routed_affinity(dropped, affinity) == pytest.approx(0.75)


def test_digits_are_routed_to_their_own_centroids():
    pytest.importorskip("sklearn")
    world = DigitRouting.make(80, 6, 0)
    assert world.tokens.shape == (80, 64) and world.experts.shape == (6, 64) and world.affinity.shape == (80, 6)
    assert world.tokens.min() >= 0 and world.tokens.max() <= 1 and world.affinity.dtype == torch.float64
    cosine = torch.nn.functional.cosine_similarity(world.tokens[:, None], world.experts[None], dim=2)
    torch.testing.assert_close(world.affinity, cosine)
    nearest = torch.cdist(world.tokens, world.experts).argmin(dim=1)
    for expert in range(6):  # k-means has converged: each centroid is the mean of those it is nearest to
        torch.testing.assert_close(world.tokens[nearest == expert].mean(0), world.experts[expert], atol=1e-6, rtol=1e-6)
    again = DigitRouting.make(80, 6, 0)
    assert torch.equal(world.tokens, again.tokens) and torch.allclose(world.experts, again.experts)
    assert not torch.equal(world.tokens, DigitRouting.make(80, 6, 1).tokens)
    view = world.pictures(first_choices(world.affinity), most=5)
    assert np.asarray(view.images).shape == (6, 6, 8, 8)
    bars = world.draw({"argmax": loads(first_choices(world.affinity))}, 16)
    assert sum(bars.values["argmax"]) == 80 and list(bars.values["cap"]) == [16] * 6


@pytest.mark.parametrize(("tokens", "experts"), [(5, 6), (1798, 10), (10, 0)])
def test_routing_needs_enough_digits(tokens, experts):
    pytest.importorskip("sklearn")
    with pytest.raises(KnobError, match=f"got {experts} targets and {tokens} sources"):
        DigitRouting.make(tokens, experts, 0)
