"""The two worlds of `reinforce`: strings of letters, and CartPole, played through one interface.

A world makes a policy that fits (a module from states to logits), plays whole episodes with it, and has a reference
policy. Nothing is carried from one call of `play` to the next, so a world never changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from torch import nn

from polrl.core.errors import KnobError
from polrl.core.sampling import Generators
from polrl.models.mlp import MLP
from polrl.worlds.token_tree import TokenTree

MOST_STRINGS = 4096


@dataclass
class Episodes:
    """N episodes of up to T decisions.

    Attributes
    ----------
    states : Tensor, int64 [N, T] or float [N, T, d]
    actions : Tensor, int64 [N, T]
    rewards : Tensor, float [N, T]
    alive : Tensor, float [N, T]
        1 for decisions that were taken, 0 after an episode's end.
    """

    states: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    alive: torch.Tensor


class Strings:
    """A token tree with a reward for each whole string: a state is a prefix, an action the next letter.

    Parameters
    ----------
    vocabulary, depth : int
        Letters, and letters of a string; a depth of 1 makes a bandit.
    best : int
        Strings, drawn at random, that earn 1; the others earn from 0 to 0.8.
    skew : float
        Standard deviation of the logits of the reference.
    rng : Generators
        Draws rewards and reference, on the CPU, so that they are the same on every device.

    Attributes
    ----------
    most : float
        What an episode can earn.
    reward : Tensor, [M]
        By string, in the order of `tree.strings`.
    reference_table : Tensor, [prefixes, vocabulary]
        The reference's log-probabilities.
    """

    most = 1.0

    def __init__(
        self, vocabulary: int, depth: int, best: int, skew: float, rng: Generators, device: torch.device
    ) -> None:
        count = vocabulary**depth
        if count > MOST_STRINGS:
            raise KnobError(f"vocabulary ** depth must be at most {MOST_STRINGS} strings, got {count}")
        if best > count:
            raise KnobError(f"best must be at most the number of strings, {count}, got {best}")
        self.tree = TokenTree(vocabulary, depth, device)
        self.prefixes = torch.arange(self.tree.prefixes, device=device)
        reward = 0.8 * torch.rand(count, generator=rng.cpu)
        reward[torch.randperm(count, generator=rng.cpu)[:best]] = 1.0
        logits = skew * torch.randn(self.tree.prefixes, vocabulary, generator=rng.cpu)
        self.reward = reward.to(device)
        self.reference_table = torch.log_softmax(logits, dim=-1).to(device)

    def new_policy(self) -> nn.Module:
        """Return a row of logits for each prefix, all zero: every string is equally likely."""
        return nn.Embedding.from_pretrained(torch.zeros(self.tree.prefixes, self.tree.vocabulary), freeze=False)

    def reference(self, states: torch.Tensor) -> torch.Tensor:
        """Return the reference's log-probabilities [..., vocabulary] after prefixes [...]."""
        return self.reference_table[states]

    def play(self, policy: nn.Module, count: int, rng: Generators) -> Episodes:
        """Write strings; the last letter brings the reward."""
        number = self.tree.sample(policy(self.prefixes), count, rng.torch)
        rewards = torch.zeros(count, self.tree.depth, device=number.device)
        rewards[:, -1] = self.reward[number]
        return Episodes(self.tree.nodes[number], self.tree.strings[number], rewards, torch.ones_like(rewards))

    def spell(self, numbers: torch.Tensor) -> list[str]:
        """Return strings by number, in letters."""
        return ["".join("abcdefghij"[token] for token in row) for row in self.tree.strings[numbers].tolist()]


class CartPole:
    """CartPole-v1, many episodes at once; each step until the pole falls earns 1.

    Parameters
    ----------
    horizon : int
        Time limit of an episode; CartPole-v1's own is 500.
    width : int
        Hidden units of the policy.
    """

    def __init__(self, horizon: int, width: int, device: torch.device) -> None:
        self.horizon, self.width, self.device = horizon, width, device
        self.most = float(horizon)

    def new_policy(self) -> nn.Module:
        """Return a small network that begins near a coin flip."""
        return MLP([4, self.width, 2], last_scale=0.1)

    def reference(self, states: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities [..., 2], left and right, of a mediocre policy that looks at the angle alone."""
        lean = 5 * states[..., 2]
        return torch.log_softmax(torch.stack([-lean, lean], dim=-1), dim=-1)

    @torch.no_grad()
    def play(self, policy: nn.Module, count: int, rng: Generators) -> Episodes:
        """Balance until the last pole has fallen or the time is up."""
        env = CartPoleVectorEnv(count, max_episode_steps=self.horizon)
        seen, _ = env.reset(seed=int(rng.numpy.integers(2**31)))
        luck = torch.rand(self.horizon, count, generator=rng.torch, device=self.device)
        alive = np.ones(count, dtype=bool)
        states: list[torch.Tensor] = []
        actions: list[torch.Tensor] = []
        lives: list[np.ndarray] = []
        while alive.any():
            states.append(torch.as_tensor(seen, device=self.device))
            right = torch.softmax(policy(states[-1]), dim=-1)[:, 1]
            actions.append((luck[len(lives)] < right).long())
            lives.append(alive)
            seen, _, fallen, timed_out, _ = env.step(actions[-1].cpu().numpy())
            alive = alive & ~(fallen | timed_out)
        rewards = torch.as_tensor(np.stack(lives, axis=1), dtype=torch.float32, device=self.device)
        return Episodes(torch.stack(states, dim=1), torch.stack(actions, dim=1), rewards, rewards)
