"""The noise mask: each equation against values computed by other means, the card's identities, the learner."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, special, stats
from sklearn.metrics import balanced_accuracy_score
from torch.nn import functional as F

from polrl import Run
from polrl.core.errors import DivergedError, KnobError
from polrl.core.schedules import cosine, warmup
from polrl.foundations import noise_mask
from polrl.foundations.noise_mask import (
    NoiseMask,
    average_checkpoints,
    heated_mask,
    joint_objective,
    joint_objective_gradient,
    log_density,
    lse_score,
    mask_image,
    mix_with_base,
    move_base,
    reinforce_objective,
    render_mask,
    sample_mask,
    study,
)

FLOATS = (torch.float32, torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(*shape: int, low: float = 0.0, high: float = 1.0, seed: int = 0) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator(seed), dtype=torch.float64)


@pytest.fixture
def problem() -> dict[str, torch.Tensor]:
    """Return log-concentrations, cells, and logits of 4 images, 9 cells, 5 classes."""
    return {
        "a": uniform(4, 9, low=-1, high=1.5, seed=1),
        "b": uniform(4, 9, low=-1, high=1.5, seed=2),
        "mask": uniform(4, 9, low=0.02, high=0.98, seed=3),
        "logits": uniform(4, 5, low=-2, high=2, seed=4),
        "labels": torch.tensor([0, 3, 4, 3]),
    }


def costs(logits, labels):
    """Return each image's cross-entropy, written out."""
    shifted = logits - logits.max(dim=1, keepdim=True).values
    return shifted.exp().sum(dim=1).log() - shifted[torch.arange(len(labels)), labels]


def beta_logs(a, b, mask) -> np.ndarray:
    return stats.beta.logpdf(np.asarray(mask), np.exp(np.asarray(a)), np.exp(np.asarray(b)))


def slope(function, at: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """Return the gradient of a scalar function by central differences."""
    gradient = torch.zeros_like(at)
    for i in range(at.numel()):
        ends = []
        for sign in (1, -1):
            moved = at.clone()
            moved.view(-1)[i] += sign * step
            ends.append(float(function(moved)))
        gradient.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(expected), rtol=tolerance, atol=tolerance, check_dtype=False
    )


# ---- E2 to E4: from the policy's outputs to a mask -----------------------------------------------------------


def test_e2_weighs_base_and_raw_output():
    base, raw = uniform(1, 3, seed=1), uniform(2, 3, low=-2, high=2, seed=2)
    expected = [[0.7 * float(base[0, j]) + 0.3 * float(raw[i, j]) for j in range(3)] for i in range(2)]
    close(mix_with_base(base, raw, 0.7), torch.tensor(expected, dtype=torch.float64))


def test_e2_passes_its_share_of_the_gradient_to_the_policy():
    raw = uniform(2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(mix_with_base(uniform(1, 3), raw, 0.9).sum(), raw)
    close(gradient, torch.full((2, 3), 0.1, dtype=torch.float64))


def test_e3_moves_the_base_by_the_batch_mean():
    base, raw = uniform(1, 3, seed=1), uniform(4, 3, low=-2, high=2, seed=2)
    means = [sum(float(raw[i, j]) for i in range(4)) / 4 for j in range(3)]
    expected = [[0.99 * float(base[0, j]) + 0.01 * means[j] for j in range(3)]]
    close(move_base(base, raw, 0.99), torch.tensor(expected, dtype=torch.float64))


def test_e3_stops_the_gradient():
    assert not move_base(uniform(1, 3), uniform(4, 3).requires_grad_(), 0.99).requires_grad


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (3.0, 1.5), (0.6, 2.0), (30.0, 20.0)])
def test_e4_draws_from_the_beta_distribution(alpha, beta):
    a, b = (torch.full((50, 80), math.log(x), dtype=torch.float64) for x in (alpha, beta))
    drawn = sample_mask(a, b, generator())
    assert stats.kstest(drawn.flatten().numpy(), stats.beta(alpha, beta).cdf).pvalue > 0.01


def test_e4_gives_each_cell_its_own_concentrations():
    a, b = torch.tensor([[-1.0, 4.0]]).expand(2000, 2), torch.tensor([[4.0, -1.0]]).expand(2000, 2)
    mean = sample_mask(a, b, generator()).mean(dim=0)
    expected = math.exp(-1) / (math.exp(-1) + math.exp(4))
    close(mean, [expected, 1 - expected], tolerance=0.003)


@pytest.mark.parametrize("dtype", FLOATS)
def test_e4_is_a_constant_away_from_the_ends(dtype):
    a = torch.full((200, 50), -3.0, dtype=dtype, requires_grad=True)
    drawn = sample_mask(a, a, generator())
    assert not drawn.requires_grad and drawn.dtype == dtype
    assert 1e-6 * 0.99 <= float(drawn.min()) < 2e-6 and 1 - 2e-6 < float(drawn.max()) <= 1 - 0.99e-6
    assert log_density(a, a, drawn).isfinite().all()


def test_e4_follows_its_generator():
    a = torch.zeros(2, 4)
    first, again, other = (sample_mask(a, a, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- E5: the mask as an image --------------------------------------------------------------------------------


def render_by_loops(cells, size: int, kernel: int, sigma: float) -> np.ndarray:
    """Return the rendered masks [B, size, size]: nearest neighbour, then a blur, pixel by pixel."""
    grid, half = math.isqrt(cells.shape[1]), kernel // 2
    weights = [math.exp(-(t**2) / (2 * sigma**2)) for t in range(-half, half + 1)]
    total = sum(weights)

    def mirrored(i: int) -> int:
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    def pixel(one, row: int, column: int) -> float:
        return float(one[(row * grid // size) * grid + column * grid // size])

    rendered = np.zeros((len(cells), size, size))
    for n, one in enumerate(cells):
        for row in range(size):
            for column in range(size):
                rendered[n, row, column] = sum(
                    weights[s + half]
                    * weights[t + half]
                    / total**2
                    * pixel(one, mirrored(row + s), mirrored(column + t))
                    for s in range(-half, half + 1)
                    for t in range(-half, half + 1)
                )
    return rendered


@pytest.mark.parametrize(
    ("grid", "size", "kernel", "sigma"),
    [(2, 4, 3, 1.0), (2, 7, 5, 0.6), (3, 8, 5, 6.0), (5, 5, 3, 2.0), (2, 4, 7, 2.0)],
)
def test_e5_is_nearest_neighbour_then_a_mirrored_blur(grid, size, kernel, sigma):
    cells = uniform(2, grid**2)
    rendered = render_mask(cells, size, kernel, sigma)
    assert rendered.shape == (2, 1, size, size)
    close(rendered[:, 0], render_by_loops(cells, size, kernel, sigma))


def test_e5_at_the_papers_ratio_is_scipys_mirrored_blur():
    cells = uniform(3, 64)
    rows = [row * 8 // 28 for row in range(28)]
    expected = cells.reshape(3, 8, 8).numpy()[:, rows][:, :, rows]
    for axis in (1, 2):
        expected = ndimage.gaussian_filter1d(expected, 6.0, axis=axis, mode="mirror", radius=6)
    close(render_mask(cells, 28, 13, 6.0)[:, 0], expected)


def test_e5_without_blur_shows_the_cells_row_by_row():
    rendered = render_mask(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), 4, 1, 6.0)[0, 0]
    expected = [[0.1, 0.1, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2], [0.3, 0.3, 0.4, 0.4], [0.3, 0.3, 0.4, 0.4]]
    assert torch.equal(rendered, torch.tensor(expected))


@pytest.mark.parametrize("grid", range(1, 29))
def test_e5_takes_the_cell_below_the_pixel_for_every_grid(grid):
    rows = torch.arange(grid, dtype=torch.float64).reshape(-1, 1).expand(grid, grid).reshape(1, -1)
    assert render_mask(rows, 28, 1, 1.0)[0, 0, :, 0].tolist() == [row * grid // 28 for row in range(28)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("kernel", "sigma"), [(1, 0.3), (13, 0.3), (13, 8.0), (55, 8.0)])
def test_identity_7_the_mask_stays_in_the_range_of_its_cells(kernel, sigma, dtype):
    cells = uniform(5, 64).to(dtype)
    rendered = render_mask(cells, 28, kernel, sigma)
    assert rendered.dtype == dtype
    assert bool((rendered.amin(dim=(1, 2, 3)) >= cells.amin(dim=1) - 1e-6).all())
    assert bool((rendered.amax(dim=(1, 2, 3)) <= cells.amax(dim=1) + 1e-6).all())
    close(
        render_mask(torch.full((2, 64), 0.37, dtype=dtype), 28, kernel, sigma), torch.full((2, 1, 28, 28), 0.37), 1e-6
    )


@pytest.mark.parametrize(
    ("cells", "kernel", "words"), [(5, 3, "square number of cells, got 5"), (4, 4, "odd.*got 4"), (4, 57, "got 57")]
)
def test_e5_refuses_what_it_cannot_render(cells, kernel, words):
    with pytest.raises(ValueError, match=words):
        render_mask(torch.rand(1, cells), 28, kernel, 1.0)


# ---- E6 to E8: the score, the joint objective and its gradients ----------------------------------------------


def test_log_density_is_scipys(problem):
    a, b, mask = problem["a"], problem["b"], problem["mask"]
    close(log_density(a, b, mask), beta_logs(a, b, mask), 1e-11)


def test_e6_is_the_log_of_the_sum_of_densities(problem):
    a, b, mask = problem["a"], problem["b"], problem["mask"]
    densities = np.exp(beta_logs(a, b, mask))
    expected = [math.log(sum(float(densities[i, j]) for j in range(9))) for i in range(4)]
    close(lse_score(a, b, mask), torch.tensor(expected, dtype=torch.float64), 1e-11)


def test_e6_survives_densities_beyond_the_range_of_floats():
    a = torch.full((1, 2), 7.0, dtype=torch.float64)
    mask = torch.full((1, 2), 1e-6, dtype=torch.float64)
    score = lse_score(a, a, mask)
    close(score, beta_logs(a, a, mask)[:, 0] + math.log(2), 1e-10)
    assert float(score) < -5000


def test_e7_is_mean_score_times_mean_cross_entropy(problem):
    score = lse_score(problem["a"], problem["b"], problem["mask"])
    cost = costs(problem["logits"], problem["labels"])
    expected = sum(map(float, score)) / 4 * (sum(map(float, cost)) / 4)
    close(joint_objective(score, cost), torch.tensor(expected, dtype=torch.float64))


def test_e8_is_the_gradient_of_e7(problem):
    a, b, mask = problem["a"], problem["b"], problem["mask"]
    cost = costs(problem["logits"], problem["labels"])
    by_a, by_b = joint_objective_gradient(a, b, mask, cost)
    leaf_a, leaf_b = a.clone().requires_grad_(), b.clone().requires_grad_()
    gradients = torch.autograd.grad(joint_objective(lse_score(leaf_a, leaf_b, mask), cost), (leaf_a, leaf_b))
    close(gradients[0], by_a, 1e-10)
    close(gradients[1], by_b, 1e-10)
    close(by_a, slope(lambda at: joint_objective(lse_score(at, b, mask), cost), a), 1e-8)
    close(by_b, slope(lambda at: joint_objective(lse_score(a, at, mask), cost), b), 1e-8)


def test_e8_cell_by_cell(problem):
    a, b, mask = (problem[name].numpy() for name in ("a", "b", "mask"))
    cost = costs(problem["logits"], problem["labels"])
    by_a, by_b = joint_objective_gradient(problem["a"], problem["b"], problem["mask"], cost)
    for i in range(4):
        densities = [stats.beta.pdf(mask[i, j], math.exp(a[i, j]), math.exp(b[i, j])) for j in range(9)]
        for j in range(9):
            alpha, beta = math.exp(a[i, j]), math.exp(b[i, j])
            share = float(cost.mean()) / 4 * densities[j] / sum(densities)
            psi = special.digamma(alpha + beta)
            close(by_a[i, j], share * alpha * (psi - special.digamma(alpha) + math.log(mask[i, j])), 1e-11)
            close(by_b[i, j], share * beta * (psi - special.digamma(beta) + math.log(1 - mask[i, j])), 1e-11)


def test_e8_the_classifiers_gradient_is_the_plain_one_times_the_mean_score(problem):
    logits = problem["logits"].clone().requires_grad_()
    score = lse_score(problem["a"], problem["b"], problem["mask"])
    (gradient,) = torch.autograd.grad(joint_objective(score, costs(logits, problem["labels"])), logits)
    plain = (torch.softmax(logits, dim=1) - F.one_hot(problem["labels"], 5)).detach() / 4
    close(gradient, score.mean() * plain, 1e-10)


def test_e9_credits_each_image_with_its_own_cost_less_the_mean(problem):
    log_p = beta_logs(problem["a"], problem["b"], problem["mask"])
    cost = costs(problem["logits"], problem["labels"])
    mean = sum(map(float, cost)) / 4
    expected = sum((float(cost[i]) - mean) * log_p[i].sum() for i in range(4)) / 4 + mean
    joint = log_density(problem["a"], problem["b"], problem["mask"]).sum(dim=1)
    close(reinforce_objective(joint, cost), torch.tensor(expected, dtype=torch.float64), 1e-11)


def test_e9_gradients_are_reinforce_and_plain_cross_entropy(problem):
    mask, labels = problem["mask"], problem["labels"]
    a, b, logits = (problem[name].clone().requires_grad_() for name in ("a", "b", "logits"))
    loss = reinforce_objective(log_density(a, b, mask).sum(dim=1), costs(logits, labels))
    by_a, by_b, by_logits = torch.autograd.grad(loss, (a, b, logits))
    alpha, beta, cost = problem["a"].exp(), problem["b"].exp(), costs(problem["logits"], labels)
    advantage = ((cost - cost.mean()) / 4)[:, None]
    psi = torch.digamma(alpha + beta)
    close(by_a, advantage * alpha * (psi - torch.digamma(alpha) + mask.log()), 1e-10)
    close(by_b, advantage * beta * (psi - torch.digamma(beta) + (1 - mask).log()), 1e-10)
    close(by_logits, (torch.softmax(problem["logits"], dim=1) - F.one_hot(labels, 5)) / 4, 1e-10)


# ---- E10 to E12 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_e10_puts_a_share_of_the_mask_over_every_channel(strength):
    images, rendered = uniform(2, 3, 4, 4, low=-2, high=2, seed=1), uniform(2, 1, 4, 4, seed=2)
    masked = mask_image(images, rendered, strength)
    for n, channel in np.ndindex(2, 3):
        close(masked[n, channel], images[n, channel] * (1 - strength + strength * rendered[n, 0]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_e10_is_exact_at_both_ends(dtype):
    images, rendered = uniform(2, 1, 4, 4, seed=1).to(dtype), uniform(2, 1, 4, 4, seed=2).to(dtype)
    assert torch.equal(mask_image(images, rendered, 0.0), images)
    assert torch.equal(mask_image(images, rendered, 1.0), images * rendered)


def test_e11_is_the_mean_of_weights_and_buffers():
    checkpoints = [
        {"weight": uniform(2, 3, seed=s), "running_var": uniform(3, seed=s + 9), "count": torch.tensor(s)}
        for s in (4, 5, 7)
    ]
    mean = average_checkpoints(checkpoints)
    for name in ("weight", "running_var"):
        close(mean[name], (checkpoints[0][name] + checkpoints[1][name] + checkpoints[2][name]) / 3)
    assert mean["count"] == 7 and mean["count"].dtype == torch.int64


def test_e12_draws_one_mask_from_the_base():
    base_a, base_b = torch.full((1, 4000), math.log(3.0)), torch.full((1, 4000), math.log(1.5))
    mask = heated_mask(base_a, base_b, generator())
    assert mask.shape == (1, 4000)
    assert stats.kstest(mask[0].numpy(), stats.beta(3.0, 1.5).cdf).pvalue > 0.01


@pytest.mark.parametrize("dtype", FLOATS)
def test_equations_keep_the_dtype(problem, dtype):
    a, b, mask, logits = (problem[name].to(dtype) for name in ("a", "b", "mask", "logits"))
    cost = costs(logits, problem["labels"])
    outcomes = (
        mix_with_base(a[:1], b, 0.9), move_base(a[:1], b, 0.99), sample_mask(a, b, generator()), lse_score(a, b, mask),
        render_mask(mask, 6, 3, 1.0), joint_objective(mask[0], cost), *joint_objective_gradient(a, b, mask, cost),
        reinforce_objective(mask[:, 0], cost), mask_image(mask, mask, 0.5), heated_mask(a[:1], b[:1], generator()),
        average_checkpoints([{"a": a}, {"a": b}])["a"],
    )  # fmt: skip
    assert {outcome.dtype for outcome in outcomes} == {dtype}


# ---- identities 3 to 5 ---------------------------------------------------------------------------------------


def samples(alpha: float, beta: float, images: int, cells: int = 64) -> tuple[torch.Tensor, ...]:
    drawn = np.random.default_rng(0).beta(alpha, beta, size=(images, cells))
    a, b = (torch.full((images, cells), math.log(x), dtype=torch.float64) for x in (alpha, beta))
    return a, b, torch.from_numpy(drawn)


@pytest.mark.parametrize("cells", [64, 4096])
def test_identity_3_uniform_cells_score_log_d(cells):
    mask = uniform(3, cells, low=0.001, high=0.999)
    flat = torch.zeros(3, cells, dtype=torch.float64)
    assert bool((log_density(flat, flat, mask) == 0).all())
    close(lse_score(flat, flat, mask), torch.full((3,), {64: 4.158883, 4096: 8.317766}[cells]), 1e-6)
    close(lse_score(flat, flat, mask), torch.full((3,), math.log(cells), dtype=torch.float64), 1e-14)


def test_identity_3_uniform_cells_have_no_mean_gradient():
    a, b, mask = samples(1.0, 1.0, 20_000)
    for gradient in joint_objective_gradient(a, b, mask, torch.ones(1, dtype=torch.float64)):
        each = gradient.sum(dim=1) * len(mask)
        assert abs(float(each.mean())) < 4 * float(each.std()) / math.sqrt(len(mask)) < 0.005


@pytest.mark.parametrize(("concentration", "expected"), [(1.6, 4.26), (3.0, 4.51), (8.0, 4.98)])
def test_identity_4_the_score_is_above_log_d(concentration, expected):
    score = float(lse_score(*samples(concentration, concentration, 5000)).mean())
    assert score > math.log(64)
    assert abs(score - expected) < 0.03


@pytest.mark.parametrize(
    ("alpha", "beta", "by_a", "by_b"), [(3.0, 3.0, 0.112, 0.112), (8.0, 8.0, 0.122, 0.122), (3.0, 1.5, 0.296, -0.145)]
)
def test_identity_5_the_score_pulls_towards_entropy(alpha, beta, by_a, by_b):
    gradients = joint_objective_gradient(*samples(alpha, beta, 20_000), torch.ones(1, dtype=torch.float64))
    psi = special.digamma
    for gradient, expected, (own, other) in zip(gradients, (by_a, by_b), ((alpha, beta), (beta, alpha)), strict=True):
        assert abs(float(gradient.sum()) - expected) < 0.005
        limit = own * (psi(2 * own - 1) - psi(2 * (own + other) - 2) - psi(own) + psi(own + other))
        assert abs(float(gradient.sum()) - limit) < 0.005


@pytest.mark.parametrize(("alpha", "beta"), [(3.0, 3.0), (3.0, 1.5)])
def test_identity_5_the_joint_score_does_not(alpha, beta):
    a, b, mask = samples(alpha, beta, 20_000)
    leaves = a.requires_grad_(), b.requires_grad_()
    for gradient in torch.autograd.grad(log_density(*leaves, mask).sum(), leaves):
        each = gradient.sum(dim=1)
        assert abs(float(each.mean())) < 3 * float(each.std()) / math.sqrt(len(mask))


# ---- the learner ---------------------------------------------------------------------------------------------


def small(**settings) -> NoiseMask:
    """Return a learner of 72 images: three batches an epoch."""
    small = {"device": "cpu", "width": 2, "per_class": 2, "batch_size": 24, "pretrain_epochs": 4, "finetune_epochs": 2}
    return NoiseMask(**{**small, **settings})


def advance(learner: NoiseMask, steps: int) -> None:
    for _ in range(steps):
        learner.update()


def record(monkeypatch, name: str) -> list[tuple]:
    """Let a function of the method's file note its arguments and, last, its result."""
    original, calls = getattr(noise_mask, name), []

    def noted(*arguments):
        result = original(*arguments)
        calls.append((*arguments, result))
        return result

    monkeypatch.setattr(noise_mask, name, noted)
    return calls


def record_batches(learner: NoiseMask) -> list[torch.Tensor]:
    draw, drawn = learner.batches.draw, []

    def noted():
        drawn.append(draw())
        return drawn[-1]

    learner.batches.draw = noted
    return drawn


def parameters(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(first, second) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def plain_step(net, optimizer, learner, batch, lr, decay=1e-4):
    """Do one ordinary step of training on clean images."""
    optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
    optimizer.zero_grad()
    F.cross_entropy(net(learner.data.train_images[batch]), learner.data.train_labels[batch]).backward()
    optimizer.step()


def sgd(net) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)


@pytest.mark.parametrize("steps", [1, 11])
def test_identity_1_no_mask_and_joint_score_is_plain_training_bit_for_bit(steps):
    learner = small(mask_strength=0.0, score="joint")
    net, batches = copy.deepcopy(learner.classifier), record_batches(learner)
    optimizer = sgd(net)
    advance(learner, steps)
    for t, batch in enumerate(batches):
        plain_step(net, optimizer, learner, batch, 0.05 * 0.5 * (1 + math.cos(math.pi * t / 12)))
    assert net.state_dict().keys() == learner.classifier.state_dict().keys()
    assert same(net.state_dict().values(), learner.classifier.state_dict().values())


def test_e11_fine_tuning_is_plain_training_from_the_mean_of_the_last_three_epochs():
    learner = small(mask_strength=0.0, score="joint")
    net, batches = copy.deepcopy(learner.classifier), record_batches(learner)
    optimizer, kept = sgd(net), []
    advance(learner, 12)
    assert learner.phase == "finetune" and learner.phase_step == 0
    for t, batch in enumerate(batches):
        plain_step(net, optimizer, learner, batch, 0.05 * 0.5 * (1 + math.cos(math.pi * t / 12)))
        if t in (5, 8, 11):
            kept.append({name: value.clone() for name, value in net.state_dict().items()})
    mean = {name: (kept[0][name] + kept[1][name] + kept[2][name]) / 3 for name in kept[0]}
    assert not torch.allclose(mean["features.0.1.running_mean"], kept[2]["features.0.1.running_mean"])
    net.load_state_dict({name: mean[name].to(kept[2][name].dtype) for name in mean})
    optimizer = sgd(net)
    advance(learner, 6)
    for t, batch in enumerate(batches[12:]):
        plain_step(net, optimizer, learner, batch, 0.01 * min(1.0, 0.01 + 0.99 * t / 4))
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            close(learner.classifier.state_dict()[name], value, 1e-5)


def to_double(learner: NoiseMask) -> None:
    learner.classifier.double()
    learner.policy.double()
    learner.base_a, learner.base_b = learner.base_a.double(), learner.base_b.double()
    learner.data = dataclasses.replace(learner.data, train_images=learner.data.train_images.double())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rescale_classifier": True, "mask_strength": 0.6, "policy_lr_ratio": 1.0},
        {"score": "joint", "base_mix": 0.4, "base_momentum": 0.9, "weight_decay": 1e-2, "policy_lr_ratio": 0.5},
    ],
    ids=["paper", "rescaled", "joint"],
)
def test_three_updates_are_the_papers(monkeypatch, settings):
    learner = small(**settings)
    to_double(learner)
    config, batches, masks = learner.config, record_batches(learner), record(monkeypatch, "sample_mask")
    policy, net = copy.deepcopy(learner.policy), copy.deepcopy(learner.classifier)
    base = [learner.base_a.clone(), learner.base_b.clone()]
    advance(learner, 3)
    optimizers = sgd(net), sgd(policy)
    for t, (batch, (a_used, b_used, *_, mask)) in enumerate(zip(batches, masks, strict=True)):
        images, labels = learner.data.train_images[batch], learner.data.train_labels[batch]
        raw = policy(images)
        a, b = (config.base_mix * old + (1 - config.base_mix) * r for old, r in zip(base, raw, strict=True))
        close(a_used, a)
        close(b_used, b)
        base = [
            config.base_momentum * old + (1 - config.base_momentum) * r.detach().mean(dim=0)
            for old, r in zip(base, raw, strict=True)
        ]
        rows = [row * 8 // 28 for row in range(28)]
        rendered = mask.reshape(-1, 8, 8).numpy()[:, rows][:, :, rows]
        for axis in (1, 2):
            rendered = ndimage.gaussian_filter1d(rendered, 6.0, axis=axis, mode="mirror", radius=6)
        s = config.mask_strength
        cost = costs(net(images * (1 - s + s * torch.from_numpy(rendered)[:, None])), labels)
        log_p = torch.distributions.Beta(a.exp(), b.exp()).log_prob(mask)
        score = log_p.exp().sum(dim=1).log()
        if config.score == "lse":
            loss = score.mean() * cost.mean()
        else:
            loss = sum((cost[i] - cost.mean()).detach() * log_p[i].sum() for i in range(24)) / 24 + cost.mean()
        for optimizer, ratio in zip(optimizers, (1.0, config.policy_lr_ratio), strict=True):
            lr = 0.05 * 0.5 * (1 + math.cos(math.pi * t / 12)) * ratio
            optimizer.param_groups[0].update(lr=lr, weight_decay=config.weight_decay)
            optimizer.zero_grad()
        loss.backward()
        if config.rescale_classifier:
            for parameter in net.parameters():
                parameter.grad /= score.mean().detach()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in ((learner.classifier, net), (learner.policy, policy)):
        for found, expected in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            close(found, expected, 1e-10)
    close(learner.base_a, base[0])
    close(learner.base_b, base[1])


@pytest.mark.parametrize("rescale", [False, True])
def test_rescaling_gives_the_classifier_the_plain_gradient(monkeypatch, rescale):
    learner = small(rescale_classifier=rescale)
    net, batches, rendered = (
        copy.deepcopy(learner.classifier),
        record_batches(learner),
        record(monkeypatch, "render_mask"),
    )
    metrics = learner.update()
    images, labels = learner.data.train_images[batches[0]], learner.data.train_labels[batches[0]]
    F.cross_entropy(net(images * rendered[0][-1]), labels).backward()
    factor = 1.0 if rescale else float(metrics["log_score"])
    assert factor == 1.0 or factor > math.log(64)
    for ours, plain in zip(learner.classifier.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, factor * plain.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["lse", "joint"])
def test_identity_6_a_mask_of_the_base_alone_gives_the_policy_no_gradient(score):
    learner = small(base_mix=1.0, score=score)
    learner.update()
    assert all(bool((p.grad == 0).all()) for p in learner.policy.parameters())
    assert any(bool((p.grad != 0).any()) for p in learner.classifier.parameters())
    assert not torch.equal(learner.base_a, small().base_a)


def test_identity_8_a_score_below_zero_stops_the_run_before_the_classifier_climbs(monkeypatch):
    run = Run(small(), threads=1)
    run.advance(1)
    # Beta's density is small at an end where its concentration is above 1.
    run.learner.base_a += 3.0
    monkeypatch.setattr(noise_mask, "sample_mask", lambda a, b, generator: torch.full_like(a.detach(), 1e-3))
    with pytest.raises(DivergedError, match="log_score was not finite at step 2") as caught:
        run.advance(1)
    assert caught.value.restored_step < 2
    assert run.learner.parameters_finite()


def test_a_single_cell_is_refused():
    with pytest.raises(KnobError, match=r"grid.*2.*got 1"):
        small(grid=1)


def test_extreme_concentrations_stay_finite():
    learner = small()
    learner.base_a.fill_(90.0)
    learner.base_b.fill_(-90.0)
    assert all(math.isfinite(float(value)) for value in learner.update().values())
    assert learner.parameters_finite()


def test_frozen_policy_keeps_weights_and_base():
    learner = small(policy_lr_ratio=0.0, weight_decay=1e-2)
    weights, base = parameters(learner.policy), (learner.base_a.clone(), learner.base_b.clone())
    classifier = parameters(learner.classifier)
    advance(learner, 4)
    assert same(weights, parameters(learner.policy)) and same(base, (learner.base_a, learner.base_b))
    assert not same(classifier, parameters(learner.classifier))


def test_base_begins_uniform_and_needs_no_gradient():
    learner = small(grid=28)
    for base in (learner.base_a, learner.base_b):
        assert base.shape == (1, 784) and not base.requires_grad
        assert stats.kstest(base[0].numpy(), stats.uniform.cdf).pvalue > 0.01
    learner.update()
    assert not learner.base_a.requires_grad and learner.base_a.shape == (1, 784)
    assert not torch.equal(learner.base_a, learner.base_b)


def test_no_gradient_reaches_the_policy_through_the_mask(monkeypatch):
    rendered, masks = record(monkeypatch, "render_mask"), record(monkeypatch, "sample_mask")
    small().update()
    assert not rendered[0][-1].requires_grad and not masks[0][-1].requires_grad


def test_policy_is_asked_once_an_update():
    learner = small()
    encoder, batches = copy.deepcopy(learner.policy.encoder), record_batches(learner)
    learner.update()
    images = learner.data.train_images[batches[0]]
    counts = [int(v) for k, v in learner.policy.state_dict().items() if k.endswith("num_batches_tracked")]
    assert len(counts) == 6 and set(counts) == {1}
    mean = encoder[0][0](images).mean(dim=(0, 2, 3)).detach()
    close(learner.policy.encoder[0][1].running_mean, 0.1 * mean, 1e-5)


def test_phases_and_learning_rates():
    learner = small()
    assert learner.budget == 18 and learner.pretrain_steps == 12
    for t in range(12):
        assert learner.phase == "pretrain"
        learner.update()
        lr = 0.05 * 0.5 * (1 + math.cos(math.pi * t / 12))
        assert learner.classifier_optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        assert learner.policy_optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * lr)
    for t in range(9):  # three beyond the budget
        assert learner.phase == "finetune" and learner.phase_step == t
        learner.update()
        lr = 0.01 * min(1.0, 0.01 + 0.99 * t / 4)  # 0.7 of 6 steps
        assert learner.finetune_optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_schedules_hold_their_last_value_that_is_not_zero():
    assert cosine(10)(10) == cosine(10)(99) == cosine(10)(9) > 0
    assert warmup(10)(10) == warmup(10)(99) == 1.0


def test_policy_is_out_of_the_game_while_fine_tuning(monkeypatch):
    learner = small()
    advance(learner, 12)
    policy, base = copy.deepcopy(learner.policy.state_dict()), (learner.base_a, learner.base_b)
    masks = record(monkeypatch, "sample_mask")
    advance(learner, 3)
    assert not masks and same(policy.values(), learner.policy.state_dict().values())
    assert base[0] is learner.base_a and base[1] is learner.base_b


def test_without_pretraining_fine_tuning_begins_at_once():
    learner = small(pretrain_epochs=0)
    assert learner.phase == "finetune" and learner.budget == 6
    net, batches = copy.deepcopy(learner.classifier), record_batches(learner)
    learner.update()
    plain_step(net, sgd(net), learner, batches[0], learner.finetune_optimizer.param_groups[0]["lr"])
    assert same(net.state_dict().values(), learner.classifier.state_dict().values())


def test_without_fine_tuning_the_heated_model_is_judged():
    learner = small(pretrain_epochs=1, finetune_epochs=0)
    assert learner.budget == 3
    advance(learner, 3)
    before = parameters(learner.classifier)
    assert all(math.isfinite(float(value)) for value in learner.evaluate().values())
    assert same(before, parameters(learner.classifier))
    learner.update()  # past the budget, but no error
    assert small(pretrain_epochs=0, finetune_epochs=0).budget == 0


@pytest.mark.parametrize("epochs", [1, 2])
def test_with_fewer_than_three_epochs_their_mean_is_taken(epochs):
    learner = small(pretrain_epochs=epochs, finetune_epochs=1)
    advance(learner, 3 * epochs)
    assert len(learner.checkpoints) == epochs
    learner.update()


def test_heated_evaluation_uses_one_mask_and_not_the_policy(monkeypatch):
    learner = small()
    advance(learner, 3)
    masked, drawn = record(monkeypatch, "mask_image"), record(monkeypatch, "heated_mask")
    first = learner.evaluate()
    with torch.no_grad():
        for head in (learner.policy.first, learner.policy.second):
            head[-1].bias += torch.linspace(-20, 20, 64)
    second = learner.evaluate()
    assert torch.equal(drawn[0][0], learner.base_a) and torch.equal(drawn[0][1], learner.base_b)
    assert [call[1].shape[0] for call in masked] == [1, 1] and torch.equal(masked[0][1], masked[1][1])
    assert first["heated_accuracy"] == second["heated_accuracy"]
    assert first["policy_mask_mean"] != second["policy_mask_mean"]
    learner.base_a += 1.0
    learner.evaluate()
    assert masked[2][1].mean() > masked[0][1].mean()


def test_evaluation_without_a_mask_is_the_clean_one():
    learner = small(mask_strength=0.0)
    advance(learner, 6)
    figures = learner.evaluate()
    test_images, labels = learner.data.test_images[::4], learner.data.test_labels[::4].numpy()
    learner.classifier.eval()
    with torch.no_grad():
        expected = balanced_accuracy_score(labels, learner.classifier(test_images).argmax(dim=1).numpy())
    assert float(figures["heated_accuracy"]) == pytest.approx(expected, abs=1e-6)


def test_evaluate_returns_balanced_accuracies_and_their_gap():
    learner = small(test_per_class=40)
    advance(learner, 6)
    figures = {name: float(value) for name, value in learner.evaluate().items()}
    assert {"balanced_accuracy", "train_accuracy", "gap", "heated_accuracy", "policy_mask_mean"} <= figures.keys()
    data = learner.data
    learner.classifier.eval()
    with torch.no_grad():
        test, train = (
            balanced_accuracy_score(labels.numpy(), learner.classifier(images).argmax(dim=1).numpy())
            for images, labels in ((data.test_images, data.test_labels), (data.train_images, data.train_labels))
        )
    assert figures["balanced_accuracy"] == pytest.approx(test, abs=1e-6)
    assert figures["train_accuracy"] == pytest.approx(train, abs=1e-6)
    assert figures["gap"] == pytest.approx(train - test, abs=1e-6)
    assert 0 < figures["policy_mask_mean"] < 1


def test_a_learner_in_the_lab_is_judged_by_the_first_images_of_each_class():
    learner = small(test_per_class=3)
    images, labels = learner.unseen
    assert labels.tolist() == [label for label in range(36) for _ in range(3)]
    data = learner.data
    for label in range(36):
        assert torch.equal(images[labels == label], data.test_images[data.test_labels == label][:3])
    assert len(learner.seen[1]) == 36 * 2  # there are no more


def test_balanced_accuracy_weighs_classes_and_not_images():
    learner = small(width=4)
    advance(learner, 12)
    learner.classifier.eval()
    labels = learner.data.test_labels
    seen = labels.new_zeros(36)
    kept = []
    for i, label in enumerate(labels.tolist()):  # one image of class 0, ... 36 of class 35
        if seen[label] <= label:
            kept.append(i)
        seen[label] += 1
    images, labels = learner.data.test_images[kept], labels[kept]
    with torch.no_grad():
        found = learner.accuracy_by_class(images, labels)
        guess = learner.classifier(images).argmax(dim=1)
    expected = balanced_accuracy_score(labels.numpy(), guess.numpy())
    assert float(found.mean()) == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(float((guess == labels).float().mean()), abs=1e-4)


def test_knobs_act_on_the_very_next_update(monkeypatch):
    rendered, masked = record(monkeypatch, "render_mask"), record(monkeypatch, "mask_image")
    mixed, moved = record(monkeypatch, "mix_with_base"), record(monkeypatch, "move_base")
    run = Run(small(), threads=1, autosave=0, evaluate_every=0)
    learner = run.learner
    run.advance(1)
    assert rendered[-1][2:4] == (13, 6.0) and masked[-1][2] == 1.0
    run.tune(blur_kernel=3, blur_sigma=1.0, mask_strength=0.4, base_mix=0.2, base_momentum=0.95)
    run.tune(classifier_lr=0.2, policy_lr_ratio=0.5, weight_decay=1e-3)
    run.advance(1)
    assert rendered[-1][2:4] == (3, 1.0) and masked[-1][2] == 0.4
    assert mixed[-1][2] == 0.2 and moved[-1][2] == 0.95
    factor = 0.5 * (1 + math.cos(math.pi / 12))
    for optimizer, lr in ((learner.classifier_optimizer, 0.2), (learner.policy_optimizer, 0.1)):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * factor)
        assert optimizer.param_groups[0]["weight_decay"] == 1e-3
    run.advance(12)
    run.tune(finetune_lr=0.1, weight_decay=1e-5)
    run.advance(3)
    assert learner.finetune_optimizer.param_groups[0]["lr"] == 0.1
    assert learner.finetune_optimizer.param_groups[0]["weight_decay"] == 1e-5


def test_the_score_knob_selects_the_score(monkeypatch):
    densities = record(monkeypatch, "log_density")
    run = Run(small(), threads=1, autosave=0, evaluate_every=0)
    run.advance(1)
    run.tune(score="joint")
    run.advance(1)
    lse, joint = run.history["log_score"]
    assert lse == pytest.approx(float(densities[0][-1].detach().exp().sum(dim=1).log().mean()), rel=1e-5)
    assert joint == pytest.approx(float(densities[1][-1].detach().sum(dim=1).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_size": 100}, "batch_size.*72.*100"),
        ({"batch_size": 1}, "batch_size.*1"),
        ({"grid": -8}, "grid.*-8"),
        ({"grid": 0}, "grid.*0"),
        ({"grid": 29}, "grid.*29"),
        ({"grid": 8.0}, "grid.*8.0"),
        ({"width": 0}, "width.*0"),
        ({"per_class": 0}, "per_class.*0"),
        ({"per_class": 41}, "per_class.*41"),
        ({"pretrain_epochs": -1}, "pretrain_epochs.*-1"),
        ({"finetune_epochs": -1}, "finetune_epochs.*-1"),
        ({"blur_kernel": 4}, "blur_kernel.*odd.*4"),
        ({"base_momentum": 1.0}, "base_momentum.*1.0"),
        ({"score": "sum"}, "score.*'lse', 'joint'.*'sum'"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(settings, words):
    with pytest.raises(ValueError, match=words):
        small(**settings)


def test_refused_knob_keeps_the_old_value():
    run = Run(small(), threads=1, autosave=0)
    with pytest.raises(KnobError, match=r"mask_strength.*1\.5.*stays 1\.0"):
        run.tune(mask_strength=1.5)
    assert run.learner.config.mask_strength == 1.0


# ---- the study -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["smoke", "fast", "full"])
def test_study_arms_are_valid(mode):
    jobs = study.jobs(mode)
    assert {job.labels["arm"] for job in jobs} <= study.arms.keys()
    for job in jobs:
        config = job.learner.Config(**job.settings)
        # At equal learning rate: no arm is helped by the factor log D of E7.
        assert config.rescale_classifier and config.classifier_lr == jobs[0].settings["classifier_lr"]


def test_study_smoke_form_gives_a_verdict_for_each_criterion():
    result = study.run("smoke", n_jobs=1)
    assert [verdict.name for verdict in result.verdicts] == [criterion.name for criterion in study.criteria]
    assert {row["arm"] for row in result.measures} == set(study.arms)
    for missing in study.arms:
        fewer = study.judge([row for row in result.measures if row["arm"] != missing])
        needed = {c.name for c in study.criteria if missing not in (c.plus[0], c.minus and c.minus[0])}
        assert {verdict.name for verdict in fewer} == needed
