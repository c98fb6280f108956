r"""TD3+BC: a minimalist approach to offline reinforcement learning, the baseline that this chapter's methods change.

A policy shall be learned from transitions that somebody else recorded, without trying anything. A critic that is asked
about actions far from the data guesses, some guesses are too high, and the actor runs to the highest: in the data
nothing contradicts it. TD3+BC adds one term to TD3's actor loss, which pulls the action at each state to the action
that was logged there. The strength `alpha` sits on the Q term, divided by the mean size of Q, so that it means the
same in every task: at 0 the policy clones the data, at a high alpha it is TD3. The price: where the logged action is
bad, only a strong critic may say so, and then it may say so everywhere.

Fujimoto and Gu, arXiv 2106.06860. There is no card; the equations bear the numbers of PRDC's card, with which they
share all but one: E5, E6, and in `_td3.py` the critic (E7) and the targets (E8). E4 is the term that PRDC changes.
E1 to E3, PRDC's distance, have no counterpart here. States are standardised as in the paper.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from polrl import Budget, Criterion, Curve, Histogram, Metrics, Study, View, equation, knob
from polrl.offline._td3 import OfflineActorCritic, TD3Config, critic_loss, follow, smoothed_action, td_target
from polrl.offline._views import policy_picture, values_picture


class Config(TD3Config):
    """Settings: those of TD3, and how much the critic counts beside the data."""

    alpha: float = knob(
        2.5, low=0.0, high=50.0, scale="log_zero", smallest=0.01, symbol=r"\alpha", first=True,
        help="strength of the critic beside the cloning", at_low="clones the logged actions",
        at_high="plain TD3: overestimates",
    )  # fmt: skip


@equation("E4", r"L_{BC}=\frac1{B\,d_a}\sum_b\|\pi(s_b)-a_b\|^2", source="Eq. 3")
def cloning_loss(policy_action: Tensor, logged_action: Tensor) -> Tensor:
    """Return the mean squared distance from the logged actions, both [B, da]: over batch and dimensions."""
    return F.mse_loss(policy_action, logged_action.detach())


@equation(
    "E5",
    r"L_Q=-\lambda\,\frac1B\sum_bQ_1(s_b,\pi(s_b)),\qquad"
    r"\lambda=\frac{\alpha}{\frac1B\sum_b|Q_1(s_b,\pi(s_b))|}\ \text{(a constant)}",
    source="Eqs. 3 and 5",
)
def scaled_improvement(q: Tensor, alpha: float) -> Tensor:
    """Return the scalar loss of the actor from its values Q_1(s, pi(s)) [B]; the scale of Q cancels."""
    scale = alpha / q.abs().mean().detach()
    return -scale * q.mean()


@equation("E6", r"L_{actor}=L_Q+L_{BC}", source="Eq. 3")
def actor_loss(q: Tensor, policy_action: Tensor, logged_action: Tensor, alpha: float) -> Tensor:
    """Return the actor's scalar loss."""
    return scaled_improvement(q, alpha) + cloning_loss(policy_action, logged_action)


class TD3BC(OfflineActorCritic[Config]):
    """TD3 on recorded transitions, pulled to the logged actions; a step is one of the critics'."""

    evaluate_every = 100
    curves = (
        Curve(("score",), "Score of the policy"),
        Curve(("overestimation",), "Promise less return", "discounted return"),
        Curve(("cloning",), "Distance from the data, squared"),
        Curve(("critic_loss",), "Critic loss", log=True),
    )

    def update(self) -> Metrics:
        config = self.config
        alpha, tau = config.alpha, config.tau
        _, (s, a, r, s2, d) = self.batch()
        with torch.no_grad():
            xi = torch.randn(a.shape, generator=self.rng.torch, device=self.device)
            a2 = smoothed_action(self.actor_target(s2), xi, config.policy_noise, config.noise_clip, self.a_max)
            next_q1, next_q2 = self.critic_target(s2, a2)
            y = td_target(r, d, next_q1, next_q2, config.discount)
        q1, q2 = self.critic(s, a)
        loss = critic_loss(q1, q2, y)
        self.descend(self.critic_optimizer, loss)
        if (self.step + 1) % config.policy_freq:
            return {"critic_loss": loss}

        policy_action = self.actor(s)
        q = self.critic.first(s, policy_action)
        self.descend(self.actor_optimizer, actor_loss(q, policy_action, a, alpha))
        follow(self.critic_target, self.critic, tau)
        follow(self.actor_target, self.actor, tau)
        return {"critic_loss": loss, "cloning": cloning_loss(policy_action, a), "mean_q": q.mean()}

    def views(self) -> dict[str, View]:
        data, a_max = self.data, self.a_max
        rows = torch.arange(0, len(data), max(1, len(data) // 500), device=self.device)
        s, a = data.observations[rows], data.actions[rows]
        gaps = ((self.actor(s) - a) / a_max).norm(dim=1)
        edges = np.linspace(0, 2 * a.shape[1] ** 0.5, 31)
        counts = np.histogram(gaps.cpu().numpy(), edges)[0] / len(rows)
        return {
            "policy": policy_picture(self),
            "values": values_picture(self),
            "gaps": Histogram(
                title="Distance of the policy's action from the logged one",
                alt="How often the policy's action is how far from the action logged at the same state",
                edges=edges,
                counts={"data states": counts},
                x_label="distance, in units of the largest action",
            ),
        }


_PENDULUM = {"dataset": "pendulum-mixed", "width": 64, "batch_size": 128, "discount": 0.97, "learning_rate": 1e-3}

study = Study(
    claim="A critic beside the cloning does better than the data's own actions; left alone it promises too much.",
    learner=TD3BC,
    arms={
        "line, cloning": {"alpha": 0.0},
        "line, TD3+BC": {"alpha": 2.5},
        "line, almost TD3": {"alpha": 50.0},
        "pendulum, cloning": {**_PENDULUM, "alpha": 0.0},
        "pendulum, TD3+BC": {**_PENDULUM, "alpha": 2.5},
        "pendulum, almost TD3": {**_PENDULUM, "alpha": 50.0},
    },
    criteria=(
        Criterion("improves", "in the line world, alpha 2.5 is ahead of cloning by more than 30 points",
                  ("line, TD3+BC", "score"), ("line, cloning", "score"), above=30.0),
        Criterion("promises", "there, almost TD3 promises more beyond what comes than alpha 2.5",
                  ("line, almost TD3", "overestimation"), ("line, TD3+BC", "overestimation")),
        Criterion("improves, pendulum", "on Pendulum's mixed data, alpha 2.5 is ahead of cloning by more than 5 points",
                  ("pendulum, TD3+BC", "score"), ("pendulum, cloning", "score"), above=5.0),
        Criterion("needs the data, pendulum", "there, alpha 2.5 is ahead of almost TD3",
                  ("pendulum, TD3+BC", "score"), ("pendulum, almost TD3", "score")),
    ),
    smoke=Budget(seeds=1, steps=6, settings={"rows": 200}, arms=("line, cloning", "line, TD3+BC")),
    fast=Budget(seeds=2, steps=800, arms=("line, cloning", "line, TD3+BC", "line, almost TD3")),
    full=Budget(seeds=5, steps=3000),
)  # fmt: skip
