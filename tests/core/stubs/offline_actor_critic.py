"""A MuJoCo actor-critic on a data set of random behaviour, acting once in its own environment at every step."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import polrl
from polrl import Curve, Learner, Points, knob
from polrl.worlds.control import ControlTask


@functools.lru_cache(maxsize=2)
def random_behaviour(name: str, steps: int) -> tuple[torch.Tensor, ...]:
    """Return observations, actions, rewards and next observations of a uniformly random policy."""
    task, rng, rows = ControlTask(name, seed=0), np.random.default_rng(0), []
    for _ in range(steps):
        before, action = task.observation, rng.uniform(-1, 1, task.env.action_space.shape)
        after, reward, terminated, truncated = task.step(action)
        rows.append((before, action, [reward], after))
        if terminated or truncated:
            task.reset()
    return tuple(torch.tensor(np.array(column), dtype=torch.float32) for column in zip(*rows, strict=True))


class Config(polrl.Config):
    task: str = "Hopper-v5"
    behaviour_cloning: float = knob(1.0, low=0.0, high=10.0, scale="log_zero", smallest=0.01, first=True)
    exploration: float = knob(0.1, low=0.0, high=1.0)
    target_rate: float = knob(0.005, low=1e-4, high=1.0, scale="log")


class OfflineActorCritic(Learner[Config]):
    curves = (Curve(("critic_loss",), "Critic loss"), Curve(("return",), "Return"))
    constants = ("data", "judge")

    def setup(self):
        self.data = [column.to(self.device) for column in random_behaviour(self.config.task, 400)]
        self.task, self.judge = ControlTask(self.config.task, self.config.seed), ControlTask(self.config.task, seed=0)
        d, a = self.data[0].shape[1], self.data[1].shape[1]
        self.actor = nn.Sequential(nn.Linear(d, 16), nn.ReLU(), nn.Linear(16, a), nn.Tanh()).to(self.device)
        self.critic, self.target = (nn.Linear(d + a, 1).to(self.device) for _ in range(2))
        self.target.load_state_dict(self.critic.state_dict())
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=1e-3)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=1e-3)

    def act(self, observation):
        return self.actor(torch.as_tensor(observation, dtype=torch.float32, device=self.device))

    def update(self):
        batch = torch.randint(400, (32,), generator=self.rng.torch, device=self.device)
        s, a, r, s2 = (column[batch] for column in self.data)
        with torch.no_grad():
            goal = r + 0.99 * self.target(torch.cat([s2, self.actor(s2)], 1))
        critic_loss = F.mse_loss(self.critic(torch.cat([s, a], 1)), goal)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        q = self.critic(torch.cat([s, self.actor(s)], 1)).mean()
        actor_loss = self.config.behaviour_cloning * F.mse_loss(self.actor(s), a) - q
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        with torch.no_grad():
            for old, new in zip(self.target.parameters(), self.critic.parameters(), strict=True):
                old.lerp_(new, self.config.target_rate)
            noise = self.config.exploration * self.rng.numpy.standard_normal(a.shape[1])
            action = np.clip(self.act(self.task.observation).cpu().numpy() + noise, -1, 1)
        _, reward, terminated, truncated = self.task.step(action)
        if terminated or truncated:
            self.task.reset()
        return {"critic_loss": critic_loss, "actor_loss": actor_loss, "reward": reward}

    def evaluate(self):
        self.judge.reset(seed=0)
        ended = False
        while not ended:
            _, _, terminated, truncated = self.judge.step(self.act(self.judge.observation).cpu().numpy())
            ended = terminated or truncated
        return {"return": self.judge.episode_return}

    def views(self):
        own, data = (x[:50, :2].cpu().numpy() for x in (self.actor(self.data[0]), self.data[1]))
        return {
            "actions": Points(
                title="Actions", alt="The policy's actions over the data's", groups={"data": data, "policy": own}
            )
        }
