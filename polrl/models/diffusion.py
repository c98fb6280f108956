r"""Small diffusion models: noise schedule, training loss, guidance, DDIM sampling, and the networks.

A diffusion model turns noise into data by many small denoising steps. Data x_0 are mixed with noise to a level t,
x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, and a denoiser learns to tell the noise eps from x_t, t and the class y.
Every model here answers one call, `denoiser(x, t, y) -> eps`:

- `RingDenoiser`: exact, for a ring of Gaussians in the plane; no network, any float type;
- `ResidualMLP`: the trained network for the ring and for 8 x 8 digits (`load_denoiser` gives the committed ones);
- `EDMDenoiser`: the same network under Karras et al.'s preconditioning, with a Heun sampler of its own.

A chain of S steps with precomputed coefficients (`DenoisingChain`) samples, and tells mean, standard deviation and
log-probability of each step, which is what reinforcement learning of a sampler needs.

E1 to E8 are numbered as in the course's card on toy diffusion models: DDPM (arXiv 2006.11239), DDIM (2010.02502),
the cosine schedule (2102.09672), classifier-free guidance (2207.12598), EDM (2206.00364).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import safetensors
import safetensors.torch
import torch
from torch import nn

from polrl.core.equation import equation
from polrl.core.errors import DataError, unknown_name
from polrl.core.files import find_asset, read_checked
from polrl.core.sampling import seeded_globals

LEVELS = 100
STD_FLOOR = 0.02
Reduction = Literal["mean", "sum"]
Number = float | torch.Tensor


class Denoiser(Protocol):
    """What every model answers to; class number `classes` is the null class, "no condition"."""

    classes: int

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the noise in x [n, d] at levels t, int64 [n] or a scalar, for conditions y [n]."""
        ...


# ---- the schedule and what is learned --------------------------------------------------------------------------


@equation(
    "E1",
    r"f(t)=\cos^2\Big(\frac{t_{\max}\,t/T+s}{1+s}\,\frac\pi2\Big),\quad "
    r"\beta_t=\min\Big(1-\frac{f(t)}{f(t-1)},\,0.999\Big),\quad\bar\alpha_t=\prod_{u\le t}(1-\beta_u)",
    source="Nichol and Dhariwal 2021; t_max by the card",
)
def cosine_schedule(
    levels: int = LEVELS, t_max: float = 0.97, s: float = 0.008, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Return the signal levels abar [levels + 1], from 1 at t = 0 downwards.

    With the original t_max = 1 almost no signal is left at the end, and the first step of a sampler divides by its
    root; 0.97 leaves 0.0022.

    Raises
    ------
    ValueError
        If `levels` is below 1 or `t_max` outside (0, 1].
    """
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels!r}")
    if not 0 < t_max <= 1:
        raise ValueError(f"t_max must be above 0 and at most 1, got {t_max!r}")
    t = torch.arange(levels + 1, dtype=torch.float64)
    f = torch.cos((t_max * t / levels + s) / (1 + s) * math.pi / 2).square()
    kept = (f[1:] / f[:-1]).clamp(min=1e-3)  # 1 - beta
    return torch.cat([torch.ones(1, dtype=torch.float64), kept.cumprod(0)]).to(dtype)


def add_noise(x0: torch.Tensor, noise: torch.Tensor, level: Number) -> torch.Tensor:
    """Return x_t [n, d] at signal levels that broadcast against it, such as [n, 1]."""
    level = torch.as_tensor(level, dtype=x0.dtype, device=x0.device)
    return level.sqrt() * x0 + (1 - level).sqrt() * noise


@equation(
    "E2",
    r"L=\mathrm{mean}\,\big\|\epsilon_\theta(x_t,t,\tilde y)-\epsilon\big\|^2,\quad "
    r"x_t=\sqrt{\bar\alpha_t}\,x_0+\sqrt{1-\bar\alpha_t}\,\epsilon,\quad "
    r"\tilde y=\varnothing\text{ with probability }p_{\rm drop}\text{, else }y",
    source="Ho et al. 2020; Ho and Salimans 2022",
)
def denoising_loss(
    denoiser: Denoiser,
    x0: torch.Tensor,
    y: torch.Tensor,
    t: torch.Tensor,
    noise: torch.Tensor,
    dropped: torch.Tensor,
    alpha_bar: torch.Tensor,
) -> torch.Tensor:
    """Return the mean squared error over batch and dimensions, from data x0 and noise [n, d], classes and levels [n].

    `dropped`, bool [n], says whose class is withheld.
    """
    x = add_noise(x0, noise, alpha_bar[t].to(x0.dtype).unsqueeze(1))
    shown = torch.where(dropped, denoiser.classes, y)
    return (denoiser(x, t, shown) - noise).square().mean()


def draw_denoising_loss(
    denoiser: Denoiser,
    x0: torch.Tensor,
    y: torch.Tensor,
    alpha_bar: torch.Tensor,
    generator: torch.Generator,
    p_drop: float = 0.15,
) -> torch.Tensor:
    """Return E2 at levels, noise and dropped classes drawn from the generator, which lies on the device of x0."""
    n, device = len(x0), x0.device
    t = torch.randint(1, len(alpha_bar), (n,), generator=generator, device=device)
    noise = torch.randn(x0.shape, generator=generator, device=device, dtype=x0.dtype)
    dropped = torch.rand(n, generator=generator, device=device) < p_drop
    return denoising_loss(denoiser, x0, y, t, noise, dropped, alpha_bar)


# ---- sampling ----------------------------------------------------------------------------------------------------


@equation(
    "E3",
    r"\tilde\epsilon=\epsilon_\theta(x,t,\varnothing)+w\,\big(\epsilon_\theta(x,t,y)-\epsilon_\theta(x,t,\varnothing)\big)",
    source="Ho and Salimans 2022",
)
def guided_noise(unconditional: torch.Tensor, conditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Return the guided prediction: w = 0 ignores the class, 1 is the conditional model, above 1 exaggerates it."""
    return unconditional + guidance * (conditional - unconditional)


def predict_noise(
    denoiser: Denoiser, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, guidance: float = 1.0
) -> torch.Tensor:
    """Return the noise in x [n, d], guided; where both predictions are needed, from one call with 2 n rows."""
    if guidance == 1:
        return denoiser(x, t, y)
    null = torch.full_like(y, denoiser.classes)
    if guidance == 0:
        return denoiser(x, t, null)
    twice = torch.cat([t, t]) if t.dim() else t
    conditional, unconditional = denoiser(torch.cat([x, x]), twice, torch.cat([y, null])).chunk(2)
    return guided_noise(unconditional, conditional, guidance)


class Step(NamedTuple):
    """One denoising step before its noise is drawn: the next sample is mean + std * xi.

    Attributes
    ----------
    mean : Tensor, [n, d]
    std : Tensor, [1] or [n, 1]
    predicted : Tensor, [n, d]
        The data that the denoiser sees behind the noise, clipped if so asked.
    """

    mean: torch.Tensor
    std: torch.Tensor
    predicted: torch.Tensor


def step_std(level: torch.Tensor, next_level: torch.Tensor, eta: float) -> torch.Tensor:
    """Return sigma of E4; linear in eta, and 0 where the next level is 1."""
    if eta == 0:
        return torch.zeros_like(level * next_level)
    variance = (1 - next_level) / (1 - level) * (1 - level / next_level)
    return eta * variance.sqrt()


@equation(
    "E4",
    r"\hat x_0=\frac{x-\sqrt{1-a}\,\tilde\epsilon}{\sqrt a},\quad "
    r"\sigma=\eta\sqrt{\frac{1-a'}{1-a}\Big(1-\frac a{a'}\Big)},\quad "
    r"m=\sqrt{a'}\,\hat x_0+\sqrt{1-a'-\sigma^2}\;\tilde\epsilon,\quad x'=m+\sigma\,\xi",
    source="Song et al. 2021",
)
def ddim_step(
    x: torch.Tensor, noise: torch.Tensor, level: Number, next_level: Number, eta: float, clip: float | None = None
) -> Step:
    """Return the step from signal level a to a', for x and predicted noise [n, d], levels scalar or [n, 1].

    eta = 0 is deterministic; eta = 1 has the posterior variance of DDPM. With `clip` the predicted data are kept
    within it and the noise is computed anew, so that both still add up to x.
    """
    a, after = (torch.as_tensor(v, dtype=x.dtype, device=x.device) for v in (level, next_level))
    predicted = (x - (1 - a).sqrt() * noise) / a.sqrt()
    if clip is not None:
        predicted = predicted.clamp(-clip, clip)
        noise = (x - a.sqrt() * predicted) / (1 - a).sqrt()
    sigma = step_std(a, after, eta)
    # 1 - a' - sigma^2 is never below 0, but rounding may put it there.
    mean = after.sqrt() * predicted + (1 - after - sigma.square()).clamp(min=0).sqrt() * noise
    return Step(mean, sigma, predicted)


@equation(
    "E5",
    r"\ell=\mathop{\mathrm{mean}}_d\text{ or }\sum_d"
    r"\Big[-\frac{(x'_d-m_d)^2}{2\sigma^2}-\log\sigma-\tfrac12\log2\pi\Big],\quad\sigma\leftarrow\max(\sigma,0.02)",
    source="derived; the mean as in DDPO's code",
)
def step_log_probability(
    x_next: torch.Tensor, mean: torch.Tensor, std: Number, reduction: Reduction = "mean", floor: float = STD_FLOOR
) -> torch.Tensor:
    """Return log N(x'; m, sigma^2) [n] over all but the first dimension; x' is a constant, gradients pass through m.

    Raises
    ------
    ValueError
        If `floor` is not above 0, or `reduction` is neither "mean" nor "sum".
    """
    if not floor > 0:
        raise ValueError(f"floor must be above 0, got {floor!r}: a step without noise has no density")
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
    sigma = torch.as_tensor(std, dtype=mean.dtype, device=mean.device).clamp(min=floor)
    density = -(x_next.detach() - mean).square() / (2 * sigma.square()) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(dim=1) if reduction == "mean" else density.flatten(1).sum(dim=1)


@equation("E6", r"\nabla_x\log p_t(x)=-\frac{\epsilon(x,t)}{\sqrt{1-\bar\alpha_t}}", source="derived")
def score(noise: torch.Tensor, level: Number) -> torch.Tensor:
    """Return the gradient of the log-density of noised data, from the predicted noise [n, d] at a level below 1."""
    return -noise / (1 - torch.as_tensor(level, dtype=noise.dtype, device=noise.device)).sqrt()


class DenoisingChain:
    """S steps from noise to data on the levels round(linspace(T, 0, S + 1)), with all coefficients made once.

    Parameters
    ----------
    alpha_bar : Tensor, [T + 1]
        From `cosine_schedule`.
    steps : int
        S, from 1 to T.
    eta : float
        0 deterministic, 1 DDPM's noise.
    clip : float, optional
        Bound of the predicted data; E4 says how.
    guidance : float
        w of E3.
    floor : float
        Least standard deviation of a step, in sampling and density alike; 0 for plain sampling, where a last step
        has no noise. The mean keeps the standard deviation without floor.
    device, dtype
        Of the coefficients.

    Attributes
    ----------
    levels : Tensor, int64 [S + 1]
        Training levels, from T down to 0; step i goes from levels[i] to levels[i + 1].
    alpha_bar : Tensor, [S + 1]
        Signal levels on the same grid.
    std : Tensor, [S, 1]
        With the floor.
    noise_weight : Tensor, [S, 1]
        Derivative of a step's mean by the predicted noise, where nothing is clipped.

    Raises
    ------
    ValueError
        If steps, eta, clip or floor are out of range.

    Examples
    --------
    >>> ring = RingDenoiser()
    >>> chain = DenoisingChain(cosine_schedule(), steps=20)
    >>> chain.sample(ring, torch.tensor([0, 3]), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 2])
    """

    def __init__(
        self,
        alpha_bar: torch.Tensor,
        steps: int,
        *,
        eta: float = 0.0,
        clip: float | None = None,
        guidance: float = 1.0,
        floor: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        top = len(alpha_bar) - 1
        if not 1 <= steps <= top:
            raise ValueError(f"steps must be from 1 to the {top} training levels, got {steps!r}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be from 0 to 1, got {eta!r}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be above 0 or None, got {clip!r}")
        if not floor >= 0:
            raise ValueError(f"floor must be 0 or above, got {floor!r}")
        self.steps, self.eta, self.clip, self.guidance, self.floor = steps, eta, clip, guidance, floor
        grid = torch.linspace(top, 0, steps + 1, dtype=torch.float64).round().long()
        exact = alpha_bar.detach().double().cpu()[grid]
        a, after = exact[:-1, None], exact[1:, None]
        sigma = step_std(a, after, eta)
        direction = (1 - after - sigma.square()).clamp(min=0).sqrt()
        # Both predicted data and mean are linear in what came before; E4 with its fractions multiplied out.
        weights = {
            "_x_to_predicted": 1 / a.sqrt(),
            "_noise_to_predicted": -((1 - a) / a).sqrt(),
            "_x_to_mean": direction / (1 - a).sqrt(),
            "_predicted_to_mean": after.sqrt() - direction * (a / (1 - a)).sqrt(),
            "std": sigma.clamp(min=floor),
            "noise_weight": direction - (after * (1 - a) / a).sqrt(),
        }
        (
            self._x_to_predicted,
            self._noise_to_predicted,
            self._x_to_mean,
            self._predicted_to_mean,
            self.std,
            (self.noise_weight),
        ) = (w.to(device=device, dtype=dtype) for w in weights.values())
        self.levels = grid.to(device)
        self.alpha_bar = exact.to(device=device, dtype=dtype)
        # As plain numbers for `sample`, where all rows are at the same step.
        self._plain = [tuple(w[i, 0].item() for w in list(weights.values())[:5]) for i in range(steps)]

    def predict(self, denoiser: Denoiser, x: torch.Tensor, i: int | torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the guided noise in x [n, d] before step i, a number or int64 [n]."""
        return predict_noise(denoiser, x, self.levels[i], y, self.guidance)

    def step(self, x: torch.Tensor, noise: torch.Tensor, i: int | torch.Tensor) -> Step:
        """Return step i, a number or int64 [n], for x and predicted noise [n, d]; std has the floor."""
        predicted = self._x_to_predicted[i] * x + self._noise_to_predicted[i] * noise
        if self.clip is not None:
            predicted = predicted.clamp(-self.clip, self.clip)
        return Step(self._x_to_mean[i] * x + self._predicted_to_mean[i] * predicted, self.std[i], predicted)

    def log_probability(self, x_next: torch.Tensor, step: Step, reduction: Reduction = "mean") -> torch.Tensor:
        """Return the log-probability [n] of having gone to x_next, E5.

        Raises
        ------
        ValueError
            If eta is 0 or there is no floor: a deterministic step has no density.
        """
        if self.eta == 0:
            raise ValueError("eta is 0: deterministic steps have no log-probability; use an eta above 0, such as 1")
        if self.floor == 0:
            raise ValueError(f"floor is 0, and the last step has no noise; use a floor above 0, such as {STD_FLOOR}")
        return step_log_probability(x_next, step.mean, step.std, reduction, self.floor)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        y: torch.Tensor,
        generator: torch.Generator,
        start: torch.Tensor | None = None,
        dimension: int | None = None,
    ) -> torch.Tensor:
        """Return samples [n, d] for conditions y [n].

        Parameters
        ----------
        generator : torch.Generator
            On the device; not used when eta and floor are 0 and `start` is given.
        start : Tensor, [n, d], optional
            The noise to begin with; drawn if not given.
        dimension : int, optional
            d; the denoiser's own if not given.
        """
        if start is None:
            size = (len(y), dimension or denoiser.dimension)  # type: ignore[attr-defined]
            start = torch.randn(size, generator=generator, device=self.std.device, dtype=self.std.dtype)
        x = start
        for i, (x_to_predicted, noise_to_predicted, x_to_mean, predicted_to_mean, std) in enumerate(self._plain):
            noise = predict_noise(denoiser, x, self.levels[i], y, self.guidance)
            predicted = (noise * noise_to_predicted).add_(x, alpha=x_to_predicted)
            if self.clip is not None:
                predicted.clamp_(-self.clip, self.clip)
            x = predicted.mul_(predicted_to_mean).add_(x, alpha=x_to_mean)
            if std > 0:
                x.add_(torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype), alpha=std)
        return x


# ---- the exact model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ring:
    """K Gaussians of equal weight on a circle: classes in the plane.

    Attributes
    ----------
    classes : int
    radius : float
    std : float
        Of each Gaussian, in each direction.
    """

    classes: int = 8
    radius: float = 2.0
    std: float = 0.15

    def centres(self, like: torch.Tensor) -> torch.Tensor:
        """Return the centres [K, 2] on the device and in the float type of a tensor."""
        angle = 2 * math.pi * torch.arange(self.classes, dtype=torch.float64) / self.classes
        return (self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)).to(device=like.device, dtype=like.dtype)

    def sample(self, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return points [n, 2], float32, of the classes y [n]."""
        noise = torch.randn(len(y), 2, generator=generator, device=y.device)
        return self.centres(noise)[y] + self.std * noise


@equation(
    "E7",
    r"v=\bar\alpha s^2+1-\bar\alpha,\quad\epsilon(x,t,k)=\sqrt{1-\bar\alpha}\,\frac{x-\sqrt{\bar\alpha}\,\mu_k}v,\quad "
    r"\epsilon(x,t,\varnothing)=\sum_kw_k\,\epsilon(x,t,k),\quad "
    r"w=\mathrm{softmax}_k\Big(-\frac{\|x-\sqrt{\bar\alpha}\,\mu_k\|^2}{2v}\Big)",
    source="derived",
)
def ring_noise(
    x: torch.Tensor, y: torch.Tensor, level: torch.Tensor, centres: torch.Tensor, std: float
) -> torch.Tensor:
    """Return the exact noise [n, 2] in x for classes y [n], of which K is the null class, at levels scalar or [n]."""
    level = level.reshape(-1, 1, 1).to(x.dtype)
    v = level * std**2 + 1 - level
    away = x.unsqueeze(1) - level.sqrt() * centres  # [n, K, 2]
    weights = torch.softmax(-away.square().sum(-1) / (2 * v[..., 0]), dim=1)
    one = nn.functional.one_hot(y, len(centres) + 1)[:, :-1].to(x.dtype)
    weights = torch.where((y == len(centres)).unsqueeze(1), weights, one)
    return ((1 - level).sqrt() / v * weights.unsqueeze(-1) * away).sum(dim=1)


class RingDenoiser:
    """The ring's exact denoiser: nothing to train, in the float type of x.

    Parameters
    ----------
    ring : Ring
    alpha_bar : Tensor, [T + 1], optional
        `cosine_schedule()` if not given.
    """

    dimension = 2

    def __init__(self, ring: Ring | None = None, alpha_bar: torch.Tensor | None = None) -> None:
        self.ring = Ring() if ring is None else ring
        self.classes = self.ring.classes
        self._exact = cosine_schedule() if alpha_bar is None else alpha_bar
        self.alpha_bar = self._exact

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the noise in x [n, 2] at levels t, int64 [n] or a scalar, for classes y int64 [n]."""
        if (self.alpha_bar.device, self.alpha_bar.dtype) != (x.device, x.dtype):
            self.alpha_bar = self._exact.to(x.dtype).to(x.device)
        return ring_noise(x, y, self.alpha_bar[t], self.ring.centres(x), self.ring.std)


# ---- the networks ------------------------------------------------------------------------------------------------


def time_features(time: torch.Tensor, size: int) -> torch.Tensor:
    """Return sines and cosines [..., size] of 1000 times a time [...], at frequencies 10000^(-j / (size / 2))."""
    half = size // 2
    j = torch.arange(half, device=time.device, dtype=time.dtype)
    angle = 1000 * time.unsqueeze(-1) * torch.exp(-math.log(10_000) * j / half)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class ResidualBlock(nn.Module):
    """Layer norm, scaled and shifted by the condition, and two linear layers beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Map hidden [n, width] under a condition [n, width], already through SiLU."""
        scale, shift = self.modulation(condition).chunk(2, dim=-1)
        normed = torch.addcmul(shift, 1 + scale, self.norm(hidden))
        return hidden + self.second(nn.functional.silu(self.first(normed)))


class ResidualMLP(nn.Module):
    """The course's denoising network; its last layer begins at zero, so an untrained one sees no noise.

    Parameters
    ----------
    dimension : int
        Of the data.
    label : Module
        Maps conditions y to [n, width]: `nn.Embedding(classes + 1, width)` for classes and the null class, or
        `nn.Linear(features, width)` for observations.
    width, blocks, features : int
        Hidden units, residual blocks, time features (an even number).
    levels : float
        T: a level t is told to the network as the time t / T.

    Attributes
    ----------
    classes : int
        Number of the null class; 0 where `label` is no embedding.

    Examples
    --------
    >>> network = class_denoiser(dimension=64, classes=10, width=128, blocks=3, features=32)
    >>> sum(p.numel() for p in network.parameters())
    237888
    """

    def __init__(
        self, dimension: int, label: nn.Module, *, width: int, blocks: int, features: int, levels: float = LEVELS
    ) -> None:
        super().__init__()
        if features % 2 or features < 2:
            raise ValueError(f"features must be even and at least 2, got {features!r}")
        self.dimension, self.features, self.levels = dimension, features, levels
        self.classes = label.num_embeddings - 1 if isinstance(label, nn.Embedding) else 0
        self.inp = nn.Linear(dimension, width)
        self.time = nn.Linear(features, width)
        self.label = label
        self.condition = nn.Linear(width, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, dimension)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the noise in x [n, dimension] at levels t, [n] or a scalar, for conditions y [n] or [n, features]."""
        time = time_features(t.to(x.dtype) / self.levels, self.features)
        condition = self.condition(nn.functional.silu(self.time(time) + self.label(y)))
        condition = nn.functional.silu(condition)
        hidden = self.inp(x)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.head(nn.functional.silu(self.norm(hidden)))


def class_denoiser(
    dimension: int, classes: int, *, width: int, blocks: int, features: int, levels: float = LEVELS
) -> ResidualMLP:
    """Return an untrained `ResidualMLP` for classes 0 to `classes` - 1 and the null class `classes`."""
    label = nn.Embedding(classes + 1, width)
    return ResidualMLP(dimension, label, width=width, blocks=blocks, features=features, levels=levels)


# ---- the EDM option ----------------------------------------------------------------------------------------------


class Preconditioning(NamedTuple):
    """The factors of E8, in the shape of sigma."""

    skip: torch.Tensor
    out: torch.Tensor
    into: torch.Tensor
    noise: torch.Tensor


@equation(
    "E8",
    r"c_{\rm skip}=\frac{\sigma_d^2}{\sigma^2+\sigma_d^2},\quad "
    r"c_{\rm out}=\frac{\sigma\sigma_d}{\sqrt{\sigma^2+\sigma_d^2}},\quad "
    r"c_{\rm in}=\frac1{\sqrt{\sigma^2+\sigma_d^2}},\quad c_{\rm noise}=\tfrac14\log\sigma,\quad "
    r"D(x,\sigma,y)=c_{\rm skip}\,x+c_{\rm out}\,F_\theta(c_{\rm in}\,x,c_{\rm noise},y)",
    source="Karras et al. 2022, Table 1",
)
def preconditioning(sigma: torch.Tensor, sigma_data: float = 0.5) -> Preconditioning:
    """Return the four factors for noise levels sigma above 0, and data of standard deviation `sigma_data`."""
    total = sigma.square() + sigma_data**2
    return Preconditioning(sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4)


@equation(
    "E8a",
    r"L=\mathrm{mean}\;\frac{\sigma^2+\sigma_d^2}{(\sigma\sigma_d)^2}\,\big\|D(x_0+\sigma\epsilon,\sigma,y)-x_0\big\|^2,"
    r"\quad\log\sigma\sim N(-1,1.2^2)",
    source="Karras et al. 2022; the draw for digits by the card",
)
def edm_loss(denoised: torch.Tensor, x0: torch.Tensor, sigma: torch.Tensor, sigma_data: float = 0.5) -> torch.Tensor:
    """Return the weighted squared error, the mean over batch and dimensions, for sigma [n, 1]."""
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    return (weight * (denoised - x0).square()).mean()


@equation(
    "E8b",
    r"\sigma_i=\Big(\sigma_{\max}^{1/7}+\frac i{n-1}\big(\sigma_{\min}^{1/7}-\sigma_{\max}^{1/7}\big)\Big)^7,"
    r"\quad\sigma_n=0",
    source="Karras et al. 2022, Eq. 5",
)
def edm_sigmas(
    n: int, sigma_max: float = 10.0, sigma_min: float = 0.02, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Return the noise levels [n + 1] of the Heun sampler, the last one 0.

    Raises
    ------
    ValueError
        If n is below 2.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n!r}")
    share = torch.arange(n, dtype=torch.float64) / (n - 1)
    top, bottom = sigma_max ** (1 / 7), sigma_min ** (1 / 7)
    return torch.cat([(top + share * (bottom - top)) ** 7, torch.zeros(1, dtype=torch.float64)]).to(dtype)


class EDMDenoiser(nn.Module):
    """A `ResidualMLP` under E8, which also answers the course's call `denoiser(x, t, y) -> eps`.

    Parameters
    ----------
    network : ResidualMLP
        With `levels` = 1: its time is c_noise.
    sigma_data : float
    alpha_bar : Tensor, [T + 1], optional
        The levels that t stands for; `cosine_schedule()` if not given.
    """

    alpha_bar: torch.Tensor

    def __init__(self, network: ResidualMLP, sigma_data: float = 0.5, alpha_bar: torch.Tensor | None = None) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data
        self.dimension, self.classes = network.dimension, network.classes
        levels = cosine_schedule(dtype=torch.float32) if alpha_bar is None else alpha_bar
        self.register_buffer("alpha_bar", levels, persistent=False)

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return D [n, d], the data seen behind x = x_0 + sigma eps, for sigma [1] or [n, 1] above 0."""
        c = preconditioning(sigma, self.sigma_data)
        return c.skip * x + c.out * self.network(c.into * x, c.noise.reshape(-1), y)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the noise in x [n, d] at levels t of 1 or above: the same picture at sqrt(abar) times the scale."""
        level = self.alpha_bar[t].to(x.dtype).reshape(-1, 1)
        predicted = self.denoised(x / level.sqrt(), ((1 - level) / level).sqrt(), y)
        return (x - level.sqrt() * predicted) / (1 - level).sqrt()

    @torch.no_grad()
    def sample(self, y: torch.Tensor, generator: torch.Generator, n: int = 18, guidance: float = 1.0) -> torch.Tensor:
        """Return samples [len(y), d] by Heun's method, from 2 n - 1 evaluations."""
        like = self.network.head.weight
        x = torch.randn(len(y), self.dimension, generator=generator, device=like.device, dtype=like.dtype)
        sigmas = edm_sigmas(n, dtype=like.dtype).to(like.device).reshape(-1, 1)
        x = sigmas[0] * x
        for i in range(n):
            slope = self._slope(x, sigmas[i], y, guidance)
            euler = x + (sigmas[i + 1] - sigmas[i]) * slope
            if i < n - 1:  # the last level is 0, where there is no slope
                slope = (slope + self._slope(euler, sigmas[i + 1], y, guidance)) / 2
                euler = x + (sigmas[i + 1] - sigmas[i]) * slope
            x = euler
        return x

    def _slope(self, x: torch.Tensor, sigma: torch.Tensor, y: torch.Tensor, guidance: float) -> torch.Tensor:
        if guidance == 1:
            denoised = self.denoised(x, sigma, y)
        else:
            null = torch.full_like(y, self.classes)
            conditional, unconditional = self.denoised(torch.cat([x, x]), sigma, torch.cat([y, null])).chunk(2)
            denoised = guided_noise(unconditional, conditional, guidance)
        return (x - denoised) / sigma


# ---- the committed models ----------------------------------------------------------------------------------------


def average_weights(average: nn.Module, network: nn.Module, step: int) -> None:
    """Move the averaged weights towards the network's after its step number `step`, counted from 0, in place."""
    decay = min(0.999, (step + 1) / (step + 10))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)


def build_model(kind: str, sizes: dict[str, Any]) -> nn.Module:
    """Return an untrained model of a kind that the manifest names: "noise", "edm" or "classifier"."""
    if kind == "noise":
        return class_denoiser(**sizes)
    if kind == "edm":
        return EDMDenoiser(class_denoiser(**sizes, levels=1))
    if kind == "classifier":
        layers = (nn.Linear(sizes["dimension"], sizes["width"]), nn.Linear(sizes["width"], sizes["classes"]))
        return nn.Sequential(layers[0], nn.ReLU(), layers[1])
    raise unknown_name("kind of model", kind, ("noise", "edm", "classifier"))


def diffusion_manifest() -> dict[str, Any]:
    """Return what is known of the committed models: by name its kind, sizes, recipe, seed and measured quality.

    Raises
    ------
    FileNotFoundError
        If the folder is not there.
    DataError
        If the manifest can't be read.
    """
    path = find_asset("data/diffusion") / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        return {
            name: {**about, "sha256": manifest["files"][about["file"]]} for name, about in manifest["models"].items()
        }
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path} can't be read: {error!r}; data/README.md says how to make it") from error


def load_denoiser(name: str, device: torch.device | str = "cpu") -> Any:
    """Return a committed model, a new copy each time, in evaluation mode.

    Parameters
    ----------
    name : str
        "ring-small", "ring-noisy", "digits-default", "digits-noisy", "digits-edm", or "digits-classifier" (whose
        answer to images [n, 64] is logits).
    device : torch.device or str

    Returns
    -------
    ResidualMLP, EDMDenoiser or Sequential

    Raises
    ------
    UnknownNameError
        If there is no model of that name.
    DataError
        If its file or the manifest was truncated or altered.
    """
    known = diffusion_manifest()
    if name not in known:
        raise unknown_name("diffusion model", name, known)
    about = known[name]
    content = read_checked(find_asset("data/diffusion") / about["file"], about["sha256"])
    with seeded_globals(0):  # the first weights are replaced at once
        model = build_model(about["kind"], about["network"])
    try:
        model.load_state_dict(safetensors.torch.load(content))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise DataError(f"the model {name!r} does not fit its manifest: {error}; data/README.md says how") from error
    return model.to(device).eval()
