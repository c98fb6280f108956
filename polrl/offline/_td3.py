"""What the chapter's actor-critics share: TD3's networks and critic (E7, E8), the data, and trials of the policy.

Fujimoto, van Hoof and Meger, arXiv 1802.09477. The numbers are those of PRDC's card. A method's own file holds what
it adds, and the whole step.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

import polrl
from polrl import Learner, Metrics, equation, knob
from polrl.core.errors import KnobError
from polrl.models.mlp import MLP
from polrl.offline._trials import load_problem

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class TD3Config(polrl.Config):
    """Settings that all share; the defaults are small, for the line world.

    For a task of its own size, such as "hopper-medium-replay", take the papers' networks:
    `width=256, batch_size=256, discount=0.99`, and the papers' values of the knobs.
    """

    dataset: str = Field("line-diary", description='"line-diary", or an offline data set such as "pendulum-mixed"')
    rows: int = Field(2000, ge=50, le=1_000_000, description="length of the line world's diary")
    width: int = Field(32, ge=1, description="units in each of the two hidden layers")
    batch_size: int = Field(64, ge=1)
    discount: float = Field(0.9, ge=0, lt=1)

    policy_noise: float = knob(
        0.2, low=0.0, high=0.5, symbol=r"\sigma", help="noise on the target's action, in units of the largest action",
        at_low="a sharp critic, easier to exploit", at_high="a smooth critic",
    )  # fmt: skip
    noise_clip: float = knob(
        0.5, low=0.0, high=1.0, symbol="c", help="bound of that noise, in the same unit",
        at_low="no noise", at_high="rare large noise passes",
    )  # fmt: skip
    tau: float = knob(
        0.02, low=1e-3, high=5e-2, scale="log", symbol=r"\tau", paper=0.005, help="how fast the targets follow",
        at_low="slow, steady targets", at_high="fast, noisier targets",
    )  # fmt: skip
    policy_freq: int = knob(
        2, low=1, high=8, help="critic steps for each step of the actor", at_low="more actor steps", at_high="fewer"
    )
    learning_rate: float = knob(
        2e-3, low=1e-5, high=1e-2, scale="log", symbol=r"\eta", paper=3e-4, help="of Adam, for actor and critics",
        at_low="hardly moves", at_high="jumps about",
    )  # fmt: skip


@equation(
    "E7a",
    r"a'=\mathrm{clip}(\bar\pi(s')+\epsilon,-a_{max},a_{max}),\qquad"
    r"\epsilon=\mathrm{clip}(\sigma a_{max}\xi,-c\,a_{max},c\,a_{max}),\ \xi\sim\mathcal N(0,1)",
    source="TD3: target policy smoothing",
)
def smoothed_action(policy_action: Tensor, xi: Tensor, sigma: float, clip: float, a_max: Tensor | float) -> Tensor:
    """Return the target's action [B, da] with clipped noise, from standard normal xi [B, da] and bounds [da]."""
    a_max = torch.as_tensor(a_max, dtype=policy_action.dtype, device=policy_action.device)
    epsilon = (sigma * xi).clamp(-clip, clip) * a_max
    return torch.clamp(policy_action + epsilon, -a_max, a_max)


@equation("E7", r"y=r+\gamma(1-d)\min_i\bar Q_i(s',a')", source="TD3: clipped double Q-learning")
def td_target(reward: Tensor, terminal: Tensor, next_q1: Tensor, next_q2: Tensor, discount: float) -> Tensor:
    """Return the critics' targets, all [B]; a constant for autograd."""
    return (reward + discount * (1 - terminal) * torch.minimum(next_q1, next_q2)).detach()


@equation("E7b", r"L_{critic}=\frac1B\sum_b(Q_1-y)^2+\frac1B\sum_b(Q_2-y)^2", source="TD3")
def critic_loss(q1: Tensor, q2: Tensor, target: Tensor) -> Tensor:
    """Return the scalar loss of both critics, all [B]: a sum of two means."""
    return F.mse_loss(q1, target) + F.mse_loss(q2, target)


@equation("E8", r"\bar\theta\leftarrow\tau\,\theta+(1-\tau)\,\bar\theta", source="TD3")
def polyak(online: Tensor, target: Tensor, tau: float) -> Tensor:
    """Return what a target's weights become."""
    return tau * online.detach() + (1 - tau) * target


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Do E8 on every weight of a network, in place."""
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.copy_(polyak(new, old, tau))


class Actor(nn.Module):
    """A deterministic policy, a_max tanh(MLP).

    Parameters
    ----------
    states, actions, width : int
    a_max : Tensor, [actions]
        Bound of each action.
    """

    a_max: Tensor

    def __init__(self, states: int, actions: int, width: int, a_max: Tensor) -> None:
        super().__init__()
        self.body = MLP([states, width, width, actions], nn.ReLU)
        self.register_buffer("a_max", a_max.clone(), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """Return actions [B, da] for standardised states [B, ds]."""
        return self.a_max * self.body(states).tanh()


class TwinCritic(nn.Module):
    """Two action values with networks of their own."""

    def __init__(self, states: int, actions: int, width: int) -> None:
        super().__init__()
        self.q1, self.q2 = (MLP([states + actions, width, width, 1], nn.ReLU) for _ in range(2))

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return both values, [B] each."""
        pairs = torch.cat([states, actions], dim=1)
        return self.q1(pairs).squeeze(1), self.q2(pairs).squeeze(1)

    def first(self, states: Tensor, actions: Tensor) -> Tensor:
        """Return the first value alone [B]: it leads the actor."""
        values: Tensor = self.q1(torch.cat([states, actions], dim=1)).squeeze(1)
        return values


C = TypeVar("C", bound=TD3Config)


class OfflineActorCritic(Learner[C], Generic[C]):
    """Data, networks and trials; a method adds `update()`.

    Attributes
    ----------
    data : OfflineData
        With standardised states, (s - mean) / divisor.
    actor, critic, actor_target, critic_target : nn.Module
    """

    constants: ClassVar[tuple[str, ...]] = ("data", "mean", "divisor", "a_max", "trial")

    def setup(self) -> None:
        config = self.config
        raw, self.trial = load_problem(config.dataset, config.rows, config.seed, self.device)
        if config.batch_size > len(raw):
            most = f"the number of transitions, {len(raw)}"
            raise KnobError(f"batch_size must be at most {most}, got {config.batch_size}")
        self.data, self.mean, self.divisor = raw.standardized()
        self.a_max = raw.action_high
        ds, da = raw.observations.shape[1], raw.actions.shape[1]
        self.actor = Actor(ds, da, config.width, self.a_max).to(self.device)
        self.critic = TwinCritic(ds, da, config.width).to(self.device)
        self.actor_target, self.critic_target = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), fused=True)

    def batch(self) -> tuple[Tensor, Batch]:
        """Return the rows [B] of a random batch, and its s, a, r, s', d."""
        data = self.data
        rows = torch.randint(len(data), (self.config.batch_size,), generator=self.rng.torch, device=self.device)
        columns = (data.observations, data.actions, data.rewards, data.next_observations, data.terminals)
        s, a, r, s2, d = (column[rows] for column in columns)
        return rows, (s, a, r, s2, d)

    def descend(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        """Let Adam take one step of the weights that it holds; no other weight gets a gradient."""
        group = optimizer.param_groups[0]
        group["lr"] = self.config.learning_rate
        optimizer.zero_grad()
        loss.backward(inputs=group["params"])
        optimizer.step()

    def act(self, observations: Tensor) -> Tensor:
        """Return the policy's actions [n, da] for observations [n, ds] in the task's own units."""
        actions: Tensor = self.actor((observations - self.mean) / self.divisor)
        return actions

    def value(self, observations: Tensor) -> Tensor:
        """Return Q_1(s, pi(s)) [n] for observations in the task's own units."""
        return self.critic.first((observations - self.mean) / self.divisor, self.act(observations))

    def evaluate(self) -> Metrics:
        """Try the policy in the task, and compare what the critic promised with what came."""
        trial = self.trial.play(self.act, self.config.discount)
        promised = self.value(trial.starts)
        return {**trial.scores, "overestimation": (promised - trial.discounted).mean(), "promised": promised.mean()}
