r"""REINFORCE with entropy and KL strengths: the baseline that the later methods of the course change.

A policy is sampled, each sample earns a reward, and what earned more than the others is made likelier. Only the
policy's own probabilities are differentiated, never the reward. Left alone, REINFORCE keeps no alternative alive: of
several answers that are equally good it settles on a few, by the luck of its first samples. Two strengths repair it.
Entropy (`alpha`) pays for every nat of randomness; the KL divergence (`beta`) costs for every nat away from a
reference policy. Both are no more than a change of the reward, E3, and nothing else in the update moves.

Two worlds. `token_tree`: all strings of a few letters; only a whole string is rewarded and several tie for the best;
everything can be enumerated, the best policy (E9) included. `cartpole`: CartPole-v1, the same update where nothing
can be enumerated; its reference pushes towards the side to which the pole leans, unsure of itself.

Williams, Machine Learning 8, 1992, and textbooks since. There is no paper's card: the numbers are this file's own.
E3 to E6 are one update, in its order. E1, E9 and E10 say where it leads, E2 and E11 what one sample is worth.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

import polrl
from polrl import (
    Bars,
    Budget,
    Criterion,
    Curve,
    Heatmap,
    Histogram,
    Learner,
    Lines,
    Metrics,
    Study,
    Tokens,
    View,
    equation,
    knob,
)
from polrl.foundations._reinforce_worlds import CartPole, Strings


class Config(polrl.Config):
    """Settings; `vocabulary`, `depth`, `best` and `reference_skew` are the tree's, `horizon` and `width` CartPole's."""

    world: Literal["token_tree", "cartpole"] = "token_tree"
    vocabulary: int = Field(2, ge=2, le=10)  # a depth of 1 makes a bandit with so many arms
    depth: int = Field(4, ge=1, le=6)
    best: int = Field(4, ge=1)  # strings that tie at reward 1; the others earn from 0 to 0.8
    reference_skew: float = Field(1.0, ge=0.0, le=5.0)  # standard deviation of the reference's logits
    horizon: int = Field(200, ge=10, le=500)  # CartPole-v1's own limit is 500; 200 answers quicker in the lab
    width: int = Field(32, ge=1)

    alpha: float = knob(
        0.1, low=0.0, high=3.0, scale="log_zero", smallest=1e-3, symbol=r"\alpha", first=True,
        help="what a nat of entropy earns", at_low="plain REINFORCE: most of the equally good answers die out",
        at_high="all answers alike, the reward is drowned",
    )  # fmt: skip
    beta: float = knob(
        0.0, low=0.0, high=3.0, scale="log_zero", smallest=1e-3, symbol=r"\beta",
        help="what a nat of KL divergence from the reference costs", at_low="the reference is ignored",
        at_high="the reference is copied",
    )  # fmt: skip
    learning_rate: float = knob(
        0.05, low=1e-4, high=1.0, scale="log", symbol=r"\eta", help="of Adam",
        at_low="hardly moves", at_high="jumps to a conclusion from one batch",
    )  # fmt: skip
    batch_size: int = knob(
        32, low=2, high=256, symbol="N", help="strings or episodes an update", at_low="noisy", at_high="smooth, slow"
    )
    baseline: Literal["none", "mean"] = knob(
        "mean", help="what a sample's reward is compared with: nothing, or the mean of the other samples"
    )


@equation(
    "E1",
    r"J(\pi)=\sum_y\pi(y)\Big(R(y)-\alpha\log\pi(y)-\beta\log\frac{\pi(y)}{\pi_{\rm ref}(y)}\Big)"
    r"=\mathbb E_\pi[R]+\alpha\,H(\pi)-\beta\,\mathrm{KL}(\pi\,\|\,\pi_{\rm ref})",
    source="textbook",
)
def objective(
    log_pi: torch.Tensor, reward: torch.Tensor, log_reference: torch.Tensor, alpha: float, beta: float
) -> torch.Tensor:
    """Return the objective, a scalar, summed over all answers: log pi(y), R(y) and log pi_ref(y) are [M]."""
    return (log_pi.exp() * (reward - alpha * log_pi - beta * (log_pi - log_reference))).sum()


@equation(
    "E2",
    r"\hat g=A\,\nabla_z\log\pi(a)=A\,(e_a-\pi),\quad\pi=\mathrm{softmax}(z);\qquad "
    r"\mathbb E_{a\sim\pi}\big[R(a)\,\nabla_z\log\pi(a)\big]=\nabla_z\,\mathbb E_\pi[R]",
    source="Williams 1992",
)
def score_gradient(logits: torch.Tensor, action: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    """Return each sample's step uphill [N, K], for logits [K], actions int64 [N] and advantages [N]."""
    chosen = nn.functional.one_hot(action, len(logits)).to(logits.dtype)
    return advantage.unsqueeze(1) * (chosen - torch.softmax(logits, dim=0))


@equation(
    "E3",
    r"\tilde r_t=r_t-\alpha\log\pi(a_t|s_t)-\beta\log\frac{\pi(a_t|s_t)}{\pi_{\rm ref}(a_t|s_t)},\qquad "
    r"\mathbb E_\pi\Big[\sum_t\tilde r_t\Big]=J(\pi)",
    source="textbook",
)
def regularized_reward(
    reward: torch.Tensor, log_pi: torch.Tensor, log_reference: torch.Tensor, alpha: float, beta: float
) -> torch.Tensor:
    """Return the reward with the price of each decision [N, T], a constant for autograd.

    Differentiating the price of a fixed sample adds nothing: the mean of a gradient of log pi is zero. What
    entropy and KL change is which samples are credited.
    """
    log_pi, log_reference = log_pi.detach(), log_reference.detach()
    return reward - alpha * log_pi - beta * (log_pi - log_reference)


@equation("E4", r"G_t=\sum_{k\ge t}\tilde r_k", source="textbook")
def reward_to_go(reward: torch.Tensor) -> torch.Tensor:
    """Return what is earned from each decision on [N, T]: a decision has no part in what came before it."""
    return reward.flip(1).cumsum(1).flip(1)


@equation(
    "E5",
    r"b_t^i=\frac{\sum_{j\ne i}m_t^j\,G_t^j}{\sum_{j\ne i}m_t^j}",
    source="textbook; without the own sample, so that the gradient stays unbiased",
)
def mean_of_others(to_go: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Return the baseline [N, T]: the mean to-go [N, T] of the other samples still alive (m = 1); 0 if none is.

    Raises
    ------
    ValueError
        If there is one sample only.
    """
    if len(to_go) < 2:
        raise ValueError(f"the mean of the other samples needs at least 2 samples, got {len(to_go)}")
    total, count = (to_go * alive).sum(dim=0), alive.sum(dim=0)
    return (total - to_go * alive) / (count - alive).clamp(min=1)


@equation(
    "E6",
    r"L=-\frac1N\sum_i\sum_t m_t^i\,\mathrm{sg}[A_t^i]\,\log\pi(a_t^i|s_t^i),\qquad"
    r"\mathbb E[\nabla L]=-\nabla J",
    source="Williams 1992",
)
def policy_loss(log_pi: torch.Tensor, advantage: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    """Return the surrogate loss from log pi, advantages and alive [N, T]: a sum over steps, a mean over samples."""
    return -(alive * advantage.detach() * log_pi).sum() / len(log_pi)


@equation("E7", r"H(s)=-\sum_a\pi(a|s)\log\pi(a|s)", source="textbook")
def entropy(log_pi: torch.Tensor) -> torch.Tensor:
    """Return the entropy [...] of distributions with log-probabilities [..., A]."""
    return -(log_pi.exp() * log_pi).sum(dim=-1)


@equation("E8", r"\mathrm{KL}(s)=\sum_a\pi(a|s)\log\frac{\pi(a|s)}{\pi_{\rm ref}(a|s)}", source="textbook")
def kl(log_pi: torch.Tensor, log_reference: torch.Tensor) -> torch.Tensor:
    """Return the KL divergence [...] from the reference, both given as log-probabilities [..., A]."""
    return (log_pi.exp() * (log_pi - log_reference)).sum(dim=-1)


@equation(
    "E9",
    r"\pi^*(y)\propto\pi_{\rm ref}(y)^{\beta/(\alpha+\beta)}\;e^{R(y)/(\alpha+\beta)}",
    source="textbook: the Gibbs policy",
)
def gibbs(reward: torch.Tensor, log_reference: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """Return the probabilities [M] that maximise E1; with alpha = beta = 0 the limit of a vanishing alpha.

    Raises
    ------
    ValueError
        If alpha or beta is below 0.
    """
    if min(alpha, beta) < 0:
        raise ValueError(f"alpha and beta must be 0 or above, got {alpha!r} and {beta!r}")
    if alpha + beta == 0:
        best = (reward == reward.max()).to(reward.dtype)
        return best / best.sum()
    return torch.softmax((reward + beta * log_reference) / (alpha + beta), dim=0)


@equation(
    "E10",
    r"J(\pi^*)=(\alpha+\beta)\log\sum_y\pi_{\rm ref}(y)^{\beta/(\alpha+\beta)}\,e^{R(y)/(\alpha+\beta)},\qquad "
    r"J(\pi^*)-J(\pi)=(\alpha+\beta)\,\mathrm{KL}(\pi\,\|\,\pi^*)",
    source="textbook",
)
def best_objective(reward: torch.Tensor, log_reference: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """Return the highest value that E1 can take, a scalar; with alpha = beta = 0 the highest reward."""
    if alpha + beta == 0:
        return reward.max()
    return (alpha + beta) * torch.logsumexp((reward + beta * log_reference) / (alpha + beta), dim=0)


@equation(
    "E11",
    r"\sum_a\pi(a)\,\|\hat g_a\|^2-\Big\|\sum_a\pi(a)\,\hat g_a\Big\|^2,\qquad\hat g_a=(R(a)-b)\,(e_a-\pi)",
    source="textbook",
)
def gradient_variance(logits: torch.Tensor, reward: torch.Tensor, baseline: float | torch.Tensor) -> torch.Tensor:
    """Return the variance, a scalar summed over the logits [K], of one sample's step (E2) on a bandit."""
    steps = score_gradient(logits, torch.arange(len(logits), device=logits.device), reward - baseline)
    pi = torch.softmax(logits, dim=0)
    return (pi * steps.pow(2).sum(dim=1)).sum() - (pi @ steps).pow(2).sum()


class Reinforce(Learner[Config]):
    """Sample, compare with the others, make the better likelier; a step is one batch of strings or episodes."""

    constants = ("world",)
    evaluate_every = 50
    curves = (
        Curve(("batch_return", "mean_return"), "Return", "reward"),
        Curve(("entropy",), "Entropy of a decision", "nats"),
        Curve(("kl",), "KL of a decision from the reference", "nats"),
        Curve(("advantage_spread",), "Spread of the advantages", "reward"),
    )

    def setup(self) -> None:
        c = self.config
        self.world: Strings | CartPole
        if c.world == "token_tree":
            self.world = Strings(c.vocabulary, c.depth, c.best, c.reference_skew, self.rng, self.device)
        else:
            self.world = CartPole(c.horizon, c.width, self.device)
        self.policy = self.world.new_policy().to(self.device)
        self.optimizer = torch.optim.Adam(self.policy.parameters())
        self.returns = torch.zeros(1, device=self.device)  # of the last batch

    def update(self) -> Metrics:
        config = self.config
        played = self.world.play(self.policy, config.batch_size, self.rng)
        log_pi = torch.log_softmax(self.policy(played.states), dim=-1)
        log_reference = self.world.reference(played.states)
        chosen, by_reference = (
            log_p.gather(-1, played.actions[..., None])[..., 0] for log_p in (log_pi, log_reference)
        )
        reward = regularized_reward(played.rewards, chosen, by_reference, config.alpha, config.beta)
        to_go = reward_to_go(reward * played.alive)
        baseline = mean_of_others(to_go, played.alive) if config.baseline == "mean" else torch.zeros_like(to_go)
        advantage = to_go - baseline
        loss = policy_loss(chosen, advantage, played.alive)

        self.optimizer.param_groups[0]["lr"] = config.learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

        self.returns = played.rewards.sum(dim=1)
        share = played.alive / played.alive.sum()  # of each decision
        return {
            "batch_return": self.returns.mean(),
            "entropy": (share * entropy(log_pi)).sum(),
            "kl": (share * kl(log_pi, log_reference)).sum(),
            "advantage_spread": (share * advantage.pow(2)).sum().sqrt(),
        }

    def evaluate(self) -> Metrics:
        """Return, its share of the most there is, entropy and KL a decision; on the tree also regret and overlap."""
        world = self.world
        figures = self.enumerate_strings(world) if isinstance(world, Strings) else self.try_cartpole(world)
        return {**figures, "return_share": figures["mean_return"] / world.most}

    def laws(self, world: Strings) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probability of every string [M], under the policy and under the reference."""
        tables = self.policy(world.prefixes), world.reference(world.prefixes)
        return world.tree.log_probabilities(tables[0]), world.tree.log_probabilities(tables[1])

    def enumerate_strings(self, world: Strings) -> Metrics:
        """Judge by sums over all strings; a string's entropy and KL are spread evenly over its letters."""
        (log_pi, log_reference), (alpha, beta) = self.laws(world), (self.config.alpha, self.config.beta)
        pi, best = log_pi.exp(), world.reward == world.reward.max()
        value = objective(log_pi, world.reward, log_reference, alpha, beta)
        return {
            "mean_return": (pi * world.reward).sum(),
            "mean_entropy": entropy(log_pi) / world.tree.depth,
            "mean_kl": kl(log_pi, log_reference) / world.tree.depth,
            "regret": best_objective(world.reward, log_reference, alpha, beta) - value,
            "overlap": torch.minimum(pi, gibbs(world.reward, log_reference, alpha, beta)).sum(),
            "best_mass": pi[best].sum(),
            # exp(entropy) counts the best strings in play; their share is 1 if all are equally likely.
            "best_in_play": entropy(torch.log_softmax(log_pi[best], dim=0)).exp() / best.sum(),
        }

    def try_cartpole(self, world: CartPole) -> Metrics:
        """Judge by 32 new episodes."""
        played = world.play(self.policy, 32, self.rng)
        log_pi, share = torch.log_softmax(self.policy(played.states), dim=-1), played.alive / played.alive.sum()
        return {
            "mean_return": played.rewards.sum(dim=1).mean(),
            "mean_entropy": (share * entropy(log_pi)).sum(),
            "mean_kl": (share * kl(log_pi, world.reference(played.states))).sum(),
        }

    def views(self) -> dict[str, View]:
        world = self.world
        return self.picture_strings(world) if isinstance(world, Strings) else self.picture_cartpole(world)

    def picture_strings(self, world: Strings) -> dict[str, View]:
        """Draw how likely each string is and what it earns, the best rewarded first, and some that are drawn."""
        (log_pi, log_reference), (alpha, beta) = self.laws(world), (self.config.alpha, self.config.beta)
        laws = {"policy": log_pi.exp(), "optimum": gibbs(world.reward, log_reference, alpha, beta)}
        overlap = torch.minimum(laws["policy"], laws["optimum"]).sum()
        if beta > 0:
            laws["reference"] = log_reference.exp()
        earned = {
            "with its price": regularized_reward(world.reward, log_pi, log_reference, alpha, beta),
            "reward": world.reward,
        }
        shown = world.reward.argsort(descending=True, stable=True)[:32]
        logits = self.policy(world.prefixes)
        drawn = world.tree.sample(logits, 20, self.rng.torch)
        shades = world.tree.token_log_probabilities(logits)[drawn].exp()
        shades = nn.functional.pad(shades, (0, 2)).reshape(2, -1)  # two blanks after each string, ten in a line
        words = world.spell(drawn)
        return {
            "strings": Bars(
                title=f"Probability of each string (overlap with the optimum {overlap:.2f})",
                alt="Probability of each string, best rewarded first, under the policy and under the best policy",
                labels=world.spell(shown),
                values={name: law[shown].cpu().numpy() for name, law in laws.items()},
            ),
            "earned": Bars(
                title="What each string earns; with its price, all earn the same at the optimum",
                alt="Reward of each string, without and with the price of its probability",
                labels=world.spell(shown),
                values={name: amount[shown].cpu().numpy() for name, amount in earned.items()},
            ),
            "drawn": Tokens(
                title="Twenty strings that it writes, each letter darker the surer it was",
                alt="Twenty strings that the policy writes, each letter coloured by its probability",
                lines=[list("  ".join([*words[i : i + 10], ""])) for i in (0, 10)],
                values=list(shades.cpu().numpy()),
            ),
        }

    def picture_cartpole(self, world: CartPole) -> dict[str, View]:
        """Draw how likely a push to the right is, by the pole's angle and angular velocity, and the last returns."""
        degrees, speed = torch.linspace(-10, 10, 41), torch.linspace(1, -1, 21)
        states = torch.zeros(21, 41, 4, device=self.device)
        states[..., 2], states[..., 3] = degrees.deg2rad(), speed.unsqueeze(1)
        right = torch.softmax(self.policy(states), dim=-1)[..., 1].cpu().numpy()
        counts = torch.histc(self.returns.cpu(), bins=20, min=0, max=world.most) / len(self.returns)
        return {
            "by_angle": Lines(
                title="Push to the right, by the angle of a pole at rest",
                alt="Probability of a push to the right against the pole's angle, under policy and reference",
                x=degrees.numpy(),
                y={"policy": right[10], "reference": world.reference(states)[10, :, 1].exp().cpu().numpy()},
                x_label="angle, degrees (positive leans right)",
                y_label="probability",
                y_range=(0, 1),
            ),
            "by_angle_and_speed": Heatmap(
                title="Push left (-1) or right (1)",
                alt="Preferred push for each angle of the pole, across, and angular velocity, upwards",
                values=2 * right - 1,
                row_labels=[f"{round(v, 1):g}" if i % 5 == 0 else "" for i, v in enumerate(speed.tolist())],
                column_labels=[f"{round(d):d}" if i % 10 == 0 else "" for i, d in enumerate(degrees.tolist())],
                x_label="angle, degrees",
                y_label="angular velocity, rad/s",
                low=-1.0,
                high=1.0,
                diverging=True,
            ),
            "returns": Histogram(
                title="Returns of the last batch",
                alt="How often each return occurred among the episodes of the last update",
                edges=np.linspace(0, world.most, 21),
                counts={"episodes": counts.numpy()},
                x_label="steps until the pole fell",
            ),
        }


study = Study(
    claim="Entropy keeps every best answer alive, KL leads to the reference's Gibbs policy, and CartPole is learned.",
    learner=Reinforce,
    arms={
        "plain": {"alpha": 0.0},
        "entropy": {"alpha": 0.1},
        "KL": {"alpha": 0.0, "beta": 0.3},
        "CartPole": {"world": "cartpole", "alpha": 0.0},
        "CartPole, KL": {"world": "cartpole", "alpha": 0.0, "beta": 1.0},
    },
    criteria=(
        Criterion(
            "collapse",
            "plain REINFORCE keeps fewer than half of the tied best strings in play",
            plus=("plain", "best_in_play"),
            below=0.5,
        ),
        Criterion(
            "alive",
            "with entropy, at least 95 % of the tied best strings stay in play",
            plus=("entropy", "best_in_play"),
            above=0.95,
        ),
        Criterion(
            "entropy's optimum",
            "with entropy, the policy overlaps with its Gibbs optimum by at least 95 %",
            plus=("entropy", "overlap"),
            above=0.95,
        ),
        Criterion(
            "KL's optimum",
            "with KL, the policy overlaps with its Gibbs optimum by at least 95 %",
            plus=("KL", "overlap"),
            above=0.95,
        ),
        Criterion(
            "CartPole",
            "plain REINFORCE balances the pole for at least 95 % of the time limit (500 steps in the full form)",
            plus=("CartPole", "return_share"),
            above=0.95,
        ),
        Criterion(
            "leash",
            "on CartPole, KL keeps a decision closer to the reference than plain REINFORCE, by 0.1 nats",
            plus=("CartPole", "mean_kl"),
            minus=("CartPole, KL", "mean_kl"),
            above=0.1,
        ),
    ),
    smoke=Budget(seeds=1, settings={"horizon": 20, "batch_size": 4}, steps=5),
    fast=Budget(seeds=2, settings={"horizon": 100}, steps=150),
    full=Budget(seeds=5, settings={"vocabulary": 3, "depth": 4, "best": 27, "horizon": 500}, steps=250),
)
