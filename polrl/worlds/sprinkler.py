"""The sprinkler: a garden whose proxy reward has a bug in one cell that a sensible gardener seldom visits.

A grid of 4 x 4 cells, five moves, slippery ground. The true reward is 1 on four tomato cells. The proxy adds a
bonus on the cell of the sprinkler, where water on the sensor looks like watered tomatoes. The base policy is a
softened gardener who tends the tomatoes, and who has one habit: standing at the sprinkler, it mostly stays.

Beside the garden stands what is measured on occupancy measures, the shares of time in each state and action.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from polrl import ImageGrid
from polrl.worlds.tabular import grid_world

SIDE = 4
TOMATOES = (4, 8, 12, 13)
SPRINKLER = 3
START = 15
DISCOUNT = 0.95
#: How often the base policy, standing at the sprinkler, stays there.
HABIT = 0.92
#: The gardens that seeds choose from: temperature of the base policy, slip. The first is the reference.
GARDENS = ((2.0, 0.1), (1.5, 0.1), (2.5, 0.1), (2.0, 0.05), (2.0, 0.2))
#: Frames of the cells in a picture, as red, green, blue.
_FRAMES = dict.fromkeys(TOMATOES, (0.84, 0.37, 0.0)) | {SPRINKLER: (0.34, 0.71, 0.91)}


@dataclass(frozen=True)
class Sprinkler:
    """One garden.

    Attributes
    ----------
    P : Tensor, [16, 5, 16]
    start : Tensor, [16]
    reward : Tensor, [16, 5]
        The true reward.
    bug : Tensor, [16, 5]
        1 in the sprinkler's cell: the proxy is `reward + bonus * bug`.
    base : Tensor, [16, 5]
        The base policy.
    gamma : float
    """

    P: torch.Tensor
    start: torch.Tensor
    reward: torch.Tensor
    bug: torch.Tensor
    base: torch.Tensor
    gamma: float = DISCOUNT

    def proxy(self, bonus: float) -> torch.Tensor:
        """Return the proxy reward [16, 5]: the true one, and a bonus at the sprinkler."""
        return self.reward + bonus * self.bug

    def pairs(self, state_only: bool = False) -> torch.Tensor:
        """Return every state and action as a row [80, 21]: one of 16, then one of 5; without the action, zeros."""
        state, action = (torch.eye(n, dtype=self.base.dtype, device=self.base.device) for n in self.base.shape)
        actions = torch.zeros_like(action) if state_only else action
        return torch.cat([state.repeat_interleave(len(action), dim=0), actions.repeat(len(state), 1)], dim=1)

    @classmethod
    def make(cls, number: int, device: torch.device | str = "cpu") -> Sprinkler:
        """Make one of the gardens, counted round `GARDENS`; in float64, where the device has it."""
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        P, start, reward, bug, base = (part.to(device, dtype, copy=True) for part in _garden(number % len(GARDENS)))
        return cls(P, start, reward, bug, base)

    def walk(
        self, pi: torch.Tensor, horizon: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Walk episodes that go on with probability gamma after every step: their steps follow the occupancy measure.

        Parameters
        ----------
        pi : Tensor, [N, 16, 5]
            The policy of each episode.
        horizon : int
            Where episodes are cut; a share gamma**horizon of them would have been longer.
        generator : torch.Generator
            On the garden's device.

        Returns
        -------
        (Tensor [horizon, N], Tensor [horizon, N], Tensor [horizon, N])
            States, actions, and whether the episode was still going on; a return needs no further discount.
        """
        episodes = torch.arange(len(pi), device=pi.device)
        chance = torch.rand(3, horizon, len(pi), 1, generator=generator, dtype=pi.dtype, device=pi.device)
        move, drift = (table[..., :-1].cumsum(dim=-1) for table in (pi, self.P))  # a draw: how many sums lie below it
        state = torch.full_like(episodes, START)
        states, actions = [], []
        for for_move, for_drift in zip(chance[0], chance[1], strict=True):
            action = (move[episodes, state] < for_move).sum(dim=-1)
            states.append(state)
            actions.append(action)
            state = (drift[state, action] < for_drift).sum(dim=-1)
        going_on = (chance[2, :-1, :, 0] < self.gamma).cumprod(dim=0).bool()
        return torch.stack(states), torch.stack(actions), torch.cat([torch.ones_like(going_on[:1]), going_on])

    @staticmethod
    def draw(shares: Mapping[str, torch.Tensor], pixels: int = 15) -> ImageGrid:
        """Draw shares of time [16, 5] as gardens side by side, dark where the policy is.

        Darkness goes with the root of the share, so that the base's few visits to the sprinkler can be seen.
        """
        gardens = np.full((len(shares), SIDE * pixels, SIDE * pixels, 3), 0.82)
        for garden, share in zip(gardens, shares.values(), strict=True):
            dark = share.sum(dim=1).clamp(0, 1).sqrt().cpu().numpy()
            for cell in range(SIDE * SIDE):
                row, column = (pixels * place for place in divmod(cell, SIDE))
                square = garden[row : row + pixels, column : column + pixels]
                square[:] = _FRAMES.get(cell, square)
                edge = 2 if cell in _FRAMES else 1
                square[edge:-edge, edge:-edge] = 1 - dark[cell] * (1 - np.array([0.0, 0.18, 0.3]))
        return ImageGrid(
            title="Share of time (red: tomatoes, blue: sprinkler)",
            alt=f"The garden's 4 x 4 cells, darker where more time is spent, under these policies: {', '.join(shares)}",
            images=gardens[None],
            column_labels=tuple(shares),
        )


@functools.cache
def _garden(number: int) -> tuple[torch.Tensor, ...]:
    """Return P, start, reward, bug and base policy of a garden; to be copied before use."""
    temperature, slip = GARDENS[number]
    P = grid_world(SIDE, SIDE, slip)
    cells = torch.eye(len(P), dtype=P.dtype)
    reward, bug = (
        cells[list(where)].sum(dim=0).unsqueeze(1).repeat(1, P.shape[1]) for where in (TOMATOES, (SPRINKLER,))
    )
    base = 0.8 * soft_optimal(P, reward, DISCOUNT, temperature) + 0.2 / P.shape[1]
    base[SPRINKLER] = torch.tensor([0.25 * (1 - HABIT)] * 4 + [HABIT], dtype=P.dtype)
    return P, cells[START], reward, bug, base


def expectation(mu: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """Return J(pi, R) [...], the mean of a reward [*shape] under shares of time [..., *shape].

    It is 1 - gamma times the usual return.
    """
    return (mu * reward).flatten(mu.dim() - reward.dim()).sum(dim=-1)


def deviation(mu: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """Return the standard deviation of a reward [*shape] under one share of time [*shape]."""
    return expectation(mu, (reward - expectation(mu, reward)) ** 2).sqrt()


def ratio(mu: torch.Tensor, mu_b: torch.Tensor) -> torch.Tensor:
    """Return mu / mu_b; infinite where only mu_b is zero, 1 where both are."""
    seen = mu_b > 0
    return torch.where(seen, mu / mu_b.where(seen, 1.0), torch.where(mu > 0, torch.inf, 1.0))


def kl_divergence(mu: torch.Tensor, mu_b: torch.Tensor) -> torch.Tensor:
    """Return KL(mu || mu_b) [...] of shares of time [..., *shape] from others [*shape]."""
    return expectation(torch.xlogy(mu, ratio(mu, mu_b)), torch.ones_like(mu_b))


def soft_optimal(P: torch.Tensor, R: torch.Tensor, gamma: float, temperature: float, sweeps: int = 600) -> torch.Tensor:
    """Return the policy [S, A] that maximises reward plus temperature times entropy, by soft value iteration."""
    value = torch.zeros(len(P), dtype=P.dtype, device=P.device)
    for _ in range(sweeps):
        value = temperature * torch.logsumexp((R + gamma * P @ value) / temperature, dim=1)
    return torch.softmax((R + gamma * P @ value) / temperature, dim=1)
