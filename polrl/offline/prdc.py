r"""Policy Regularization with Dataset Constraint (PRDC): stay near some logged pair, not near the action logged here.

Offline, a critic that is asked about actions far from the data guesses, mostly too high, and the actor runs to the
error. The usual cure pulls the policy's action to the one that was logged at the same state. If that action is bad,
the cure forbids improving, even where a good action was logged at a state next to it. PRDC asks instead how far the
pair (s, pi(s)) is from the nearest logged pair, in a joint space in which states count `beta` times, and pulls pi(s) to
that neighbour's action. A large beta makes the neighbour the same state: TD3+BC, exactly. A small one lets any logged
action that is like pi(s) do: only the set of actions is left. In between, good actions spread to neighbouring states.

Ran, Li, Zhang, Zhang and Yu, ICML 2023, arXiv 2306.06569, and the official code, LAMDA-RL/PRDC. E1 to E6 are below;
E7, TD3's critic, and E8, its slow targets, are not of this paper and shared by the chapter: they stand in `_td3.py`.
E3 is the regulariser as it is stated; what the code minimises, and what is built, is E4: squared, averaged over the
dimensions too, and without the states' share, which has no gradient while the neighbour is held. The official code
builds a KD-tree with beta in it; here `worlds/neighbours.py` finds the same rows while beta moves.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from polrl import Budget, Criterion, Curve, Histogram, Lines, Metrics, Study, View, equation, knob
from polrl.offline._td3 import OfflineActorCritic, TD3Config, critic_loss, follow, smoothed_action, td_target
from polrl.offline._trials import LineTrial
from polrl.offline._views import policy_picture, shown_states, values_picture
from polrl.offline.td3_bc import TD3BC
from polrl.worlds.neighbours import NearestPairs


class Config(TD3Config):
    """Settings: those of TD3, and the constraint's. Names of the official code; its beta is 2 or 7.5 by task."""

    beta: float = knob(
        2.0, low=0.05, high=5000.0, scale="log", symbol=r"\beta", first=True,
        help="weight of the states beside the actions in the distance of two pairs",
        at_low="states ignored: any logged action will do", at_high="the action logged at this very state: TD3+BC",
    )  # fmt: skip
    alpha: float = knob(
        0.5, low=0.05, high=50.0, scale="log", symbol=r"\alpha", paper=2.5,
        help="strength of the critic beside the constraint", at_low="clones the neighbours",
        at_high="constraint negligible: overestimates",
    )  # fmt: skip
    k: int = knob(
        1, low=1, high=20, symbol="k", help="which neighbour is taken, the k-th nearest",
        at_low="the nearest pair", at_high="a further pair: smoother, blurrier",
    )  # fmt: skip


@equation(
    "E1",
    r"d_D^\beta(s,a)=\min_{(\hat s,\hat a)\in D}\big\|(\beta s)\oplus a-(\beta\hat s)\oplus\hat a\big\|_2",
    source="definition; prdc.py",
)
def distance_to_data(states: Tensor, actions: Tensor, data_states: Tensor, data_actions: Tensor, beta: float) -> Tensor:
    """Return the distance [B] of pairs (s, a), [B, ds] and [B, da], from the set of logged pairs, [N, ds] and [N, da].

    Sees every logged pair for every query: for small sets.
    """
    to_state = beta * (states.unsqueeze(1) - data_states)
    to_action = actions.unsqueeze(1) - data_actions
    return torch.cat([to_state, to_action], dim=2).norm(dim=2).min(dim=1).values


@equation(
    "E2",
    r"j^*(s)=\arg\min_j\ \beta^2\|s-s_j\|^2+\|\pi(s)-a_j\|^2",
    source="prdc.py: the KD-tree's query",
)
def nearest_index(
    states: Tensor, policy_actions: Tensor, data_states: Tensor, data_actions: Tensor, beta: float, k: int = 1
) -> Tensor:
    """Return the index of the k-th nearest logged pair, int64 [B]; `NearestPairs` finds the same in large sets."""
    if not 1 <= k <= len(data_states):
        raise ValueError(f"k must be from 1 to the number of logged pairs, {len(data_states)}, got {k!r}")
    to_state = (states.unsqueeze(1) - data_states).pow(2).sum(dim=2)
    to_action = (policy_actions.unsqueeze(1) - data_actions).pow(2).sum(dim=2)
    return (beta**2 * to_state + to_action).argsort(dim=1, stable=True)[:, k - 1]


@equation("E3", r"\mathbb E_s\big[d_D^\beta(s,\pi(s))\big]", source="objective")
def ideal_constraint(distances: Tensor) -> Tensor:
    """Return the regulariser as the paper states it, from distances (E1) [B]."""
    return distances.mean()


@equation(
    "E4", r"L_{DC}=\frac1{B\,d_a}\sum_b\big\|\pi(s_b)-a_{j^*(s_b)}\big\|^2", source="prdc.py: mse(pi, nearest action)"
)
def dataset_constraint(policy_action: Tensor, nearest_action: Tensor) -> Tensor:
    """Return the mean squared distance from the neighbours' actions, both [B, da]: over batch and dimensions.

    The neighbour's action is a constant for autograd.
    """
    return F.mse_loss(policy_action, nearest_action.detach())


@equation(
    "E5",
    r"L_Q=-\lambda\,\frac1B\sum_bQ_1(s_b,\pi(s_b)),\qquad"
    r"\lambda=\frac{\alpha}{\frac1B\sum_b|Q_1(s_b,\pi(s_b))|}\ \text{(a constant)}",
    source="prdc.py, as in TD3+BC",
)
def scaled_improvement(q: Tensor, alpha: float) -> Tensor:
    """Return the scalar loss of the actor from its values Q_1(s, pi(s)) [B]; the scale of Q cancels."""
    scale = alpha / q.abs().mean().detach()
    return -scale * q.mean()


@equation("E6", r"L_{actor}=L_Q+L_{DC}", source="prdc.py")
def actor_loss(q: Tensor, policy_action: Tensor, nearest_action: Tensor, alpha: float) -> Tensor:
    """Return the actor's scalar loss."""
    return scaled_improvement(q, alpha) + dataset_constraint(policy_action, nearest_action)


class PRDC(OfflineActorCritic[Config]):
    """TD3 on recorded transitions, pulled to the nearest logged pair; a step is one of the critics'."""

    constants = (*OfflineActorCritic.constants, "pairs")
    evaluate_every = 100
    curves = (
        Curve(("score",), "Score of the policy"),
        Curve(("distance", "own_row"), "Distance, share of own rows"),
        Curve(("overestimation",), "Promise less return", "discounted return"),
        Curve(("critic_loss",), "Critic loss", log=True),
    )

    def setup(self) -> None:
        super().setup()
        self.pairs = NearestPairs(self.data.observations, self.data.actions)

    def update(self) -> Metrics:
        config = self.config
        beta, alpha, k, tau = config.beta, config.alpha, config.k, config.tau
        rows, (s, a, r, s2, d) = self.batch()
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
        neighbour = self.pairs.query(s, policy_action, beta, k)
        nearest_action = self.data.actions[neighbour]
        q = self.critic.first(s, policy_action)
        self.descend(self.actor_optimizer, actor_loss(q, policy_action, nearest_action, alpha))
        follow(self.critic_target, self.critic, tau)
        follow(self.actor_target, self.actor, tau)
        return {
            "critic_loss": loss,
            "constraint": dataset_constraint(policy_action, nearest_action),
            "own_row": (neighbour == rows).float().mean(),
            "mean_q": q.mean(),
        }

    def gaps(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return how far the nearest pair is, in state and in action, [n] each, and its action [n, da].

        Observations [n, ds] are in the task's own units, the states' gap is in standardised ones.
        """
        s, action = (observations - self.mean) / self.divisor, self.act(observations)
        nearest = self.pairs.query(s, action, self.config.beta, self.config.k)
        found = self.data.actions[nearest]
        return (s - self.data.observations[nearest]).norm(dim=1), (action - found).norm(dim=1), found

    def evaluate(self) -> Metrics:
        """Try the policy, ask how far it is from the data (E3), and how much the critic promises too much."""
        state_gap, action_gap, _ = self.gaps(shown_states(self))
        distance = ideal_constraint(torch.hypot(self.config.beta * state_gap, action_gap))
        return {**super().evaluate(), "distance": distance}

    def views(self) -> dict[str, View]:
        seen = shown_states(self)
        state_gap, action_gap, found = self.gaps(seen)
        pictures = {"policy": policy_picture(self, found, "its neighbours"), "values": values_picture(self)}
        named = {"to the neighbour's state": state_gap, "to its action": action_gap}
        if isinstance(self.trial, LineTrial):
            pictures["gaps"] = Lines(
                title="How far the nearest pair is",
                alt="At every place the distance from the neighbour's state and from its action",
                x=seen[:, 0].cpu().numpy(),
                y={name: gap.cpu().numpy() for name, gap in named.items()},
                x_label="place on the line",
                y_label="distance (states standardised)",
                y_range=(0, 2),
            )
        else:
            edges = np.linspace(0, 3, 31)
            pictures["gaps"] = Histogram(
                title="How far the nearest pair is",
                alt="How often the neighbour's state, and its action, are how far away, at states of the data",
                edges=edges,
                counts={n: np.histogram(gap.cpu().numpy(), edges)[0] / len(seen) for n, gap in named.items()},
                x_label="distance (states standardised)",
            )
        return pictures


_ALPHAS = (0.1, 0.5, 2.5)
_BETAS = {0.1: (0.05, 2.0, 5000.0), 0.5: (0.05, 0.2, 2.0, 50.0, 500.0, 5000.0), 2.5: (0.05, 2.0, 5000.0)}


def _arm(beta: float, alpha: float) -> str:
    return f"PRDC, beta {beta:g}, alpha {alpha:g}"


study = Study(
    claim="Where most logged actions are bad, the nearest pair's action lets the policy improve; cloning forbids it.",
    learner=PRDC,
    arms={
        **{_arm(beta, alpha): {"beta": beta, "alpha": alpha} for alpha in _ALPHAS for beta in _BETAS[alpha]},
        **{f"TD3+BC, alpha {alpha:g}": {"learner": TD3BC, "alpha": alpha} for alpha in _ALPHAS},
        "almost TD3": {"learner": TD3BC, "alpha": 50.0},
    },
    criteria=(
        Criterion("neighbours", "at alpha 0.5, PRDC with beta 2 reaches the goal from more than 90 % of the starts",
                  (_arm(2, 0.5), "score"), above=90.0),
        Criterion("cloning", "at the same alpha TD3+BC reaches it from fewer than 20 %",
                  ("TD3+BC, alpha 0.5", "score"), below=20.0),
        Criterion("difference", "PRDC is ahead of TD3+BC by more than 50 percentage points",
                  (_arm(2, 0.5), "score"), ("TD3+BC, alpha 0.5", "score"), above=50.0),
        Criterion("plateau", "with beta 50, twenty-five times as much, it is still above 90 %",
                  (_arm(50, 0.5), "score"), above=90.0),
        Criterion("limit", "with beta 5000 it falls below 20 %, as TD3+BC",
                  (_arm(5000, 0.5), "score"), below=20.0),
        Criterion("near the data", "PRDC's critic promises less too much than that of almost TD3",
                  ("almost TD3", "overestimation"), (_arm(2, 0.5), "overestimation")),
    ),
    smoke=Budget(seeds=1, steps=6, settings={"rows": 200}, arms=(_arm(2, 0.5), "TD3+BC, alpha 0.5")),
    fast=Budget(
        seeds=2,
        steps=800,
        arms=(_arm(2, 0.5), _arm(50, 0.5), _arm(5000, 0.5), "TD3+BC, alpha 0.5", "almost TD3"),
    ),
    full=Budget(seeds=5, steps=1500),
)  # fmt: skip
