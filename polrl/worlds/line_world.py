"""Line world with a bad diary: one state, one action, a goal at one end, and a data set that mostly walks away from it.

A walker stands at x in [0, 10] and moves by a in [-1, 1]. From 9 on it has arrived: +10, and the episode ends; every
step costs 0.1. The diary holds unconnected steps. Most of them go backwards or nowhere, 15 % go forward. So the action
logged at a given place is usually bad, but a good one was logged very near.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polrl.core.sampling import derive_seed
from polrl.worlds.offline_data import OfflineData

END, GOAL = 10.0, 9.0
STEP_REWARD, GOAL_REWARD = -0.1, 10.0
GOOD_SHARE = 0.15


def move(x: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next places, the rewards and whether the goal is reached (1 or 0), each of the shape of `x`."""
    following = (x + action.clamp(-1, 1)).clamp(0, END)
    arrived = (following >= GOAL).to(x.dtype)
    return following, STEP_REWARD + GOAL_REWARD * arrived, arrived


def line_diary(rows: int, seed: int, device: str) -> OfflineData:
    """Return a diary of `rows` unconnected steps, always the same for one seed.

    The places are uniform in [0, 9]; an action is uniform in [0.7, 1] with probability 0.15, in [-1, 0.4] otherwise.
    """
    diary = _diary(rows, seed)
    if torch.device(device).type == "cpu":
        return diary
    columns: dict[str, Any] = {n: column.to(device) for n, column in vars(diary).items() if isinstance(column, Tensor)}
    return dataclasses.replace(diary, **columns)


@functools.lru_cache(maxsize=16)
def _diary(rows: int, seed: int) -> OfflineData:
    rng = np.random.default_rng(derive_seed(seed, "line diary"))
    x = rng.uniform(0, GOAL, size=rows)
    good = rng.uniform(size=rows) < GOOD_SHARE
    action = np.where(good, rng.uniform(0.7, 1.0, size=rows), rng.uniform(-1.0, 0.4, size=rows))
    place, moved = (torch.tensor(values, dtype=torch.float32).unsqueeze(1) for values in (x, action))
    following, reward, arrived = move(place, moved)
    every = torch.arange(rows)
    return OfflineData(
        observations=place,
        actions=moved,
        rewards=reward[:, 0],
        next_observations=following,
        terminals=arrived[:, 0],
        episode_starts=every,
        episode_ends=every + 1,
        name="line-diary",
        task="",
        action_low=torch.full((1,), -1.0),
        action_high=torch.full((1,), 1.0),
    )


def walk(policy: Callable[[Tensor], Tensor], starts: Tensor, steps: int, discount: float) -> tuple[Tensor, Tensor]:
    """Let a policy walk from each start.

    Parameters
    ----------
    policy : callable
        From places [n, 1] to actions [n, 1].
    starts : Tensor, [n]
    steps : int
        At most so many.
    discount : float

    Returns
    -------
    (Tensor [n], Tensor [n])
        Discounted returns, and 1 where the goal was reached.
    """
    x, returns, arrived = starts, torch.zeros_like(starts), torch.zeros_like(starts)
    weight = 1.0
    for _ in range(steps):
        going = 1 - arrived
        x, reward, there = move(x, policy(x.unsqueeze(1))[:, 0])
        returns = returns + weight * going * reward
        arrived = torch.maximum(arrived, there * going)
        weight *= discount
    return returns, arrived
