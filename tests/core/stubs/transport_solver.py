"""Quadratically regularized transport in its semi-dual, by scipy's L-BFGS with warm start: no torch in the state."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize

import polrl
from polrl import Curve, Heatmap, Learner, knob


class Config(polrl.Config):
    size: int = 8
    strength: float = knob(0.5, low=0.01, high=10.0, scale="log", first=True)
    iterations: int = knob(3, low=1, high=9, odd=True)
    cost: str = "squared"
    tilt: float = knob(0.0, low=-2.0, high=2.0, scale="signed_log", smallest=0.1)


class TransportSolver(Learner[Config]):
    curves = (Curve(("dual",), "Dual value"), Curve(("marginal_error",), "Marginal error", log=True))

    def setup(self):
        make = np.random.default_rng(self.config.seed)
        x, y = make.normal(size=(2, self.config.size, 2))
        self.cost = ((x[:, None] - y[None]) ** 2).sum(-1)
        self.mass = np.full(self.config.size, 1 / self.config.size)
        self.potential = np.zeros(2 * self.config.size)
        self.solved = []

    def plan(self):
        f, g = np.split(self.potential, 2)
        slack = f[:, None] + g[None] - self.cost - self.config.tilt * self.cost.mean()
        return np.maximum(slack, 0) / self.config.strength

    def update(self):
        n, strength = self.config.size, self.config.strength
        shift = self.config.tilt * self.cost.mean()

        def negative_dual(potential):
            f, g = potential[:n], potential[n:]
            slack = np.maximum(f[:, None] + g[None] - self.cost - shift, 0)
            value = self.mass @ (f + g) - (slack**2).sum() / (2 * strength)
            plan = slack / strength
            return -value, -np.concatenate([self.mass - plan.sum(1), self.mass - plan.sum(0)])

        options = {"maxiter": self.config.iterations}
        found = minimize(negative_dual, self.potential, jac=True, method="L-BFGS-B", options=options)
        self.potential = found.x
        self.solved = [*self.solved[-3:], {"calls": int(found.nfev), "value": np.float64(-found.fun)}]
        return {"dual": -found.fun, "marginal_error": np.abs(self.plan().sum(1) - self.mass).max() + 1e-16}

    def views(self):
        return {"plan": Heatmap(title="Plan", alt="Mass moved from each source to each target", values=self.plan())}
