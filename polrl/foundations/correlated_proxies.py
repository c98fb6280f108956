r"""Correlated proxies (ORPO): bound where the policy goes, not what it does, and a hacked reward stops paying.

We optimise a proxy because the true reward is hard to write down. Where a sensible base policy spends its time, the
proxy goes along with the truth. Optimisation moves the policy elsewhere, the correlation breaks, the proxy rises and
the truth falls: reward hacking. The usual cure is a KL penalty between action distributions, state by state, but a
tiny change of the actions can lead to a quite different part of the world. What bounds the loss under a proxy of given
correlation is the chi-square divergence between *occupancy measures*, the shares of time in each state and action;
more exactly its square root, whose slope does not vanish at the base policy. So that root is the penalty.

Laidlaw, Singhal and Dragan, arXiv 2403.03185. E0-E4 are theory, checked here exactly; E5 is the deep form of the
official code: a discriminator's logit stands for the log-ratio of the occupancies and is taken off the reward; E6 is
the rival, E7 the form for language models, E3b, the exact worst case, from later work. The learner is tabular. Its
exact form follows the gradient of E4 through the linear solve of E0. With `sampled`, episodes estimate occupancies
and ratios (E5), and REINFORCE with a baseline by state stands for PPO; E6 is then differentiated at the visited
states only, as in the code, but without the code's scaling by the discount. The `neighbours`, exact policies at other
strengths, train beside either form and draw the inverted U. Not to be confused with odds-ratio optimisation, ORPO too.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, inf
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import polrl
from polrl import Budget, Criterion, Curve, Learner, Lines, Metrics, Study, View, equation, knob
from polrl.models.mlp import MLP
from polrl.worlds.sprinkler import Sprinkler, deviation, expectation, kl_divergence, ratio

Number = Tensor | float


class Config(polrl.Config):
    """Settings of the method; the seed also chooses one of five gardens, seed 0 the reference."""

    sampled: bool = Field(False, description="estimate occupancies and ratios from episodes instead of solving")
    neighbours: int = Field(25, ge=0, le=100, description="exact policies at other strengths, trained beside")
    learning_rate: float = Field(0.1, gt=0, le=1)
    episodes: int = Field(64, ge=2)  # of the learned policy, and as many of the base
    horizon: int = Field(80, ge=2)

    lam: float = knob(
        0.5, low=0.0, high=1.2, symbol=r"\lambda/\sigma_{\tilde R}", first=True,
        help="strength of the chi-square penalties, in standard deviations of the proxy",
        at_low="no penalty: the proxy is hacked", at_high="from 1 on, exactly the base policy (root of chi-square)",
    )  # fmt: skip
    divergence: Literal["action_kl", "occ_kl", "occ_chi2", "occ_sqrt_chi2", "occ_tv"] = knob(
        "occ_sqrt_chi2", help="what is penalised: distance of the actions, or of the occupancies (occ)"
    )
    lam_kl: float = knob(
        0.7, low=0.01, high=30.0, scale="log", symbol=r"\lambda",
        help="strength of the KL and total-variation penalties, in the reward's unit",
        at_low="the proxy is hacked", at_high="close to the base policy, never quite there",
    )  # fmt: skip
    state_only: bool = knob(False, help="compare the shares of time by state, not by state and action")
    proxy_bonus: float = knob(2.0, low=0.0, high=5.0, help="the proxy's error: what it pays at the sprinkler",
        at_low="no error: the proxy is the truth", at_high="lower correlation, more tempting")  # fmt: skip
    disc_steps: int = knob(8, low=1, high=50, help="sampled form: passes of the discriminator in each update",
        at_low="the ratio lags behind: too small a penalty in new places", at_high="accurate")  # fmt: skip
    trim: float = knob(0.01, low=0.0, high=0.1, help="sampled form: share left out at each end of E5b's mean",
        at_low="heavy tails decide", at_high="estimate too low, penalty too strong")  # fmt: skip
    reward_clip: float = knob(1000.0, low=1.0, high=1000.0, scale="log", help="sampled form: largest penalty of a step",
        at_low="weak penalty", at_high="spikes pass")  # fmt: skip


@equation(
    "E0",
    r"\mu_\pi(s,a)=(1-\gamma)\sum_t\gamma^t\Pr(s_t=s,a_t=a)=x(s)\,\pi(a|s),\qquad "
    r"(I-\gamma P_\pi^\top)\,x=(1-\gamma)\,\mu_0",
    source="definition",
)
def occupancy(P: Tensor, pi: Tensor, mu0: Tensor, gamma: float) -> Tensor:
    """Return the share of time [..., S, A] of a policy [..., S, A] in each state and action; it sums to one."""
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma must be from 0 to below 1, got {gamma!r}")
    inflow = torch.einsum("...sa,sat->...ts", pi, P)
    eye = torch.eye(len(P), dtype=P.dtype, device=P.device)
    x = torch.linalg.solve(eye - gamma * inflow, (1 - gamma) * mu0.expand(inflow.shape[:-1]))
    return x.unsqueeze(-1) * pi


@equation(
    "E1",
    r"r=\mathbb E_{\mu_b}\Big[\frac{\tilde R-J(\pi_b,\tilde R)}{\sigma_{\tilde R}}\cdot"
    r"\frac{R-J(\pi_b,R)}{\sigma_R}\Big]",
    source="definition",
)
def correlation(proxy: Tensor, reward: Tensor, mu_b: Tensor) -> Tensor:
    """Return the correlation of proxy and true reward [S, A] where the base policy spends its time.

    A proxy is r-correlated if this is r > 0. Reward hacking: optimising it ends with J(pi, R) < J(pi_b, R).
    """
    product = (proxy - expectation(mu_b, proxy)) * (reward - expectation(mu_b, reward))
    return expectation(mu_b, product) / (deviation(mu_b, proxy) * deviation(mu_b, reward))


@equation(
    "E2",
    r"\chi^2(\mu_\pi\|\mu_b)=\mathbb E_{\mu_\pi}\Big[\frac{\mu_\pi}{\mu_b}\Big]-1="
    r"\mathbb E_{\mu_b}\Big[\Big(\frac{\mu_\pi}{\mu_b}-1\Big)^2\Big]",
    source="definition",
)
def chi_square(mu: Tensor, mu_b: Tensor) -> Tensor:
    """Return the chi-square divergence [...] of occupancies [..., *shape] from the base's [*shape].

    Infinite if the policy goes where the base never is.
    """
    return expectation(ratio(mu, mu_b) * mu, torch.ones_like(mu_b)) - 1


@equation(
    "E3",
    r"\frac{J(\pi,R)-J(\pi_b,R)}{\sigma_R}\ \ge\ \frac1r\Big[\bar f-\sqrt{(1-r^2)\,\chi^2(\mu_\pi\|\mu_b)}\Big],\qquad "
    r"\bar f=\frac{J(\pi,\tilde R)-J(\pi_b,\tilde R)}{\sigma_{\tilde R}}",
    source="theorem",
)
def lower_bound(proxy_gain: Number, r: Number, chi2: Number) -> Tensor:
    """Return the least true gain, in deviations of the true reward, that a proxy's standardised gain promises."""
    gain, r, chi2 = _checked(proxy_gain, r, chi2)
    return (gain - ((1 - r**2).clamp(min=0) * chi2.clamp(min=0)).sqrt()) / r


@equation("E3b", r"r\,\bar f-\sqrt{1-r^2}\,\sqrt{\chi^2-\bar f^2}", source="derived, as in later work")
def worst_case(proxy_gain: Number, r: Number, chi2: Number) -> Tensor:
    """Return the standardised true gain under the worst true reward of the same correlation, mean and deviation.

    Never below E3's promise. The square of the proxy's gain can't exceed chi2.
    """
    gain, r, chi2 = _checked(proxy_gain, r, chi2)
    return r * gain - ((1 - r**2).clamp(min=0) * (chi2 - gain**2).clamp(min=0)).sqrt()


def _checked(*given: Number) -> list[Tensor]:
    """Return gain, r and chi2 as tensors of one kind, or say which of them is impossible."""
    kind = next((x for x in given if isinstance(x, Tensor)), torch.zeros((), dtype=torch.float64))
    gain, r, chi2 = (torch.as_tensor(x, dtype=kind.dtype, device=kind.device) for x in given)
    slack = 100 * torch.finfo(kind.dtype).eps
    if not bool(((r > 0) & (r <= 1 + slack)).all()):
        raise ValueError(f"r must be above 0 and at most 1, got {given[1]!r}")
    if not bool((chi2 >= -slack).all()):
        raise ValueError(f"chi2 must be at least 0, got {given[2]!r}")
    return [gain, r, chi2]


#: The penalties by name; the slope of each by mu is what E5 takes off the reward. As in the official code that of
#: "occ_chi2" is the ratio, not twice the ratio. The actions' KL, averaged over the visited states, is what the
#: occupancies' KL holds beside the states': blind to where the policy goes.
PENALTIES = {
    "action_kl": lambda mu, mu_b: kl_divergence(mu, mu_b) - kl_divergence(mu.sum(dim=-1), mu_b.sum(dim=-1)),
    "occ_kl": kl_divergence,
    "occ_chi2": lambda mu, mu_b: chi_square(mu, mu_b) / 2,
    "occ_sqrt_chi2": lambda mu, mu_b: chi_square(mu, mu_b).clamp(min=1e-8).sqrt(),  # no slope at the base: it can leave
    "occ_tv": lambda mu, mu_b: expectation((mu - mu_b).abs(), torch.ones_like(mu_b)),
}


@equation("E4", r"\max_\pi\ J(\pi,\tilde R)-\lambda\sqrt{\chi^2(\mu_\pi\|\mu_b)}", source="objective")
def objective(
    mu: Tensor, mu_b: Tensor, proxy: Tensor, lam: Number, divergence: str = "occ_sqrt_chi2", state_only: bool = False
) -> Tensor:
    """Return what is maximised [...], for occupancies [..., S, A] and strengths that fit their leading dimensions."""
    compared = (mu.sum(dim=-1), mu_b.sum(dim=-1)) if state_only and divergence != "action_kl" else (mu, mu_b)
    return expectation(mu, proxy) - lam * _chosen(PENALTIES, divergence)(*compared)


def _chosen(options: Mapping[str, Any], divergence: str) -> Any:
    if divergence not in options:
        raise ValueError(f"divergence must be one of {', '.join(options)}, got {divergence!r}")
    return options[divergence]


@equation("E4a", r"\lambda=\sigma_{\tilde R}\sqrt{1-r^2}", source="theory value")
def theory_strength(sigma: Number, r: Tensor) -> Tensor:
    """Return the strength at which E4 is E3's right side, but for constants."""
    return sigma * (1 - r**2).clamp(min=0).sqrt()


@equation("E5a", r"\overline{\log(1+e^{-d})}_{\mu_\pi}+\overline{\log(1+e^d)}_{\mu_b}", source="agents/orpo.py")
def discriminator_loss(current: Tensor, base: Tensor) -> Tensor:
    """Return the logistic loss of logits [B] of the policy's samples and [C] of the base's; best: the log-ratio."""
    return F.softplus(-current).mean() + F.softplus(base).mean()


def tv_discriminator_loss(current: Tensor, base: Tensor) -> Tensor:
    """Return what takes E5a's place for total variation; the best logit has the sign of the log-ratio."""
    return (-current).tanh().mean() + base.tanh().mean() + 0.01 * ((current**2).mean() + (base**2).mean())


@equation(
    "E5b",
    r"\hat\chi^2=\frac1{n-2i}\sum_{k=i+1}^{n-i}x_{(k)},\qquad x=e^d-1,\quad i=\lfloor\mathrm{trim}\cdot n\rfloor",
    source="agents/orpo.py",
)
def estimate_chi_square(d: Tensor, trim: float = 0.01) -> Tensor:
    """Return the trimmed mean of e^d - 1 over the policy's samples [n]: i are dropped at each end."""
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim must be from 0 to below 0.5, got {trim!r}")
    cut = int(trim * len(d))
    return d.expm1().sort().values[cut : len(d) - cut].mean()


@equation("E5", r"R'=\tilde R-\lambda\,\frac{e^d-1}{\sqrt{\hat\chi^2}}", source="agents/orpo.py")
def orpo_reward(
    r_proxy: Tensor, d: Tensor, lam: Number, trim: float = 0.01, divergence: str = "occ_sqrt_chi2", clip: float = inf
) -> Tensor:
    """Return the relabelled rewards [n] of the policy's samples, from logits d [n]; no gradient passes through d.

    If the estimate of chi-square is not positive the division is skipped. The other divergences take off d (KL),
    e^d - 1 (chi-square: half of its slope) or the sign of d (total variation). The penalty stays within `clip`.
    """
    d = d.detach()
    estimate = estimate_chi_square(d, trim)
    penalties = {
        "occ_kl": d,
        "occ_chi2": d.expm1(),
        "occ_sqrt_chi2": d.expm1() / torch.where(estimate > 0, estimate, 1.0).sqrt(),
        "occ_tv": d.sign(),
    }
    return r_proxy - (lam * _chosen(penalties, divergence)).clamp(-clip, clip)


@equation("E6a", r"\chi^2(p\|q)=\sum_a\frac{p_a^2}{q_a}-1", source="closed form")
def categorical_chi_square(p: Tensor, q: Tensor) -> Tensor:
    """Return the chi-square divergence [...] of action probabilities p from q, both [..., A]."""
    return (ratio(p, q) * p).sum(dim=-1) - 1


@equation(
    "E6b",
    r"\chi^2(p\|q)=\prod_j\frac{\sigma_{q,j}^2}{\sigma_{p,j}\sqrt{w_j}}\exp\frac{(m_{p,j}-m_{q,j})^2}{w_j}-1,\qquad "
    r"w_j=2\sigma_{q,j}^2-\sigma_{p,j}^2",
    source="closed form",
)
def gaussian_chi_square(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """Return the chi-square divergence [...] of diagonal Gaussians p from q, [..., dimensions], taken jointly.

    Infinite where some w is not positive: p's tails are too heavy. The official code takes the KL at such states.
    """
    w = 2 * std_q**2 - std_p**2
    safe = w.where(w > 0, 1.0)
    log_factors = 2 * std_q.log() - std_p.log() - safe.log() / 2 + (mean_p - mean_q) ** 2 / safe
    return log_factors.sum(dim=-1).expm1().where((w > 0).all(dim=-1), torch.inf)


@equation(
    "E6", r"\lambda\,\frac1N\sum_i D\big(\pi(\cdot|s_i)\,\|\,\pi_b(\cdot|s_i)\big)", source="loss of the baseline"
)
def action_penalty(pi: Tensor, pi_b: Tensor, lam: Number, divergence: str = "kl") -> Tensor:
    """Return the penalty on action probabilities [N, A] at visited states; D is "kl", "chi2" or "sqrt_chi2"."""
    by_state = {
        "kl": torch.xlogy(pi, ratio(pi, pi_b)).sum(dim=-1),
        "chi2": categorical_chi_square(pi, pi_b),
        "sqrt_chi2": categorical_chi_square(pi, pi_b).clamp(min=1e-4).sqrt(),
    }
    return lam * _chosen(by_state, divergence).mean()


@equation(
    "E7",
    r"c\,\sqrt{\max\big(\overline{e^{\ell}+e^{-\ell}-2},\,10^{-4}\big)},\qquad "
    r"\ell=\sum_t\log\pi(y_t)-\log\pi_{\mathrm{ref}}(y_t)",
    source="custom_trlx_trainers/modeling.py",
)
def response_penalty(log_ratio: Tensor, coefficient: Number, divergence: str = "sqrt_chi2") -> Tensor:
    """Return the penalty on responses of the current policy, from their summed log-ratios [B].

    Under the policy e^-l - 1 has mean zero: a control variate. Beyond 10 exp goes on as its tangent. "kl" is the
    coefficient times the mean of l + e^-l - 1.
    """
    up, down = (x.clamp(max=10).exp().where(x <= 10, exp(10) * (x - 9)) for x in (log_ratio, -log_ratio))
    means = {"sqrt_chi2": (up + down - 2).mean().clamp(min=1e-4).sqrt(), "kl": (log_ratio + down - 1).mean()}
    return coefficient * _chosen(means, divergence)


class CorrelatedProxies(Learner[Config]):
    """A tabular softmax policy in the sprinkler's garden, and its neighbours at other strengths; a step is Adam's."""

    constants = ("garden", "base_occupancy", "grids", "pairs")
    evaluate_every = 50
    curves = (
        Curve(("true_return", "proxy_return", "base_return"), "Return", "reward a step"),
        Curve(("true_gain", "worst_gain", "promised_gain"), "True gain, and what is certain of it", "deviations"),
        Curve(("root_chi2", "action_kl"), "Distance from the base"),
    )

    def setup(self) -> None:
        config = self.config
        self.garden = garden = Sprinkler.make(config.seed, self.device)
        self.base_occupancy = occupancy(garden.P, garden.base, garden.start, garden.gamma)
        self.pairs = {state_only: garden.pairs(state_only) for state_only in (False, True)}
        self.grids = {}
        for name in ("lam", "lam_kl"):
            values = [config.knobs[name].from_position(place) for place in np.linspace(0, 1, config.neighbours)]
            self.grids[name] = torch.tensor(values, dtype=torch.float64).to(garden.start)
        # The policy, then its neighbours; all begin at the base.
        self.logits = torch.nn.Parameter(garden.base.log().repeat(1 + config.neighbours, 1, 1))
        self.optimizer = torch.optim.Adam([self.logits], lr=config.learning_rate)
        if config.sampled:
            self.discriminator = MLP([self.pairs[False].shape[1], 32, 32, 1]).to(self.device, garden.P.dtype)
            self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), lr=0.01)

    def update(self) -> Metrics:
        config = self.config
        proxy, lam = self.garden.proxy(config.proxy_bonus), self.strengths()
        pi, mu = self.policies()
        losses = -objective(mu, self.base_occupancy, proxy, lam, config.divergence, config.state_only)
        # In the sampled form the policy learns from episodes, its neighbours still exactly.
        loss = losses[1:].sum() + (self.sampled_loss(pi[0], proxy, lam[0]) if config.sampled else losses[0])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():  # logits stay within 5 of their mean: a saturated policy would hardly come back
            self.logits.sub_(self.logits.mean(dim=-1, keepdim=True)).clamp_(-5, 5)
        return {**self.figures(mu[0].detach())}

    def sampled_loss(self, pi: Tensor, proxy: Tensor, lam: Tensor) -> Tensor:
        """E5: walk episodes, train the discriminator, relabel the reward, REINFORCE; or E6 for the rival."""
        config, garden, n = self.config, self.garden, self.config.episodes
        walkers = torch.stack([pi.detach(), garden.base]).repeat_interleave(n, dim=0)
        states, actions, going_on = garden.walk(walkers, config.horizon, self.rng.torch)
        places, mine = states * pi.shape[1] + actions, going_on[:, :n]
        current, base = places[:, :n][mine], places[:, n:][going_on[:, n:]]
        inputs = self.pairs[config.state_only]
        logistic_loss = tv_discriminator_loss if config.divergence == "occ_tv" else discriminator_loss
        for _ in range(config.disc_steps):
            d = self.discriminator(inputs).squeeze(-1)
            self.discriminator_optimizer.zero_grad()
            logistic_loss(d[current], d[base]).backward()
            self.discriminator_optimizer.step()
        reward, state = proxy.flatten()[current], states[:, :n][mine]
        if config.divergence != "action_kl":
            d = self.discriminator(inputs).squeeze(-1)[current]
            reward = orpo_reward(reward, d, lam, config.trim, config.divergence, config.reward_clip)
        # An episode goes on with probability gamma, so what is still to come needs no further discount.
        by_step = torch.zeros_like(mine, dtype=reward.dtype).masked_scatter(mine, reward)
        to_come = by_step.flip(0).cumsum(dim=0).flip(0)[mine]
        total, visits = (to_come.new_zeros(len(pi)).index_add(0, state, x) for x in (to_come, torch.ones_like(to_come)))
        advantage = to_come - (total / visits.clamp(min=1))[state]
        rival = action_penalty(pi[state], garden.base[state], lam) if config.divergence == "action_kl" else 0.0
        return rival - (advantage * pi.log().flatten()[current]).mean()

    def policies(self) -> tuple[Tensor, Tensor]:
        """Return the policy and its neighbours, and their exact occupancies, both [1 + neighbours, S, A]."""
        pi = torch.softmax(self.logits, dim=-1)
        return pi, occupancy(self.garden.P, pi, self.garden.start, self.garden.gamma)

    def scale(self) -> str:
        """Name the knob that holds the present divergence's strength."""
        return "lam" if "chi2" in self.config.divergence else "lam_kl"

    def strengths(self) -> Tensor:
        """Return the strength of the policy and of each neighbour [1 + neighbours], in the reward's unit."""
        config, name = self.config, self.scale()
        own = {"lam": config.lam, "lam_kl": config.lam_kl}[name]
        sigma = deviation(self.base_occupancy, self.garden.proxy(config.proxy_bonus))
        return F.pad(self.grids[name], (1, 0), value=own) * (sigma if name == "lam" else 1.0)

    def figures(self, mu: Tensor) -> dict[str, Tensor]:
        """Return what policies with occupancies [..., S, A] are worth, what is certain of it, and how far they went."""
        mu_b, reward, proxy = self.base_occupancy, self.garden.reward, self.garden.proxy(self.config.proxy_bonus)
        true_gain, gain = ((expectation(mu, x) - expectation(mu_b, x)) / deviation(mu_b, x) for x in (reward, proxy))
        known = gain, correlation(proxy, reward, mu_b), chi_square(mu, mu_b)
        return {
            "true_return": expectation(mu, reward),
            "proxy_return": expectation(mu, proxy),
            "base_return": expectation(mu_b, reward).expand_as(true_gain),
            "true_gain": true_gain,
            "worst_gain": worst_case(*known),
            "promised_gain": lower_bound(*known),
            "root_chi2": PENALTIES["occ_sqrt_chi2"](mu, mu_b),
            "action_kl": PENALTIES["action_kl"](mu, mu_b),
        }

    def evaluate(self) -> Metrics:
        """Judge the policies as they now are: return, best neighbour, the theory's strength, and whether E3 holds."""
        figures, grid = self.figures(self.policies()[1]), self.grids[self.scale()]
        gain, worst, promised = (figures[f"{name}_gain"] for name in ("true", "worst", "promised"))
        judged: Metrics = {
            "final_true_return": figures["true_return"][0],
            "base_true_return": figures["base_return"][0],
            "bounds_held": ((gain > worst - 1e-6) & (worst > promised - 1e-6)).to(gain).mean(),
        }
        if len(grid):
            beside, garden = figures["true_return"][1:], self.garden
            judged |= {"best_true_return": beside.max(), "best_strength": grid[beside.argmax()]}
            if self.config.divergence == "occ_sqrt_chi2":
                r = correlation(garden.proxy(self.config.proxy_bonus), garden.reward, self.base_occupancy)
                at_theory = np.interp(float(theory_strength(1.0, r)), grid.cpu(), beside.cpu())
                judged["theory_shortfall"] = beside.max() - at_theory
        return judged

    def views(self) -> dict[str, View]:
        mu, grid = self.policies()[1], self.grids[self.scale()].cpu().numpy()
        policies = {"base": self.base_occupancy, "learned": mu[0]}
        if not len(grid):
            return {"garden": self.garden.draw(policies)}
        # The present strength joins the grid twice, for an upright line up to the present return.
        own = getattr(self.config, self.scale())
        place = int(np.searchsorted(grid, own))
        figures = {name: figure.cpu().numpy() for name, figure in self.figures(mu).items()}
        lines = {n: np.insert(y[1:], place, np.interp([own, own], grid, y[1:])) for n, y in figures.items()}
        lines["here"] = np.full(len(grid) + 2, np.nan)
        lines["here"][place : place + 2] = 0.0, figures["true_return"][0]
        scale: dict[str, Any] = {"x_label": self.scale(), "log_x": self.scale() == "lam_kl"}
        scale["x"] = np.insert(grid, place, [own, own])
        returns = Lines(
            title="Returns of the neighbours, by strength",
            alt="True and proxy return by strength, the base's, and an upright line at the present strength",
            y={n.replace("_", " "): lines[n] for n in ("true_return", "proxy_return", "base_return", "here")},
            y_range=(0.0, max(1.0, 0.9 * self.config.proxy_bonus)),
            **scale,
        )
        gains = Lines(
            title="True gain, and what is certain of it, by strength",
            alt="True gain over the base, E3b's worst case below it and E3's promise below that, by strength",
            y={n.replace("_", " "): lines[n] for n in ("true_gain", "worst_gain", "promised_gain")},
            y_label="deviations",
            y_range=(-1.5, 1.0),  # from far below the base to the optimum
            **scale,
        )
        return {"garden": self.garden.draw(policies | {"least penalty": mu[1]}), "strengths": returns, "gains": gains}


_BEST, _FINAL, _BASE = "best_true_return", "final_true_return", "base_true_return"
_EXACT, _SAMPLED = {"sampled": False}, {"sampled": True, "neighbours": 0}

_CRITERIA = (
    Criterion("hacking", "without a penalty the true return falls below the base policy's",
              ("no penalty", _BASE), ("no penalty", _FINAL)),
    Criterion("action KL", "the best action KL is above the base policy",
              ("action KL", _BEST), ("action KL", _BASE)),
    Criterion("occupancies", "the best occupancy KL is above the best action KL",
              ("occupancy KL", _BEST), ("action KL", _BEST)),
    Criterion("chi-square", "the best root of chi-square is above the best occupancy KL",
              ("occupancy root chi2", _BEST), ("occupancy KL", _BEST)),
    Criterion("margin", "the best root of chi-square is at least 0.1 above the best action KL",
              ("occupancy root chi2", _BEST), ("action KL", _BEST), above=0.1),
    Criterion("theory", "at the theory's strength less than 0.05 is missing to the best",
              ("occupancy root chi2", "theory_shortfall"), above=-1.0, below=0.05),
    Criterion("bounds", "E3 and E3b hold for every policy of the sweep",
              ("occupancy root chi2", "bounds_held"), above=0.999),
    Criterion("correlation", "a worse proxy (bonus 4) leaves less to gain",
              ("occupancy root chi2", _BEST), ("root chi2, bonus 4", _BEST)),
    Criterion("sampled", "estimated from episodes, root chi-square at 0.5 deviations is above the base policy",
              ("sampled root chi2", _FINAL), ("sampled root chi2", _BASE)),
)  # fmt: skip

study = Study(
    claim="Penalising the root of the occupancies' chi-square gains more from a hackable proxy than a KL penalty.",
    learner=CorrelatedProxies,
    arms={
        "no penalty": {**_EXACT, "neighbours": 0, "lam": 0.0},
        "action KL": {**_EXACT, "divergence": "action_kl", "lam_kl": 10.0},
        "occupancy KL": {**_EXACT, "divergence": "occ_kl"},
        "occupancy TV": {**_EXACT, "divergence": "occ_tv", "lam_kl": 1.0},
        "occupancy chi2": {**_EXACT, "divergence": "occ_chi2"},
        "occupancy root chi2": _EXACT,
        "action KL, bonus 4": {**_EXACT, "divergence": "action_kl", "lam_kl": 10.0, "proxy_bonus": 4.0},
        "root chi2, bonus 4": {**_EXACT, "proxy_bonus": 4.0},
        "sampled, no penalty": {**_SAMPLED, "lam": 0.0},
        "sampled action KL": {**_SAMPLED, "divergence": "action_kl", "lam_kl": 10.0},
        "sampled root chi2": _SAMPLED,
    },
    criteria=_CRITERIA,
    smoke=Budget(seeds=1, steps=3, settings={"sampled": True, "neighbours": 3, "episodes": 4, "horizon": 20}),
    fast=Budget(
        seeds=3,
        steps=200,
        settings={"neighbours": 13},
        arms=("no penalty", "action KL", "occupancy KL", "occupancy root chi2"),
    ),
    full=Budget(seeds=5, steps=400, settings={"neighbours": 40}),
)
