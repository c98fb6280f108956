"""Randomness of one's own: seeds, generators, the lock on the global ones, and draws that take a generator."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from polrl.core.sampling import (
    Dropout,
    Generators,
    derive_seed,
    sample_bernoulli,
    sample_beta,
    sample_categorical,
    sample_gamma,
    sample_normal,
    seeded_globals,
)

N = 20_000


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


# ---- seeds and generators --------------------------------------------------------------------------------------------


def test_seeds_differ_by_seed_and_by_purpose():
    seeds = {
        derive_seed(seed, purpose) for seed in range(200) for purpose in ("train", "setup", "observe", "train/cpu")
    }
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(3, "train") == derive_seed(3, "train")
    assert 0 <= derive_seed(2**32 - 1, "") < 2**63


def test_the_streams_of_a_learner_are_repeatable_and_apart():
    def draws(made):
        return [float(torch.rand((), generator=g)) for g in (made.torch, made.cpu)] + [made.numpy.random()]

    cpu = torch.device("cpu")
    assert draws(Generators(1, cpu)) == draws(Generators(1, cpu))
    kinds = [draws(made) for made in (Generators(1, cpu), Generators(2, cpu), Generators(1, cpu, "observe"))]
    assert len({value for kind in kinds for value in kind}) == 9


def test_generators_go_on_from_a_saved_state():
    made, other = Generators(1, torch.device("cpu")), Generators(2, torch.device("cpu"))
    torch.rand(3, generator=made.torch), made.numpy.random(2)
    other.load_state_dict(made.state_dict())
    assert torch.equal(torch.rand(4, generator=made.torch), torch.rand(4, generator=other.torch))
    assert torch.equal(torch.rand(4, generator=made.cpu), torch.rand(4, generator=other.cpu))
    assert made.numpy.random() == other.numpy.random()


# ---- the global generators ---------------------------------------------------------------------------------------------


def global_state():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


@pytest.mark.parametrize("fails", [False, True])
def test_the_global_generators_are_seeded_inside_and_restored_after(fails):
    before = global_state()
    drawn = []
    for _ in range(2):
        try:
            with seeded_globals(5):
                drawn.append((random.random(), np.random.rand(), float(torch.rand(())), nn.Linear(1, 1).weight.item()))
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert global_state() == before
    assert drawn[0] == drawn[1]
    with seeded_globals(6):
        assert random.random() != drawn[0][0]


def test_blocks_inside_blocks_come_back_to_the_outer_ones_stream():
    with seeded_globals(1):
        expected = [torch.rand(()), torch.rand(())]
    with seeded_globals(1):
        first = torch.rand(())
        with seeded_globals(2):
            torch.rand(5)
        assert [first, torch.rand(())] == expected


def test_networks_built_in_many_threads_come_out_as_alone():
    def build(seed):
        with seeded_globals(seed):
            return torch.cat([nn.Linear(20, 20).weight.flatten() for _ in range(10)]).detach()

    alone = [build(seed) for seed in range(6)]
    before = global_state()
    together: dict[int, torch.Tensor] = {}
    barrier = threading.Barrier(6)

    def work(seed):
        barrier.wait(30)
        together[seed] = build(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(torch.equal(together[seed], alone[seed]) for seed in range(6))
    assert global_state() == before


# ---- draws -------------------------------------------------------------------------------------------------------------


def agrees(sample, distribution):
    """Kolmogorov and Smirnov's test at a level that a fixed seed passes once and for all."""
    return stats.kstest(sample.double().numpy(), distribution.cdf).pvalue > 1e-3


def test_normal_draws(generator):
    sample = sample_normal(torch.full((N,), 2.0, dtype=torch.float64), 0.5, generator)
    assert agrees(sample, stats.norm(2, 0.5)) and not agrees(sample, stats.norm(2.05, 0.5))


def test_normal_draws_pass_gradients_to_mean_and_deviation(generator):
    mean = torch.zeros(4, requires_grad=True)
    deviation = torch.ones(4, requires_grad=True)
    drawn = sample_normal(mean, deviation, generator)
    drawn.sum().backward()
    assert torch.equal(mean.grad, torch.ones(4)) and torch.allclose(deviation.grad, drawn.detach())


@pytest.mark.parametrize("concentration", [0.3, 1.0, 7.5])
def test_gamma_draws(generator, concentration):
    sample = sample_gamma(torch.full((N,), concentration, dtype=torch.float64), generator)
    assert agrees(sample, stats.gamma(concentration)) and not agrees(sample, stats.gamma(concentration * 1.1))


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (2.0, 5.0), (1.0, 1.0), (30.0, 3.0)])
def test_beta_draws(generator, alpha, beta):
    sample = sample_beta(
        torch.full((N,), alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64), generator
    )
    assert sample.shape == (N,)
    assert agrees(sample, stats.beta(alpha, beta)) and not agrees(sample, stats.beta(alpha * 1.1, beta))


def test_beta_draws_stay_in_the_unit_interval_where_both_are_tiny(generator):
    sample = sample_beta(torch.full((1000,), 1e-6), torch.full((1000,), 1e-6), generator)
    assert sample.isfinite().all() and ((sample >= 0) & (sample <= 1)).all()


@pytest.mark.parametrize("draw", [sample_gamma, lambda x, g: sample_beta(x, x, g), sample_bernoulli])
def test_draws_without_a_gradient_are_constants(generator, draw):
    drawn = draw(torch.full((2, 3), 0.5, requires_grad=True), generator)
    assert not drawn.requires_grad and drawn.shape == (2, 3)


def test_categorical_draws(generator):
    logits = torch.tensor([[0.0, 1.0, -1.0, float("-inf")], [3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    sample = sample_categorical(logits.expand(N, 2, 4), generator)
    assert sample.shape == (N, 2) and sample.dtype == torch.int64 and not sample.requires_grad
    for row, probability in enumerate(torch.softmax(logits.detach(), -1)):
        counts = torch.bincount(sample[:, row], minlength=4).double().numpy()
        expected = probability.double().numpy() * N
        possible = expected > 0
        assert counts[~possible].sum() == 0
        assert stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3
    assert sample_categorical(torch.zeros(3), generator).shape == ()


def test_bernoulli_draws(generator):
    sample = sample_bernoulli(torch.full((N,), 0.3), generator)
    assert set(sample.tolist()) == {0.0, 1.0}
    assert stats.binomtest(int(sample.sum()), N, 0.3).pvalue > 1e-3


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: sample_normal(torch.zeros(5), 1.0, g),
        lambda g: sample_gamma(torch.ones(5), g),
        lambda g: sample_beta(torch.ones(5), torch.ones(5), g),
        lambda g: sample_categorical(torch.zeros(5, 9), g),
        lambda g: sample_bernoulli(torch.full((20,), 0.5), g),
        lambda g: Dropout(0.5, g)(torch.ones(20)),
    ],
    ids=["normal", "gamma", "beta", "categorical", "bernoulli", "dropout"],
)
def test_draws_come_from_the_given_generator_alone(draw):
    before = global_state()
    first, second, other = (draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert global_state() == before


# ---- dropout -------------------------------------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_drops_its_share(generator):
    out = Dropout(0.25, generator)(torch.ones(N))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert stats.binomtest(int((out == 0).sum()), N, 0.25).pvalue > 1e-3


def test_dropout_is_the_identity_in_evaluation_and_at_zero(generator):
    x = torch.randn(5, generator=generator)
    state = generator.get_state()
    layer = Dropout(0.5, generator).eval()
    assert layer(x) is x and Dropout(0.0, generator)(x) is x
    assert torch.equal(generator.get_state(), state)


def test_dropout_passes_the_gradient_of_what_it_keeps(generator):
    x = torch.ones(100, requires_grad=True)
    out = Dropout(0.5, generator)(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_an_impossible_share_is_refused(generator, share):
    with pytest.raises(ValueError, match="p must be from 0 to below 1"):
        Dropout(share, generator)


def test_dropout_adds_nothing_to_a_modules_state(generator):
    assert nn.Sequential(Dropout(0.5, generator)).state_dict() == {}
