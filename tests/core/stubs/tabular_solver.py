"""An exact solver: soft value iteration in a random MDP, in float64, with warm start."""

from __future__ import annotations

import torch

import polrl
from polrl import Curve, Heatmap, Learner, knob


class Config(polrl.Config):
    states: int = 6
    temperature: float = knob(0.1, low=0.0, high=5.0, scale="log_zero", smallest=0.01, first=True)
    discount: float = knob(0.9, low=0.5, high=0.99, scale="log_one_minus")
    backups: int = knob(1, low=1, high="states")


class TabularSolver(Learner[Config]):
    curves = (Curve(("residual",), "Bellman residual", log=True), Curve(("value",), "Value of the start"))
    constants = ("reward", "transition")

    def setup(self):
        n, make = self.config.states, torch.Generator().manual_seed(self.config.seed)
        transition = torch.rand(n, 3, n, generator=make, dtype=torch.float64)
        self.transition = (transition / transition.sum(-1, keepdim=True)).to(self.device)
        self.reward = torch.rand(n, 3, generator=make, dtype=torch.float64).to(self.device)
        self.value = torch.zeros(n, dtype=torch.float64, device=self.device)

    def q(self):
        return self.reward + self.config.discount * self.transition @ self.value

    def update(self):
        old, tau = self.value, self.config.temperature
        for _ in range(self.config.backups):
            q = self.q()
            self.value = tau * torch.logsumexp(q / tau, dim=1) if tau > 0 else q.amax(dim=1)
        return {"residual": (self.value - old).abs().max(), "value": self.value[0]}

    def views(self):
        policy = torch.softmax(self.q() / max(self.config.temperature, 1e-6), dim=1)
        return {"policy": Heatmap(title="Policy", alt="Probability of each action in each state", values=policy.cpu())}
