"""A small denoiser whose sampling chain is trained by policy gradient with a pull to the pretrained one."""

from __future__ import annotations

import copy
import itertools
from typing import Literal

import torch
from torch import nn

import polrl
from polrl import Curve, Learner, Points, knob, sample_normal


class Config(polrl.Config):
    chain: int = 5
    pull: float = knob(0.1, low=0.0, high=10.0, scale="log_zero", smallest=0.01, first=True)
    noise: float = knob(0.3, low=0.05, high=1.0)
    reduction: Literal["mean", "sum"] = knob("mean")


class DiffusionChain(Learner[Config]):
    curves = (Curve(("reward",), "Reward"), Curve(("kl",), "KL to the pretrained chain"))

    def setup(self):
        self.net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2)).to(self.device)
        self.pretrained = copy.deepcopy(self.net).requires_grad_(False)
        self.networks = {"own": self.net, "pretrained": self.pretrained}
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-2)
        self.baseline = 0.0

    def mean(self, name, x, step):
        time = torch.full_like(x[:, :1], step / self.config.chain)
        return x + self.networks[name](torch.cat([x, time], 1))

    def chain(self, batch):
        x = torch.randn(batch, 2, generator=self.rng.torch, device=self.device)
        path = [x]
        for step in range(self.config.chain):
            x = sample_normal(self.mean("own", x, step), self.config.noise, self.rng.torch)
            path.append(x)
        return path

    def update(self):
        with torch.no_grad():
            path = self.chain(32)
        reward = -(path[-1].norm(dim=1) - 2).abs()
        log_probability, kl = torch.zeros_like(reward), torch.zeros_like(reward)
        for step, (x, after) in enumerate(itertools.pairwise(path)):
            own, start = self.mean("own", x, step), self.mean("pretrained", x, step)
            log_probability = log_probability - (after - own).square().sum(1) / (2 * self.config.noise**2)
            kl = kl + (own - start).square().sum(1) / (2 * self.config.noise**2)
        terms = -(reward - self.baseline) * log_probability + self.config.pull * kl
        loss = terms.mean() if self.config.reduction == "mean" else terms.sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.baseline = 0.9 * self.baseline + 0.1 * reward.mean()
        return {"reward": reward.mean(), "kl": kl.mean()}

    def evaluate(self):
        return {"radius": self.chain(64)[-1].norm(dim=1).mean()}

    def views(self):
        return {
            "cloud": Points(
                title="Samples", alt="Samples from fixed noise", groups={"samples": self.chain(64)[-1].cpu()}
            )
        }
