"""Small diffusion models: each equation against written-out numbers, the chain, the networks, the committed weights."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from closeness import close, normal

from polrl.core.device import torch_threads
from polrl.core.errors import DataError, UnknownNameError
from polrl.core.files import find_asset
from polrl.models import diffusion
from polrl.models.diffusion import (
    DenoisingChain,
    EDMDenoiser,
    Ring,
    RingDenoiser,
    add_noise,
    average_weights,
    class_denoiser,
    cosine_schedule,
    ddim_step,
    denoising_loss,
    diffusion_manifest,
    draw_denoising_loss,
    edm_loss,
    edm_sigmas,
    guided_noise,
    load_denoiser,
    preconditioning,
    predict_noise,
    ring_noise,
    score,
    step_log_probability,
    time_features,
)
from polrl.models.diffusion_quality import (
    class_spread,
    digit_accuracy,
    load_digits_8,
    pixel_std,
    ring_quality,
    sliced_wasserstein,
    wasserstein_floor,
)

ALPHA_BAR = cosine_schedule()


@pytest.fixture(autouse=True)
def _one_thread():
    with torch_threads(1):
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recorder:
    """A denoiser that remembers what it was asked, and answers the class number and the level."""

    classes, dimension = 4, 2

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((x, t, y))
        return y.to(x.dtype).unsqueeze(1) + 0 * x


# ---- E1: the schedule --------------------------------------------------------------------------------------------


def test_e1_by_hand():
    f = [math.cos((0.97 * t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(101)]
    kept, expected = 1.0, [1.0]
    for t in range(1, 101):
        kept *= 1 - min(1 - f[t] / f[t - 1], 0.999)
        expected.append(kept)
    close(ALPHA_BAR, torch.tensor(expected, dtype=torch.float64))


def test_e1_starts_at_one_falls_and_leaves_a_trace_of_signal():
    assert ALPHA_BAR[0] == 1 and bool((ALPHA_BAR.diff() < 0).all())
    assert float(ALPHA_BAR[100]) == pytest.approx(0.00218, abs=5e-6)
    assert float(cosine_schedule(t_max=1.0)[100]) < 1e-5


def test_e1_caps_beta():
    capped = cosine_schedule(t_max=1.0, s=0.0)
    close(capped[-1] / capped[-2], 1e-3)


@pytest.mark.parametrize(
    ("options", "word"), [({"levels": 0}, "levels"), ({"t_max": 0.0}, "t_max"), ({"t_max": 1.1}, "t_max")]
)
def test_e1_refuses(options, word):
    with pytest.raises(ValueError, match=word):
        cosine_schedule(**options)


# ---- E2: the loss ------------------------------------------------------------------------------------------------


def test_e2_by_hand():
    asked = Recorder()
    x0, noise = normal(3, 2, seed=1), normal(3, 2, seed=2)
    t, y, dropped = torch.tensor([1, 50, 100]), torch.tensor([0, 2, 3]), torch.tensor([False, True, False])
    loss = denoising_loss(asked, x0, y, t, noise, dropped, ALPHA_BAR)
    (x, seen_t, shown) = asked.calls[0]
    assert shown.tolist() == [0, 4, 3], "the dropped class is the null class"
    assert seen_t.tolist() == [1, 50, 100]
    total = 0.0
    for i in range(3):
        a = float(ALPHA_BAR[int(t[i])])
        for k in range(2):
            close(x[i, k], math.sqrt(a) * float(x0[i, k]) + math.sqrt(1 - a) * float(noise[i, k]))
            total += (float(shown[i]) - float(noise[i, k])) ** 2
    close(loss, total / 6)


def test_e2_draws_levels_from_one_and_drops_as_often_as_asked():
    asked = Recorder()
    x0, y = normal(4000, 2), torch.zeros(4000, dtype=torch.int64)
    draw_denoising_loss(asked, x0, y, ALPHA_BAR, generator(), p_drop=0.15)
    _, t, shown = asked.calls[0]
    assert (int(t.min()), int(t.max())) == (1, 100)
    assert float((shown == 4).double().mean()) == pytest.approx(0.15, abs=0.02)
    draw_denoising_loss(asked, x0, y, ALPHA_BAR, generator(), p_drop=0.0)
    assert bool((asked.calls[1][2] == 0).all())


def test_untrained_network_sees_no_noise_and_its_loss_is_one():
    network = class_denoiser(64, 10, width=32, blocks=1, features=8)
    digits = load_digits_8()
    y = digits.train_labels
    assert not network(digits.train, y * 0 + 5, y).any()
    loss = draw_denoising_loss(network, digits.train, y, ALPHA_BAR.float(), generator())
    assert float(loss.detach()) == pytest.approx(1.0, abs=0.05)


# ---- E3: guidance ------------------------------------------------------------------------------------------------


def test_e3_ends_and_slope():
    without, with_class = normal(3, 2, seed=1), normal(3, 2, seed=2)
    close(guided_noise(without, with_class, 0.0), without)
    close(guided_noise(without, with_class, 1.0), with_class)
    one, two = (guided_noise(without, with_class, w) - with_class for w in (2.0, 3.0))
    close(two, 2 * one)


def test_predict_noise_asks_once_and_for_twice_the_rows():
    asked, x, y = Recorder(), normal(3, 2), torch.tensor([0, 1, 2])
    close(predict_noise(asked, x, torch.tensor(7), y, 1.0)[:, 0], [0.0, 1.0, 2.0])
    close(predict_noise(asked, x, torch.tensor(7), y, 0.0)[:, 0], [4.0, 4.0, 4.0])
    close(predict_noise(asked, x, torch.tensor(7), y, 3.0)[:, 0], [4 + 3 * (v - 4) for v in (0.0, 1.0, 2.0)])
    predict_noise(asked, x, torch.tensor([7, 8, 9]), y, 3.0)
    assert [len(call[0]) for call in asked.calls] == [3, 3, 6, 6]
    assert asked.calls[3][1].tolist() == [7, 8, 9, 7, 8, 9]


# ---- E4: the step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_e4_by_hand(eta, clip):
    x, noise, a, after = normal(4, 3, seed=1), normal(4, 3, seed=2), 0.3, 0.6
    step = ddim_step(x, noise, a, after, eta, clip)
    sigma = eta * math.sqrt((1 - after) / (1 - a) * (1 - a / after))
    close(step.std, sigma)
    for i, k in np.ndindex(4, 3):
        seen, eps = float(x[i, k]), float(noise[i, k])
        data = (seen - math.sqrt(1 - a) * eps) / math.sqrt(a)
        if clip is not None:
            data = max(-clip, min(clip, data))
            eps = (seen - math.sqrt(a) * data) / math.sqrt(1 - a)
        close(step.predicted[i, k], data)
        close(step.mean[i, k], math.sqrt(after) * data + math.sqrt(1 - after - sigma**2) * eps)


def test_e4_sigma_is_linear_in_eta_and_ddpm_posterior_at_one():
    x, noise = normal(2, 2), normal(2, 2, seed=1)
    stds = [float(ddim_step(x, noise, 0.3, 0.6, eta).std) for eta in (0.25, 0.5, 1.0)]
    close(stds, [stds[2] / 4, stds[2] / 2, stds[2]])
    beta = 1 - 0.3 / 0.6
    close(stds[2] ** 2, beta * (1 - 0.6) / (1 - 0.3))
    posterior_mean = (  # Ho et al. 2020, Eq. 7
        math.sqrt(0.6) * beta / 0.7 * ddim_step(x, noise, 0.3, 0.6, 1.0).predicted + math.sqrt(0.5) * 0.4 / 0.7 * x
    )
    close(ddim_step(x, noise, 0.3, 0.6, 1.0).mean, posterior_mean)


def test_e4_last_step_is_the_prediction_without_noise():
    step = ddim_step(normal(2, 2), normal(2, 2, seed=1), 0.9, 1.0, 1.0)
    assert float(step.std) == 0
    close(step.mean, step.predicted)


def test_e4_is_differentiable_by_the_noise():
    noise = normal(3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda n: ddim_step(normal(3, 2), n, 0.3, 0.6, 1.0).mean, (noise,))


# ---- E5: its probability -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_e5_is_a_normal_density(reduction):
    after, mean, std = normal(4, 3, seed=1), normal(4, 3, seed=2), normal(4, 1, seed=3).abs() + 0.1
    density = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(after)
    expected = density.mean(1) if reduction == "mean" else density.sum(1)
    close(step_log_probability(after, mean, std, reduction), expected)


def test_e5_default_is_the_mean():
    after, mean = normal(4, 3, seed=1), normal(4, 3, seed=2)
    close(3 * step_log_probability(after, mean, 0.5), step_log_probability(after, mean, 0.5, "sum"))


def test_e5_floors_sigma_and_passes_gradients_through_the_mean_only():
    after, mean = normal(2, 3, seed=1).requires_grad_(), normal(2, 3, seed=2).requires_grad_()
    close(step_log_probability(after, mean, 0.0), step_log_probability(after, mean, 0.02))
    close(step_log_probability(after, mean, 0.1, floor=0.3), step_log_probability(after, mean, 0.3))
    by_mean, by_after = torch.autograd.grad(
        step_log_probability(after, mean, 0.5).sum(), (mean, after), allow_unused=True
    )
    assert by_after is None
    close(by_mean, ((after - mean) / 0.25 / 3).detach())


def test_e5_refuses():
    with pytest.raises(ValueError, match="floor must be above 0"):
        step_log_probability(normal(1, 1), normal(1, 1), 0.5, floor=0.0)
    with pytest.raises(ValueError, match="'median'"):
        step_log_probability(normal(1, 1), normal(1, 1), 0.5, "median")


# ---- E6, E7: the exact ring --------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 30, 100])
def test_e6_and_e7_are_the_gradient_of_the_log_density(t):
    ring, level = Ring(), ALPHA_BAR[t]
    x = (2 * normal(16, 2, seed=t)).requires_grad_()
    centres = level.sqrt() * ring.centres(x)
    v = level * ring.std**2 + 1 - level
    single = -(x.unsqueeze(1) - centres).square().sum(-1) / (2 * v)
    denoiser = RingDenoiser(ring)
    for k in (8, 3):
        density = torch.logsumexp(single, 1) if k == 8 else single[:, k]
        (expected,) = torch.autograd.grad(density.sum(), x, retain_graph=True)
        found = score(denoiser(x, torch.full((16,), t), torch.full((16,), k)), level)
        close(found.detach(), expected, 1e-8)


def test_e7_mixes_rows_of_all_kinds():
    x, y, t = normal(5, 2), torch.tensor([0, 8, 3, 8, 7]), torch.tensor([1, 20, 50, 70, 100])
    ring = Ring()
    rows = [ring_noise(x[i : i + 1], y[i : i + 1], ALPHA_BAR[t[i]], ring.centres(x), ring.std) for i in range(5)]
    close(RingDenoiser()(x, t, y), torch.cat(rows))


def test_ring_has_its_centres_on_a_circle_and_its_spread_around_them():
    ring = Ring()
    centres = ring.centres(normal(1))
    close(centres.norm(dim=1), torch.full((8,), 2.0))
    close(centres[2], [0.0, 2.0])
    points = ring.sample(torch.full((20_000,), 2), generator())
    assert float(points.std(0).mean()) == pytest.approx(0.15, rel=0.02)
    close(points.mean(0), [0.0, 2.0], 0.01)


def test_exact_model_sends_noise_to_the_class():
    chain = DenoisingChain(ALPHA_BAR, 100, dtype=torch.float64)
    x = chain.sample(RingDenoiser(), torch.full((4000,), 3), generator())
    centre = Ring().centres(x)[3]
    assert float((x.mean(0) - centre).abs().max()) < 0.02  # noise without a trace of signal pulls it inwards
    assert float(x.std(0).mean()) == pytest.approx(0.143, abs=0.004)


def test_one_jump_is_the_posterior_mean_of_a_single_gaussian():
    x, ring, a = normal(6, 2), Ring(), float(ALPHA_BAR[60])
    y = torch.full((6,), 5)
    noise = RingDenoiser()(x, torch.full((6,), 60), y)
    v = a * ring.std**2 + 1 - a
    expected = ring.centres(x)[5] + math.sqrt(a) * ring.std**2 / v * (x - math.sqrt(a) * ring.centres(x)[5])
    close(ddim_step(x, noise, a, 1.0, 0.0).mean, expected)


def test_round_trip_halves_its_error_when_the_steps_double():
    levels = cosine_schedule(1000)
    denoiser = RingDenoiser(alpha_bar=levels)
    start, y = normal(400, 2), torch.full((400,), 8)
    errors = []
    for steps in (100, 200):
        grid = torch.linspace(1000, 0, steps + 1, dtype=torch.float64).round().long().tolist()
        x = start
        for way in (grid, grid[::-1]):
            for t, after in itertools.pairwise(way):
                x = ddim_step(x, denoiser(x, torch.tensor(t), y), levels[t], levels[after], 0.0).mean
        errors.append(float((x - start).norm(dim=1).median()))
    assert errors[0] == pytest.approx(0.047, abs=0.012)
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)


# ---- the chain ---------------------------------------------------------------------------------------------------


def test_chain_has_the_card_s_grid():
    chain = DenoisingChain(ALPHA_BAR, 20)
    assert chain.levels.tolist() == list(range(100, -1, -5))
    close(chain.alpha_bar, ALPHA_BAR[chain.levels].float())
    assert DenoisingChain(ALPHA_BAR, 7).levels.tolist() == [round(100 - i * 100 / 7) for i in range(8)]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_chain_steps_are_e4(eta, clip):
    chain = DenoisingChain(ALPHA_BAR, 10, eta=eta, clip=clip, floor=0.02, dtype=torch.float64)
    x, noise = normal(10, 3, seed=1), normal(10, 3, seed=2)
    together = chain.step(x, noise, torch.arange(10))
    for i in range(10):
        a, after = (ALPHA_BAR[chain.levels[j]] for j in (i, i + 1))
        expected = ddim_step(x, noise, a, after, eta, clip)
        alone = chain.step(x, noise, i)
        close(alone.mean, expected.mean, 1e-10)
        close(alone.predicted, expected.predicted, 1e-10)
        close(alone.std, torch.clamp(expected.std, min=0.02).reshape(1), 1e-10)
        close(together.mean[i], expected.mean[i], 1e-10)
        close(together.std[i], alone.std)


def test_noise_weight_is_the_slope_of_the_mean():
    chain = DenoisingChain(ALPHA_BAR, 10, eta=0.7, floor=0.02, dtype=torch.float64)
    x, noise = normal(2, 3, seed=1), normal(2, 3, seed=2).requires_grad_()
    for i in range(10):
        (slope,) = torch.autograd.grad(chain.step(x, noise, i).mean.sum(), noise)
        close(slope, chain.noise_weight[i].expand_as(slope))


@pytest.mark.parametrize(("guidance", "clip"), [(1.0, None), (2.0, 1.0)])
def test_sampling_is_the_steps_one_by_one(guidance, clip):
    chain = DenoisingChain(ALPHA_BAR, 8, eta=1.0, clip=clip, guidance=guidance, dtype=torch.float64)
    denoiser, y = RingDenoiser(), torch.tensor([0, 3, 8, 5])
    found = chain.sample(denoiser, y, generator(3))
    rng = generator(3)
    x = torch.randn(4, 2, generator=rng, dtype=torch.float64)
    for i in range(8):
        step = chain.step(x, chain.predict(denoiser, x, i, y), i)
        x = step.mean
        if i < 7:
            x = x + step.std * torch.randn(4, 2, generator=rng, dtype=torch.float64)
    close(found, x, 1e-9)


def test_deterministic_sampling_draws_nothing():
    chain = DenoisingChain(ALPHA_BAR, 8, dtype=torch.float64)
    rng = generator()
    before = rng.get_state()
    start = normal(4, 2)
    kept = start.clone()
    first, second = (chain.sample(RingDenoiser(), torch.zeros(4).long(), rng, start=start) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(rng.get_state(), before)
    assert torch.equal(start, kept), "the start is not changed in place"


def test_floor_reaches_sampling_and_leaves_the_mean_alone():
    plain, floored = (DenoisingChain(ALPHA_BAR, 8, eta=1.0, floor=f, dtype=torch.float64) for f in (0.0, 0.02))
    assert float(plain.std[-1]) == 0 and float(floored.std[-1]) == pytest.approx(0.02)
    x, noise = normal(2, 2), normal(2, 2, seed=1)
    close(plain.step(x, noise, 7).mean, floored.step(x, noise, 7).mean)
    far = DenoisingChain(ALPHA_BAR, 8, eta=1.0, floor=5.0)
    assert float(far.sample(RingDenoiser(), torch.zeros(500).long(), generator()).std()) > 4


def test_log_probability_of_a_chain():
    chain = DenoisingChain(ALPHA_BAR, 8, eta=1.0, floor=0.02, dtype=torch.float64)
    x, noise = normal(3, 2, seed=1), normal(3, 2, seed=2)
    step = chain.step(x, noise, 4)
    after = step.mean + 0.1
    close(chain.log_probability(after, step), step_log_probability(after, step.mean, step.std, "mean"))
    close(chain.log_probability(after, step, "sum"), step_log_probability(after, step.mean, step.std, "sum"))


def test_log_probability_needs_noise():
    x = normal(3, 2)
    for options, word in (({"eta": 0.0, "floor": 0.02}, "eta is 0"), ({"eta": 1.0}, "floor is 0")):
        chain = DenoisingChain(ALPHA_BAR, 8, dtype=torch.float64, **options)
        with pytest.raises(ValueError, match=word):
            chain.log_probability(x, chain.step(x, x, 0))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"steps": 0}, "steps must be from 1 to the 100"),
        ({"steps": 101}, "101"),
        ({"steps": 5, "eta": 1.5}, "eta must be from 0 to 1"),
        ({"steps": 5, "eta": -0.1}, "eta"),
        ({"steps": 5, "clip": 0.0}, "clip"),
        ({"steps": 5, "floor": -1.0}, "floor"),
    ],
)
def test_chain_refuses(options, word):
    with pytest.raises(ValueError, match=word):
        DenoisingChain(ALPHA_BAR, **options)


# ---- the network -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimension", "classes", "width", "blocks", "features", "count"),
    [
        (2, 8, 64, 2, 16, 39_810),
        (2, 8, 128, 3, 16, 219_650),
        (64, 10, 96, 2, 32, 101_056),
        (64, 10, 128, 3, 32, 237_888),
        (64, 10, 256, 3, 64, 909_888),
    ],
)
def test_parameter_counts_are_the_card_s(dimension, classes, width, blocks, features, count):
    network = class_denoiser(dimension, classes, width=width, blocks=blocks, features=features)
    assert sum(p.numel() for p in network.parameters()) == count
    assert network.classes == classes


def test_time_features_by_hand():
    found = time_features(torch.tensor([0.0, 0.25], dtype=torch.float64), 6)
    angles = [250 * 10_000 ** (-j / 3) for j in range(3)]
    close(found[1], torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64))
    close(found[0], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])


def test_network_by_hand():
    torch.manual_seed(0)
    network = class_denoiser(3, 4, width=8, blocks=1, features=6).double()
    torch.nn.init.normal_(network.head.weight)
    x, t, y = normal(2, 3), torch.tensor([10, 90]), torch.tensor([1, 4])
    silu = torch.nn.functional.silu
    label = network.label.weight[y]
    condition = silu(network.condition(silu(network.time(time_features(t.double() / 100, 6)) + label)))
    hidden, block = network.inp(x), network.blocks[0]
    scale, shift = block.modulation(condition)[:, :8], block.modulation(condition)[:, 8:]
    hidden = hidden + block.second(silu(block.first((1 + scale) * block.norm(hidden) + shift)))
    close(network(x, t, y), network.head(silu(network.norm(hidden))))


def test_network_takes_one_level_for_all_rows_and_observations_instead_of_classes():
    network = load_denoiser("ring-small")
    x, y = normal(3, 2).float(), torch.tensor([0, 1, 8])
    close(network(x, torch.tensor(40), y), network(x, torch.full((3,), 40), y), 1e-6)
    control = diffusion.ResidualMLP(4, torch.nn.Linear(5, 16), width=16, blocks=1, features=8)
    assert control(normal(3, 4).float(), torch.tensor(40), normal(3, 5).float()).shape == (3, 4)


def test_network_refuses_odd_features():
    with pytest.raises(ValueError, match="got 5"):
        class_denoiser(2, 8, width=8, blocks=1, features=5)


def test_average_follows_and_slows_down():
    network, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(network.weight)
    torch.nn.init.zeros_(average.weight)
    average_weights(average, network, 0)
    close(average.weight.detach(), torch.full((1, 1), 0.9), 1e-6)
    average_weights(average, network, 90)
    close(1 - average.weight.detach(), torch.full((1, 1), 0.1 * 0.91), 1e-6)
    average_weights(average, network, 10**6)
    close(1 - average.weight.detach(), torch.full((1, 1), 0.091 * 0.999), 1e-6)


# ---- E8: EDM -----------------------------------------------------------------------------------------------------


def edm(output: float = 0.0) -> EDMDenoiser:
    """Return an EDM denoiser whose network answers a constant, in float64."""
    network = class_denoiser(2, 4, width=8, blocks=1, features=4, levels=1)
    torch.nn.init.constant_(network.head.bias, output)
    return EDMDenoiser(network).double()


def test_e8_by_hand():
    c = preconditioning(torch.tensor([0.3], dtype=torch.float64), 0.5)
    total = 0.3**2 + 0.5**2
    close(torch.cat(list(c)), [0.25 / total, 0.15 / math.sqrt(total), 1 / math.sqrt(total), math.log(0.3) / 4])


def test_e8_without_network_is_optimal_for_gaussian_data():
    x, sigma = normal(4, 2), torch.tensor([[0.3]], dtype=torch.float64)
    close(edm().denoised(x, sigma, torch.zeros(4).long()), 0.25 / (0.09 + 0.25) * x)


def test_e8_tends_to_the_input_and_keeps_unit_variance():
    x, y = normal(4, 2), torch.zeros(4).long()
    close(edm(0.7).denoised(x, torch.tensor([[1e-9]], dtype=torch.float64), y), x, 1e-8)
    for sigma in (0.02, 0.5, 10.0):
        c = preconditioning(torch.tensor(sigma, dtype=torch.float64), 0.5)
        close(c.into**2 * (0.5**2 + sigma**2), 1.0)
        close(((1 - c.skip) ** 2 * 0.5**2 + c.skip**2 * sigma**2) / c.out**2, 1.0)
        close((sigma**2 + 0.25) / (sigma * 0.5) ** 2 * c.out**2, 1.0)


def test_e8_network_is_told_the_scaled_input_and_c_noise():
    model = edm()
    seen = {}
    model.network.register_forward_pre_hook(lambda module, inputs: seen.update(zip("xty", inputs, strict=True)))
    x, sigma = normal(3, 2), torch.tensor([[0.1], [0.5], [3.0]], dtype=torch.float64)
    model.denoised(x, sigma, torch.zeros(3).long())
    close(seen["x"], x / (sigma.square() + 0.25).sqrt())
    close(seen["t"], sigma[:, 0].log() / 4)


def test_e8a_by_hand():
    denoised, x0, sigma = normal(3, 2, seed=1), normal(3, 2, seed=2), torch.tensor([[0.1], [0.5], [3.0]]).double()
    expected = sum(
        (float(sigma[i]) ** 2 + 0.25) / (0.5 * float(sigma[i])) ** 2 * float(denoised[i, k] - x0[i, k]) ** 2
        for i, k in np.ndindex(3, 2)
    )
    close(edm_loss(denoised, x0, sigma), expected / 6)


def test_e8b_levels():
    sigmas = edm_sigmas(18)
    assert len(sigmas) == 19 and float(sigmas[18]) == 0
    close(sigmas[[0, 17]], [10.0, 0.02])
    close(sigmas[5], (10 ** (1 / 7) + 5 / 17 * (0.02 ** (1 / 7) - 10 ** (1 / 7))) ** 7)
    with pytest.raises(ValueError, match="got 1"):
        edm_sigmas(1)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_heun_is_second_order_and_counts_its_evaluations(guidance):
    model = edm()  # optimal for N(0, 0.25), for which the flow is known: x scales as sqrt(sigma^2 + sigma_d^2)
    calls = []
    model.network.register_forward_hook(lambda *a: calls.append(len(a[2])))
    y = torch.zeros(50).long()
    errors = []
    for n in (10, 20):
        calls.clear()
        found = model.sample(y, generator(), n=n, guidance=guidance)
        assert len(calls) == 2 * n - 1
        start = 10 * torch.randn(50, 2, generator=generator(), dtype=torch.float64)
        exact = start * 0.5 / math.sqrt(100.25)
        errors.append(float((found - exact).abs().max()))
    assert errors[1] < errors[0] / 3
    assert errors[1] < 0.03


def test_edm_answers_the_common_call():
    model, x, y = edm(0.3), normal(3, 2), torch.tensor([0, 2, 4])
    t = torch.tensor([1, 50, 100])
    level = cosine_schedule(dtype=torch.float32).double()[t].unsqueeze(1)
    data = model.denoised(x / level.sqrt(), ((1 - level) / level).sqrt(), y)
    close(add_noise(data, model(x, t, y), level), x, 1e-9)


# ---- quality -----------------------------------------------------------------------------------------------------


def test_wasserstein_of_a_shift_is_its_mean_length_along_the_axes():
    x = normal(300, 2)
    moved = sliced_wasserstein(x, x + torch.tensor([3.0, 4.0]), generator(), directions=4000)
    close(moved, 5 / math.sqrt(2), 0.05)  # the mean square of a direction's share is 1/2 in the plane
    close(sliced_wasserstein(x, x[torch.randperm(300)], generator()), 0.0)


def test_wasserstein_takes_quantiles_where_sizes_differ():
    x = normal(2000, 2)
    near = sliced_wasserstein(x[:1500], x, generator())
    assert float(near) < 0.1
    far = sliced_wasserstein(x[:1500] + 2, x, generator())
    assert float(far) == pytest.approx(2, abs=0.25)
    with pytest.raises(ValueError, match="dimension"):
        sliced_wasserstein(x, normal(5, 3), generator())


def test_floor_falls_with_the_number():
    real, other = normal(2000, 2), normal(2000, 2, seed=1)
    few, many = (float(wasserstein_floor(real, other, n, generator())) for n in (50, 2000))
    assert 0 < many < few
    with pytest.raises(ValueError, match="2000 real points"):
        wasserstein_floor(real, other, 2001, generator())


def test_digits_are_scaled_split_and_told_apart():
    digits = load_digits_8()
    assert digits.train.shape == (1500, 64) and digits.held_out.shape == (297, 64)
    assert (float(digits.train.min()), float(digits.train.max())) == (-1, 1)
    assert float(pixel_std(digits.train)) == pytest.approx(0.46, abs=0.01)
    assert digit_accuracy(digits.held_out, digits.held_out_labels) > 0.97
    assert digit_accuracy(digits.held_out, (digits.held_out_labels + 1) % 10) < 0.05


def test_ring_quality_by_hand():
    centres = Ring().centres(normal(1))
    points = torch.cat([centres[:2], torch.zeros(1, 2).double(), centres[4:5] + 0.3])
    quality = ring_quality(points, torch.tensor([0, 3, 0, 4]))
    close(quality.off, 0.25)
    close(quality.spread, math.sqrt((4 + 0.18) / 4) / (0.15 * math.sqrt(2)), 1e-6)
    close(quality.shares.sum(), 1.0, 1e-6)
    assert float(quality.wanted) in (0.5, 0.75), "the origin is as near to all"


def test_class_spread_by_hand():
    points, y = normal(7, 3), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    kept = torch.tensor([True, True, True, True, True, True, False])
    squares = sum(
        float((points[i] - points[own].mean(0)).square().sum()) for own in ([0, 1, 2], [3, 4], [5]) for i in own
    )
    close(class_spread(points, y, kept, 4), math.sqrt(squares / 3 / 3))
    close(class_spread(points, y, kept & (y == 2), 4), 0.0)
    many = 0.15 * normal(4000, 2) + Ring().centres(normal(1)).repeat(500, 1)
    assert float(class_spread(many, torch.arange(8).repeat(500), torch.ones(4000).bool(), 8)) == pytest.approx(
        0.15, rel=0.03
    )


# ---- the committed models ----------------------------------------------------------------------------------------


def test_manifest_is_whole():
    manifest = json.loads((find_asset("data/diffusion") / "manifest.json").read_text())
    assert manifest["title"]
    models = diffusion_manifest()
    assert set(manifest["files"]) == {about["file"] for about in models.values()}
    assert sum((find_asset("data/diffusion") / file).stat().st_size for file in manifest["files"]) < 6_000_000
    for about in models.values():
        assert about["recipe"]["steps"] and about["quality"] and about["seed"] == 0


@pytest.mark.parametrize("name", sorted(diffusion_manifest()))
def test_models_load_as_their_own_copies(name):
    first, second = load_denoiser(name), load_denoiser(name)
    assert not first.training
    parameters = list(first.parameters())
    assert sum(p.numel() for p in parameters) == diffusion_manifest()[name]["parameters"]
    with torch.no_grad():
        parameters[0].zero_()
    assert float(next(second.parameters()).abs().sum()) > 0


def test_loading_leaves_global_randomness_alone():
    before = torch.get_rng_state()
    load_denoiser("ring-small")
    assert torch.equal(torch.get_rng_state(), before)


def test_trained_ring_follows_its_classes_and_the_noisy_one_half_of_the_time():
    y = torch.arange(2000) % 8
    for name, low, high in (("ring-small", 0.98, 1.0), ("ring-noisy", 0.52, 0.66)):
        chain = DenoisingChain(ALPHA_BAR, 20, eta=1.0, clip=2.5)
        quality = ring_quality(chain.sample(load_denoiser(name), y, generator()), y)
        assert low <= float(quality.wanted) <= high, name


def test_trained_digits_are_readable_and_guidance_makes_them_more_so():
    network, y = load_denoiser("digits-default"), torch.arange(300) % 10
    found = []
    for guidance in (0.0, 1.0, 2.0):
        chain = DenoisingChain(ALPHA_BAR, 20, clip=1.0, guidance=guidance)
        found.append(digit_accuracy(chain.sample(network, y, generator()), y))
    assert found[0] < 0.2 and found[1] > 0.88 and found[2] > 0.97


def test_trained_edm_draws_digits():
    y = torch.arange(300) % 10
    assert digit_accuracy(load_denoiser("digits-edm").sample(y, generator(), n=10, guidance=2.0), y) > 0.95
    chain = DenoisingChain(ALPHA_BAR, 20, clip=1.0)
    assert digit_accuracy(chain.sample(load_denoiser("digits-edm"), y, generator()), y) > 0.85


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copytree(find_asset("data/diffusion"), tmp_path / "diffusion")
    monkeypatch.setattr(diffusion, "find_asset", lambda relative: tmp_path / "diffusion")
    return tmp_path / "diffusion"


def test_unknown_model_suggests():
    with pytest.raises(UnknownNameError, match="did you mean ring-small"):
        load_denoiser("ring-smal")


def test_truncated_weights_are_refused(folder):
    content = (folder / "ring-small.safetensors").read_bytes()
    (folder / "ring-small.safetensors").write_bytes(content[:-10])
    with pytest.raises(DataError, match="truncated or altered"):
        load_denoiser("ring-small")


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {}, "models": {"a": {"file": "b"}}}'])
def test_broken_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json can't be read"):
        load_denoiser("ring-small")


def test_weights_that_do_not_fit_are_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["models"]["ring-small"]["network"]["width"] = 32
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="does not fit"):
        load_denoiser("ring-small")
