"""Tabular worlds and the token tree, against sums written out."""

from __future__ import annotations

import itertools

import pytest
import torch

from polrl.models.mlp import MLP
from polrl.worlds.tabular import MOVES, discounted_visits, grid_world, policy_value, random_mdp
from polrl.worlds.token_tree import TokenTree


def mdp(seed=0):
    generator = torch.Generator().manual_seed(seed)
    P, R = random_mdp(5, 3, generator)
    pi = torch.softmax(torch.randn(5, 3, generator=generator, dtype=torch.float64), dim=1)
    return P, R, pi


def test_values_and_visits_are_discounted_sums_over_time():
    P, R, pi = mdp()
    step = torch.einsum("sa,sat->st", pi, P)
    start = torch.tensor([0.5, 0.5, 0, 0, 0], dtype=torch.float64)
    value, visits, at = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), start
    power = torch.eye(5, dtype=torch.float64)
    for t in range(400):
        value += 0.9**t * power @ (pi * R).sum(1)
        visits += 0.9**t * at
        power, at = power @ step, at @ step
    torch.testing.assert_close(policy_value(P, R, pi, 0.9), value)
    torch.testing.assert_close(discounted_visits(P, pi, start, 0.9), visits)
    assert visits.sum() == pytest.approx(10.0)
    assert (visits.unsqueeze(1) * pi * R).sum() == pytest.approx(float(start @ value))


def test_a_random_mdp_is_one_and_follows_its_generator():
    P, R, _ = mdp()
    torch.testing.assert_close(P.sum(-1), torch.ones(5, 3, dtype=torch.float64))
    assert (P > 0).all() and (R >= 0).all() and (R <= 1).all()
    assert torch.equal(mdp()[0], P) and not torch.equal(mdp(1)[0], P)


def test_walls_block_and_slips_are_uniform_over_all_five_moves():
    sure = grid_world(2, 3)
    where = {move: sure[0, i].argmax().item() for i, move in enumerate(MOVES)}
    assert where == {"up": 0, "right": 1, "down": 3, "left": 0, "stay": 0}
    slippery = grid_world(2, 3, slip=0.1)
    torch.testing.assert_close(slippery.sum(-1), torch.ones(6, 5, dtype=torch.float64))
    assert slippery[0, 1].tolist() == pytest.approx([0.1 * 3 / 5, 0.9 + 0.1 / 5, 0, 0.1 / 5, 0, 0])
    with pytest.raises(ValueError, match=r"slip must be from 0 to 1, got 1\.5"):
        grid_world(2, 2, slip=1.5)


@pytest.mark.parametrize(("vocabulary", "depth"), [(2, 1), (2, 4), (3, 3), (5, 2)])
def test_the_tree_holds_every_string_and_every_prefix_once(vocabulary, depth):
    tree = TokenTree(vocabulary, depth)
    assert tree.strings.tolist() == [list(s) for s in itertools.product(range(vocabulary), repeat=depth)]
    prefixes = {}
    for string, nodes in zip(tree.strings.tolist(), tree.nodes.tolist(), strict=True):
        for level, node in enumerate(nodes):
            assert prefixes.setdefault(node, string[:level]) == string[:level]
    assert sorted(prefixes) == list(range(tree.prefixes))


def test_string_probabilities_multiply_token_probabilities():
    tree = TokenTree(3, 4)
    logits = torch.randn(tree.prefixes, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probabilities = tree.log_probabilities(logits).exp()
    assert probabilities.sum() == pytest.approx(1.0)
    string = tree.strings.tolist().index([2, 0, 1, 1])
    softmax, node, expected = torch.softmax(logits, 1), 0, 1.0
    for token in (2, 0, 1, 1):
        expected *= softmax[node, token].item()
        node = 3 * node + 1 + token  # as in a heap
    assert probabilities[string] == pytest.approx(expected)
    torch.testing.assert_close(tree.log_probabilities(tree.logits_of(probabilities)).exp(), probabilities)


def test_samples_follow_the_policy():
    tree = TokenTree(2, 3)
    logits = torch.randn(tree.prefixes, 2, generator=torch.Generator().manual_seed(3))
    drawn = tree.sample(logits, 20_000, torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=8) / 20_000
    assert (found - tree.log_probabilities(logits).exp()).abs().max() < 0.012


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="vocabulary >= 2 and depth >= 1, got 1 and 3"):
        TokenTree(1, 3)
    with pytest.raises(ValueError, match=r"inputs and outputs, got \[4\]"):
        MLP([4])


def test_an_mlp_has_no_activation_after_its_last_layer_which_can_begin_small():
    torch.manual_seed(0)
    small = MLP([4, 8, 2], last_scale=0.01)
    assert [type(m).__name__ for m in small] == ["Linear", "Tanh", "Linear"]
    assert small(torch.randn(16, 4)).abs().max() < 0.02
