"""Finite Markov decision processes with a discount: exact values, visits, and small ones to try things on.

Everywhere P [S, A, S] holds transition probabilities, R [S, A] expected rewards, pi [S, A] a policy whose rows
sum to one, and 0 <= gamma < 1. All functions are differentiable and keep their arguments' dtype.
"""

from __future__ import annotations

import torch


def policy_transitions(P: torch.Tensor, pi: torch.Tensor) -> torch.Tensor:
    """Return the matrix [S, S] of state transitions under a policy."""
    return torch.einsum("sa,sat->st", pi, P)


def policy_value(P: torch.Tensor, R: torch.Tensor, pi: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the value [S] of a policy, solving V = r_pi + gamma P_pi V."""
    eye = torch.eye(len(P), dtype=P.dtype, device=P.device)
    return torch.linalg.solve(eye - gamma * policy_transitions(P, pi), (pi * R).sum(dim=1))


def discounted_visits(P: torch.Tensor, pi: torch.Tensor, start: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return how often each state [S] is visited, discounted: the sum over t of gamma^t Pr(s_t = s).

    The start distribution [S] sums to one, the visits to 1 / (1 - gamma).
    """
    eye = torch.eye(len(P), dtype=P.dtype, device=P.device)
    return torch.linalg.solve(eye - gamma * policy_transitions(P, pi).T, start)


def random_mdp(
    states: int, actions: int, generator: torch.Generator, *, concentration: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw P [S, A, S] with Dirichlet rows and R [S, A] uniform in [0, 1], in float64."""
    shape = torch.full((states, actions, states), concentration, dtype=torch.float64, device=generator.device)
    P = torch._standard_gamma(shape, generator=generator)
    R = torch.rand(states, actions, dtype=torch.float64, generator=generator, device=generator.device)
    return P / P.sum(dim=-1, keepdim=True), R


#: The moves of a grid world in the order of its actions.
MOVES = ("up", "right", "down", "left", "stay")


def grid_world(rows: int, columns: int, slip: float = 0.0) -> torch.Tensor:
    """Return P [rows * columns, 5, rows * columns] of a grid with walls around it, in float64.

    States count row by row; the actions are `MOVES`. A move into a wall stays. With probability `slip` the move
    is replaced by one drawn uniformly from all five.

    Raises
    ------
    ValueError
        If slip is not from 0 to 1.
    """
    if not 0 <= slip <= 1:
        raise ValueError(f"slip must be from 0 to 1, got {slip!r}")
    steps = ((-1, 0), (0, 1), (1, 0), (0, -1), (0, 0))
    sure = torch.zeros(rows * columns, len(steps), rows * columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            for action, (down, right) in enumerate(steps):
                to_row = min(max(row + down, 0), rows - 1)
                to_column = min(max(column + right, 0), columns - 1)
                sure[row * columns + column, action, to_row * columns + to_column] = 1.0
    return (1 - slip) * sure + slip * sure.mean(dim=1, keepdim=True)
